"""The catalogue of energies that the tests run through, and small builders.

Legend: B batch, T tokens, S context tokens, D dim. Sizes differ, so that a transposed axis shows.
"""

from dataclasses import dataclass

import torch
from sympy import Add, Ne, Sum, exp, log, sqrt, tanh

import cem
from cem import energies
from cem.language.positions import Rope
from cem.language.symbols import size_of
from cem.testing import assert_close

B, T, S, D = 2, 7, 9, 12
SIZES = {
    "dim": D,
    "heads": 2,
    "block": 6,
    "rank": 5,
    "copies": 3,
    "hidden": 11,
    "groups": 2,
    "per_group": 3,
    "experts": 4,
    "features": 8,
    "buckets": 32,
    "tokens": 10,
    "far": 4,
    "wide": 8,
    "low": 3,
    "other": 4,
}

dim, heads, rank, hidden, wide, low, other = cem.dims("dim heads rank hidden wide low other")
h, x = cem.state(dim), cem.context(dim)
c = cem.frozen(h)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
P, L = cem.parameter("P", heads, low, dim), cem.parameter("L", heads, low, dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
w, b = cem.parameter("w", dim), cem.parameter("b", heads, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
i, j, a, r, p = (
    size.index(n) for size, n in zip((dim, dim, heads, rank, low), "ijarp", strict=True)
)
m, s = hidden.index("m"), x.index("s")


def dot(weight, *lead, vector=h, over=i):
    """The product of a matrix and a vector, as an expression."""
    return Sum(weight[(*lead, over)] * vector[over], over)


def key(weight, *lead):
    return Sum(weight[(*lead, j)] * x[s, j], j)


def lse(score):
    return -Sum(cem.logsumexp(beta * score, s), a) / beta


SCORE = Sum(dot(Q, a, r) * key(K, a, r), r)
FROZEN = Sum(dot(Q, a, r, vector=c) * key(K, a, r), r)

own_projections = energies.loosely_tied_interaction_by(
    outputs="own", values="own", shares="coordinate", temperatures=True, name="own_projections"
)
biased = cem.Energy(lse(SCORE + Sum(b[a, j] * x[s, j], j)), name="biased")
gaussian = cem.Energy(lse(-Sum((dot(Q, a, r) - key(K, a, r)) ** 2, r) / 2), name="gaussian")
soft_capped = cem.Energy(lse(3 * tanh(SCORE / 3)), name="soft_capped")
two_terms = cem.Energy(lse(SCORE + Sum(dot(P, a, p) * key(L, a, p), p)), name="two_terms")
narrow_values = cem.Energy(lse(FROZEN + Sum(dot(P, a, p) * key(L, a, p), p)), name="narrow_values")
nonlinear_query = cem.Energy(
    lse(Sum(tanh(dot(Q, a, r)) * cem.silu(key(K, a, r)), r)), name="nonlinear_query"
)
pair = cem.Energy(lse(SCORE) - Sum(cem.logsumexp(SCORE, s) ** 2, a) / 7, name="pair")

mean = cem.Energy(
    -Sum(Sum(U[m, i] * h[i], i) * Sum(key(U, m), s) / cem.language.symbols.SEQ, m), name="mean"
)
gate = cem.parameter("gate", heads)
forgetting = cem.Energy(
    -Sum(cem.decay(-cem.softplus(gate[a]), s) * SCORE**2, s, a) / 2, name="forgetting"
)
squared = cem.Energy(-Sum(Sum(dot(Q, a, r) * key(K, a, r), r) ** 2, a, s) / 2, name="squared")
quadratic = cem.Energy(Sum(w[i] * h[i] ** 2, i) / 2 + Sum(h[i], i) ** 4 / 9, name="quadratic")
level = cem.Energy(cem.silu(Sum(h[i], i)) * Sum(w[i] ** 2, i) - 2 * Sum(h[i], i), name="level")
linear = cem.Energy(-Sum(w[i] * h[i], i), name="linear")
spread = cem.Energy(log(Sum(exp(dot(U, m)), m)) ** 2 - exp(-Sum(h[i] ** 2, i) / 8), name="spread")

t, t_s = cem.position(h), cem.position(s)
groups, per_group, far = cem.dims("groups per_group far")
g, o, n = groups.index("g"), per_group.index("o"), far.index("n")
Qg, Kg = cem.parameter("Q", groups, per_group, rank, dim), cem.parameter("K", groups, rank, dim)
sharpness = beta * exp(cem.parameter("log_beta", groups, per_group)[g, o])


def rotated(query, key, **options):
    """The score of a query and a key that are turned by their positions."""
    return Sum(cem.rope(query, r, h, **options) * cem.rope(key, r, s, **options), r)


def unit(vector):
    return vector / sqrt(Sum(vector**2, r))


grouped = rotated(Sum(Qg[g, o, r, i] * h[i], i), Sum(Kg[g, r, j] * x[s, j], j))
window = cem.only((t - t_s < 3) | (t_s < 1))
rope_grouped_window = cem.Energy(
    -Sum(cem.logsumexp(sharpness * grouped + window, s) / sharpness, g, o),
    name="rope_grouped_window",
)
rope_partial = cem.Energy(
    lse(rotated(dot(Q, a, r), key(K, a, r), fraction=2 / 3, pairing="interleaved", base=50)),
    name="rope_partial",
)
rope_normalised = cem.Energy(
    lse(rotated(unit(dot(Q, a, r)), unit(key(K, a, r)))), name="rope_normalised"
)
rope_frequencies = cem.Energy(
    lse(rotated(dot(Q, a, r), key(K, a, r), frequencies=(1.0, 0.3))), name="rope_frequencies"
)
slope, near = cem.parameter("slope", heads), cem.parameter("near", heads, far)
alibi_lookup = cem.Energy(
    -Sum(
        cem.logsumexp(beta * SCORE - slope[a] * (t - t_s) + cem.lookup(near[a, n], n, t - t_s), s),
        a,
    )
    / beta,
    name="alibi_lookup",
)
self_excluded = cem.Energy(
    -Sum(cem.logsumexp(beta * SCORE + cem.only(Ne(t, t_s)), s), a) / beta, name="self_excluded"
)

sparse_attention = cem.Energy(
    -Sum(cem.entmax_conjugate(beta * SCORE, s, 1.5), a) / beta, name="sparse_attention"
)
sparse_window = cem.Energy(
    -Sum(cem.entmax_conjugate(beta * SCORE + cem.only(t - t_s < 3), s), a) / beta,
    name="sparse_window",
)

y = cem.context(other)
Ky = cem.parameter("K", heads, rank, other)
e = other.index("e")
narrow_context = cem.Energy(
    lse(Sum(dot(Q, a, r) * Sum(Ky[a, r, e] * y[s, e], e), r)), name="narrow_context"
)


@cem.energy(h="dim", x="seq dim", Q="rank dim", K="rank dim", V="wide dim", O="wide dim")
def frozen_attention(h, x, *, Q, K, V, O):  # noqa: E741
    """Attention with the weights of the frozen state: values of their own width."""
    weights = torch.softmax((x @ K.T) @ (Q @ h.detach()), dim=0)
    return -torch.dot(O @ h, weights @ torch.tanh(x @ V.T))


@cem.energy(h="dim", U="hidden dim", G="hidden dim")
def mixture(h, *, U, G):
    """A softmax over hidden units."""
    return -(torch.softmax(U @ h, dim=-1) * (G @ h)).sum()


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def looped(h, x, *, Q, K, visible, beta=rank**-0.5):
    """The interaction energy in a form that cannot be translated: a loop over tokens."""
    scores = torch.stack([torch.einsum("ari,i,arj,j->a", Q, h, K, token) for token in x])
    scores = scores.masked_fill(~visible[:, None] & visible.any(), -torch.inf)
    return -torch.where(visible.any(), torch.logsumexp(beta * scores, 0).sum(), 0.0) / beta


@cem.energy(h="dim", U="hidden dim", G="hidden dim")
def untranslatable_gate(h, *, U, G):
    """The gated energy with a running sum of the gates, and a literal detach."""
    return -0.5 * (torch.cumsum(torch.sigmoid(G @ h.detach()), 0) * (U @ h).square()).sum()


def sizes_of(energy, sizes=SIZES):
    """The sizes to derive an energy with; an axis that is turned has the next even one."""
    found = {str(size): sizes[str(size)] for size in energy.dims}
    ropes = () if energy.expression is None else energy.expression.atoms(Rope)
    turned = {str(size_of(rope.index)) for rope in ropes}
    return {name: size + (size % 2 if name in turned else 0) for name, size in found.items()}


@dataclass(frozen=True)
class Case:
    """An energy of the catalogue and the kernels that its layer should be made of."""

    energy: cem.Energy
    kernels: tuple[str, ...]

    @property
    def name(self):
        return self.energy.name

    @property
    def has_context(self):
        return self.energy.context is not None

    @property
    def arguments(self):
        """The sizes to derive it with."""
        return sizes_of(self.energy)

    def derive(self, **options):
        """A float64 layer in which no parameter is zero."""
        layer = cem.derive(self.energy, **{"dtype": torch.float64, **self.arguments, **options})
        return drawn(layer)

    def inputs(self, context=False, lead=(B,), dtype=torch.float64, device=None):
        """States (*lead, T, D) and, if wanted or needed, a context (*lead, S, D)."""
        generator = torch.Generator().manual_seed(1)
        found = {"h": torch.randn(*lead, T, D, generator=generator, dtype=torch.float64)}
        if self.has_context:
            width = SIZES[str(self.energy.context.shape[1])] if self.needs_context else D
            if context or self.needs_context:
                shape = (*lead, S, width)
                found["context"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {name: tensor.to(device, dtype) for name, tensor in found.items()}

    @property
    def only_context(self):
        """Whether a token that sees nothing stays where it is: every term reads the context."""
        terms = Add.make_args(self.energy.expression)
        return all(term.has(cem.language.symbols.Context) for term in terms)

    @property
    def needs_context(self):
        """Whether the context has another width than the state, so that it cannot be the state."""
        return self.has_context and self.energy.context.shape[1] != self.energy.width


SDPA = ("matmul", "sdpa")
DENSE = ("dense_softmax", "einsum", "matmul")
ENERGIES = [
    Case(energies.interaction, SDPA),
    Case(energies.diagonal_plus_low_rank, SDPA),
    Case(energies.diagonal_plus_low_rank_full, ("einsum", *SDPA)),
    Case(energies.grouped_interaction, SDPA),
    Case(energies.dense_interaction, SDPA),
    Case(energies.diagonal_interaction, ("sdpa",)),
    Case(energies.symmetric_interaction, SDPA),
    Case(energies.symmetrised_interaction, SDPA),
    Case(energies.collaborative_interaction, ("einsum", *SDPA)),
    Case(energies.tempered_interaction, SDPA),
    Case(energies.gated_silu, ("matmul",)),
    Case(energies.gated_gelu, ("matmul",)),
    Case(energies.gated_relu, ("matmul",)),
    Case(energies.gated_sigmoid, ("matmul",)),
    Case(energies.two_sided_gated_silu, ("matmul",)),
    Case(energies.two_sided_gated_gelu, ("matmul",)),
    Case(energies.two_sided_gated_relu, ("matmul",)),
    Case(energies.two_sided_gated_sigmoid, ("matmul",)),
    Case(energies.plain_relu, ("matmul",)),
    Case(energies.plain_gelu, ("matmul",)),
    Case(energies.plain_silu, ("matmul",)),
    Case(energies.plain_softplus, ("matmul",)),
    Case(energies.memory, ("matmul",)),
    Case(energies.mixture_of_experts_silu, ("einsum", "matmul")),
    Case(energies.mixture_of_experts_relu, ("einsum", "matmul")),
    Case(energies.polynomial_memory, ("matmul",)),
    Case(energies.token_parameters, ("matmul",)),
    Case(energies.token_parameters_relu, ("matmul",)),
    Case(energies.consistent_token_parameters, ("einsum", "matmul")),
    Case(energies.unnormalised_token_parameters, ("matmul",)),
    Case(energies.quadratic_well, ("matmul",)),
    Case(energies.sparse_coding, ("matmul",)),
    Case(energies.parallel_block, SDPA),
    Case(energies.normalised_interaction, ("einsum", *SDPA)),
    Case(energies.soft_capped_interaction, DENSE),
    Case(energies.subspace_compression, SDPA),
    Case(energies.sparsification, ("matmul",)),
    Case(energies.rotary_interaction, SDPA),
    Case(energies.rotary_diagonal_plus_low_rank, SDPA),
    Case(energies.partly_tied_interaction, SDPA),
    Case(energies.untied_interaction, SDPA),
    Case(energies.partly_tied_gated, ("matmul",)),
    Case(energies.loosely_tied_interaction, SDPA),
    Case(own_projections, SDPA),
    Case(energies.loosely_tied_gated, ("matmul",)),
    Case(energies.alibi_interaction, SDPA),
    Case(energies.sliding_window_interaction, SDPA),
    Case(energies.sliding_window_interaction_by(3), SDPA),
    Case(energies.sliding_window_interaction_by(2, sinks=1), SDPA),
    Case(energies.sink_interaction, SDPA),
    Case(energies.relative_interaction, SDPA),
    Case(energies.energy_transformer, SDPA),
    Case(energies.gated_linear_attention, ("linear_attention", "matmul")),
    Case(energies.squared_interaction, ("linear_attention", "matmul")),
    Case(energies.sparse_memory, ("matmul",)),
    Case(energies.sparse_memory_by(1.5), ("matmul",)),
    Case(biased, SDPA),
    Case(gaussian, SDPA),
    Case(two_terms, SDPA),
    Case(narrow_values, SDPA),
    Case(nonlinear_query, SDPA),
    Case(pair, SDPA),
    Case(narrow_context, SDPA),
    Case(frozen_attention, SDPA),
    Case(soft_capped, DENSE),
    Case(rope_grouped_window, SDPA),
    Case(rope_partial, SDPA),
    Case(rope_normalised, ("einsum", *SDPA)),
    Case(rope_frequencies, SDPA),
    Case(alibi_lookup, SDPA),
    Case(self_excluded, SDPA),
    Case(mean, ("linear_attention", "matmul")),
    Case(forgetting, ("linear_attention", "matmul")),
    Case(squared, ("linear_attention", "matmul")),
    Case(sparse_attention, ("dense_entmax", "einsum", "matmul")),
    Case(sparse_window, ("dense_entmax", "einsum", "matmul")),
    Case(quadratic, ()),
    Case(linear, ()),
    Case(level, ()),
    Case(spread, ("matmul",)),
    Case(mixture, ("einsum", "matmul")),
    Case(energies.interaction + 0.5 * energies.gated, SDPA),
]
CONTEXT = [case for case in ENERGIES if case.has_context]
UNTRANSLATABLE = [Case(looped, ("autograd",)), Case(untranslatable_gate, ("autograd",))]


def by_name(case):
    """The id of a case in a parametrised test."""
    return case.name


def drawn(layer, seed=0):
    """The layer with every parameter of its energy drawn afresh: a diagonal starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.energy_function.parameters:
            tensor = getattr(layer, str(parameter.name))
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values / (tensor.shape[-1] if tensor.dim() > 1 else 1) ** 0.5)
    return layer


def gradients(function, layer, inputs, **fixed):
    """The output and the gradients of a weighted sum of it for every input and every parameter.

    ``function(**inputs, **fixed)`` may be the layer or anything else made of its parameters.
    """
    inputs = {name: z.detach().clone().requires_grad_() for name, z in inputs.items()}
    out = function(**inputs, **fixed)
    points = inputs | dict(layer.named_parameters())
    weights = torch.linspace(0.0, 9.0, out.numel(), dtype=torch.float64, device=out.device)
    loss = (out.double() * weights.cos().reshape(out.shape)).sum()
    found = torch.autograd.grad(loss, list(points.values()), allow_unused=True)
    named = zip(points.items(), found, strict=True)
    return {"output": out.detach()} | {
        name: torch.zeros_like(z) if grad is None else grad for (name, z), grad in named
    }


def assert_same(found, truth, rtol, atol=0.0):
    """Every output and gradient of ``gradients`` within a relative error."""
    for name, expected in truth.items():
        assert_close(found[name], expected, rtol, atol=atol, name=name)


def copy_of(layer, **options):
    """The same energy, sizes and values derived again with other options."""
    again = cem.derive(
        layer.energy_function,
        causal=layer.causal,
        dtype=next(layer.parameters()).dtype,
        **layer.sizes,
        **options,
    )
    again.load_state_dict(layer.state_dict())
    return again
