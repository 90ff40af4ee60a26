"""A layer of Tokenformer from an energy: ten lines, then more parameter tokens for it.

The scores of the parameter tokens are divided by their root mean square, read from the frozen state:
a temperature that belongs to the context. The gradient step is Pattention with values tied to keys,
and tokens whose gain is 0 can be added without a change of what it computes. Expected last lines:

    largest difference from token-parameter attention below 1e-5: True
    largest change when 64 tokens become 96 below 1e-5: True
"""

import torch

import cem
from cem.token_parameters import TokenParameterAttention


@cem.energy(h="dim", K="tokens dim")
def tokenformer(h, *, K):
    a = K @ h
    temperature = torch.sqrt(a.detach().square().mean())
    return -temperature * cem.gelu_antiderivative(a / temperature).sum()


def main():
    torch.manual_seed(0)
    layer = cem.derive(tokenformer, dim=32, tokens=64)
    print(layer.code)
    h = torch.randn(2, 16, 32)

    tied = TokenParameterAttention(32, 32, tokens=64, tie=True)
    tied.K = layer.K
    print(tied.potential)
    difference = (layer(h) - (h + tied(h))).abs().max()
    print(
        f"largest difference from token-parameter attention below 1e-5: {bool(difference < 1e-5)}"
    )

    grown = tied.grow(tokens=96)
    change = (grown(h) - tied(h)).abs().max()
    print(f"largest change when 64 tokens become 96 below 1e-5: {bool(change < 1e-5)}")


if __name__ == "__main__":
    main()
