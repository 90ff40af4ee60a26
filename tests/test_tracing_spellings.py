"""One energy in many spellings of torch: each gives the symbolic pen's expression and the number of torch."""

import math

import pytest
import sympy
import torch
from sympy import Sum, sqrt
from torch import nn
from torch.nn import functional as F
from torch_pen import (
    A,
    K,
    Q,
    U,
    V,
    W,
    a,
    assert_same_number,
    b,
    beta,
    bilinear,
    dim,
    h,
    i,
    j,
    m,
    matrix,
    r,
    rank,
    s,
    scores,
    square,
    x,
)

from cem.language import words
from cem.language.canonical import canonical
from cem.language.reductions import LogSumExp, Softmax, logsumexp
from cem.language.symbols import SEQ, frozen

SAME = {
    "dot": (
        square,
        lambda h: h @ h,
        lambda h: torch.dot(h, h),
        lambda h: h.dot(h),
        lambda h: torch.inner(h, h),
        lambda h: torch.vdot(h, h),
        lambda h: torch.linalg.vecdot(h, h),
        lambda h: torch.tensordot(h, h, dims=1),
        lambda h: torch.einsum("i,i->", h, h),
        lambda h: torch.einsum("i,i", h, h),
        lambda h: torch.einsum("i, i ->", [h, h]),
        lambda h: torch.einsum(h, [0], h, [0], []),
        lambda h: (h * h).sum(),
        lambda h: (h**2).sum(),
        lambda h: h.pow(2).sum(-1),
        lambda h: torch.pow(h, 2.0).sum(dim=0),
        lambda h: h.square().sum(),
        lambda h: torch.sum(torch.square(h), dim=0),
        lambda h: torch.sum(input=h * h, axis=0),
        lambda h: torch.mul(h, h).sum((0,)),
        lambda h: torch.multiply(h, h).sum(),
        lambda h: h.mul(h).sum(),
        lambda h: torch.outer(h, h).trace(),
        lambda h: torch.outer(h, h).diagonal().sum(),
        lambda h: h.norm() ** 2,
        lambda h: torch.norm(h).square(),
        lambda h: torch.linalg.norm(h, ord=2) ** 2,
        lambda h: torch.linalg.vector_norm(h, dim=-1) ** 2,
    ),
    "norm": (
        sqrt(square),
        lambda h: h.norm(),
        lambda h: torch.norm(h, p=2, dim=-1),
        lambda h: torch.norm(h, p="fro"),
        lambda h: torch.linalg.norm(h),
        lambda h: torch.linalg.vector_norm(h, ord=2),
        lambda h: h.norm(dim=0, keepdim=True).squeeze(0),
        lambda h: h.square().sum().sqrt(),
        lambda h: torch.sqrt(h @ h),
    ),
    "one_norm": (
        Sum(sympy.Abs(h[i]), i),
        lambda h: h.abs().sum(),
        lambda h: torch.abs(h).sum(),
        lambda h: abs(h).sum(),
        lambda h: h.norm(p=1),
        lambda h: torch.linalg.vector_norm(h, 1),
        lambda h: torch.linalg.norm(h, 1),
    ),
    "matrix": (
        matrix,
        lambda h, *, U: (U @ h).square().sum(),
        lambda h, *, U: torch.matmul(U, h).square().sum(),
        lambda h, *, U: U.matmul(h).square().sum(),
        lambda h, *, U: torch.mv(U, h).square().sum(),
        lambda h, *, U: U.mv(h).square().sum(),
        lambda h, *, U: F.linear(h, U).square().sum(),
        lambda h, *, U: (h @ U.T).square().sum(),
        lambda h, *, U: (h @ U.t()).square().sum(),
        lambda h, *, U: (h @ U.mT).square().sum(),
        lambda h, *, U: (h @ U.transpose(0, 1)).square().sum(),
        lambda h, *, U: (h @ U.transpose(-1, -2)).square().sum(),
        lambda h, *, U: (h @ torch.swapaxes(U, 0, 1)).square().sum(),
        lambda h, *, U: (h @ U.permute(1, 0)).square().sum(),
        lambda h, *, U: (h @ torch.permute(U, (1, 0))).square().sum(),
        lambda h, *, U: (h @ U.movedim(0, 1)).square().sum(),
        lambda h, *, U: torch.einsum("md,d->m", U, h).square().sum(),
        lambda h, *, U: torch.einsum("...d,d->...", U, h).square().sum(),
        lambda h, *, U: torch.einsum("ij,j", U, h).square().sum(),
        lambda h, *, U: torch.einsum(U, [0, 1], h, [1], [0]).square().sum(),
        lambda h, *, U: (U * h).sum(-1).square().sum(),
        lambda h, *, U: (U * h[None]).sum(1).square().sum(),
        lambda h, *, U: (U * h[None, :]).sum(1).square().sum(),
        lambda h, *, U: (U * h.unsqueeze(0)).sum(1, keepdim=True).square().sum(),
        lambda h, *, U: (U @ h[:, None]).squeeze(-1).square().sum(),
        lambda h, *, U: (U @ h[..., None])[..., 0].square().sum(),
        lambda h, *, U: torch.mm(U, h[:, None]).square().sum(),
        lambda h, *, U: torch.bmm(U[None], h[None, :, None]).square().sum(),
        lambda h, *, U: torch.tensordot(U, h, dims=([1], [0])).square().sum(),
        lambda h, *, U: torch.inner(U, h).square().sum(),
        lambda h, *, U: torch.addmv(torch.zeros_like(U @ h), U, h).square().sum(),
        lambda h, *, U: torch.linalg.norm(U @ h) ** 2,
        lambda h, *, U: (U * h.expand_as(U)).sum(1).square().sum(),
        lambda h, *, U: (U * h.expand(U.shape[0], -1)).sum(1).square().sum(),
        lambda h, *, U: (U * h.broadcast_to(U.shape)).sum(1).square().sum(),
        lambda h, *, U: (U * torch.broadcast_to(h, (U.size(0), U.size(1)))).sum(1).square().sum(),
        lambda h, *, U: (U.contiguous() @ h.clone().to(U.dtype).type_as(U)).double().square().sum(),
        lambda h, *, U: (U @ h.to(torch.float64).to(device="cpu")).square().sum(),
    ),
    "bias": (
        Sum(words.relu(b[m] + Sum(U[m, i] * h[i], i)), m),
        lambda h, *, U, b: torch.relu(U @ h + b).sum(),
        lambda h, *, U, b: F.relu(F.linear(h, U, b)).sum(),
        lambda h, *, U, b: F.linear(h, U, bias=b).relu().sum(),
        lambda h, *, U, b: (U @ h).add(b).clamp(min=0).sum(),
        lambda h, *, U, b: torch.clamp(torch.add(U @ h, b), min=0.0).sum(),
        lambda h, *, U, b: torch.addmv(b, U, h).clamp_min(0).sum(),
        lambda h, *, U, b: torch.maximum(U @ h + b, torch.zeros_like(b)).sum(),
        lambda h, *, U, b: torch.maximum(torch.tensor(0.0), U @ h + b).sum(),
        lambda h, *, U, b: nn.ReLU()(U @ h + b).sum(),
        lambda h, *, U, b: words.relu(U @ h + b).sum(),
    ),
    "affine": (
        Sum(2 * Sum(U[m, i] * h[i], i) - b[m] / 2, m),
        lambda h, *, U, b: (2 * (U @ h) - b / 2).sum(),
        lambda h, *, U, b: (2.0 * (U @ h) - 0.5 * b).sum(),
        lambda h, *, U, b: torch.sub(2 * (U @ h), b, alpha=0.5).sum(),
        lambda h, *, U, b: torch.add(torch.div(-b, 2), U @ h, alpha=2).sum(),
        lambda h, *, U, b: (U @ h).mul(2).sub(b.div(2)).sum(),
        lambda h, *, U, b: torch.rsub(b / 2, 2 * (U @ h)).sum(),
        lambda h, *, U, b: -(torch.true_divide(b, 2) - 2 * (U @ h)).sum(),
        lambda h, *, U, b: torch.neg(torch.subtract(b.divide(2), (U @ h).multiply(2))).sum(),
        lambda h, *, U, b: torch.addmv(b, U, h, beta=-0.5, alpha=2).sum(),
        lambda h, *, U, b: torch.lerp(b, U @ h, 2.0).add(b.mul(0.5)).sum(),
    ),
    "scores": (
        scores,
        lambda h, x: (x @ h).sum(),
        lambda h, x: torch.einsum("sd,d->s", x, h).sum(),
        lambda h, x: torch.einsum("sd,d->", x, h),
        lambda h, x: x.mul(h).sum(),
        lambda h, x: x.mul(h).sum(dim=(0, 1)),
        lambda h, x: x.mul(h).sum(dim=-1).sum(dim=0),
        lambda h, x: x.shape[0] * (x @ h).mean(),
        lambda h, x: (x @ h).mean(0) * x.size(0),
    ),
    "bilinear": (
        bilinear,
        lambda h, *, W: h @ (W @ h),
        lambda h, *, W: torch.dot(h, torch.einsum("ij,j->i", W, h)),
        lambda h, *, W: (h * F.linear(h, W)).sum(),
    ),
    "trace": (
        Sum(W[i, i] * h[i], i),
        lambda h, *, W: torch.einsum("ii,i->", W, h),
        lambda h, *, W: torch.diagonal(W) @ h,
        lambda h, *, W: (W.diagonal() * h).sum(),
    ),
    "logsumexp": (
        LogSumExp(Sum(h[i] * x[s, i], i), s),
        lambda h, x: torch.logsumexp(x @ h, dim=0),
        lambda h, x: torch.logsumexp(x @ h, 0),
        lambda h, x: (x @ h).logsumexp(-1),
        lambda h, x: torch.special.logsumexp(x @ h, dim=(0,)),
        lambda h, x: (x @ h).exp().sum().log(),
        lambda h, x: torch.log(torch.exp(x @ h).sum(0)),
    ),
    "mean": (
        Sum(Sum(h[i] * x[s, i], i) ** 2, s) / SEQ,
        lambda h, x: (x @ h).square().mean(),
        lambda h, x: torch.mean((x @ h) ** 2, dim=0),
        lambda h, x: (x @ h).square().sum() / x.shape[0],
        lambda h, x: ((x @ h) / math.sqrt(x.shape[0])).square().sum(),
    ),
    "softmax": (
        Sum(Softmax(Sum(h[i] * x[s, i], i), s) * Sum(h[i] * x[s, i], i), s),
        lambda h, x: torch.softmax(x @ h, dim=0) @ (x @ h),
        lambda h, x: (x @ h).softmax(-1) @ (x @ h),
        lambda h, x: F.softmax(x @ h, dim=-1) @ (x @ h),
        lambda h, x: torch.special.softmax(x @ h, dim=0) @ (x @ h),
        lambda h, x: nn.Softmax(dim=-1)(x @ h) @ (x @ h),
    ),
    "log_softmax": (
        Sum(Sum(h[i] * x[s, i], i) - LogSumExp(Sum(h[i] * x[s, i], i), s), s),
        lambda h, x: torch.log_softmax(x @ h, dim=0).sum(),
        lambda h, x: (x @ h).log_softmax(-1).sum(),
        lambda h, x: F.log_softmax(x @ h, dim=-1).sum(),
        lambda h, x: torch.special.log_softmax(x @ h, dim=-1).sum(),
    ),
    "variance": (
        Sum((h[i] - Sum(h[j], j) / dim) ** 2, i) / dim,
        lambda h: h.var(unbiased=False),
        lambda h: h.var(False),
        lambda h: torch.var(h, dim=-1, correction=0),
        lambda h: torch.std(h, 0, unbiased=False) ** 2,
        lambda h: (h - h.mean()).square().mean(),
        lambda h: (h - h.mean(-1, keepdim=True)).square().mean(dim=-1),
        lambda h: h.var() * (h.shape[0] - 1) / h.numel(),
    ),
    "gated": (
        -Sum(words.silu(Sum(V[m, i] * frozen(h)[i], i)) * Sum(U[m, i] * h[i], i) ** 2, m) / 2,
        lambda h, *, U, V: -0.5 * (F.silu(V @ h.detach()) * (U @ h).square()).sum(),
        lambda h, *, U, V: -0.5 * (F.silu(V @ frozen(h)) * (U @ h) ** 2).sum(),
        lambda h, *, U, V: -(words.silu((V @ h).detach()) * (U @ h) ** 2).sum() / 2,
        lambda h, *, U, V: -(F.silu(V @ h.data) * (U @ h) ** 2).sum() / 2,
        lambda h, *, U, V, frozen: -(F.silu(V @ frozen) * (U @ h) ** 2).sum() / 2,
    ),
    "scaled": (
        Sum(h[i] * beta, i) / sqrt(rank) * Sum(A[a, r], a, r),
        lambda h, *, A, beta=1.5: beta * h.sum() / A.shape[1] ** 0.5 * A.sum(),
        lambda h, *, A, beta=1.5: beta * h.sum() * A.shape[-1] ** -0.5 * A.sum(),
        lambda h, *, A, beta=1.5: beta * h.sum() * torch.mul(A.sum(), math.sqrt(1 / A.size(-1))),
        lambda h, *, A, beta=1.5: (h.sum() * torch.sum(A)).mul(beta).div(math.sqrt(A.size()[1])),
        lambda h, *, A, beta=1.5: h.sum() * A.sum() / math.sqrt(A.numel() // A.shape[0]) * beta,
    ),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, (_, *spellings) in SAME.items() for place in range(len(spellings))],
)
def test_spelling_gives_the_expression_of_the_symbolic_pen(name, place):
    expected, function = SAME[name][0], SAME[name][place + 1]
    translation = assert_same_number(function)
    assert translation.expression == canonical(expected)


def interaction(h, x, *, Q, K, beta=1.5):
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    return -torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k), dim=-1).sum() / beta


def interaction_by_matmul(h, x, *, Q, K, beta=1.5):
    q, k = Q @ h, x @ K.mT  # (heads, rank), (heads, seq, rank)
    return -torch.logsumexp(beta * (k @ q.unsqueeze(-1)).squeeze(-1), dim=-1).sum() / beta


def interaction_by_one_einsum(h, x, *, Q, K, beta=1.5):
    score = torch.einsum("ard,d,are,se->as", Q, h, K, x)
    return -(beta * score).exp().sum(-1).log().sum().div(beta)


def interaction_by_views(h, x, *, Q, K, beta=1.5):
    heads, rank, dim = Q.shape
    q = F.linear(h, Q.reshape(heads * rank, dim)).view(heads, rank)
    k = (
        F.linear(x, K.flatten(0, 1)).unflatten(-1, (heads, rank)).transpose(0, 1)
    )  # (heads, seq, rank)
    return -torch.logsumexp(beta * (q[:, None, :] * k).sum(-1), dim=-1).sum() / beta


@pytest.mark.parametrize(
    "function",
    [interaction, interaction_by_matmul, interaction_by_one_einsum, interaction_by_views],
)
def test_interaction_in_every_spelling(function):
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    expected = -Sum(logsumexp(beta * score, s), a) / beta
    translation = assert_same_number(function)
    assert translation.expression == canonical(expected)
    assert [str(one) for one in translation.parameters] == ["Q", "K"]
    assert translation.scalars == (beta,)
    assert (translation.state, translation.context) == (h, x)
