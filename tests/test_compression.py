"""Layers of lower rank: the error against theory, the layer against its zero-padded self, the bounds on weights."""

import copy
import dataclasses
import math

import pytest
import torch

import cem
from cem import energies
from cem.allocation import Heads
from cem.compression import Inputs, compress
from cem.compression.forms import Forms, centred_moment, read, second_moment
from cem.compression.groups import of_groups
from cem.compression.levels import bounds, operator_norms
from cem.compression.truncation import cut, gains, moments, root

TIGHT = {"rtol": 0, "atol": 1e-10}
pytestmark = pytest.mark.usefixtures("double")
DIM, TOKENS = 12, 7
KINDS = {
    "interaction": {"heads": 3, "rank": 4},
    "rotary_interaction": {"heads": 3, "rank": 4},
    "grouped_interaction": {"groups": 3, "per_group": 2, "rank": 4},
    "diagonal_plus_low_rank": {"heads": 3, "rank": 4},
    "diagonal_plus_low_rank_full": {"heads": 3, "rank": 4},
    "rotary_diagonal_plus_low_rank": {"heads": 3, "rank": 4},
    "partly_tied_interaction": {"heads": 3, "rank": 4, "copies": 2},
    "untied_interaction": {"heads": 3, "rank": 4, "copies": 2},
    "parallel_block": {"heads": 3, "rank": 4, "hidden": 5},
    "alibi_interaction": {"heads": 3, "rank": 4},
}


def layer_of(kind, **options):
    layer = cem.derive(getattr(energies, kind), dim=DIM, **KINDS[kind] | options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("lam", "w", "slope"):
                parameter.normal_(0, 0.3)
    return layer


def states(batch=5, tokens=TOKENS):
    """Correlated coordinates of unequal size and a mean, so that weighing and centring matter."""
    sizes = torch.logspace(0, -1.5, DIM)
    return torch.randn(batch, tokens, DIM) * sizes @ torch.randn(DIM, DIM) + torch.randn(DIM)


def padded(layer, done):
    """The layer with the forms of the cut written into matrices of the old size."""
    made, after = copy.deepcopy(layer), done.cut
    with torch.no_grad():
        made.Q.copy_(after.q[:, 0] if made.Q.dim() == 3 else after.q)
        made.K.copy_(after.k)
        if after.diagonal is not None:
            block = DIM // 3
            rows = after.diagonal
            if after.blocked:
                rows = torch.stack([rows[a, a * block : (a + 1) * block] for a in range(3)])
            made.lam.copy_(rows)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_layer_is_the_layer_with_zeros_in_place_of_what_went(kind):
    """Heads of ranks 4, 2 and 0 in sizes of their own, and fewer where one did nothing else."""
    layer, h = layer_of(kind, norm=torch.nn.RMSNorm(DIM), learn="beta"), states()
    x = layer.norm(h).detach()
    same, done = compress(layer, 4, x)
    torch.testing.assert_close(same(h), layer(h), **TIGHT)
    assert max(done.operator) < 1e-10 and done.kept == pytest.approx(1)
    small, done = compress(layer, [4, 2, 0], x, steps=3)
    torch.testing.assert_close(small(h), padded(layer, done)(h), **TIGHT)
    assert small.scalars["beta"] == pytest.approx(layer.scalars["beta"]), "the scale is kept"
    assert done.parameters == tuple(
        sum(p.numel() for p in one.parameters()) for one in (layer, small)
    )
    bound = kind in ("diagonal_plus_low_rank", "rotary_diagonal_plus_low_rank")
    assert done.parameters[1] < done.parameters[0] or bound
    assert small.lowering.kind == "fused"
    assert "Q" in dict(same.named_parameters()), "one group keeps the names" if bound else ""


def test_a_cut_layer_decodes_and_learns():
    layer = layer_of("rotary_interaction")
    small, _ = compress(layer, [4, 2, 0], states())
    h = states(2)
    cache = small.init_cache(2, TOKENS)
    parts = [small(h[:, :3], cache=cache), small(h[:, 3:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), small(h), **TIGHT)
    assert cache.nbytes == 2 * TOKENS * (4 + 2) * 8
    small(h).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in small.parameters())


@pytest.mark.parametrize("together", [False, True])
def test_pairs_stay_whole_and_common_ones_make_one_term(together):
    layer = layer_of("rotary_interaction")
    small, _ = compress(layer, 2, states(), together=together)
    names = {name for name, _ in small.named_parameters()}
    assert names == ({"Q", "K"} if together else names) and "rope" in str(
        small.energy_function.expression
    )
    h, shift = states(1), torch.arange(TOKENS) + 11
    torch.testing.assert_close(small(h), small(h, positions=shift), **TIGHT)


def test_common_pairs_are_gained_in_their_common_order():
    forms, seen = read(layer_of("rotary_interaction")), Inputs(states())
    own, common = gains(forms, seen), gains(forms, seen, together=True)
    torch.testing.assert_close(own.sum(1), common.sum(1), **TIGHT)
    assert (own[:, 0] >= common[:, 0]).all() and (common.sum(0).diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_short_types_are_cut_in_double(dtype):
    layer = layer_of("rotary_interaction").to(dtype)
    small, done = compress(layer, [4, 2, 0], states())
    assert small.Q_0.dtype is dtype and done.cut.q.dtype is torch.float64
    assert torch.equal(small.Q_0[0], layer.Q[0])


def test_interleaved_pairs_are_cut_too():
    energy = energies.rotary_interaction_by(pairing="interleaved")
    layer, h = cem.derive(energy, dim=DIM, heads=2, rank=6), states()
    small, done = compress(layer, [4, 2], h)
    torch.testing.assert_close(small(h), padded(layer, done)(h), **TIGHT)


# -- theory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["interaction", "grouped_interaction", "untied"])
def test_errors_are_the_singular_values_that_were_left_out(kind, weighted):
    """|A - A_r| = sigma_{r+1} and |A - A_r|_F^2 = sum of the rest, A the weighted form, queries below each other."""
    queries = 2 if kind == "grouped_interaction" else 1
    uses = "scores" if kind == "untied" else "tied"
    forms = Forms(torch.randn(3, queries, 5, DIM), torch.randn(3, 5, DIM), 5**-0.5, uses=uses)
    seen = Inputs(states()) if weighted else None
    left, right = map(root, moments(forms, seen))
    table = gains(forms, seen)
    for rank in range(6):
        found = cut(forms, (rank,) * 3, seen)
        for a in range(3):
            whole, kept = (
                torch.cat([left @ q.T @ k @ right for q in qs])
                for qs, k in ((forms.q[a], forms.k[a]), (found.q[a], found.k[a]))
            )
            values = torch.linalg.svdvals(whole)
            error = forms.scale * torch.linalg.svdvals(whole - kept)
            torch.testing.assert_close(error[0], forms.scale * values[rank], **TIGHT)
            rest = (forms.scale * values[rank:]).square().sum()
            torch.testing.assert_close(error.square().sum(), rest, **TIGHT)
            torch.testing.assert_close(table[a, rank:].sum(), rest, **TIGHT)
        if not weighted and queries == 1:  # the first level of the bounds
            wanted = forms.scale * torch.linalg.svdvals(forms.q[:, 0].mT @ forms.k)[:, rank]
            torch.testing.assert_close(
                operator_norms(forms, found.padded(forms))[:, 0], wanted, **TIGHT
            )


def test_no_other_cut_loses_less_variance():
    """Against random subspaces, in the norm that the data give."""
    forms = Forms(torch.randn(1, 1, 5, DIM), torch.randn(1, 5, DIM), 1.0)
    seen = Inputs(states())
    left, right = map(root, moments(forms, seen))

    def lost(q, k):
        return float((left @ (forms.q[0, 0].T @ forms.k[0] - q.T @ k) @ right).square().sum())

    best = cut(forms, (2,), seen)
    least = lost(best.q[0][0], best.k[0])
    plain = cut(forms, (2,))
    assert least < lost(plain.q[0][0], plain.k[0])
    for _ in range(50):
        basis = torch.linalg.qr(torch.randn(5, 2))[0]
        assert least <= lost(basis.T @ forms.q[0, 0], basis.T @ forms.k[0]) + 1e-12


def test_the_gain_is_the_variance_of_the_scores():
    """Where queries and keys are independent: E over queries of the variance over what is seen, by brute force."""
    forms = Forms(torch.randn(1, 1, 5, DIM), torch.randn(1, 5, DIM), 0.7)
    x = states(3)
    inputs = Inputs(x)
    q = torch.einsum("rw,btw->btr", forms.q[0, 0], x).flatten(0, 1)
    total = 0.0
    for t in range(TOKENS):  # every query of the data with every context of length t
        for context in x:
            k = context[: t + 1] @ forms.k[0].T
            total += (0.7 * q @ k.T).var(1, correction=0).mean() / (TOKENS * len(x))
    torch.testing.assert_close(gains(forms, inputs).sum(), total, **TIGHT)


def test_gains_of_pairs_are_the_variance_of_their_scores():
    """The same with a rotation, one pair at a time, at the positions where the tokens stand."""
    layer, x = layer_of("untied_interaction"), states(2)
    forms, inputs = read(layer), Inputs(x)
    q, k = forms.features(inputs)
    first = torch.stack([q[:, 0, 0, :, n] for n in (0, 2)], -1).flatten(0, 1)
    total = 0.0
    for t in range(TOKENS):
        for row in range(2):
            keys = torch.stack([k[row, 0, : t + 1, n] for n in (0, 2)], -1)
            total += (forms.scale * first @ keys.T).var(1, correction=0).mean() / (2 * TOKENS)
    assert any(abs(float(total - gain)) < 1e-10 for gain in gains(forms, inputs)[0])


def test_the_centred_moment_is_the_mean_covariance_of_what_is_seen():
    x = states(3)
    slow = torch.zeros(DIM, DIM)
    for row in x:
        for t in range(TOKENS):
            slow += torch.cov(row[: t + 1].T, correction=0).reshape(DIM, DIM) / (3 * TOKENS)
    torch.testing.assert_close(centred_moment(x, True), slow, **TIGHT)
    whole = sum(torch.cov(row.T, correction=0) for row in x) / 3
    torch.testing.assert_close(centred_moment(x, False), whole, **TIGHT)
    torch.testing.assert_close(second_moment(x), torch.einsum("bti,btj->ij", x, x) / 21, **TIGHT)


@pytest.mark.parametrize("kind", ["diagonal_plus_low_rank", "diagonal_plus_low_rank_full"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_diagonal_takes_up_what_it_can(kind, weighted):
    """Plainly diag(W - W_r) on its support; with data no step of any coordinate makes the weighted error smaller."""
    layer = layer_of(kind)
    forms, seen = read(layer), Inputs(states()) if weighted else None
    found = cut(forms, (2, 2, 2), seen)
    left, right = map(root, moments(forms, seen))
    for a in range(3):
        rest = forms.q[a, 0].T @ forms.k[a] - found.q[a][0].T @ found.k[a]
        moved = found.diagonal[a] - forms.diagonal[a]
        own = torch.arange(4 * a, 4 * a + 4) if forms.blocked else torch.arange(DIM)
        assert not moved[[n for n in range(DIM) if n not in own]].any()
        if not weighted:
            torch.testing.assert_close(moved[own], rest.diagonal()[own], **TIGHT)
        slope = (left.T @ (left @ (rest - moved.diag()) @ right) @ right.T).diagonal()[own]
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


# -- bounds ----------------------------------------------------------------------------------------------------


COMPARED = (
    "rotary_interaction",
    "grouped_interaction",
    "diagonal_plus_low_rank",
    "untied_interaction",
)


@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize("ranks", [2, (4, 2, 0)])
def test_no_row_is_above_its_bounds_on_held_out_data(kind, ranks):
    layer = layer_of(kind)
    _, done = compress(layer, ranks, states(4), steps=10)
    other = 3 * states(16)
    found = done.bounds(other)
    assert found.violations == (0, 0, 0) and done.calibrated.violations == (0, 0, 0)
    queries = 2 if kind == "grouped_interaction" else 1
    assert found.rows == 16 * 3 * queries * TOKENS
    assert (
        0 < found.tv <= min(found.range, found.pinsker) <= found.spectral <= 1 + 1e-12
        or found.tv == 0
    )
    assert found.largest >= found.tv


def test_a_wrong_bound_is_seen(monkeypatch):
    """Rows are really compared: an operator norm that is too small is caught."""
    forms = Forms(torch.randn(1, 1, 2, DIM), torch.randn(1, 2, DIM), 1.0)
    nothing = Forms(0 * forms.q, 0 * forms.k, 1.0)
    seen = Inputs(0.3 * states(8))
    honest = bounds(forms, nothing, seen)
    assert honest.violations == (0, 0, 0)
    assert honest.tv > 0.2 * honest.range, "the bound is not empty"
    lying = dataclasses.replace(forms, scale=1e-3)  # says that scores hardly move
    monkeypatch.setattr(
        "cem.compression.levels.operator_norms", lambda *_: operator_norms(lying, nothing)
    )
    broken = bounds(forms, nothing, seen).violations
    assert broken[0] > 0 and broken[1:] == (0, 0)


def test_the_range_bound_is_tight_for_two_values():
    """Two tokens with scores R/4 and -R/4, and with the signs changed: TV = tanh(R/4) exactly."""
    size = 1.7
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    tilted = torch.tensor([[size / 4, size / 4], [-size / 4, -size / 4]])
    forms = Forms(tilted[None, None], torch.eye(2)[None], 1.0)
    after = Forms(-tilted[None, None], torch.eye(2)[None], 1.0)
    found = bounds(forms, after, Inputs(x, causal=False))
    assert found.tv == pytest.approx(math.tanh(size / 4), abs=1e-12)
    assert found.range == pytest.approx(found.tv, abs=1e-12)


def test_energies_move_by_no_more_than_they_may():
    """|E - E_r| <= sum_a |W_a - W'_a| |h| max|x_s| for the interaction energy, rotary or not."""
    for kind in ("interaction", "rotary_interaction"):
        layer = layer_of(kind)
        small, done = compress(layer, 2, states(), steps=10)
        h = states(20)
        size = float(h.norm(dim=-1).max())
        moved = (layer.energy(h) - small.energy(h)).abs().max()
        assert 0 < moved <= done.energy_bound(size, size)


@pytest.mark.parametrize(
    "kind",
    [
        "alibi_interaction",
        "sink_interaction",
        "soft_capped_interaction",
        "squared_interaction",
        "symmetrised_interaction",
    ],
)
def test_weights_that_are_not_a_softmax_of_the_forms_are_cut_but_not_compared(kind):
    _, done = compress(cem.derive(getattr(energies, kind), dim=DIM, heads=3, rank=4), 2, states())
    assert done.calibrated is None
    with pytest.raises(ValueError, match="are not the softmax of Q and K alone"):
        done.bounds(states())
    with pytest.raises(ValueError, match="are not the softmax of Q and K alone"):
        done.energy_bound(1.0, 1.0)


# -- refusals and groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([2, 2], r"one rank for each of 3 heads, from 0 to 4 in steps of 2: got \(2, 2\)"),
        (6, r"got \(6, 6, 6\); type `compress\(layer, 2\)`"),
        (3, r"steps of 2: got \(3, 3, 3\)"),
    ],
)
def test_ranks_that_cannot_be_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        compress(layer_of("rotary_interaction"), ranks)


@pytest.mark.parametrize(
    ("energy", "sizes", "message"),
    [
        ("normalised_interaction", {"heads": 2, "rank": 4}, "are not bilinear in Q h and K x"),
        ("soft_capped_interaction", {"heads": 2, "rank": 4}, None),
        ("memory", {"hidden": 5}, "compression needs attention: got EnergyLayer"),
        ("gated_silu", {"hidden": 5}, "compression needs attention"),
    ],
)
def test_other_layers_are_refused(energy, sizes, message):
    layer = cem.derive(getattr(energies, energy), dim=DIM, **sizes)
    if message is None:  # a cap of a bilinear score: the form is still h^T W x
        h = states()
        small, done = compress(layer, 2, h)
        torch.testing.assert_close(small(h), padded(layer, done)(h), **TIGHT)
        return
    with pytest.raises(ValueError, match=message):
        compress(layer, 2)


def test_a_partial_rotation_is_refused():
    layer = cem.derive(energies.rotary_interaction_by(fraction=1 / 2), dim=DIM, heads=2, rank=4)
    with pytest.raises(ValueError, match="turns a part of its coordinates"):
        compress(layer, 2)
    with pytest.raises(ValueError, match="compression needs attention: got Linear"):
        compress(torch.nn.Linear(3, 3), 2)


def test_groups_of_an_energy_are_its_sum():
    """With sizes of their own, and the same energy as one where they are equal."""
    layer = layer_of("interaction")
    two = cem.derive(
        of_groups(energies.interaction, 2), dim=DIM, heads_0=1, rank_0=4, heads_1=2, rank_1=4
    )
    with torch.no_grad():
        for name in ("Q", "K"):
            getattr(two, f"{name}_0").copy_(getattr(layer, name)[:1])
            getattr(two, f"{name}_1").copy_(getattr(layer, name)[1:])
    h = states()
    torch.testing.assert_close(two(h), layer(h), **TIGHT)
    assert two.certificate.verdict == "any step size"
    with pytest.raises(ValueError, match="has no matrices Q .* and K"):
        of_groups(energies.gated_silu, 2)


def test_heads_are_described_for_the_allocation():
    from cem.compression import _heads

    layer = layer_of("grouped_interaction")
    found = _heads("a", read(layer), Inputs(states()))
    assert isinstance(found, Heads)
    assert (found.heads, found.queries, found.rank, found.dim, found.uses) == (3, 2, 4, DIM, "tied")
    assert found.unit("parameters", 0) * 3 * 4 == layer.Q.numel() + layer.K.numel()
