"""Whether a layer computes what its forms say, asked on random states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..layer import EnergyLayer
from .attention import LowRankAttention, projections


def check_bilinear(layer: EnergyLayer, pairs: Tensor | None, uses: str) -> None:
    """Q -> A Q, K -> A^-T K must change nothing, where A commutes with the rotation.

    Values that Q writes change as K, and outputs that write averages of keys as Q.
    """
    generator = torch.Generator().manual_seed(0)
    Q, K = layer.Q.detach(), layer.K.detach()
    count, rank = K.shape[:2]
    sizes = 0.5 + torch.rand(count, rank, generator=generator)
    if pairs is not None:
        sizes[:, pairs[:, 1]] = sizes[:, pairs[:, 0]]
    sizes = sizes.to(Q)
    moved = {
        "Q": Q * sizes.view(count, *[1] * (Q.dim() - 3), rank, 1),
        "K": K / sizes[..., None],
    }
    if uses == "values":
        moved["V"] = layer.V.detach() / sizes[..., None]
    if uses == "outputs":
        W = layer.W.detach()
        moved["W"] = W * sizes.view(count, *[1] * (W.dim() - 3), rank, 1)
    h = torch.randn(1, 4, layer.dim, generator=generator).to(Q)
    with torch.no_grad():
        before, after = layer(h), functional_call(layer, moved, (h,))
    if not _alike(before, after, (before - h).abs().max()):
        raise ValueError(
            f"the scores of energy `{layer.energy_function.name}` are not bilinear in Q h and K x, so their rank is"
            " not a number of coordinates: got another layer when one grew and the other shrank; normalised scores"
            " cannot be cut, and values and outputs beside Q and K are V (heads, rank, dim) and W (heads, rank, dim)"
        )


def _alike(one: Tensor, other: Tensor, size: Tensor) -> bool:
    """Whether two outputs differ by rounding only; another map differs by a good part of its size."""
    share = 1e-3 if torch.finfo(one.dtype).eps < 1e-5 else 5e-2
    return bool((one - other).abs().max() <= share * size + 1e-9)


def check_matrices(module: nn.Module, forms) -> None:
    """The module must compute what our form of it does, on random states turned by random angles."""
    generator = torch.Generator().manual_seed(0)
    weight = projections(module)[0].weight
    h = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight)
    mask = torch.full((4, 4), float("-inf")).triu(1).to(weight)[None, None]
    given, planes = {"attention_mask": mask}, None
    if forms.pairs is not None:
        angles = torch.randn(1, 4, forms.rank // 2, generator=generator).to(weight).repeat(1, 1, 2)
        given["position_embeddings"] = (angles.cos(), angles.sin())
        planes = [range(forms.rank // 2)] * len(forms.k)
    ranks = [forms.rank] * len(forms.k)
    same = LowRankAttention.like(module, ranks, planes).fill(forms.q, forms.k).eval()
    training = module.training
    with torch.no_grad():
        found, problem = same(h, **given)[0], "another output"
        try:
            wanted = module.eval()(h, **given)[0]
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            wanted, problem = torch.full_like(found, torch.nan), str(error)
    module.train(training)
    if not _alike(wanted, found, found.abs().max()):
        raise ValueError(
            f"`{type(module).__name__}` is not attention as in Llama or GPT-2, softmax of q . k with half-split"
            f" rotation or none and without a norm of queries and keys: got {problem}; only such attention can be cut"
        )
