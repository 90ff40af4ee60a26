"""The worked mathematics from an energy to its layer, as something a person reads.

Every formula is computed from the energy; the words follow from the shape of the formulas, never
from the name of an energy.
"""

from __future__ import annotations

from collections.abc import Iterator

from sympy import Add, Expr, Indexed

from .calculus.adjoints import adjoints
from .calculus.forms import known_forms, listed
from .calculus.gradient import output_index
from .language.canonical import canonical
from .language.definitions import Definition, Naming, with_own_letters
from .language.document import (
    Block,
    Code,
    Formula,
    Formulas,
    Math,
    Part,
    Step,
    Table,
    as_html,
    as_latex,
    as_text,
    paragraph,
)
from .language.entmax import Entmax
from .language.notation import latex
from .language.order import terms
from .language.symbols import Frozen, NamedArray, Scalar
from .language.words import WORDS

STAGES = {
    "parameters": "parameters only",
    "state": "moves with the state",
    "context": "context only, once per token",
    "frozen": "fixed at the input",
}

DESCENT = {
    "concave": "At a fixed context the energy is concave in the state, so a step of any size lowers"
    " it at least as much as its slope promises.",
    "affine": "At a fixed context the energy is affine in the state, so a step of any size lowers"
    " it exactly as much as its slope promises.",
    "convex": "At a fixed context the energy is convex in the state: a step lowers it as long as"
    " the step size is at most 2/L, with L the Lipschitz constant of the gradient"
    " in the norm of P.",
    "unknown": "The energy is not known to be convex or concave in the state: a small enough step"
    " lowers it, and what a larger one does is measured.",
}

UPHILL = (r"\frac{\partial E}{\partial h}", "∂E/∂h")
UPDATES = {
    "GradientDescent": (r"h^{+} = h - \eta P @", "h⁺ = h - η P @"),
    "Momentum": (
        r"m^{+} = \mu m - \eta P @,\; h^{+} = h + m^{+}",
        "m⁺ = μ m - η P @,  h⁺ = h + m⁺",
    ),
    "Nesterov": (
        r"m^{+} = \mu m - \eta P @(h + \mu m),\; h^{+} = h + m^{+}",
        "m⁺ = μ m - η P @(h + μ m),  h⁺ = h + m⁺",
    ),
    "Newton": (
        r"(|\nabla^{2} E| + \lambda I) \delta = @,\; h^{+} = h - \eta \delta",
        "(|∇²E| + λ I) δ = @,  h⁺ = h - η δ",
    ),
    "LineSearch": (r"h^{+} = h - a P @", "h⁺ = h - a P @"),
    "Proximal": (r"h^{+} = \operatorname{prox}\left(h - \eta P @\right)", "h⁺ = prox(h - η P @)"),
}


def in_named_parts(energy, *others: Expr) -> tuple[Naming, Expr]:
    """The names of what an energy, its gradient and other expressions are made of, and the energy in terms of them."""
    normal = canonical(energy.expression)
    naming = Naming([normal, energy.gradient, *others])
    return naming, naming.rewrite(normal)


class Derivation:
    """The steps from an energy to its layer: print it, or ask for ``latex()`` or ``html()``.

    Attributes:
        name: the name of the energy.
        steps: what is shown: a title and blocks each.
        definitions: the named parts: contractions such as q = Q h, and softmax weights p.
        energy: the energy in terms of them, or None where it has no expression.
        force: -dE/dh_d in terms of them, or None; ``joint_force`` that of all tokens together, for a joint layer.
        adjoints: -dE/dq for every contraction q that moves with the state, in terms of them.

    >>> import cem
    >>> from sympy import Sum
    >>> dim, hidden = cem.dims("dim hidden")
    >>> h, U = cem.state(dim), cem.parameter("U", hidden, dim)
    >>> i, m = dim.index("i"), hidden.index("m")
    >>> u = Sum(U[m, i] * h[i], i)
    >>> plain = cem.Energy(-Sum(cem.antiderivative(cem.relu)(u), m), name="plain")
    >>> print(*Derivation.of_energy(plain).definitions)
    u[m] = Σ_i U[m,i] h[i]
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: tuple[Step, ...] = ()
        self.definitions: list[Definition] = []
        self.energy: Expr | None = None
        self.force: Expr | None = None
        self.joint_force: Expr | None = None
        self.adjoints: dict[Indexed, Expr] = {}

    @classmethod
    def of_energy(cls, energy, layer=None) -> Derivation:
        """The derivation of an energy, and of a layer that was derived from it.

        ``energy`` needs ``name``, ``expression``, ``gradient``, ``state``, ``context``,
        ``parameters``, ``scalars`` and ``curvature`` of :class:`~cem.Energy`, ``layer`` what an
        :class:`~cem.EnergyLayer` says of itself. An energy without an expression has one step,
        which says why.
        """
        self = cls(energy.name)
        if energy.expression is None:
            steps = [_untranslated(energy)]
        else:
            together = getattr(layer, "joint", False)
            self._derive(energy, together)
            steps = [_energy_step(energy), *self._feature_steps(), *self._adjoint_steps()]
            steps.append(self._gradient_step(energy))
            steps += [self._joint_step(energy)] if together else []
            steps.append(self._layer_step(energy, layer))
        if layer is not None:
            steps.append(_program_step(layer))
        self.steps = tuple(steps)
        return self

    def _derive(self, energy, together: bool) -> None:
        naming, self.energy = in_named_parts(energy, *([energy.joint_gradient] if together else []))
        self.force = naming.rewrite(-energy.gradient)
        if together:
            self.joint_force = naming.rewrite(-energy.joint_gradient)
        for entry, adjoint in adjoints(self.energy, naming.definitions):
            force, indices = with_own_letters(naming.rewrite(-adjoint), entry.indices)
            self.adjoints[Indexed(entry.base, *indices)] = force
        self.definitions = naming.definitions

    # -- what it prints as ------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return f"{self.name}: from the energy to the layer"

    def text(self) -> str:
        """For a terminal."""
        return as_text(self.title, self.steps)

    def latex(self) -> str:
        """A fragment of LaTeX; it needs amsmath."""
        return as_latex(self.title, self.steps)

    def html(self) -> str:
        """A page that is readable offline: MathML, no scripts, nothing to load."""
        return as_html(self.title, "Every formula below is computed from the energy.", self.steps)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Derivation({self.name!r}, {len(self.steps)} steps)"

    def _repr_html_(self) -> str:
        return self.html()

    def _repr_latex_(self) -> str:
        if self.force is None:
            return rf"$\text{{{self.name}: a torch callable}}$"
        return rf"$-\frac{{\partial E}}{{\partial h_{{d}}}} = {latex(self.force)}$"

    # -- the steps --------------------------------------------------------------------------------

    def _feature_steps(self) -> Iterator[Step]:
        features = [d for d in self.definitions if not d.is_weights]
        if features:
            blocks = (
                paragraph("Name every contraction, by what it depends on:"),
                Formulas(tuple(_definition(d, STAGES[d.stage]) for d in features)),
                paragraph("In these names the energy reads"),
                Formulas((_formula(Math("E", "E"), self.energy),)),
            )
            yield Step("Features", blocks)

    def _adjoint_steps(self) -> Iterator[Step]:
        weights = [d for d in self.definitions if d.is_weights]
        blocks: list[Block] = []
        if weights:
            told = "The derivative of a log-sum-exp is the softmax of its scores:"
            if any(isinstance(d.expression, Entmax) for d in weights):
                told = "The derivative of a smooth maximum is the weights of its scores:"
            blocks.append(paragraph(told))
            blocks.append(Formulas(tuple(map(_definition, weights))))
        if self.adjoints:
            blocks.append(paragraph("The force on each feature that moves with the state is"))
            rows = (_formula(_force_on(entry), force) for entry, force in self.adjoints.items())
            blocks.append(Formulas(tuple(rows)))
        if blocks:
            yield Step("Adjoints", tuple(blocks))

    def _gradient_step(self, energy) -> Step:
        h = energy.state
        ways: list[Part] = [Math.of(entry.base) for entry in self.adjoints]
        if any(leaf.base == h for leaf in self.energy.atoms(Indexed)):
            ways.append("directly")
        through = " through " if self.adjoints else " "
        told = [Math.of(h), f" enters the energy{through}", *listed(ways), "."]
        if self.adjoints:
            told.append(
                " A feature hands the force on it to the state through the parameter that made it,"
                " so every matrix is used twice: it reads, and its transpose writes."
            )
        left = _force_on(Indexed(h, output_index(h.shape[0])))
        return Step("Gradient", (paragraph(*told), Formulas((_formula(left, self.force),))))

    def _joint_step(self, energy) -> Step:
        h, d = energy.state, output_index(energy.state.shape[0])
        told = [
            "The energies of all tokens are differentiated together, so a token is also moved as the context of the"
            " tokens t that see it; s stands for it in their sums:"
        ]
        left = Math(
            rf"-\frac{{\partial}}{{\partial {latex(Indexed(h, d))}}} \sum_{{t}} E_{{t}}",
            f"-∂(Σ_t E_t)/∂{Math.of(Indexed(h, d)).text}",
        )
        return Step(
            "All tokens together", (paragraph(*told), Formulas((_formula(left, self.joint_force),)))
        )

    def _layer_step(self, energy, layer) -> Step:
        update = type(getattr(layer, "update", None)).__name__ if layer else "GradientDescent"
        shown = UPDATES.get(update, UPDATES["GradientDescent"])
        left, right = zip(*(side.split(" = ", 1) for side in shown), strict=True)
        rule = (side.replace("@", slope) for side, slope in zip(right, UPHILL, strict=True))
        blocks: list[Block] = [
            paragraph("The layer moves the state downhill:"),
            Formulas((Formula(Math(*left), (Math(*rule),)),)),
        ]
        h, d = energy.state, output_index(energy.state.shape[0])
        blocks += [paragraph(*told) for told in known_forms(self.definitions, self.force, h, d)]
        if layer is not None:
            blocks += _layer_facts(layer)
        promise = DESCENT[energy.curvature] if layer is None else str(layer.certificate)
        blocks.append(paragraph(promise))
        return Step("The layer", tuple(blocks))


def _formula(left: Math, right: Expr, note: str = "") -> Formula:
    """``left = right``, one term a line where the right side is long."""
    shown = Math.of(right)
    if len(shown.text) < 60 or not isinstance(right, Add):
        return Formula(left, (shown,), note)
    lines = []
    for term in terms(right):
        part = Math.of(term)
        if lines and part.text.startswith("-"):
            part = Math(f"- {part.latex[1:]}", f"- {part.text[1:]}")
        elif lines:
            part = Math(f"+ {part.latex}", f"+ {part.text}")
        lines.append(part)
    return Formula(left, tuple(lines), note)


def _definition(definition: Definition, note: str = "") -> Formula:
    return _formula(Math.of(definition.entry), definition.expression, note)


def _force_on(entry: Indexed) -> Math:
    shown = Math.of(entry)
    return Math(rf"-\frac{{\partial E}}{{\partial {shown.latex}}}", f"-∂E/∂{shown.text}")


def _shape(base: NamedArray) -> str:
    return " × ".join(str(size).replace("*", "·") for size in base.shape)


def _energy_step(energy) -> Step:
    """The energy itself, and what every symbol in it means."""
    h, x = energy.state, energy.context
    leaves = {leaf.base for leaf in energy.expression.atoms(Indexed)}
    rows: list[tuple[list[Part], ...]] = [
        ([Math.of(h)], ["the state of one token, which the layer moves"], [_shape(h)])
    ]
    for base in leaves:
        if isinstance(base, Frozen):
            meaning = "the state at the input of the layer, held fixed in the gradient"
            rows.append(([Math.of(base)], [meaning], [_shape(base)]))
    if x is not None:
        rows.append(([Math.of(x)], ["the tokens that it may see, held fixed"], [_shape(x)]))
        rows.append(([Math("V", "V")], ["the visible ones among them"], [""]))
    for base in energy.parameters:
        rows.append(([Math.of(base)], ["parameter"], [_shape(base)]))
    for scalar in energy.scalars:
        default = scalar.default
        told: list[Part] = ["positive number" if scalar.is_positive else "number"]
        told += [", by default ", Math.of(default)] if default is not None else []
        rows.append(([Math.of(scalar)], told, [""]))
    given = [Math.of(h).latex, Math.of(h).text]
    if x is not None:
        given = [rf"{given[0]} \mid {Math.of(x).latex}", f"{given[1]} | {Math.of(x).text}"]
    blocks = (
        paragraph("One number for each token, without a unit; lower is better."),
        Formulas((_formula(Math(f"E({given[0]})", f"E({given[1]})"), energy.expression),)),
        Table(("symbol", "meaning", "shape"), tuple(rows)),
        *_antiderivatives(energy.expression),
    )
    return Step("Energy", blocks)


def _antiderivatives(expression: Expr) -> Iterator[Block]:
    for row in WORDS:
        above = row.antiderivative
        if (
            above is not None
            and above.__name__.endswith("_antiderivative")
            and expression.has(above)
        ):
            z = Scalar("z")
            shown, slope = Math.of(above(z)), Math.of(row.function(z))
            yield paragraph(shown, " is the antiderivative of ", slope, ".")


def _untranslated(energy) -> Step:
    told = (
        "The energy is a torch callable without a symbolic form; its gradient is taken by automatic"
        " differentiation."
    )
    return Step("Energy", (paragraph(told), *([paragraph(energy.reason)] if energy.reason else [])))


def _layer_facts(layer) -> Iterator[Block]:
    """What the arguments of ``derive`` add to the bare step."""
    told: list[Part] = [f"The update rule is {layer.update!r}"]
    preconditioner = getattr(layer, "preconditioner", None)
    if preconditioner is None:
        told += [", and ", Math("P", "P"), " is the identity."]
    else:
        told += [", and ", Math("P", "P"), f" is {preconditioner!r}."]
    yield paragraph(*told)
    norm = getattr(layer, "norm", None)
    if norm is not None and type(norm).__name__ != "Identity":
        told = [
            f"State and context are read through {norm!r}: the gradient is taken with respect to"
            " what the norm returns and subtracted from the state."
        ]
        yield paragraph(*told)
    if layer.steps > 1:
        fixed = "input of the layer" if layer.refresh == "layer" else "input of each step"
        seen = "a context that moves with them" if layer.moving else "the same context"
        told = [
            f"The energy is descended {layer.steps} times with the same parameters and {seen};"
            f" frozen values are those at the {fixed}."
        ]
        yield paragraph(*told)


def _program_step(layer) -> Step:
    sizes = ", ".join(f"{name} = {size}" for name, size in layer.sizes.items())
    scalars = ", ".join(f"{name} = {value:.4g}" for name, value in layer.scalars.items())
    kernels = ", ".join(layer.lowering.kernels)
    blocks: list[Block] = [
        paragraph("; ".join(filter(None, (f"Sizes: {sizes}", scalars))) + "."),
        paragraph(f"The lowering is {layer.lowering.kind}, made of {kernels}."),
    ]
    blocks += [paragraph(str(reason)) for reason in layer.lowering.reasons]
    return Step("Program", (*blocks, Code(layer.code)))
