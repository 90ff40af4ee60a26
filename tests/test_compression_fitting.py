"""What stays is fitted: against the layer, against brute force, and where a fit has nothing to lose."""

from dataclasses import replace

import pytest
import torch
from test_compression import DIM, TIGHT, TOKENS, layer_of, states

import cem
from cem.compression import Inputs, compress
from cem.compression.fitting import _said, fitted
from cem.compression.forms import Forms, read
from cem.compression.levels import operator_norms
from cem.compression.truncation import cut
from cem.energies.rotary_interaction import rotary_interaction_by

pytestmark = pytest.mark.usefixtures("double")


def rows_of_weights(forms, text):
    """For every head and token the weights over what it sees, and the force that they give, token by token."""
    seen, heads = Inputs(text[None]), range(len(forms.q))
    scores, keys = forms.scores(seen)[0, :, 0], forms.features(seen)[1][0]
    weights = [[row[t, : t + 1].softmax(-1) for t in range(len(text))] for row in scores]
    means = [[p @ keys[a, : len(p)] for p in weights[a]] for a in heads]
    means = torch.stack([torch.stack(row) for row in means])[None, :, None]
    forces = torch.einsum("htr,hrw->htw", forms.back(means, seen)[0, :, 0], forms.q[:, 0])
    if forms.diagonal is not None:
        seen_by = [[p @ text[: len(p)] for p in weights[a]] for a in heads]
        seen_by = torch.stack([torch.stack(row) for row in seen_by])
        forces = forces + forms.diagonal[:, None] * seen_by
    return weights, forces


def objective(forms, other, x, tied):
    """What is descended, by loops: mean divergences, and where values are tied relative errors of the forces."""
    lost, moved, whole = 0.0, 0.0, 0.0
    for text in x:
        (p, u), (r, v) = (rows_of_weights(one, text) for one in (forms, other))
        for a in range(len(p)):
            lost += sum(
                float((m * (m / n).log()).sum()) for m, n in zip(p[a], r[a], strict=True)
            ) / (len(x) * len(text))
        moved, whole = moved + (u - v).square().sum((1, 2)), whole + u.square().sum((1, 2))
    return lost + (float((moved / whole).sum()) if tied else 0.0)


@pytest.mark.parametrize(
    "kind", ["interaction", "rotary_interaction", "rotary_diagonal_plus_low_rank"]
)
def test_the_forces_of_tied_heads_add_up_to_the_step(kind):
    layer, h = layer_of(kind), states(2)
    log_p, forces = _said(read(layer), Inputs(h))
    torch.testing.assert_close(h + forces.sum(1), layer(h), **TIGHT)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 3, 1, TOKENS), **TIGHT)


@pytest.mark.parametrize(
    "kind",
    ["rotary_interaction", "untied_interaction", "rotary_diagonal_plus_low_rank"],
)
def test_a_fit_comes_nearer_than_the_cut(kind):
    layer, x = layer_of(kind), states(4) / 3
    forms, tied = read(layer), kind != "untied_interaction"
    bare, done = (compress(layer, [4, 2, 2], x, steps=n)[1].cut for n in (0, 15))
    before, after = (objective(forms, one, x, tied) for one in (bare, done))
    assert after < 0.8 * before
    assert torch.equal(done.k[0], bare.k[0]), "a head that keeps all stays as it is"
    gone = (bare.k == 0).all(-1)
    assert gone.any() and not done.k[gone].any() and not done.q[:, 0][gone].any()


def test_a_fit_finds_a_pair_that_says_what_two_said():
    """Two pairs of one frequency whose keys are complex multiples: one of them can say it all, but not as it stands."""
    layer = cem.derive(rotary_interaction_by(frequencies=(0.7, 0.7)), dim=DIM, heads=1, rank=4)
    with torch.no_grad():
        first, second = torch.randn(2, DIM)
        rows = torch.complex(first, second)
        for n, factor in enumerate((1.0, 0.5 - 0.8j)):
            layer.K[0, n], layer.K[0, n + 2] = (factor * rows).real, (factor * rows).imag
    x = states(24) / 3
    bare, done = (compress(layer, 2, x, steps=n)[1].calibrated for n in (0, 60))
    assert done.tv < 0.1 * bare.tv and bare.tv > 0.02


def test_nothing_is_fitted_where_nothing_is_asked():
    layer, x = layer_of("rotary_interaction"), states()
    forms, seen = read(layer), Inputs(x)
    for ranks, steps in (((4, 4, 4), 40), ((4, 0, 0), 40), ((2, 2, 2), 0)):
        found = cut(forms, ranks, seen)
        assert fitted(forms, found, seen, steps) is found
    with torch.no_grad():
        layer.Q.zero_()
    assert not compress(layer, 2, x)[1].cut.q.any(), "heads without a force"
    bias = layer_of("alibi_interaction")
    plain = cut(read(bias), (2, 2, 2), seen)
    torch.testing.assert_close(compress(bias, 2, x)[1].cut.q[:, :, :2], torch.stack(plain.q))


def test_the_bound_of_a_moved_pair_holds_at_every_distance():
    """Against the largest singular value over a fine grid of angles; another basis of the same form moves nothing."""
    pairs = torch.tensor([[0, 1]])
    forms = Forms(torch.randn(1, 1, 2, 5), torch.randn(1, 2, 5), 0.7, pairs)
    moved = replace(forms, q=2 * forms.q, k=forms.k / 2)
    assert operator_norms(forms, moved) < 1e-12
    for size in (0.0, 0.1, 1.0, 10.0):
        other = replace(forms, q=forms.q + size * torch.randn(1, 1, 2, 5), k=forms.k * 1.1)
        worst = 0.0
        for angle in torch.linspace(0, 2 * torch.pi, 361):
            c, s = angle.cos(), angle.sin()
            turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
            form = forms.q[0, 0].T @ turn @ forms.k[0] - other.q[0, 0].T @ turn @ other.k[0]
            worst = max(worst, 0.7 * float(torch.linalg.matrix_norm(form, 2)))
        bound = float(operator_norms(forms, other))
        assert worst <= bound + 1e-12 and bound <= 2 * worst
    nothing = replace(forms, q=0 * forms.q)
    of_q, of_k = torch.linalg.matrix_norm(forms.q[0, 0], 2), torch.linalg.matrix_norm(forms.k[0], 2)
    assert float(operator_norms(forms, nothing)) == pytest.approx(0.7 * float(of_q * of_k))
