"""Language models with routed parts: described as data, trained, saved, and written with."""

import math

import pytest
import torch
from language_models import ATTENTION, MLP, config, model, tokens
from safetensors.torch import load_file, save_file
from transformers.loss.loss_utils import ForCausalLMLoss

import cem
from cem.hf import CEMForCausalLM, export
from cem.lm.sizing import places
from cem.testing import assert_close

CHOICE = {"capacity": 0.4, "bottleneck": 4}
BLOCK = [{**ATTENTION, "routed": CHOICE}, {**MLP, "routed": {**CHOICE, "tie": True}}]
BLOCKS = [BLOCK, [ATTENTION, MLP], [{**ATTENTION, "routed": {**CHOICE, "context": "selected"}}]]
TOGETHER = {"parts": [ATTENTION, MLP], "routed": {**CHOICE, "context": "selected"}}
PREDICTED = {"parts": [ATTENTION, MLP], "routed": {**CHOICE, "causal": "predictor"}}
WHOLE = [[TOGETHER], [PREDICTED]]
several = pytest.mark.parametrize("blocks", [BLOCKS, WHOLE], ids=["parts", "whole blocks"])


def test_a_part_is_routed_by_its_description():
    made = model(BLOCK)
    parts = made.model.layers[0].parts
    assert list(parts) == ["rotary_interaction", "gated_silu"]
    assert all(isinstance(part, cem.Routed) for part in parts.values())
    assert parts["gated_silu"].adapter.tie and parts["gated_silu"].router.causal == "threshold"
    ids = tokens()
    made(ids)
    assert 0 < parts["gated_silu"].choice.weight.count_nonzero() < ids.numel()
    full = model([{**part, "routed": {"capacity": 1.0}} for part in (ATTENTION, MLP)])
    dense = model([ATTENTION, MLP])
    names = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if (plain := name.replace(".layer.", ".")) in names:
                parameter.copy_(names.pop(plain))
    assert not names and torch.equal(full(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("blocks", [[TOGETHER], [PREDICTED]], ids=["threshold", "predictor"])
def test_parts_behind_one_router(blocks):
    made, ids = model(blocks), tokens()
    part = made.model.layers[0].parts["routed"]
    assert [layer.energy_function.name for layer in part.layer] == [
        "rotary_interaction",
        "gated_silu",
    ]
    assert part.router.causal == blocks[0]["routed"].get("causal", "threshold")
    made.train()(ids)
    assert part.choice.index.shape[1] < ids.shape[1]
    full = model([{**blocks[0], "routed": {**blocks[0]["routed"], "capacity": 1.0}}])
    dense = model([ATTENTION, MLP])
    with torch.no_grad():
        for block, plain in zip(full.model.layers, dense.model.layers, strict=True):
            stack = block.parts["routed"].layer
            stack.load_state_dict(
                torch.nn.Sequential(*plain.parts.values()).state_dict(), strict=True
            )
        full.model.embed_tokens.load_state_dict(dense.model.embed_tokens.state_dict())
    assert torch.equal(full(ids).logits, dense(ids).logits)


@several
def test_it_learns(blocks):
    torch.manual_seed(0)
    made = CEMForCausalLM(config(blocks, initializer_range=0.1))
    ids = torch.tensor([[5, 7, 11, 3, 2, 30, 9, 1] * 3]).expand(2, -1)
    optimizer = torch.optim.AdamW(made.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = made(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert made.eval()(ids, labels=ids).loss < 0.4 * losses[0]


def gradients(made, loss):
    found = torch.autograd.grad(loss, [*made.parameters()], retain_graph=True, allow_unused=True)
    return dict(zip(dict(made.named_parameters()), found, strict=True))


def test_the_loss_teaches_the_predictor_and_stays_what_it_is():
    made, ids = model([PREDICTED]).train(), tokens(4)
    routers = [block.parts["routed"].router for block in made.model.layers]
    out = made(ids, labels=ids)
    nats = ForCausalLMLoss(out.logits, ids, made.config.vocab_size)
    assert torch.equal(out.loss, nats)
    own = sum(router.loss for router in routers)
    plain, taught, alone = (gradients(made, each) for each in (nats, out.loss, own))
    for name, found in taught.items():
        if ".predictor." in name:
            assert plain[name] is None and found.abs().max() > 0
            assert_close(found, alone[name], 1e-7)  # through the loss, which is a float32
        else:
            assert torch.equal(found, plain[name])
    # The batches of a step together, of which each has half of the tokens.
    halves = [
        gradients(made, made(half, labels=half, num_items_in_batch=32).loss)
        for half in ids.split(2)
    ]
    for name, found in taught.items():
        assert_close(halves[0][name] + halves[1][name], found, 1e-6)
    made.eval()(ids, labels=ids).loss.backward()
    assert all(router.predictor.weight.grad is None for router in routers)


def test_the_predictor_learns_through_checkpoints():
    made, ids = model([PREDICTED]).train(), tokens()
    plain = gradients(made, made(ids, labels=ids).loss)
    new = hasattr(made, "activation_checkpointing_enable")
    enable = getattr(made, f"{'activation' if new else 'gradient'}_checkpointing_enable")
    enable({"use_reentrant": False})
    again = gradients(made, made(ids, labels=ids).loss)
    for name, found in plain.items():
        assert_close(again[name], found, 1e-12)
    enable({"use_reentrant": True})
    made.enable_input_require_grads()
    with pytest.raises(ValueError, match="does not learn in reentrant checkpoints: got one; type"):
        made(ids, labels=ids)


def test_padding_and_documents():
    made, ids = model(BLOCKS), tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = made(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    assert_close(found, made(ids).logits, 1e-12)


@several
def test_it_is_saved(blocks, tmp_path):
    made, ids = model(blocks), tokens()
    made.train()(ids)  # which tells a predictor the level of its weights
    made.eval()
    made.save_pretrained(tmp_path)
    again = CEMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in made.state_dict().items())
    assert_close(again(ids).logits, made(ids).logits, 1e-12)
    assert again.config.blocks == blocks
    with pytest.raises(ValueError, match="cannot be exported: a router stands before it; keep it"):
        export(made, tmp_path / "alone")


def test_a_file_without_routers_gets_new_ones(tmp_path):
    made = model([PREDICTED])
    made.save_pretrained(tmp_path)
    kept = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "router" not in n}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = CEMForCausalLM.from_pretrained(tmp_path)
    for block in again.model.layers:
        router = block.parts["routed"].router
        numbers = (router.threshold, router.level, router.calls, router.predictor.bias)
        assert [each.item() for each in numbers] == [-math.inf, math.inf, 0, 1]
        assert router.weight.std() > 0 and not router.predictor.weight.any()


def test_whole_blocks_grow_and_are_resized():
    made, ids = model(WHOLE), tokens()
    before = made(ids).logits
    cem.grow(made, hidden=32)
    assert_close(made(ids).logits, before, 1e-12)
    again = CEMForCausalLM(made.config)
    again.load_state_dict(made.state_dict())
    assert [parts[0]["parts"][1]["hidden"] for parts in made.config.blocks] == [32, 32]
    assert places(made.config, "hidden") == [f"layers.{n}.0.parts.1.hidden" for n in (0, 1)]


@pytest.mark.parametrize(
    ("routed", "match"),
    [
        (
            {"bottleneck": 4},
            "block 0, part 0: `routed` is a mapping with a share .* type `routed: ",
        ),
        ({**CHOICE, "rate": 1}, "`routed` has the keys .*: got 'rate'; leave it out"),
        ({**CHOICE, "capacity": 2}, "block 0, part 0: `capacity` is a share of the tokens"),
        ({**CHOICE, "context": "some"}, '`context` is "all" or "selected": got \'some\''),
        ({**CHOICE, "causal": "fixed"}, "one of .*'predictor'.*: got 'fixed'; type `causal: thr"),
    ],
)
def test_refusals(routed, match):
    with pytest.raises(ValueError, match=match):
        model([{**ATTENTION, "routed": routed}])


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"parts": []}, r"block 0, part 0: `parts` is a list of energies .*: got \[\]; type"),
        ({"parts": [BLOCK[0]]}, "`parts` is a list of energies without routers of their own"),
        ({"parts": [MLP]}, r"`parts` stand behind one router: got the keys \['parts'\]; type"),
        ({**TOGETHER, "steps": 2}, "`parts` stand behind one router: got the keys .*'steps'"),
        (
            {**TOGETHER, "parts": [{"energy": "gated_sil"}]},
            "block 0, part 0, part 0 of it: an energy is one of .*type 'gated_silu'",
        ),
        ({**TOGETHER, "routed": {}}, "block 0, part 0: `routed` is a mapping with a share"),
        ({**TOGETHER, "parts": [ATTENTION] * 2}, "2 parts with a context, routed and routed, but"),
    ],
)
def test_refusals_of_whole_blocks(part, match):
    with pytest.raises(ValueError, match=match):
        model([part])
