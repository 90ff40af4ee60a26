"""Text and names from elsewhere are refused; none of them is ever evaluated."""

import json

import pytest
from sympy import Sum

import cem
from cem import energies


def test_an_energy_of_a_string_is_refused_not_evaluated():
    with pytest.raises(TypeError, match="`Energy` takes a SymPy expression: got str"):
        cem.Energy("__import__('os')")
    with pytest.raises(TypeError):
        "2" * energies.memory


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "1/0"])
def test_text_is_refused_and_never_evaluated(text):
    dim = cem.dims("dim")
    h, i = cem.state(dim), dim.index("i")
    for attempt in (
        lambda: cem.scalar("beta", default=text),
        lambda: cem.parameter("W", text),
        lambda: cem.logsumexp(text, i),
        lambda: h[text],
    ):
        with pytest.raises(TypeError, match="got .* of type str; type it without quotes"):
            attempt()


@pytest.mark.parametrize("name", ["W): raise SystemExit #", "W\nimport os", "lambda", "", "W W"])
def test_a_name_that_is_none_never_reaches_a_program(name):
    dim = cem.dims("dim")
    h, i, W = cem.state(dim), dim.index("i"), cem.parameter("W", dim)
    good = cem.Energy(Sum(W[i] * h[i] ** 2, i), name="e")
    with pytest.raises(ValueError, match="must be a name"):
        cem.Energy.from_json(good.to_json().replace('"W"', json.dumps(name)))
    bad = cem.parameter(name, dim) if name else None
    if bad is not None:
        with pytest.raises(ValueError, match="is not a Python name"):
            cem.Energy(Sum(bad[i] * h[i] ** 2, i), name="e")
