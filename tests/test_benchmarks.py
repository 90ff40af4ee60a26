"""The benchmarks compute what they claim to time, and a run holds together on tiny sizes."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cold, counts, layers, measures, memory, report, space
from benchmarks.cases import (
    CASES,
    ROTARY,
    AutogradOfEnergy,
    backward,
    diagonal_layer,
    interaction_layer,
    largest_difference,
)
from benchmarks.handwritten import SpanAttention, TiedAttention
from benchmarks.settings import Settings
from benchmarks.timing import Pair, interleave

QUICK = replace(Settings().quick(), rounds=2, least_rounds=2)


@pytest.mark.parametrize("case", [*CASES, ROTARY], ids=lambda case: case.name)
@pytest.mark.parametrize("beta", [None, 0.7])
def test_hand_written_layers_equal_the_derived_ones(case, beta, device):
    """float64: the output, the gradient of the input and of every parameter."""
    settings = replace(Settings().quick(), device=str(device))
    if beta is not None and case.name != "gated":
        case = replace(case, derive=lambda asked, derive=case.derive: derive(asked, beta=beta))
    assert largest_difference(case, settings) < 1e-12


def test_autograd_of_all_tokens_equals_the_derived_layer(device):
    settings = replace(Settings().quick(), device=str(device))
    layer = CASES[0].derive(settings).to(device, torch.float64)
    other = AutogradOfEnergy(layer)
    h, weights = torch.randn(2, 2, 9, settings.dim, device=device, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(other(h), layer(h), rtol=1e-12, atol=1e-12)
    h.requires_grad_()
    pairs = zip(backward(other, h, weights), backward(layer, h, weights), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_wrong_twin_is_found():
    case = CASES[0]
    other = replace(case, write=lambda layer: type(case.write(layer))(layer.Q, layer.K, beta=0.3))
    assert largest_difference(other, Settings().quick()) > 1e-3


def test_a_run_in_process(tmp_path, capsys):
    settings = replace(QUICK, sections=("speed", "autograd", "trace"))
    run = layers.run(settings, command="python -m benchmarks.layers --quick")
    path = tmp_path / "run.json"
    report.save(run, path)
    rows = report.rows_of(json.loads(path.read_text("utf-8")))
    assert len(rows) == 2 * len(CASES) + 2 + 4 + 4
    assert all(row.value > 0 and row.met is None for row in rows)
    assert len(capsys.readouterr().err.splitlines()) == len(rows)
    table = report.text(rows)
    assert table.count("interaction / tied attention") == 2
    lengths = {line.index("bar") for line in table.splitlines() if line.startswith("what")}
    assert len(lengths) == 1


def test_the_tables_go_into_the_readme(tmp_path):
    row = report.Row("Speed", "one / other", 1.04, most=1.05, spread="1.0 to 1.1, n=3")
    missed = replace(row, what="late", value=51.23, unit="ms", most=50.0)
    run = report.as_dict([row, missed], QUICK, "python -m benchmarks.layers")
    report.save(run, tmp_path / "cpu.json")
    report.save(run, tmp_path / "cpu.md")
    target = tmp_path / "README.md"
    target.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "utf-8")
    for _ in range(2):
        assert report.readme(tmp_path, target) == 1
    text = target.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| one / other | 1.040x | <= 1.05x | met |" in text
    assert "| late | 51.2 ms | <= 50 ms | missed |" in text
    assert (tmp_path / "cpu.md").read_text("utf-8") in text


def test_ratios_of_a_pair():
    pair = Pair((1.0, 4.0, 2.0), (1.0, 2.0, 4.0), (1.0, 3.0, 1.0), (1.0, 1.0, 1.0))
    assert pair.ratios == (1.0, 2.0, 0.5)
    assert pair.median_ratio == 1.0 and pair.ratio_of_medians == 1.0 and pair.cpu_ratio == 1.0
    assert pair.quartiles == (0.75, 1.5)


def test_rounds_alternate():
    called = []
    settings = replace(QUICK, rounds=4, least_rounds=4)
    pair = interleave(lambda: called.append("A"), lambda: called.append("B"), settings)
    assert "".join(called[-8:]) == "ABBAABBA"
    assert len(pair.first) == len(pair.second) == 4


def test_peak_memory_counts_what_a_pass_allocates(device):
    """Scores alone, 2 x 2 x 512 x 512 floats, are 4 MiB that the closed form never holds."""
    settings = replace(QUICK, device=str(device))
    fused, autograd = (memory.peak_bytes(kind, 512, settings) for kind in ("fused", "autograd"))
    assert autograd > fused + 4 * 2**20


@pytest.mark.long
def test_a_peak_in_a_process_of_its_own():
    assert memory.fresh_peak("autograd", 256, QUICK) > 2**20  # its scores alone


@pytest.mark.parametrize(
    "direct, steps, seq, span",
    [(0, 1, 9, False), (0, 3, 7, False), (0, 3, 9, True), (16, 1, 9, False)],
)
def test_counts_are_those_of_torch(direct, steps, seq, span):
    """torch counts two operations a multiplication, and every pair of tokens, seen or not.

    With 2 x 9 tokens and not with 2 x 7, three steps pay for a Gram matrix of width 32.
    """
    make = diagonal_layer if direct else interaction_layer
    layer = make(QUICK, causal=False, **({} if direct else {"steps": steps}))
    h = torch.randn(QUICK.batch, seq, QUICK.dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward, counted = layer(h), counter.get_total_flops()
        forward.sum().backward()
    mine = counts.interaction(QUICK, seq, direct=direct, steps=steps, span=span)
    pairs = mine.attention * 2 * seq // (seq + 1)
    assert counted == 2 * (mine.projections + pairs)
    # Its backward pass keeps the weights, so that attention is four products and not five.
    assert counter.get_total_flops() == 2 * 3 * (mine.projections + pairs)


@pytest.mark.parametrize("kind", [TiedAttention, SpanAttention])
def test_steps_by_hand_equal_the_derived_ones(kind):
    layer = interaction_layer(QUICK, steps=3).double()
    written = kind(layer.Q, layer.K, layer.scalars["beta"], steps=3)
    h = torch.randn(2, 9, QUICK.dim, dtype=torch.float64)
    torch.testing.assert_close(layer(h), written(h), rtol=1e-12, atol=1e-12)


def test_a_cache_of_keys_and_values_by_hand():
    """With keys for values and queries for the output it is tied attention, token after token."""
    layer = interaction_layer(QUICK).double()
    written, cache = space.untied_twin(layer), layer.init_cache(2, 9)
    written.init_cache(2, 9)
    h = torch.randn(2, 9, QUICK.dim, dtype=torch.float64)
    whole = layer(h)
    with torch.no_grad():
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
            new = h[:, first:last]
            for one in (written(new), layer(new, cache=cache)):
                torch.testing.assert_close(one, whole[:, first:last], rtol=1e-12, atol=1e-12)
    assert 2 * cache.nbytes == written.keys.nbytes + written.values.nbytes


def test_a_bar_with_two_ends():
    row = report.Row("Speed", "one / other", 0.9, most=1.0, least=0.8)
    assert row.bar == "0.8 to 1x" and row.met
    assert replace(row, least=1.0).bar == "= 1x" and replace(row, least=1.0).met is False
    assert replace(row, value=0.7).met is False and replace(row, value=1.1).met is False


def test_the_points_of_the_design_space_run(tmp_path, capsys):
    settings = replace(QUICK, sections=("diagonal", "recursion", "decode"), seconds=0.1)
    run = layers.run(settings, sections=space.SECTIONS)
    rows = report.rows_of(json.loads(json.dumps(run)))
    assert len(rows) == 2 + 2 * 4 + 2
    assert rows[-1].value == 0.5
    assert all(row.value > 0 and row.met is None for row in rows)
    assert "counted" in rows[0].what


@pytest.fixture
def few_processes(monkeypatch):
    """Peaks are taken here, and what was asked of a process is not asked of a second one."""
    monkeypatch.setattr(cold, "fresh", functools.cache(cold.fresh))
    for module in (measures, space):
        monkeypatch.setattr(module, "fresh_peak", lambda *asked: max(1, memory.peak_bytes(*asked)))


@pytest.mark.slow
def test_every_section_of_the_design_space_runs(few_processes, tmp_path):
    run = space.main(["--quick", "--seconds", "0.1", "--out", str(tmp_path / "space.json")])
    assert run["command"].startswith("python -m benchmarks.space")
    assert all(row["value"] is not None for row in run["rows"])


def test_exponent():
    assert memory.exponent({16: 3.0 * 16**2, 32: 3.0 * 32**2, 64: 3.0 * 64**2}) == pytest.approx(2)


def test_cold_measurements_have_sizes_for_every_energy():
    import cem

    names = cold.gallery()
    assert "interaction" in names and len(set(names)) == len(names)
    for name in names:
        energy = getattr(cem.energies, name)
        cem.derive(energy, **cold.sizes_of(energy, QUICK))


@pytest.mark.slow
def test_every_section_runs(few_processes, tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "gallery", lambda: ["interaction"])
    out = [str(tmp_path / "run.json"), str(tmp_path / "run.md")]
    run = layers.main(["--quick", "--seconds", "0.1", "--out", *out])
    found = {row["section"] for row in run["rows"]}
    assert len(found) == 5
    assert run["settings"]["sections"] == ("speed", "autograd", "memory", "trace", "cold")
    assert (tmp_path / "run.md").read_text("utf-8").count("**") == 10


def test_threads_are_given_back():
    before = torch.get_num_threads()
    layers.run(replace(QUICK, sections=(), threads=2))
    assert torch.get_num_threads() == before
