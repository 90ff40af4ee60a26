"""The soft top-k against its definition, solved by bisection, and against finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cem
from benchmarks.routing import coordinate_descent
from cem.routing.running import kept_of, running_choice, running_rank, running_soft_top_k
from cem.testing import assert_close

F64 = torch.float64
EPS = (10.0, 1.0, 0.1, 0.03, 0.001)


def bisected(s, k, eps):
    """min(1, exp((s + a) / eps)) with a by bisection, for scores (n,)."""
    low, high = -s.max() - 100 * eps - 1, -s.min() + 100 * eps + 1
    for _ in range(200):
        a = (low + high) / 2
        small = ((s + a) / eps).clamp(max=0).exp().sum() < k
        low, high = (a, high) if small else (low, a)
    return ((s + high) / eps).clamp(max=0).exp()


def entropic(s, weights, eps):
    """s . lam + eps H(lam)."""
    return (s * weights).sum() - eps * torch.xlogy(weights, weights).sum()


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("n", [1, 2, 7, 200])
def test_it_solves_the_problem(n, eps):
    for k in {1, n // 3 + 1, max(1, n - 1), n, 0.4, 0.37 * n}:
        s = 3 * torch.randn(n, dtype=F64)
        weights = cem.soft_top_k(s, k, eps)
        assert (weights - bisected(s, k, eps)).abs().max() < 1e-9
        assert weights.sum() == pytest.approx(k, abs=1e-9)
        assert weights.min() >= 0 and weights.max() <= 1
        assert (weights[s.argsort()].diff() >= 0).all()
        assert_close(cem.soft_top_k(s + 17.0, k, eps), weights, 1e-9)


def test_nothing_feasible_is_better():
    s, eps, k = torch.randn(6, dtype=F64), 0.3, 2.5
    best = entropic(s, cem.soft_top_k(s, k, eps), eps)
    for _ in range(200):
        other = torch.rand(6, dtype=F64)
        other *= k / other.sum()
        if other.max() <= 1:
            assert entropic(s, other, eps) < best


def test_limits():
    s = torch.randn(3, 50, dtype=F64)
    assert_close(cem.soft_top_k(s, 1, 0.4), torch.softmax(s / 0.4, -1), 1e-14)
    assert torch.equal(cem.soft_top_k(s, 50, 0.4), torch.ones_like(s))
    assert torch.equal(cem.soft_top_k(torch.zeros(9), 9), torch.ones(9))
    assert torch.equal(cem.soft_top_k(s, 0, 0.4), torch.zeros_like(s))
    hard = torch.zeros_like(s).scatter_(-1, s.topk(20).indices, 1.0)
    assert_close(cem.soft_top_k(s, 20, 1e-7), hard, 1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype, scale, device):
    """Scores of any spread against float64 on the same scores, at k and n of a long sequence."""
    s = (scale * torch.randn(4, 3000)).to(dtype)
    weights = cem.soft_top_k(s.to(device), 700, 0.1).cpu()
    assert weights.dtype == dtype
    # t = s / eps of size 1e4 has an error of 1e-3 in float32; bfloat16 rounds the result.
    tolerance = {torch.float32: 3e-4, torch.bfloat16: 4e-3}[dtype] * max(1.0, scale / 100)
    assert (weights.double() - cem.soft_top_k(s.double(), 700, 0.1)).abs().max() < tolerance


def test_batched_k_axes_and_masks():
    s, k = torch.randn(2, 9, 3, dtype=F64), torch.tensor([[1.0, 4.0, 2.5], [9.0, 8.0, 3.0]])
    found = cem.soft_top_k(s, k, 0.5, dim=1)
    for b in range(2):
        for c in range(3):
            assert_close(found[b, :, c], cem.soft_top_k(s[b, :, c], float(k[b, c]), 0.5), 1e-14)
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    row = s[..., 0].clone().requires_grad_()
    weights = cem.soft_top_k(row, 4, 0.5, mask=mask)
    assert torch.equal(weights[0], mask[0].to(F64))
    assert_close(weights[1], cem.soft_top_k(s[1, :, 0], 4, 0.5), 1e-14)
    short = cem.soft_top_k(row, torch.tensor([2.0, 4.0]), 0.5, mask=mask)
    assert_close(short[0, :4], cem.soft_top_k(s[0, :4, 0], 2, 0.5), 1e-14)
    slope = torch.randn_like(short)
    (found,) = torch.autograd.grad(short, row, slope)
    assert found.isfinite().all() and (found[0, 4:] == 0).all()


def test_its_derivative():
    """gradcheck, twice; the Jacobian in closed form and by finite differences."""
    s = torch.randn(3, 9, dtype=F64, requires_grad=True)
    k = torch.tensor([1.0, 4.0, 2.5])
    assert gradcheck(lambda s: cem.soft_top_k(s, k, 0.5), s)
    assert gradgradcheck(lambda s: cem.soft_top_k(s, k, 0.5), s)
    s, eps, step = torch.randn(20, dtype=F64), 0.2, 1e-6
    jacobian = torch.autograd.functional.jacobian(lambda s: cem.soft_top_k(s, 6, eps), s)
    weights = cem.soft_top_k(s, 6, eps)
    free = weights * (weights < 1)
    assert 2 < (weights < 1).sum() < 20
    assert_close(jacobian, (free.diag() - free.outer(free) / free.sum()) / eps, 1e-12)
    for i in range(20):
        move = step * torch.eye(20, dtype=F64)[i]
        found = cem.soft_top_k(s + move, 6, eps) - cem.soft_top_k(s - move, 6, eps)
        assert (found / (2 * step) - jacobian[:, i]).abs().max() < 1e-7
    assert torch.linalg.eigvalsh(jacobian)[0] > -1e-12


def test_it_is_the_gradient_of_a_convex_sum():
    s = torch.randn(2, 12, dtype=F64, requires_grad=True)
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    value = cem.soft_top_k_sum(s, 3, 0.4, mask=mask)
    weights = cem.soft_top_k(s, 3, 0.4, mask=mask)
    assert_close(value[0], entropic(s[0], weights[0], 0.4), 1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), s, create_graph=True)
    assert_close(gradient, weights, 1e-12)
    assert gradgradcheck(lambda s: cem.soft_top_k_sum(s, 3, 0.4), s)
    a, b = torch.randn(2, 12, dtype=F64)
    middle = cem.soft_top_k_sum((a + b) / 2, 3)
    assert middle <= (cem.soft_top_k_sum(a, 3) + cem.soft_top_k_sum(b, 3)) / 2
    assert_close(cem.soft_top_k_sum(a, 3, 1e-9), a.topk(3).values.sum(), 1e-6)


def test_the_published_iteration_is_not_done():
    """Coordinate descent reaches the same weights at a high temperature, and is far from them at a usual one."""
    s = torch.randn(256, dtype=F64)
    found = coordinate_descent(s, 64, 1.0, iterations=50)
    assert (found - cem.soft_top_k(s, 64, 1.0)).abs().max() < 1e-9
    found = coordinate_descent(s, 64, 0.03, iterations=20)
    assert (found - cem.soft_top_k(s, 64, 0.03)).abs().max() > 0.1


def test_refusals():
    with pytest.raises(ValueError, match="needs a positive `eps`: got 0; type `scores.topk"):
        cem.soft_top_k(torch.zeros(3), 1, 0)
    with pytest.raises(ValueError, match="takes k of 3 scores: got k=4; type `k=min"):
        cem.soft_top_k(torch.zeros(3), 4)


@pytest.mark.parametrize("n", [1, 5, 33, 64, 300])
def test_ranks_among_earlier_scores(n, device):
    s = torch.randn(2, n)
    s[:, n // 2 :] = s[:, : n - n // 2]  # ties
    for new in (1, n // 2 + 1, n):
        counted = [(s[:, :i] >= s[:, i : i + 1]).sum(-1) for i in range(n - new, n)]
        assert torch.equal(running_rank(s.to(device), new).cpu(), torch.stack(counted, 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_tokens_are_chosen_alike_however_their_scores_are_rounded(dtype):
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(3, 20, dtype=dtype)[:, torch.randint(20, (200,), generator=generator)]
    chosen, rank = running_choice(s, 0.3, 200), running_rank(s, 200)
    for _ in range(3):
        rounded = s * (1 + torch.finfo(dtype).eps * torch.randint(-3, 4, s.shape).to(dtype))
        assert torch.equal(running_choice(rounded, 0.3, 200), chosen)
        assert not torch.equal(running_rank(rounded, 200), rank)
        one_by_one = [running_choice(rounded[:, : i + 1], 0.3, 1) for i in range(200)]
        assert torch.equal(torch.cat(one_by_one, 1), chosen)


@pytest.mark.parametrize("share", [0.1, 0.33, 1.0])
@pytest.mark.parametrize("eps", [1.0, 0.03])
def test_the_running_form_is_the_soft_top_k_of_every_prefix(share, eps):
    s = torch.randn(2, 60, dtype=F64)
    places = torch.arange(60).expand(2, 60)
    chosen = running_choice(s, share, 60)
    found = running_soft_top_k(s, places, share, eps)
    for i in range(60):
        k = math.ceil(share * (i + 1) - 1e-9)
        assert kept_of(share, torch.tensor(i + 1)) == k
        best = s[:, : i + 1].topk(k).values[:, -1]
        assert torch.equal(chosen[:, i], s[:, i] >= best)
        own = cem.soft_top_k(s[:, : i + 1], k, eps)[:, -1]
        assert ((found[:, i] - own)[chosen[:, i]].abs() < 1e-12).all()
    assert chosen.sum(-1).max() < 60 or share == 1


def test_the_running_form_skips_padding():
    s = torch.randn(1, 20, dtype=F64)
    real = torch.rand(1, 20) > 0.4
    left = s[real][None]
    chosen = running_choice(s, 0.4, 20, real)
    assert torch.equal(chosen[real][None], running_choice(left, 0.4, left.shape[1]))
    assert not chosen[~real].any()
    found = running_soft_top_k(s, torch.arange(20)[None], 0.4, 0.2, real)
    alone = running_soft_top_k(left, torch.arange(left.shape[1])[None], 0.4, 0.2)
    assert_close(found[chosen], alone[chosen[real][None]], 1e-12)


def test_the_derivative_of_the_running_form():
    s = torch.randn(2, 15, dtype=F64, requires_grad=True)
    index = (
        running_choice(s.detach(), 0.5, 15).to(torch.int8).argsort(dim=-1, descending=True)[:, :5]
    )
    assert gradcheck(lambda s: running_soft_top_k(s, index, 0.5, 0.6), s)


def test_later_scores_change_no_bit_of_the_running_form(device):
    s = torch.randn(2, 150, device=device)
    other = torch.cat([s[:, :90], 5 * torch.randn(2, 60, device=device)], 1)
    places = torch.arange(150, device=device).expand(2, 150)
    for one in (
        lambda s: running_choice(s, 0.3, 150),
        lambda s: running_soft_top_k(s, places, 0.3, 0.1),
    ):
        assert torch.equal(one(s)[:, :90], one(other)[:, :90])
