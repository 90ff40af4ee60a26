"""Write the table of the gallery, ``energies/README.md``, from what the package says.

python -m cem.energies
"""

import sys
from pathlib import Path

from sympy import Sum

import cem
from cem import energies
from cem.derivation import in_named_parts
from cem.language.document import Math

README = Path(__file__).with_name("README.md")

INTRODUCTION = """\
# The gallery of energies

One energy a file, with its formula, what is proved about it, and its source; `import cem.energies`.
This page is written by `python -m cem.energies`, and a test compares it with what the package says.

In the formulas a small letter is what the parameter of its name reads: q = Q h, k = K x, u = U h;
with a bar, h̄ is the frozen state, which a gate G and the signal of a code read. V is the visible
set, σ(z) the sigmoid and ∫f the antiderivative of f. *Descends* says up to which step size gradient
descent is proved to lower the energy at a fixed context, L being the largest eigenvalue of the
Hessian; where nothing is proved, small steps do. A kernel with `dense` in its name holds all pairs
of tokens at once.

"""

HEADER = ("energy", "E", "curvature", "descends", "kernels", "not fused")


def gallery() -> dict[cem.Energy, list[str]]:
    """Every energy with the names under which it can be typed, its own first."""
    found: dict[cem.Energy, list[str]] = {}
    for name in energies.__all__:
        energy = getattr(energies, name)
        if isinstance(energy, cem.Energy):
            found.setdefault(energy, []).append(name)
    return {e: sorted(names, key=lambda name: name != e.name) for e, names in found.items()}


def home(name: str) -> str:
    """The file that an energy is written in."""
    prefix = f"{energies.__name__}."
    files = [m.removeprefix(prefix) for m in sorted(sys.modules) if m.startswith(prefix)]
    if name not in files:
        (name,) = (file for file in files if name in vars(sys.modules[prefix + file]))
    return f"{name}.py"


def promise(energy: cem.Energy) -> str:
    """The step sizes that are proved to descend."""
    if energy.curvature == "concave":
        return "any step size"
    if energy.curvature == "convex":
        return "step size up to 2/L"
    i = energy.state.index("i")
    above = Sum(energy.state[i] ** 2, i) / 2
    # A concave function and a parabola of curvature 1, which every step up to 2 descends.
    if cem.Energy(energy.expression - above).curvature == "concave":
        return "step size up to 2"
    return "small steps"


def row(energy: cem.Energy, names: list[str]) -> tuple[str, ...]:
    """The cells of one energy."""
    layer = cem.derive(energy, **{str(size): 4 for size in energy.dims})
    return (
        f"[{' = '.join(names)}]({home(names[-1])})",
        f"`{Math.of(in_named_parts(energy)[1]).text}`",
        energy.curvature,
        promise(energy),
        ", ".join(layer.lowering.kernels),
        "; ".join(layer.lowering.reasons),
    )


def page() -> str:
    """The text of the page."""
    rows = [HEADER, ("---",) * len(HEADER), *(row(*entry) for entry in gallery().items())]
    return INTRODUCTION + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
