"""`cem train`, `eval`, `sample` and `export`."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers
from training_runs import tiny_run

import cem.lm

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``cem ARGUMENTS`` in this process: its exit code, and what it printed."""
    from cem import cli

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["cem", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, capsys.readouterr()

    return command


def test_the_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(tiny_run().to_yaml())
    code, said = command("train", "small.yaml", "trainer.max_steps=2", "trainer.disable_tqdm=false")
    assert code == 0 and "see runs/small" in said.out and "step 2/2: loss" in said.out
    assert "shards" not in said.err
    result = cem.lm.Result.read("runs/small")
    code, said = command("eval", "runs/small")
    assert code == 0 and f"held out {result.loss:.4f} nats a token" in said.out
    code, said = command("sample", "runs/small", "--prompt", "def ", "--tokens", 3)
    assert code == 0 and said.out.startswith("def ")
    code, said = command("sample", "runs/small", "--prompt", "def ", "--temperature", 0)
    assert code == 0 and said.out.startswith("def ")


def test_the_export_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 1}
    run = tiny_run(model=model, trainer={"max_steps": 1})
    cem.lm.train(run, "run")
    code, said = command("export", "run", "alone")
    assert code == 0 and said.out == "wrote alone\n" and said.err == ""
    assert "class LooselyTiedInteraction(nn.Module)" in Path("alone/modeling_cem.py").read_text(
        "utf-8"
    )
    assert Path("alone/tokenizer.json").is_file()


def test_the_commands_say_what_to_mend(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(tiny_run().to_yaml())
    transformers.LlamaConfig().save_pretrained("llama")
    for arguments, message in (
        (("train", "none.yaml"), "cem: there is no run none.yaml"),
        (("train", "small.yaml", "trainer.use_cache=true"), "packed documents see each other"),
        (("train", "small.yaml", "trainer.max_step=2"), "type `trainer.max_steps`"),
        (("eval", "none"), "cem: there is no trained model in none"),
        (("sample", "none"), "cem: there is no trained model in none"),
        (("export", "none", "alone"), "cem: there is no trained model in none"),
        (("export", "llama", "alone"), "cem: llama holds no model of energy layers: got a llama,"),
    ):
        code, said = command(*arguments)
        assert code == 2 and message in said.err and said.err.count("\n") == 1
