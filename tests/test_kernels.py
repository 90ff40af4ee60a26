"""The kernels of emitted programs against definitions of five lines, in values and gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from cem.lowering import kernels
from cem.lowering.kernels.banded import BLOCK
from cem.lowering.kernels.linear import CHUNK
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
    """The numbers in all tensors that are made, forward and backward, views among them."""

    def __init__(self):
        super().__init__()
        self.numbers = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for y in out if isinstance(out, tuple | list) else [out]:
            size = y.numel() if isinstance(y, torch.Tensor) else 0
            self.numbers, self.largest = self.numbers + size, max(self.largest, size)
        return out


def assert_linear_memory(function, short, long):
    """What a call and its backward allocate grows at most in proportion to the length."""
    totals = []
    for length in (short, long):
        with Allocated() as allocated:
            found = function(length)
            found = found if isinstance(found, tuple) else (found,)
            sum(y.sum() for y in found).backward()
        totals.append(allocated.numbers / length)
    assert totals[1] < 1.1 * totals[0], totals


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


def dense_linear(q, k, v, log_decay=None, visible=None, causal=True, state=None):
    rows, columns = q.shape[-2], k.shape[-2]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows if causal else columns)
    seen = seen if visible is None else seen & visible
    gates = (k.new_zeros(1, 1, columns) if log_decay is None else log_decay).unsqueeze(-2)
    gates = torch.where(seen, gates, 0.0)  # (B, H, T, S)
    after = torch.triu(torch.ones(columns, columns, dtype=gates.dtype), 1) @ gates.unsqueeze(-1)
    out = torch.where(seen, after.squeeze(-1).exp() * (q @ k.mT), 0.0) @ v
    return out if state is None else out + gates.sum(-1, keepdim=True).exp() * (q @ state)


def linear_inputs(length, decay=(B, H), state=True, rows=None, dtype=torch.float64):
    """q, k, v and, if wanted, the log decay and the state."""
    shapes = [(B, H, rows or length, E), (B, H, length, E), (B, H, length, V)]
    *found, logits, start = draw(*shapes, (*(decay or ()), length), (B, H, E, V))
    found += [-logits.exp()] if decay else []
    return [x.to(dtype) for x in (*found, *([start] if state else []))]


def linear_call(function, decay, state, **options):
    """The function of positional tensors, with the decay and the state in their places."""

    def run(q, k, v, *rest):
        rest = list(rest)
        log_decay = rest.pop(0) if decay else None
        return function(q, k, v, log_decay, state=rest.pop(0) if state else None, **options)

    return run


LENGTHS = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
decays = pytest.mark.parametrize("decay", [None, (B, H), (1, H), (B, 1)])


@pytest.mark.parametrize("length", LENGTHS)
@decays
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_linear_attention(length, decay, state, dtype, rtol):
    run = linear_call(kernels.linear_attention, decay, state)
    assert_same(
        lambda *inputs: run(*(x.to(dtype) for x in inputs)).double(),
        linear_call(dense_linear, decay, state),
        linear_inputs(length, decay, state),
        rtol,
        atol=1e-15,  # one token has no earlier one, so its decay no gradient but rounding
    )


PADDING = torch.rand(B, 1, 1, CHUNK + 5, generator=generator(3)) < 0.7
GENERAL = torch.rand(B, 1, CHUNK + 5, CHUNK + 5, generator=generator(4)).tril() > 0.5


@pytest.mark.parametrize(
    ("visible", "causal", "decay"),
    [
        (None, False, None),
        (PADDING, False, None),
        (PADDING, True, None),
        (PADDING, True, (B, H)),
        (PADDING[:1], True, (1, 1)),
        (GENERAL, False, None),
        (GENERAL, False, (B, H)),
        (GENERAL.mT, True, (B, H)),
    ],
)
@pytest.mark.parametrize("state", [False, True])
def test_linear_attention_with_masks(visible, causal, decay, state):
    options = {"visible": visible, "causal": causal}
    assert_same(
        linear_call(kernels.linear_attention, decay, state, **options),
        linear_call(dense_linear, decay, state, **options),
        linear_inputs(CHUNK + 5, decay, state),
        1e-12,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", [None, (B, H)])
def test_linear_attention_of_the_last_tokens_of_a_context(causal, decay):
    assert_same(
        linear_call(kernels.linear_attention, decay, True, causal=causal),
        linear_call(dense_linear, decay, True, causal=causal),
        linear_inputs(T, decay, True, rows=3),
        1e-12,
    )


@decays
@pytest.mark.parametrize("length", [1, 5, 13])
def test_linear_attention_gradcheck(decay, length, monkeypatch):
    monkeypatch.setattr("cem.lowering.kernels.linear.CHUNK", 4)
    inputs = [x.requires_grad_() for x in linear_inputs(length, decay, True)]
    assert gradcheck(linear_call(kernels.linear_attention, decay, True), inputs)


@decays
def test_a_context_in_two_parts_gives_the_same(decay):
    cut, length = CHUNK + 3, 2 * CHUNK
    q, k, v, *rest = linear_inputs(length, decay, True)
    log_decay, state = rest if decay else (None, *rest)
    whole = kernels.linear_memory(k, v, log_decay, state)
    first, second = slice(None, cut), slice(cut, None)
    decays = [None if log_decay is None else log_decay[..., part] for part in (first, second)]
    memory = kernels.linear_memory(k[:, :, first], v[:, :, first], decays[0], state)
    assert memory.shape == (B, H, 3, E, V)
    later = kernels.linear_memory(k[:, :, second], v[:, :, second], decays[1], memory[:, :, -1])
    assert_close(later[:, :, -1], whole[:, :, -1], 1e-12)
    out = kernels.linear_recall(q[:, :, second], k[:, :, second], v[:, :, second], decays[1], later)
    expected = kernels.linear_attention(q, k, v, log_decay, state=state)
    assert_close(out, expected[:, :, second], 1e-12)


def test_strong_decay_keeps_its_digits_in_float32():
    """A step of -3000 leaves running sums with a spacing of 2e-4; what follows it must not notice."""
    q, k, v, log_decay = linear_inputs(2 * CHUNK, state=False)
    log_decay = log_decay * 0.01
    log_decay[..., ::50] = -3000.0
    found = kernels.linear_attention(*(x.float() for x in (q, k, v, log_decay)))
    assert_close(found, dense_linear(q, k, v, log_decay), 1e-5)


def test_a_log_decay_of_minus_infinity_is_a_reset():
    q, k, v, log_decay = (x.requires_grad_() for x in linear_inputs(2 * CHUNK, state=False))
    reset = torch.zeros(2 * CHUNK)
    reset[[CHUNK, CHUNK + 9]] = -math.inf
    out = kernels.linear_attention(q, k, v, log_decay + reset)
    alone = slice(CHUNK + 9, None)
    expected = kernels.linear_attention(*(x[:, :, alone] for x in (q, k, v, log_decay)))
    assert_close(out[:, :, alone], expected, 1e-12)
    seen = torch.ones(1, 1, 2 * CHUNK, 2 * CHUNK, dtype=torch.bool).tril()
    assert_close(kernels.linear_attention(q, k, v, log_decay + reset, seen, False), out, 1e-12)
    grads = torch.autograd.grad(out.sum(), (q, k, v, log_decay))
    assert all(g.isfinite().all() for g in grads)


def test_linear_attention_is_causal_to_the_bit():
    inputs = linear_inputs(2 * CHUNK + 9, state=False, dtype=torch.float32)
    cut = CHUNK + 20
    changed = [torch.cat([x[:, :, :cut], -x[:, :, cut:].abs()], 2) for x in inputs]
    a, b = kernels.linear_attention(*inputs), kernels.linear_attention(*changed)
    assert torch.equal(a[:, :, :cut], b[:, :, :cut]) and not torch.equal(a, b)


def test_linear_attention_keeps_its_state_in_float32():
    inputs = [x.bfloat16() for x in linear_inputs(8 * CHUNK, (1, H), True)]
    assert kernels.linear_memory(*inputs[1:]).dtype == torch.float32
    run = linear_call(kernels.linear_attention, (1, H), True)
    exact = linear_call(dense_linear, (1, H), True)(*(x.double() for x in inputs))
    found = run(*inputs)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits.
    assert_close(found, exact, 2e-2)


@pytest.mark.parametrize("decay", [None, (B, H)])
def test_linear_attention_needs_linear_memory(decay):
    def function(length):
        inputs = [x.requires_grad_() for x in linear_inputs(length, decay, True)]
        return linear_call(kernels.linear_attention, decay, True)(*inputs)

    assert_linear_memory(function, 8 * CHUNK, 32 * CHUNK)


def test_linear_attention_compiles():
    for decay, length in ((None, 2 * CHUNK + 3), ((1, H), 2 * CHUNK + 3), ((B, H), 3)):
        assert_compiles(
            linear_call(kernels.linear_attention, decay, True), linear_inputs(length, decay, True)
        )


def dense_grouped(q, k, v, visible, causal):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return dense_attention(q, k, v, visible, causal)[0]


PER = 2  # queries for each group of keys


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


def dense_banded(q, k, v, window, sinks=0):
    s = torch.arange(q.shape[-2])
    seen = (s > s.unsqueeze(-1) - window) | (s < sinks)
    return dense_attention(q, k, v, seen, True)[0]


LONG = 2 * BLOCK + 41
windows = pytest.mark.parametrize("window", [1, 7, BLOCK, 2 * BLOCK + 1, LONG - 1, LONG, LONG + 9])


@windows
@pytest.mark.parametrize("sinks", [0, 3, BLOCK + 1])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_banded_attention(window, sinks, dtype, rtol):
    assert_same(
        lambda *inputs: kernels.banded_attention(
            *(x.to(dtype) for x in inputs), window, SCALE, sinks
        ).double(),
        lambda q, k, v: dense_banded(q, k, v, window, sinks),
        draw((B, H, LONG, E), (B, H, LONG, E), (B, H, LONG, V)),
        rtol,
        atol=rtol,  # with a window of 1 the scores have no gradient
    )


@pytest.mark.parametrize("length", [1, 2, BLOCK, 7 + 5 * BLOCK])
@pytest.mark.parametrize("sinks", [0, 3])
def test_banded_attention_with_keys_for_values_of_any_length(length, sinks):
    assert_same(
        lambda q, k: kernels.banded_attention(q, k, k, 7, SCALE, sinks),
        lambda q, k: dense_banded(q, k, k, 7, sinks),
        [x.mT.contiguous().mT for x in draw((B, H, length, E), (B, H, length, E))],
        1e-12,
        atol=1e-15,
    )


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("sinks", [0, 2])
def test_banded_attention_gradcheck(window, sinks, monkeypatch):
    monkeypatch.setattr("cem.lowering.kernels.banded.BLOCK", 2)
    inputs = [x.requires_grad_() for x in draw((1, 2, 8, 3), (1, 2, 8, 3), (1, 2, 8, 2))]
    assert gradcheck(
        lambda q, k, v: kernels.banded_attention(q, k, v, window, SCALE, sinks), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [5, BLOCK, LONG])
@pytest.mark.parametrize("sinks", [0, 3])
def test_banded_attention_is_causal_to_the_bit(dtype, window, sinks):
    cut = LONG - 30
    q, k, later = draw((B, H, LONG, E), (B, H, LONG, E), (B, H, 30, E), dtype=dtype)
    changed = torch.cat([k[:, :, :cut], later], 2)
    a = kernels.banded_attention(q, k, k, window, SCALE, sinks)
    b = kernels.banded_attention(q, changed, changed, window, SCALE, sinks)
    assert torch.equal(a[:, :, :cut], b[:, :, :cut]) and not torch.equal(a, b)


@pytest.mark.parametrize("sinks", [0, 3])
def test_what_has_left_the_window_is_forgotten_to_the_bit(sinks):
    window, cut = 20, BLOCK + 10
    q, k, earlier = draw((B, H, LONG, E), (B, H, LONG, E), (B, H, cut, E), dtype=torch.float32)
    changed = torch.cat([k[:, :, :sinks], earlier[:, :, sinks:], k[:, :, cut:]], 2)
    a = kernels.banded_attention(q, k, k, window, SCALE, sinks)
    b = kernels.banded_attention(q, changed, changed, window, SCALE, sinks)
    kept = slice(cut + window - 1, None)
    assert torch.equal(a[:, :, kept], b[:, :, kept]) and not torch.equal(a, b)


def test_sinks_keep_their_digits_in_bfloat16():
    q, k = draw((B, H, LONG, E), (B, H, LONG, E), dtype=torch.bfloat16)
    found = kernels.banded_attention(4 * q, 4 * k, k, 8, SCALE, 3)
    # bfloat16 keeps 8 bits.
    assert_close(found, dense_banded(4 * q.double(), 4 * k.double(), k.double(), 8, 3), 1e-2)


@pytest.mark.parametrize("sinks", [0, 3])
def test_banded_attention_needs_linear_memory(sinks):
    def function(length):
        q, k = (x.requires_grad_() for x in draw((1, 1, length, E), (1, 1, length, E)))
        return kernels.banded_attention(q, k, k, 16, SCALE, sinks)

    assert_linear_memory(function, 16 * BLOCK, 64 * BLOCK)


def test_banded_attention_compiles():
    for sinks in (0, 2):
        assert_compiles(
            lambda q, k, n=sinks: kernels.banded_attention(q, k, k, 9, SCALE, n),
            draw((B, H, LONG, E), (B, H, LONG, E)),
        )


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (3, -1)])
def test_a_window_that_is_none_is_refused(window, sinks):
    (q,) = draw((1, 1, 3, E))
    with pytest.raises(ValueError, match="needs a window of at least 1 .* type `window=1`"):
        kernels.banded_attention(q, q, q, window, SCALE, sinks)


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


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@masks
@pytest.mark.parametrize("rows", [1, T])
@on_gpu
def test_grouped_attention_on_cuda(visible, causal, size, rows, dtype, rtol):
    causal = causal and rows == T
    visible = visible if visible is None else visible[..., :rows, :]
    seen = visible if visible is None else visible.cuda()
    assert_same(
        on_cuda(lambda q, k, v: kernels.grouped_attention(q, k, v, seen, causal, SCALE), dtype),
        lambda q, k, v: dense_grouped(q, k, v, visible, causal),
        draw((B, H * PER, rows, E), (B, H, size, E), (B, H, size, V)),
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("sinks", [0, 3])
@on_gpu
def test_banded_attention_on_cuda(sinks, dtype, rtol):
    assert_same(
        on_cuda(lambda q, k: kernels.banded_attention(q, k, k, 20, SCALE, sinks), dtype),
        lambda q, k: dense_banded(q, k, k, 20, sinks),
        draw((B, H, LONG, E), (B, H, LONG, E)),
        rtol,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("decay", [None, (1, H)])
@on_gpu
def test_linear_attention_on_cuda(decay, dtype, rtol):
    assert_same(
        on_cuda(linear_call(kernels.linear_attention, decay, True), dtype),
        linear_call(dense_linear, decay, True),
        linear_inputs(2 * CHUNK + 3, decay, True),
        rtol,
    )
