"""Points of the design space taken together: every pair of choices occurs, fused layers equal the definition."""

import random
from itertools import combinations

import pytest
import torch
from helpers import SIZES, Case, a, assert_same, dot, drawn, gradients, h, key, lse, r, s
from sympy import Sum
from torch import nn

import cem
from cem import energies
from cem.testing import reference_of

t, u = cem.position(h), cem.position(s)
heads, rank, dim = cem.dims("heads rank dim")
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
TURNED = Sum(cem.rope(dot(Q, a, r), r, h) * cem.rope(key(K, a, r), r, s), r)
WINDOW = cem.Energy(lse(TURNED + cem.only(t - u < 3)), name="rotary_window")

FACTORS = {
    "energy": (
        energies.interaction,
        energies.diagonal_plus_low_rank,
        energies.grouped_interaction,
        energies.alibi_interaction,
        energies.gated_linear_attention,
        energies.parallel_block,
        WINDOW,
    ),
    "update": (
        lambda: cem.GradientDescent(0.1),
        lambda: cem.GradientDescent(0.1, learn=True),
        lambda: cem.Momentum(0.1, 0.5),
        lambda: cem.Nesterov(0.1, 0.5),
        lambda: cem.Proximal(0.1, cem.prox.l1(0.1)),
    ),
    "preconditioner": (
        None,
        cem.Diagonal,
        lambda width: cem.DiagonalPlusLowRank(width, 2),
        lambda width: cem.BlockDiagonal(width, 2),
        lambda width: cem.Diagonal(width, signed=True),
    ),
    "steps": (1, 3),
    "refresh": ("layer", "step"),
    "norm": (None, nn.LayerNorm, lambda width: nn.RMSNorm(width, elementwise_affine=False)),
    "inputs": ("plain", "padding", "documents"),
    "moving": (False, True),
}


def drawn_cases(seed=0):
    """Random points until every pair of choices of two factors has occurred."""
    generator, names = random.Random(seed), list(FACTORS)
    left = {
        (p, m, q, n)
        for p, q in combinations(names, 2)
        for m in range(len(FACTORS[p]))
        for n in range(len(FACTORS[q]))
    }
    while left:
        tries = [{f: generator.randrange(len(FACTORS[f])) for f in names} for _ in range(60)]
        new = [{(p, c[p], q, c[q]) for p, q in combinations(names, 2)} & left for c in tries]
        best = max(range(len(tries)), key=lambda k: len(new[k]))
        left -= new[best]
        if new[best]:
            yield tries[best]


CASES = list(drawn_cases())


def given(kind):
    if kind == "padding":
        visible = torch.ones(2, 7, dtype=torch.bool)
        visible[0, :2] = False
        return {"visible": visible}
    if kind == "documents":
        return {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])}
    return {}


@pytest.mark.parametrize("choice", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_a_point_of_the_space(choice):
    options = {name: FACTORS[name][place] for name, place in choice.items()}
    energy, inputs = options.pop("energy"), given(options.pop("inputs"))
    sizes = {str(size): SIZES[str(size)] for size in energy.dims}
    sizes |= {"rank": 6} if energy is WINDOW else {}
    options["update"] = options["update"]()
    layer = drawn(cem.derive(energy, dtype=torch.float64, **options, **sizes))
    states = Case(energy, ()).inputs()
    found = gradients(layer, layer, states, **inputs)
    truth = gradients(lambda **z: reference_of(layer, **z), layer, states, **inputs)
    assert layer.lowering.kind == "fused"
    assert_same(found, truth, 1e-11, atol=1e-13)
    if not options["moving"] and layer.update.needs == ():
        h = states["h"]
        later = torch.cat([h[:, :4], torch.zeros_like(h[:, 4:])], 1)
        assert torch.equal(layer(later, **inputs)[:, :4], layer(h, **inputs)[:, :4])


def test_every_pair_occurs():
    assert len(CASES) < 70
    for p, q in combinations(FACTORS, 2):
        pairs = {(case[p], case[q]) for case in CASES}
        assert len(pairs) == len(FACTORS[p]) * len(FACTORS[q])
