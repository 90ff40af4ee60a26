"""Routed layers: who moves, what they see, and that a dense layer is the case k = n.

Legend: B batch, T tokens, D dim.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cem
from benchmarks import layers
from benchmarks import routing as benchmark
from benchmarks.settings import Settings
from cem import energies
from cem.testing import assert_close

F64 = torch.float64
B, T, D = 2, 11, 12


def attention(causal=False, energy=energies.rotary_interaction, **options):
    return cem.derive(energy, dim=D, heads=2, rank=4, causal=causal, dtype=F64, **options)


def mlp(energy=energies.gated_silu, **options):
    return cem.derive(energy, dim=D, hidden=9, dtype=F64, **options)


def stack(causal=False):
    return nn.Sequential(attention(causal), mlp(), attention(causal, energies.interaction))


def routed(layer, capacity=0.4, *arguments, **options):
    return cem.Routed(layer, capacity, *arguments, **options).to(F64)


def states(batch=B, count=T):
    return torch.randn(batch, count, D, dtype=F64)


LAYERS = {"attention": attention, "mlp": mlp, "stack": stack}


@pytest.mark.parametrize("context", ["all", "selected"])
@pytest.mark.parametrize("causal", [None, "threshold", "fixed", "predictor"])
@pytest.mark.parametrize("name", LAYERS)
def test_at_full_capacity_it_is_the_layer(name, causal, context):
    """To the last bit, with an adapter at its start, for either weight; a fixed threshold and a predictor at theirs."""
    layer = LAYERS[name]() if causal is None or name == "mlp" else LAYERS[name](causal=True)
    h = states()
    for weight in ("soft", "straight_through"):
        for tie in (False, True):
            options = {"causal": causal, "context": context, "weight": weight}
            model = routed(layer, 1.0, cem.Adapter(D, 3, tie), **options)
            for training in (True, False):
                assert torch.equal(model.train(training)(h), layer(h))


@pytest.mark.parametrize("weight", ["soft", "straight_through"])
def test_the_chosen_take_the_step_of_the_dense_layer(weight):
    """k-to-all: the same conditional energies; the others take the adapter alone."""
    layer = attention(norm=nn.RMSNorm)
    model = routed(layer, 0.4, cem.Adapter(D, 3), weight=weight)
    nn.init.normal_(model.adapter.up)
    h = states()
    scores = nn.functional.rms_norm(h, (D,)) @ model.router.weight
    lam = cem.soft_top_k(scores, 5, 0.1)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(5).indices, 1.0)
    m = chosen * (lam if weight == "soft" else 1)
    dense = m[..., None] * (layer(h) - h)
    u = nn.functional.rms_norm(h, (D,))
    light = torch.relu(u @ model.adapter.down.T) @ model.adapter.up.T
    assert_close(model(h), h + light + dense, 1e-12)
    assert torch.equal(model.choice.index, chosen.bool().nonzero()[:, 1].view(B, 5))
    assert 0 < model.choice.weight.min() and model.choice.weight.max() <= 1


@pytest.mark.parametrize("name", ["attention", "stack"])
def test_the_selected_see_each_other(name):
    """k-to-k: the layer on the short sequence of the chosen, at their own positions."""
    layer = LAYERS[name]()
    model = routed(layer, 4, context="selected", weight="straight_through")
    h = states()
    out = model(h)
    index = model.choice.index
    for b in range(B):
        rows = h[b, index[b]][None]
        for stage in layer if name == "stack" else [layer]:
            placed = {"positions": index[b]} if stage.energy_function.has_positions else {}
            rows = stage(rows, **placed)
        assert_close(out[b, index[b]], rows[0], 1e-12)
        others = [t for t in range(T) if t not in index[b]]
        assert torch.equal(out[b, others], h[b, others])


def test_a_stack_is_routed_once():
    """k-to-all: each layer sees all tokens as they are by then, those that stay where they are too."""
    layer = stack()
    model = routed(layer, 4)
    h = states()
    out = model(h)
    index, m = model.choice.index, model.choice.weight
    moved = h
    for stage in layer:
        after = stage(moved)
        moved = moved.clone()
        for b in range(B):
            moved[b, index[b]] = after[b, index[b]]
    weight = torch.zeros(B, T, dtype=F64).scatter_(1, index, m)
    assert_close(out, h + weight[..., None] * (moved - h), 1e-12)


def test_gradients_reach_everything():
    torch.manual_seed(3)
    model = routed(stack(), 0.5, cem.Adapter(D, 3), eps=1.0)
    nn.init.normal_(model.adapter.up)
    h = states().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    slope = torch.randn(B, T, D, dtype=F64)
    found = torch.autograd.grad((model(h) * slope).sum(), (h, *parameters))
    assert all(gradient.abs().max() > 0 for gradient in found), names
    # The choice itself is not differentiated: it stays where the step is small.
    for tensor, gradient in zip((h, *parameters), found, strict=True):
        direction, step = torch.randn_like(tensor), 1e-6
        with torch.no_grad():
            tensor += step * direction
            up = (model(h) * slope).sum()
            tensor -= 2 * step * direction
            down = (model(h) * slope).sum()
            tensor += step * direction
        assert float((up - down) / (2 * step)) == pytest.approx(
            float((gradient * direction).sum()), rel=1e-6, abs=1e-7
        )


def test_straight_through_learns_by_the_weights():
    model = routed(mlp(), 0.5, weight="straight_through", eps=1.0)
    h = states()
    model(h).square().sum().backward()
    assert model.router.weight.grad.abs().max() > 0
    index = model.choice.index[..., None].expand(-1, -1, D)
    assert torch.equal(model(h).gather(1, index), model.layer(h.gather(1, index)))


def test_ordinary_modules():
    """A module from states to states, or a branch that is added."""
    branch = nn.Sequential(nn.Linear(D, 5), nn.GELU(), nn.Linear(5, D)).to(F64)
    h = states()
    added = routed(branch, 5, dim=D, branch=True, weight="straight_through")
    out, index = added(h), added.choice.index
    for b in range(B):
        assert_close(out[b, index[b]], (h + branch(h))[b, index[b]], 1e-12)
    replaced = routed(branch, 5, dim=D, weight="straight_through")
    replaced.router.load_state_dict(added.router.state_dict())
    assert_close(
        replaced(h).gather(1, index[..., None].expand(-1, -1, D))[0], branch(h)[0, index[0]], 1e-12
    )


@pytest.mark.parametrize("context", ["all", "selected"])
@pytest.mark.parametrize("causal", [None, "threshold"])
def test_padding_changes_nothing(causal, context):
    """A padded sequence beside a full one takes the steps that it takes alone."""
    model = routed(
        stack(causal is not None), 0.4, cem.Adapter(D, 3), context=context, causal=causal
    )
    nn.init.normal_(model.adapter.up)
    h = states()
    for visible in (
        torch.arange(T) < torch.tensor([[T], [6]]),
        torch.arange(T) >= torch.tensor([[0], [5]]),
    ):
        places = (visible.cumsum(1) - 1).clamp(min=0)
        out = model(h, visible=visible, positions=places)
        assert_close(out[0], model(h[:1])[0], 1e-12)
        assert_close(out[1, visible[1]], model(h[1:, visible[1]])[0], 1e-12)


@pytest.mark.parametrize("context", ["all", "selected"])
def test_documents_and_masks_of_pairs(context):
    layer = attention()
    model = routed(layer, 6, context=context, weight="straight_through")
    h, ids = states(), torch.tensor([0] * 4 + [1] * 7)
    pairs = ids[:, None] == ids
    out, index = model(h, document_ids=ids), model.choice.index
    assert_close(model(h, visible=pairs[None]), out, 1e-12)
    for b in range(B):
        for document in range(2):
            own = [int(i) for i in index[b] if ids[i] == document]
            seen = own if context == "selected" else [t for t in range(T) if ids[t] == document]
            if own:
                places = {"positions": torch.tensor(own), "context_positions": torch.tensor(seen)}
                alone = layer(h[b : b + 1, own], context=h[b : b + 1, seen], **places)
                assert_close(out[b, own], alone[0], 1e-12)


def test_another_context():
    layer, other = attention(), states(count=7)
    model = routed(layer, 4, weight="straight_through")
    h = states()
    out, index = model(h, context=other), model.choice.index
    dense = layer(h, context=other)
    for b in range(B):
        assert_close(out[b, index[b]], dense[b, index[b]], 1e-12)


def test_scores_of_ones_own_and_leading_axes():
    model = routed(mlp(), 3, scores=lambda h: h[..., 0], weight="straight_through")
    h = torch.randn(3, 2, T, D, dtype=F64)
    out = model(h)
    assert torch.equal(out.reshape(6, T, D), model(h.reshape(6, T, D)))
    best = h.reshape(6, T, D)[..., 0].topk(3).indices.sort().values
    assert torch.equal(model.choice.index, best)
    scorer = nn.Sequential(nn.Linear(D, 1), nn.Flatten(-2)).to(F64)
    model = routed(mlp(), 3, scores=scorer, eps=1.0)
    model(h).sum().backward()
    assert model.router.scores[0].weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"one number a token, \(2, 11\): got \(2, 11, 12\); did"):
        routed(mlp(), 3, scores=lambda h: h)(states())


def test_it_is_a_module():
    model = routed(stack(), 0.4, cem.Adapter(D, 3))
    h = states()
    out = model(h)
    assert torch.equal(copy.deepcopy(model)(h), out)
    other = routed(stack(), 0.4, cem.Adapter(D, 3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(h), out)
    assert "scores='learned'" in repr(model) and "capacity=0.4" in repr(model)
    traced = cem.trace(model, h)
    assert [len(layer.before[0, 0]) for layer in traced] == [5, 5, 5]
    low = cem.Routed(mlp(), 0.4, cem.Adapter(D, 3)).bfloat16()
    assert low(h.bfloat16()).dtype == torch.bfloat16


def test_autocast_and_compile():
    branch = nn.Linear(D, D)
    model = cem.Routed(branch, 0.4, cem.Adapter(D, 3), dim=D, branch=True, causal="threshold")
    h = torch.randn(B, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(h)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert_close(out, model(h), 2e-2)
    encoder = cem.Routed(cem.derive(energies.gated_silu, dim=D, hidden=9), 0.4, cem.Adapter(D, 3))
    with torch.no_grad():
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        assert_close(compiled(h), encoder(h), 1e-5)


def test_refusals():
    with pytest.raises(
        ValueError, match="is causal, and the best of a whole sequence .* type `causal="
    ):
        routed(attention(causal=True))
    with pytest.raises(ValueError, match="a share of the tokens, above 0 .*: got 1.5; type"):
        routed(mlp(), 1.5)
    with pytest.raises(ValueError, match="does not know how many tokens follow: got capacity=3"):
        routed(mlp(), 3, causal="fixed")
    for name, value in {
        "weight": "hard",
        "context": "none",
        "causal": "later",
        "scores": "mean",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` is .*: got '{value}'; type"):
            routed(mlp(), **{name: value})
    with pytest.raises(ValueError, match="`eps` is a positive temperature: got 0; type"):
        routed(mlp(), eps=0)
    with pytest.raises(ValueError, match="width of Linear is not known: got no `dim`; type"):
        routed(nn.Linear(D, D))
    with pytest.raises(ValueError, match="energies are the scores of one layer of energies: got"):
        routed(stack(), scores="energy")
    with pytest.raises(ValueError, match="got branch=True; type `branch=False`"):
        routed(mlp(), branch=True)
    with pytest.raises(ValueError, match="got weight='dense' and causal='threshold'; type"):
        routed(mlp(), weight="dense", causal="threshold")
    with pytest.raises(ValueError, match='moves its context, .* type `context="selected"`'):
        routed(attention(moving=True))
    with pytest.raises(ValueError, match="is causal, so it looks at its own tokens: got `context`"):
        routed(attention(causal=True), causal="threshold")(states(), context=states())
    with pytest.raises(ValueError, match="only a fixed threshold is calibrated: got causal=None"):
        routed(mlp()).calibrate(states())
    with pytest.raises(TypeError, match="takes a bool `visible`: got torch.float32; type"):
        routed(mlp())(states(), visible=torch.ones(T))
    with pytest.raises(ValueError, match="got `document_ids` and `context`; hide tokens of the"):
        ids = torch.zeros(T, dtype=torch.long)
        routed(attention())(states(), context=states(), document_ids=ids)
    with pytest.raises(ValueError, match=r"takes `positions` of shape \(2, 11\): got \(3,\)"):
        routed(attention())(states(), positions=torch.arange(3))


@pytest.mark.parametrize("context", ["selected", "all"])
def test_the_benchmark_counts_what_it_times(context):
    settings = replace(Settings().quick(), dim=24, hidden=40, rank=12, batch=1, seqs=(48,))
    h, counted = torch.randn(1, 48, 24), []
    for model in benchmark.stacks(settings, 3, context, None):
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            model(h)
        counted.append(counter.get_total_flops())
    said = benchmark.operations(settings, 48, 3, context)
    scores = 2 * 48 * 24  # the counter leaves out products with a vector
    assert counted[0] / (counted[1] + scores) == pytest.approx(said, rel=1e-12)


def test_the_benchmark_runs(capsys):
    sections = ("selected", "weights")
    settings = replace(Settings().quick(), rounds=2, least_rounds=2, sections=sections)
    found = layers.run(settings, sections=benchmark.SECTIONS)
    assert len(found["rows"]) == 6 + 4 == len(capsys.readouterr().err.splitlines())
