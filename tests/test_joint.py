"""Energies of all tokens differentiated together, against autograd of their sum."""

import pytest
import torch
from helpers import CONTEXT, Case, assert_same, by_name, gradients

import cem
from cem import energies
from cem.testing import assert_close, reference_of

# A decay that reads the context has no derivative for it.
JOINT = [c for c in CONTEXT if not c.needs_context and c.name != "gated_linear_attention"]


def mask(seed=3):
    visible = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
    visible[:, 2] = False
    return visible


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("case", JOINT, ids=by_name)
def test_joint_layers(case, steps):
    """Fused and autograd layers equal the definition, in the output and in every gradient."""
    update = cem.GradientDescent(0.3)
    layer = case.derive(causal=False, joint=True, steps=steps, update=update)
    slow = case.derive(causal=False, joint=True, steps=steps, update=update, lowering="autograd")
    truth = gradients(lambda **z: reference_of(layer, **z), layer, case.inputs(), visible=mask())
    assert_same(gradients(layer, layer, case.inputs(), visible=mask()), truth, 1e-11)
    assert_same(gradients(slow, slow, case.inputs(), visible=mask()), truth, 1e-11)
    assert layer.lowering.kind == "fused"


@pytest.mark.parametrize("name", ["interaction", "diagonal_plus_low_rank", "gaussian"])
def test_joint_attention_is_two_kernel_calls(name):
    """One forward and one transposed call a softmax, and no product of all pairs of tokens."""
    case = next(case for case in JOINT if case.name == name)
    layer = case.derive(causal=False, joint=True)
    assert layer.lowering.kernels == ("matmul", "sdpa", "transposed_sdpa")
    assert layer.code.count("transposed_attention") == 1


def test_a_joint_step_with_a_norm():
    case = Case(energies.interaction, ())
    norm = torch.nn.LayerNorm(12, dtype=torch.float64)
    layer = case.derive(causal=False, joint=True, steps=2, norm=norm)
    truth = gradients(lambda **z: reference_of(layer, **z), layer, case.inputs())
    assert_same(gradients(layer, layer, case.inputs()), truth, 1e-11)


def published_energy(g, Q, K, xi, beta):
    """The energy of a block of Energy Transformer at normed tokens (N, D), token by token: equations 4 and 7."""
    total = 0.0
    for C in range(len(g)):
        for Q_h, K_h in zip(Q, K, strict=True):
            others = [beta * (K_h @ g[B]) @ (Q_h @ g[C]) for B in range(len(g)) if B != C]
            total = total - torch.logsumexp(torch.stack(others), 0) / beta
        total = total - torch.relu(xi @ g[C]).square().sum() / 2
    return total


def published_update(g, Q, K, xi, beta):
    """-dE/dg of that energy, (N, D): the two terms of equation 6 and the memory."""
    q, k = g @ Q.mT, g @ K.mT  # (H, N, R)
    scores = beta * q @ k.mT
    p = scores.masked_fill(torch.eye(len(g), dtype=torch.bool), -torch.inf).softmax(-1)
    looks, looked_at = (p @ k @ Q).sum(0), (p.mT @ q @ K).sum(0)
    return looks + looked_at + torch.relu(g @ xi.mT) @ xi


@pytest.mark.parametrize("steps", [1, 4])
def test_the_update_of_energy_transformer(steps):
    """arXiv:2302.07253 by hand, LayerNorm and all: x <- x - alpha dE/dg, g = gamma LayerNorm(x) + delta."""
    (case,) = (case for case in JOINT if case.energy == energies.energy_transformer)
    norm = torch.nn.LayerNorm(12, dtype=torch.float64)
    torch.nn.init.constant_(norm.weight, 1.3)
    torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(0))
    update = cem.GradientDescent(0.1)
    options = {"causal": False, "joint": True, "norm": norm, "update": update, "beta": 0.7}
    layer = case.derive(steps=steps, **options)
    parameters = (layer.Q, layer.K, layer.xi)
    (h,) = case.inputs().values()
    for tokens, found in zip(h, layer(h), strict=True):
        x = tokens
        for _ in range(steps):
            g = 1.3 * (x - x.mean(-1, keepdim=True))
            g = g / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt() + norm.bias
            x = x + 0.1 * published_update(g, *parameters, 0.7)
        assert_close(found, x, 1e-12)
    g = norm(h[0]).detach().requires_grad_()
    energy = published_energy(g, *parameters, 0.7)
    (slope,) = torch.autograd.grad(energy, g)
    assert_close(published_update(g, *parameters, 0.7), -slope, 1e-12)
    assert_close(layer.energy(h[0]).sum(), energy, 1e-12)


def test_a_joint_step_lowers_the_sum_of_the_energies():
    case = Case(energies.interaction, ())
    layer = case.derive(causal=False, joint=True, update=cem.GradientDescent(1e-3))
    (h,) = case.inputs().values()
    assert layer.energy(layer(h)).sum() < layer.energy(h).sum()


def test_what_a_joint_layer_refuses():
    sizes = {"dim": 12, "heads": 2, "rank": 5}
    with pytest.raises(ValueError, match="cannot be causal: type `causal=False`"):
        cem.derive(energies.interaction, joint=True, **sizes)
    with pytest.raises(ValueError, match="`gated_silu` has no context, so no context can follow"):
        cem.derive(energies.gated, joint=True, causal=False, dim=12, hidden=3)
    with pytest.raises(ValueError, match="a decay that reads the context has no derivative for it"):
        cem.derive(energies.gated_linear_attention, joint=True, causal=False, **sizes)
    layer = cem.derive(energies.interaction, joint=True, causal=False, **sizes)
    h = torch.randn(1, 3, 12)
    with pytest.raises(
        ValueError, match="moves its context, which is the state itself: got `context`"
    ):
        layer(h, context=h)
