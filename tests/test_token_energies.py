"""The token-parameter energies of the gallery against the layer, :mod:`cem.token_parameters`."""

import runpy
from pathlib import Path

import pytest
import torch
from gallery import GALLERY, derive

import cem
from cem.testing import assert_close
from cem.token_parameters import TokenParameterAttention

LAYERS = {
    "token_parameters": ("l2_norm_gelu", "gelu"),
    "token_parameters_relu": ("l2_norm_gelu", "relu"),
    "consistent_token_parameters": ("energy_consistent", "gelu"),
    "unnormalised_token_parameters": ("none", "gelu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_the_tied_layer(name):
    layer, h = derive(GALLERY[name])
    normaliser, activation = LAYERS[name]
    tied = TokenParameterAttention(
        layer.dim,
        layer.dim,
        layer.sizes["tokens"],
        normaliser=normaliser,
        activation=activation,
        tie=True,
        dtype=torch.float64,
    )
    tied.load_state_dict(tied.state_dict() | layer.state_dict())
    assert layer.lowering.kind == "fused" and not layer.lowering.reasons
    assert_close(layer(h) - h, tied(h), 1e-11)
    # The energies differ by what does not depend on the state, at one frozen state.
    frozen = h[:1].expand_as(h)
    difference = layer.energy(h, frozen=frozen) - tied.potential.energy(h, frozen=frozen)
    assert_close(difference, difference[:1].expand_as(difference), 1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_of_zeros_has_a_step_and_a_gradient(name):
    layer, h = derive(GALLERY[name])
    h = torch.cat((torch.zeros_like(h[:1]), h[1:])).requires_grad_()
    layer(h).square().sum().backward()
    assert h.grad.isfinite().all() and layer.K.grad.isfinite().all()


def test_the_gallery_is_there_where_tensors_have_no_numbers():
    """`from_pretrained` asks for it so, and may be the first to ask."""
    file = Path(__file__).parents[1] / "energies" / "token_parameters.py"
    with torch.device("meta"):
        module = runpy.run_path(str(file))
    found = module["consistent_token_parameters"]
    assert found.expression == cem.energies.consistent_token_parameters.expression
