"""Named parts, their adjoints, and the worked mathematics as text, LaTeX and a page."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from sympy import Indexed, Sum

import cem
from cem import energies
from cem.calculus.adjoints import adjoints
from cem.derivation import Derivation
from cem.language.definitions import Naming, definitions
from cem.language.evaluation import Evaluator
from cem.language.notation import latex, text
from cem.language.reductions import LogSumExp, Softmax
from cem.language.symbols import SEQ, State, index
from cem.language.words import gelu_antiderivative, relu_antiderivative, silu

dim, heads, rank, hidden, block = cem.dims("dim heads rank hidden block")
h, x = cem.state(dim), cem.context(dim)
i, j, a, r, m = (
    size.index(name) for size, name in zip((dim, dim, heads, rank, hidden), "ijarm", strict=True)
)
s, b = x.index("s"), block.index("b")
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
u, g = Sum(U[m, i] * h[i], i), Sum(G[m, i] * h[i], i)
gate = Sum(G[m, i] * cem.frozen(h)[i], i)
score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
SIZES = {dim: 6, heads: 2, rank: 3, hidden: 5, block: 3, SEQ: 4}


def block_support():
    wide = heads * block
    h, x = cem.state(wide), cem.context(wide)
    i, j = index("i", wide), index("j", wide)
    Q, K = cem.parameter("Q", heads, rank, wide), cem.parameter("K", heads, rank, wide)
    lam = cem.parameter("lam", heads, block)
    low = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    diagonal = Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)
    return -Sum(cem.logsumexp(beta * (low + diagonal), s), a) / beta


def full_support():
    lam = cem.parameter("lam", heads, dim)
    scores = score + Sum(lam[a, i] * h[i] * x[s, i], i)
    return -Sum(cem.logsumexp(beta * scores, s), a) / beta


ENERGIES = {
    "interaction": -Sum(cem.logsumexp(beta * score, s), a) / beta,
    "block": block_support(),
    "full": full_support(),
    "gated": -Sum(silu(gate) * u**2, m) / 2,
    "two_sided": -Sum(gelu_antiderivative(g) * u, m),
    "plain": -Sum(relu_antiderivative(u), m),
    "memory": Sum(h[i] ** 2, i) / 2 - cem.logsumexp(beta * u, m) / beta,
    "two_layers": Sum(silu(Sum(G[m, i] * silu(Sum(Q[a, r, i] * h[i], i)), i)), a, r, m),
}  # fmt: skip
each_energy = pytest.mark.parametrize("name", ENERGIES)


def energy_of(name):
    return cem.Energy(ENERGIES[name], name=name)


def values_of(names, generator):
    """Random values for tensors of the language, by name."""
    found = {}
    for base in names:
        shape = [int(size.xreplace(SIZES)) for size in base.shape]
        found[str(base.name)] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found


@each_energy
def test_names_change_nothing(name):
    energy = energy_of(name)
    found, (rewritten, force) = definitions([energy.expression, -energy.gradient])
    generator = torch.Generator().manual_seed(0)
    bases = {leaf.base for leaf in energy.expression.atoms(Indexed)}
    tensors = {**values_of(sorted(bases, key=str), generator), "beta": torch.tensor(0.7).double()}
    d = index("d", energy.width)
    wanted = [Evaluator(tensors, SIZES)(energy.expression)]
    wanted.append(Evaluator(tensors, SIZES)(-energy.gradient, (d,)))
    for definition in found:
        value = Evaluator(tensors, SIZES)(definition.expression, definition.indices)
        tensors[definition.name] = value
    torch.testing.assert_close(
        [Evaluator(tensors, SIZES)(rewritten), Evaluator(tensors, SIZES)(force, (d,))],
        wanted,
        rtol=1e-12,
        atol=1e-12,
    )


@each_energy
def test_adjoints_match_autograd(name):
    energy = energy_of(name)
    naming = Naming([energy.expression])
    rewritten = naming.rewrite(energy.expression)
    generator = torch.Generator().manual_seed(1)
    found = naming.definitions
    for entry, slope in adjoints(rewritten, found):
        # Every feature is an input here, so the ones above the feature are worked out from it.
        tensors = values_of(
            sorted({leaf.base for leaf in energy.expression.atoms(Indexed)}, key=str), generator
        )
        tensors["beta"] = torch.tensor(0.7, dtype=torch.float64)
        tensors[str(entry.base.name)] = values_of([entry.base], generator)[
            str(entry.base.name)
        ].requires_grad_()
        for definition in found:
            if definition.name not in tensors:
                value = Evaluator(tensors, SIZES)(definition.expression, definition.indices)
                tensors[definition.name] = value
        value = Evaluator(tensors, SIZES)(rewritten)
        (wanted,) = torch.autograd.grad(value, tensors[str(entry.base.name)])
        got = Evaluator(tensors, SIZES)(slope, tuple(entry.indices))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_names_of_interaction():
    found, (energy, force) = definitions(
        [ENERGIES["interaction"], -energy_of("interaction").gradient]
    )
    assert [d.symbol_latex for d in found] == ["q_{ar}", "k_{asr}", "p_{as}"]
    assert [d.stage for d in found] == ["state", "context", "state"]
    assert latex(energy) == (
        r"-\frac{1}{\beta} \sum_{a} \log\sum_{s \in V}"
        r" \exp\left(\beta \sum_{r} q_{ar} k_{asr}\right)"
    )
    assert latex(force) == r"\sum_{a, r} Q_{ard} \sum_{s \in V} p_{as} k_{asr}"
    assert str(found[-1]) == "p[a,s] = softmax_s(β Σ_r q[a,r] k[a,s,r])"


def test_names_do_not_clash():
    c = cem.frozen(h)
    found, _ = definitions(Sum(u * gate * silu(Sum(G[m, i] * h[i], i)), m))
    assert sorted(d.name for d in found) == ["g", "gbar", "u"]
    small = cem.parameter("u", hidden)
    (definition,), _ = definitions(Sum(small[m] * u**2, m))
    assert definition.name == "u'" and definition.symbol_latex == "u'_{m}"
    W = cem.parameter("weights", hidden, dim)
    (definition,), _ = definitions(Sum(Sum(W[m, i] * c[i], i) ** 2, m))
    assert definition.name == "z" and definition.stage == "frozen"


def test_one_expression_gives_one_expression():
    found, energy = definitions(ENERGIES["plain"])
    assert text(energy) == "-Σ_m ∫relu(u[m])" and isinstance(found[0].tensor, State)
    assert not energy.atoms(LogSumExp, Softmax)


def test_the_same_part_has_one_name_at_every_index():
    A, n = cem.parameter("A", hidden, hidden), hidden.index("n")
    v = Sum(U[n, i] * h[i], i)
    found, energy = definitions(Sum(A[m, n] * u * v, m, n))
    assert [d.name for d in found] == ["u", "a"]
    assert text(energy) == "Σ_m a[m] u[m]"


@pytest.mark.parametrize(
    ("name", "force"),
    [
        ("gated", "Σ_m U[m,d] silu(g[m]) u[m]"),
        ("two_sided", "Σ_m U[m,d] ∫gelu(g[m]) + Σ_m G[m,d] gelu(g[m]) u[m]"),
        ("plain", "Σ_m U[m,d] relu(u[m])"),
        ("memory", "Σ_m U[m,d] p[m] - h[d]"),
        ("full", "Σ_a λ[a,d] Σ_{s∈V} p[a,s] x[s,d] + Σ_{a,r} Q[a,r,d] Σ_{s∈V} p[a,s] k[a,s,r]"),
        (
            "block",
            "Σ_{a,r} Q[a,r,d] Σ_{s∈V} p[a,s] k[a,s,r] + [λ[a,b] Σ_{s∈V} p[a,s] x[s,(ab)]]_{(ab)=d}",
        ),
    ],
)
def test_forces(name, force):
    assert text(Derivation.of_energy(energy_of(name)).force) == force


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("interaction", "multi-head attention: .* Q makes the query and its transpose"),
        ("block", "same weights also average x, scaled coordinate by coordinate by λ"),
        ("gated", "gated MLP: U reads the state, the gate g is fixed at the input"),
        ("two_sided", "gated MLP in which both sides move: G and U|both sides move: U and G"),
        ("plain", "MLP with tied weights: U reads, relu acts, and the transpose writes"),
        ("memory", "associative memory: .* the rows of U, .* step size 1 it cancels"),
    ],
)
def test_known_layers_are_recognised_by_their_shape(name, sentence):
    energy = cem.Energy(ENERGIES[name], name="something")
    shown = re.sub(r"\s+", " ", str(Derivation.of_energy(energy)))
    assert re.search(sentence, shown)


def test_a_name_proves_nothing():
    quadratic = cem.Energy(Sum(h[i] ** 2, i) / 2, name="attention")
    shown = Derivation.of_energy(quadratic).text()
    assert "multi-head" not in shown and "MLP" not in shown
    assert "h enters the energy directly" in shown


def test_adjoints_are_shown():
    derivation = Derivation.of_energy(energy_of("interaction"))
    assert "-∂E/∂q[a,r] = Σ_{s∈V} p[a,s] k[a,s,r]" in derivation.text()
    (force,) = derivation.adjoints.values()
    assert text(force) == "Σ_{s∈V} p[a,s] k[a,s,r]"


@each_energy
def test_latex_is_balanced(name):
    shown = Derivation.of_energy(energy_of(name)).latex()
    assert shown.count("{") - shown.count(r"\{") == shown.count("}") - shown.count(r"\}")
    assert shown.count(r"\left") == shown.count(r"\right")
    for environment in ("align*", "tabular", "verbatim"):
        begun = shown.count(rf"\begin{{{environment}}}")
        assert begun == shown.count(rf"\end{{{environment}}}")
    assert not re.search(r"[^\x00-\x7f]", shown)


class Tags(HTMLParser):
    """Checks that tags nest and notes what they load."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.links += [v for key, v in attributes if key in ("src", "href", "srcset")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@each_energy
def test_page_is_self_contained(name):
    page = Derivation.of_energy(energy_of(name)).html()
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not tags.links
    assert "math" in tags.seen and not {"script", "link", "img", "iframe"} & tags.seen
    assert "@import" not in page and "url(" not in page and "&amp;#x" not in page


def test_page_escapes_names():
    energy = cem.Energy(ENERGIES["plain"], name="<b>&")
    assert "&lt;b&gt;&amp;" in Derivation.of_energy(energy).html()


def test_derivation_of_a_layer():
    layer = cem.derive(energy_of("interaction"), dim=6, heads=2, rank=3)
    derivation = Derivation.of_energy(energy_of("interaction"), layer)
    shown = derivation.text()
    assert "dim = 6, heads = 2, rank = 3" in shown
    assert all(line.strip() in shown for line in layer.code.splitlines())
    assert "GradientDescent(step_size=1)" in shown
    assert "<pre><code>" in derivation.html() and r"\begin{verbatim}" in derivation.latex()


@pytest.mark.parametrize("norm", [None, torch.nn.RMSNorm])
def test_a_layer_is_shown_with_its_certificate(norm):
    energy = energy_of("plain")
    layer = cem.derive(energy, norm=norm, dim=6, hidden=5)
    shown = " ".join(Derivation.of_energy(energy, layer).text().split())
    assert str(layer.certificate) in shown
    assert "concave in the state, so a step of any size" not in shown
    assert "concave in the state, so a step of any size" in " ".join(
        Derivation.of_energy(energy).text().split()
    )


def test_nothing_is_promised_for_signs_and_moving_contexts():
    energy = energy_of("interaction")

    def shown(**options):
        layer = cem.derive(energy, dim=6, heads=2, rank=3, steps=2, **options)
        # Lines are wrapped, at hyphens too.
        return "".join(Derivation.of_energy(energy, layer).text().split())

    held = shown(preconditioner=cem.Diagonal)
    assert "concave" in held and "positivesemi-definite" in held and "thesamecontext" in held
    signed = shown(preconditioner=cem.Diagonal(6, signed=True))
    assert "notpositivesemi-definitebyconstruction" in signed and "ismeasured" in signed
    moving = shown(moving=True)
    assert "thecontextmoveswiththestates" in moving.lower() and "ismeasured" in moving


def test_an_energy_without_expression_says_why():
    energy = SimpleNamespace(name="loop", expression=None, reason="It loops over the tokens.")
    derivation = Derivation.of_energy(energy)
    assert "automatic differentiation" in derivation.text().replace("\n   ", " ")
    assert "It loops over the tokens." in derivation.text()
    assert derivation.force is None and "loop" in derivation._repr_latex_()


def test_what_a_notebook_shows():
    derivation = Derivation.of_energy(energy_of("plain"))
    assert derivation._repr_html_() == derivation.html() and str(derivation) == derivation.text()
    assert derivation._repr_latex_() == (
        r"$-\frac{\partial E}{\partial h_{d}} ="
        r" \sum_{m} U_{md} \operatorname{relu}\left(u_{m}\right)$"
    )
    assert repr(derivation) == "Derivation('plain', 5 steps)"


def test_linear_attention_is_told_as_such():
    for name, decays in (("squared_interaction", False), ("gated_linear_attention", True)):
        told = " ".join(getattr(energies, name).derivation().text().split())
        assert "This is linear attention" in told and "q is the query and k the key" in told
        assert ("less what later tokens let decay" in told) == decays
        assert "MLP" not in told


def test_a_joint_layer_shows_what_a_token_receives():
    layer = cem.derive(energies.interaction, dim=6, heads=2, rank=3, joint=True, causal=False)
    derivation = layer.derivation
    titles = [step.title for step in derivation.steps]
    assert titles.index("All tokens together") == titles.index("Gradient") + 1
    shown = "".join(derivation.text().split())
    assert "Σ_{a,r}K[a,r,d]Σ_{t:s∈V(t)}p[a,s]q[a,r]" in shown
    assert r"\sum_{t :\, s \in V(t)}" in derivation.latex()
    assert "<math" in derivation.html()
