"""The torch pen: every spelling gives the symbolic pen's expression and the number of torch."""

import math
from functools import partial
from itertools import product

import pytest
import sympy
import torch
from sympy import Integer, Rational, Sum, exp, log, sqrt
from torch import nn
from torch.nn import functional as F

from cem.language import words
from cem.language.canonical import canonical
from cem.language.reductions import LogSumExp, Softmax, logsumexp
from cem.language.symbols import (
    SEQ,
    Dim,
    Frozen,
    context,
    dims,
    frozen,
    index,
    parameter,
    scalar,
    size_of,
    state,
)
from cem.language.tracing import Untranslatable, signature, translate

SIZES = {"dim": 5, "seq": 7, "heads": 2, "rank": 3, "hidden": 9, "block": 3, "one": 1}

dim, heads, rank, hidden, block = dims("dim heads rank hidden block")
h, x = state(dim), context(dim)
Q, K = parameter("Q", heads, rank, dim), parameter("K", heads, rank, dim)
U, V, W = parameter("U", hidden, dim), parameter("V", hidden, dim), parameter("W", dim, dim)
b, lam, A = parameter("b", hidden), parameter("lam", heads), parameter("A", heads, rank)
beta = scalar("beta", default=1.5, positive=True)
i, j, a, r, m, s = (
    size.index(name)
    for size, name in zip((dim, dim, heads, rank, hidden, SEQ), "ijarms", strict=True)
)
SHAPES = {
    "h": "dim",
    "x": "seq dim",
    "Q": "heads rank dim",
    "K": "heads rank dim",
    "U": "hidden dim",
    "V": "hidden dim",
    "W": "dim dim",
    "b": "hidden",
    "lam": "heads",
    "A": "heads rank",
}

ERF = math.erf
FUNCTIONS = {
    "exp": math.exp,
    "log": math.log,
    "Abs": abs,
    "sign": lambda z: (z > 0) - (z < 0),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "relu": lambda z: max(z, 0.0),
    "step": lambda z: float(z > 0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * (1 + ERF(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "normal_cdf": lambda z: (1 + ERF(z / math.sqrt(2))) / 2,
    "log_cosh": lambda z: math.log(math.cosh(z)),
    "relu_antiderivative": lambda z: max(z, 0.0) ** 2 / 2,
}


def size(expression):
    return int(expression.subs({Dim(name): value for name, value in SIZES.items()}))


def evaluate(node, values, at=None):
    """The number that an expression stands for, by loops over its indices."""
    at = at or {}
    again = partial(evaluate, values=values)
    match node:
        case sympy.Idx():
            return at[node]
        case sympy.Indexed():
            place = tuple(int(again(slot, at=at)) for slot in node.indices)
            return values[str(node.base)][place].item()
        case Sum():
            names = [limit[0] for limit in node.limits]
            ranges = product(*(range(size(size_of(name))) for name in names))
            return math.fsum(
                again(node.function, at=at | dict(zip(names, place, strict=True)))
                for place in ranges
            )
        case LogSumExp():
            terms = [
                again(node.body, at=at | {node.index: n}) for n in range(size(size_of(node.index)))
            ]
            return math.log(math.fsum(map(math.exp, terms)))
        case Softmax():
            terms = [
                again(node.body, at=at | {node.index: n}) for n in range(size(size_of(node.index)))
            ]
            return math.exp(again(node.body, at=at)) / math.fsum(map(math.exp, terms))
        case sympy.Add():
            return math.fsum(again(arg, at=at) for arg in node.args)
        case sympy.Mul():
            return math.prod(again(arg, at=at) for arg in node.args)
        case sympy.Pow():
            return again(node.base, at=at) ** again(node.exp, at=at)
        case Dim():
            return SIZES[node.name]
        case sympy.Symbol():
            return values[node.name]
    if node.is_number and not node.args:
        return float(node)
    (argument,) = node.args
    return FUNCTIONS[type(node).__name__](again(argument, at=at))


def declared(function, shapes=None):
    """The shapes that a callable needs, out of the table above."""
    names = function.__code__.co_varnames[
        : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
    ]
    return {name: text for name, text in (SHAPES | (shapes or {})).items() if name in names}


def inputs(function, shapes, **scalars):
    """Random float64 tensors of the declared shapes and the default values of the scalars."""
    generator = torch.Generator().manual_seed(0)
    found = signature(function, shapes)
    bases = [found.state, *([found.context] if found.context else []), *found.parameters]
    tensors = {
        str(base): torch.randn(*map(size, base.shape), generator=generator, dtype=torch.float64)
        for base in bases
    }
    tensors |= {one.name: float(one.default.subs(SIZES)) for one in found.scalars}
    return found, tensors


def assert_same_number(function, shapes=None):
    shapes = declared(function, shapes)
    translation = translate(function, shapes)
    found, tensors = inputs(function, shapes)
    state_and_context = [
        tensors[str(base)] for base in (found.state, found.context) if base is not None
    ]
    named = {name: tensors[name] for name in map(str, (*found.parameters, *found.scalars))}
    if found.frozen:
        named["frozen"] = tensors["h"]
    got = evaluate(translation.expression, tensors | {"hbar": tensors["h"]})
    expected = float(function(*state_and_context, **named))
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    return translation


def word(function):
    """One word of the entries of U h, summed."""
    return Sum(function(Sum(U[m, i] * h[i], i)), m)


square = Sum(h[i] ** 2, i)
matrix = Sum(Sum(U[m, i] * h[i], i) ** 2, m)
scores = Sum(Sum(h[i] * x[s, i], i), s)
bilinear = Sum(Sum(W[i, j] * h[j], j) * h[i], i)

SAME = {
    "dot": (
        square,
        lambda h: h @ h,
        lambda h: torch.dot(h, h),
        lambda h: h.dot(h),
        lambda h: torch.inner(h, h),
        lambda h: torch.vdot(h, h),
        lambda h: torch.linalg.vecdot(h, h),
        lambda h: torch.tensordot(h, h, dims=1),
        lambda h: torch.einsum("i,i->", h, h),
        lambda h: torch.einsum("i,i", h, h),
        lambda h: torch.einsum("i, i ->", [h, h]),
        lambda h: torch.einsum(h, [0], h, [0], []),
        lambda h: (h * h).sum(),
        lambda h: (h**2).sum(),
        lambda h: h.pow(2).sum(-1),
        lambda h: torch.pow(h, 2.0).sum(dim=0),
        lambda h: h.square().sum(),
        lambda h: torch.sum(torch.square(h), dim=0),
        lambda h: torch.sum(input=h * h, axis=0),
        lambda h: torch.mul(h, h).sum((0,)),
        lambda h: torch.multiply(h, h).sum(),
        lambda h: h.mul(h).sum(),
        lambda h: torch.outer(h, h).trace(),
        lambda h: torch.outer(h, h).diagonal().sum(),
        lambda h: h.norm() ** 2,
        lambda h: torch.norm(h).square(),
        lambda h: torch.linalg.norm(h, ord=2) ** 2,
        lambda h: torch.linalg.vector_norm(h, dim=-1) ** 2,
    ),
    "norm": (
        sqrt(square),
        lambda h: h.norm(),
        lambda h: torch.norm(h, p=2, dim=-1),
        lambda h: torch.norm(h, p="fro"),
        lambda h: torch.linalg.norm(h),
        lambda h: torch.linalg.vector_norm(h, ord=2),
        lambda h: h.norm(dim=0, keepdim=True).squeeze(0),
        lambda h: h.square().sum().sqrt(),
        lambda h: torch.sqrt(h @ h),
    ),
    "one_norm": (
        Sum(sympy.Abs(h[i]), i),
        lambda h: h.abs().sum(),
        lambda h: torch.abs(h).sum(),
        lambda h: abs(h).sum(),
        lambda h: h.norm(p=1),
        lambda h: torch.linalg.vector_norm(h, 1),
        lambda h: torch.linalg.norm(h, 1),
    ),
    "matrix": (
        matrix,
        lambda h, *, U: (U @ h).square().sum(),
        lambda h, *, U: torch.matmul(U, h).square().sum(),
        lambda h, *, U: U.matmul(h).square().sum(),
        lambda h, *, U: torch.mv(U, h).square().sum(),
        lambda h, *, U: U.mv(h).square().sum(),
        lambda h, *, U: F.linear(h, U).square().sum(),
        lambda h, *, U: (h @ U.T).square().sum(),
        lambda h, *, U: (h @ U.t()).square().sum(),
        lambda h, *, U: (h @ U.mT).square().sum(),
        lambda h, *, U: (h @ U.transpose(0, 1)).square().sum(),
        lambda h, *, U: (h @ U.transpose(-1, -2)).square().sum(),
        lambda h, *, U: (h @ torch.swapaxes(U, 0, 1)).square().sum(),
        lambda h, *, U: (h @ U.permute(1, 0)).square().sum(),
        lambda h, *, U: (h @ torch.permute(U, (1, 0))).square().sum(),
        lambda h, *, U: (h @ U.movedim(0, 1)).square().sum(),
        lambda h, *, U: torch.einsum("md,d->m", U, h).square().sum(),
        lambda h, *, U: torch.einsum("...d,d->...", U, h).square().sum(),
        lambda h, *, U: torch.einsum("ij,j", U, h).square().sum(),
        lambda h, *, U: torch.einsum(U, [0, 1], h, [1], [0]).square().sum(),
        lambda h, *, U: (U * h).sum(-1).square().sum(),
        lambda h, *, U: (U * h[None]).sum(1).square().sum(),
        lambda h, *, U: (U * h[None, :]).sum(1).square().sum(),
        lambda h, *, U: (U * h.unsqueeze(0)).sum(1, keepdim=True).square().sum(),
        lambda h, *, U: (U @ h[:, None]).squeeze(-1).square().sum(),
        lambda h, *, U: (U @ h[..., None])[..., 0].square().sum(),
        lambda h, *, U: torch.mm(U, h[:, None]).square().sum(),
        lambda h, *, U: torch.bmm(U[None], h[None, :, None]).square().sum(),
        lambda h, *, U: torch.tensordot(U, h, dims=([1], [0])).square().sum(),
        lambda h, *, U: torch.inner(U, h).square().sum(),
        lambda h, *, U: torch.addmv(torch.zeros_like(U @ h), U, h).square().sum(),
        lambda h, *, U: torch.linalg.norm(U @ h) ** 2,
        lambda h, *, U: (U * h.expand_as(U)).sum(1).square().sum(),
        lambda h, *, U: (U * h.expand(U.shape[0], -1)).sum(1).square().sum(),
        lambda h, *, U: (U * h.broadcast_to(U.shape)).sum(1).square().sum(),
        lambda h, *, U: (U * torch.broadcast_to(h, (U.size(0), U.size(1)))).sum(1).square().sum(),
        lambda h, *, U: (U.contiguous() @ h.clone().to(U.dtype).type_as(U)).double().square().sum(),
        lambda h, *, U: (U @ h.to(torch.float64).to(device="cpu")).square().sum(),
    ),
    "bias": (
        Sum(words.relu(b[m] + Sum(U[m, i] * h[i], i)), m),
        lambda h, *, U, b: torch.relu(U @ h + b).sum(),
        lambda h, *, U, b: F.relu(F.linear(h, U, b)).sum(),
        lambda h, *, U, b: F.linear(h, U, bias=b).relu().sum(),
        lambda h, *, U, b: (U @ h).add(b).clamp(min=0).sum(),
        lambda h, *, U, b: torch.clamp(torch.add(U @ h, b), min=0.0).sum(),
        lambda h, *, U, b: torch.addmv(b, U, h).clamp_min(0).sum(),
        lambda h, *, U, b: torch.maximum(U @ h + b, torch.zeros_like(b)).sum(),
        lambda h, *, U, b: torch.maximum(torch.tensor(0.0), U @ h + b).sum(),
        lambda h, *, U, b: nn.ReLU()(U @ h + b).sum(),
        lambda h, *, U, b: words.relu(U @ h + b).sum(),
    ),
    "affine": (
        Sum(2 * Sum(U[m, i] * h[i], i) - b[m] / 2, m),
        lambda h, *, U, b: (2 * (U @ h) - b / 2).sum(),
        lambda h, *, U, b: (2.0 * (U @ h) - 0.5 * b).sum(),
        lambda h, *, U, b: torch.sub(2 * (U @ h), b, alpha=0.5).sum(),
        lambda h, *, U, b: torch.add(torch.div(-b, 2), U @ h, alpha=2).sum(),
        lambda h, *, U, b: (U @ h).mul(2).sub(b.div(2)).sum(),
        lambda h, *, U, b: torch.rsub(b / 2, 2 * (U @ h)).sum(),
        lambda h, *, U, b: -(torch.true_divide(b, 2) - 2 * (U @ h)).sum(),
        lambda h, *, U, b: torch.neg(torch.subtract(b.divide(2), (U @ h).multiply(2))).sum(),
        lambda h, *, U, b: torch.addmv(b, U, h, beta=-0.5, alpha=2).sum(),
        lambda h, *, U, b: torch.lerp(b, U @ h, 2.0).add(b.mul(0.5)).sum(),
    ),
    "scores": (
        scores,
        lambda h, x: (x @ h).sum(),
        lambda h, x: torch.einsum("sd,d->s", x, h).sum(),
        lambda h, x: torch.einsum("sd,d->", x, h),
        lambda h, x: x.mul(h).sum(),
        lambda h, x: x.mul(h).sum(dim=(0, 1)),
        lambda h, x: x.mul(h).sum(dim=-1).sum(dim=0),
        lambda h, x: x.shape[0] * (x @ h).mean(),
        lambda h, x: (x @ h).mean(0) * x.size(0),
    ),
    "bilinear": (
        bilinear,
        lambda h, *, W: h @ (W @ h),
        lambda h, *, W: torch.dot(h, torch.einsum("ij,j->i", W, h)),
        lambda h, *, W: (h * F.linear(h, W)).sum(),
    ),
    "trace": (
        Sum(W[i, i] * h[i], i),
        lambda h, *, W: torch.einsum("ii,i->", W, h),
        lambda h, *, W: torch.diagonal(W) @ h,
        lambda h, *, W: (W.diagonal() * h).sum(),
    ),
    "logsumexp": (
        LogSumExp(Sum(h[i] * x[s, i], i), s),
        lambda h, x: torch.logsumexp(x @ h, dim=0),
        lambda h, x: torch.logsumexp(x @ h, 0),
        lambda h, x: (x @ h).logsumexp(-1),
        lambda h, x: torch.special.logsumexp(x @ h, dim=(0,)),
        lambda h, x: (x @ h).exp().sum().log(),
        lambda h, x: torch.log(torch.exp(x @ h).sum(0)),
    ),
    "mean": (
        Sum(Sum(h[i] * x[s, i], i) ** 2, s) / SEQ,
        lambda h, x: (x @ h).square().mean(),
        lambda h, x: torch.mean((x @ h) ** 2, dim=0),
        lambda h, x: (x @ h).square().sum() / x.shape[0],
        lambda h, x: ((x @ h) / math.sqrt(x.shape[0])).square().sum(),
    ),
    "softmax": (
        Sum(Softmax(Sum(h[i] * x[s, i], i), s) * Sum(h[i] * x[s, i], i), s),
        lambda h, x: torch.softmax(x @ h, dim=0) @ (x @ h),
        lambda h, x: (x @ h).softmax(-1) @ (x @ h),
        lambda h, x: F.softmax(x @ h, dim=-1) @ (x @ h),
        lambda h, x: torch.special.softmax(x @ h, dim=0) @ (x @ h),
        lambda h, x: nn.Softmax(dim=-1)(x @ h) @ (x @ h),
    ),
    "log_softmax": (
        Sum(Sum(h[i] * x[s, i], i) - LogSumExp(Sum(h[i] * x[s, i], i), s), s),
        lambda h, x: torch.log_softmax(x @ h, dim=0).sum(),
        lambda h, x: (x @ h).log_softmax(-1).sum(),
        lambda h, x: F.log_softmax(x @ h, dim=-1).sum(),
        lambda h, x: torch.special.log_softmax(x @ h, dim=-1).sum(),
    ),
    "variance": (
        Sum((h[i] - Sum(h[j], j) / dim) ** 2, i) / dim,
        lambda h: h.var(unbiased=False),
        lambda h: h.var(False),
        lambda h: torch.var(h, dim=-1, correction=0),
        lambda h: torch.std(h, 0, unbiased=False) ** 2,
        lambda h: (h - h.mean()).square().mean(),
        lambda h: (h - h.mean(-1, keepdim=True)).square().mean(dim=-1),
        lambda h: h.var() * (h.shape[0] - 1) / h.numel(),
    ),
    "gated": (
        -Sum(words.silu(Sum(V[m, i] * frozen(h)[i], i)) * Sum(U[m, i] * h[i], i) ** 2, m) / 2,
        lambda h, *, U, V: -0.5 * (F.silu(V @ h.detach()) * (U @ h).square()).sum(),
        lambda h, *, U, V: -0.5 * (F.silu(V @ frozen(h)) * (U @ h) ** 2).sum(),
        lambda h, *, U, V: -(words.silu((V @ h).detach()) * (U @ h) ** 2).sum() / 2,
        lambda h, *, U, V: -(F.silu(V @ h.data) * (U @ h) ** 2).sum() / 2,
        lambda h, *, U, V, frozen: -(F.silu(V @ frozen) * (U @ h) ** 2).sum() / 2,
    ),
    "scaled": (
        Sum(h[i] * beta, i) / sqrt(rank) * Sum(A[a, r], a, r),
        lambda h, *, A, beta=1.5: beta * h.sum() / A.shape[1] ** 0.5 * A.sum(),
        lambda h, *, A, beta=1.5: beta * h.sum() * A.shape[-1] ** -0.5 * A.sum(),
        lambda h, *, A, beta=1.5: beta * h.sum() * torch.mul(A.sum(), math.sqrt(1 / A.size(-1))),
        lambda h, *, A, beta=1.5: (h.sum() * torch.sum(A)).mul(beta).div(math.sqrt(A.size()[1])),
        lambda h, *, A, beta=1.5: h.sum() * A.sum() / math.sqrt(A.numel() // A.shape[0]) * beta,
    ),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, (_, *spellings) in SAME.items() for place in range(len(spellings))],
)
def test_spelling_gives_the_expression_of_the_symbolic_pen(name, place):
    expected, function = SAME[name][0], SAME[name][place + 1]
    translation = assert_same_number(function)
    assert translation.expression == canonical(expected)


ELEMENTWISE = {
    "exp": (exp, torch.exp, lambda z: z.exp()),
    "expm1": (lambda z: exp(z) - 1, torch.expm1, lambda z: z.expm1(), torch.special.expm1),
    "log1p": (lambda z: log(1 + z**2), lambda z: torch.log1p(z * z), lambda z: (z * z).log1p()),
    "log": (lambda z: log(1 + z**2), lambda z: torch.log(z**2 + 1), lambda z: (1 + z**2).log()),
    "log2": (lambda z: log(1 + z**2) / log(2), lambda z: torch.log2(1 + z * z)),
    "exp2": (lambda z: 2**z, torch.exp2, lambda z: 2**z, lambda z: 2.0**z, torch.special.exp2),
    "abs": (sympy.Abs, abs, torch.abs, lambda z: z.abs(), torch.absolute),
    "sign": (sympy.sign, torch.sign, lambda z: z.sign(), torch.sgn),
    "sin": (sympy.sin, torch.sin, lambda z: z.sin()),
    "cos": (sympy.cos, torch.cos, lambda z: z.cos()),
    "cosh": (lambda z: (exp(z) + exp(-z)) / 2, torch.cosh),
    "sinh": (lambda z: (exp(z) - exp(-z)) / 2, torch.sinh),
    "tanh": (sympy.tanh, torch.tanh, lambda z: z.tanh(), F.tanh, nn.Tanh()),
    "sqrt": (
        lambda z: sqrt(1 + z**2),
        lambda z: torch.sqrt(1 + z * z),
        lambda z: (z**2 + 1) ** 0.5,
    ),
    "rsqrt": (
        lambda z: 1 / sqrt(1 + z**2),
        lambda z: torch.rsqrt(1 + z * z),
        lambda z: 1 / torch.sqrt(1 + z * z),
        lambda z: (1 + z * z) ** -0.5,
    ),
    "reciprocal": (
        lambda z: 1 / (1 + z**2),
        lambda z: torch.reciprocal(1 + z * z),
        lambda z: 1 / (1 + z * z),
        lambda z: (1 + z * z).reciprocal(),
        lambda z: torch.pow(1 + z * z, -1),
    ),
    "relu": (
        words.relu,
        torch.relu,
        F.relu,
        lambda z: z.relu(),
        nn.ReLU(),
        words.relu,
        lambda z: z.clamp(min=0),
        lambda z: z.clip(0),
        lambda z: torch.maximum(z, torch.zeros_like(z)),
        lambda z: -torch.minimum(-z, torch.tensor(0.0)),
        lambda z: -(-z).clamp_max(0),
    ),
    "leaky_relu": (
        lambda z: z / 8 + words.relu(z) * Rational(7, 8),
        lambda z: F.leaky_relu(z, 0.125),
        nn.LeakyReLU(0.125),
    ),
    "step": (words.step, words.step, lambda z: (z > 0).to(z.dtype), lambda z: (0 < z).double()),
    "sigmoid": (
        words.sigmoid,
        torch.sigmoid,
        F.sigmoid,
        lambda z: z.sigmoid(),
        torch.special.expit,
        words.sigmoid,
    ),
    "logsigmoid": (lambda z: -words.softplus(-z), F.logsigmoid, nn.LogSigmoid()),
    "softplus": (
        words.softplus,
        F.softplus,
        nn.Softplus(),
        words.softplus,
        lambda z: F.softplus(z, beta=1),
    ),
    "softplus_beta": (
        lambda z: words.softplus(2 * z) / 2,
        lambda z: F.softplus(z, beta=2),
        nn.Softplus(2.0),
    ),
    "logaddexp": (
        lambda z: z + words.softplus(1 - z),
        lambda z: torch.logaddexp(z, torch.ones_like(z)),
    ),
    "silu": (words.silu, F.silu, nn.SiLU(), words.silu),
    "mish": (lambda z: z * sympy.tanh(words.softplus(z)), F.mish),
    "gelu": (words.gelu, F.gelu, nn.GELU(), words.gelu, lambda z: F.gelu(z, approximate="none")),
    "gelu_tanh": (
        words.gelu_tanh,
        lambda z: F.gelu(z, approximate="tanh"),
        nn.GELU("tanh"),
        words.gelu_tanh,
    ),
    "normal_cdf": (words.normal_cdf, torch.special.ndtr, words.normal_cdf),
    "erf": (
        lambda z: 2 * words.normal_cdf(sqrt(2) * z) - 1,
        torch.erf,
        torch.special.erf,
        lambda z: z.erf(),
    ),
    "softsign": (lambda z: z / (1 + sympy.Abs(z)), F.softsign),
    "tanhshrink": (lambda z: z - sympy.tanh(z), F.tanhshrink),
    "log_cosh": (words.log_cosh, words.log_cosh),
    "relu_antiderivative": (words.relu_antiderivative, words.relu_antiderivative),
    "addcmul": (lambda z: z + z**2 / 2, lambda z: torch.addcmul(z, z, z, value=0.5)),
    "third": (lambda z: z**3 / 4, lambda z: z**3 * 0.25, lambda z: 0.25 * torch.float_power(z, 3)),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for name, (_, *spellings) in ELEMENTWISE.items()
        for place in range(len(spellings))
    ],
)
def test_elementwise_operation(name, place):
    expected, spelling = ELEMENTWISE[name][0], ELEMENTWISE[name][place + 1]

    def energy(h, *, U):
        return spelling(U @ h).sum()

    assert assert_same_number(energy).expression == canonical(word(expected))


def interaction(h, x, *, Q, K, beta=1.5):
    q = torch.einsum("ard,d->ar", Q, h)
    k = torch.einsum("ard,sd->asr", K, x)
    return -torch.logsumexp(beta * torch.einsum("ar,asr->as", q, k), dim=-1).sum() / beta


def interaction_by_matmul(h, x, *, Q, K, beta=1.5):
    q, k = Q @ h, x @ K.mT  # (heads, rank), (heads, seq, rank)
    return -torch.logsumexp(beta * (k @ q.unsqueeze(-1)).squeeze(-1), dim=-1).sum() / beta


def interaction_by_one_einsum(h, x, *, Q, K, beta=1.5):
    score = torch.einsum("ard,d,are,se->as", Q, h, K, x)
    return -(beta * score).exp().sum(-1).log().sum().div(beta)


def interaction_by_views(h, x, *, Q, K, beta=1.5):
    heads, rank, dim = Q.shape
    q = F.linear(h, Q.reshape(heads * rank, dim)).view(heads, rank)
    k = (
        F.linear(x, K.flatten(0, 1)).unflatten(-1, (heads, rank)).transpose(0, 1)
    )  # (heads, seq, rank)
    return -torch.logsumexp(beta * (q[:, None, :] * k).sum(-1), dim=-1).sum() / beta


@pytest.mark.parametrize(
    "function",
    [interaction, interaction_by_matmul, interaction_by_one_einsum, interaction_by_views],
)
def test_interaction_in_every_spelling(function):
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    expected = -Sum(logsumexp(beta * score, s), a) / beta
    translation = assert_same_number(function)
    assert translation.expression == canonical(expected)
    assert [str(one) for one in translation.parameters] == ["Q", "K"]
    assert translation.scalars == (beta,)
    assert (translation.state, translation.context) == (h, x)


BLOCKS = {
    "h": "(heads block)",
    "x": "seq (heads block)",
    "U": "hidden (heads block)",
    "lam": "(heads block)",
}
hb, xb = state(heads * block), context(heads * block)
Ub, lamb = parameter("U", hidden, heads * block), parameter("lam", heads * block)
d, p = index("d", heads * block), block.index("p")
slot = block * a + p

COMPOSITES = {
    "flat": (Sum(Sum(Ub[m, d] * hb[d], d) ** 2, m), lambda h, *, U: (U @ h).square().sum()),
    "blocks": (
        Sum(sqrt(Sum(hb[slot] ** 2, p)), a),
        lambda h, *, A: h.view(A.shape[0], -1).norm(dim=-1).sum(),
        lambda h, *, A: h.reshape((A.shape[0], h.shape[0] // A.shape[0])).norm(dim=-1).sum(),
        lambda h, *, A: h.unflatten(0, (A.size(0), -1)).square().sum(1).sqrt().sum(),
        lambda h, *, A: torch.unflatten(h, -1, (A.size(0), -1)).norm(2, 1).sum(),
    ),
    "block_scores": (
        -Sum(LogSumExp(Sum(lamb[slot] * hb[slot] * xb[s, slot], p), s), a),
        lambda h, x, *, A, lam: (
            -torch.logsumexp((x * (lam * h)).view(x.shape[0], A.shape[0], -1).sum(-1), 0).sum()
        ),
        lambda h, x, *, A, lam: (
            -torch.einsum(
                "ap,sap->as", (lam * h).view(A.shape[0], -1), x.unflatten(-1, (A.shape[0], -1))
            )
            .logsumexp(1)
            .sum()
        ),
    ),
    "split_then_flat": (
        Sum(words.silu(hb[slot]) * A[a, r] * lamb[slot], p, r, a),
        lambda h, *, A, lam: (
            (F.silu(h.view(A.shape[0], -1))[:, :, None] * A[:, None]).sum(-1).flatten() * lam
        ).sum(),
        lambda h, *, A, lam: (
            (F.silu(h.view(A.shape[0], -1))[..., None] * A.unsqueeze(1)).sum(-1).reshape(-1) @ lam
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for name, (_, *spellings) in COMPOSITES.items()
        for place in range(len(spellings))
    ],
)
def test_composite_axes(name, place):
    expected, function = COMPOSITES[name][0], COMPOSITES[name][place + 1]
    assert assert_same_number(function, BLOCKS).expression == canonical(expected)


NUMBERS = {
    "two axes at once": lambda h, x, *, Q, K: torch.logsumexp(
        (Q @ h) @ (K @ x.T), dim=(0, 1)
    ).sum(),
    "softmax of a flat axis": lambda h, *, Q, A: (Q @ h).flatten().softmax(0) @ A.flatten(),
    "gram": lambda h, x: torch.einsum("sd,ud->su", x, x).square().sum() + (h @ h),
    "outer of the state": lambda h, *, W: (h[:, None] * h[None, :] * W).sum(),
    "outer by function": lambda h, *, W: (
        (torch.outer(h, h) * W.T + torch.outer(h, h)).square().sum()
    ),
    "total times part": lambda h: (h * h.sum()).sum() + (h.sum() * h).norm(),
    "zero with an axis": lambda h: (torch.zeros_like(h) + h.sum()).sum() + (0 * h + h.sum()).sum(),
    "ones": lambda h, x: torch.ones_like(x).sum() * h.sum() + torch.full_like(h, 0.5).sum(),
    "constant over tokens": lambda h, x: (
        h.expand(x.shape[0], h.shape[0]).sum() + h.sum().expand(3 // 3).sum()
    ),
    "numbers": lambda h: (
        h.sum() * 0.1 + 1 / 3 + torch.tensor(2) * h.square().sum() + torch.tensor(0.25)
    ),
    "rank of a tensor": lambda h, x: (
        (h.sum() if x.ndim == 2 else x.sum()) * h.dim() * (x.dim() - 1)
    ),
    "sizes as exponents": lambda h, *, U: (
        (U @ h).abs().sum() ** (1 / U.shape[0]) * U.shape[1] ** -0.5
    ),
    "rank in a range": lambda h, x: (
        sum(x.sum(n).square().sum() for n in range(x.ndim)) + h.sum() * len(x.shape)
    ),
    "equal shapes": lambda h, *, Q, K: (
        (Q @ h).sum() if Q.shape == K.shape and len(Q.size()) == 3 else h.sum()
    ),
    "equal sizes": lambda h, *, Q, K: (Q @ h).sum() if Q.shape[2] == K.size(-1) else (K @ h).sum(),
    "variance with correction": lambda h, *, U: (
        (U @ h).var() + torch.std(U @ h) + U.var(1).sum() * h.sum()
    ),
    "keepdim": lambda h, *, Q: ((Q @ h) - (Q @ h).mean(dim=-1, keepdim=True)).square().sum(),
    "everything kept": lambda h, *, Q: ((Q @ h) / (Q @ h).norm(dim=(0, 1), keepdim=True)).sum(),
    "ellipsis": lambda h, *, Q, K: torch.einsum("...d,...d,d->...", Q, K, h).square().sum(),
    "ellipsis, implicit": lambda h, *, Q: torch.einsum("...d,d", Q, h).square().sum(),
    "diagonal of a batch": lambda h, x, *, W: (
        torch.diagonal(x[:, None] * W, dim1=1, dim2=2).square().sum() + h.sum()
    ),
    "tensordot": lambda h, *, Q, K: (
        torch.tensordot(Q, K, dims=([2, 0], [2, 0])).square().sum() * h.sum()
    ),
    "tensordot, two axes": lambda h, *, U, V: torch.tensordot(U, V) * h.sum(),
    "inner of matrices": lambda h, *, U, V: (torch.inner(U, V) @ U @ h).square().sum(),
    "three matrices": lambda h, *, U, V, W: (U @ W @ W.T @ V.T @ U @ h).tanh().sum(),
    "addmm": lambda h, *, U, V, W: (
        torch.addmm(U @ U.T, U, V.T, beta=2, alpha=0.5).square().sum() + h.sum()
    ),
    "movedim": lambda h, *, Q, K: (Q.movedim((0, 1), (2, 0)) * K.permute(1, 2, 0)).sum() * h.sum(),
    "squeeze": lambda h: (
        h[None, :, None].squeeze().sum() + h[None].squeeze(0).sum() + h[None, None][0, 0].sum()
    ),
    "slices": lambda h, x: (
        (x[:, :] @ h[:]).sum() + (x[:] @ h[0:]).sum() + x[...].sum() + x[..., :].sum()
    ),
    "no axes": lambda h: (
        h.sum().sum() + h.sum().mean() + h.sum().unsqueeze(0).logsumexp(0).view(()).sum(-1)
    ),
    "view as": lambda h, *, Q, K: (
        Q.flatten().view_as(K).mul(K).sum() * h.sum() + K.ravel().reshape_as(Q).sum()
    ),
    "reshape by -1": lambda h, *, Q: Q.reshape(-1, Q.shape[-1]).matmul(h).tanh().sum(),
    "flat, then split": lambda h, *, Q: (
        Q.view(-1).view(Q.shape).matmul(h).view(Q.shape[:2]).norm(dim=1).sum()
    ),
    "flat tokens": lambda h, x: (
        x.flatten().softmax(0).square().sum() + (x * h).reshape(-1).logsumexp(0)
    ),
    "same index twice": lambda h, *, W: (W.T * W + W @ W + W.T).diagonal() @ h,
    "frozen and moving": lambda h, *, W: h.detach() @ W @ h + (W @ h).detach().tanh().sum(),
    "matrix norms": lambda h, *, U: (
        torch.linalg.norm(U, dim=1).sum() * h.sum() + torch.linalg.norm(U, "fro")
    ),
    "adjoint": lambda h, *, U: (U.adjoint() @ (U @ h)).tanh().sum(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_number_of_torch(name):
    assert_same_number(NUMBERS[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda h, *, A: (h.softmax(0).view(A.shape[0], -1) * A.sum(1, keepdim=True)).sum(),
        lambda h, *, A: (h.softmax(0).softmax(0).view(A.shape[0], -1).T @ A).norm(),
        lambda h, *, A: (h.log_softmax(0).view(A.shape[0], -1) * A.sum(1, keepdim=True)).sum(),
        lambda h, *, A: (h.view(A.shape[0], -1).flatten().softmax(0) * h).sum() + A.sum(),
        lambda h, *, U: (U.view(U.shape[0], -1) * h).sum(),
        lambda h, *, A, lam: (
            torch.einsum("d,d->d", h.view(A.shape[0], -1).flatten(), lam).exp().sum()
        ),
    ],
)
def test_number_of_composite_axes(function):
    assert_same_number(function, BLOCKS)


TRIPLE = {
    "h": "(heads rank block)",
    "A": "heads rank",
    "T": "(heads rank) block",
    "U": "hidden (heads rank)",
}


@pytest.mark.parametrize(
    "function",
    [
        lambda h, *, A: (h.view(A.shape[0], A.shape[1], -1).sum(-1) * A).tanh().sum(),
        lambda h, *, A: (h.view(A.numel(), -1).sum(-1).view(A.shape) * A).tanh().sum(),
        lambda h, *, T: (h.view(T.shape) * T).sum(1).tanh().sum(),
        lambda h, *, T, A: (h.view_as(T) * T).view(*A.shape, -1).sum((0, 2)).tanh().sum(),
        lambda h, *, U, T: (U @ h.view_as(T)).tanh().sum(),
    ],
)
def test_number_of_a_product_of_three_sizes(function):
    assert_same_number(function, TRIPLE)


def test_frozen_reaches_every_part_of_the_state():
    def energy(h, *, U):
        gate = torch.sigmoid(U @ h).sum()
        return gate.detach() * h.sum()

    expression = translate(energy, {"h": "dim", "U": "hidden dim"}).expression
    (moving,) = [leaf for leaf in expression.atoms(sympy.Indexed) if leaf.base == h]
    assert {leaf.base for leaf in expression.atoms(sympy.Indexed)} == {h, U, frozen(h)}
    assert isinstance(frozen(h), Frozen)
    assert expression == canonical(
        Sum(h[i], i) * Sum(words.sigmoid(Sum(U[m, j] * frozen(h)[j], j)), m)
    ), moving


class Quadratic:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, h, *, U):
        return self.weight * (U @ h).square().sum()

    def method(self, h, *, U):
        return self(h, U=U)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.Tanh()

    def forward(self, h, *, U):
        return self.activation(U @ h).sum()


@pytest.mark.parametrize(
    "function",
    [
        Quadratic(0.5),
        Quadratic(torch.tensor(0.5)),
        Quadratic(0.5).method,
        partial(lambda weight, h, *, U: weight * (U @ h).square().sum(), 0.5),
    ],
)
def test_any_callable_will_do(function):
    expression = translate(function, {"h": "dim", "U": "hidden dim"}).expression
    assert expression == canonical(matrix / 2)


def test_modules_are_looked_into():
    expression = translate(Module().forward, {"h": "dim", "U": "hidden dim"}).expression
    assert expression == canonical(word(sympy.tanh))


def test_numbers_stay_exact():
    def energy(h, *, tenth=0.1):
        return 0.5 * h.sum() + 0.1 * h.square().sum() + 3 * tenth

    numbers = translate(energy, {"h": "dim"}).expression.atoms(sympy.Number)
    assert {Rational(1, 2), Integer(3), sympy.Float(0.1)} <= numbers


MINUS_HALF = Rational(-1, 2)


def test_scalars_have_defaults_and_signs():
    def energy(h, *, a, b=1, c=MINUS_HALF, d=None, e=rank**-1):
        return (a + b + c + d + e) * h.sum()

    scalars = translate(energy, {"h": "dim"}).scalars
    assert [str(one.default) for one in scalars] == ["None", "1", "-1/2", "None", "1/rank"]
    assert [one.is_positive for one in scalars] == [None, True, None, None, True]


def test_signature_tells_the_arguments_apart():
    def energy(h, x, visible, *, W, frozen, beta=1.0):
        return (x @ h).masked_fill(~visible, 0).max()

    found = signature(energy, {"h": "(heads block)", "x": "seq dim", "W": "(heads rank) dim"})
    assert found.state == state(heads * block)
    assert found.context == context(dim)
    assert found.parameters == (parameter("W", heads * rank, dim),)
    assert found.scalars == (scalar("beta", default=1.0, positive=True),)
    assert found.frozen and found.visible
    assert found.arguments(1, 2, W=3, beta=4, frozen=5, visible=6) == (
        (1, 2),
        {"W": 3, "beta": 4, "frozen": 5, "visible": 6},
    )


def test_unused_visible_is_translated():
    assert translate(lambda h, x, *, visible: (x @ h).sum(), {"h": "dim", "x": "seq dim"})


def branches(h):
    if h.sum() > 0:
        return h.sum()
    return -h.sum()


def asserts(h, *, U):
    assert U.shape[0] == h.shape[0]
    return (U @ h).sum()


def loops(h, *, U):
    return sum(row @ h for row in U)


def ranges(h, *, U):
    return sum(U[m] @ h for m in range(U.shape[0]))


def in_place(h):
    return h.exp_().sum()


def writes(h):
    h[0] = 1.0
    return h.sum()


def without_gradient(h):
    with torch.no_grad():
        c = h.exp()
    return (c * h).sum()


LEARNED = nn.Parameter(torch.tensor(0.5))
UNTRANSLATABLE = {
    "maximum over tokens": (
        lambda h, x: (x @ h).max(),
        "`max` has no translation; .*mask over the context",
    ),
    "amax": (lambda h, x: torch.amax(x @ h, 0), "`amax` has no translation; .*`logsumexp`"),
    "order": (
        lambda h, x: torch.cumsum(x @ h, 0).sum(),
        "`cumsum` has no translation; .*order of the tokens",
    ),
    "topk": (lambda h, x: torch.topk(x @ h, 2)[0].sum(), "`topk` has no translation"),
    "sort": (lambda h, x: (x @ h).sort()[0].sum(), "`sort` has no translation"),
    "token by number": (lambda h, x: x[-1] @ h, "picking entries by number, `.-1.`"),
    "part of a state": (lambda h: h[1:].sum(), "picking entries by number"),
    "stack": (lambda h: torch.stack([h, h]).sum(), "`stack` has no translation; .*joined"),
    "cat": (lambda h: torch.cat([h, h], dim=0).sum(), "`cat` has no translation; .*joined"),
    "mask": (
        lambda h, x: torch.where(x @ h > 0, 1.0, 0.0).sum(),
        "`where` has no translation; .*masks",
    ),
    "noise": (lambda h: F.dropout(h).sum(), "`dropout` has no translation; .*random"),
    "norms": (
        lambda h: F.layer_norm(h, (5,)).sum(),
        "`layer_norm` has no translation; give `norm=`",
    ),
    "unknown": (
        lambda h: torch.special.i0(h).sum(),
        "`special_i0` has no translation; write it with",
    ),
    "branch": (branches, "`if`, `while`, `and` and `assert` cannot ask"),
    "assert": (asserts, "`hidden` == `dim` is not known"),
    "loop": (loops, "a loop over the axis of a tensor .* `einsum`"),
    "range": (ranges, "TypeError, .*no Python numbers made of them"),
    "float": (lambda h: h.sum() * float(h.shape[0]), "TypeError, .*no Python numbers made of them"),
    "math": (
        lambda h: math.sqrt(h @ h),
        "`math.sqrt` makes a number of a tensor: type `torch.sqrt`",
    ),
    "in place": (in_place, "`exp_` writes into a tensor: type `exp`"),
    "assignment": (writes, "TypeError, .*item assignment"),
    "out": (
        lambda h: torch.exp(h, out=torch.ones(()) * 1).sum(),
        "`exp` writes into a tensor: leave `out=`",
    ),
    "no_grad": (without_gradient, "`torch.no_grad` .* type `cem.frozen"),
    "visible": (lambda h, x, *, visible: (x @ h * visible).sum(), "masks by itself with `visible`"),
    "foreign tensor": (
        lambda h: (torch.ones(5) * h).sum(),
        r"reads a tensor of shape \(5,\) that is not an argument: pass it as a keyword-only",
    ),
    "learned number": (
        Quadratic(LEARNED).__call__,
        r"a tensor of shape \(\) that is not an argument",
    ),
    "foreign weights": (lambda h: nn.Linear(5, 2)(h).sum(), r"reads a tensor of shape \(2, 5\)"),
    "sizes": (lambda h, *, b: (h * b).sum(), "`mul`: the sizes `dim` and `hidden` do not match"),
    "sizes of a product": (lambda h, *, Q: Q.T @ h, "the sizes `heads` and `dim` do not match"),
    "view": (
        lambda h, *, Q: h.view(Q.shape[0], -1).sum(),
        r"cannot view the shape \(dim,\) as \(heads, -1\)",
    ),
    "view by number": (lambda h: h.view(1, 5).sum(), "the size 5 is not a named one"),
    "view out of order": (
        lambda h, *, Q: Q.view(Q.shape[1], Q.shape[0], -1).sum(),
        "do not line up in row-major order",
    ),
    "expand": (
        lambda h, *, b: h.expand(b.shape).sum(),
        r"cannot expand the shape \(dim,\) to \(hidden,\)",
    ),
    "expand to a sum": (
        lambda h, *, b: h.sum().expand(b.shape[0] + 1).sum(),
        "`hidden \\+ 1` is not a named size",
    ),
    "expand to tokens": (
        lambda h, x: h.sum().expand(x.numel()).sum(),
        "`dim\\*seq` mixes tokens with coordinates",
    ),
    "equation": (
        lambda h: torch.einsum("ij->i", h).sum(),
        r"a term of `ij->i` does not fit .* \(dim,\)",
    ),
    "terms": (lambda h: torch.einsum("i,i->", h), "has 2 terms for 1 tensors"),
    "dtype": (
        lambda h: h.sum() if h.dtype == torch.float64 else h.exp().sum(),
        "`eq`: a tensor or a number is",
    ),
    "axis": (lambda h: h.sum(1), "there is no axis 1 in a tensor with 1 axes"),
    "clamp": (lambda h: h.clamp(-1, 1).sum(), "`clamp` is understood at 0 only"),
    "maximum": (
        lambda h: torch.maximum(h, h.exp()).sum(),
        "`maximum` and `minimum` are understood",
    ),
    "norm": (lambda h: h.norm(p=3), "the norm of order 3 has no translation"),
    "spectral": (lambda h, *, U: torch.linalg.norm(U, 2), "the matrix norm of order 2"),
    "rounding": (
        lambda h: torch.div(h, 2, rounding_mode="floor").sum(),
        "leave `rounding_mode` out",
    ),
    "integers": (lambda h: h.to(torch.int64).sum(), "a conversion to torch.int64 rounds"),
    "softmax": (lambda h: F.softmax(h).sum(), "a softmax needs the axis"),
    "attribute": (lambda h: h.grad.sum(), "`.grad` of a tensor has no translation"),
    "infinity": (lambda h: h.sum() * float("inf"), "the number inf"),
    "option": (lambda h: torch.sum(h, nowhere=1), "`sum` with these arguments has no translation"),
    "tuple": (lambda h: (h.sum(), h), "returns a tuple: return one tensor"),
    "nothing": (lambda h: None, "returns a NoneType: return one tensor"),
    "scalar product": (lambda h: h.sum() @ h, "`@` needs tensors with axes"),
    "comparison": (lambda h: (h == h.exp()).sum(), "comparing entries has no gradient"),
    "quotient": (
        lambda h, *, b: h.sum() * (h.shape[0] // b.shape[0]),
        "`dim // hidden` is no product",
    ),
    "diagonal": (lambda h, *, W: W.diagonal(1).sum() + h.sum(), "only the main diagonal"),
    "permute": (lambda h, *, U: U.permute(0, 0).sum(), "must name each axis"),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_untranslatable_says_what_to_do(name):
    function, message = UNTRANSLATABLE[name]
    with pytest.raises(Untranslatable, match=message):
        translate(function, declared(function))


def test_untranslatable_names_the_line_of_an_object():
    with pytest.raises(Untranslatable, match="energy `Quadratic`, line .*`return self.weight"):
        translate(Quadratic("two"), {"h": "dim", "U": "hidden dim"})


def test_untranslatable_names_the_line():
    line = without_gradient.__code__.co_firstlineno + 2
    with pytest.raises(
        Untranslatable, match=f"energy `without_gradient`, line {line}, `c = h.exp\\(\\)`: "
    ):
        translate(without_gradient, {"h": "dim"})


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda h, *, lam: lam * h.sum(), r"\(heads,\)"),
        (lambda h, x: x @ h, r"\(seq,\)"),
        (lambda h, *, Q: Q @ h, r"\(heads, rank\)"),
        (lambda h: h.sum(keepdim=True), r"\(1,\)"),
    ],
)
def test_result_must_be_one_value(function, shape):
    function.__name__ = "wide"
    message = rf"energy `wide` must return one value per token: got shape {shape}; did you forget"
    with pytest.raises(ValueError, match=message + r" `.sum\(\)`\?$"):
        translate(function, declared(function))


def named(function):
    function.__name__ = "wrong"
    return function


DECLARATIONS = {
    "no state": (
        lambda *, U: 0,
        {"U": "hidden dim"},
        "energy `wrong` has no state: type it as the first",
    ),
    "state without shape": (
        lambda h: 0,
        {},
        "the state `h` of energy `wrong` must have one axis.*got 'no shape'",
    ),
    "state with two axes": (
        lambda h: 0,
        {"h": "heads dim"},
        "must have one axis.*got 'heads dim'; type",
    ),
    "state over tokens": (lambda h: 0, {"h": "seq"}, "must have one axis.*got 'seq'"),
    "context with one axis": (
        lambda h, x: 0,
        {"h": "dim", "x": "seq"},
        "the context `x` .* two axes.*got 'seq'",
    ),
    "unknown argument": (
        lambda h: 0,
        {"h": "dim", "y": "dim"},
        "energy `wrong` has no argument `y`.*`h`",
    ),
    "positional": (
        lambda h, U: 0,
        {"h": "dim", "U": "m dim"},
        r"`U` of energy `wrong` is positional.*`\*` before",
    ),
    "positional scalar": (
        lambda h, beta=1.0: 0,
        {"h": "dim"},
        "`beta` of energy `wrong` is positional: got no shape",
    ),
    "third": (
        lambda h, x, y: 0,
        {"h": "dim", "x": "seq dim", "y": "seq dim"},
        "`y` .* is positional",
    ),
    "starred": (
        lambda h, **rest: 0,
        {"h": "dim"},
        "argument `rest` of energy `wrong` collects arguments",
    ),
    "tokens": (
        lambda h, *, x: 0,
        {"h": "dim", "x": "seq dim"},
        "`x` of energy `wrong` has an axis over tokens",
    ),
    "name of a size": (
        lambda h, *, dim: 0,
        {"h": "dim"},
        "argument `dim` .* has the name of a size",
    ),
    "default": (lambda h, *, f=torch.relu: 0, {"h": "dim"}, "argument `f` .* got the default <"),
    "empty": (
        lambda h: 0,
        {"h": ""},
        "the shape of `h` in energy `wrong` must be names .*: got ''",
    ),
    "number": (lambda h: 0, {"h": "4"}, "must be names separated by blanks.*: got '4'"),
    "parenthesis": (lambda h: 0, {"h": "(heads rank"}, r"must be names.*: got '\(heads rank'"),
    "empty group": (lambda h: 0, {"h": "()"}, "must be names"),
    "comma": (lambda h: 0, {"h": "a, b"}, "must be names"),
    "no text": (lambda h: 0, {"h": 4}, "must be names.*: got 4"),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_declaration_is_checked(name):
    function, shapes, message = DECLARATIONS[name]
    with pytest.raises(ValueError, match=message):
        signature(named(function), shapes)
