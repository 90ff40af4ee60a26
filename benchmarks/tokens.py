"""Time token-parameter attention against a GELU MLP: ``python -m benchmarks.tokens``; README.md says what and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem.token_parameters import TokenParameterAttention

from . import layers
from .report import Row, of_pair
from .settings import Settings
from .timing import interleave

PUBLISHED = (768, 3072)  # width and tokens of the MLP of the smallest published model
SPEED, KEPT = 0.8, 1.3
DEFAULT = {"l2_norm_gelu": {}}
VARIANTS = DEFAULT | {
    "gelu_l2_norm": {"normaliser": "gelu_l2_norm"},
    "softmax": {"normaliser": "softmax"},
    "l2_norm_gelu, tied": {"tie": True},
}


class MLP(nn.Module):
    """y = V^T gelu(K x) with the matrices of a layer."""

    def __init__(self, K: nn.Parameter, V: nn.Parameter) -> None:
        super().__init__()
        self.K, self.V = K, V

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.K)) @ self.V


def sides(
    settings: Settings, dim: int, tokens: int, **options
) -> tuple[Callable, Callable, Tensor]:
    """The MLP, the layer, and an input that takes gradients."""
    torch.manual_seed(settings.seed)
    like = {"device": settings.device, "dtype": settings.torch_dtype}
    layer = TokenParameterAttention(dim, dim, tokens, **options, **like)
    mlp = MLP(layer.K, nn.Parameter(torch.randn(tokens, dim, **like) / tokens**0.5))
    x = torch.randn(settings.batch * settings.space_seq, dim, **like, requires_grad=True)
    if settings.compile:
        return torch.compile(mlp), torch.compile(layer), x
    return mlp, layer, x


def kept(layer: Callable, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward one, parameters and input aside."""
    found = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    for tensor in (x, *layer.parameters(), *layer.buffers()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return sum(found.values())


def hidden(settings: Settings) -> Iterator[Row]:
    """Forward, and forward and backward, at the width of the run and at the published one."""
    own = (settings.dim, 4 * settings.dim)
    for dim, tokens in (own, PUBLISHED) if settings.bars else (own,):
        for name, options in VARIANTS.items() if (dim, tokens) == own else DEFAULT.items():
            mlp, layer, x = sides(settings, dim, tokens, **options)
            what = f"{name}, {dim} x {tokens}"

            def forward(run: Callable, x: Tensor = x) -> None:
                with torch.no_grad():
                    run(x)

            def both(run: Callable, x: Tensor = x) -> None:
                torch.autograd.grad(run(x).sum(), (x, *run.parameters()))

            title = "Speed of token-parameter attention / a GELU MLP of the same shape"
            for pass_, function in (("forward", forward), ("forward and backward", both)):
                pair = interleave(
                    lambda function=function, mlp=mlp: function(mlp),
                    lambda function=function, layer=layer: function(layer),
                    settings,
                )
                least = SPEED if name in DEFAULT and function is both else None
                yield of_pair(title, f"{what}, {pass_}", pair, least=least)
            if not settings.compile:
                bytes_ = kept(layer, x), kept(mlp, x)
                yield Row(
                    "Bytes kept for the backward pass, token-parameter attention / a GELU MLP",
                    what,
                    bytes_[0] / bytes_[1],
                    most=KEPT if name in DEFAULT else None,
                    medians=f"{bytes_[0]:,} / {bytes_[1]:,} bytes",
                )


SECTIONS = {"hidden": hidden}


def main(argv: list[str] | None = None) -> dict | None:
    return layers.main(argv, "benchmarks.tokens", SECTIONS)


if __name__ == "__main__":
    main()
