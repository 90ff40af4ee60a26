"""What a run says: files and changes, arguments, models, and how mistakes in them are told."""

import pytest

pytest.importorskip("transformers")

from training_runs import LLAMA

from cem.lm import training
from cem.lm.run import Run
from cem.lm.tokenizer import byte_tokenizer


def test_a_run_is_a_file_with_changes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: tiny\ntrainer:\n  learning_rate: 3e-4\n  max_steps: 5\ndata: {context: 8}\n"
    )
    changes = ["trainer.max_steps=20", "model.num_hidden_layers=3", "seed=4", "data.source=a=b"]
    run = Run.read(file, changes)
    assert run.trainer["learning_rate"] == 3e-4 and run.trainer["max_steps"] == 20
    assert run.model == {"preset": "tiny", "num_hidden_layers": 3}
    assert run.data == {"context": 8, "source": "a=b"} and run.seed == 4
    assert Run.from_yaml(run.to_yaml()) == run


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("off", "off"), ("true", True), ("False", False), ("3e-4", 3e-4), ("1.5", 1.5)]
    + [("2", 2), ("-1e3", -1000.0), (".5", 0.5), ("1.0e-2", 0.01), ("null", None), ("e4", "e4")],
)
def test_values_are_those_of_yaml_1_2(text, value):
    run = Run.from_yaml("", [f"model={{a: {text}}}"])
    assert run.model == {"a": value} and type(run.model["a"]) is type(value)
    assert Run.from_yaml(run.to_yaml()) == run


def test_the_defaults_are_those_of_pretraining(tmp_path):
    args = training.arguments(Run(), tmp_path)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.95, 0.1)
    assert args.max_grad_norm == 1.0 and args.lr_scheduler_type == "cosine"
    assert args.get_warmup_steps(1000) == 20 and args.optim == "adamw_torch_fused"
    assert args.data_seed == args.seed == 0


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("moodel: tiny", [], "a run has no `moodel`: got that name; type `model`"),
        ("trainer: {max_step: 3}", [], "no `trainer.max_step`: .*type `trainer.max_steps`"),
        ("data: {contxt: 3}", [], "no `data.contxt`: .*type `data.context`"),
        ("", ["trainer.learning_rat=1"], "type `trainer.learning_rate`"),
        ("zzzz: 1", [], "type one of model, data, trainer"),
        ("a: [", [], "a run is not YAML: got .*; type `name: value`"),
        ("- a", [], "a run is written `name: value`: got .*type `model: tiny`"),
        ("seed: 1", ["seed"], "a change of a run is written NAME=VALUE: got `seed`"),
        ("seed: 1", [".a=1"], "a change of a run is written NAME=VALUE: got `.a=1`"),
        ("seed: 1", ["seed.a=1"], "`seed` in `seed.a=1` holds one value: got 1; type `seed=VALUE`"),
        ("seed: 1", ["seed=["], "the value of `seed` is not YAML"),
        ("data: 3", [], "`data` of a run holds names and values: got 3"),
        ("model: 3", [], "`model` of a run is a preset or a configuration: got 3"),
        ("optimizer: sgd", [], "must be adamw or muon: got 'sgd'; .*`trainer.optim=NAME`"),
        ("groups: {'*.Q': {lr: 1}}", [], "`groups` of a run hold numbers .*learning_rate: 0.5"),
        ("groups: {'*.Q': {weight_decay: -1}}", [], "`groups` of a run hold numbers .*got '..Q'"),
        ("seed: x", [], "`seed` of a run must be an integer from 0: got 'x'; type `seed=1`"),
        ("threads: 0", [], "`threads` of a run must be an integer from 1: got 0"),
        ("trainer: {seed: 1}", [], "`trainer.seed` has another place: got 1; type `seed=0`"),
        ("trainer: {output_dir: a}", [], "`trainer.output_dir` has another place: .*`--out DIR`"),
    ],
)
def test_mistakes_in_a_run(text, changes, message):
    with pytest.raises(ValueError, match=message):
        Run.from_yaml(text, changes)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no run .*none.yaml"):
        Run.read(tmp_path / "none.yaml")


def test_a_value_that_the_trainer_refuses(tmp_path):
    run = Run(trainer={"lr_scheduler_type": "cosin"})
    with pytest.raises(ValueError, match="`trainer` of the run is refused: got cosin is not"):
        training.arguments(run, tmp_path)


# Which model it builds


def test_the_vocabulary_and_the_ends_are_the_tokenizers():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    for model in (LLAMA, {"preset": "llama-tiny", "num_hidden_layers": 1}, "tiny"):
        config = training.build(model, tokenizer).config
        assert config.vocab_size == len(tokenizer) == 257 and config.eos_token_id == end
    assert training.build({"preset": "tiny", "num_hidden_layers": 1}, tokenizer).config.blocks


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tine", "a preset is one of tiny, .*: got 'tine'; type 'tiny'"),
        ({"preset": "tiny", "hiden_size": 3}, "no `model.hiden_size`: .*type `model.hidden_size`"),
        ({"hidden_size": 3}, "needs a preset or a model_type: got .*; type `model.preset=tiny`"),
        ({"model_type": "llma"}, "a run has no `model_type llma`: .*`model_type llama`"),
        (LLAMA | {"hiden_size": 3}, "a run has no `model.hiden_size`: .*type `model.hidden_size`"),
        (LLAMA | {"vocab_size": 100}, "got 100 and 257; leave out `model.vocab_size`"),
    ],
)
def test_mistakes_in_a_model(model, message):
    with pytest.raises(ValueError, match=message):
        training.build(model, byte_tokenizer())
