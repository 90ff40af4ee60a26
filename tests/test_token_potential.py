"""The labels of token-parameter attention: every claim of an energy against the Jacobian and the gradient.

The asymmetry of a Jacobian is |J - J^T| / |J|; it is 0 where the step is the gradient of a function of the state.
"""

import math

import pytest
import torch

from cem.token_parameters import TokenParameterAttention, potential

D, N = 6, 24
EXACT = [
    ("none", "gelu", False),
    ("none", "gelu", True),
    ("none", "silu", True),
    ("none", "sigmoid", False),
    ("softmax", "gelu", False),
    ("gelu_l2_norm", "relu", False),
    ("energy_consistent", "gelu", False),
    ("energy_consistent", "gelu", True),
    ("energy_consistent", "relu", False),
    ("energy_consistent", "tanh", False),
]
# By how much their Jacobians are asymmetric with the temperature, norm or partition moving along.
FROZEN = {
    ("l2_norm_gelu", "gelu", False): 0.4,
    ("l2_norm_gelu", "gelu", True): 0.4,
    ("l2_norm_gelu", "relu", False): 0.3,
    ("gelu_l2_norm", "gelu", False): 0.01,
    ("gelu_l2_norm", "relu", True): 0.1,
    ("gelu_l2_norm", "softplus", False): 0.01,
    ("softmax", "gelu", True): 0.1,
}
NONE = {
    ("l2_norm_gelu", "gelu"): 1.0,
    ("l2_norm_gelu", "relu"): 1.0,
    ("gelu_l2_norm", "gelu"): 1.0,
    ("gelu_l2_norm", "relu"): 1.0,
    ("softmax", "gelu"): 1.0,
    ("none", "gelu"): 1.0,
    ("none", "relu"): 1.0,
    ("energy_consistent", "gelu"): 1.0,
}


def drawn(both_signs=False, dim=D, tokens=N, **options):
    layer = TokenParameterAttention(dim, dim, tokens, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        if layer.tie and not both_signs:
            layer.gain.abs_()
    return layer.requires_grad_(False)


def states(count=8, dim=D):
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def asymmetry(step, h):
    J = torch.func.jacrev(step)(h)
    return ((J - J.mT).norm() / J.norm()).item()


def force(found, h, frozen):
    return -torch.func.grad(lambda z: found.energy(z, frozen=frozen))(h)


@pytest.mark.parametrize(("normaliser", "activation", "both_signs"), EXACT)
def test_exact_is_a_gradient(normaliser, activation, both_signs):
    layer = drawn(both_signs, normaliser=normaliser, activation=activation, tie=True)
    found = potential(layer)
    assert found.label == layer.potential.label == "exact" and "bar" not in found.formula
    for h in states():
        assert asymmetry(layer, h) <= 1e-10
        # The frozen state does not matter.
        torch.testing.assert_close(layer(h), force(found, h, states()[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("normaliser", "activation", "both_signs"), FROZEN)
def test_frozen_context_is_a_gradient_at_a_fixed_context(normaliser, activation, both_signs):
    layer = drawn(both_signs, normaliser=normaliser, activation=activation, tie=True)
    found = layer.potential
    assert found.label == "frozen-context" and "bar" in found.formula
    moving = [asymmetry(layer, h) for h in states()]
    assert max(moving) >= FROZEN[normaliser, activation, both_signs], max(moving)
    for h in states():
        assert asymmetry(lambda z, h=h: force(found, z, h), h) <= 1e-10
        torch.testing.assert_close(layer(h), force(found, h, h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("normaliser", "activation"), NONE)
def test_none_has_a_counterexample(normaliser, activation):
    layer = drawn(normaliser=normaliser, activation=activation)
    found = layer.potential
    assert found.label == "none" and not found.formula
    measured = max(asymmetry(layer, h) for h in states())
    assert measured >= NONE[normaliser, activation], measured
    with pytest.raises(ValueError, match="the values are not tied to the keys.*; type `tie=True`"):
        found.energy(states())


def test_every_pair_has_a_label():
    """Gains of one sign and of both, so that no label can be without one of the tests above."""
    labels = {
        (name, activation, both): drawn(
            both, normaliser=name, activation=activation, tie=True
        ).potential.label
        for name in ("l2_norm_gelu", "gelu_l2_norm", "softmax", "none", "energy_consistent")
        for activation in ("gelu", "relu")
        for both in (False, True)
    }
    exact = {key for key, label in labels.items() if label == "exact"}
    assert exact == {
        *(("none", f, both) for f in ("gelu", "relu") for both in (False, True)),
        *(("energy_consistent", f, both) for f in ("gelu", "relu") for both in (False, True)),
        *(("softmax", f, False) for f in ("gelu", "relu")),
        ("gelu_l2_norm", "relu", False),
    }
    assert set(labels.values()) == {"exact", "frozen-context"}


def test_an_activation_without_a_word_for_its_antiderivative():
    layer = drawn(normaliser="none", activation="gelu_tanh", tie=True)
    assert layer.potential.label == "exact" and asymmetry(layer, states()[0]) <= 1e-10
    with pytest.raises(ValueError, match="has no antiderivative among the words"):
        layer.potential.energy(states())


@pytest.mark.parametrize(
    ("normaliser", "activation", "eps"),
    [("l2_norm_gelu", "gelu", 0.3), ("gelu_l2_norm", "gelu", 0.3), ("gelu_l2_norm", "relu", 0.3)],
)
def test_with_what_is_added_to_the_norm(normaliser, activation, eps):
    layer = drawn(normaliser=normaliser, activation=activation, tie=True, additive_eps=eps)
    for h in states(3):
        torch.testing.assert_close(layer(h), force(layer.potential, h, h), rtol=1e-10, atol=1e-10)


def test_the_asymmetry_of_the_default_has_rank_two_and_falls_with_the_width():
    """J - J^T = (s/|a|) (p q^T - q p^T), with p = K^T u and q = K^T diag(f'(s u)) u."""
    layer = drawn(tie=True)
    torch.nn.init.ones_(layer.gain)
    h = states()[0]
    J = torch.func.jacrev(layer)(h)
    a = layer.K @ h
    u = a / a.norm()
    slope = torch.func.vmap(torch.func.grad(torch.nn.functional.gelu))(layer.scale * u)
    p, q = layer.K.T @ u, layer.K.T @ (slope * u)
    expected = layer.scale / a.norm() * (torch.outer(p, q) - torch.outer(q, p))
    torch.testing.assert_close(J - J.T, expected, rtol=1e-12, atol=1e-12)
    found = []
    for dim in (16, 64):
        wide = drawn(tie=True, dim=dim, tokens=4 * dim)
        torch.nn.init.ones_(wide.gain)
        found.append(sum(asymmetry(wide, h) for h in states(4, dim)) / 4)
    assert found[1] / found[0] == pytest.approx(math.sqrt(16 / 64), rel=0.3), found


def test_energies_of_zero_states_are_finite():
    for name in ("l2_norm_gelu", "softmax", "none", "energy_consistent"):
        layer = drawn(normaliser=name, tie=True)
        assert layer.potential.energy(torch.zeros(2, D, dtype=torch.float64)).isfinite().all()
