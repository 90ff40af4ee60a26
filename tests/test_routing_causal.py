"""Routing without looking ahead: no leak from the future, and decoding equal to the whole sequence.

Legend: B batch, T tokens, D dim.
"""

import pytest
import torch
from torch import nn

import cem
from cem import energies
from cem.testing import assert_close

F64 = torch.float64
B, T, D = 2, 13, 12
CUTS = [(1,) * T, (5, 1, 1, 6), (T,)]


def layer(kind):
    def attention(energy):
        return cem.derive(energy, dim=D, heads=2, rank=4, norm=nn.RMSNorm, dtype=F64)

    mlp = cem.derive(energies.gated_silu, dim=D, hidden=9, norm=nn.RMSNorm, dtype=F64)
    rotary = attention(energies.rotary_interaction)
    found = {
        "interaction": lambda: attention(energies.interaction),
        "rotary": lambda: rotary,
        "window": lambda: attention(energies.sliding_window_interaction_by(3)),
        "linear": lambda: attention(energies.squared_interaction),
        "mlp": lambda: mlp,
        "stack": lambda: nn.Sequential(rotary, mlp, attention(energies.interaction)),
    }
    return found[kind]()


KINDS = ("interaction", "rotary", "window", "linear", "mlp", "stack")


def made(kind, causal="threshold", context="all", share=0.4):
    adapter = cem.Adapter(D, 3)
    nn.init.normal_(adapter.up)
    model = cem.Routed(layer(kind), share, adapter, causal=causal, context=context, eps=0.3).to(F64)
    if causal == "fixed":
        model.calibrate(states(4, 50))
    if causal == "predictor":
        nn.init.normal_(model.router.predictor.weight)
        nn.init.zeros_(model.router.predictor.bias)
        model(states(4, 50))
    return model.eval()


def states(batch=B, count=T):
    return torch.randn(batch, count, D, dtype=F64)


def decoded(model, h, cuts, **inputs):
    cache, out, start = model.init_cache(len(h), 16), [], 0
    for count in cuts:
        own = {name: z[:, : start + count] for name, z in inputs.items()}
        out.append(model(h[:, start : start + count], cache=cache, **own))
        start += count
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("context", ["all", "selected"])
@pytest.mark.parametrize("causal", ["threshold", "fixed", "predictor"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_future_changes_no_bit_of_the_past(kind, causal, context):
    """The choice, its weights, and the states, whose derivative is exactly zero.

    Where another number of later tokens is chosen, products of matrices of another shape round otherwise.
    """
    model, h = made(kind, causal, context), states()
    out, before = model(h), places(model)
    for scale in (0.3, 1.0, 3.0):
        other = torch.cat([h[:, :8], scale * states()[:, 8:]], 1)
        assert_close(model(other)[:, :8], out[:, :8], 1e-14)
        assert torch.equal(places(model)[:, :8], before[:, :8])
    if causal != "predictor":
        model.scored, model.router.scores = "callable", lambda h: h[..., 0]
        model.norm.weight.data[0] = 0
        out = model(h)
        other = torch.cat([h[:, :8], states()[:, 8:]], 1)
        other[..., 0] = h[..., 0]
        assert torch.equal(model(other)[:, :8], out[:, :8])
        assert not torch.equal(model(other), out)
    h.requires_grad_()
    (slope,) = torch.autograd.grad(model(h)[:, :8].square().sum(), h)
    assert (slope[:, 8:] == 0).all() and (slope[:, :8] != 0).all()


def places(model):
    """The weight of every token in the last choice, -1 where it was not chosen."""
    index, weight, present = model.choice
    if index is None:
        return weight
    weight = weight if present is None else weight.masked_fill(~present, -1)
    return torch.full((B, T), -1.0, dtype=F64).scatter_(1, index, weight)


@pytest.mark.parametrize("context", ["all", "selected"])
@pytest.mark.parametrize("causal", ["threshold", "fixed", "predictor"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_the_whole_sequence(kind, causal, context):
    model, h = made(kind, causal, context), states()
    ragged = context == "selected" and kind in ("window", "linear")
    if ragged:
        with pytest.raises(ValueError, match="do not share a ring or a sum .* got batch=2; decode"):
            model.init_cache(2, 16)
    h = h[:1] if ragged else h
    for cuts in CUTS:
        found, cache = decoded(model, h, cuts)
        assert_close(found, model(h), 1e-12)
        assert cache.length == T
    assert 0 < model.choice.weight.count_nonzero() < h.shape[:2].numel()


def test_what_a_cache_holds():
    """Keys of all tokens, or of the chosen alone."""
    h = states(1)
    for context in ("all", "selected"):
        model = made("rotary", "threshold", context)
        _, cache = decoded(model, h, CUTS[0])
        model(h)
        chosen = T if model.choice.index is None else model.choice.index.shape[1]
        assert cache.layers[0].length == (T if context == "all" else chosen)
    assert "RoutedCache(length=13, max_seq=16, nbytes=" in repr(cache)
    assert cache.nbytes == cache.layers[0].nbytes + 16 * 8


@pytest.mark.parametrize("context", ["all", "selected"])
@pytest.mark.parametrize("causal", ["threshold", "fixed"])
def test_decoding_beside_padding(causal, context):
    model, h = made("stack", causal, context), states()
    visible = torch.arange(T) >= torch.tensor([[0], [4]])
    found, _ = decoded(model, h, (6, 1, 1, 1, 4), visible=visible)
    whole = model(h, visible=visible)
    assert_close(found[0], whole[0], 1e-12)
    assert_close(found[1, 4:], whole[1, 4:], 1e-12)


def test_beams_change_places():
    model, h = made("stack", context="selected"), states()
    _, cache = decoded(model, h[:, :9], (9,))
    cache.reorder(torch.tensor([1, 0]))
    found = model(h[:, 9:].flip(0), cache=cache)
    assert_close(found, model(h)[:, 9:].flip(0), 1e-12)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_share_that_is_chosen(share):
    model = made("mlp", share=share)
    model(states(8, 400))
    count = model.choice.weight.count_nonzero() / (8 * 400)
    assert share <= count < share + 0.03
    # A calibrated threshold chooses the share of what it was calibrated on, with the weights of its soft top-k.
    model = made("mlp", "fixed", share=share)
    h = states(8, 400)
    model.calibrate(h)
    model(h)
    assert model.choice.present.sum() == pytest.approx(share * 8 * 400, abs=1)
    s = nn.functional.rms_norm(h, (D,)) @ model.router.weight
    lam = cem.soft_top_k(s.flatten(), round(share * 8 * 400), 0.3).view_as(s)
    own = lam.gather(1, model.choice.index)[model.choice.present]
    assert_close(model.choice.weight[model.choice.present], own, 1e-9)


def test_a_fixed_threshold_may_choose_nobody():
    model, h = made("stack", "fixed"), states()
    model.router.threshold.fill_(1e9)
    light = h + model.adapter(model.norm(h))
    assert torch.equal(model(h), light)
    found, _ = decoded(model, h, CUTS[1])
    assert_close(found, light, 1e-14)


def test_the_predictor_learns_the_choice():
    """Its loss reaches the predictor alone, and falls to where most of its choices are those of the sequence."""
    torch.manual_seed(0)
    model = made("mlp", "predictor").train()
    h = states(6, 40)
    with torch.no_grad():
        model.router.predictor.weight.zero_()
    optimizer = torch.optim.Adam(model.router.predictor.parameters(), 0.1)
    losses = []
    for _ in range(60):
        model(h)
        names = dict(model.named_parameters())
        found = torch.autograd.grad(model.router.loss, names.values(), allow_unused=True)
        reached = [n for n, g in zip(names, found, strict=True) if g is not None]
        assert reached == ["router.predictor.weight", "router.predictor.bias"]
        for parameter, gradient in zip(names.values(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(model.router.loss.item())
    assert losses[-1] < losses[0] / 3
    scores = nn.functional.rms_norm(h, (D,)) @ model.router.weight
    best = torch.zeros(6, 40).scatter_(1, scores.topk(16).indices, 1.0).bool()
    model.eval()(h)
    chosen = torch.zeros(6, 40, dtype=torch.bool)
    chosen.scatter_(1, model.choice.index, model.choice.present)
    assert (chosen == best).double().mean() > 0.9
    assert (model.choice.weight <= 1).all() and model.router.level.isfinite()


def test_a_language_model_of_routed_blocks_learns_and_writes():
    torch.manual_seed(0)
    text = torch.tensor(list(b"the cat sat on the mat and the dog sat on the log. " * 8))
    width = 32

    def block(context):
        attention = cem.derive(
            energies.rotary_interaction, dim=width, heads=2, rank=8, norm=nn.RMSNorm
        )
        mlp = cem.derive(energies.gated_silu, dim=width, hidden=48, norm=nn.RMSNorm)
        adapter = cem.Adapter(width, 8)
        heavy = nn.Sequential(attention, mlp)
        return cem.Routed(heavy, 0.4, adapter, causal="threshold", context=context)

    embed, blocks = nn.Embedding(128, width), nn.ModuleList(map(block, ("all", "selected")))
    norm, head = nn.RMSNorm(width), nn.Linear(width, 128)
    everything = [p for part in (embed, blocks, norm, head) for p in part.parameters()]
    optimizer = torch.optim.AdamW(everything, 0.01)

    def scores(tokens, caches=(None, None)):
        h = embed(tokens)
        for one, cache in zip(blocks, caches, strict=True):
            h = one(h, cache=cache)
        return head(norm(h))

    losses = []
    for step in range(45):
        start = torch.arange(8) * 5 + step % 50
        batch = text[start[:, None] + torch.arange(33)]
        loss = nn.functional.cross_entropy(
            scores(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 1.5

    written, caches = text[None, :12], [one.init_cache(1, 64) for one in blocks]
    with torch.no_grad():
        new = written
        for _ in range(20):
            new = scores(new, caches)[:, -1:].argmax(-1)
            written = torch.cat([written, new], 1)
        again = scores(written[:, :-1]).argmax(-1)[:, 11:]
    assert torch.equal(again, written[:, 12:])


def test_refusals():
    model = made("stack")
    h = states()
    with pytest.raises(ValueError, match="holds 4 tokens: got 13 more after 0; type `routed.init"):
        model(h, cache=model.init_cache(B, 4))
    with pytest.raises(ValueError, match="takes its context from the cache: got `documents`"):
        model(h, cache=model.init_cache(B, 16), document_ids=torch.zeros(T, dtype=torch.long))
    with pytest.raises(
        ValueError, match="chooses from a whole sequence cannot be decoded: got causal=None"
    ):
        cem.Routed(layer("mlp"), 0.5).init_cache(B, 16)
    with pytest.raises(ValueError, match="a routed Linear may look at other tokens"):
        cem.Routed(nn.Linear(D, D), 0.5, dim=D, causal="fixed").init_cache(B, 16)
    energy = cem.Routed(layer("rotary"), 0.5, scores="energy", causal="threshold")
    with pytest.raises(ValueError, match="as scores need all tokens anew: call it without `cache`"):
        energy.init_cache(B, 16)
    learning = made("mlp", "predictor").train()
    with pytest.raises(ValueError, match="got `cache` in training; type `routed.eval"):
        learning(h, cache=learning.init_cache(B, 16))
