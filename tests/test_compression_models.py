"""Whole models: what their heads need, cut in place, saved and loaded, trained from a plan, and the command."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import cem.hf
from cem.allocation import Heads, LayerPlan, Plan, allocate, uniform
from cem.compression import (
    LowRankAttention,
    attentions,
    compress_model,
    power_law,
    saturation,
    spectra,
)
from cem.lm.layers import derived
from cem.lm.run import Run

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 29
BLOCK = [
    {"energy": "rotary_interaction", "heads": 2, "rank": 8},
    {"energy": "gated_silu", "hidden": 8},
]


def model_of(kind):
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "llama":  # two heads with two queries each, with biases
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, attention_bias=True, **special,
        )  # fmt: skip
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, **special
        )
    else:
        config = cem.hf.CEMConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, block=BLOCK, **special
        )
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "step_size" not in name:
                parameter.normal_(0, 0.4)
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2", "cem"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    torch.manual_seed(0)
    return model_of(kind)


TOKENS = torch.randint(1, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


def test_the_model_at_full_rank_is_the_model(model):
    whole = copy.deepcopy(model)
    done = compress_model(whole, uniform(1.0, spectra(model, TOKENS)), TOKENS)
    wanted, found = (one(TOKENS, use_cache=False).logits for one in (model, whole))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert all(one.calibrated.violations == (0, 0, 0) for one in done.values())
    assert len(done) == 2


def test_a_cut_model_is_the_model_with_zeros_and_is_saved_and_loaded(model, kind, tmp_path):
    """Different ranks from layer to layer and head to head, a head of rank 0; with a cache as without."""
    small = copy.deepcopy(model)
    layers = spectra(model, TOKENS)
    plan = allocate(0.4, layers, weights=[3.0, 1.0])
    rows = ((6, 2), (4, 0))
    named = [
        LayerPlan(la.name, la.dim, la.full_rank, row, la.queries, la.uses)
        for la, row in zip(plan.layers, rows, strict=True)
    ]
    plan = Plan(tuple(named), plan.kind, plan.budget, plan.cost, plan.full)
    done = compress_model(small, plan, TOKENS)
    logits = small(TOKENS, use_cache=False).logits
    zeroed = copy.deepcopy(model)
    for name, one in done.items():
        module = zeroed.get_submodule(name)
        if kind == "cem":
            with torch.no_grad():
                module.Q.copy_(one.cut.q[:, 0])
                module.K.copy_(one.cut.k)
        else:
            planes = None if one.cut.pairs is None else [range(4)] * 2
            wide = LowRankAttention.like(module, [8, 8], planes).fill(one.cut.q, one.cut.k)
            zeroed.set_submodule(name, wide)
        assert one.parameters[1] < one.parameters[0]
    torch.testing.assert_close(logits, zeroed(TOKENS, use_cache=False).logits, rtol=0, atol=1e-10)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    cached, anew = (small.generate(TOKENS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)
    cem.hf.save_compressed(small, tmp_path)
    again = cem.hf.load_compressed(tmp_path).double()
    torch.testing.assert_close(again(TOKENS, use_cache=False).logits, logits, rtol=0, atol=1e-10)
    if kind == "cem":  # the configuration says it all
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double()
        torch.testing.assert_close(
            again(TOKENS, use_cache=False).logits, logits, rtol=0, atol=1e-10
        )


def test_a_plan_for_other_layers_is_refused(model):
    plan = uniform(0.5, [Heads("elsewhere", 16, 2, 8)])
    with pytest.raises(ValueError, match="the plan is for the layers elsewhere: got a model with"):
        compress_model(model, plan)


def test_attention_with_a_norm_of_queries_is_refused():
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    with pytest.raises(ValueError, match="`Qwen3Attention` is not attention as in Llama or GPT-2"):
        spectra(model)
    with pytest.raises(ValueError, match="`Linear` has no attention"):
        attentions(torch.nn.Linear(2, 2))


# -- plans of configurations -----------------------------------------------------------------------------------


def plan_of(rows, dim=16, full=8, uses="tied"):
    layers = tuple(LayerPlan(f"{n}", dim, full, row, uses=uses) for n, row in enumerate(rows))
    return Plan(layers, "rank", 99, 99, 99)


def test_a_plan_gives_each_block_its_heads_and_ranks():
    config = cem.hf.CEMConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, block=BLOCK)
    planned = plan_of([(8, 8), (8, 2), (0, 0)]).apply(config)
    attention, mlp = BLOCK
    assert planned.blocks[0] == [attention, mlp]
    groups = [{"heads": 1, "rank": 8}, {"heads": 1, "rank": 2}]
    assert planned.blocks[1] == [{"energy": "rotary_interaction", "head_groups": groups}, mlp]
    assert planned.blocks[2] == [mlp]
    assert config.layers is None, "the configuration is left as it is"
    model = transformers.AutoModelForCausalLM.from_config(planned)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "interaction" in name}
    prefix = "model.layers.1.parts.rotary_interaction."
    assert shapes[f"{prefix}Q_0"] == (1, 8, 16) and shapes[f"{prefix}K_1"] == (1, 2, 16)
    again = cem.hf.CEMConfig.from_dict(planned.to_dict())
    assert again.blocks == planned.blocks


def test_values_shrink_with_the_plan_where_it_says_so():
    part = {
        "energy": "partly_tied_interaction",
        "heads": 2,
        "rank": 8,
        "copies": 4,
        "init": {"w": 0.0},
    }
    config = cem.hf.CEMConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, block=[part])
    for uses, copies in (("scores", 4), ("all", 1)):
        made = plan_of([(8, 2)], uses=uses).apply(config).blocks[0][0]
        assert [one["copies"] for one in made["head_groups"]] == [4, copies]
    layer = derived(made, 16, 1e-6)
    assert not layer.w_0.any() and not layer.w_1.any(), "`init` speaks of all groups"
    assert layer.scalars == {"beta_0": 8**-0.5, "beta_1": 2**-0.5}


def test_a_plan_counts_keys_where_queries_share_them():
    part = {"energy": "grouped_interaction", "groups": 2, "per_group": 3, "rank": 8}
    config = cem.hf.CEMConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, block=[part])
    made = plan_of([(8, 2)]).apply(config)
    layer = derived(made.blocks[0][0], 16, 1e-6)
    assert layer.Q_1.shape == (1, 3, 2, 16) and layer.K_0.shape == (1, 8, 16)
    assert plan_of([(4, 4)]).apply(config).blocks[0] == [part | {"rank": 4}]


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        ({"block": BLOCK}, [(8, 8)], "one layer a block: got 1 layers and 2 blocks"),
        ({"block": BLOCK}, [(8,), (8,)], "block 0 has 2 heads of rank 8: got a plan for 1 of 8"),
        ({"block": BLOCK[1:]}, [(8, 8)] * 2, "block 0 needs one part that says its `heads`"),
    ],
)
def test_plans_that_do_not_fit_are_refused(config, rows, message):
    config = cem.hf.CEMConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, **config)
    with pytest.raises(ValueError, match=message):
        plan_of(rows).apply(config)
    with pytest.raises(ValueError, match="configuration of energy layers: got LlamaConfig"):
        plan_of(rows).apply(transformers.LlamaConfig())


def test_groups_that_are_no_groups_are_refused():
    for groups, message in (([], "`head_groups` is a list of the sizes"), (3, "got 3; type")):
        with pytest.raises(ValueError, match=message):
            derived({"energy": "interaction", "head_groups": groups}, 16, 1e-6)
    with pytest.raises(ValueError, match="has no matrices Q"):
        derived({"energy": "gated_silu", "head_groups": [{"heads": 1}, {"heads": 2}]}, 16, 1e-6)
    with pytest.raises(
        ValueError, match="`plan` of a run is the path of a plan, and not beside `grow`: got 3"
    ):
        Run(plan=3)


@pytest.mark.slow
def test_the_command_makes_a_plan_and_a_run_trains_it(tmp_path):
    """Train, allocate with --save, train a new model from the plan: a few steps on a few words."""
    draw, text = random.Random(0), tmp_path / "text"
    text.mkdir()
    for n in range(20):
        words = " ".join(draw.choice(("one", "two", "three", "four")) for _ in range(30))
        (text / f"{n}.txt").write_text(words)
    said = {
        "model": {"preset": "tied-tiny", "hidden_size": 16, "num_hidden_layers": 2, "block": BLOCK},
        "data": {"source": str(text), "tokenizer": "bytes", "context": 16, "cache": str(tmp_path)},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no"},
        "trace_steps": 0,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(said))
    code = (
        "from cem.cli import main; import sys\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv[1:] = line.split()\n"
        "    try: main()\n"
        "    except SystemExit as stop:\n"
        "        if stop.code: raise\n"
    )
    processes = (  # the second has not trained: it loads the model as its own first act
        ["train run.yaml --out run"],
        [
            "allocate run --budget 0.5 --windows 4 --out found --save",
            "train run.yaml plan=found/plan.yaml --out planned",
        ],
    )
    for lines in processes:
        done = subprocess.run(
            [sys.executable, "-c", code, *lines], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    plan = Plan.read(tmp_path / "found" / "plan.yaml")
    assert plan.cost <= plan.budget and f"{plan.cost:,} of {plan.full:,} parameters" in done.stdout
    assert "0 spectral, 0 range, 0 pinsker" in done.stdout and "left of the heads: " in done.stdout
    for picture in ("plan.png", "gains.png"):
        assert (tmp_path / "found" / picture).read_bytes()[:4] == b"\x89PNG"
    planned = json.loads((tmp_path / "planned" / "config.json").read_text())
    kept = [row for row in plan.ranks if any(row)]
    assert len([parts for parts in planned["layers"] if len(parts) == 2]) == len(kept)
    small = cem.hf.load_compressed(tmp_path / "found" / "model")
    assert sum(p.numel() for p in small.parameters()) < 16 * (257 + 400)


def test_weights_saturate_singly_and_not_in_sum():
    """The largest change of a weight falls with the length, the total variation does not; both fall with the rank."""
    found = saturation(power_law(32, 1.0), (64, 1024), (1, 4, 16))
    for table in (found.tv, found.largest):
        assert all(row[1] > row[4] > row[16] for row in table.values())
    assert found.largest[1024][4] < 0.5 * found.largest[64][4]
    assert found.tv[1024][4] == pytest.approx(found.tv[64][4], rel=0.15)
    axes = found.plot()
    assert [len(ax.lines) for ax in axes] == [2, 2]
    with pytest.raises(ValueError, match="draws inputs without positions"):
        layer = cem.derive(cem.energies.rotary_interaction, dim=8, heads=1, rank=4)
        saturation(cem.compression.forms.read(layer), (4,), (2,))
