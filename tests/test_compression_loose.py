"""Loosely tied energies are cut: every tie, whole models, plans, and models behind routers."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("transformers")

from sympy import Sum
from test_compression import DIM, TIGHT, states

import cem.hf
from cem.allocation import allocate
from cem.compression import Inputs, _heads, _value_rank, compress, compress_model, spectra
from cem.compression.fitting import fitted
from cem.compression.forms import FIELDS, read
from cem.compression.groups import with_values_apart
from cem.compression.truncation import cut, gains
from cem.energies import loosely_tied_interaction, loosely_tied_interaction_by

pytestmark = pytest.mark.usefixtures("double")
RANKS = (4, 2, 0)
USES = {
    ("queries", "keys"): "tied",
    ("queries", "own"): "values",
    ("own", "keys"): "outputs",
    ("own", "own"): "scores",
}
SHARES = (None, "head", "coordinate")
# Every choice occurs among these, and every pair of outputs and values; the long run has all of them.
SHORT = [
    ("queries", "keys", "head", True),
    ("queries", "own", None, False),
    ("queries", "own", "coordinate", True),
    ("own", "keys", "coordinate", False),
    ("own", "own", "head", True),
]
EVERY = list(product(("queries", "own"), ("keys", "own"), SHARES, (False, True)))
every = pytest.mark.parametrize(
    ("outputs", "values", "shares", "temperatures"),
    [pytest.param(*ties, marks=() if ties in SHORT else pytest.mark.long) for ties in EVERY],
)


def layer_of(energy=loosely_tied_interaction, **options):
    layer = cem.derive(energy, dim=DIM, heads=3, rank=4, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(1.0 if name == "w" else 0.0, 0.5)
    return layer


def weights(forms, seen):
    return forms.scores(seen).masked_fill(~seen.visible(), -torch.inf).softmax(-1)


def step(forms, h):
    """The step that the forms say: all forces, from all weights."""
    seen = Inputs(h)
    return h + forms.forces(weights(forms, seen), seen).sum(1)


def objective(forms, other, h):
    """What a fit descends, head by head: a mean divergence, and a relative error of the force where the rank writes."""
    seen = Inputs(h)
    p, q = (weights(one, seen) for one in (forms, other))
    lost = (p * (p / q).log()).nan_to_num().sum(-1).mean((0, 2, 3))
    if forms.uses == "scores":
        return lost
    u, v = forms.forces(p, seen), other.forces(q, seen)
    return lost + (u - v).square().sum((0, 2, 3)) / u.square().sum((0, 2, 3))


def zeroed(layer, after):
    """The layer with the rows of the cut in matrices of the old size."""
    made = copy.deepcopy(layer)
    with torch.no_grad():
        for name, field in FIELDS.items():
            if field in after.rows:
                own = getattr(made, name)
                own.copy_(after.rows[field].reshape(own.shape))
    return made


@every
def test_every_tie_is_cut_and_fitted(outputs, values, shares, temperatures):
    layer = layer_of(
        loosely_tied_interaction_by(
            outputs=outputs, values=values, shares=shares, temperatures=temperatures
        )
    )
    h, forms = states(4) / 3, read(layer)
    seen = Inputs(h)
    assert forms.uses == USES[outputs, values]
    same, _ = compress(layer, 4, h)
    torch.testing.assert_close(same(h), layer(h), rtol=0, atol=1e-12)
    small, done = compress(layer, RANKS, h, steps=15)
    torch.testing.assert_close(small(h), zeroed(layer, done.cut)(h), **TIGHT)
    if forms.uses != "scores":
        torch.testing.assert_close(step(forms, h), layer(h), rtol=0, atol=1e-12)
        torch.testing.assert_close(step(done.cut, h), small(h), **TIGHT)
        matrices = [p for p in small.parameters() if p.dim() == 3]
        assert {p.shape[1] for p in matrices} == {4, 2}, "a head of no rank does nothing"
    bare = cut(forms, RANKS, seen).padded(forms)
    after, before = (objective(forms, one, h) for one in (done.cut, bare))
    assert after[1] < 0.95 * before[1] and before[0] == after[0] == 0
    assert torch.equal(done.cut.k[0], forms.k[0]), "a head that keeps all stays as it is"
    assert done.calibrated.violations == done.bounds(3 * states(4)).violations == (0, 0, 0)
    heads = _heads("a", forms, seen, value_rank=_value_rank(layer))
    paid = heads.unit("parameters", 0) * 3 * 4
    given = ("Q", "K") if forms.uses == "scores" else ("Q", "K", "V", "W")
    assert paid == sum(p.numel() for n, p in layer.named_parameters() if n in given)
    assert heads.value_rank == (4 if forms.uses == "scores" else None)
    assert small.lowering.kind == "fused" and forms.scales.std() > 0 or not temperatures


def test_a_cut_layer_decodes_and_is_cut_again():
    layer, h = layer_of(), states(2)
    small, _ = compress(layer, RANKS, h)
    cache = small.init_cache(2, h.shape[1])
    parts = [small(h[:, :3], cache=cache), small(h[:, 3:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), small(h), **TIGHT)
    layer = layer_of(loosely_tied_interaction_by(values="own", outputs="own"))
    once, _ = compress(layer, 4, h)
    twice, done = compress(once, 2, h, together=True)
    assert (done.full, twice.Q.shape, twice.V.shape) == (4, (3, 2, DIM), (3, 4, DIM))
    torch.testing.assert_close(twice(h), zeroed(layer, done.cut)(h), **TIGHT)


def test_values_of_a_form_that_does_not_turn_change_their_basis_with_the_keys():
    """Singular vectors of the scores; what Q writes is the same in every basis."""
    dim, heads, rank = cem.dims("dim heads rank")
    h, x = cem.state(dim), cem.context(dim)
    Q, K, V = (cem.parameter(name, heads, rank, dim) for name in "QKV")
    i, a, r, s = dim.index("i"), heads.index("a"), rank.index("r"), x.index("s")

    def score(matrix, state):
        return Sum(Sum(Q[a, r, i] * state, i) * Sum(matrix[a, r, i] * x[s, i], i), r)

    c = cem.frozen(h)
    total = score(K, c[i]) + score(V, h[i] - c[i])
    layer, x = layer_of(cem.Energy(-Sum(cem.logsumexp(total, s), a), name="plain")), states(4) / 3
    forms, seen = read(layer), Inputs(x)
    assert forms.uses == "values" and forms.pairs is None
    whole = cut(forms, (4, 4, 4), seen).padded(forms)
    torch.testing.assert_close(step(whole, x), layer(x), rtol=0, atol=1e-9)
    small, done = compress(layer, RANKS, x, steps=5)
    torch.testing.assert_close(small(x), step(done.cut, x), **TIGHT)
    assert gains(forms, seen).shape == (3, 4) and done.calibrated.violations == (0, 0, 0)
    shared = replace(read(layer_of()), shares=torch.rand(3, 4, 1))
    assert set(fitted(shared, cut(shared, RANKS, seen), seen, 2).rows) >= {"values", "shares"}


@pytest.mark.parametrize("seen", [None, "data"])
def test_gains_are_of_scores_and_forces(seen):
    """A pair that scores nothing but writes has a gain, and so has one that scores and writes nothing."""
    layer = layer_of()
    with torch.no_grad():
        layer.K[:, [0, 2]] = 0.0
        layer.V[:, [1, 3]] = 0.0
    seen = seen and Inputs(states())
    table = gains(read(layer), seen)
    assert (table > 0).all() and table.shape == (3, 2)
    with torch.no_grad():
        layer.V[:, [0, 2]] = 0.0
    assert torch.equal(gains(read(layer), seen)[:, 1], torch.zeros(3))


def test_a_gain_is_what_the_weights_and_the_force_lose_to_leading_order():
    """Half the variance of the scores of a pair under the weights, and its share of the force, one pair at a time."""
    layer = layer_of(loosely_tied_interaction_by(values="own", shares="coordinate"))
    forms, seen = read(layer), Inputs(states(3))
    p, found = weights(forms, seen), []
    whole = forms.forces(p, seen).square().sum((0, 2, 3))
    for pair in forms.pairs:
        alone = torch.zeros(4).index_fill(0, pair, 1.0)[:, None]
        one = replace(forms, **{n: alone * rows for n, rows in forms.rows.items()})
        scores = one.scores(seen)
        spread = scores - (p * scores).sum(-1, keepdim=True)
        half = (p * spread.square()).sum(-1).mean((0, 2, 3)) / 2
        found.append(half + one.forces(p, seen).square().sum((0, 2, 3)) / whole)
    wanted = torch.stack(found, 1).sort(1, descending=True).values
    torch.testing.assert_close(gains(forms, seen), wanted, **TIGHT)


def test_what_cannot_be_cut_is_refused():
    half = layer_of(loosely_tied_interaction_by(values="own", fraction=1 / 2))
    with pytest.raises(ValueError, match="turns a part of its coordinates"):
        compress(half, 2)
    with pytest.raises(ValueError, match="no values and outputs of rank `rank` that do not meet"):
        with_values_apart(loosely_tied_interaction)


# -- whole models ----------------------------------------------------------------------------------------------

LEAN = {"energy": "loosely_tied_interaction", "heads": 2, "rank": 8}
APART = {"energy": {"loosely_tied_interaction_by": {"outputs": "own", "values": "own"}}}
MLP = {"energy": "gated_silu", "hidden": 8}
ROUTER = {"capacity": 0.5, "bottleneck": 4}
TOKENS = torch.randint(1, 29, (3, 12), generator=torch.Generator().manual_seed(1))


def model_of(*block):
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1}
    made = cem.hf.CEMForCausalLM(cem.hf.CEMConfig(**sizes, block=list(block), **special))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "step_size" not in name:
                parameter.normal_(0, 0.4)
    return made.eval()


@pytest.mark.parametrize(
    "block",
    [
        (LEAN, MLP),
        (LEAN | APART, MLP),
        pytest.param(({**LEAN, "routed": ROUTER}, MLP), marks=pytest.mark.slow),
        ({"parts": [LEAN, MLP], "routed": ROUTER},),
    ],
    ids=["values", "four matrices", "routed part", "routed parts"],
)
def test_a_cut_model_is_saved_loaded_and_writes(block, tmp_path):
    model = model_of(*block)
    layers = spectra(model, TOKENS)
    plan = allocate(0.4, layers, importances=[[1.0, 2.0]])
    before = sum(p.numel() for p in model.parameters())
    compress_model(model, plan, TOKENS, steps=3)
    assert plan.cost <= 0.4 * plan.full and len({*plan.ranks[0]}) == 2
    cut_away = plan.full - plan.cost
    assert before - sum(p.numel() for p in model.parameters()) == cut_away
    logits = model(TOKENS, use_cache=False).logits
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    cached, anew = (model.generate(TOKENS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)
    cem.hf.save_compressed(model, tmp_path)
    again = cem.hf.CEMForCausalLM.from_pretrained(tmp_path).double()
    torch.testing.assert_close(again(TOKENS, use_cache=False).logits, logits, rtol=0, atol=1e-12)


def test_a_part_of_the_same_energy_with_other_sizes_is_described_anew(tmp_path):
    """An energy whose scale is learned says nothing of its rank."""
    model = model_of({"energy": "interaction", "heads": 2, "rank": 8, "learn": "beta"}, MLP)
    compress_model(model, allocate(0.5, spectra(model), groups="layer", heads=(2, 2)))
    assert model.model.layers[0].parts["interaction"].Q.shape == (2, 4, 16)
    cem.hf.save_compressed(model, tmp_path)
    again = cem.hf.CEMForCausalLM.from_pretrained(tmp_path).double()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_plan_is_trained_with_values_and_outputs_that_keep_their_rank():
    """What the plan says it costs is what the model has, of one rank or of several."""
    several, one = {"importances": [[1.0, 3.0]]}, {"groups": "layer", "heads": (2, 2)}
    for part, counted, options in (
        (LEAN, "QKV", several),
        (LEAN | APART, "QK", several),
        (LEAN | APART, "QK", one),
    ):
        model = model_of(part, MLP)
        plan = allocate(0.5, spectra(model), **options)
        layer = cem.lm.layers.derived(plan.apply(model.config).blocks[0][0], 16, 1e-6)
        named = {n: p for n, p in layer.named_parameters() if n[0] in "QKVW"}
        cost = sum(p.numel() for n, p in named.items() if n[0] in counted)
        assert cost == plan.cost <= 0.5 * plan.full
        assert {p.shape[1] for n, p in named.items() if n[0] not in counted} <= {8}
    with pytest.raises(ValueError, match="layer: energy `loosely_tied_interaction` has no values"):
        cem.lm.layers.derived(LEAN | {"value_rank": 4}, 16, 1e-6)
