"""Operations of torch, one by one: each gives the symbolic pen's expression, or the number of torch."""

import pytest
import sympy
import torch
from sympy import Rational, exp, log, sqrt
from torch import nn
from torch.nn import functional as F
from torch_pen import assert_same_number, word

from cem.language import words
from cem.language.canonical import canonical

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
    "three matrices": lambda h, *, U, V, W: (V.T @ U @ W @ h).tanh().sum(),
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
