"""Growth of whole models: layers in place, configurations, optimisers, and runs that begin with a grown model."""

import json
import random

import pytest
import torch
from torch import nn

import cem
from cem.energies import gated, gated_relu, interaction, plain_gelu


def stack(dtype=torch.float64):
    return nn.Sequential(
        cem.derive(interaction, dim=8, heads=2, rank=3, norm=nn.RMSNorm, dtype=dtype),
        cem.derive(gated, dim=8, hidden=6, dtype=dtype),
    )


def tokens(dtype=torch.float64):
    return torch.randn(2, 7, 8, dtype=dtype)


def trained(model, optimizer, h, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(h) - h.roll(1, -2)).square().mean().backward()
        optimizer.step()


def test_layers_grow_in_their_places():
    model, h = stack(), tokens()
    before, norm = model(h), model[0].norm.weight
    grown = cem.grow(model, heads=3, hidden=9)
    torch.testing.assert_close(model(h), before, rtol=1e-13, atol=1e-13)
    assert model[0].sizes["heads"] == 3 and model[1].sizes["hidden"] == 9
    assert model[0].norm.weight is norm  # what did not grow is the very parameter
    assert list(grown) == ["0", "1"] and "interaction: heads 2 -> 3, frozen, exact" in str(grown)


def test_only_those_that_are_asked_for():
    model = nn.Sequential(stack(), stack())
    cem.grow(model, where="1.*", hidden=9)
    cem.grow(model, where=lambda name, layer: name == "0.0", heads=4)
    assert [model[i][1].sizes["hidden"] for i in (0, 1)] == [6, 9]
    assert [model[i][0].sizes["heads"] for i in (0, 1)] == [4, 2]
    assert cem.grow(model, where="1.*", hidden=9) == {}


def test_a_layer_in_two_places_grows_once():
    one = cem.derive(gated, dim=8, hidden=6, dtype=torch.float64)
    model, h = nn.Sequential(one, nn.Tanh(), one), tokens()
    before = model(h)
    cem.grow(model, hidden=9)
    assert model[0] is model[2] and model[0].sizes["hidden"] == 9
    torch.testing.assert_close(model(h), before, rtol=1e-13, atol=1e-13)


def test_parameters_that_layers_share_stay_shared():
    model, h = (
        nn.Sequential(*(cem.derive(gated, dim=8, hidden=6) for _ in range(2))).double(),
        tokens(),
    )
    model[1].U = model[0].U
    before = model(h)
    cem.grow(model, hidden=9)
    assert model[1].U is model[0].U and model[0].U.shape == (9, 8)
    torch.testing.assert_close(model(h), before, rtol=1e-13, atol=1e-13)
    read = nn.Linear(8, 9, bias=False)
    read.weight = model[0].U
    model.append(nn.Sequential(read))
    with pytest.raises(ValueError, match="`2.0.weight` is shared with a layer that grows"):
        cem.grow(model, hidden=12)


def test_all_grow_or_none():
    model = nn.Sequential(
        cem.derive(gated, dim=8, hidden=6), cem.derive(gated_relu, dim=8, hidden=6)
    )
    first = model[0]
    with pytest.raises(ValueError, match="^1: layer `gated_relu` cannot grow .*dead point"):
        cem.grow(model, hidden=9)
    assert model[0] is first and first.sizes["hidden"] == 6


class Table(nn.Module):
    """A module of its own that grows."""

    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(2.0 * rows).view(rows, 2))

    def grow(self, *, rule, generator, rows):
        new = Table(rows)
        new.weight.data.zero_()[: len(self.weight)] = self.weight.data
        new.inner = self.inner
        return new


def test_a_module_with_a_growth_of_its_own():
    model = nn.ModuleDict({"table": Table(2)})
    model["table"].inner = Table(1)  # what is inside of a layer is its own affair
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model["table"].weight.sum().backward()
    optimizer.step()
    cem.grow(model, rows=3, optimizer=optimizer)
    held, inner = optimizer.param_groups[0]["params"]
    assert inner is model["table"].inner.weight and inner.shape == (1, 2)
    assert held is model["table"].weight and held.shape == (3, 2)
    assert optimizer.state[held]["momentum_buffer"].tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {}, "`grow` grows named sizes: got none; type `cem.grow"),
        ({"width": 9}, {}, "no layer has a size `width` to grow: .*dim, heads, hidden, rank"),
        ({"hidden": 9}, {"where": "2"}, "no layer at 2 has a size `hidden`"),
        ({"hidden": 9}, {"rule": "larger"}, "`rule` is one of frozen, .*: got 'larger'"),
        ({"hidden": 3}, {}, "1: layer `gated_silu` grows and cannot shrink"),
    ],
)
def test_mistakes(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        cem.grow(stack(), **options, **sizes)


def test_a_layer_itself_is_no_model():
    with pytest.raises(ValueError, match=r"got a layer itself; type `layer = layer.grow\(hidden=9"):
        cem.grow(stack()[1], hidden=9)


# Optimisers


def test_moments_of_new_rows_are_zero():
    model, h = stack(), tokens()
    optimizer = torch.optim.AdamW(
        [{"params": [p]} for p in model.parameters()], lr=1e-2, weight_decay=0.0
    )
    trained(model, optimizer, h)
    old = {n: (p, optimizer.state[p]) for n, p in model.named_parameters()}
    cem.grow(model, heads=3, hidden=9, optimizer=optimizer)
    held = [group["params"][0] for group in optimizer.param_groups]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert set(optimizer.state) == set(held)
    for name, p in model.named_parameters():
        before, state = old[name][1], optimizer.state[p]
        assert state["step"] == 3 and state["exp_avg"].shape == p.shape
        block = tuple(map(slice, old[name][0].shape))
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][block], before[key])
            assert state[key].sum() == before[key].sum()
    trained(model, optimizer, h, 1)


def test_moments_of_copies_are_those_of_their_gradients():
    """The moments after growth are those of a run whose gradients were the grown layer's all along."""
    model, h = stack(), tokens()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.0, 0.0), lr=0.0)  # remembers one step
    trained(model, optimizer, h, 1)
    cem.grow(model, where="1", rule="duplicate", hidden=15, optimizer=optimizer)
    carried = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    trained(model, optimizer, h, 1)
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            found, expected = carried[name][key], optimizer.state[p][key]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


def test_a_gain_gets_a_group_of_its_own():
    model, h = nn.Sequential(cem.derive(plain_gelu, dim=8, hidden=6, dtype=torch.float64)), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    trained(model, optimizer, h)
    before = model(h)
    cem.grow(model, rule="gain", hidden=9, optimizer=optimizer)
    torch.testing.assert_close(model(h), before, rtol=1e-13, atol=1e-13)
    first, second = optimizer.param_groups
    assert first["params"] == [model[0].U] and second["params"] == [model[0].hidden_gain]
    assert (second["lr"], second["weight_decay"]) == (1e-2, 0.0)
    trained(model, optimizer, h)
    assert (model[0].hidden_gain[6:] != 0).all()
    before = model(h)
    cem.grow(model, hidden=12, optimizer=optimizer)  # the gain is there now
    torch.testing.assert_close(model(h), before, rtol=1e-13, atol=1e-13)


def test_a_fresh_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    old = cem.warm_restart(optimizer, 10, warmup=0)
    for _ in range(10):
        optimizer.step()
        old.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    new = cem.warm_restart(optimizer, 100, warmup=0.1, lowest=0.1)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        new.step()
    assert rates[0] == 0 and rates[5] == pytest.approx(0.05) and max(rates) == rates[10] == 0.1
    assert rates[100] == pytest.approx(0.01) and rates[55] == pytest.approx(0.055)
    with pytest.raises(ValueError, match="warms up for a part of its steps: got warmup=5 of 5"):
        cem.warm_restart(optimizer, 5, warmup=5)


# Language models

pytest.importorskip("transformers")

import language_models  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import cem.lm  # noqa: E402
from benchmarks import growth  # noqa: E402
from cem.lm import pictures  # noqa: E402
from cem.lm.callbacks import read_records  # noqa: E402
from cem.lm.run import Run  # noqa: E402


@pytest.mark.parametrize("kind", ["tied", "parallel", "recursion"])
def test_a_language_model_keeps_its_configuration_in_step(kind, tmp_path):
    model, ids = language_models.model(kind), language_models.tokens()
    before = model(ids).logits
    cem.grow(model, heads=3, rank=16, hidden=30)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
    part = model.config.block[0]
    assert (part["heads"], part["rank"], part["beta"]) == (3, 16, 8**-0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, before, rtol=1e-12, atol=1e-12)
    if kind == "tied":
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


def test_blocks_that_grow_apart_are_described_one_by_one(tmp_path):
    model = language_models.model("tied")
    cem.grow(model, where="model.layers.1.*", hidden=30)
    blocks = model.config.blocks
    assert model.config.block is None and [b[1]["hidden"] for b in blocks] == [24, 30]
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.blocks == blocks


def test_a_layer_behind_a_router_grows():
    routed = language_models.MLP | {"routed": {"capacity": 0.5, "bottleneck": 4}}
    model, ids = language_models.model([routed]), language_models.tokens()
    before = model(ids).logits
    cem.grow(model, hidden=30)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
    assert model.config.block == [routed | {"hidden": 30}]


def test_an_energy_with_gains_is_written_into_the_configuration(tmp_path):
    model, ids = language_models.model("differing"), language_models.tokens()
    before, names = model(ids).logits, list(model.model.layers[0].parts)
    cem.grow(model, where="*.plain_gelu", rule="gain", hidden=24)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, before, rtol=1e-12, atol=1e-12)
    assert list(again.model.layers[0].parts) == names
    assert again.model.layers[0].parts["plain_gelu"].hidden_gain.shape == (24,)


# Runs

STEPS = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 6}
STEPS |= {"save_steps": 2, "disable_tqdm": True, "eval_on_start": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run, and what `data` it has."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for number in range(40):
        text = " ".join("".join(draw.choices("abcd", k=3)) for _ in range(9))
        (folder / f"{number}.txt").write_text(text)
    data = {"source": str(folder / "*.txt"), "cache": str(folder / "cache"), "held_out": 0.2}
    data |= {"tokenizer": "bytes", "context": 16}
    block = [
        {"energy": "rotary_interaction", "heads": 2, "rank": 8},
        {"energy": "gated", "hidden": 24},
    ]
    model = {"preset": "tiny", "hidden_size": 16, "num_hidden_layers": 1, "block": block}
    run = Run(model=model, data=data, trainer=STEPS | {"learning_rate": 0.02}, trace_steps=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", lambda out: None)
        yield folder / "small", run, cem.lm.train(run, folder / "small")


def grown_run(small, **said):
    folder, run, _ = small
    grow = {"from": str(folder), "hidden": 32, "heads": 3} | said
    return Run(model=run.model, data=run.data, trainer=run.trainer, trace_steps=0, grow=grow)


def held_out(out):
    return [x["held_out_loss"] for x in read_records(out / "metrics.jsonl") if "held_out_loss" in x]


def test_a_run_begins_where_the_smaller_one_ended(small, tmp_path):
    result = cem.lm.train(grown_run(small), tmp_path)
    assert abs(held_out(tmp_path)[0] - small[2].loss) <= 1e-5  # float32
    assert result.parameters > small[2].parameters and result.loss < small[2].loss
    told = (tmp_path / "growth.txt").read_text()
    assert "hidden 24 -> 32, frozen, exact" in told and "optimiser: the finished run's" in told
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.block[1]["hidden"] == 32 and saved.config.block[0]["heads"] == 3
    assert cem.lm.evaluate(tmp_path)["loss"] == pytest.approx(result.loss, rel=1e-6)
    assert Run.read(tmp_path / "run.yaml") == grown_run(small)


def test_an_interrupted_run_grows_once(small, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    from cem.lm.callbacks import Metrics

    run, on_log = grown_run(small, moments=False), Metrics.on_log
    straight = cem.lm.train(run, tmp_path / "straight")

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed
        on_log(self, args, state, control, **kwargs)

    monkeypatch.setattr(Metrics, "on_log", killed)
    with pytest.raises(Killed):
        cem.lm.train(run, tmp_path / "resumed")
    monkeypatch.setattr(Metrics, "on_log", on_log)
    assert cem.lm.train(run, tmp_path / "resumed").loss == straight.loss
    assert "optimiser: fresh" in (tmp_path / "resumed" / "growth.txt").read_text()


def test_the_option_of_the_command_line(small, tmp_path):
    from typer.testing import CliRunner

    from cem.cli import models  # noqa: F401 (its commands are then known)
    from cem.cli.app import app

    folder, out = str(small[0]), str(tmp_path / "out")
    changes = ["grow.hidden=40", "grow.rule=duplicate", "trainer.max_steps=1", "--out", out]
    done = CliRunner().invoke(app, ["train", "--grow", folder, *changes])
    assert done.exit_code == 0, done.output
    assert Run.read(tmp_path / "out" / "run.yaml").grow == {
        "from": folder,
        "hidden": 40,
        "rule": "duplicate",
    }
    assert abs(held_out(tmp_path / "out")[0] - small[2].loss) <= 1e-5


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        ({"hidden": 3}, "`grow` of a run names the finished run .*; type `grow.from=runs/tiny`"),
        ({"from": "a"}, "`grow` of a run needs a size that grows: .*; type `grow.hidden=704`"),
        ({"from": "a", "hidden": "b"}, "`grow.hidden` of a run is a size: got 'b'"),
        ({"from": "a", "hidden": 3, "rule": "b"}, "`grow.rule` of a run is one of .*: got 'b'"),
        ({"from": 3, "hidden": 3}, "`grow.from` of a run has the wrong kind: got 3"),
    ],
)
def test_mistakes_in_a_run(grow, message):
    with pytest.raises(ValueError, match=message):
        Run(grow=grow)


def test_there_is_nothing_to_grow(small, tmp_path):
    with pytest.raises(ValueError, match="there is no finished run in .*; type `cem train"):
        cem.lm.train(grown_run(small, **{"from": str(tmp_path)}), tmp_path / "out")
    run = grown_run(small)
    other = run.data | {"tokenizer": "bpe-300"}
    with pytest.raises(ValueError, match="has another tokenizer: got `data.tokenizer=bpe-300`"):
        cem.lm.train(Run(model=run.model, data=other, trainer=run.trainer, grow=run.grow), tmp_path)


def test_the_benchmark_says_what_its_run_found():
    found = json.loads((growth.RESULTS / "growth" / "run.json").read_text())
    stages = found["sides"]["grown"]
    assert found["jumps"] == growth.jumps(stages) and max(map(abs, found["jumps"])) <= found["bar"]
    tokens, work, losses = growth.curve(stages, "held_out_loss")
    assert (
        tokens[-1] == sum(stage["tokens"] for stage in stages) and losses[-1] == stages[-1]["loss"]
    )
    page = (growth.RESULTS.parent / "README.md").read_text()
    for stages in found["sides"].values():
        for stage in stages:
            assert f"{stage['loss']:.4f}" in page and f"{stage['parameters']:,}" in page
    assert all(f"{jump:+.1e}" in page for jump in found["jumps"])
