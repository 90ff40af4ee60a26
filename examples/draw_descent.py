"""The picture of a descent: one token falls into the nearest of a few stored patterns.

The energy is that of a modern Hopfield network whose patterns are the context tokens. Fourteen steps of
half the size that retrieves a pattern at once; the picture goes to descent.png. Expected last line:

    share of tokens whose energy fell: 100%
"""

import torch
from matplotlib import pyplot as plt

import cem


@cem.energy(h="dim", x="seq dim")
def retrieval(h, x, *, beta=4.0):
    return 0.5 * h.square().sum() - torch.logsumexp(beta * x @ h, dim=0) / beta


def main():
    layer = cem.derive(
        retrieval, dim=2, causal=False, steps=14, update=cem.GradientDescent(step_size=0.5)
    )
    turn = torch.arange(5) * (2 * torch.pi / 5)
    patterns = torch.stack([turn.cos(), turn.sin()], dim=-1)
    tokens = 0.35 * torch.randn(1, 24, 2, generator=torch.Generator().manual_seed(3))
    trace = cem.trace(layer, tokens, context=patterns[None])

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
    cem.plot.landscape(trace, token=1, ax=left)
    cem.plot.curve(trace, ax=right)
    figure.savefig("descent.png", dpi=200)
    plt.close(figure)
    print(f"share of tokens whose energy fell: {trace[0].share_down:.0%}")


if __name__ == "__main__":
    main()
