"""Time routed stacks against dense ones: ``python -m benchmarks.routing``; README.md says what and how."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import cem
from cem.energies import gated_silu, interaction

from . import layers
from .cases import backward
from .measures import inputs
from .report import Row, of_pair
from .settings import Settings
from .timing import interleave

BOTTLENECK = 32
BARS = {3: 2.0, 5: 3.0, 8: 5.0}
"""How much faster a stack must be where one token of so many is chosen."""


def blocks(settings: Settings, causal: bool) -> list[nn.Sequential]:
    """Blocks of tied attention and a tied gated MLP, each behind its norm."""
    made = []
    for _ in range(settings.routed_depth):
        sizes = {"dim": settings.dim, "norm": nn.RMSNorm, "causal": causal}
        attention = cem.derive(interaction, heads=settings.heads, rank=settings.rank, **sizes)
        made.append(
            nn.Sequential(attention, cem.derive(gated_silu, hidden=settings.hidden, **sizes))
        )
    return made


def stacks(settings: Settings, part: int, context: str, causal: str | None) -> tuple:
    """The dense stack, without adapters, and the routed one of the same blocks, with an adapter in each."""
    torch.manual_seed(settings.seed)
    heavy = blocks(settings, causal is not None)
    routed = [
        cem.Routed(
            block,
            1 / part,
            cem.Adapter(settings.dim, min(BOTTLENECK, settings.dim // 2)),
            context=context,
            causal=causal,
        )
        for block in heavy
    ]
    to = {"device": settings.device, "dtype": settings.torch_dtype}
    return nn.Sequential(*heavy).to(**to), nn.Sequential(*routed).to(**to)


def operations(settings: Settings, seq: int, part: int, context: str) -> float:
    """Multiplications of the dense stack / of the routed one, without masks and scores: what could be reached."""
    D, F, M = settings.dim, settings.heads * settings.rank, settings.hidden
    k = math.ceil(seq / part)

    def block(rows: int, seen: int) -> float:
        return 2 * rows * D * F + seen * D * F + 2 * rows * seen * F + 3 * rows * D * M

    light = 2 * seq * D * min(BOTTLENECK, D // 2) + seq * D
    return block(seq, seq) / (block(k, k if context == "selected" else seq) + light)


def _rows(settings: Settings, context: str, causal: str | None, bars: bool) -> Iterator[Row]:
    seq = settings.seqs[-1]
    kind = {"selected": "k-to-k", "all": "k-to-all"}[context]
    kind += ", causal by a running threshold" if causal else ""
    title = f"Time of {settings.routed_depth} dense blocks / the same routed, T={seq}"
    _, h, weights = inputs(settings, seq)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(h.detach())

    for part, least in BARS.items():
        models = stacks(settings, part, context, causal)
        counted = operations(settings, seq, part, context)
        pair = interleave(*(partial(forward, model) for model in models), settings)
        what = f"{kind}, k = T/{part}, forward, counted {counted:.1f}x"
        yield of_pair(title, what, pair, least=least if bars else None)
        pair = interleave(*(partial(backward, model, h, weights) for model in models), settings)
        yield of_pair(title, f"{kind}, k = T/{part}, forward and backward", pair)


def selected(settings: Settings) -> Iterator[Row]:
    """The chosen tokens see each other."""
    yield from _rows(settings, "selected", None, True)


def everything(settings: Settings) -> Iterator[Row]:
    """The chosen tokens see all."""
    yield from _rows(settings, "all", None, False)


def causal(settings: Settings) -> Iterator[Row]:
    """Without looking ahead."""
    yield from _rows(settings, "selected", "threshold", False)


def coordinate_descent(
    s: Tensor, k: float, eps: float, iterations: int, start: float = 4.0, decay: float = 0.7
) -> Tensor:
    """The weights of :func:`cem.soft_top_k` as they are published: by iteration, with an annealed temperature."""
    b, now = -s, max(start, eps)
    for step in range(iterations):
        now = max(start * decay**step, eps)
        a = now * (math.log(k) - torch.logsumexp((s + b) / now, -1, keepdim=True))
        b = (-s - a).clamp(max=0)
    return ((s + a + b) / now).exp()


def weights(settings: Settings) -> Iterator[Row]:
    """The exact soft top-k against the published iteration: its time, and how far the latter is from the solution."""
    seq, eps = settings.seqs[-1], 0.03
    k = seq // 4
    torch.manual_seed(settings.seed)
    s = torch.randn(settings.batch, seq, device=settings.device)
    for count in (20, 50):
        pair = interleave(
            lambda count=count: coordinate_descent(s, k, eps, count),
            lambda: cem.soft_top_k(s, k, eps),
            settings,
        )
        title = "Time of coordinate descent / the exact soft top-k"
        yield of_pair(title, f"{count} iterations, n={seq}, k={k}, eps={eps}", pair)
        double = s.double()
        away = coordinate_descent(double, k, eps, count) - cem.soft_top_k(double, k, eps)
        yield Row(
            "Largest error of a weight after coordinate descent",
            f"{count} iterations, n={seq}, k={k}, eps={eps}",
            float(away.abs().max()),
            unit="",
        )


SECTIONS = {"selected": selected, "all": everything, "causal": causal, "weights": weights}


def main(argv: list[str] | None = None) -> dict | None:
    return layers.main(argv, "benchmarks.routing", SECTIONS)


if __name__ == "__main__":
    main()
