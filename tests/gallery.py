"""Every energy of the gallery: its layer at small sizes, and its twin in the pen it does not use."""

import sympy
import torch
from context_free_twins import (
    gated_twin,
    loosely_tied_gated_twin,
    memory_twin,
    mixture_of_experts_twin,
    partly_tied_gated_twin,
    plain_twin,
    polynomial_memory_twin,
    quadratic_well_twin,
    sparse_coding_twin,
    sparse_memory_twin,
    sparsification_twin,
    token_parameters_twin,
    two_sided_gated_twin,
    unnormalised_token_parameters_twin,
)
from helpers import sizes_of
from sympy import Sum
from torch.nn import functional as F

import cem
from cem import energies

GALLERY = {
    name: found
    for name in energies.__all__
    if isinstance(found := getattr(energies, name), cem.Energy)
}
# One name for each energy: some have several.
NAMES = tuple({energy: name for name, energy in GALLERY.items()}.values())
SIZES = {
    "dim": 12,
    "heads": 2,
    "rank": 5,
    "copies": 3,
    "hidden": 7,
    "groups": 2,
    "per_group": 3,
    "experts": 3,
    "features": 8,
    "buckets": 32,
    "tokens": 10,
}

dim, heads, rank, hidden, block, groups, per_group, features = cem.dims(
    "dim heads rank hidden block groups per_group features"
)


h, x = cem.state(dim), cem.context(dim)
i, j, a, r, b, s = (
    size.index(name) for size, name in zip((dim, dim, heads, rank, block, x), "ijarbs", strict=True)
)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)
SCORE = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
ATTENTION = {"h": "dim", "x": "seq dim", "Q": "heads rank dim", "K": "heads rank dim"}


def attention(score, sharpness=beta):
    """Minus the log-sum-exp over tokens of each head."""
    return cem.Energy(-Sum(cem.logsumexp(sharpness * score, s) / sharpness, a))


def own_block(h, x):
    """What a diagonal of each head's own block of coordinates adds to its score."""
    lam = cem.parameter("lam", heads, block)
    return Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)


def block_twin(turn=lambda vector, r, token: vector):
    h, x = cem.state(heads * block), cem.context(heads * block)
    Q, K = (cem.parameter(name, heads, rank, heads * block) for name in "QK")
    d = cem.index("d", heads * block)
    q, k = turn(Sum(Q[a, r, d] * h[d], d), r, h), turn(Sum(K[a, r, d] * x[s, d], d), r, s)
    return attention(Sum(q * k, r) + own_block(h, x))


def full_twin():
    lam = cem.parameter("lam", heads, dim)
    return attention(SCORE + Sum(lam[a, i] * h[i] * x[s, i], i))


def dense_twin():
    W = cem.parameter("W", heads, dim, dim)
    beta = cem.scalar("beta", default=dim**-0.5, positive=True)
    return attention(Sum(h[i] * W[a, i, j] * x[s, j], i, j), beta)


def diagonal_twin():
    h, x = cem.state(heads * block), cem.context(heads * block)
    return attention(own_block(h, x), cem.scalar("beta", default=1.0, positive=True))


def symmetric_twin():
    sigma = cem.parameter("sigma", heads, rank)
    return attention(Sum(sigma[a, r] * Sum(Q[a, r, i] * h[i], i) * Sum(Q[a, r, j] * x[s, j], j), r))


def symmetrised_twin():
    other = Sum(Sum(K[a, r, i] * h[i], i) * Sum(Q[a, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(cem.logsumexp(beta * (SCORE + other) / 2, s), a) / beta)


def shared(factor):
    Q, K = cem.parameter("Q", rank, dim), cem.parameter("K", rank, dim)
    return Sum(factor * Sum(Q[r, i] * h[i], i) * Sum(K[r, j] * x[s, j], j), r)


def collaborative_twin():
    return attention(shared(cem.parameter("sigma", heads, rank)[a, r]))


def tempered_twin():
    return attention(shared(1), beta * sympy.exp(cem.parameter("log_beta", heads)[a]))


def grouped_twin():
    Q = cem.parameter("Q", groups, per_group, rank, dim)
    K = cem.parameter("K", groups, rank, dim)
    g, o = groups.index("g"), per_group.index("o")
    score = Sum(Sum(Q[g, o, r, i] * h[i], i) * Sum(K[g, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), g, o) / beta)


@cem.energy(**ATTENTION, U="hidden dim", G="hidden dim")
def parallel_block_twin(h, x, *, Q, K, U, G, beta=rank**-0.5):
    score = torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    attention = -torch.logsumexp(beta * score, dim=-1).sum() / beta
    return attention - 0.5 * (F.silu(G @ h.detach()) * (U @ h).square()).sum()


def normalised_twin():
    log_beta = cem.parameter("log_beta", heads)
    beta = cem.scalar("beta", default=rank**0.5, positive=True)
    q, k = Sum(Q[a, r, i] * h[i], i), Sum(K[a, r, j] * x[s, j], j)
    lengths = sympy.sqrt(Sum(q**2, r)) * sympy.sqrt(Sum(k**2, r))
    return attention(Sum(q * k, r) / lengths, beta * sympy.exp(log_beta[a]))


def soft_capped_twin():
    cap = cem.scalar("cap", default=50.0, positive=True)
    return cem.Energy(-Sum(cem.logsumexp(cap * sympy.tanh(beta * SCORE / cap), s), a) / beta)


def alibi_twin():
    bias = cem.parameter("slope", heads)[a] * (cem.position(h) - cem.position(s))
    return cem.Energy(-Sum(cem.logsumexp(beta * SCORE - bias, s), a) / beta)


def sliding_window_twin():
    @cem.energy(**ATTENTION)
    def sliding_window(h, x, *, Q, K, position, context_position, beta=rank**-0.5):
        score = beta * torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
        return (
            -torch.logsumexp(score + cem.only(position - context_position < 128), -1).sum() / beta
        )

    return sliding_window


def sink_twin():
    b, L = cem.parameter("b", heads)[a], cem.logsumexp(beta * SCORE, s)
    return cem.Energy(-Sum(b + cem.softplus(L - b), a) / beta)


@cem.energy(**ATTENTION, bias="heads buckets")
def relative_twin(h, x, *, Q, K, bias, position, context_position, beta=rank**-0.5):
    score = beta * torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    score = score + cem.lookup(bias, cem.t5_bucket(position - context_position))
    return -torch.logsumexp(score, -1).sum() / beta


@cem.energy(**ATTENTION, xi="hidden dim")
def energy_transformer_twin(h, x, *, Q, K, xi, position, context_position, beta=rank**-0.5):
    score = beta * torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    ahead = position - context_position
    others = cem.only((ahead > 0) + (ahead < 0))
    attention = -torch.logsumexp(score + others, -1).sum() / beta
    return attention - 0.5 * torch.relu(xi @ h).square().sum()


def subspace_compression_twin():
    U = cem.parameter("U", heads, rank, dim)
    return attention(Sum(Sum(U[a, r, i] * h[i], i) * Sum(U[a, r, j] * x[s, j], j), r))


def gated_linear_attention_twin():
    G, bias = cem.parameter("G", heads, dim), cem.parameter("bias", heads)
    gate = -cem.softplus(-Sum(G[a, j] * x[s, j], j) - bias[a])
    return cem.Energy(-Sum(cem.decay(gate, s) * SCORE**2, a, s) / 2)


@cem.energy(**ATTENTION)
def rotary_twin(h, x, *, Q, K, position, context_position, beta=rank**-0.5):
    q = cem.rope(torch.einsum("ard,d->ar", Q, h), position)
    k = cem.rope(torch.einsum("ard,sd->asr", K, x), context_position)
    return -torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k), dim=-1).sum() / beta


UNTIED = ATTENTION | {"W": "heads copies dim", "V": "heads copies dim"}


def untied(h, x, Q, K, W, V, position, context_position, beta):
    """The energy whose query is held, and the keys."""
    q = cem.rope(torch.einsum("ard,d->ar", Q, h.detach()), position)
    k = cem.rope(torch.einsum("ard,sd->asr", K, x), context_position)
    moved = torch.einsum("acd,d->ac", W, h - h.detach())
    values = torch.einsum("ac,asc->as", moved, torch.einsum("acd,sd->asc", V, x))
    score = torch.einsum("ar,asr->as", q, k) + values
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta, k


@cem.energy(**UNTIED)
def untied_twin(h, x, *, Q, K, W, V, position, context_position, beta=rank**-0.5):
    return untied(h, x, Q, K, W, V, position, context_position, beta)[0]


@cem.energy(**UNTIED, w="heads")
def partly_tied_twin(h, x, *, Q, K, W, V, w, position, context_position, beta=rank**-0.5):
    held, k = untied(h, x, Q, K, W, V, position, context_position, beta)
    q = cem.rope(torch.einsum("ard,d->ar", Q, h), position)
    tied = torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k), dim=-1)
    return held - (w * tied).sum() / beta


@cem.energy(**ATTENTION, V="heads rank dim")
def loosely_tied_twin(h, x, *, Q, K, V, position, context_position, beta=rank**-0.5):
    held, moved = (
        cem.rope(torch.einsum("ard,d->ar", Q, z), position) for z in (h.detach(), h - h.detach())
    )
    k, v = (cem.rope(torch.einsum("ard,sd->asr", M, x), context_position) for M in (K, V))
    score = torch.einsum("ar,asr->as", held, k) + torch.einsum("ar,asr->as", moved, v)
    return -torch.logsumexp(beta * score, dim=-1).sum() / beta


TWINS = {
    "loosely_tied_interaction": loosely_tied_twin,
    "loosely_tied_gated": loosely_tied_gated_twin,
    "partly_tied_interaction": partly_tied_twin,
    "partly_tied_gated": partly_tied_gated_twin,
    "untied_interaction": untied_twin,
    "rotary_diagonal_plus_low_rank": block_twin(cem.rope),
    "interaction": attention(SCORE),
    "diagonal_plus_low_rank": block_twin(),
    "diagonal_plus_low_rank_full": full_twin(),
    "dense_interaction": dense_twin(),
    "diagonal_interaction": diagonal_twin(),
    "symmetric_interaction": symmetric_twin(),
    "symmetrised_interaction": symmetrised_twin(),
    "collaborative_interaction": collaborative_twin(),
    "tempered_interaction": tempered_twin(),
    "grouped_interaction": grouped_twin(),
    "gated": gated_twin(F.silu),
    "gated_silu": gated_twin(F.silu),
    "gated_gelu": gated_twin(F.gelu),
    "gated_relu": gated_twin(F.relu),
    "gated_sigmoid": gated_twin(F.sigmoid),
    "two_sided_gated": two_sided_gated_twin(cem.silu_antiderivative),
    "two_sided_gated_silu": two_sided_gated_twin(cem.silu_antiderivative),
    "two_sided_gated_gelu": two_sided_gated_twin(cem.gelu_antiderivative),
    "two_sided_gated_relu": two_sided_gated_twin(cem.relu_antiderivative),
    "two_sided_gated_sigmoid": two_sided_gated_twin(F.softplus),
    "plain": plain_twin(cem.relu_antiderivative),
    "plain_relu": plain_twin(cem.relu_antiderivative),
    "plain_gelu": plain_twin(cem.gelu_antiderivative),
    "plain_silu": plain_twin(cem.silu_antiderivative),
    "plain_softplus": plain_twin(cem.softplus_antiderivative),
    "token_parameters": token_parameters_twin(cem.gelu_antiderivative, frozen=True),
    "token_parameters_relu": token_parameters_twin(cem.relu_antiderivative, frozen=True),
    "consistent_token_parameters": token_parameters_twin(cem.gelu_antiderivative),
    "unnormalised_token_parameters": unnormalised_token_parameters_twin,
    "memory": memory_twin(),
    "mixture_of_experts": mixture_of_experts_twin(F.silu),
    "mixture_of_experts_silu": mixture_of_experts_twin(F.silu),
    "mixture_of_experts_relu": mixture_of_experts_twin(F.relu),
    "polynomial_memory": polynomial_memory_twin,
    "quadratic_well": quadratic_well_twin(),
    "sparse_coding": sparse_coding_twin(),
    "parallel_block": parallel_block_twin,
    "normalised_interaction": normalised_twin(),
    "soft_capped_interaction": soft_capped_twin(),
    "subspace_compression": subspace_compression_twin(),
    "sparsification": sparsification_twin(),
    "gated_linear_attention": gated_linear_attention_twin(),
    "squared_interaction": cem.Energy(-Sum(SCORE**2, a, s) / 2),
    "rotary_interaction": rotary_twin,
    "sparse_memory": sparse_memory_twin,
    "energy_transformer": energy_transformer_twin,
    "sink_interaction": sink_twin(),
    "relative_interaction": relative_twin,
    "sliding_window_interaction": sliding_window_twin(),
    "alibi_interaction": alibi_twin(),
}


def derive(energy, **options):
    """The layer at small odd sizes in float64, with every parameter drawn, and states for it."""
    sizes = sizes_of(energy, SIZES | {"block": SIZES["dim"] // SIZES["heads"]})
    sizes["dim"] = SIZES["dim"]
    layer = cem.derive(energy, dtype=torch.float64, **sizes, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4, generator=generator)
    h = torch.randn(7, SIZES["dim"], dtype=torch.float64, generator=generator)  # (T, D)
    return layer, h
