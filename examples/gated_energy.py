"""A gated MLP from an energy, in the symbolic pen.

The gates are read from the frozen state, so the energy is quadratic in the state and its gradient
is a gated MLP whose up and down projections are one matrix. Expected last line:

    largest difference from the hand-written MLP below 1e-5: True
"""

import torch
from sympy import Sum
from torch.nn import functional as F

import cem

dim, hidden = cem.dims("dim hidden")
h = cem.state(dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
i, j, m = dim.index("i"), dim.index("j"), hidden.index("m")
gate = cem.silu(Sum(G[m, j] * cem.frozen(h)[j], j))
gated = cem.Energy(-Sum(gate * Sum(U[m, i] * h[i], i) ** 2, m) / 2, name="gated")


def by_hand(h, U, G):
    """The same layer as a person would write it: h (B, T, dim), U and G (hidden, dim)."""
    return h + (F.silu(h @ G.mT) * (h @ U.mT)) @ U


def main():
    layer = cem.derive(gated, dim=128, hidden=344)
    print(layer.derivation)
    h = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    difference = (layer(h) - by_hand(h, layer.U, layer.G)).abs().max()
    print(f"largest difference from the hand-written MLP below 1e-5: {bool(difference < 1e-5)}")


if __name__ == "__main__":
    main()
