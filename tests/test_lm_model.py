"""The language model: what a configuration says is what is built, and a cache changes nothing."""

import copy
import json

import pytest
import torch

import cem

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache  # noqa: E402

from cem.hf import CEMConfig, CEMForCausalLM  # noqa: E402
from cem.lm.model import CACHE  # noqa: E402
from cem.lm.presets import SHAPES, preset  # noqa: E402
from cem.lowering import kernels  # noqa: E402

ATTENTION = {"energy": "rotary_interaction", "heads": 2, "rank": 6}


def model(block=None, seed=0, **options):
    torch.manual_seed(seed)
    block = [ATTENTION, {"energy": "gated_silu", "hidden": 10}] if block is None else block
    config = CEMConfig(
        vocab_size=31,
        hidden_size=12,
        num_hidden_layers=2,
        block=block,
        initializer_range=0.3,
        **options,
    )
    return CEMForCausalLM(config).double().eval()


def tokens(batch=2, length=11, seed=1):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_model_of_llamas_parts_is_llama():
    config = preset("llama-tiny", vocab_size=31, hidden_size=16, num_hidden_layers=2, head_dim=4)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    parts = [
        {"module": "attention", "heads": 4, "rank": 4},
        {"module": "mlp", "hidden": config.intermediate_size},
    ]
    ours = CEMForCausalLM(
        CEMConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, block=parts)
    )
    names = {
        "attention.norm": "input_layernorm",
        "mlp.norm": "post_attention_layernorm",
        "attention.module": "self_attn",
        "mlp.module": "mlp",
    }
    state = {}
    for name in ours.state_dict():
        its = name.replace("parts.", "")
        for here, there in names.items():
            its = its.replace(here, there)
        state[name] = llama.state_dict()[its]
    ours.load_state_dict(state)
    ids = tokens()
    assert torch.allclose(ours.eval()(ids).logits, llama(ids).logits, rtol=0, atol=1e-6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    one, other = (
        m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for m in (ours, llama)
    )
    assert torch.equal(one, other)


def test_an_energy_by_name_and_by_its_own_json_is_one_layer():
    described = json.loads(cem.energies.rotary_interaction.to_json())
    named, written = model([ATTENTION]), model([{**ATTENTION, "energy": described}])
    ids = tokens()
    assert torch.equal(named(ids).logits, written(ids).logits)
    assert "rotary_interaction" in named.model.layers[0].parts


PARTS = {
    "rotary": ATTENTION,
    "alibi": {"energy": "alibi_interaction", "heads": 2, "rank": 6},
    "buckets": {"energy": "relative_interaction", "heads": 2, "rank": 6, "buckets": 8},
    "window": {"energy": "sliding_window_interaction", "heads": 2, "rank": 6},
    "diagonal": {"energy": "diagonal_plus_low_rank", "heads": 2, "rank": 5},
    "grouped": {"energy": "grouped_interaction", "groups": 2, "per_group": 2, "rank": 3},
    "linear": {"energy": "gated_linear_attention", "heads": 2, "rank": 6},
    "squared": {"energy": "squared_interaction"},
    "recursion": {**ATTENTION, "steps": 3, "update": {"Momentum": {"step_size": 0.5}}},
    "preconditioned": {**ATTENTION, "preconditioner": {"DiagonalPlusLowRank": {"rank": 2}}},
    "llama": {"module": "attention", "heads": 2, "rank": 6},
}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_pieces_with_a_cache_equal_the_whole(part, kind):
    its = model([PARTS[part], {"energy": "gated_silu", "hidden": 10}])
    ids = tokens()
    whole = its(ids, use_cache=False).logits
    cache = (
        DynamicCache(config=its.config)
        if kind == "dynamic"
        else StaticCache(config=its.config, max_cache_len=16)
    )
    pieces = [
        its(ids[:, at : at + n], **{CACHE: cache}).logits for at, n in ((0, 5), (5, 1), (6, 5))
    ]
    assert torch.allclose(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_cache_of_tied_attention_is_one_tensor():
    its = model()
    cache = DynamicCache(config=its.config)
    its(tokens(), **{CACHE: cache})
    layer = cache.layers[0]
    assert layer.keys.shape == (2, 2, 11, 6)
    assert layer.values.numel() == 0


@torch.no_grad()
def test_documents_that_begin_anew_do_not_see_each_other():
    its = model()
    ids = tokens(1, 11)
    places = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed = its(ids, position_ids=places, use_cache=False).logits
    alone = torch.cat([its(ids[:, :4]).logits, its(ids[:, 4:]).logits], 1)
    assert torch.allclose(packed, alone, rtol=0, atol=1e-12)


def test_a_first_block_without_a_cache_leaves_padding_hidden():
    its = model(None, layers=[[{"energy": "gated_silu", "hidden": 10}], [ATTENTION]])
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(its.generate(ids, **options), its.generate(ids, use_cache=False, **options))


def test_the_future_does_not_reach_the_past():
    its, ids = model(), tokens()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 31
    assert torch.equal(its(ids).logits[:, :7], its(other).logits[:, :7])


def test_blocks_differ_where_the_configuration_says_so():
    layers = [[ATTENTION], [{**ATTENTION, "heads": 3}, {"energy": "plain_gelu", "hidden": 7}]]
    its = model(None, layers=layers)
    assert its.model.layers[1].parts["rotary_interaction"].Q.shape == (3, 6, 12)
    assert list(its.model.layers[1].parts) == ["rotary_interaction", "plain_gelu"]


def test_a_factor_on_the_start_multiplies_what_was_drawn():
    plain = model([ATTENTION])
    scaled = model([{**ATTENTION, "init": {"Q": 2.0}}])
    one, other = (m.model.layers[1].parts["rotary_interaction"] for m in (plain, scaled))
    assert torch.equal(2 * one.Q, other.Q)
    assert torch.equal(one.K, other.K)


def test_blocks_are_copies_of_what_the_configuration_says():
    config = CEMConfig(hidden_size=12, num_hidden_layers=2, block=[ATTENTION])
    first, second = config.blocks
    first[0]["heads"] = 7
    assert second == config.block == [ATTENTION] and ATTENTION["heads"] != 7


def test_a_value_at_the_start_fills_the_parameter():
    energy = {"loosely_tied_interaction_by": {"shares": "head", "fraction": 0.5}}
    its = model([{**ATTENTION, "rank": 8, "energy": energy, "init": {"w": {"value": 1.0}}}])
    layer = its.model.layers[1].parts["loosely_tied_interaction"]
    assert torch.equal(layer.w, torch.ones(2)) and layer.Q.std() > 0
    assert "kernels.turns(position, 10000.0, 4," in layer.code
    rotary = {"rotary_interaction_by": {"fraction": 0.5}}
    tied = model([{**ATTENTION, "rank": 8, "energy": rotary}])
    ids = torch.arange(9).unsqueeze(0)
    state = {n: p for n, p in its.state_dict().items() if not n.endswith(".w")}
    tied.load_state_dict({n.replace("loosely_tied", "rotary"): p for n, p in state.items()})
    torch.testing.assert_close(its(ids).logits, tied(ids).logits, rtol=0, atol=1e-5)


def test_a_family_takes_the_activation_by_name():
    its = model([{"energy": {"gated_by": {"g": "softplus"}}, "hidden": 5}])
    assert list(its.model.layers[0].parts) == ["gated_softplus"]


@pytest.mark.parametrize("size", ["tiny", "25m"])
def test_a_preset_has_the_parameters_of_its_twin(size):
    def count(name):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset(name + size))
        return sum(parameter.numel() for parameter in model.parameters())

    shape = SHAPES[size]
    steps = 2 * shape.layers  # one a part, where Llama's norms have gains
    llama = count("llama-") - steps * shape.dim
    assert count("tied-") == llama + steps
    attention, mlp = 2 * shape.layers * shape.dim**2, shape.layers * shape.hidden * shape.dim
    assert count("half-") == llama + steps - attention - mlp
    assert count("") == pytest.approx(llama, rel=0.012)
    assert count("lean-") == pytest.approx(llama - attention, rel=0.012)


@torch.no_grad()
def test_a_partly_tied_model_begins_as_llama():
    """At w = 0 the partly tied layers are untied attention and a gated MLP with three matrices."""
    start = {"init": {"w": 0.0}}
    heads = {"energy": "partly_tied_interaction", "heads": 2, "rank": 4, "copies": 4}
    block = [heads | start, {"energy": "partly_tied_gated", "hidden": 24} | start]
    config = preset("tiny", vocab_size=31, hidden_size=32, num_hidden_layers=2, block=block)
    torch.manual_seed(0)
    ours = CEMForCausalLM(config).eval()
    sizes = {"intermediate_size": 24, "num_attention_heads": 2, "head_dim": 4}
    llama = LlamaForCausalLM(
        preset("llama-tiny", vocab_size=31, hidden_size=32, num_hidden_layers=2, **sizes)
    ).eval()
    llama.model.embed_tokens.weight.copy_(ours.model.embed_tokens.weight)
    for mine, its in zip(ours.model.layers, llama.model.layers, strict=True):
        attention, mlp = mine.parts["partly_tied_interaction"], mine.parts["partly_tied_gated"]
        for name, projection in (("Q", "q"), ("K", "k"), ("V", "v")):
            weight = getattr(its.self_attn, f"{projection}_proj").weight
            weight.copy_(getattr(attention, name).flatten(0, 1))
        its.self_attn.o_proj.weight.copy_(attention.W.flatten(0, 1).T)
        its.mlp.gate_proj.weight.copy_(mlp.G)
        its.mlp.up_proj.weight.copy_(mlp.U)
        its.mlp.down_proj.weight.copy_(mlp.D.T)
    ids = tokens()
    assert torch.allclose(ours(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)


WRONG = {
    "name": (
        {"energy": "rotary_interactoin"},
        "block 0, part 0: an energy .* type 'rotary_interaction'",
    ),
    "key": ({**ATTENTION, "head": 2}, "a key is one of .* got 'head'; type 'heads'"),
    "norm": ({**ATTENTION, "norm": "BatchNorm"}, "a part is one of .* got 'BatchNorm'"),
    "update": (
        {**ATTENTION, "update": {"GradientDescent": {"step": 1}}},
        "`GradientDescent` does not take",
    ),
    "two": ({**ATTENTION, "update": {"Momentum": {}, "Newton": {}}}, "one name with its arguments"),
    "size": ({"energy": "relative_interaction"}, "needs the size buckets"),
    "init": ({**ATTENTION, "init": {"W": 1.0}}, "a parameter in `init` .* got 'W'"),
    "value": ({**ATTENTION, "init": {"Q": {"values": 1}}}, "`init` of `Q` is a factor or a value"),
    "family": ({"energy": {"rotary_by": {}}}, "a family of energies is one of .*'rotary_inter"),
    "options": ({"energy": {"gated_by": 3}}, "`gated_by` takes its options by name: got 3"),
    "activation": ({"energy": {"gated_by": {"g": "exp"}}}, "an activation is one of .*got 'exp'"),
    "tie": (
        {"energy": {"loosely_tied_interaction_by": {"values": "w"}}},
        "`values` of .* is one of .*'keys', 'own'.*: got 'w'",
    ),
    "module": ({"module": "convolution"}, "a module is one of"),
    "llama": ({"module": "mlp", "heads": 2}, "a key is one of .* got 'heads'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_is_refused(case):
    part, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        model([part])


def test_a_block_that_looks_twice_is_refused():
    with pytest.raises(ValueError, match="2 parts with a context"):
        model([ATTENTION, copy.deepcopy(ATTENTION)])
    with pytest.raises(ValueError, match="put brackets around"):
        CEMConfig(block=ATTENTION)
    with pytest.raises(ValueError, match="a preset is one of"):
        preset("large")
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        model()()


def test_a_window_is_read_block_by_block(monkeypatch):
    """Where nothing says other positions, a window costs its width, not the length of the sequence."""
    asked, windowed = [], kernels.windowed_attention

    def noted(*arguments):
        asked.append(arguments[5])  # ordered
        return windowed(*arguments)

    its, ids = model([PARTS["window"]]), tokens()
    whole = its(ids, use_cache=False).logits
    monkeypatch.setattr(kernels, "windowed_attention", noted)
    assert torch.equal(its(ids, use_cache=False).logits, whole)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.allclose(
        its(ids, position_ids=places, use_cache=False).logits, whole, rtol=0, atol=1e-12
    )
    assert asked == 2 * [True] + 2 * [False]
