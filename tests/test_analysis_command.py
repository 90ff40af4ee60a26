"""``cem analyse``: what it prints, what it writes, what it says about mistakes."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cem import cli
from cem.lm.tokenizer import byte_tokenizer

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_hidden_layers=1,
    vocab_size=257,
)


def test_the_command(tmp_path, capsys, monkeypatch):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 40)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["cem", "analyse", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    code, said = run(tmp_path / "llama")
    assert code == 2 and "got no run.yaml in" in said.err and "type --text FILE" in said.err
    code, said = run(tmp_path)
    assert code == 2 and "got no config.json there" in said.err

    byte_tokenizer().save_pretrained(tmp_path / "llama")
    code, said = run(tmp_path / "llama", "--text", tmp_path / "none.txt")
    assert code == 2 and "got no such file" in said.err
    where = ("--out", tmp_path / "out", "--context", 16, "--sequences", 4)
    code, said = run(tmp_path / "llama", "--text", text, *where)
    assert code == 0 and "model.layers.0.self_attn" in said.out
    assert "energies of 64 tokens, half of them to fit with" in said.out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tokens"] == 64
    code, said = run(tmp_path / "llama", "--text", text, "--context", 5000)
    assert code == 2 and "the text is shorter than one window: got 321 tokens" in said.err
