"""Axes that are products of sizes: split and flattened, they give the number of torch."""

import pytest
import torch
from sympy import Sum, sqrt
from torch.nn import functional as F
from torch_pen import A, a, assert_same_number, block, heads, hidden, m, r, s

from cem.language import words
from cem.language.canonical import canonical
from cem.language.reductions import LogSumExp
from cem.language.symbols import context, index, parameter, state

BLOCKS = {
    "h": "(heads block)",
    "x": "seq (heads block)",
    "U": "hidden (heads block)",
    "lam": "(heads block)",
}
hb, xb = state(heads * block), context(heads * block)
Ub, lamb = parameter("U", hidden, heads * block), parameter("lam", heads * block)
d, p = index("d", heads * block), block.index("p")
slot = block * a + p

COMPOSITES = {
    "flat": (Sum(Sum(Ub[m, d] * hb[d], d) ** 2, m), lambda h, *, U: (U @ h).square().sum()),
    "blocks": (
        Sum(sqrt(Sum(hb[slot] ** 2, p)), a),
        lambda h, *, A: h.view(A.shape[0], -1).norm(dim=-1).sum(),
        lambda h, *, A: h.reshape((A.shape[0], h.shape[0] // A.shape[0])).norm(dim=-1).sum(),
        lambda h, *, A: h.unflatten(0, (A.size(0), -1)).square().sum(1).sqrt().sum(),
        lambda h, *, A: torch.unflatten(h, -1, (A.size(0), -1)).norm(2, 1).sum(),
    ),
    "block_scores": (
        -Sum(LogSumExp(Sum(lamb[slot] * hb[slot] * xb[s, slot], p), s), a),
        lambda h, x, *, A, lam: (
            -torch.logsumexp((x * (lam * h)).view(x.shape[0], A.shape[0], -1).sum(-1), 0).sum()
        ),
        lambda h, x, *, A, lam: (
            -torch.einsum(
                "ap,sap->as", (lam * h).view(A.shape[0], -1), x.unflatten(-1, (A.shape[0], -1))
            )
            .logsumexp(1)
            .sum()
        ),
    ),
    "split_then_flat": (
        Sum(words.silu(hb[slot]) * A[a, r] * lamb[slot], p, r, a),
        lambda h, *, A, lam: (
            (F.silu(h.view(A.shape[0], -1))[:, :, None] * A[:, None]).sum(-1).flatten() * lam
        ).sum(),
        lambda h, *, A, lam: (
            (F.silu(h.view(A.shape[0], -1))[..., None] * A.unsqueeze(1)).sum(-1).reshape(-1) @ lam
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for name, (_, *spellings) in COMPOSITES.items()
        for place in range(len(spellings))
    ],
)
def test_composite_axes(name, place):
    expected, function = COMPOSITES[name][0], COMPOSITES[name][place + 1]
    assert assert_same_number(function, BLOCKS).expression == canonical(expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda h, *, A: (h.softmax(0).view(A.shape[0], -1) * A.sum(1, keepdim=True)).sum(),
        lambda h, *, A: (h.softmax(0).softmax(0).view(A.shape[0], -1).T @ A).norm(),
        lambda h, *, A: (h.log_softmax(0).view(A.shape[0], -1) * A.sum(1, keepdim=True)).sum(),
        lambda h, *, A: (h.view(A.shape[0], -1).flatten().softmax(0) * h).sum() + A.sum(),
        lambda h, *, U: (U.view(U.shape[0], -1) * h).sum(),
        lambda h, *, A, lam: (
            torch.einsum("d,d->d", h.view(A.shape[0], -1).flatten(), lam).exp().sum()
        ),
    ],
)
def test_number_of_composite_axes(function):
    assert_same_number(function, BLOCKS)


TRIPLE = {
    "h": "(heads rank block)",
    "A": "heads rank",
    "T": "(heads rank) block",
    "U": "hidden (heads rank)",
}


@pytest.mark.parametrize(
    "function",
    [
        lambda h, *, A: (h.view(A.shape[0], A.shape[1], -1).sum(-1) * A).tanh().sum(),
        lambda h, *, A: (h.view(A.numel(), -1).sum(-1).view(A.shape) * A).tanh().sum(),
        lambda h, *, T: (h.view(T.shape) * T).sum(1).tanh().sum(),
        lambda h, *, T, A: (h.view_as(T) * T).view(*A.shape, -1).sum((0, 2)).tanh().sum(),
        lambda h, *, U, T: (U @ h.view_as(T)).tanh().sum(),
    ],
)
def test_number_of_a_product_of_three_sizes(function):
    assert_same_number(function, TRIPLE)
