"""Antisymmetry in its readings, and the preconditioner that takes it away.

Legend: T tokens, D dim, N tokens of a parameter memory.
"""

import math

import pytest
import torch
from gallery import GALLERY, derive
from torch.nn import functional as F

import cem
from cem import energies
from cem.analysis import antisymmetry, best_preconditioner
from cem.analysis.readings import rows


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokenformer(keys, values):
    """Token-parameter attention: scores of norm sqrt(n), GeLU, values."""

    def update(h):
        scores = h @ keys.T
        return F.gelu(len(keys) ** 0.5 * F.normalize(scores, dim=-1)) @ values

    return update


# -- energies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GALLERY)
def test_every_energy_is_a_gradient_with_its_context_held(name):
    layer, h = derive(GALLERY[name])
    assert antisymmetry(layer, h).relative <= 1e-12


def test_the_program_of_a_gate_is_the_gradient_away_from_where_it_was_frozen():
    """The layer puts the state in the place of c; the frozen reading may not."""
    layer, h = derive(energies.gated_silu)
    with rows(layer, h) as found:
        J = found.jacobian()
    gate = F.silu(h @ layer.G.T)
    expected = torch.einsum("mi,tm,mj->tij", layer.U, gate, layer.U).detach()
    torch.testing.assert_close(J, expected, rtol=1e-12, atol=1e-12)
    assert antisymmetry(layer, h, reading="token").relative > 0.5


def test_untied_attention_is_a_gradient_where_its_query_is_frozen_too():
    """Of -(1/beta) log sum exp(... + W (h - c).v), whose Hessian W^T Cov(v) W is not what attention's is."""
    layer, h = derive(energies.untied_interaction)
    assert antisymmetry(layer, h).relative <= 1e-12
    assert antisymmetry(layer, h, reading="token").relative > 0.5


def test_one_token_moves_its_own_key_too():
    h = draw(5, 6)
    layer = cem.derive(energies.interaction, dim=6, heads=1, rank=3, dtype=torch.float64)
    Q, K = layer.Q[0].detach(), layer.K[0].detach()

    def last(z):
        x = torch.cat([h[:-1], z[None]])
        return torch.softmax(layer.scalars["beta"] * x @ K.T @ Q @ z, 0) @ x @ K.T @ Q

    J = torch.autograd.functional.jacobian(last, h[-1])
    expected = float((J - J.T).norm() / J.norm())
    found = antisymmetry(layer, h, reading="token", tokens=None)
    assert abs(float(found.rows[-1]) - expected) <= 1e-12 < 0.1 < expected


def test_two_steps_are_not_one_gradient():
    layer, h = derive(energies.interaction, steps=2, update=cem.GradientDescent(step_size=0.3))
    assert 1e-4 < antisymmetry(layer, h).relative < 0.5


def test_all_tokens_together():
    layer, h = derive(energies.energy_transformer, causal=False, joint=True)
    assert antisymmetry(layer, h).reading == "joint"
    assert antisymmetry(layer, h, exact=True).relative <= 1e-12
    causal, _ = derive(energies.interaction)
    assert antisymmetry(causal, h, reading="joint", exact=True).relative > 0.1


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_behind_a_norm(norm):
    """A gradient in what the energy reads; for the state the Hessian times the Jacobian of the norm."""
    norm = norm(12, elementwise_affine=False, eps=1e-5, dtype=torch.float64)
    layer, h = derive(energies.memory, norm=norm)
    assert antisymmetry(layer, h).relative <= 1e-12
    bare, _ = derive(energies.memory)
    with rows(bare, norm(h)) as found:
        hessian = found.jacobian()
    slope = torch.stack([torch.autograd.functional.jacobian(norm, token) for token in h])
    J = hessian @ slope
    expected = float((J - J.mT).norm() / J.norm())
    assert abs(antisymmetry(layer, h, coordinates="state").relative - expected) <= 1e-12
    assert expected > 0.01
    mirrored, _ = derive(energies.memory, norm=norm, preconditioner=cem.NormJacobian(norm))
    # The pull-back of the gradient through the norm is the gradient for the state.
    assert antisymmetry(mirrored, h).relative <= 1e-12


# -- others --------------------------------------------------------------------------------------


def test_tokenformer_is_not_a_gradient_and_by_how_much():
    keys, h = draw(24, 6, seed=1), draw(1, 9, 6)
    update = tokenformer(keys, keys)
    with rows(update, h, reading="frozen") as found:
        J = found.jacobian()
    a = h[0] @ keys.T
    u, tau = F.normalize(a, dim=-1), 24**0.5
    slope = torch.func.vmap(torch.func.vmap(torch.func.grad(F.gelu)))(tau * u)
    p, q = u @ keys, (slope * u) @ keys
    expected = torch.einsum("ti,tj->tij", p, q) - torch.einsum("ti,tj->tij", q, p)
    expected = tau / a.norm(dim=-1)[:, None, None] * expected
    torch.testing.assert_close(J - J.mT, expected, rtol=1e-12, atol=1e-12)
    assert 0.2 < antisymmetry(update, h, reading="frozen").relative < 0.5


@pytest.mark.parametrize(("dim", "known"), [(16, 0.19), (64, 0.098), (256, 0.046)])
def test_tokenformer_at_other_widths(dim, known):
    """It falls like D^(-1/2): the numbers are |J - J^T| / |J|, the mean over draws of keys."""
    found = []
    for seed in range(max(2, 128 // dim)):
        keys = draw(4 * dim, dim, seed=seed)
        h = draw(6, dim, seed=100 + seed)
        generator = torch.Generator().manual_seed(seed)
        options = {"reading": "frozen", "probes": 8, "exact": dim < 64, "generator": generator}
        found.append(antisymmetry(tokenformer(keys, keys), h, **options).relative)
    assert sum(found) / len(found) == pytest.approx(known, rel=0.08)


def test_tokens_without_a_normaliser_are_a_gradient_where_values_are_multiples_of_keys():
    keys, gains, h = draw(24, 6), draw(24, 1, seed=1), draw(9, 6, seed=2)

    def update(values):
        return lambda h: F.gelu(h @ keys.T) @ values

    assert antisymmetry(update(gains * keys), h, reading="frozen").relative <= 1e-12
    assert antisymmetry(update(draw(24, 6, seed=3)), h, reading="frozen").relative > 0.7


def test_a_rotation_and_an_independent_matrix():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    found = antisymmetry(lambda h: h @ turn, draw(3, 2))
    assert found.relative == 2.0 and found.ratio == math.inf
    matrix = draw(200, 200)
    found = antisymmetry(lambda h: h @ matrix, draw(1, 200), exact=True, reading="frozen")
    assert found.relative == pytest.approx(2**0.5, rel=0.01)
    assert found.ratio == pytest.approx(1.0, rel=0.02)


def test_nothing_moves():
    assert antisymmetry(lambda h: torch.ones_like(h), draw(3, 4), exact=False).relative == 0.0


def test_the_estimate_is_within_its_error():
    keys, values, h = draw(60, 40), draw(60, 40, seed=1), draw(6, 40, seed=2)
    update = tokenformer(keys, values)
    exact = antisymmetry(update, h, reading="frozen", exact=True)
    errors = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = antisymmetry(
            update, h, reading="frozen", exact=False, probes=16, generator=generator
        )
        errors.append((found.relative - exact.relative) / found.error)
    errors = torch.tensor(errors)
    assert exact.error == 0.0 and abs(errors.mean()) < 1.0 and 0.5 < errors.std() < 1.6


@torch.no_grad()
def test_a_module_that_mixes_tokens_is_refused_behind_a_norm_too():
    h = draw(2, 5, 6)
    for norm in (F.layer_norm, F.rms_norm):

        def update(h, norm=norm):
            return norm(h, (6,)).flip(-2)

        with pytest.raises(ValueError, match="which mixes them"):
            antisymmetry(update, h, reading="frozen")
        assert (
            antisymmetry(lambda h, norm=norm: norm(h, (6,)), h, reading="frozen").relative < 1e-12
        )


def test_a_kernel_without_forward_mode():
    """The gradient of this energy has the log-sum-exp of attention in it."""
    layer, h = derive(energies.sink_interaction)
    assert antisymmetry(layer, h, exact=False, probes=4).relative <= 1e-12


# -- preconditioners -----------------------------------------------------------------------------


def test_no_constant_preconditioner_helps_untied_tokens():
    keys, h = draw(24, 6), draw(40, 6, seed=1)
    values = draw(24, 6, seed=2)
    untied = best_preconditioner(lambda h: F.gelu(h @ keys.T) @ values, h, reading="frozen")
    assert untied.null_space == 0 and 0.1 < untied.after < untied.before
    normalised = best_preconditioner(tokenformer(keys, keys), h, reading="frozen")
    assert normalised.null_space == 0 and normalised.after > 0.1


def test_a_known_matrix_is_found():
    """v_j = c_j M^T k_j: a preconditioned gradient for any M, a descent for a positive one."""
    keys, gains, h = draw(24, 6), draw(24, 1, seed=1), draw(40, 6, seed=2)
    M = draw(6, 6, seed=3)
    found = best_preconditioner(lambda h: F.gelu(h @ keys.T) @ (gains * keys) @ M.T, h, tokens=None)
    assert found.null_space == 1 and found.before > 0.5 and found.after <= 1e-10
    assert not found.definite
    torch.testing.assert_close(
        found.preconditioner, M * (6**0.5 / M.norm()) * M.trace().sign(), rtol=1e-8, atol=1e-8
    )


def test_the_preconditioner_of_a_layer_is_found():
    layer = cem.derive(
        energies.interaction,
        dim=8,
        heads=4,
        rank=4,
        preconditioner=lambda dim: cem.BlockDiagonal(dim, 2),
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.preconditioner.L.copy_(draw(2, 4, 4))
    found = best_preconditioner(layer, draw(40, 8, seed=1))
    M = layer.preconditioner.dense().detach()
    assert found.null_space == 1 and found.definite and found.before > 0.1 > 1e-10 > found.after
    torch.testing.assert_close(found.preconditioner, M * (8**0.5 / M.norm()), rtol=1e-8, atol=1e-8)


def test_a_gradient_has_the_identity_and_separate_heads_may_be_weighed():
    layer = cem.derive(energies.interaction, dim=12, heads=2, rank=4, dtype=torch.float64)
    found = best_preconditioner(layer, draw(30, 12))
    assert (found.null_space, found.rank, found.definite) == (2, 8, True)
    assert found.after <= 1e-10
    Q = layer.Q.detach().flatten(0, 1)
    onto = Q.T @ torch.linalg.solve(Q @ Q.T, Q)  # the identity on what the layer moves along
    torch.testing.assert_close(found.P, onto * (12 / 8) ** 0.5, rtol=1e-8, atol=1e-8)


def test_a_diagonal_preconditioner_of_any_width():
    keys, h = draw(90, 60), draw(5, 60, seed=1)
    scale = draw(60, seed=2).exp()
    found = best_preconditioner(
        lambda h: F.gelu(h @ keys.T) @ keys * scale, h, kind="diagonal", reading="frozen"
    )
    assert found.null_space == 1 and found.before > 0.2 and found.after <= 1e-10
    expected = scale * (60**0.5 / scale.norm())
    torch.testing.assert_close(found.preconditioner.diag(), expected, rtol=1e-8, atol=1e-8)


# -- errors --------------------------------------------------------------------------------------


def test_errors():
    h, mixes = draw(5, 4), torch.nn.MultiheadAttention(4, 1, batch_first=True).double()
    layer = cem.derive(energies.memory, dim=4, hidden=5, dtype=torch.float64)
    for options, message in (
        ({"reading": "all"}, "one of frozen, token, joint: got 'all'"),
        ({"reading": "frozen"}, "got function, which mixes them; name what reads the context"),
        ({"hold": ("k_proj",)}, "submodules of a module: got function"),
        ({"coordinates": "state"}, "those of an EnergyLayer: got function"),
        ({"probes": 1}, "at least 2, for an error: got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            antisymmetry(lambda h: h.cumsum(-2), h, **options)
    with pytest.raises(ValueError, match=r"got 'k'; its submodules are out_proj"):
        antisymmetry(mixes, h[None], hold="k", key=h[None], value=h[None])
    with pytest.raises(ValueError, match="did not call out_proj"):
        antisymmetry(mixes, h[None], hold="out_proj", key=h[None], value=h[None])
    with pytest.raises(ValueError, match=r"shape \(\.\.\., T, D\): got \(4,\); type `h\[None\]`"):
        antisymmetry(layer, h[0])
    with pytest.raises(ValueError, match='"read" or "state": got'):
        antisymmetry(layer, h, coordinates="g")
    norm = torch.nn.RMSNorm(4, elementwise_affine=False)
    mirrored = cem.derive(
        energies.memory, dim=4, hidden=5, norm=norm, preconditioner=cem.NormJacobian(norm)
    )
    with pytest.raises(ValueError, match='type `coordinates="state"`'):
        antisymmetry(mirrored, h.float(), coordinates="read")
    with pytest.raises(ValueError, match='"full" or "diagonal": got'):
        best_preconditioner(layer, h, kind="low rank")
    with pytest.raises(ValueError, match=r'at most 48 rows: got states of 49; type `kind="diag'):
        best_preconditioner(lambda h: h, draw(2, 49))
