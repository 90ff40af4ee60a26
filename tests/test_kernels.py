"""Attention, its log-sum-exp, its transpose and grouped queries against their definitions."""

import pytest
import torch
from kernel_definitions import (
    PER,
    SCALE,
    Allocated,
    B,
    E,
    H,
    S,
    T,
    V,
    assert_compiles,
    assert_linear_memory,
    assert_same,
    dense_attention,
    dense_grouped,
    dense_transposed,
    draw,
    mask,
    masks,
)
from torch.autograd import gradcheck

from cem.lowering import kernels
from cem.testing import assert_close


@masks
@pytest.mark.parametrize("width", [E - 2, E, E + 3])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_with_logsumexp(visible, causal, size, width, dtype, rtol):
    inputs = draw((B, H, T, E), (B, H, size, E), (B, H, size, width))
    assert_same(
        lambda q, k, v: tuple(
            y.double()
            for y in kernels.attention_with_logsumexp(
                q.to(dtype), k.to(dtype), v.to(dtype), visible, causal, SCALE
            )
        ),
        lambda q, k, v: dense_attention(q, k, v, visible, causal),
        inputs,
        rtol,
    )


@masks
def test_attention_with_logsumexp_gradcheck(visible, causal, size):
    inputs = [x.requires_grad_() for x in draw((B, 1, T, E), (B, 1, size, E), (B, 1, size, V))]
    assert gradcheck(
        lambda q, k, v: kernels.attention_with_logsumexp(q, k, v, visible, causal, SCALE), inputs
    )


@pytest.mark.parametrize("visible", [None, mask(B, 1)], ids=["all", "mask"])
@pytest.mark.parametrize("shape", [(T, S), (1, H, T, S), (B, 1, 1, S), (B, H, T, 1)])
@pytest.mark.parametrize("learned", [False, True])
def test_a_bias_adds_to_the_scores(visible, shape, learned):
    *inputs, bias = draw((B, H, T, E), (B, H, S, E), (B, H, S, V), shape)

    def function(q, k, v, b=bias):
        return kernels.attention_with_logsumexp(q, k, v, visible, False, SCALE, b)

    def definition(q, k, v, b=bias):
        return dense_attention(q, k, v, visible, False, b)

    assert_same(function, definition, [*inputs, bias] if learned else inputs, 1e-12)


@pytest.mark.parametrize("output", [0, 1])
def test_either_output_alone_has_its_gradient(output):
    inputs = draw((B, H, T, E), (B, H, T, E))
    assert_same(
        lambda q, k: kernels.attention_with_logsumexp(q, k, k, None, True, SCALE)[output],
        lambda q, k: dense_attention(q, k, k, None, True)[output],
        inputs,
        1e-12,
    )


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (1, 1), (1, 300), (300, 1)])
def test_attention_with_logsumexp_of_odd_sizes(rows, columns):
    assert_same(
        lambda q, k: kernels.attention_with_logsumexp(q, k, k, None, False, SCALE),
        lambda q, k: dense_attention(q, k, k, None, False),
        draw((B, H, rows, E), (B, H, columns, E)),
        1e-12,
    )


def test_attention_with_logsumexp_is_causal_to_the_bit():
    q, k, later = draw((B, H, 70, E), (B, H, 70, E), (B, H, 30, E), seed=2, dtype=torch.float32)
    changed = torch.cat([k[:, :, :40], later], 2)
    for a, b in zip(
        kernels.attention_with_logsumexp(q, k, k, None, True, SCALE),
        kernels.attention_with_logsumexp(q, changed, changed, None, True, SCALE),
        strict=True,
    ):
        assert torch.equal(a[:, :, :40], b[:, :, :40]) and not torch.equal(a, b)


def test_attention_with_logsumexp_needs_linear_memory():
    def function(length):
        q, k = (x.requires_grad_() for x in draw((1, 1, length, E), (1, 1, length, E)))
        return kernels.attention_with_logsumexp(q, k, k, None, True, SCALE)

    assert_linear_memory(function, 256, 1024)


def test_attention_with_logsumexp_compiles():
    for visible, causal in ((mask(B, 1)[..., :T], False), (None, True)):
        assert_compiles(
            lambda q, k, v, m=visible, c=causal: kernels.attention_with_logsumexp(
                q, k, v, m, c, SCALE
            ),
            draw((B, H, T, E), (B, H, T, E), (B, H, T, V)),
        )


@pytest.mark.parametrize("bias", [None, torch.zeros(T, T, dtype=torch.float64)])
def test_one_tensor_in_every_place_compiles(bias):
    assert_compiles(
        lambda q: (
            *kernels.attention_with_logsumexp(q, q, q, None, True, SCALE, bias),
            kernels.transposed_attention(q, q, q, None, True, SCALE, bias),
        ),
        draw((B, H, T, E)),
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_with_logsumexp_under_the_transforms_of_torch_func():
    q, k = draw((B, H, T, E), (B, H, T, E))

    def total(q, k):
        return sum(y.sum() for y in kernels.attention_with_logsumexp(q, k, k, None, True, SCALE))

    expected = torch.autograd.grad(total(q.requires_grad_(), k), q)[0]
    assert_close(torch.func.grad(total)(q, k), expected, 1e-12)
    each = torch.func.vmap(torch.func.grad(total))(q.unsqueeze(1), k.unsqueeze(1))
    assert_close(each.squeeze(1), expected, 1e-12)


@pytest.mark.parametrize("which", [(1, 1), (1, 2)], ids=["one tensor", "two"])
def test_gradients_with_a_graph_where_inputs_depend_on_each_other(which):
    """Each input wants its partial derivative, not that through the others."""
    (q,) = draw((B, H, T, E))

    def total(attention, q):
        scaled = {n: n * q for n in which}
        return sum((y * y).sum() for y in attention(q, *(scaled[n] for n in which)))

    def fused(q, k, v):
        return kernels.attention_with_logsumexp(q, k, v, None, True, SCALE)

    def dense(q, k, v):
        return dense_attention(q, k, v, None, True)

    q.requires_grad_()
    expected = torch.autograd.grad(total(dense, q), q)[0]
    found = torch.autograd.grad(total(fused, q), q, create_graph=True)[0]
    assert_close(found, expected, 1e-12)
    assert_close(torch.func.grad(lambda q: total(fused, q))(q.detach()), expected, 1e-12)


def test_attention_with_logsumexp_under_autocast():
    q, k = draw((B, H, T, E), (B, H, T, E), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = kernels.attention_with_logsumexp(q, k.bfloat16(), k, None, True, SCALE)
    exact = dense_attention(q.double(), k.double(), k.double(), None, True)
    assert out.dtype == lse.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits.
    assert_close(out, exact[0], 2e-2)
    assert_close(lse, exact[1], 2e-2)


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (0, 2, 1, 3), (3, 0, 1, 2)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_layout(place, order):
    """The kernels read rows, and look at no stride by themselves."""
    inputs = draw(*[(2, 3, T, E)] * 3)
    back = [order.index(axis) for axis in range(4)]
    inputs[place] = inputs[place].permute(order).contiguous().permute(back)
    straight = [t.contiguous().requires_grad_() for t in inputs]
    other = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    for kernel in (kernels.attention_with_logsumexp, kernels.transposed_attention):
        found = [kernel(*leaves, None, True, SCALE) for leaves in (other, straight)]
        found = [f if isinstance(f, tuple) else (f,) for f in found]
        slopes = [
            torch.autograd.grad([y.square().sum() for y in f], leaves)
            for f, leaves in zip(found, (other, straight), strict=True)
        ]
        for a, b in zip((*found[0], *slopes[0]), (*found[1], *slopes[1]), strict=True):
            assert_close(a, b, 1e-12)


def test_the_second_derivative_of_attention():
    q, k, v = draw((1, 2, 3, 2), (1, 2, 3, 2), (1, 2, 3, 3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attend = lambda q, k, v: kernels.attention_with_logsumexp(q, k, v, None, True, SCALE)  # noqa: E731
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_a_second_derivative_of_transposed_attention_is_refused():
    (q,) = draw((1, 1, T, E))
    out = kernels.transposed_attention(q.requires_grad_(), q, q, None, True, SCALE)
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@masks
@pytest.mark.parametrize("width", [E - 2, E, E + 3])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_transposed_attention(visible, causal, size, width, dtype, rtol):
    assert_same(
        lambda *inputs: kernels.transposed_attention(
            *(x.to(dtype) for x in inputs), visible, causal, SCALE
        ).double(),
        lambda q, k, u: dense_transposed(q, k, u, visible, causal),
        draw((B, H, T, E), (B, H, size, E), (B, H, T, width)),
        rtol,
    )


@masks
def test_transposed_attention_gradcheck(visible, causal, size):
    inputs = [x.requires_grad_() for x in draw((B, 1, T, E), (B, 1, size, E), (B, 1, T, V))]
    assert gradcheck(
        lambda q, k, u: kernels.transposed_attention(q, k, u, visible, causal, SCALE), inputs
    )


@pytest.mark.parametrize("visible", [None, mask(B, 1)], ids=["all", "mask"])
@pytest.mark.parametrize("learned", [False, True])
def test_transposed_attention_takes_a_bias(visible, learned):
    *inputs, bias = draw((B, H, T, E), (B, H, S, E), (B, H, T, V), (1, H, T, S))
    assert_same(
        lambda q, k, u, b=bias: kernels.transposed_attention(q, k, u, visible, False, SCALE, b),
        lambda q, k, u, b=bias: dense_transposed(q, k, u, visible, False, b),
        [*inputs, bias] if learned else inputs,
        1e-12,
    )


def test_transposed_attention_is_the_gradient_of_the_logsumexp_for_the_keys():
    q, k = draw((B, H, T, E), (B, H, T, E))
    _, lse = kernels.attention_with_logsumexp(q, k.requires_grad_(), k, None, True, SCALE)
    (grad,) = torch.autograd.grad(lse.sum(), k)
    assert_close(kernels.transposed_attention(q, k, SCALE * q, None, True, SCALE), grad, 1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0), (1, 1), (1, 300), (300, 1)])
def test_transposed_attention_of_odd_sizes(rows, columns):
    assert_same(
        lambda q, k, u: kernels.transposed_attention(q, k, u, None, False, SCALE),
        lambda q, k, u: dense_transposed(q, k, u, None, False),
        draw((B, H, rows, E), (B, H, columns, E), (B, H, rows, V)),
        1e-12,
        atol=1e-12,  # one key has weight 1 and no gradient
    )


def test_transposed_attention_needs_linear_memory():
    def function(length):
        q, k = (x.requires_grad_() for x in draw((1, 1, length, E), (1, 1, length, E)))
        return kernels.transposed_attention(q, k, q, None, True, SCALE)

    assert_linear_memory(function, 256, 1024)


def test_transposed_attention_compiles():
    for visible, causal in ((mask(B, 1)[..., :T], False), (None, True)):
        assert_compiles(
            lambda q, k, u, m=visible, c=causal: kernels.transposed_attention(q, k, u, m, c, SCALE),
            draw((B, H, T, E), (B, H, T, E), (B, H, T, V)),
        )


@masks
@pytest.mark.parametrize("per", [1, PER])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_grouped_attention(visible, causal, size, per, dtype, rtol):
    assert_same(
        lambda *inputs: kernels.grouped_attention(
            *(x.to(dtype) for x in inputs), visible, causal, SCALE
        ).double(),
        lambda q, k, v: dense_grouped(q, k, v, visible, causal),
        draw((B, H * per, T, E), (B, H, size, E), (B, H, size, E)),
        rtol,
    )


@masks
def test_grouped_attention_gradcheck(visible, causal, size):
    inputs = [x.requires_grad_() for x in draw((B, PER, T, E), (B, 1, size, E), (B, 1, size, V))]
    assert gradcheck(
        lambda q, k, v: kernels.grouped_attention(q, k, v, visible, causal, SCALE), inputs
    )


DECODED = {"all": None, "some": mask(B, 1)[:, :, :1], "nothing": mask(B, 1)[:, :, 2:3]}


@pytest.mark.parametrize("visible", DECODED.values(), ids=DECODED)
@pytest.mark.parametrize("per", [1, PER])
@pytest.mark.parametrize("function", [kernels.decode_attention, kernels.grouped_attention])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    # bfloat16 keeps 8 bits, float16 11.
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 2e-2),
        (torch.float16, 3e-3),
    ],
)
def test_decode_attention(visible, per, function, dtype, rtol):
    flag = () if function is kernels.decode_attention else (False,)
    for width in (E, V):
        assert_same(
            lambda *inputs: function(
                *(x.to(dtype) for x in inputs), visible, *flag, SCALE
            ).double(),
            lambda q, k, v: dense_grouped(q, k, v, visible, False),
            draw((B, H * per, 1, E), (B, H, S, E), (B, H, S, width)),
            rtol,
        )


def test_decode_attention_with_keys_for_values():
    assert_same(
        lambda q, k: kernels.decode_attention(q, k, k, None, SCALE),
        lambda q, k: dense_grouped(q, k, k, None, False),
        draw((B, H * PER, 1, E), (B, H, 3000, E)),
        1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, T])
def test_grouped_attention_never_repeats_the_keys(dtype, rows):
    """Nothing as large as the keys of all queries is made, forward or backward."""
    per, size = 8, 512
    inputs = draw((1, 2 * per, rows, E), (1, 2, size, E), dtype=dtype)
    q, k = (x.requires_grad_() for x in inputs)
    with Allocated() as allocated:
        kernels.grouped_attention(q, k, k, None, False, SCALE).sum().backward()
    assert allocated.largest < per * k.numel()


def test_grouped_attention_compiles():
    for rows, causal in ((1, False), (T, True)):
        assert_compiles(
            lambda q, k, c=causal: kernels.grouped_attention(q, k, k, None, c, SCALE),
            draw((B, H * PER, rows, E), (B, H, rows if causal else S, E)),
        )
