"""No promise of a certificate is broken in random trials, and the trials notice what is wrong."""

import math

import pytest
from descents import Trials

import cem
from cem import certificate as module
from cem.calculus import smoothness
from cem.certificate import certify


def attack(seeds, trials, certify=certify):
    """Run what is promised: (number of trials, the excess of each promise that was finite)."""
    found, count = [], 0
    for seed in seeds:
        draws = Trials(seed)
        energy = draws.energy()
        for _ in range(trials):
            trial = draws.trial(energy)
            count += 1
            if certify(trial.layer).holds:
                found.append(trial.excess())
    return count, [excess for excess in found if not math.isnan(excess)]


def test_no_promise_is_broken():
    """Also not in the trials that find a lie below."""
    seeds = {*range(25), *(seed for _, seed in LIES.values())}
    count, found = attack(sorted(seeds), 5)
    assert count == 5 * len(seeds) and len(found) > 50
    assert max(found) <= 1


@pytest.mark.long
def test_no_promise_is_broken_in_many_trials():
    count, found = attack(range(10_000, 12_100), 5)
    print(f"{count} trials, {len(found)} promises kept or broken, the worst ratio {max(found):.3g}")
    assert count >= 10_000
    assert max(found) <= 1


LIES = {}


def lie(seed):
    """A way to be wrong: it changes what the certificates are made of. ``seed`` is the first that notices."""

    def said(patch):
        LIES[patch.__name__] = patch, seed
        return patch

    return said


@lie(3)
def twice_the_bound(patch):
    """4 / L instead of 2 / L."""
    right = cem.GradientDescent.promise
    patch.setattr(
        cem.GradientDescent,
        "promise",
        lambda self, smoothness, **rest: right(self, smoothness / 2, **rest),
    )


@lie(119)
def three_percent_more(patch):
    right = cem.GradientDescent.promise
    patch.setattr(
        cem.GradientDescent,
        "promise",
        lambda self, smoothness, **rest: right(self, smoothness / 1.03, **rest),
    )


@lie(13)
def a_gain_is_monotone(patch):
    patch.setattr(module, "_norm", lambda norm: (1.0, ""))


@lie(13)
def a_norm_stretches_nothing(patch):
    right = module._norm
    patch.setattr(module, "_norm", lambda norm: (right(norm)[0] and 1.0, ""))


@lie(3)
def a_diagonal_is_scalar(patch):
    patch.setattr(cem.Diagonal, "scalar", True)


@lie(5)
def the_preconditioner_does_not_count(patch):
    patch.setattr(cem.AbstractPreconditioner, "largest_eigenvalue", lambda self: 1.0)


@lie(5)
def the_sign_of_a_step_does_not_count(patch):
    right = cem.GradientDescent.promise
    patch.setattr(
        cem.GradientDescent,
        "promise",
        lambda self, *given, **rest: right(self, *given, **rest)._replace(holds=True),
    )


@lie(3)
def everything_is_concave(patch):
    patch.setattr(module, "smoothness", lambda *given: smoothness.Smoothness(0.0, ()))


@lie(6)
def gates_are_positive(patch):
    patch.setattr(smoothness, "_bounds", lambda factor: (0.0, math.inf))


@pytest.mark.parametrize("name", LIES)
def test_the_attack_finds_a_lie(name, monkeypatch):
    patch, seed = LIES[name]
    patch(monkeypatch)
    _, found = attack([seed], 5)
    assert max(found, default=0) > 10, f"nobody noticed that {name.replace('_', ' ')}"
