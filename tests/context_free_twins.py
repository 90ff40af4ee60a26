"""Twins of the energies without a context: each in the pen that the gallery does not use."""

import sympy
import torch
from sympy import Sum
from torch.nn import functional as F

import cem

dim, rank, hidden, features, tokens = cem.dims("dim rank hidden features tokens")
h = cem.state(dim)
i, j, r = dim.index("i"), dim.index("j"), rank.index("r")
GATED = {"h": "dim", "U": "hidden dim", "G": "hidden dim"}


def gated_twin(activation):
    @cem.energy(**GATED)
    def gated(h, *, U, G):
        gate = activation(G @ h.detach())
        return -0.5 * (gate * (U @ h).square()).sum()

    return gated


def two_sided_gated_twin(F):
    @cem.energy(**GATED)
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


def memory_twin():
    U, m = cem.parameter("U", hidden, dim), hidden.index("m")
    beta = cem.scalar("beta", default=dim**-0.5, positive=True)
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


def sparsification_twin():
    D = cem.parameter("D", dim, dim)
    missing = cem.frozen(h)[j] - Sum(D[j, i] * h[i], i)
    return cem.Energy(Sum(missing**2, j) / 2)


@cem.energy(**GATED, w="hidden")
def loosely_tied_gated_twin(h, *, U, G, w):
    return -(w * F.silu(G @ h.detach()) * (U @ h) ** 2).sum() / 2


@cem.energy(**GATED, D="hidden dim", w="hidden")
def partly_tied_gated_twin(h, *, U, G, D, w):
    force = (U @ h.detach()) * (D @ h) + w * (U @ h) ** 2 / 2
    return -(F.silu(G @ h.detach()) * force).sum()
