"""Sides of a sweep made equal in parameters or in operations."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from sweeps import SIDES
from training_runs import data

from cem.lm import Sweep, sizing
from cem.lm.presets import preset


@pytest.mark.parametrize("target", [1.0, 103.0, 459.0, 7000.0])
def test_the_nearest_size_is_the_nearest(target):
    for count in (lambda n: 100 + 7 * n, lambda n: n * n + 3.0, lambda n: 5.0 * n):
        best = sizing.nearest_size(count, 9, target)
        assert abs(count(best) - target) == min(abs(count(n) - target) for n in range(1, 1500))


def test_a_multiple_of_8_stays_one():
    assert sizing.nearest_size(lambda n: 7.0 * n, 16, 7.0 * 795) == 792
    assert sizing.nearest_size(lambda n: 7.0 * n, 16, 7.0 * 50) == 50, "48 is more than 1 % away"


@pytest.mark.parametrize("kind", ["parameters", "flops"])
def test_sides_are_made_equal(kind):
    sides = {"llama": {"model": "llama-tiny"}, "cem": {"model": "half-tiny"}}
    sweep = Sweep(base={"data": data()}, sides=sides, fixed=kind, scale="hidden")
    llama, cem = (sweep.run_of(trial) for trial in sweep.trials({}))
    assert llama.model == "llama-tiny" and cem.model["block"][1]["hidden"] != 352
    ratio = sizing.count(cem.model, data(), kind) / sizing.count(llama.model, data(), kind)
    assert ratio == pytest.approx(1, abs=0.01)


def test_sides_that_cannot_be_made_equal():
    sides = {"llama": {"model": "llama-tiny"}, "cem": {"model": "half-tiny"}}
    sweep = Sweep(base={"data": data()}, sides=sides, fixed="parameters")
    with pytest.raises(ValueError, match="side `cem`: a side does not have the .* times as many;"):
        sweep.run_of(sweep.trials({})[1])
    with pytest.raises(ValueError, match="side `cem`: no part of the model says a size `hedden`"):
        replace(sweep, scale="hedden").run_of(sweep.trials({})[1])
    with pytest.raises(ValueError, match="`num_hidden_layers` cannot make the .* equal within 1%"):
        replace(sweep, scale="num_hidden_layers").run_of(sweep.trials({})[1])


def test_equal_sides_stay_as_they_are():
    sweep = Sweep(base={"data": data()}, sides=SIDES, fixed="parameters")
    assert sweep.run_of(sweep.trials({})[1]).model == "tiny"


def test_where_a_size_stands():
    config = preset("tiny")
    assert sizing.places(config, "block.0.rank") == ["block.0.rank"]
    assert sizing.places(config, "nothing") == []
    config.layers = [config.block, config.block]
    assert sizing.places(config, "heads") == ["layers.0.0.heads", "layers.1.0.heads"]
    assert sizing.resized("tiny", config, "heads", 3)["layers"][1][0]["heads"] == 3
