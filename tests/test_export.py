"""An exported model: without cem it gives what it gave with it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cem

pytest.importorskip("transformers")

from transformers import DynamicCache, dynamic_module_utils  # noqa: E402

from cem.hf import CEMConfig, CEMForCausalLM, export  # noqa: E402
from cem.lm.export import export_saved  # noqa: E402
from cem.lm.model import CACHE  # noqa: E402

ROTARY = {"energy": "rotary_interaction", "heads": 2, "rank": 6}
GATED = {"energy": "gated_silu", "hidden": 10}
LOW_RANK = {"DiagonalPlusLowRank": {"rank": 2}}
GROUPED = {"energy": "grouped_interaction", "groups": 2, "per_group": 2, "rank": 3}
LINEAR = {"energy": "gated_linear_attention", "heads": 2, "rank": 6}


def descent(rule, **options):
    return {"steps": 2, "update": {rule: {"step_size": [0.5, 0.3], **options}}}


TWO = cem.energies.interaction.renamed(Q="A", K="B") + cem.energies.rotary_interaction
MODELS = {
    "two": [[{"energy": json.loads(TWO.to_json()), "heads": 2, "rank": 4, "name": "two"}]],
    "rotary": [[ROTARY, GATED]] * 2,
    "diagonal": [[{"energy": "diagonal_plus_low_rank", "heads": 2, "rank": 5}, GATED]],
    "steps": [
        [{**ROTARY, **descent("GradientDescent"), "preconditioner": LOW_RANK}],
        [{**GATED, **descent("Momentum", learn=True), "preconditioner": "Diagonal"}],
        [{**GATED, **descent("Nesterov"), "refresh": "step", "norm": "LayerNorm"}],
    ],
    "late": [[GATED], [ROTARY]],
    "grouped": [[GROUPED, {"energy": "two_sided_gated", "hidden": 10}]],
    "learned": [[{**ROTARY, "learn": ["beta"], "norm": {"RMSNorm": {"elementwise_affine": True}}}]],
    "different": [
        [ROTARY, {"energy": "plain_gelu", "hidden": 7, "norm": None}],
        [{**ROTARY, "heads": 3}],
        [{"energy": "parallel_block", "heads": 2, "rank": 5, "hidden": 8}],
    ],
    "positions": [
        [{"energy": "relative_interaction", "heads": 2, "rank": 3, "buckets": 8}],
        [{"energy": "alibi_interaction", "heads": 2, "rank": 6}],
        [{"energy": "sliding_window_interaction", "heads": 2, "rank": 6}],
    ],
    "energies": [
        [{"energy": "normalised_interaction"}, {"energy": "memory", "hidden": 7}],
        [{"energy": "sink_interaction"}, {"energy": "sparse_memory", "hidden": 7}],
        [{"energy": "subspace_compression"}],
        [{**ROTARY, "preconditioner": {"BlockDiagonal": {"blocks": 3}}}],
    ],
    "llama": [[{"module": "attention", "heads": 2, "rank": 6}, {"module": "mlp"}], [ROTARY]],
}


@pytest.fixture(autouse=True, scope="module")
def modules_in_a_folder_of_their_own(tmp_path_factory):
    """Where transformers copies the code of a folder before it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
        )
        patch.setattr(sys, "path", list(sys.path))
        patch.delitem(sys.modules, "transformers_modules", raising=False)
        yield


def model(layers, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 12, "initializer_range": 0.3}
    its = CEMForCausalLM(CEMConfig(**sizes, layers=layers, **options)).double().eval()
    with torch.no_grad():
        for parameter in its.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return its


def tokens():
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))


def exported(its, folder):
    """The exported class with its weights, whatever cem has told the Auto classes."""
    export(its, folder)
    load = dynamic_module_utils.get_class_from_dynamic_module
    kind = load("modeling_cem.CEMForCausalLM", str(folder))
    return kind.from_pretrained(folder).eval()


def assert_close(one, other):
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def assert_formatted(folder):
    """What ruff, where it is installed, would leave alone."""
    if ruff := shutil.which("ruff") or shutil.which("ruff", path=Path(sys.executable).parent):
        options = ["--isolated", "--line-length=100", folder]
        rules = ["--select=E,F,I,UP,B", "--ignore=E501"]
        for command in (["check", *rules], ["format", "--diff"]):
            done = subprocess.run([ruff, *command, *options], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_is_the_model(name, tmp_path):
    its = model(MODELS[name])
    other = exported(its, tmp_path / name)
    assert type(other).__module__.startswith("transformers_modules")
    assert set(other.state_dict()) == set(its.state_dict())
    assert_formatted(tmp_path / name)
    ids = tokens()
    with torch.no_grad():
        whole = its(ids).logits
        assert_close(other(ids).logits, whole)
        documents = torch.cat([torch.arange(4), torch.arange(5)])[None]
        found, wanted = (
            m(ids, position_ids=documents, use_cache=False).logits for m in (other, its)
        )
        assert_close(found, wanted)
        cache = DynamicCache(config=other.config)
        pieces = [other(ids[:, a:b], **{CACHE: cache}).logits for a, b in ((0, 4), (4, 5), (5, 9))]
        assert_close(torch.cat(pieces, 1), whole)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    for options in ({"num_beams": 3}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": padded, **options}
        assert torch.equal(other.generate(ids, **options), its.generate(ids, **options))


def test_an_exported_model_trains_alike(tmp_path):
    its = model(MODELS["steps"])
    other = exported(its, tmp_path / "trained")
    enable = "activation_checkpointing_enable"  # its name from transformers 5.24 on
    getattr(other, enable, other.gradient_checkpointing_enable)()
    ids = tokens()
    losses = [m.train()(ids, labels=ids).loss for m in (its, other)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in its.named_parameters():
        assert_close(gradients[name], parameter.grad)


ALONE = """
import sys
from pathlib import Path
sys.path = [p for p in sys.path if p and not (Path(p) / "cem").exists()]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
try:
    import cem
except ImportError:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import torch
    folder = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = AutoTokenizer.from_pretrained(folder)("abc", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=5, do_sample=False)
    torch.save((ids, model(ids).logits, made), Path(folder, "out.pt"))
"""


@pytest.mark.slow
def test_a_process_without_cem_loads_the_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({c: n for n, c in enumerate("?abcdef")}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    its = model(MODELS["rotary"])
    folder = export(
        its, tmp_path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")
    )
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", ALONE, folder], check=True, cwd=tmp_path, env=environment)
    ids, logits, made = torch.load(tmp_path / "out.pt")
    assert ids.tolist() == [[1, 2, 3]]
    with torch.no_grad():
        assert_close(logits, its(ids).logits)
    assert torch.equal(made, its.generate(ids, max_new_tokens=5, do_sample=False))


def test_cem_loads_the_folder_too(tmp_path):
    its = model(MODELS["different"])
    export(its, tmp_path / "one")
    again = CEMForCausalLM.from_pretrained(export_saved(tmp_path / "one", tmp_path / "other"))
    assert type(again) is CEMForCausalLM
    assert_close(again(tokens()).logits, its(tokens()).logits)


def test_equal_layers_share_a_class(tmp_path):
    folder = export(model(MODELS["rotary"] + MODELS["different"]), tmp_path)
    written = (folder / "modeling_cem.py").read_text()
    assert written.count("class RotaryInteraction") == 2
    assert written.count("class GatedSilu(") == 1
    assert "cem." not in written and "sympy" not in written


def untraceable(h, *, U):
    for _ in range(2 if h.sum() > 0 else 1):
        h = U @ h
    return h.square().sum()


WRONG = {
    "newton": ({**ROTARY, "update": "Newton"}, "its update rule is Newton"),
    "state": (LINEAR, "it keeps a state of linear attention"),
    "pairs": ({"energy": "soft_capped_interaction"}, "cannot be decoded token by token"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layer_that_cannot_be_written_is_refused(case, tmp_path):
    part, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        export(model([[part]]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_things_are_refused(tmp_path):
    its = model([[GATED]])
    its.model.layers[0].parts["gated_silu"] = cem.derive(
        cem.energy(h="dim", U="dim dim")(untraceable), dim=12
    )
    with pytest.raises(
        ValueError, match="block 0, part `gated_silu` cannot be exported: its program is"
    ):
        export(its, tmp_path)
    with pytest.raises(TypeError, match="takes a CEMForCausalLM: got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path)
