"""Growth of a layer: what is called exact is exact, what cannot learn is refused, for every energy and size."""

import copy
import pickle

import pytest
import torch
from gallery import GALLERY, SIZES
from helpers import looped, sizes_of
from sympy import Sum, sqrt

import cem
from cem import energies
from cem.growth.rows import rows_of

# By energy and size: what is zero in the new rows of rule "frozen"; or why it is refused, and what is then exact.
# One of each family stands for those that differ in an activation with the same value and slope at 0.
DEAD, CHANGES = "a dead point", "changes the update"
EXPECTED = {
    "alibi_interaction": {"heads": "Q", "rank": "Q"},
    "collaborative_interaction": {"heads": "sigma", "rank": "Q"},
    "consistent_token_parameters": {"tokens": (DEAD, None)},
    "dense_interaction": {"heads": "W"},
    "diagonal_plus_low_rank": {"rank": "Q"},
    "diagonal_plus_low_rank_full": {"heads": "Q lam", "rank": "Q"},  # lam starts at zero
    "energy_transformer": {"heads": "Q", "rank": "Q", "hidden": (DEAD, "duplicate")},
    "gated_gelu": {"hidden": "G"},
    "gated_linear_attention": {"heads": (DEAD, "duplicate"), "rank": "Q"},
    "gated_relu": {"hidden": (DEAD, "duplicate")},
    "gated_sigmoid": {"hidden": (DEAD, "duplicate")},
    "gated_silu": {"hidden": "G"},
    "grouped_interaction": {"groups": "Q", "per_group": "Q", "rank": "Q"},
    "interaction": {"heads": "Q", "rank": "Q"},
    "loosely_tied_gated": {"hidden": "G"},
    "loosely_tied_interaction": {"heads": "Q", "rank": "K V"},
    "memory": {"hidden": (CHANGES, "duplicate")},
    "mixture_of_experts_relu": {"experts": (CHANGES, "duplicate"), "hidden": (DEAD, "duplicate")},
    "mixture_of_experts_silu": {"experts": (CHANGES, "duplicate"), "hidden": "G"},
    "normalised_interaction": {"heads": (CHANGES, "gain"), "rank": (DEAD, "duplicate")},
    "parallel_block": {"heads": "Q", "rank": "Q", "hidden": "G"},
    "partly_tied_gated": {"hidden": "D w"},
    "partly_tied_interaction": {"heads": "Q V", "rank": "Q", "copies": "V"},
    "plain_gelu": {"hidden": (DEAD, "gain")},
    "plain_relu": {"hidden": (DEAD, "duplicate")},
    "plain_silu": {"hidden": (DEAD, "gain")},
    "plain_softplus": {"hidden": "U"},
    "polynomial_memory": {"hidden": (DEAD, "duplicate")},
    "quadratic_well": {"rank": (DEAD, "duplicate")},
    "relative_interaction": {"heads": "Q", "rank": "Q", "buckets": ("nothing reads them", None)},
    "rotary_diagonal_plus_low_rank": {"rank": "Q"},
    "rotary_interaction": {"heads": "Q", "rank": "Q"},
    "sink_interaction": {"heads": "Q", "rank": "Q"},
    "sliding_window_interaction": {"heads": "Q", "rank": "Q"},
    "soft_capped_interaction": {"heads": "Q", "rank": "Q"},
    "sparse_coding": {"features": "D"},
    "sparse_memory": {"hidden": (CHANGES, None)},
    "squared_interaction": {"heads": (DEAD, "duplicate"), "rank": "Q"},
    "subspace_compression": {"heads": (DEAD, "gain"), "rank": (DEAD, "duplicate")},
    "symmetric_interaction": {"heads": "sigma", "rank": "sigma"},
    "symmetrised_interaction": {"heads": "K", "rank": "K"},
    "tempered_interaction": {"heads": (CHANGES, "gain"), "rank": "Q"},
    "token_parameters": {"tokens": (DEAD, "gain")},
    "token_parameters_relu": {"tokens": (DEAD, "duplicate")},
    "two_sided_gated_silu": {"hidden": "U"},
    "unnormalised_token_parameters": {"tokens": "gain"},
    "untied_interaction": {"heads": "V", "rank": "K", "copies": "V"},
}
FAMILIES = {"gated", "mixture_of_experts", "plain", "two_sided_gated", "two_sided_gated_gelu"}
FAMILIES |= {"two_sided_gated_relu", "two_sided_gated_sigmoid"}
NOTHING_GROWS = {"diagonal_interaction", "sparsification"}
PAIRS = [(name, size) for name, sizes in EXPECTED.items() for size in sizes]


def layer_of(name, **options):
    energy = GALLERY[name]
    return cem.derive(
        energy, dtype=torch.float64, **sizes_of(energy, SIZES | {"block": 6}), **options
    )


def other_inputs(layer):
    """Tokens that no search has seen, under every kind of mask that the layer takes."""
    draw = torch.Generator().manual_seed(7)
    h = torch.randn(2, 9, layer.dim, generator=draw, dtype=torch.float64)
    ways = [{}]
    if layer.energy_function.context is not None:
        ways += [
            {"visible": torch.rand(2, 9, generator=draw) < 0.7},
            {"visible": torch.rand(2, 9, 9, generator=draw) < 0.5},
            {"document_ids": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])},
        ]
    if layer.energy_function.has_positions:
        ways.append({"positions": torch.arange(3, 12)})
    return [(h, inputs) for inputs in ways]


def change(new, old):
    """The largest relative change of what the layer adds, over all kinds of masks."""
    found = 0.0
    for h, inputs in other_inputs(old):
        before, after = (layer(h, **inputs).detach() - h for layer in (old, new))
        found = max(found, float((after - before).abs().max() / before.abs().max()))
    return found


def slopes(layer, old):
    """By parameter, the gradients of the numbers that the old layer lacks: those whose shape is larger."""
    h, inputs = other_inputs(layer)[-1]
    (layer(h, **inputs) * h.cos()).sum().backward()
    own = dict(old.named_parameters())
    named = layer.named_parameters()
    return {n: p.grad for n, p in named if n not in own or p.shape != own[n].shape}


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_every_size_of_every_energy(name, size):
    old = layer_of(name)
    before = copy.deepcopy(old.state_dict())
    wider = {size: 2 * old.sizes[size]}
    expected = EXPECTED[name][size]
    if not isinstance(expected, str):
        why, instead = expected
        with pytest.raises(ValueError, match=f"cannot grow `{size}` .*{why}") as refused:
            old.grow(**wider)
        if instead is None:
            assert "random" in str(refused.value) or "leave it out" in str(refused.value)
            return
        assert f"rule='{instead}'" in str(refused.value)
        new = old.grow(rule=instead, **wider)
        assert new.growth[0].symmetric == (instead == "duplicate")
    else:
        new = old.grow(**wider)
        zeros = {n for n, what in new.growth[0].rows.items() if what == "0"}
        assert zeros == set(expected.split())
    record = new.growth[0]
    assert new.sizes == old.sizes | wider and record.exact and record.change <= 1e-14
    assert change(new, old) <= 1e-13
    assert new.scalars == old.scalars
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items())
    found = slopes(new, old)
    assert set(found) == set(record.rows)
    for key, share in record.gradient.items():  # the record says which rows learn at once
        grown = found[key].abs() > 1e-12
        assert bool(grown.any()) or share == 0
    assert any(record.gradient.values()) and all(record.later.values())


def test_the_table_is_complete():
    assert set(EXPECTED) | FAMILIES | NOTHING_GROWS == set(GALLERY)
    for name in NOTHING_GROWS:
        with pytest.raises(ValueError, match="sizes that grow: none"):
            layer_of(name).grow(dim=16)
    for name, sizes in EXPECTED.items():
        energy = GALLERY[name]
        widths = {energy.width, *(() if energy.context is None else energy.context.shape[1:])}
        fixed = {str(dim) for width in widths for dim in width.free_symbols}
        assert set(sizes) == {str(dim) for dim in energy.dims} - fixed


@pytest.mark.parametrize(
    ("name", "size", "new", "divided"),
    [
        ("gated_silu", "hidden", 10, {"U": "^1/2"}),
        ("polynomial_memory", "hidden", 11, {"U": "^1/3"}),
        ("interaction", "rank", 8, {"K": ""}),
        ("partly_tied_gated", "hidden", 9, {"D": "", "w": ""}),
    ],
)
def test_duplicates_of_some_rows(name, size, new, divided):
    old = layer_of(name)
    grown = old.grow(rule="duplicate", **{size: new})
    record = grown.growth[0]
    expected = {n: f"copies, of k all over k{root}" for n, root in divided.items()}
    assert record.rows == {n: expected.get(n, "copies") for n in record.rows}
    assert record.change <= 1e-13 and change(grown, old) <= 1e-13 and record.symmetric


def test_copies_stay_copies_until_noise_parts_them():
    old = layer_of("gated_silu")
    for noise in (0.0, 0.05):
        new = old.grow(rule="duplicate", noise=noise, hidden=14)
        step = torch.optim.SGD(new.parameters(), lr=0.1)
        slopes(new, old)
        step.step()
        assert torch.allclose(new.U[:7], new.U[7:], rtol=0, atol=1e-13) == (noise == 0)
        assert new.growth[0].symmetric == new.growth[0].exact == (noise == 0)
    assert 1e-4 < new.growth[0].change < 0.2


def test_new_rows_that_are_all_zero_are_called_equal():
    many, one = (layer_of("dense_interaction").grow(heads=n).growth[0] for n in (4, 3))
    assert many.symmetric and not one.symmetric
    assert "stay equal: break that with noise=0.05" in str(many)
    noisy = layer_of("dense_interaction").grow(heads=4, noise=1e-3).growth[0]
    assert not noisy.symmetric and 0 < noisy.change < 0.1


@pytest.mark.parametrize("name", ["interaction", "gated_silu"])
def test_rows_matched_in_norm(name):
    old = layer_of(name)
    size, matrix = {"interaction": ("rank", "K"), "gated_silu": ("hidden", "U")}[name]
    n = old.sizes[size]
    new = old.grow(rule="norm_matched", **{size: 3 * n})
    assert new.growth[0].exact and change(new, old) <= 1e-13
    before, after = getattr(old, matrix), getattr(new, matrix)[..., n:, :]
    torch.testing.assert_close(after.mT @ after, 2 * before.mT @ before, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="as many new rows as the rank of the old ones"):
        old.grow(rule="norm_matched", **{size: n + 2})


def test_random_rows_change_the_update_and_learn():
    old = layer_of("interaction")
    new = old.grow(rule="random", heads=4, generator=torch.Generator().manual_seed(1))
    again = old.grow(rule="random", heads=4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(new.Q, again.Q) and torch.equal(new.Q[:2], old.Q)
    assert not new.growth[0].exact and change(new, old) > 0.01
    assert all((g != 0).all() for g in slopes(new, old).values())


def test_the_search_draws_from_the_given_generator_alone():
    old, state = layer_of("interaction"), torch.get_rng_state()
    old.grow(heads=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


# What a layer carries along


def test_several_sizes_and_what_a_layer_holds():
    old = cem.derive(
        energies.rotary_interaction + energies.gated,
        dim=12,
        heads=2,
        rank=4,
        hidden=7,
        steps=2,
        norm=torch.nn.RMSNorm,
        learn="beta",
        update=cem.Momentum(0.3),
        preconditioner=cem.Diagonal,
        dtype=torch.float64,
    ).eval()
    old.log_beta.data += 0.3
    old.G.requires_grad_(False)
    new = old.grow(heads=3, rank=8, hidden=9)
    assert new.sizes == {"dim": 12, "heads": 3, "rank": 8, "hidden": 9}
    assert change(new, old) <= 1e-13 and [r.size for r in new.growth] == ["heads", "rank", "hidden"]
    assert new.log_beta is not old.log_beta and torch.equal(new.log_beta, old.log_beta)
    assert not new.training and not new.G.requires_grad and new.U.requires_grad
    assert new.norm is not old.norm and new.steps == 2 and isinstance(new.update, cem.Momentum)
    assert change(pickle.loads(pickle.dumps(new)), old) <= 1e-13
    once_more = new.grow(hidden=12)
    assert [r.new for r in once_more.growth] == [12] and change(once_more, old) <= 1e-13


def test_single_precision_and_joint_layers():
    old = cem.derive(
        energies.energy_transformer, dim=12, heads=2, rank=5, hidden=7, joint=True, causal=False
    )
    new = old.grow(heads=4)
    h = torch.randn(2, 7, 12)
    assert new.Q.dtype == torch.float32 and new.joint
    torch.testing.assert_close(new(h), old(h), rtol=1e-5, atol=1e-5)


def test_an_energy_that_cannot_be_translated():
    old = cem.derive(looped, dim=12, heads=2, rank=5, dtype=torch.float64)
    new = old.grow(rank=8)
    assert new.scalars == old.scalars == {"beta": 5**-0.5} and change(new, old) <= 1e-13


def test_scalars_at_a_default_of_the_size():
    """Attention to learned tokens whose scores have one length: exact with rows of one Gram matrix at a new scale."""
    dim, hidden = cem.dims("dim hidden")
    h, i, m = cem.state(dim), dim.index("i"), hidden.index("m")
    K, V = cem.parameter("K", hidden, dim), cem.parameter("V", hidden, dim)
    tau = cem.scalar("tau", default=hidden**0.5, positive=True)
    c = cem.frozen(h)
    length = sqrt(Sum(Sum(K[m, i] * c[i], i) ** 2, m))
    score = Sum(K[m, i] * c[i], i)
    energy = cem.Energy(-Sum(cem.gelu(tau * score / length) * Sum(V[m, i] * h[i], i), m), "tokens")
    old = cem.derive(energy, dim=6, hidden=12, dtype=torch.float64)
    frozen = old.grow(hidden=32)
    assert frozen.growth[0].rows["K"] == "0" and frozen.scalars == old.scalars
    matched = old.grow(rule="norm_matched", hidden=32)
    assert matched.growth[0].rows["V"] == "0" and matched.scalars == {"tau": 32**0.5}
    copies = old.grow(rule="duplicate", hidden=24)
    assert copies.scalars == {"tau": 24**0.5} and "recomputed" in str(copies.growth[0])
    for new in (frozen, matched, copies):
        assert new.growth[0].exact and change(new, old) <= 1e-13
    rescaled = cem.derive(energy, dim=6, hidden=32, dtype=torch.float64)
    rescaled.load_state_dict(
        frozen.state_dict()
    )  # zeros, and the scale of the new size: the published change
    assert change(rescaled, old) > 0.3


# Where rows go


def test_pairs_of_a_rotation_keep_their_frequencies():
    rank = cem.dims("rank")
    half, interleaved, part = (
        energies.rotary_interaction_by(**options)
        for options in ({}, {"pairing": "interleaved"}, {"fraction": 1 / 2})
    )
    assert rows_of(half, rank, 4, 12).places == (0, 3, 6, 9)
    assert rows_of(interleaved, rank, 4, 8).places == (0, 1, 4, 5)
    assert rows_of(part, rank, 4, 8).places == (0, 2, 4, 5)
    for energy in (half, interleaved, part):
        old = cem.derive(energy, dim=6, heads=2, rank=4, dtype=torch.float64)
        assert change(old.grow(rank=8), old) <= 1e-13
    with pytest.raises(ValueError, match="type `rank=8, rule='frozen'`"):
        cem.derive(half, dim=6, heads=2, rank=4).grow(rank=6)


def test_axes_over_products_of_sizes():
    dim, heads, hidden = cem.dims("dim heads hidden")
    h, i, a, m = cem.state(dim), dim.index("i"), heads.index("a"), hidden.index("m")
    U, G = cem.parameter("U", heads * hidden, dim), cem.parameter("G", heads * hidden, dim)

    def energy(*where):
        slot, over = where
        gate = cem.silu(Sum(G[slot, i] * cem.frozen(h)[i], i))
        return cem.Energy(-Sum(gate * Sum(U[slot, i] * h[i], i) ** 2, *over) / 2, name="blocks")

    old = cem.derive(energy(hidden * a + m, (a, m)), dim=6, heads=2, hidden=3, dtype=torch.float64)
    new = old.grow(hidden=5, heads=3)
    assert torch.equal(new.U.view(3, 5, 6)[:2, :3], old.U.view(2, 3, 6))
    assert new.growth[1].exact and change(new, old) <= 1e-13
    flat = (heads * hidden).func(heads, hidden)
    one = cem.index("n", flat)
    with pytest.raises(ValueError, match="`hidden` is a factor of the axis .* in which order"):
        cem.derive(energy(one, (one,)), dim=6, heads=2, hidden=3).grow(hidden=4)


# Mistakes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "interaction",
            {"head": 3},
            "has no size `head`: got head=3; sizes that grow: heads, rank",
        ),
        ("interaction", {"dim": 16}, "cannot grow `dim`, which belongs to the width of the tokens"),
        ("interaction", {"seq": 16}, "cannot grow `seq`, which is the number of tokens"),
        ("diagonal_plus_low_rank", {"heads": 4}, "cannot grow `heads`, which belongs to the width"),
        ("interaction", {"heads": 1}, "grows and cannot shrink: got heads=1 where it is 2"),
        ("interaction", {"heads": 2.5}, "grows and cannot shrink: got heads=2.5 where it is 2"),
        ("interaction", {}, "grows in a named size: got none; type `layer.grow"),
        ("interaction", {"rule": "frozn", "heads": 3}, "`rule` is one of .*: got 'frozn'; type"),
        ("interaction", {"noise": -1.0, "heads": 3}, "`noise` is a share .*: got -1.0; type"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(name).grow(**options)


def test_the_same_size_is_no_growth():
    old = layer_of("interaction")
    new = old.grow(heads=2)
    assert new is not old and new.growth == () and change(new, old) == 0
