"""Certificates: the verdict of known layers, and what each statement says."""

import math

import pytest
import torch
from descents import GALLERY
from helpers import looped, sizes_of
from sympy import Sum
from torch import nn

import cem
from cem import energies


def derive(energy, **options):
    return cem.derive(energy, **{"dtype": torch.float64, **sizes_of(energy), **options})


dim = cem.dims("dim")
h, W = cem.state(dim), cem.parameter("W", dim, dim)
i, j = dim.index("i"), dim.index("j")
square = cem.Energy(Sum(h[i] ** 2, i) / 2, name="square")

# -- the gallery ----------------------------------------------------------------------------------

VERDICTS = {
    "alibi_interaction": "any step size",
    "collaborative_interaction": "any step size",
    "dense_interaction": "any step size",
    "diagonal_interaction": "any step size",
    "diagonal_plus_low_rank": "any step size",
    "diagonal_plus_low_rank_full": "any step size",
    "energy_transformer": "any step size",
    "gated_gelu": "bounded step size",
    "gated_linear_attention": "any step size",
    "gated_relu": "any step size",
    "gated_sigmoid": "any step size",
    "gated_silu": "bounded step size",
    "grouped_interaction": "any step size",
    "interaction": "any step size",
    "loosely_tied_gated": "measured only",
    "loosely_tied_interaction": "any step size",
    "memory": "bounded step size",
    "mixture_of_experts_relu": "any step size",
    "mixture_of_experts_silu": "measured only",
    "normalised_interaction": "measured only",
    "parallel_block": "bounded step size",
    "partly_tied_gated": "measured only",
    "partly_tied_interaction": "measured only",
    "plain_gelu": "bounded step size",
    "plain_relu": "any step size",
    "plain_silu": "bounded step size",
    "plain_softplus": "any step size",
    "polynomial_memory_3": "any step size",
    "quadratic_well": "bounded step size",
    "relative_interaction": "any step size",
    "rotary_diagonal_plus_low_rank": "any step size",
    "rotary_interaction": "any step size",
    "sliding_window_interaction": "any step size",
    "sink_interaction": "any step size",
    "soft_capped_interaction": "measured only",
    "sparse_coding": "bounded step size",
    "sparse_memory": "bounded step size",
    "sparsification": "bounded step size",
    "squared_interaction": "any step size",
    "subspace_compression": "any step size",
    "symmetric_interaction": "any step size",
    "symmetrised_interaction": "any step size",
    "tempered_interaction": "any step size",
    "token_parameters": "measured only",
    "token_parameters_relu": "any step size",
    "consistent_token_parameters": "measured only",
    "unnormalised_token_parameters": "bounded step size",
    "two_sided_gated_gelu": "measured only",
    "two_sided_gated_relu": "measured only",
    "two_sided_gated_sigmoid": "measured only",
    "two_sided_gated_silu": "measured only",
    "untied_interaction": "any step size",
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_of_each_energy_of_the_gallery(name):
    found = derive(next(e for e in GALLERY if e.name == name)).certificate
    assert found.verdict == VERDICTS[name]
    assert found.holds == (found.bound is not None and found.bound >= 1)
    assert (found.bound is None) == (found.verdict == "measured only")
    assert str(found) == found.statement
    assert found.statement.endswith(".") and "  " not in found.statement
    assert found.reasons


def test_the_whole_gallery_is_judged():
    assert {energy.name for energy in GALLERY} == set(VERDICTS)


# -- the theorems ---------------------------------------------------------------------------------


def test_a_bound_is_that_of_the_present_parameters():
    layer = derive(energies.gated)
    with torch.no_grad():
        layer.U.copy_(torch.eye(11, 12))
    assert layer.certificate.bound == pytest.approx(2 / 0.2785)
    assert "no eigenvalue above 0.2785" in str(layer.certificate)
    with torch.no_grad():
        layer.U.mul_(10)
    assert layer.certificate.bound == pytest.approx(2 / 27.85)
    assert not layer.certificate.holds
    assert "The layer's own step size, 1, is above it, so nothing is promised." in str(
        layer.certificate
    )


def test_a_quadratic_energy_is_judged_by_the_eigenvalues_of_its_matrix():
    form = cem.Energy(Sum(h[i] * W[i, j] * h[j], i, j) / 2)
    layer = cem.derive(form, dim=3, dtype=torch.float64)
    with torch.no_grad():
        layer.W.copy_(torch.diag(torch.tensor([-1.0, 0.5, 4.0])))
    assert layer.certificate.bound == pytest.approx(0.5)
    with torch.no_grad():
        layer.W.copy_(-torch.eye(3))
    assert layer.certificate.bound == math.inf
    assert "For the present parameters the energy `energy` is concave" in str(layer.certificate)


def test_the_preconditioner_counts():
    layer = cem.derive(square, dim=3, preconditioner=cem.Diagonal, dtype=torch.float64)
    assert layer.certificate.bound == pytest.approx(2)
    with torch.no_grad():
        layer.preconditioner.d.copy_(torch.tensor([0.0, 1.0, 7.0]))
    assert layer.certificate.bound == pytest.approx(2 / math.log1p(math.exp(7)))
    assert not layer.certificate.holds
    assert "positive semi-definite, with eigenvalues of at most 7.001" in str(layer.certificate)


class Signed(cem.AbstractPreconditioner):
    """It may point uphill and does not say that it is positive."""

    def forward(self, gradient):
        return -gradient


def test_a_preconditioner_that_may_be_negative():
    low = cem.DiagonalPlusLowRank(12, 2, signed=True)
    for preconditioner in (Signed, cem.Diagonal(12, signed=True), low):
        found = derive(energies.interaction, preconditioner=preconditioner).certificate
        assert (found.verdict, found.bound, found.holds) == ("measured only", None, False)
        assert "not positive semi-definite by construction" in str(found)


def test_a_preconditioner_that_is_not_finite():
    layer = derive(energies.interaction, preconditioner=cem.ScaledIdentity)
    with torch.no_grad():
        layer.preconditioner.d.fill_(math.nan)
    assert layer.certificate.verdict == "measured only"
    assert "`ScaledIdentity` is not finite" in str(layer.certificate)


@pytest.mark.parametrize("step_size", [-1.0, math.nan])
def test_a_learned_step_size_that_climbs(step_size):
    layer = derive(energies.interaction, update=cem.GradientDescent(learn=True))
    assert layer.certificate.holds
    with torch.no_grad():
        layer.update.step_size.fill_(step_size)
    found = layer.certificate
    assert (found.verdict, found.holds) == ("any step size", False)
    assert "is below 0 or no number, so nothing is promised" in str(found)


class Unknown(cem.AbstractUpdate):
    """A rule that promises nothing."""

    def init(self, h):
        return None

    def update(self, h, gradient, state, scale=1.0):
        return h - scale * gradient, state


def test_a_rule_promises_nothing_by_itself():
    found = derive(energies.interaction, update=Unknown()).certificate
    assert (found.verdict, found.holds) == ("measured only", False)
    assert "No theorem is known for `Unknown`." in str(found)


# -- norms ----------------------------------------------------------------------------------------


def test_norms_without_a_gain_and_with_an_equal_one():
    for norm in (nn.RMSNorm, nn.LayerNorm, nn.RMSNorm(12, elementwise_affine=False)):
        found = derive(energies.interaction, norm=norm).certificate
        assert (found.verdict, found.bound, found.holds) == ("any step size", math.inf, True)
        assert "is the gradient of a convex function" in str(found)
        assert "in the state after the norm" in str(found)


def test_a_norm_with_a_gain_that_differs():
    layer = derive(energies.interaction, norm=nn.RMSNorm)
    with torch.no_grad():
        layer.norm.weight[3] = 1.5
    found = layer.certificate
    assert (found.verdict, found.holds) == ("measured only", False)
    assert "has a gain that differs between coordinates" in str(found)


def test_a_norm_with_a_negative_gain():
    layer = derive(energies.interaction, norm=nn.LayerNorm)
    with torch.no_grad():
        layer.norm.weight.fill_(-1.0)
    assert layer.certificate.verdict == "measured only"


def test_a_norm_that_is_not_known():
    found = derive(energies.interaction, norm=nn.Tanh()).certificate
    assert found.verdict == "measured only"
    assert "`Tanh`, is not known to be the gradient of a convex function" in str(found)


def test_a_norm_and_a_preconditioner():
    norms = {"norm": nn.RMSNorm}
    assert derive(energies.plain, preconditioner=cem.ScaledIdentity, **norms).certificate.holds
    found = derive(energies.plain, preconditioner=cem.Diagonal, **norms).certificate
    assert (found.verdict, found.holds) == ("measured only", False)
    assert "unless P is a multiple of the identity" in str(found)


def test_a_norm_makes_a_bound_small():
    norm = nn.LayerNorm(12, eps=0.25, elementwise_affine=False)
    found = derive(energies.memory, norm=norm).certificate
    assert (found.verdict, found.bound) == ("bounded step size", pytest.approx(1.0))


@pytest.mark.parametrize("norm", [None, nn.RMSNorm])
def test_what_is_left_in_the_limit_of_small_steps(norm):
    found = derive(energies.two_sided_gated, norm=norm).certificate
    assert found.verdict == "measured only"
    assert "in the limit of small steps the energy does not rise, since dE/dt = " in str(found)
    assert ("with J the Jacobian of the norm" in str(found)) == (norm is not None)


# -- what the statement says ----------------------------------------------------------------------


def test_the_context_and_the_gates():
    both = energies.interaction + energies.gated_relu
    assert "at a fixed context and fixed gates" in str(derive(both).certificate)
    assert "at the context after all tokens have moved nothing is promised" in str(
        derive(both).certificate
    )
    assert "context" not in str(derive(energies.plain).certificate)


def test_recursion():
    told = str(derive(energies.gated_relu, steps=3).certificate)
    assert "All 3 steps speak of the same energy." in told
    told = str(derive(energies.gated_relu, steps=3, refresh="step").certificate)
    assert "there is no common energy that all of them descend" in told
    assert "same energy" in str(derive(energies.plain, steps=2, refresh="step").certificate)
    assert "steps" not in str(derive(energies.plain).certificate)


def test_a_callable_without_an_expression():
    found = cem.derive(looped, dim=12, heads=2, rank=5).certificate
    assert (found.verdict, found.reasons) == ("measured only", ())
    assert "a torch callable that could not be translated" in str(found)


def test_a_joint_energy():
    layer = derive(energies.interaction)
    layer.joint = True
    assert layer.certificate.verdict == "measured only"
    assert "total energy of all tokens" in str(layer.certificate)


def test_an_energy_of_a_kink():
    """No rule bounds |h|, and it is convex."""
    found = cem.derive(cem.Energy(Sum(abs(h[i]), i)), dim=3).certificate
    assert "it is convex" in str(found)


def test_the_derivation_quotes_the_certificate():
    layer = derive(energies.gated)
    assert str(layer.certificate)[:60] in " ".join(str(layer.derivation).split())


def test_a_layer_without_values():
    layer = derive(energies.gated, device="meta", preconditioner=cem.Diagonal, norm=nn.RMSNorm)
    assert layer.certificate.verdict == "measured only"
    assert str(layer.certificate) == "The parameters have no values, so nothing is promised."
