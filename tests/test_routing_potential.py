"""Potentials of routed steps: the label is what the Jacobian says.

Legend: B batch, T tokens, D dim.
"""

import pytest
import torch
from torch import nn

import cem
from cem import energies
from cem.routing import Adapter
from cem.testing import assert_close

F64 = torch.float64
B, T, D = 2, 7, 6


def plain(energy=energies.plain_softplus, **options):
    return cem.derive(energy, dim=D, hidden=5, dtype=F64, **options)


def attention(causal=False):
    sizes = {"dim": D, "heads": 2, "rank": 4}
    return cem.derive(energies.rotary_interaction, causal=causal, dtype=F64, **sizes)


def tied():
    adapter = Adapter(D, 4, tie=True)
    nn.init.normal_(adapter.gain)
    return adapter


def routed(layer, *arguments, adapter=True, **options):
    options = {"eps": 0.5, "norm": nn.Identity(), **options}
    capacity = arguments[0] if arguments else 3
    return cem.Routed(layer, capacity, tied() if adapter is True else adapter, **options).to(F64)


def asymmetry(model, h):
    """|J - J^T| / |J| of the step of one sequence.

    The derivative of a straight-through weight is another on purpose; that of its value is the one of weight 1.
    """
    eps = model.router.eps
    if model.weight == "straight_through":
        model.router.eps = 1e-30  # all weights are 1, with no derivative
    J = torch.autograd.functional.jacobian(lambda z: model(z[None])[0] - z, h)
    model.router.eps = eps
    J = J.reshape(T * D, T * D)
    return float((J - J.T).norm() / J.norm())


def gradient(value, h):
    return torch.autograd.grad(value.sum(), h)[0]


EXACT = {
    "a soft sum of energies": lambda: routed(plain(), scores="energy", weight="dense"),
    "the largest energies": lambda: routed(plain(), scores="energy", weight="straight_through"),
    "a share, and a step size": lambda: routed(
        plain(energies.memory, update=cem.GradientDescent(0.3)),
        0.5,
        scores="energy",
        weight="dense",
    ),
}
FROZEN = {
    "learned scores": lambda: routed(plain()),
    "energies, cut off": lambda: routed(plain(), scores="energy"),
    "gates": lambda: routed(plain(energies.gated_silu), scores="energy", weight="dense"),
    "a context": lambda: routed(attention(), scores="energy", weight="dense"),
    "a context, the largest": lambda: routed(
        attention(), scores="energy", weight="straight_through"
    ),
    "k-to-all": lambda: routed(attention()),
    "k-to-k": lambda: routed(attention(), context="selected", weight="straight_through"),
    "a running threshold": lambda: routed(attention(True), 0.5, causal="threshold"),
    "the same, k-to-k": lambda: routed(
        attention(True), 0.5, causal="threshold", context="selected"
    ),
    "energies, running": lambda: routed(plain(), 0.5, scores="energy", causal="threshold"),
}
NONE = {
    "adapter is not tied": lambda: routed(plain(), adapter=Adapter(D, 4)),
    "reads states through a norm": lambda: routed(plain(), norm=nn.RMSNorm(D)),
    "several layers": lambda: routed(nn.Sequential(plain(), plain())),
    "without an energy": lambda: routed(nn.Linear(D, D), adapter=None, dim=D),
    "norm stands between": lambda: routed(plain(norm=nn.RMSNorm), scores="energy", weight="dense"),
    "step.s. of Momentum": lambda: routed(plain(update=cem.Momentum(0.5))),
    "tokens move as the context": lambda: routed(
        cem.derive(
            energies.interaction, dim=D, heads=2, rank=3, causal=False, moving=True, dtype=F64
        ),
        context="selected",
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_potential(name):
    """The step is minus the gradient of V, and its Jacobian is symmetric."""
    model = EXACT[name]()
    assert model.potential.kind == "exact"
    h = torch.randn(B, T, D, dtype=F64, requires_grad=True)
    value = model.energy(h)
    assert value.shape == (B,)
    assert_close(model(h) - h, -gradient(value, h), 1e-10)
    assert asymmetry(model, h.detach()[0]) < 1e-10
    visible = torch.arange(T) < torch.tensor([[T], [4]])
    padded = model(h, visible=visible) - h
    assert_close(padded, -gradient(model.energy(h, visible=visible), h), 1e-10)


def test_energies_as_scores_are_descended():
    """A small step lowers the soft sum of the k largest energies."""
    layer = plain(update=cem.GradientDescent(0.01))
    model = routed(layer, scores="energy", weight="dense", adapter=None)
    h = torch.randn(B, T, D, dtype=F64)
    assert (model.energy(model(h)) < model.energy(h)).all()
    lam = cem.soft_top_k(layer.energy(h), 3, 0.5)
    assert_close(model(h), h + lam[..., None] * (layer(h) - h), 1e-12)


@pytest.mark.parametrize("name", FROZEN)
def test_a_potential_while_the_context_is_held(name):
    model = FROZEN[name]()
    assert model.potential.kind == "frozen-context"
    h = torch.randn(B, T, D, dtype=F64, requires_grad=True)
    step = -gradient(model.energy(h, at=h.detach()), h)
    assert_close(model(h) - h, step, 1e-10)
    assert step.norm() > 1e-3


@pytest.mark.parametrize("name", ["learned scores", "a context", "k-to-all", "a running threshold"])
def test_without_holding_it_there_is_none(name):
    h = torch.randn(T, D, dtype=F64)
    assert asymmetry(FROZEN[name](), h) > 1e-3


@pytest.mark.parametrize("reason", NONE)
def test_no_potential(reason):
    model = NONE[reason]()
    kind, said = model.potential
    assert kind == "none"
    with pytest.raises(ValueError, match=f"this step has no potential: .*{reason}"):
        model.energy(torch.randn(B, T, D, dtype=F64))
    assert len(said) > 20


def test_the_untied_adapter_is_no_gradient():
    adapter = Adapter(D, 4).to(F64)
    nn.init.normal_(adapter.up)
    J = torch.autograd.functional.jacobian(adapter, torch.randn(D, dtype=F64))
    assert (J - J.T).norm() > 0.1 * J.norm()
    with pytest.raises(
        ValueError, match=r"an untied adapter has no energy: .* type `Adapter\(6, 4, tie"
    ):
        adapter.energy(torch.randn(3, D, dtype=F64))


def test_the_tied_adapter_is_an_energy_of_the_gallery():
    adapter = Adapter(D, 5, tie=True).to(F64)
    u = torch.randn(3, D, dtype=F64, requires_grad=True)
    assert (adapter(u) == 0).all()
    # From its start it learns: the gains have a derivative.
    adapter(u).square().sum().backward()
    slope = torch.autograd.grad((adapter(u) * torch.randn(3, D)).sum(), adapter.gain)[0]
    assert (slope != 0).any()
    nn.init.normal_(adapter.gain)
    assert_close(adapter(u), -gradient(adapter.energy(u), u), 1e-12)
    layer = plain(energies.plain_relu)
    with torch.no_grad():
        layer.U.copy_(adapter.down)
        adapter.gain.fill_(-1.0)
    assert_close(u + adapter(u), layer(u), 1e-12)
    assert_close(adapter.energy(u), layer.energy(u), 1e-12)
