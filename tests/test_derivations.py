"""The worked derivations hold, and their layers are what the pages say: kernels, matrices, ties."""

import importlib
import inspect
import runpy
import sys
from pathlib import Path

import pytest
import sympy
import torch
from sympy import Sum

import cem
from cem import energies
from cem.derivations import checks

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "weight_tied_attention",
    "gated_mlp",
    "diagonal_plus_low_rank",
    "memory",
    "mixture_of_experts",
    "ista",
    "recursion",
    "preconditioned_step",
    "rotary_attention",
    "linear_attention",
    "energy_transformer",
    "token_parameters",
)
CONCRETE = {
    "dim": 3,
    "seq": 3,
    "heads": 2,
    "rank": 2,
    "copies": 2,
    "hidden": 4,
    "block": 2,
    "groups": 2,
    "per_group": 2,
    "experts": 2,
    "features": 2,
    "buckets": 32,
    "tokens": 2,
}
THEOREMS = ("certificate",)


def page(name):
    return importlib.import_module(f"cem.derivations.{name}")


def test_every_page_is_tested():
    files = {file.stem for file in (ROOT / "derivations").glob("*.py")}
    assert files == {*PAGES, *THEOREMS, "__init__", "checks"}


@pytest.mark.parametrize("name", (*PAGES, *THEOREMS))
def test_check(name):
    page(name).check()


@pytest.mark.parametrize(
    ("name", "printed"),
    [(name, "derivation()") for name in PAGES] + [(name, "__doc__.strip()") for name in THEOREMS],
)
def test_a_page_that_is_run_checks_and_prints_itself(name, printed):
    _, program = inspect.getsource(page(name)).split('if __name__ == "__main__":\n')
    assert program == f"    check()\n    print({printed})\n"


def test_a_page_runs_by_its_dotted_name(monkeypatch, capsys):
    module = page("gated_mlp")
    monkeypatch.delitem(sys.modules, module.__name__)
    runpy.run_module(module.__name__, run_name="__main__")
    torch.manual_seed(0)  # the certificate speaks of the parameters that were drawn after the check
    module.check()
    assert capsys.readouterr().out == f"{module.derivation()}\n"


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("soft_threshold", lambda z, eta: z, "proximal"),
        ("conjugate_gradients", lambda A, g, steps: -g, "downhill"),
    ],
)
def test_the_theorems_notice_a_wrong_step(name, wrong, said, monkeypatch):
    monkeypatch.setattr(page("certificate"), name, wrong)
    with pytest.raises(AssertionError, match=said):
        page("certificate").check()


@pytest.mark.parametrize("kind", ["curved", "norm"])
def test_the_theorems_notice_a_wrong_bound(kind, monkeypatch):
    instances = page("certificate").Instances
    right = getattr(instances, kind)

    def wrong(self):
        function, bound = right(self)
        return function, bound / 4

    monkeypatch.setattr(instances, kind, wrong)
    with pytest.raises(AssertionError):
        page("certificate").check()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_documented(name):
    module = page(name)
    for what in ("The energy.", "The adjoints.", "The gradient.", "The layer.", "Descent."):
        assert what in module.__doc__


@pytest.mark.parametrize("name", PAGES)
def test_derivation_is_of_this_energy(name):
    module = page(name)
    assert isinstance(module.derivation(), cem.Derivation)
    assert module.energy.name in str(module.derivation())


@pytest.mark.parametrize(
    ("name", "shapes", "kernels"),
    [
        ("weight_tied_attention", {"Q": (3, 5, 13), "K": (3, 5, 13)}, {"matmul", "sdpa"}),
        ("gated_mlp", {"U": (17, 13), "G": (17, 13)}, {"matmul"}),
        (
            "diagonal_plus_low_rank",
            {"Q": (3, 7, 15), "K": (3, 7, 15), "lam": (3, 5)},
            {"matmul", "sdpa"},
        ),
        ("memory", {"U": (17, 13)}, {"matmul"}),
        ("token_parameters", {"K": (17, 13)}, {"matmul"}),
        ("mixture_of_experts", {"U": (3, 7, 13), "G": (3, 7, 13)}, {"einsum", "matmul"}),
        ("ista", {"D": (5, 13), "A": (5, 13)}, {"matmul"}),
        (
            "recursion",
            {"Q": (3, 5, 13), "K": (3, 5, 13), "U": (7, 13), "G": (7, 13)},
            {"matmul", "sdpa"},
        ),
        (
            "preconditioned_step",
            {
                "Q": (3, 5, 13),
                "K": (3, 5, 13),
                "preconditioner.d": (13,),
                "preconditioner.V": (13, 4),
            },
            {"matmul", "sdpa"},
        ),
        (
            "linear_attention",
            {"Q": (3, 5, 13), "K": (3, 5, 13), "G": (3, 13), "bias": (3,)},
            {"linear_attention", "matmul"},
        ),
        ("rotary_attention", {"Q": (3, 6, 13), "K": (3, 6, 13)}, {"matmul", "sdpa"}),
        (
            "energy_transformer",
            {"Q": (3, 5, 13), "K": (3, 5, 13), "xi": (17, 13)},
            {"matmul", "sdpa", "transposed_sdpa"},
        ),
    ],
)
def test_parameters_and_kernels(name, shapes, kernels):
    """2 matrices for attention, 2 for a gated MLP, 1 for a memory or tokens; the others are tied."""
    layer = page(name).layer()
    assert {key: tuple(value.shape) for key, value in layer.named_parameters()} == shapes
    assert layer.lowering.kind == "fused"
    assert set(layer.lowering.kernels) == kernels


def test_the_pages_of_a_recursion_and_of_ista_compute_once_what_cannot_move():
    for refresh, once in (("layer", True), ("step", False)):
        lowering = page("recursion").layer(refresh=refresh).lowering
        prepared, repeated = map(inspect.getsource, (lowering.prepare, lowering.gradient))
        assert "F.linear(x" in prepared and "F.linear(x" not in repeated
        assert ("F.silu" in prepared, "F.silu" in repeated) == (once, not once)
    lowering = page("ista").layer(steps=3).lowering
    prepared, repeated = map(inspect.getsource, (lowering.prepare, lowering.gradient))
    assert "F.linear(frozen, A)" in prepared and "F.linear(frozen" not in repeated


def test_the_shrinkage_of_ista_is_a_minimum():
    v = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    h = page("ista").shrink(v, 0.5)
    assert torch.equal(h == 0, v.abs() <= 0.5)
    assert torch.equal((v - h)[h != 0], 0.5 * h.sign()[h != 0])


def test_attention_is_torch_attention_with_tied_matrices():
    """`nn.MultiheadAttention` with value = key and output = query transposed is the same layer."""
    layer = cem.derive(energies.interaction, dim=12, heads=3, rank=4, dtype=torch.float64)
    torch_layer = torch.nn.MultiheadAttention(
        12, 3, bias=False, batch_first=True, dtype=torch.float64
    )
    query, key = layer.Q.detach().flatten(0, 1), layer.K.detach().flatten(0, 1)  # (H R, D)
    torch_layer.load_state_dict(
        {"in_proj_weight": torch.cat([query, key, key]), "out_proj.weight": query.mT}
    )
    h = torch.randn(2, 7, 12, dtype=torch.float64)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    attended, _ = torch_layer(h, h, h, attn_mask=future, need_weights=False)
    torch.testing.assert_close(layer(h), h + attended, rtol=1e-12, atol=1e-12)


found = (getattr(energies, name) for name in energies.__all__)
GALLERY = dict.fromkeys(energy for energy in found if isinstance(energy, cem.Energy))


@pytest.mark.parametrize("energy", GALLERY, ids=lambda energy: energy.name)
def test_gradient_matches_sympy(energy):
    """Every energy of the gallery, not only those with a page."""
    known = {"seq", *map(str, energy.dims)}
    sizes = {size: value for size, value in CONCRETE.items() if size in known}
    checks.assert_gradient_matches_sympy(energy, **sizes)


class Wrong(cem.Energy):
    """An energy whose gradient misses a factor."""

    @property
    def gradient(self):
        return 2 * super().gradient


def test_the_checks_find_a_wrong_gradient():
    dim = cem.dims("dim")
    h, i = cem.state(dim), dim.index("i")
    right, wrong = cem.Energy(Sum(h[i] ** 2, i)), Wrong(Sum(h[i] ** 2, i), name="wrong")
    checks.assert_gradient_matches_sympy(right, dim=3)
    with pytest.raises(AssertionError, match="wrong: relative error 1.0e"):
        checks.assert_gradient_matches_sympy(wrong, dim=3)


def test_the_checks_find_a_wrong_layer():
    module = page("gated_mlp")
    h = torch.randn(7, 13, dtype=torch.float64)
    with pytest.raises(AssertionError, match="layer of gated_silu"):
        checks.assert_layer_matches(module.layer(), lambda h, U, G: h + h @ U.mT @ U, h)
    # The same values with a gate that training cannot see.
    with pytest.raises(AssertionError, match="for `G`|for `h`"):
        checks.assert_layer_matches(
            module.layer(), lambda h, U, G: module.closed_form(h, U=U, G=G.detach() + 0 * G), h
        )


@pytest.mark.parametrize("word", checks.ELEMENTARY)
def test_elementary_formulas(word):
    """The formulas that SymPy differentiates have the values of the words."""
    for point in (-2.25, -0.375, 0.5, 3.125):
        exact = checks.ELEMENTARY[word](sympy.Rational(point)).evalf(30)
        computed = word(torch.tensor(point, dtype=torch.float64))
        assert abs(float(exact) - float(computed)) <= 1e-13 * (1 + abs(float(computed)))
