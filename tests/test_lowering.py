"""Fused programs: the right numbers and gradients, from the kernels that were expected."""

import inspect

import pytest
import torch
from helpers import (
    CONTEXT,
    DENSE,
    ENERGIES,
    Case,
    S,
    T,
    assert_same,
    by_name,
    copy_of,
    frozen_attention,
    gaussian,
    gradients,
    soft_capped,
    two_terms,
)
from sympy import Rational, Sum, exp, log

import cem
from cem import energies
from cem.lowering.kernels import attention_with_logsumexp
from cem.lowering.listing import GLOBALS
from cem.testing import assert_close, reference_energy, reference_of, relative_error
from cem.testing.reference import values_of

every = pytest.mark.parametrize("case", ENERGIES, ids=by_name)
with_context = pytest.mark.parametrize("case", CONTEXT, ids=by_name)


def reference(layer):
    return lambda **inputs: reference_of(layer, **inputs)


@every
def test_the_expected_kernels_fire(case):
    layer = case.derive()
    assert layer.lowering.kind == "fused"
    assert layer.lowering.kernels == case.kernels
    assert bool(layer.lowering.reasons) == any("dense" in kernel for kernel in case.kernels)


@every
def test_fused_equals_reference_and_autograd(case):
    layer = case.derive()
    inputs = case.inputs()
    found = gradients(layer, layer, inputs)
    assert_same(found, gradients(reference(layer), layer, inputs), 1e-12)
    slow = copy_of(layer, lowering="autograd")
    assert slow.lowering.kind == "autograd"
    assert_same(found, gradients(slow, slow, inputs), 1e-12)


@with_context
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(case, causal):
    layer = case.derive(causal=causal)
    inputs = case.inputs(context=True)
    found = gradients(layer, layer, inputs)
    assert_same(found, gradients(reference(layer), layer, inputs), 1e-12)
    slow = copy_of(layer, lowering="autograd")
    assert_same(found, gradients(slow, slow, inputs), 1e-12)


def some(seed, batch):
    """Pairs of tokens that are drawn."""
    return torch.rand(batch, T, S, generator=torch.Generator().manual_seed(seed)) < 0.6


MASKS = {
    "padding": torch.tensor([[1] * 5 + [0] * 4, [0] * 2 + [1] * 7]).bool(),
    "nothing, and some of it": torch.stack([torch.zeros(T, S).bool(), *some(3, 1)]),
    "one_for_all": some(4, 1),
    "nothing": torch.zeros(2, S).bool(),
    "empty_rows": (torch.arange(T) % 2 == 0)[None, :, None].expand(2, T, S),
}
# Every energy sees the first two; the others have other shapes, which are a matter of the kernel.
KERNELS = ("interaction", "soft_capped", "forgetting", "sparse_attention", "rope_grouped_window")
SEEN = [
    (case, mask)
    for n, mask in enumerate(MASKS)
    for case in CONTEXT
    if n < 2 or case.name in KERNELS
]


@pytest.mark.parametrize(("case", "mask"), SEEN, ids=[f"{case.name}-{mask}" for case, mask in SEEN])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(case, mask, causal):
    """A token that sees nothing gets no force from the context, and nothing becomes NaN."""
    layer = case.derive(causal=causal)
    inputs = case.inputs(context=True)
    found = gradients(layer, layer, inputs, visible=MASKS[mask])
    truth = gradients(reference(layer), layer, inputs, visible=MASKS[mask])
    assert_same(found, truth, 1e-12)
    assert all(value.isfinite().all() for value in found.values())
    if "nothing" in mask and case.only_context:
        assert torch.equal(found["output"][0], inputs["h"][0])
    slow = copy_of(layer, lowering="autograd")
    assert_same(gradients(slow, slow, inputs, visible=MASKS[mask]), truth, 1e-12)


@with_context
@pytest.mark.parametrize("lowering", ["fused", "autograd"])
def test_causality_to_the_bit(case, lowering):
    layer = case.derive(lowering=lowering)
    inputs = case.inputs()
    t = T // 2
    later = {
        name: torch.cat([z[:, : t + z.shape[1] - T], z[:, t + z.shape[1] - T :].cos()], 1)
        for name, z in inputs.items()
    }
    inputs = {name: z.requires_grad_() for name, z in inputs.items()}
    past = layer(**inputs)[:, :t]
    assert torch.equal(layer(**later)[:, :t], past)
    for z in inputs.values():
        (jacobian,) = torch.autograd.grad(past.square().sum(), z, retain_graph=True)
        assert jacobian[:, t + z.shape[1] - T :].count_nonzero() == 0
        assert jacobian[:, : t + z.shape[1] - T].count_nonzero() > 0


@with_context
def test_a_layer_that_is_not_causal_sees_the_future(case):
    layer = case.derive(causal=False)
    inputs = case.inputs(context=True)
    inputs["context"].requires_grad_()
    first = layer(**inputs)[:, 0]
    (jacobian,) = torch.autograd.grad(first.square().sum(), inputs["context"])
    seen = jacobian[:, 1:].abs().amax(-1) > 0
    assert seen.all() or ("dense_entmax" in case.kernels and seen.any(-1).all())


@every
def test_float32(case):
    truth_layer = case.derive()
    truth = gradients(reference(truth_layer), truth_layer, case.inputs())
    layer = case.derive().to(torch.float32)
    found = gradients(layer, layer, case.inputs(dtype=torch.float32))
    assert all(value.dtype == torch.float32 for value in found.values())
    # The parameters are those of float64 rounded to float32, which the result amplifies little.
    assert_same(found, truth, 1e-5)


@every
def test_bfloat16_is_as_good_as_eager_autograd(case):
    """The error of the fused layer against twice that of the eager one plus a rounding band."""
    truth_layer = case.derive()
    rounded = {name: p.bfloat16().double() for name, p in truth_layer.state_dict().items()}
    truth_layer.load_state_dict(rounded)
    inputs = {name: z.bfloat16().double() for name, z in case.inputs().items()}
    truth = gradients(truth_layer, truth_layer, inputs)
    low = {name: z.bfloat16() for name, z in inputs.items()}
    layer = copy_of(truth_layer).bfloat16()
    slow = copy_of(truth_layer, lowering="autograd").bfloat16()
    found, eager = gradients(layer, layer, low), gradients(slow, slow, low)
    band = torch.finfo(torch.bfloat16).eps
    for name, expected in truth.items():
        limit = 2 * relative_error(eager[name], expected) + band
        assert_close(found[name].double(), expected, limit, name=name)


@every
def test_energy_values(case):
    """The differentiable path and the one that takes log-sum-exp from the kernel."""
    layer = case.derive()
    inputs = case.inputs()
    frozen = inputs["h"].cos()
    if case.has_context:
        inputs.setdefault("context", inputs["h"].sin())
        S = inputs["context"].shape[1]
        inputs["visible"] = torch.arange(S) % 3 != 1
        inputs["visible"] = inputs["visible"].expand(2, S)
    truth = reference_energy(case.energy, frozen=frozen, **inputs, **values_of(layer))
    assert truth.requires_grad
    assert_close(layer.energy(frozen=frozen, **inputs), truth, 1e-12)
    with torch.no_grad():
        assert_close(layer.energy(frozen=frozen, **inputs), truth, 1e-12)
    slow = copy_of(layer, lowering="autograd")
    assert_close(slow.energy(frozen=frozen, **inputs), truth, 1e-12)
    parameters = list(layer.parameters())
    found = torch.autograd.grad(layer.energy(frozen=frozen, **inputs).sum(), parameters)
    expected = torch.autograd.grad(truth.sum(), parameters)
    for name, one, other in zip(layer.state_dict(), found, expected, strict=True):
        assert_close(one, other, 1e-12, name=name)


@every
def test_code_is_the_program(case):
    layer = case.derive()
    scope = dict(GLOBALS)
    exec(compile(layer.code, case.name, "exec"), scope)
    program = scope["gradient"]
    inputs = case.inputs()
    x = inputs.get("context", inputs["h"])
    visible = torch.ones(T, x.shape[1], dtype=torch.bool).tril(x.shape[1] - T)[None, None]
    places = torch.arange(x.shape[1], dtype=x.dtype)[None]
    known = {
        "h": inputs["h"],
        "frozen": inputs["h"],
        "x": x,
        "position": places[:, -T:],
        "context_position": places,
        "visible": visible,
        "causal": False,
        "states": None,
        "ordered": False,
        **dict(layer.named_parameters()),
    }
    known |= {f"{name}_": value for name, value in known.items()}
    result = program(*(known[name] for name in inspect.signature(program).parameters))
    assert_close(inputs["h"] - layer.lowering.scale * result, layer(**inputs), 1e-12)
    assert all(len(line) <= 100 for line in layer.code.splitlines())


@pytest.mark.parametrize(
    ("energy", "concatenated"),
    [
        (energies.interaction, 0),
        (energies.diagonal_plus_low_rank, 2),
        (energies.diagonal_plus_low_rank_full, 2),
        (two_terms, 2),
        (gaussian, 3),
        (frozen_attention, 0),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_one_softmax_is_one_kernel_call(energy, concatenated):
    layer = Case(energy, ()).derive()
    assert layer.code.count("scaled_dot_product_attention") == 1
    assert layer.code.count("torch.cat") == concatenated


def test_two_softmaxes_are_two_kernel_calls():
    other = energies.interaction.renamed(Q="Q2", K="K2")
    layer = Case(energies.interaction + other, ()).derive()
    assert layer.code.count("scaled_dot_product_attention") == 2


def test_a_sum_of_two_energies_with_scalars_of_one_name():
    with pytest.raises(ValueError, match="`beta` is used twice.*renamed"):
        energies.interaction + energies.memory
    layer = Case(energies.interaction + energies.memory.renamed(beta="sharpness"), ()).derive()
    inputs = {"h": torch.randn(1, 3, layer.dim, dtype=torch.float64)}
    found = gradients(layer, layer, inputs)
    assert_same(found, gradients(reference(layer), layer, inputs), 1e-12)
    assert set(layer.scalars) == {"beta", "sharpness"}


def test_keys_and_values_are_one_tensor():
    """The cache of a decoder is then one tensor a layer."""
    code = Case(energies.interaction, ()).derive().code
    assert "\n        q, k, k, attn_mask" in code or "(q, k, k, attn_mask" in code


def test_soft_capping_falls_back_to_a_dense_softmax():
    layer = Case(soft_capped, ()).derive()
    assert layer.lowering.kind == "fused"
    assert layer.lowering.kernels == DENSE
    assert "softmax over the context" in layer.lowering.reasons[0]


def test_log_sum_exp_in_any_spelling_is_the_same_program():
    dim, rank = cem.dims("dim rank")
    h, x, K = cem.state(dim), cem.context(dim), cem.parameter("K", rank, dim)
    i, j, r, s = dim.index("i"), dim.index("j"), rank.index("r"), x.index("s")
    score = Sum(Sum(K[r, i] * h[i], i) * Sum(K[r, j] * x[s, j], j), r)
    one, other = cem.Energy(-log(Sum(exp(score), s))), cem.Energy(-cem.logsumexp(score, s))
    assert one == other
    assert cem.derive(one, dim=4, rank=3).code == cem.derive(other, dim=4, rank=3).code


def test_fused_only_raises_where_it_cannot():
    with pytest.raises(cem.LoweringError, match="cannot be fused.*rewrite that line"):

        @cem.energy(h="dim")
        def running(h):
            return torch.cumsum(h, 0).square().sum()

        cem.derive(running, dim=3, lowering="fused")


def test_the_kernel_with_log_sum_exp():
    q, k, v = torch.randn(3, 1, 2, T, 8, dtype=torch.float64)
    visible = torch.rand(1, 1, T, T) < 0.5
    visible[..., 2, :] = False
    for mask, causal in ((None, True), (None, False), (visible, False)):
        out, lse = attention_with_logsumexp(q, k, v, mask, causal, 0.3)
        seen = mask if mask is not None else torch.ones(T, T).bool()
        seen = seen.tril() if causal else seen
        scores = (0.3 * q @ k.mT).masked_fill(~seen, -torch.inf)
        some = seen.any(-1).expand(1, 2, T)
        assert_close(lse[some], scores.logsumexp(-1)[some], 1e-12)
        assert_close(out[some], (scores.softmax(-1) @ v)[some], 1e-12)
        assert not lse[~some].any() and not out[~some].any()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_kernel_with_log_sum_exp_takes_any_layout(place):
    tensors = list(torch.randn(3, 1, 2, T, 8, dtype=torch.float64))
    out, lse = attention_with_logsumexp(*tensors, None, True, 0.3)
    tensors[place] = tensors[place].mT.contiguous().mT
    found, found_lse = attention_with_logsumexp(*tensors, None, True, 0.3)
    assert_close(found, out, 1e-12)
    assert_close(found_lse, lse, 1e-12)


@cem.energy(h="dim", x="seq dim", W="dim dim")
def branching(h, x, *, W, visible):
    total = 0.0 * h.sum()
    for row, seen in zip(x, visible, strict=True):
        score = row @ W @ h
        if seen and score > 0:
            total = total - score**2
        elif seen:
            total = total - (h.detach() * h).sum() * score**3
    return total


def test_a_callable_that_branches_on_its_data_is_run_token_by_token():
    layer = cem.derive(branching, dim=4, dtype=torch.float64)
    assert layer.lowering.kind == "autograd"
    assert "branches on its data" in layer.lowering.reasons[-1]
    h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h.requires_grad_()
    expected = []
    for row in h:
        tokens = []
        for t, token in enumerate(row):
            score = row[: t + 1] @ layer.W
            s = score @ token
            up = torch.where(s > 0, 2 * s, 3 * (token @ token) * s**2)
            tokens.append(token + up @ score - (torch.where(s > 0, 0, -(s**3))).sum() * token)
        expected.append(torch.stack(tokens))
    expected = torch.stack(expected)
    found = layer(h)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = (h, layer.W)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_the_energy_of_a_token_that_sees_nothing():
    """What a score adds for all context tokens alike vanishes with them, in both ways of computing."""
    dim = cem.dims("dim")
    h, x = cem.state(dim), cem.context(dim)
    i, s = dim.index("i"), x.index("s")
    energy = cem.Energy(cem.logsumexp(-Sum((h[i] - x[s, i]) ** 2, i) / 2, s), name="distances")
    layer = cem.derive(energy, dim=4, causal=False, dtype=torch.float64)
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool().expand(2, 3, 3)
    truth = reference_energy(energy, tokens, visible=visible, causal=False)
    assert torch.equal(truth[:, 1], torch.zeros(2, dtype=torch.float64))
    with torch.no_grad():
        assert_close(layer.energy(tokens, visible=visible), truth, 1e-12)
    assert_close(layer.energy(tokens.requires_grad_(), visible=visible), truth, 1e-12)


@pytest.mark.parametrize("lowering", ["fused", "autograd"])
@pytest.mark.parametrize("word", [lambda z: 1 / z, log, lambda z: z ** Rational(1, 2), exp])
def test_a_pole_at_a_token_that_is_not_seen(word, lowering):
    """An infinite term of the sum over the context is no NaN while a mask or causality hides it."""
    dim = cem.dims("dim")
    h, x = cem.state(dim), cem.context(dim)
    i, s = dim.index("i"), x.index("s")
    energy = cem.Energy(Sum(word(Sum((h[i] - x[s, i]) ** 2, i)), s), name="repulsion")
    layer = cem.derive(energy, dim=4, lowering=lowering, dtype=torch.float64)
    h = torch.randn(1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h[:, -1] *= 1e3
    inputs = {"h": h / 4}
    fixed = {"visible": ~torch.eye(5, dtype=torch.bool)[None]}
    fixed["visible"][..., -1] = fixed["visible"][..., -1, :] = False
    found = gradients(layer, layer, inputs, **fixed)
    assert_same(found, gradients(reference(layer), layer, inputs, **fixed), 1e-12)
