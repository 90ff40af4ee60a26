"""Token-parameter attention and the Tokenformer block against formulas written out row by row.

Legend: T tokens, I features in, O features out, N parameter tokens.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.tokens import MLP, kept
from cem.testing import assert_close
from cem.token_parameters import TokenformerBlock, TokenParameterAttention, tokenformer

NORMALISERS = ("l2_norm_gelu", "gelu_l2_norm", "softmax", "none", "energy_consistent")
T, I, O, N = 5, 6, 4, 11  # noqa: E741


def phi(z):
    """The erf form of gelu."""
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def big_phi(z):
    """Its antiderivative that is 0 at 0."""
    normal = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return ((z * z - 1) * (1 + torch.erf(z / math.sqrt(2))) / 2 + z * normal) / 2 + 0.25


def row(x, K, V, c, normaliser, eps=None):
    """The output for one token, token by token of the parameters; c counts them."""
    n = len(K)
    a = torch.stack([k @ x for k in K])
    eps = eps or 0.0
    if normaliser == "l2_norm_gelu":
        w = phi(math.sqrt(n) * a / ((c.abs() * a * a).sum().sqrt() + eps))
    elif normaliser == "gelu_l2_norm":
        w = math.sqrt(n) * phi(a) / ((c.abs() * phi(a) ** 2).sum().sqrt() + eps)
    elif normaliser == "softmax":
        w = n * a.exp() / (c.abs() * a.exp()).sum()
    elif normaliser == "none":
        w = phi(a)
    else:
        s = (c.abs() * a * a).sum().sqrt()
        u, z = a / s, math.sqrt(n) * a / s
        w = phi(z) + c.sign() * u * (c * (big_phi(z) / math.sqrt(n) - u * phi(z))).sum()
    return sum(c[j] * w[j] * V[j] for j in range(n))


def drawn(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected(layer, x):
    V = layer.K if layer.tie else layer.V
    c = layer.gain if layer.tie else V.new_ones(N)
    rows = [row(one, layer.K, V, c, layer.normaliser, layer.additive_eps) for one in x]
    return torch.stack(rows)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_output_and_gradients_are_those_of_the_formula(normaliser, tie):
    out = I if tie else O
    layer = drawn(
        TokenParameterAttention(I, out, N, normaliser=normaliser, tie=tie, dtype=torch.float64)
    )
    x = normal(T, I).requires_grad_()
    found, truth = layer(x), expected(layer, x)
    assert_close(found, truth, 1e-11)
    weights, points = normal(T, out, seed=2), (x, *layer.parameters())
    gradients = (torch.autograd.grad((y * weights).sum(), points) for y in (found, truth))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("normaliser", "eps"), [("l2_norm_gelu", 1e-2), ("gelu_l2_norm", 1e-2)])
def test_what_is_added_to_the_norm(normaliser, eps, tie):
    layer = TokenParameterAttention(
        I, I, N, normaliser=normaliser, tie=tie, additive_eps=eps, dtype=torch.float64
    )
    x = normal(T, I)
    assert_close(drawn(layer)(x), expected(layer, x), 1e-11)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_derivatives_of_any_order(normaliser):
    """By hand where the norm divides, so first and second ones are checked; the Hessian is in forward mode."""
    layer = drawn(TokenParameterAttention(3, 2, 5, normaliser=normaliser, dtype=torch.float64))
    x, names = normal(2, 3).requires_grad_(), dict(layer.named_parameters())

    def function(x, *values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    inputs = (x, *names.values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    hessian = torch.func.hessian(lambda z: layer(z).sum())(x[0].detach())
    assert_close(hessian, hessian.mT, 1e-12)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_row_of_zeros_is_finite_with_its_gradients(normaliser, dtype, tie):
    layer = drawn(TokenParameterAttention(I, I, N, normaliser=normaliser, tie=tie, dtype=dtype))
    x = torch.cat((torch.zeros(1, I), normal(2, I))).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    points = (x, *layer.parameters())
    assert y.isfinite().all() and all(z.grad.isfinite().all() for z in points)
    assert_close(y[1:], layer(x[1:]), 4 * torch.finfo(dtype).eps)
    if normaliser != "softmax":
        assert not y[0].any()
    if "l2_norm_gelu" in normaliser:  # its slope there would be infinite
        assert not x.grad[0].any()


@pytest.mark.parametrize("tie", [False, True])
def test_a_softmax_of_large_scores_is_finite(tie):
    layer = drawn(TokenParameterAttention(I, I, N, normaliser="softmax", tie=tie))
    if tie:
        with torch.no_grad():
            layer.gain[:3] = 0.0
    x = 1e4 * normal(T, I, dtype=torch.float32)
    x.requires_grad_()
    layer(x).sum().backward()
    assert all(z.grad.isfinite().all() for z in (x, *layer.parameters()))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_lower_precision(normaliser, dtype, error):
    wide = drawn(TokenParameterAttention(64, 48, 256, normaliser=normaliser, dtype=dtype)).double()
    x = normal(32, 64).to(dtype)
    truth = wide(x.double())
    found = wide.to(dtype)(x)
    assert found.dtype == dtype
    assert (found.double() - truth).norm() <= error * truth.norm()


def test_published_start():
    torch.manual_seed(0)
    layer = TokenParameterAttention(256, 256, 1024, layers=12, dtype=torch.float64)
    assert layer.normaliser == "l2_norm_gelu" and layer.activation == "gelu"
    assert layer.scale.item() == 32.0 and "scale" in layer.state_dict()
    assert layer.K.std().item() == pytest.approx(0.02, rel=0.01)
    assert layer.V.std().item() == pytest.approx(2 / (12 * 16), rel=0.01)
    kept = TokenParameterAttention(256, 256, 1024, scale=7.0).state_dict()
    layer.load_state_dict(kept)
    assert layer.scale.item() == 7.0


@pytest.mark.parametrize("normaliser", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_training_keeps_two_hidden_tensors_as_an_mlp_does(normaliser):
    layer = TokenParameterAttention(16, 16, 256, normaliser=normaliser)
    mlp, x = MLP(layer.K, layer.V), torch.randn(64, 16, requires_grad=True)
    assert kept(mlp, x) == 2 * 64 * 256 * 4
    assert kept(layer, x) <= kept(mlp, x) + 2 * 64 * 4 + 64


@pytest.mark.slow
def test_it_compiles_in_one_piece():
    layer = drawn(TokenParameterAttention(I, O, N, dtype=torch.float64))
    x = normal(T, I).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (truth,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert_close(found, truth, 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normaliser": "l1"}, "`normaliser` is one of l2_norm_gelu, .*: got 'l1'"),
        ({"activation": "swish"}, "`activation` is one of .*gelu.*: got 'swish'"),
        ({"tie": True}, "tied values are as wide as keys: got in_features=6 and out_features=4"),
        ({"normaliser": "softmax", "additive_eps": 1e-8}, "got the normaliser 'softmax'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenParameterAttention(I, O, N, **options)


# -- the block ------------------------------------------------------------------------------------


def block_by_hand(block, x, positions):
    """One sequence (T, D), head by head, its rotation in complex numbers."""
    D, H = block.dim, block.heads
    R = D // H

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def project(part, u):
        return torch.stack(
            [row(one, part.K, part.V, part.V.new_ones(part.tokens), "l2_norm_gelu") for one in u]
        )

    def turned(q):
        n = R // 4
        angle = positions[:, None] * 10000.0 ** (-torch.arange(n // 2, dtype=q.dtype) * 2 / n)
        z = torch.complex(q[:, : n // 2], q[:, n // 2 : n]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag, q[:, n:]), -1)

    u = norm(x)
    q, k, v = (project(part, u).split(R, -1) for part in (block.q, block.k, block.v))
    heads = []
    for a in range(H):
        score = turned(q[a]) @ turned(k[a]).T / math.sqrt(R)
        score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -torch.inf)
        heads.append(score.softmax(-1) @ v[a])
    x = x + project(block.o, torch.cat(heads, -1))
    return x + project(block.ffn, norm(x))


def test_the_block_is_its_formula():
    block = TokenformerBlock(32, heads=2, tokens=12, ffn_tokens=20, dtype=torch.float64)
    drawn(block)
    x, positions = normal(2, 6, 32), torch.arange(3, 9)
    found = block(x, positions=positions)
    truth = torch.stack([block_by_hand(block, one, positions) for one in x])
    assert_close(found, truth, 1e-11)
    # Rotary positions are relative.
    assert_close(block(x), found, 1e-11)
    single = block.float()(x.float())
    assert (single - truth).norm() <= 2e-6 * truth.norm()


def test_the_block_is_causal():
    block = drawn(TokenformerBlock(32, heads=2, tokens=12, dtype=torch.float64))
    x = normal(6, 32)
    changed = torch.cat((x[:4], normal(2, 32, seed=5)))
    assert torch.equal(block(x)[:4], block(changed)[:4])


def test_the_stack():
    model = tokenformer(32, heads=2, layers=3, tokens=8, dtype=torch.float64)
    assert [block.ffn.tokens for block in model[:3]] == [32] * 3
    assert sum(p.numel() for p in model[0].parameters()) == 16 * 32 * 8
    assert model[1].v.value_std == 2 / (3 * math.sqrt(32))
    x = normal(2, 5, 32)
    y = x
    for block in model[:3]:
        y = block(y)
    assert_close(model(x), F.layer_norm(y, (32,), eps=1e-5), 1e-12)


@pytest.mark.parametrize(("dim", "heads"), [(30, 4), (24, 4)])
def test_a_block_refuses_heads_that_do_not_fit(dim, heads):
    with pytest.raises(ValueError, match=f"got dim={dim}, heads={heads} and 1 coordinates to turn"):
        TokenformerBlock(dim, heads=heads, tokens=4)
