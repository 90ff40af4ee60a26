"""The gallery: both pens, curvature, and the layer against autograd of the energy.

Legend: T tokens, D dim, H heads, R rank, M hidden.
"""

import importlib

import pytest
import torch
from gallery import GALLERY, NAMES, TWINS, derive
from helpers import ENERGIES
from sympy import Sum

import cem
from cem import energies


def test_every_energy_has_a_twin():
    assert TWINS.keys() == GALLERY.keys()


def test_every_energy_is_in_the_catalogue():
    """So that its derivative, its kernels and its layer are tested as those of all energies are."""
    assert set(GALLERY.values()) <= {case.energy for case in ENERGIES}


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
    "loosely_tied_interaction",
    "untied_interaction",
    "rotary_diagonal_plus_low_rank",
    "gated_linear_attention",
    "squared_interaction",
    "subspace_compression",
    "polynomial_memory",
    "mixture_of_experts_relu",
    "dense_interaction",
    "diagonal_interaction",
    "symmetric_interaction",
    "symmetrised_interaction",
    "collaborative_interaction",
    "tempered_interaction",
    "grouped_interaction",
    "interaction",
    "diagonal_plus_low_rank",
    "diagonal_plus_low_rank_full",
    "rotary_interaction",
    "energy_transformer",
    "sink_interaction",
    "relative_interaction",
    "sliding_window_interaction",
    "alibi_interaction",
    "gated_relu",
    "gated_sigmoid",
    "plain",
    "plain_relu",
    "plain_softplus",
    "token_parameters_relu",
}
CONVEX = {"quadratic_well", "sparse_coding", "sparsification"}
# A concave energy and a parabola of curvature 1: no rule says what it is, yet steps up to 2 descend.
UNDER_A_PARABOLA = {"memory", "sparse_memory"}


@pytest.mark.parametrize("name", GALLERY)
def test_curvature(name):
    known = "concave" if name in CONCAVE else "convex" if name in CONVEX else "unknown"
    assert GALLERY[name].curvature == known


@pytest.mark.parametrize("name", NAMES)
def test_less_a_parabola_it_is_concave(name):
    energy = GALLERY[name]
    i = energy.state.index("i")
    rest = cem.Energy(energy.expression - Sum(energy.state[i] ** 2, i) / 2)
    assert (rest.curvature == "concave") == (name in CONCAVE | UNDER_A_PARABOLA)


# -- layers --------------------------------------------------------------------------------------


def force(layer, h, x, t):
    """-dE/dh of the token at position t, by autograd of the energy itself."""
    energy, values = layer.energy_function, dict(layer.named_parameters())
    h = h.clone().requires_grad_()
    inputs = (h,) if energy.context is None else (h, x)
    if energy.function is not None:  # the torch code, not what the toolkit reads from it
        if energy.asks_positions:
            values |= {"position": torch.tensor(t), "context_position": torch.arange(len(x))}
        value = energy.function(*inputs, **values, **layer.scalars)
    else:
        value = energy(*inputs, **values, frozen=h.detach(), position=t)
    return -torch.autograd.grad(value, h)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_layer_is_the_gradient_step(name, causal):
    layer, h = derive(GALLERY[name], causal=causal)
    expected = torch.stack(
        [h[t] + force(layer, h[t], h[: t + 1] if causal else h, t) for t in range(len(h))]
    )
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


def fall_of(name, step_size, **options):
    """By how much a step lowers the energy of each token, and the squared length of the step."""
    layer, h = derive(GALLERY[name], update=cem.GradientDescent(step_size), **options)
    inputs = {} if layer.energy_function.context is None else {"context": h}
    moved = layer(h)
    fall = layer.energy(h, **inputs) - layer.energy(moved, frozen=h, **inputs)
    return fall, (moved - h).square().sum(-1)


@pytest.mark.parametrize("step_size", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("name", sorted(UNDER_A_PARABOLA))
def test_steps_up_to_two_descend_under_a_parabola(name, step_size):
    fall, square = fall_of(name, step_size, beta=5.0)
    assert (fall >= (1 / step_size - 0.5) * square * (1 - 1e-9)).all() and (fall > 0).all()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.99])
@pytest.mark.parametrize("name", sorted(CONVEX))
def test_steps_up_to_two_over_the_curvature_descend(name, share):
    """By at least (1 / step_size - L / 2) times the square of the step."""
    layer, h = derive(GALLERY[name])
    values = dict(layer.named_parameters())

    def energy(z):
        return layer.energy_function(z, frozen=h[0], **values)

    hessian = torch.func.hessian(energy)(h[0]).detach()
    largest = torch.linalg.eigvalsh(hessian).max().item()
    fall, square = fall_of(name, 2 * share / largest)
    assert (fall >= (1 - share) * largest / (2 * share) * square * (1 - 1e-9)).all()
    assert (fall > 0).all()


def test_memory_is_convex_for_near_patterns():
    """At beta |U_m - U_n|^2 <= 4 for all pairs the Hessian has no negative eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    beta = 4.0 / torch.cdist(U, U).max().square()
    for h in 3.0 * torch.randn(20, 12, dtype=torch.float64, generator=generator):
        hessian = torch.func.hessian(lambda h: energies.memory.function(h, U=U, beta=beta))(h)
        assert torch.linalg.eigvalsh(hessian).min() >= -1e-12


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


def test_the_page_of_the_gallery_is_what_the_package_says():
    page = importlib.import_module("cem.energies.__main__")
    assert page.README.read_text("utf-8") == page.page(), "type `python -m cem.energies`"
    assert {name for names in page.gallery().values() for name in names} == GALLERY.keys()
    for name in GALLERY:
        assert (page.README.parent / page.home(name)).exists()
