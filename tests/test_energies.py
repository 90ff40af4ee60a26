"""The gallery: both pens, curvature, and the layer against autograd of the energy.

Legend: T tokens, D dim, H heads, R rank, M hidden.
"""

import pytest
import sympy
import torch
from sympy import Sum
from torch.nn import functional as F

import cem
from cem import energies

GALLERY = {
    name: found
    for name in energies.__all__
    if isinstance(found := getattr(energies, name), cem.Energy)
}
SIZES = {"dim": 12, "heads": 2, "rank": 5, "hidden": 7}

dim, heads, rank, hidden, block = cem.dims("dim heads rank hidden block")


# -- twins: torch pen of what the gallery writes in SymPy ----------------------------------------


def gated_twin(activation):
    @cem.energy(h="dim", U="hidden dim", G="hidden dim")
    def gated(h, *, U, G):
        gate = activation(G @ h.detach())
        return -0.5 * (gate * (U @ h).square()).sum()

    return gated


def two_sided_gated_twin(F):
    @cem.energy(h="dim", U="hidden dim", G="hidden dim")
    def two_sided_gated(h, *, U, G):
        return -(F(torch.einsum("md,d->m", G, h)) * torch.mv(U, h)).sum()

    return two_sided_gated


def plain_twin(F):
    @cem.energy(h="dim", U="hidden dim")
    def plain(h, *, U):
        return -F(torch.nn.functional.linear(h, U)).sum()

    return plain


# -- twins: symbolic pen of what the gallery writes in torch -------------------------------------


def attention_twin(h, x, *, diagonal=None):
    """The interaction energy; ``diagonal(a, s)`` is a further term of its score."""
    width = h.shape[0]
    Q, K = cem.parameter("Q", heads, rank, width), cem.parameter("K", heads, rank, width)
    beta = cem.scalar("beta", default=rank**-0.5, positive=True)
    i, j, a, r, s = h.index("i"), h.index("j"), heads.index("a"), rank.index("r"), x.index("s")
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    if diagonal is not None:
        score += diagonal(a, s)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def interaction_twin():
    return attention_twin(cem.state(dim), cem.context(dim))


def block_twin():
    h, x = cem.state(heads * block), cem.context(heads * block)
    lam, b = cem.parameter("lam", heads, block), block.index("b")

    def diagonal(a, s):
        return Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)

    return attention_twin(h, x, diagonal=diagonal)


def full_twin():
    h, x = cem.state(dim), cem.context(dim)
    lam, i = cem.parameter("lam", heads, dim), dim.index("i")
    return attention_twin(h, x, diagonal=lambda a, s: Sum(lam[a, i] * h[i] * x[s, i], i))


def memory_twin():
    h, U = cem.state(dim), cem.parameter("U", hidden, dim)
    beta = cem.scalar("beta", default=dim**-0.5, positive=True)
    i, m = dim.index("i"), hidden.index("m")
    partition = Sum(sympy.exp(beta * Sum(U[m, i] * h[i], i)), m)
    return cem.Energy(Sum(h[i] ** 2, i) / 2 - sympy.log(partition) / beta)


TWINS = {
    "interaction": interaction_twin(),
    "diagonal_plus_low_rank": block_twin(),
    "diagonal_plus_low_rank_full": full_twin(),
    "gated": gated_twin(F.silu),
    "gated_silu": gated_twin(F.silu),
    "gated_gelu": gated_twin(F.gelu),
    "gated_relu": gated_twin(F.relu),
    "gated_sigmoid": gated_twin(F.sigmoid),
    "two_sided_gated": two_sided_gated_twin(cem.silu_antiderivative),
    "two_sided_gated_silu": two_sided_gated_twin(cem.silu_antiderivative),
    "two_sided_gated_gelu": two_sided_gated_twin(cem.gelu_antiderivative),
    "two_sided_gated_relu": two_sided_gated_twin(cem.relu_antiderivative),
    "two_sided_gated_sigmoid": two_sided_gated_twin(F.softplus),
    "plain": plain_twin(cem.relu_antiderivative),
    "plain_relu": plain_twin(cem.relu_antiderivative),
    "plain_gelu": plain_twin(cem.gelu_antiderivative),
    "plain_silu": plain_twin(cem.silu_antiderivative),
    "plain_softplus": plain_twin(cem.softplus_antiderivative),
    "memory": memory_twin(),
}


def test_every_energy_has_a_twin():
    assert TWINS.keys() == GALLERY.keys()


@pytest.mark.parametrize("name", GALLERY)
def test_both_pens_give_one_expression(name):
    energy, twin = GALLERY[name], TWINS[name]
    assert energy.reason == twin.reason == ""
    assert (energy.function is None) != (twin.function is None), "both are written in the same pen"
    assert energy == twin
    assert energy.gradient == twin.gradient


@pytest.mark.parametrize("name", GALLERY)
def test_the_name_can_be_typed(name):
    assert getattr(energies, GALLERY[name].name, GALLERY[name]) == GALLERY[name]


# -- curvature -----------------------------------------------------------------------------------

CONCAVE = {
    "interaction",
    "diagonal_plus_low_rank",
    "diagonal_plus_low_rank_full",
    "gated_relu",
    "gated_sigmoid",
    "plain",
    "plain_relu",
    "plain_softplus",
}


@pytest.mark.parametrize("name", GALLERY)
def test_curvature(name):
    assert GALLERY[name].curvature == ("concave" if name in CONCAVE else "unknown")


# -- layers --------------------------------------------------------------------------------------


def derive(energy, **options):
    """The layer at small odd sizes in float64, with every parameter drawn, and states for it."""
    known = {"dim", *map(str, energy.dims)}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    layer = cem.derive(energy, dtype=torch.float64, **sizes, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4, generator=generator)
    h = torch.randn(7, SIZES["dim"], dtype=torch.float64, generator=generator)  # (T, D)
    return layer, h


def force(layer, h, x):
    """-dE/dh of one token, by autograd of the energy itself."""
    energy, values = layer.energy_function, dict(layer.named_parameters())
    h = h.clone().requires_grad_()
    inputs = (h,) if energy.context is None else (h, x)
    if energy.function is not None:  # the torch code, not what the toolkit reads from it
        scalars = {name: value for name, value in layer.scalars.items()}
        value = energy.function(*inputs, **values, **scalars)
    else:
        value = energy(*inputs, **values, frozen=h.detach())
    return -torch.autograd.grad(value, h)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", GALLERY)
def test_layer_is_the_gradient_step(name, causal):
    layer, h = derive(GALLERY[name], causal=causal)
    expected = torch.stack(
        [h[t] + force(layer, h[t], h[: t + 1] if causal else h) for t in range(len(h))]
    )
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GALLERY)
def test_gradient_of_training(name):
    layer, h = derive(GALLERY[name])
    parameters = dict(layer.named_parameters())

    def update(h, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (h,))

    inputs = (h[:3].requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(update, inputs)


@pytest.mark.parametrize("name", sorted(CONCAVE | {"memory"}))
def test_a_step_descends(name):
    """At the default step size 1, with context and gates of before."""
    layer, h = derive(GALLERY[name])
    options = {} if layer.energy_function.context is None else {"context": h}
    before = layer.energy(h, frozen=h, **options)
    after = layer.energy(layer(h), frozen=h, **options)
    assert (after <= before).all() and (after < before).any()


def test_memory_descends_by_the_square_of_its_step():
    layer, h = derive(energies.memory, beta=5.0)
    moved = layer(h)
    fall = layer.energy(h) - layer.energy(moved)
    assert (fall >= 0.5 * (moved - h).square().sum(-1)).all()


def test_memory_is_convex_for_near_patterns():
    """At beta |U_m - U_n|^2 <= 4 for all pairs the Hessian has no negative eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    beta = 4.0 / torch.cdist(U, U).max().square()
    for h in 3.0 * torch.randn(20, 12, dtype=torch.float64, generator=generator):
        hessian = torch.func.hessian(lambda h: energies.memory.function(h, U=U, beta=beta))(h)
        assert torch.linalg.eigvalsh(hessian).min() >= -1e-12


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("interaction", {"matmul", "sdpa"}),
        ("diagonal_plus_low_rank", {"matmul", "sdpa"}),
        ("gated", {"matmul"}),
        ("two_sided_gated", {"matmul"}),
        ("plain", {"matmul"}),
        ("memory", {"matmul"}),
    ],
)
def test_kernels(name, kernels):
    lowering = derive(GALLERY[name])[0].lowering
    assert lowering.kind == "fused" and set(lowering.kernels) == kernels


def test_full_diagonal_is_one_attention_call():
    lowering = derive(energies.diagonal_plus_low_rank_full)[0].lowering
    assert "sdpa" in lowering.kernels and "dense_softmax" not in lowering.kernels
    assert not lowering.reasons


@pytest.mark.parametrize("name", ["diagonal_plus_low_rank", "diagonal_plus_low_rank_full"])
def test_without_a_diagonal_it_is_the_interaction_energy(name):
    layer, h = derive(GALLERY[name])
    torch.nn.init.zeros_(layer.lam)
    plain, _ = derive(energies.interaction)
    plain.load_state_dict({"Q": layer.Q, "K": layer.K})
    torch.testing.assert_close(layer(h), plain(h), rtol=1e-12, atol=1e-12)


def test_names():
    assert energies.gated_by(cem.softplus).name == "gated_softplus"
    assert energies.gated_by(cem.silu, name="swiglu").name == "swiglu"
    with pytest.raises(ValueError, match="has no antiderivative among the words"):
        energies.plain_by(cem.gelu_tanh)
