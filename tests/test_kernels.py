"""The kernels of emitted programs against definitions of five lines, in values and gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from cem.lowering import kernels
from cem.testing import assert_close

B, H, T, S, E, V = 2, 3, 7, 9, 5, 4
SCALE = 0.3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shapes, seed=0, dtype=torch.float64):
    rng = generator(seed)
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes]


def mask(*shape, seed=1):
    """Bool (*shape, T, S) in which one token sees nothing."""
    visible = torch.rand(*shape, T, S, generator=generator(seed)) < 0.5
    visible[..., 2, :] = False
    return visible


def allowed(visible, causal, rows, columns):
    seen = torch.ones(rows, columns, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    return seen if visible is None else seen & visible


def assert_same(function, definition, inputs, rtol, **options):
    """Equal values and equal gradients of a random projection of all outputs."""
    results = []
    for f in (function, definition):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        found = f(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        rng = generator(5)
        cotangents = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in found]
        torch.autograd.backward(found, cotangents)
        results.append((*found, *(x.grad for x in leaves)))
    for n, (a, b) in enumerate(zip(*results, strict=True)):
        assert a.isfinite().all()
        assert_close(a, b, rtol, name=f"{n}", **options)


class Allocated(TorchDispatchMode):
    """The numbers in all tensors that are made, forward and backward; what views show counts too."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for y in out if isinstance(out, tuple | list) else [out]:
            self.numbers += y.numel() if isinstance(y, torch.Tensor) else 0
        return out


def assert_linear_memory(function, *lengths):
    """What a call and its backward allocate grows in proportion to the length."""
    totals = []
    for length in lengths:
        with Allocated() as allocated:
            found = function(length)
            found = found if isinstance(found, tuple) else (found,)
            sum(y.sum() for y in found).backward()
        totals.append(allocated.numbers / length)
    assert max(totals) < 1.1 * min(totals), totals


def assert_compiles(function, inputs, rtol=1e-12):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled, function, inputs, rtol)


def dense_attention(q, k, v, visible, causal, bias=None):
    seen = allowed(visible, causal, q.shape[-2], k.shape[-2])
    some = seen.any(-1, keepdim=True)
    scores = SCALE * q @ k.mT + (0 if bias is None else bias)
    scores = scores.masked_fill(~seen & some, -math.inf)
    weights = torch.where(some, scores.softmax(-1), 0)
    return weights @ v, torch.where(some.squeeze(-1), scores.logsumexp(-1), 0)


MASKS = {
    "all": (None, False, S),
    "causal": (None, True, T),
    "mask": (mask(B, 1), False, S),
    "one_mask": (mask(1, 1), False, S),
}
masks = pytest.mark.parametrize(("visible", "causal", "size"), MASKS.values(), ids=MASKS)


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


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_with_logsumexp_under_the_transforms_of_torch_func():
    q, k = draw((B, H, T, E), (B, H, T, E))

    def total(q, k):
        return sum(y.sum() for y in kernels.attention_with_logsumexp(q, k, k, None, True, SCALE))

    expected = torch.autograd.grad(total(q.requires_grad_(), k), q)[0]
    assert_close(torch.func.grad(total)(q, k), expected, 1e-12)
    each = torch.func.vmap(torch.func.grad(total))(q.unsqueeze(1), k.unsqueeze(1))
    assert_close(each.squeeze(1), expected, 1e-12)


def test_attention_with_logsumexp_under_autocast():
    q, k = draw((B, H, T, E), (B, H, T, E), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = kernels.attention_with_logsumexp(q, k.bfloat16(), k, None, True, SCALE)
    exact = dense_attention(q.double(), k.double(), k.double(), None, True)
    assert out.dtype == lse.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits.
    assert_close(out, exact[0], 2e-2)
    assert_close(lse, exact[1], 2e-2)


def test_a_second_derivative_is_refused():
    (q,) = draw((1, 1, T, E))
    out, _ = kernels.attention_with_logsumexp(q.requires_grad_(), q, q, None, True, SCALE)
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def dense_transposed(q, k, u, visible, causal, bias=None):
    seen = allowed(visible, causal, q.shape[-2], k.shape[-2])
    some = seen.any(-1, keepdim=True)
    scores = SCALE * q @ k.mT + (0 if bias is None else bias)
    scores = scores.masked_fill(~seen & some, -math.inf)
    return torch.where(some, scores.softmax(-1), 0).mT @ u


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


def on_cuda(function, dtype):
    """The same function of float64 tensors on the CPU, computed on CUDA in another dtype."""

    def run(*inputs):
        found = function(*(x.to("cuda", dtype) for x in inputs))
        return tuple(y.cpu().double() for y in (found if isinstance(found, tuple) else (found,)))

    return run


# bfloat16 keeps 8 bits, float16 11; gradients sum many rounded terms.
on_gpu = pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 3e-2),
        (torch.float16, 5e-3),
    ],
)


@pytest.fixture
def full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@masks
@pytest.mark.parametrize("biased", [False, True])
@on_gpu
def test_attention_with_logsumexp_on_cuda(visible, causal, size, biased, dtype, rtol):
    *inputs, bias = draw((B, H, T, E), (B, H, size, E), (B, H, size, V), (1, H, T, size))
    seen = visible if visible is None else visible.cuda()
    added = bias.to("cuda", dtype) if biased else None
    assert_same(
        on_cuda(
            lambda q, k, v: kernels.attention_with_logsumexp(q, k, v, seen, causal, SCALE, added),
            dtype,
        ),
        lambda q, k, v: dense_attention(q, k, v, visible, causal, bias if biased else None),
        inputs,
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@masks
@on_gpu
def test_transposed_attention_on_cuda(visible, causal, size, dtype, rtol):
    seen = visible if visible is None else visible.cuda()
    assert_same(
        on_cuda(lambda q, k, u: kernels.transposed_attention(q, k, u, seen, causal, SCALE), dtype),
        lambda q, k, u: dense_transposed(q, k, u, visible, causal),
        draw((B, H, T, E), (B, H, size, E), (B, H, T, V)),
        rtol,
    )
