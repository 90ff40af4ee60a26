"""What a wrong energy, layer or call is told: what, where, what was got, what to type."""

import pytest
import torch
from helpers import Case, D, c, dim, h, i, looped, m, rank, s, w, x
from sympy import Mul, S, Sum, Symbol, erf

import cem
from cem import energies

interaction, gated, block = energies.interaction, energies.gated, energies.diagonal_plus_low_rank
SIZES = {"dim": D, "heads": 2, "rank": 5}
STATE = torch.randn(2, 3, D)


@pytest.fixture
def layer():
    return cem.derive(interaction, **SIZES)


@cem.energy(h="dim", x="seq dim")
def running(h, x):
    return torch.cumsum(x @ h, 0).square().sum()


@cem.energy(h="dim")
def vector(h):
    return torch.cumsum(h, 0)


def torch_pen():
    @cem.energy(h="dim", U="hidden dim")
    def products(h, *, U):
        return U @ h


ENERGIES = {
    "a vector, torch pen": (
        torch_pen,
        r"energy `products` must return one value per token: got shape \(hidden,\).*`.sum\(\)`",
    ),
    "a vector, untranslatable": (
        lambda: cem.derive(vector, dim=D)(STATE),
        r"energy `vector` must return one value per token: got shape \(12,\).*`.sum\(\)`",
    ),
    "a free index": (
        lambda: cem.Energy(h[i] ** 2, name="free"),
        r"energy `free` must be one number per token: got the free index i.*`Sum\(..., i\)`",
    ),
    "no state": (
        lambda: cem.Energy(Sum(w[i], i), name="still"),
        "energy `still` does not depend on a state.*type `h = cem.state",
    ),
    "a frozen state only": (
        lambda: cem.Energy(Sum(c[i], i), name="ice"),
        "energy `ice` does not depend on a state",
    ),
    "two states": (
        lambda: cem.Energy(Sum(cem.state(dim, name="z")[i] * h[i], i), name="two"),
        "energy `two` has more than one state: got h, z",
    ),
    "two contexts": (
        lambda: cem.Energy(Sum(x[s, i] * h[i] * cem.context(dim, name="z")[s, i], i, s)),
        "more than one context: got x, z",
    ),
    "one name, two shapes": (
        lambda: cem.Energy(Sum(w[i] * h[i], i) + Sum(cem.parameter("w", rank)[s], s)),
        "axes|two shapes",
    ),
    "another width of an index": (
        lambda: cem.Energy(Sum(w[m] * h[i], i, m)),
        "`w` has the axes .dim.: got the index `m` over hidden where dim stands",
    ),
    "a symbol without meaning": (
        lambda: cem.Energy(Symbol("k") * Sum(h[i], i), name="lost"),
        r"energy `lost`: the symbol `k`.*`cem.scalar\(\"k\"\)`",
    ),
    "a function that is no word": (
        lambda: cem.Energy(Sum(erf(h[i]), i), name="lost"),
        "energy `lost`: `erf` is not a word of the language: type one of",
    ),
    "a reserved name": (
        lambda: cem.Energy(Sum(cem.parameter("frozen", dim)[i] * h[i], i), name="e"),
        "energy `e`: the parameter name `frozen` is a name of the layer's own inputs",
    ),
    "a name that is no name": (
        lambda: cem.Energy(Sum(cem.parameter("a.b", dim)[i] * h[i], i), name="e"),
        "energy `e`: the parameter name 'a.b' is not a Python name",
    ),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_energies(name):
    make, message = ENERGIES[name]
    with pytest.raises(ValueError, match=message):
        make()


DERIVE = {
    "an unknown size": (
        lambda: cem.derive(interaction, hidden=4, **SIZES),
        "energy `interaction` has no size or scalar `hidden`: got hidden=4; its sizes are dim,"
        r" heads, rank and its scalars are beta; type `cem.derive\(interaction, dim=..., heads=...",
    ),
    "a missing size": (
        lambda: cem.derive(interaction, dim=12, heads=2),
        r"energy `interaction` needs the size rank: got dim=12, heads=2; type `cem.derive\(",
    ),
    "no size at all": (
        lambda: cem.derive(interaction),
        "needs the sizes dim, heads, rank: got none",
    ),
    "a size of zero": (
        lambda: cem.derive(interaction, dim=12, heads=0, rank=5),
        "size `heads` is a positive integer: got heads=0",
    ),
    "half a head": (
        lambda: cem.derive(interaction, dim=12, heads=2.5, rank=5),
        "size `heads` is a positive integer: got heads=2.5",
    ),
    "dim against heads * block": (
        lambda: cem.derive(block, dim=12, heads=2, block=5, rank=2),
        r"the width of the state is block\*heads = 5 \* 2 = 10: got dim=12; leave one of them out",
    ),
    "dim that heads do not divide": (
        lambda: cem.derive(block, dim=13, heads=2, rank=2),
        r"the width block\*heads must be a multiple of 2: got dim=13",
    ),
    "no steps": (
        lambda: cem.derive(interaction, steps=0, **SIZES),
        "`steps`.*got 0; type `steps=1`",
    ),
    "half a step": (lambda: cem.derive(interaction, steps=1.5, **SIZES), "`steps`.*got 1.5"),
    "an unknown refresh": (
        lambda: cem.derive(interaction, refresh="never", **SIZES),
        '`refresh` is "layer" or "step": got \'never\'; type',
    ),
    "an unknown lowering": (
        lambda: cem.derive(interaction, lowering="fast", **SIZES),
        '`lowering` is one of "auto", "fused", "flex", "autograd": got \'fast\'; type `lowering="auto"`',
    ),
    "a lowering that does not fit": (
        lambda: cem.derive(running, dim=3, causal=False, lowering="fused"),
        'energy `running` cannot be fused.*`cumsum` has no translation.*type `lowering="autograd"`',
    ),
    "a causal layer that cannot be masked": (
        lambda: cem.derive(running, dim=3),
        "energy `running` cannot be masked, so a causal layer of it could see the future.*line"
        r" .*argument `visible` \(bool, \(seq,\)\).*or type `causal=False`",
    ),
    "a scalar without a value": (
        lambda: cem.derive(cem.Energy(cem.scalar("z") * Sum(h[i], i), name="e"), dim=3),
        r"energy `e` needs the scalar `z`: it has no default; type `cem.derive\(e, ..., z=1.0\)`",
    ),
    "a default in foreign sizes": (
        lambda: cem.derive(cem.Energy(cem.scalar("z", default=rank) * Sum(h[i], i)), dim=3),
        "the default of the scalar `z` is rank, but the energy has no size rank; type",
    ),
    "a negative temperature": (
        lambda: cem.derive(interaction, beta=-1, **SIZES),
        "scalar `beta` is positive: got -1",
    ),
    "a scalar to learn that is none": (
        lambda: cem.derive(interaction, learn="gamma", **SIZES),
        "energy `interaction` has no scalar `gamma` to learn: its scalars are beta",
    ),
    "a parameter that hides a method": (
        lambda: cem.derive(
            cem.Energy(Sum(cem.parameter("forward", dim)[i] * h[i], i), name="e"), dim=3
        ),
        "energy `e`: the parameter name `forward` is a name of the layer itself; type another",
    ),
    "a learned scalar that hides a part": (
        lambda: cem.derive(
            cem.Energy(cem.scalar("norm", default=1.0) * Sum(h[i], i), name="e"),
            dim=3,
            learn="norm",
        ),
        "energy `e`: the parameter name `norm` is a name of the layer itself; type another",
    ),
    "a size that is no number": (
        lambda: cem.derive(interaction, **{**SIZES, "dim": "large"}),
        "size `dim` is a positive integer: got dim='large'; type `dim=64`",
    ),
    "a preconditioner of another width": (
        lambda: cem.derive(interaction, preconditioner=cem.Diagonal(11), **SIZES),
        r"the preconditioner has dim=11 and the state 12.*type `cem.Diagonal\(12\)`",
    ),
    "a step that climbs": (
        lambda: cem.GradientDescent(0),
        "positive step size: got 0; type `cem.GradientDescent",
    ),
}


@pytest.mark.parametrize("name", DERIVE)
def test_derive(name):
    make, message = DERIVE[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_derive_takes_an_energy():
    with pytest.raises(
        TypeError, match="`derive` takes an Energy: got function; type `@cem.energy"
    ):
        cem.derive(lambda h: h.sum(), dim=3)


def one_token(**values):
    shapes = {"h": (12,), "x": (4, 12), "Q": (2, 5, 12), "K": (2, 5, 12)} | values
    tensors = {name: torch.randn(shape) for name, shape in shapes.items() if shape is not None}
    return interaction(tensors.pop("h"), tensors.pop("x", None), **tensors)


CALLS = {
    "sizes that contradict": ({"K": (2, 4, 12)}, r"size `rank` is 4 elsewhere and 5 in `Q`"),
    "too few axes": ({"K": (2, 12)}, r"`K` has shape \(heads, rank, dim\): got \(2, 12\)"),
    "a missing parameter": ({"K": None}, r"needs the parameter `K` of shape \(heads, rank, dim\)"),
    "a missing context": ({"x": None}, "energy `interaction` needs its context: call it with `x`"),
    "a tensor too many": (
        {"V": (2, 2)},
        "has no parameter or scalar `V`: got .*; it has K, Q, beta",
    ),
    "a state of another width": ({"h": (13,)}, "size `dim` is 13 elsewhere and 12 in `x`"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_energy_of_one_token(name):
    changed, message = CALLS[name]
    with pytest.raises(ValueError, match=f"energy `interaction`.*{message}|{message}"):
        one_token(**changed)


def test_a_width_in_blocks():
    values = {"Q": torch.randn(2, 5, 13), "K": torch.randn(2, 5, 13), "lam": torch.randn(2, 6)}
    with pytest.raises(ValueError, match=r"an axis of `h` is block\*heads = 12: got 13"):
        block(torch.randn(13), torch.randn(4, 13), **values)


FORWARD = {
    "a state of another width": (
        {"h": torch.randn(2, 3, 11)},
        r"layer `interaction` takes a state of shape \(..., tokens, 12\): got \(2, 3, 11\)",
    ),
    "one token without its axis": ({"h": torch.randn(12)}, r"tokens, 12\): got \(12,\)"),
    "a context of another width": (
        {"context": torch.randn(2, 3, 11)},
        r"takes a context of shape \(..., tokens, 12\): got \(2, 3, 11\)",
    ),
    "other leading sizes": (
        {"context": torch.randn(3, 3, 12)},
        r"same leading sizes: got \(2, 3, 12\) and \(3, 3, 12\); expand one of them",
    ),
    "no token": (
        {"h": torch.randn(2, 0, 12)},
        r"needs at least one token: got a state of shape \(2, 0, 12\)",
    ),
    "an empty context": (
        {"context": torch.randn(2, 0, 12)},
        r"needs at least one token: got a context of shape \(2, 0, 12\)",
    ),
    "a context that is too short": (
        {"context": torch.randn(2, 2, 12)},
        "at least as long as the state: got 2 context tokens for 3; derive it with `causal=False`",
    ),
    "a mask of another length": (
        {"visible": torch.ones(2, 4).bool()},
        r"`visible` must have shape \(2, 3\) or \(2, 3, 3\).*got \(2, 4\)",
    ),
    "a mask without a batch": (
        {"visible": torch.ones(3, 3).bool()},
        r"got \(3, 3\); type `mask\[None\]`",
    ),
    "a mask of another batch": ({"visible": torch.ones(5, 3, 3).bool()}, r"got \(5, 3, 3\)"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(layer, name):
    changed, message = FORWARD[name]
    with pytest.raises(ValueError, match=f"(?s)layer `interaction`.*{message}|{message}"):
        layer(**{"h": STATE, **changed})
    with pytest.raises(ValueError, match=message):
        layer.energy(**{"h": STATE, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"h": torch.zeros(2, 3, 12).long()},
            r"floating-point state: got torch.int64.*`h.float\(\)`",
        ),
        ({"context": torch.zeros(2, 3, 12).long()}, "floating-point context: got torch.int64"),
        ({"visible": torch.ones(2, 3)}, r"must be bool: got torch.float32; type `mask.bool\(\)`"),
    ],
)
def test_types(layer, changed, message):
    with pytest.raises(TypeError, match=f"layer `interaction`.*{message}"):
        layer(**{"h": STATE, **changed})


def test_a_frozen_state_of_another_shape(layer):
    with pytest.raises(ValueError, match=r"`frozen` must have the shape.*got \(5, 3, 12\)"):
        layer.energy(STATE, frozen=torch.randn(5, 3, 12))


@pytest.mark.parametrize("what", ["context", "visible"])
def test_a_layer_without_a_context(what):
    layer = cem.derive(gated, dim=12, hidden=3)
    with pytest.raises(ValueError, match=f"has no context: got `{what}`; call it without `{what}`"):
        layer(STATE, **{what: STATE > 0})


def test_a_mask_on_an_energy_that_cannot_be_masked():
    layer = cem.derive(running, dim=12, causal=False)
    with pytest.raises(ValueError, match="layer `running` cannot be masked.*argument `visible`"):
        layer(STATE, visible=torch.ones(2, 3).bool())


@pytest.mark.parametrize("lowering", ["fused", "autograd"])
def test_nan_is_not_hidden(lowering):
    layer = cem.derive(interaction, lowering=lowering, **SIZES)
    poisoned = STATE.clone()
    poisoned[0, 1] = float("nan")
    out = layer(poisoned)
    assert out[0, 1:].isnan().all() and out[1].isfinite().all()
    energies = layer.energy(poisoned)
    assert energies[0, 1:].isnan().all() and energies[1].isfinite().all()


def test_an_empty_batch_is_no_error(layer):
    assert layer(torch.randn(0, 3, 12)).shape == (0, 3, 12)
    assert Case(looped, ()).derive(causal=False)(STATE.double()).shape == STATE.shape


def test_a_size_with_the_name_of_an_argument_of_derive():
    steps = cem.dims("steps")
    h, m = cem.state(steps), steps.index("m")
    energy = cem.Energy(Sum(h[m] ** 2, m), name="e")
    with pytest.raises(
        ValueError, match="`steps` is an argument of `derive` itself.*type another name"
    ):
        cem.derive(energy, steps=3)


def test_a_learned_scalar_beside_a_parameter_that_has_its_place():
    dim = cem.dims("dim")
    h, i = cem.state(dim), dim.index("i")
    beta, other = cem.scalar("beta", default=1.0, positive=True), cem.parameter("log_beta", dim)
    energy = cem.Energy(beta * Sum(other[i] * h[i], i), name="e")
    with pytest.raises(ValueError, match="stored as `log_beta`, a parameter; type another name"):
        cem.derive(energy, dim=3, learn="beta")
    assert cem.derive(energy, dim=3).log_beta.shape == (3,)


def _quadratic():
    dim = cem.dims("dim")
    h, i = cem.state(dim), dim.index("i")
    return Sum(h[i] ** 2, i)


def test_an_update_that_is_no_rule():
    energy = cem.Energy(_quadratic(), name="e")
    for wrong in (0.1, cem.GradientDescent):
        with pytest.raises(TypeError, match="`update` is an update rule: got .*GradientDescent"):
            cem.derive(energy, dim=3, update=wrong)


def test_energies_add_subtract_and_scale():
    one = cem.Energy(_quadratic(), name="one")
    assert sum([one, one]) == 2 * one == one - -one
    assert one / 2 == 0.5 * one
    with pytest.raises(TypeError):
        one + 1


@pytest.mark.parametrize("factor", ["ImaginaryUnit", "Infinity", "NegativeInfinity"])
def test_an_energy_that_is_no_finite_real_number(factor):
    with pytest.raises(ValueError, match="energy `e` must be a finite real number"):
        cem.Energy(Mul(getattr(S, factor), _quadratic(), evaluate=False), name="e")
