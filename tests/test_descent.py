"""The loop over steps: every rule with norms, preconditioners, steps and refreshed gates is its definition."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from helpers import B, Case, D, T, assert_same, copy_of, gradients, looped
from torch import nn

import cem
from cem import energies
from cem.testing import assert_close, reference_energy, reference_of
from cem.testing.reference import values_of

BOTH = Case(energies.interaction + 0.5 * energies.gated_sigmoid, ("matmul", "sdpa"))
RULES = {
    "descent": lambda: cem.GradientDescent(0.1, learn=True),
    "descents": lambda: cem.GradientDescent([0.1, 0.05, 0.2], learn=True),
    "momentum": lambda: cem.Momentum(0.1, 0.7),
    "learned momentum": lambda: cem.Momentum([0.1, 0.05, 0.2], 0.7, learn=True),
    "newton": lambda: cem.Newton(0.3, 3, step_size=0.2, learn=True),
    "proximal": lambda: cem.Proximal(0.1, cem.prox.l1(0.2), learn=True),
    "line search": lambda: cem.LineSearch(2.0, 0.5, 0.3, tries=6),
    "nesterov": lambda: cem.Nesterov(0.1, 0.7, learn=True),
}
PRECONDITIONERS = [
    None,
    cem.Diagonal,
    partial(cem.DiagonalPlusLowRank, rank=3),
    [cem.ScaledIdentity, partial(cem.BlockDiagonal, blocks=2), cem.Diagonal],
]
NORMS = [None, nn.RMSNorm]
REFRESH = ["layer", "step"]


def pairwise(*factors):
    """Few rows in which every pair of values of two factors occurs."""
    wanted = {
        (m, a, n, b)
        for m, n in itertools.combinations(range(len(factors)), 2)
        for a in range(len(factors[m]))
        for b in range(len(factors[n]))
    }
    rows = list(itertools.product(*(range(len(factor)) for factor in factors)))
    while wanted:
        row = max(rows, key=lambda row: len(pairs(row) & wanted))
        wanted -= pairs(row)
        yield [factor[n] for factor, n in zip(factors, row, strict=True)]


def pairs(row):
    return {(m, row[m], n, row[n]) for m, n in itertools.combinations(range(len(row)), 2)}


GRID = list(pairwise([rule for rule in RULES if rule != "newton"], PRECONDITIONERS, NORMS, REFRESH))
GRID += [("newton", None, *pair) for pair in zip(NORMS, REFRESH, strict=True)]


def made(rule, preconditioner, norm, refresh, rules=RULES, **options):
    options |= {"preconditioner": preconditioner, "norm": norm, "refresh": refresh}
    layer = BOTH.derive(update=rules[rule](), steps=3, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("preconditioner", "norm")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer.double()


@pytest.mark.parametrize(("rule", "preconditioner", "norm", "refresh"), GRID)
def test_a_layer_is_its_definition(rule, preconditioner, norm, refresh):
    layer = made(rule, preconditioner, norm, refresh)
    assert layer.lowering.kind == "fused" and layer.lowering.kernels == BOTH.kernels
    # The definition loops over tokens, and over the iterations of a solver.
    inputs = BOTH.inputs(lead=(1,) if rule == "newton" else (B,))
    found = gradients(layer, layer, inputs)
    truth = gradients(lambda **inputs: reference_of(layer, **inputs), layer, inputs)
    # Conjugate gradients multiply rounding by the condition of the Hessian.
    rtol = 1e-9 if rule == "newton" else 1e-12
    assert_same(found, truth, rtol)
    assert all(z.abs().max() > 0 for z in truth.values())
    slow = made(rule, preconditioner, norm, refresh, lowering="autograd")
    slow.load_state_dict(layer.state_dict())
    assert_same(found, gradients(slow, slow, inputs), rtol)


every = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "newton"])
def test_an_energy_that_cannot_be_translated(rule):
    layer = Case(looped, ()).derive(update=RULES[rule](), steps=3)
    inputs = Case(looped, ()).inputs()
    truth = gradients(lambda **inputs: reference_of(layer, **inputs), layer, inputs)
    assert_same(gradients(layer, layer, inputs), truth, 1e-11)


@every
@pytest.mark.parametrize("refresh", REFRESH)
def test_a_trace_has_the_energies_of_the_states(rule, refresh):
    """Before and after every step at the states themselves, also where a rule looks ahead."""
    layer = made(rule, None, None, refresh)
    inputs = BOTH.inputs()
    h = inputs["h"]
    (found,) = cem.trace(layer, **inputs)
    assert found.before.shape == found.after.shape == (3, *h.shape[:-1])
    assert_close(found.states[-1], layer(h), 1e-12)
    for step in range(3):
        frozen = h if refresh == "layer" else found.states[step]
        fixed = {"frozen": frozen, "context": h, **values_of(layer)}
        for energies_, n in ((found.before, step), (found.after, step + 1)):
            truth = reference_energy(BOTH.energy, found.states[n], **fixed)
            assert_close(energies_[step], truth, 1e-12)


# Every try of a search and every iteration of a solver is written into the graph.
SHORT = RULES | {
    "newton": lambda: cem.Newton(0.3, 2, step_size=0.2, learn=True),
    "line search": lambda: cem.LineSearch(2.0, 0.5, 0.3, tries=2),
}


# The others differ from these in arithmetic, not in what is traced.
QUICK = ("descent", "learned momentum", "newton")


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=() if r in QUICK else pytest.mark.long) for r in RULES]
)
def test_one_graph_without_breaks(rule):
    layer = made(rule, None, nn.RMSNorm, "layer", rules=SHORT)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = BOTH.inputs()
    assert_same(gradients(compiled, layer, inputs), gradients(layer, layer, inputs), 1e-12)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z))])
def test_copies(rule, copied):
    layer = made(rule, cem.Diagonal if rule != "newton" else None, None, "layer")
    inputs = BOTH.inputs()
    assert torch.equal(copied(layer)(**inputs), layer(**inputs))


@every
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_and_vmap_over_models(rule):
    layers = [made(rule, None, None, "layer") for _ in range(2)]
    with torch.no_grad():
        layers[1].Q.mul_(0.5)
    stacked, _ = torch.func.stack_module_state(layers)
    inputs = BOTH.inputs()

    def call(values):
        return torch.func.functional_call(layers[0], values, kwargs=inputs)

    if rule == "line search":
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            torch.func.vmap(call)(stacked)
        return
    for one, layer in zip(torch.func.vmap(call)(stacked), layers, strict=True):
        assert_close(one, layer(**inputs), 1e-11)


@every
def test_bfloat16_in_and_out(rule):
    layer = made(rule, None, nn.RMSNorm, "layer").bfloat16()
    assert layer(torch.randn(2, T, D).bfloat16()).dtype == torch.bfloat16


@every
def test_the_future_changes_no_bit_of_the_past(rule):
    layer = made(rule, None, nn.RMSNorm, "step")
    h = BOTH.inputs()["h"]
    later = torch.cat([h[:, :4], h[:, 4:].cos()], dim=1)
    assert torch.equal(layer(later)[:, :4], layer(h)[:, :4])


@every
def test_state_dict_round_trip(rule):
    layer = made(rule, None, None, "layer")
    again = copy_of(layer, update=RULES[rule](), steps=3)
    assert torch.equal(layer(**BOTH.inputs()), again(**BOTH.inputs()))
