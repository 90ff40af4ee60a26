"""Every energy of the gallery: its layer at small sizes, and its twin in the pen it does not use."""

import sympy
import torch
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

dim, heads, rank, hidden, block, groups, per_group, features, tokens = cem.dims(
    "dim heads rank hidden block groups per_group features tokens"
)


# -- twins: torch pen of what the gallery writes in SymPy ----------------------------------------


def gated_twin(activation):
    @cem.energy(h="dim", U="hidden dim", G="hidden dim")
    def gated(h, *, U, G):
        gate = activation(G @ h.detach())
        return -0.5 * (gate * (U @ h).square()).sum()

    return gated


def two_sided_gated_twin(F):
    @cem.energy(h="dim", U="hidden dim", G="hidden dim")
    def two_sided_gated(h, *, U, G):
        return -(F(torch.einsum("md,d->m", G, h)) * torch.mv(U, h)).sum()

    return two_sided_gated


def plain_twin(F):
    @cem.energy(h="dim", U="hidden dim")
    def plain(h, *, U):
        return -F(torch.nn.functional.linear(h, U)).sum()

    return plain


def token_parameters_twin(F, frozen=False):
    @cem.energy(h="dim", K="tokens dim")
    def token_parameters(h, *, K, scale=tokens**0.5, eps=1e-12):
        squares = (K @ (h.detach() if frozen else h)).square().sum()
        r = torch.sqrt(squares + eps)
        z = F(scale * (K @ h) / r)
        return -r / scale * (z if frozen else z + 0.25).sum()  # F(0) = -1/4 for gelu

    return token_parameters


@cem.energy(h="dim", K="tokens dim", gain="tokens")
def unnormalised_token_parameters_twin(h, *, K, gain):
    return -torch.dot(gain, cem.gelu_antiderivative(K @ h))


# -- twins: symbolic pen of what the gallery writes in torch -------------------------------------


def attention_twin(h, x, *, diagonal=None):
    """The interaction energy; ``diagonal(a, s)`` is a further term of its score."""
    width = h.shape[0]
    Q, K = cem.parameter("Q", heads, rank, width), cem.parameter("K", heads, rank, width)
    beta = cem.scalar("beta", default=rank**-0.5, positive=True)
    i, j, a, r, s = h.index("i"), h.index("j"), heads.index("a"), rank.index("r"), x.index("s")
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    if diagonal is not None:
        score += diagonal(a, s)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def interaction_twin():
    return attention_twin(cem.state(dim), cem.context(dim))


def block_twin():
    h, x = cem.state(heads * block), cem.context(heads * block)
    lam, b = cem.parameter("lam", heads, block), block.index("b")

    def diagonal(a, s):
        return Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)

    return attention_twin(h, x, diagonal=diagonal)


def rotary_block_twin():
    h, x = cem.state(heads * block), cem.context(heads * block)
    width = heads * block
    Q, K = cem.parameter("Q", heads, rank, width), cem.parameter("K", heads, rank, width)
    lam, b = cem.parameter("lam", heads, block), block.index("b")
    beta = cem.scalar("beta", default=rank**-0.5, positive=True)
    i, s = cem.index("i", width), x.index("s")
    q = cem.rope(Sum(Q[a, r, i] * h[i], i), r, h)
    k = cem.rope(Sum(K[a, r, i] * x[s, i], i), r, s)
    own = Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)
    return cem.Energy(-Sum(cem.logsumexp(beta * (Sum(q * k, r) + own), s), a) / beta)


def full_twin():
    h, x = cem.state(dim), cem.context(dim)
    lam, i = cem.parameter("lam", heads, dim), dim.index("i")
    return attention_twin(h, x, diagonal=lambda a, s: Sum(lam[a, i] * h[i] * x[s, i], i))


h, x = cem.state(dim), cem.context(dim)
i, j, a, r, b, s = (
    size.index(name) for size, name in zip((dim, dim, heads, rank, block, x), "ijarbs", strict=True)
)
beta = cem.scalar("beta", default=rank**-0.5, positive=True)


SCORE = Sum(
    Sum(cem.parameter("Q", heads, rank, dim)[a, r, i] * h[i], i)
    * Sum(cem.parameter("K", heads, rank, dim)[a, r, j] * x[s, j], j),
    r,
)


def dense_twin():
    W = cem.parameter("W", heads, dim, dim)
    beta = cem.scalar("beta", default=dim**-0.5, positive=True)
    score = Sum(h[i] * W[a, i, j] * x[s, j], i, j)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def diagonal_twin():
    h, x, lam = (
        cem.state(heads * block),
        cem.context(heads * block),
        cem.parameter("lam", heads, block),
    )
    beta = cem.scalar("beta", default=1.0, positive=True)
    score = Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def symmetric_twin():
    Q, sigma = cem.parameter("Q", heads, rank, dim), cem.parameter("sigma", heads, rank)
    score = Sum(sigma[a, r] * Sum(Q[a, r, i] * h[i], i) * Sum(Q[a, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def symmetrised_twin():
    Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
    score = sum(
        Sum(Sum(read[a, r, i] * h[i], i) * Sum(key[a, r, j] * x[s, j], j), r)
        for read, key in ((Q, K), (K, Q))
    )
    return cem.Energy(-Sum(cem.logsumexp(beta * score / 2, s), a) / beta)


def shared(factor):
    Q, K = cem.parameter("Q", rank, dim), cem.parameter("K", rank, dim)
    return Sum(factor * Sum(Q[r, i] * h[i], i) * Sum(K[r, j] * x[s, j], j), r)


def collaborative_twin():
    score = shared(cem.parameter("sigma", heads, rank)[a, r])
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def tempered_twin():
    sharpness = beta * sympy.exp(cem.parameter("log_beta", heads)[a])
    return cem.Energy(-Sum(cem.logsumexp(sharpness * shared(1), s) / sharpness, a))


def grouped_twin():
    Q = cem.parameter("Q", groups, per_group, rank, dim)
    K = cem.parameter("K", groups, rank, dim)
    g, o = groups.index("g"), per_group.index("o")
    score = Sum(Sum(Q[g, o, r, i] * h[i], i) * Sum(K[g, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), g, o) / beta)


def memory_twin():
    h, U = cem.state(dim), cem.parameter("U", hidden, dim)
    beta = cem.scalar("beta", default=dim**-0.5, positive=True)
    i, m = dim.index("i"), hidden.index("m")
    partition = Sum(sympy.exp(beta * Sum(U[m, i] * h[i], i)), m)
    return cem.Energy(Sum(h[i] ** 2, i) / 2 - sympy.log(partition) / beta)


@cem.energy(h="dim", U="hidden dim")
def sparse_memory_twin(h, *, U, beta=dim**-0.5):
    return 0.5 * (h * h).sum() - cem.entmax_conjugate(beta * U @ h, -1) / beta


def mixture_of_experts_twin(activation):
    @cem.energy(h="dim", U="experts hidden dim", G="experts hidden dim")
    def mixture_of_experts(h, *, U, G, beta=hidden**-0.5):
        gate = activation(torch.einsum("emd,d->em", G, h.detach()))
        value = 0.5 * (gate * torch.einsum("emd,d->em", U, h).square()).sum(-1)
        return -torch.logsumexp(beta * value, dim=0) / beta

    return mixture_of_experts


@cem.energy(h="dim", U="hidden dim")
def polynomial_memory_twin(h, *, U):
    return -torch.relu(U @ h).pow(3).sum() / 3


def quadratic_well_twin():
    W, b = cem.parameter("W", rank, dim), cem.parameter("b", dim)
    return cem.Energy(Sum(Sum(W[r, i] * (h[i] - b[i]), i) ** 2, r) / 2)


def sparse_coding_twin():
    D, A = cem.parameter("D", features, dim), cem.parameter("A", features, dim)
    f = features.index("f")
    missing = Sum(A[f, i] * cem.frozen(h)[i], i) - Sum(D[f, i] * h[i], i)
    return cem.Energy(Sum(missing**2, f) / 2)


@cem.energy(
    h="dim",
    x="seq dim",
    Q="heads rank dim",
    K="heads rank dim",
    U="hidden dim",
    G="hidden dim",
)
def parallel_block_twin(h, x, *, Q, K, U, G, beta=rank**-0.5):
    score = torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    attention = -torch.logsumexp(beta * score, dim=-1).sum() / beta
    return attention - 0.5 * (F.silu(G @ h.detach()) * (U @ h).square()).sum()


def normalised_twin():
    Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
    log_beta = cem.parameter("log_beta", heads)
    beta = cem.scalar("beta", default=rank**0.5, positive=True)
    q, k = Sum(Q[a, r, i] * h[i], i), Sum(K[a, r, j] * x[s, j], j)
    lengths = sympy.sqrt(Sum(q**2, r)) * sympy.sqrt(Sum(k**2, r))
    sharpness = beta * sympy.exp(log_beta[a])
    return cem.Energy(-Sum(cem.logsumexp(sharpness * Sum(q * k, r) / lengths, s) / sharpness, a))


def soft_capped_twin():
    Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
    cap = cem.scalar("cap", default=50.0, positive=True)
    score = beta * Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(cem.logsumexp(cap * sympy.tanh(score / cap), s), a) / beta)


def alibi_twin():
    bias = cem.parameter("slope", heads)[a] * (cem.position(h) - cem.position(s))
    return cem.Energy(-Sum(cem.logsumexp(beta * SCORE - bias, s), a) / beta)


def sliding_window_twin():
    @cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
    def sliding_window(h, x, *, Q, K, position, context_position, beta=rank**-0.5):
        score = beta * torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
        return (
            -torch.logsumexp(score + cem.only(position - context_position < 128), -1).sum() / beta
        )

    return sliding_window


def sink_twin():
    b, L = cem.parameter("b", heads)[a], cem.logsumexp(beta * SCORE, s)
    return cem.Energy(-Sum(b + cem.softplus(L - b), a) / beta)


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", bias="heads buckets")
def relative_twin(h, x, *, Q, K, bias, position, context_position, beta=rank**-0.5):
    score = beta * torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    score = score + cem.lookup(bias, cem.t5_bucket(position - context_position))
    return -torch.logsumexp(score, -1).sum() / beta


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim", xi="hidden dim")
def energy_transformer_twin(h, x, *, Q, K, xi, position, context_position, beta=rank**-0.5):
    score = beta * torch.einsum("ard,d,arj,sj->as", Q, h, K, x)
    ahead = position - context_position
    others = cem.only((ahead > 0) + (ahead < 0))
    attention = -torch.logsumexp(score + others, -1).sum() / beta
    return attention - 0.5 * torch.relu(xi @ h).square().sum()


def subspace_compression_twin():
    U = cem.parameter("U", heads, rank, dim)
    score = Sum(Sum(U[a, r, i] * h[i], i) * Sum(U[a, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(cem.logsumexp(beta * score, s), a) / beta)


def sparsification_twin():
    D = cem.parameter("D", dim, dim)
    missing = cem.frozen(h)[j] - Sum(D[j, i] * h[i], i)
    return cem.Energy(Sum(missing**2, j) / 2)


def squared_interaction_twin():
    Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    return cem.Energy(-Sum(score**2, a, s) / 2)


def gated_linear_attention_twin():
    h, x = cem.state(dim), cem.context(dim)
    Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
    G, bias = cem.parameter("G", heads, dim), cem.parameter("bias", heads)
    i, j, a, r = dim.index("i"), dim.index("j"), heads.index("a"), rank.index("r")
    s = x.index("s")
    q, k = Sum(Q[a, r, i] * h[i], i), Sum(K[a, r, j] * x[s, j], j)
    gate = -cem.softplus(-Sum(G[a, j] * x[s, j], j) - bias[a])
    return cem.Energy(-Sum(cem.decay(gate, s) * Sum(q * k, r) ** 2, a, s) / 2)


@cem.energy(h="dim", x="seq dim", Q="heads rank dim", K="heads rank dim")
def rotary_twin(h, x, *, Q, K, position, context_position, beta=rank**-0.5):
    q = cem.rope(torch.einsum("ard,d->ar", Q, h), position)
    k = cem.rope(torch.einsum("ard,sd->asr", K, x), context_position)
    return -torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k), dim=-1).sum() / beta


UNTIED = {
    "h": "dim",
    "x": "seq dim",
    "Q": "heads rank dim",
    "K": "heads rank dim",
    "W": "heads copies dim",
    "V": "heads copies dim",
}


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


@cem.energy(h="dim", U="hidden dim", G="hidden dim", D="hidden dim", w="hidden")
def partly_tied_gated_twin(h, *, U, G, D, w):
    force = (U @ h.detach()) * (D @ h) + w * (U @ h) ** 2 / 2
    return -(F.silu(G @ h.detach()) * force).sum()


TWINS = {
    "partly_tied_interaction": partly_tied_twin,
    "partly_tied_gated": partly_tied_gated_twin,
    "untied_interaction": untied_twin,
    "rotary_diagonal_plus_low_rank": rotary_block_twin(),
    "interaction": interaction_twin(),
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
    "squared_interaction": squared_interaction_twin(),
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
