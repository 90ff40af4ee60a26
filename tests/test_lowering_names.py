"""Names that programs must keep apart: indices of one letter, parameters of any name and length."""

import pytest
import torch
from sympy import Sum
from torch import nn

import cem
from cem.testing import assert_close

dim, heads, hidden = cem.dims("dim heads hidden")
h, x = cem.state(dim), cem.context(dim)
i, j, s = dim.index("i"), dim.index("j"), x.index("s")
a, c, m = heads.index("a"), heads.index("c"), hidden.index("m")
SIZES = {dim: 4, heads: 3, hidden: 5, cem.Dim("tokens"): 6}


def scores(n):
    Q, K = cem.parameter("Q", heads, dim), cem.parameter("K", heads, dim)
    return Sum(Q[n, i] * h[i], i) * Sum(K[n, j] * x[s, j], j)


def head_in_head():
    A = cem.parameter("A", heads)
    return -Sum(cem.logsumexp(A[a] * (scores(a) + Sum(scores(c), c)), s), a)


def one_parameter(name):
    base = cem.parameter(name, hidden, dim)
    up = Sum(base[m, i] * h[i], i)
    return -Sum(cem.antiderivative(cem.relu)(up), m)


def a_size_called(name):
    size = cem.Dim(name)
    base, n = cem.parameter("U", size, dim), size.index("n")
    return -Sum(cem.relu(Sum(base[n, i] * h[i], i)) * cem.relu(Sum(base[n, j] * x[s, j], j)), n, s)


def masked_sum(name):
    base = cem.parameter(name, dim)
    return Sum(cem.relu(base[i] * h[i] * x[s, i]), i, s)


def two_long_names(length):
    first, second = (cem.parameter(letter * length, heads, dim) for letter in "PR")
    score = Sum((first[a, i] + second[a, i]) * h[i] * x[s, i], i)
    return -Sum(cem.logsumexp(score, s), a)


ENERGIES = {
    # A sum that does not mention an outer index may bind the same letter.
    "one letter in two sums": -cem.logsumexp(
        Sum(h[i] * x[s, i] * (h[i] + Sum(h[j] * x[s, j], j)), i), s
    ),
    "one letter for the head and a sum": head_in_head(),
    "the tokens' own size": a_size_called("tokens"),
    "keywords": one_parameter("Lambda") + one_parameter("In"),
    "the mask's own name": masked_sum("mask"),
    "lines of 97 and more": two_long_names(40),
    "names longer than a line": two_long_names(110),
    "a reduction over an index that its body lacks": Sum(cem.logsumexp(h[i] ** 2, m), i)
    + one_parameter("U"),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_fused_equals_autograd(name):
    energy = cem.Energy(ENERGIES[name], name="named")
    sizes = {str(size): SIZES[size] for size in energy.dims}
    fused, autograd = (
        cem.derive(energy, lowering=kind, dtype=torch.float64, **sizes)
        for kind in ("fused", "autograd")
    )
    autograd.load_state_dict(fused.state_dict())
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    assert_close(fused(h), autograd(h), 1e-12)
    assert_close(fused.energy(h), autograd.energy(h), 1e-12)


def test_a_norm_is_trained_through_the_energy():
    energy = cem.Energy(-cem.logsumexp(Sum(h[i] * x[s, i], i), s), name="bare")
    layer = cem.derive(energy, dim=4, norm=nn.LayerNorm)
    layer.energy(torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert layer.norm.weight.grad.abs().sum() > 0
