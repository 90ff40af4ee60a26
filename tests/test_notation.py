"""Expressions in LaTeX and in plain text."""

import re

import pytest
from sympy import Float, Rational, Sum, exp, log, pi, sqrt, tanh

from cem.calculus.gradient import gradient
from cem.language.canonical import canonical
from cem.language.notation import latex, text
from cem.language.reductions import logsumexp
from cem.language.symbols import (
    SEQ,
    context,
    dims,
    frozen,
    index,
    parameter,
    scalar,
    state,
)
from cem.language.words import (
    WORDS,
    gelu,
    gelu_antiderivative,
    log_cosh,
    normal_cdf,
    relu_antiderivative,
    sigmoid,
    silu,
    step,
)

dim, heads, rank, hidden, block = dims("dim heads rank hidden block")
h, x = state(dim), context(dim)
i, j, a, r, m, b = (
    size.index(name)
    for size, name in zip((dim, dim, heads, rank, hidden, block), "ijarmb", strict=True)
)
s = x.index("s")
Q, K = parameter("Q", heads, rank, dim), parameter("K", heads, rank, dim)
U, G = parameter("U", hidden, dim), parameter("G", hidden, dim)
beta, mu = scalar("beta", positive=True), scalar("mu")
score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
interaction = -Sum(logsumexp(beta * score, s), a) / beta


def block_support():
    wide = heads * block
    h, x = state(wide), context(wide)
    lam = parameter("lam", heads, block)
    scores = Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)
    return -Sum(logsumexp(scores, s), a), wide


def test_interaction():
    assert latex(interaction) == (
        r"-\frac{1}{\beta} \sum_{a} \log\sum_{s \in V} \exp\left(\beta \sum_{r}"
        r" \left(\sum_{i} Q_{ari} h_{i}\right) \left(\sum_{j} K_{arj} x_{sj}\right)\right)"
    )
    assert text(interaction) == (
        "-(1/β) Σ_a log Σ_{s∈V} exp(β Σ_r (Σ_i Q[a,r,i] h[i]) (Σ_j K[a,r,j] x[s,j]))"
    )


def test_gradient_of_interaction():
    assert text(gradient(canonical(interaction), dim)) == (
        "-Σ_{a,r} Q[a,r,d] Σ_{s∈V} softmax_s(β Σ_r (Σ_i Q[a,r,i] h[i]) (Σ_i K[a,r,i] x[s,i]))"
        " Σ_i K[a,r,i] x[s,i]"
    )
    assert r"\operatorname{softmax}_{s}\left(" in latex(gradient(canonical(interaction), dim))


def test_slots_and_ravel():
    energy, wide = block_support()
    assert r"\lambda_{ab} h_{(ab)} x_{s(ab)}" in latex(energy)
    assert "λ[a,b] h[(ab)] x[s,(ab)]" in text(energy)
    shown = latex(gradient(canonical(energy), wide))
    assert shown.startswith(r"-\left[") and shown.endswith(r"\right]_{(ab) = d}")


def test_gated():
    gate = silu(Sum(G[m, i] * frozen(h)[i], i))
    energy = -Sum(gate * Sum(U[m, i] * h[i], i) ** 2, m) / 2
    assert latex(energy) == (
        r"-\frac{1}{2} \sum_{m} \operatorname{silu}\left(\sum_{i} G_{mi} \bar{h}_{i}\right)"
        r" \left(\sum_{i} U_{mi} h_{i}\right)^{2}"
    )
    assert text(energy) == "-(1/2) Σ_m silu(Σ_i G[m,i] h̄[i]) (Σ_i U[m,i] h[i])²"


def test_memory_puts_the_minus_last():
    energy = Sum(h[i] ** 2, i) / 2 - log(Sum(exp(beta * Sum(U[m, i] * h[i], i)), m)) / beta
    assert text(energy) == text(canonical(energy))
    assert text(energy) == "(1/2) Σ_i h[i]² - (1/β) log Σ_m exp(β Σ_i U[m,i] h[i])"


other = hidden.index("i")


@pytest.mark.parametrize(
    ("expression", "in_latex", "in_text"),
    [
        (beta / 2 * h[i], r"\frac{\beta}{2} h_{i}", "(β/2) h[i]"),
        (h[i] / (1 + mu**2), r"\frac{h_{i}}{1 + \mu^{2}}", "h[i]/(1 + μ²)"),
        (1 / (2 * beta), r"\frac{1}{2 \beta}", "1/(2 β)"),
        (Rational(-2, 3) * h[i], r"-\frac{2}{3} h_{i}", "-(2/3) h[i]"),
        (h[i] ** mu, r"h_{i}^{\mu}", "h[i]^μ"),
        (rank**-0.5 * h[i], r"\frac{1}{\sqrt{\mathrm{rank}}} h_{i}", "(1/√rank) h[i]"),
        (SEQ * h[i], r"|V| h_{i}", "|V| h[i]"),
        (Float(0.044715) * h[i], "0.044715 h_{i}", "0.044715 h[i]"),
        (-mu * (h[i] - 1), r"-\mu \left(h_{i} - 1\right)", "-μ (h[i] - 1)"),
        (Sum(h[i] - x[s, i], i), r"\sum_{i} \left(h_{i} - x_{si}\right)", "Σ_i (h[i] - x[s,i])"),
        (Sum(h[i], i) ** 2, r"\left(\sum_{i} h_{i}\right)^{2}", "(Σ_i h[i])²"),
        (1 / Sum(h[i], i), r"\frac{1}{\sum_{i} h_{i}}", "1/(Σ_i h[i])"),
        (logsumexp(h[i], i, m), r"\log\sum_{m, i} \exp\left(h_{i}\right)", "log Σ_{m,i} exp(h[i])"),
        (tanh(h[i]) ** 2, r"\tanh\left(h_{i}\right)^{2}", "tanh(h[i])²"),
        (1 - sigmoid(h[i]), r"1 - \sigma\left(h_{i}\right)", "1 - σ(h[i])"),
        (abs(h[i]), r"\left|h_{i}\right|", "|h[i]|"),
        (log_cosh(h[i]) ** 2, r"\left(\log\cosh\left(h_{i}\right)\right)^{2}", "(log cosh(h[i]))²"),
        (normal_cdf(h[i]) * step(h[i]), r"\Phi\left(h_{i}\right) \mathbf{1}_{>0}\left(h_{i}\right)",
         "Φ(h[i]) step(h[i])"),
        (relu_antiderivative(h[i]), r"\operatorname{relu}^{(-1)}\left(h_{i}\right)", "∫relu(h[i])"),
        (sqrt(pi) * h[i], r"\sqrt{\pi} h_{i}", "√π h[i]"),
        (exp(-(h[i] ** 2) / 2), r"\exp\left(-\frac{1}{2} h_{i}^{2}\right)", "exp(-(1/2) h[i]²)"),
        (parameter("W_q", dim)[i] ** 2, "{W^{(q)}_{i}}^{2}", "W_q[i]²"),
        (parameter("U1", dim)[i], "U^{(1)}_{i}", "U1[i]"),
        (parameter("gain", dim)[i], r"\mathrm{gain}_{i}", "gain[i]"),
        (parameter("q'", dim)[i] ** 2, "{q'_{i}}^{2}", "q'[i]²"),
        (scalar("tau_0"), r"\tau_{0}", "τ0"),
        (h[index("i4", dim)], "h_{i_4}", "h[i4]"),
        (U[m, i] * gelu(h[i]) * h[i] * x[s, i] * beta,
         r"\beta U_{mi} \operatorname{gelu}\left(h_{i}\right) h_{i} x_{si}",
         "β U[m,i] gelu(h[i]) h[i] x[s,i]"),
        (Sum(U[m, i] * h[i], i) * Sum(U[other, i], other),
         r"\left(\sum_{i'} U_{i'i}\right) \left(\sum_{i} U_{mi} h_{i}\right)",
         "(Σ_{i'} U[i',i]) (Σ_i U[m,i] h[i])"),
    ],
)  # fmt: skip
def test_forms(expression, in_latex, in_text):
    assert latex(expression) == in_latex
    assert text(expression) == in_text


def test_names_can_be_given():
    assert latex(U[m, i] * beta, names={"U": r"\mathbf{U}", "beta": "b"}) == r"b \mathbf{U}_{mi}"
    assert text(U[m, i] * beta, names={"U": "W"}) == "β W[m,i]"


@pytest.mark.parametrize("row", WORDS, ids=lambda row: row.name)
def test_every_word_has_a_notation(row):
    expression = row.function(h[i])
    assert "h_{i}" in latex(expression) and "h[i]" in text(expression)
    assert "\\" not in text(expression)
    assert "\\" not in text(row.derivative(h[i]))
    latex(row.derivative(h[i]))


@pytest.mark.parametrize("expression", [interaction, -Sum(gelu_antiderivative(score), a, s)])
def test_brackets_match(expression):
    shown = latex(gradient(canonical(expression), dim))
    assert shown.count(r"\left") == shown.count(r"\right")
    assert shown.count("{") == shown.count("}")
    assert not re.search(r"'_\{[^}]*\}\^", shown)
