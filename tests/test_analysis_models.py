"""Ties of given weights, and whole models: of energies, Llama's, and others.

Legend: B batch, T tokens, D dim.
"""

import json

import pytest
import torch
from language_models import model, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

import cem
from cem import energies
from cem.analysis import (
    analyse,
    antisymmetry,
    energies_along,
    fit_energy,
    fit_tied,
    sublayers,
)

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_hidden_layers=2,
    vocab_size=37,
    tie_word_embeddings=True,
    attn_implementation="sdpa",
)
SHARES = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Unturned(llama.LlamaRotaryEmbedding):
    """Rotary positions with frequency 0: none."""

    def __init__(self):
        super().__init__(CONFIG)
        self.inv_freq.zero_()


def attention(tied):
    """Llama's attention with grouped queries; tied is O_a = w_a Q_a^T, V = K."""
    found = llama.LlamaAttention(CONFIG, 0).double().eval()
    if tied:
        with torch.no_grad():
            found.v_proj.weight.copy_(found.k_proj.weight)
            tied = SHARES[:, None, None] * found.q_proj.weight.view(4, 6, 16)
            found.o_proj.weight.copy_(tied.flatten(0, 1).T)
    return found


def mlp_of(**options):
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4, **options)
    return llama.LlamaMLP(config).double()


def test_tied_attention_without_rotation_is_an_energy():
    module, h = attention(tied=True), draw(2, 9, 16)
    for fit in (fit_energy(module, h, rotary=Unturned()), fit_energy(module, rotary=Unturned())):
        torch.testing.assert_close(fit.layer.w.flatten(), SHARES, rtol=1e-10, atol=1e-12)
        assert fit.tie.error <= 1e-12 and fit.error in (None, pytest.approx(0, abs=1e-12))
    rotary = Unturned()
    turns = {"position_embeddings": rotary(h, torch.arange(9)[None])}
    torch.testing.assert_close(fit.layer(h) - h, module(h, **turns)[0], rtol=1e-10, atol=1e-12)
    assert antisymmetry(module, h, hold=("k_proj", "v_proj"), **turns).relative <= 1e-12
    assert antisymmetry(module, h[:1], **turns).relative > 0.1  # its own key moves


def test_rotary_attention_is_never_tied_since_its_values_are_not_turned():
    module, h = attention(tied=True), draw(2, 9, 16)
    fit = fit_energy(module, h, rotary=llama.LlamaRotaryEmbedding(CONFIG))
    assert fit.tie.error <= 1e-12 and 0.1 < fit.error < 0.9
    assert fit.layer.lowering.kernels == ("matmul", "sdpa")


def test_the_shares_of_untied_heads_are_the_least_squares():
    module, h = attention(tied=False), draw(3, 9, 16)
    rotary = llama.LlamaRotaryEmbedding(CONFIG)
    fit = fit_energy(module, h, rotary=rotary)
    with torch.no_grad():
        out = module(h, position_embeddings=rotary(h, torch.arange(9)[None]))[0]

        def error(w):
            fit.layer.w.copy_(w)
            return float((out - (fit.layer(h) - h)).norm() / out.norm())

        best = fit.layer.w.clone()
        assert error(best) == pytest.approx(fit.error, abs=1e-12)
        for seed in range(4):
            assert error(best + 1e-3 * draw(*best.shape, seed=seed)) > fit.error


def test_the_tie_of_heads_by_dense_products():
    q, k, v, o = draw(12, 7), draw(6, 7, seed=1), draw(6, 7, seed=2), draw(7, 12, seed=3)
    found = fit_tied(q, k, v, o, heads=4)
    for a in range(4):
        group = slice(3 * (a // 2), 3 * (a // 2) + 3)
        read = q[3 * a : 3 * a + 3].T @ k[group]
        written = o[:, 3 * a : 3 * a + 3] @ v[group]
        share = (read * written).sum() / read.square().sum()
        assert float(found.shares[a]) == pytest.approx(float(share), rel=1e-10)
        error = (written - share * read).norm() / written.norm()
        assert float(found.errors[a]) == pytest.approx(float(error), rel=1e-10)
        A, B = read / read.norm(), share.sign() * written / written.norm()
        U, s, V = torch.linalg.svd((A + B) / 2)
        M = U[:, :3] * s[:3] @ V[:3]
        nearest = (((M - A).square().sum() + (M - B).square().sum()) / 2).sqrt()
        assert float(found.nearest[a]) == pytest.approx(float(nearest), rel=1e-10)
    assert found.error_of_step >= found.error


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "gelu_pytorch_tanh"])
def test_a_tied_gated_mlp_is_an_energy(activation):
    mlp, h, gains = mlp_of(hidden_act=activation), draw(2, 30, 16), draw(24, seed=1)
    assert 0.5 < fit_energy(mlp, h).error < fit_energy(mlp).tie.error < 1.0
    with torch.no_grad():
        mlp.down_proj.weight.copy_((gains[:, None] * mlp.up_proj.weight).T)
    fit = fit_energy(mlp, h)
    torch.testing.assert_close(fit.layer.w, gains, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.layer(h) - h, mlp(h), rtol=1e-8, atol=1e-10)
    assert antisymmetry(mlp, h, hold="gate_proj").relative <= 1e-12
    assert antisymmetry(mlp, h).relative > 0.3  # the gate moves


def test_the_layers_of_a_llama():
    torch.manual_seed(0)
    llm, ids = LlamaForCausalLM(CONFIG).double().eval(), tokens(4, 12)
    calls = sublayers(llm, ids, use_cache=False)
    assert [call.kind for call in calls] == ["attention", "mlp"] * 2
    for one, other in zip(calls, calls[1:], strict=False):
        torch.testing.assert_close(one.h + one.u, other.h, rtol=1e-12, atol=1e-12)
    report = analyse(llm, ids, use_cache=False, probes=4, tokens=4)
    for row in report:
        assert row.frozen.relative > 0.3 and row.token.relative > 0.3 and row.state is not None
        assert 0 < row.error and 0.9 < row.tie.error <= 1
        assert 0 <= row.tied.share_down <= 1 and row.fitted.alignment.shape == (2, 12)
    text = report.table()
    assert len(text.splitlines()) == 6 and "model.layers.1.mlp" in text


def test_a_model_of_energies_descends_its_own():
    llm, ids = model("tied"), tokens(4, 12)
    report = analyse(llm, ids, use_cache=False, probes=4, tokens=4)
    for row, looks in zip(report, (True, False, True, False), strict=True):
        assert row.kind == "energy" and row.looks is looks
        assert row.frozen.relative <= 1e-12 < 0.01 < row.state.relative
        assert row.tie is None
    trace = cem.trace(llm, ids, use_cache=False)
    for row, traced in zip(report, trace, strict=True):
        torch.testing.assert_close(row.fitted.before, traced.before[0, 1::2], rtol=1e-12, atol=0)
        torch.testing.assert_close(row.fitted.after, traced.after[0, 1::2], rtol=1e-12, atol=0)


def test_llamas_layers_inside_our_blocks_and_a_negative_share():
    """Attention made to be minus the tied force of a layer: it climbs the tied energy and descends the fitted."""
    llm = model("llama")
    for block in llm.model.layers:
        mlp = block.parts["mlp"].module
        with torch.no_grad():
            mlp.down_proj.weight.copy_(-0.1 * mlp.up_proj.weight.T)
    along = energies_along(llm, tokens(4, 12), use_cache=False)
    report = analyse(llm, tokens(4, 12), use_cache=False, probes=4, tokens=4)
    for row in report:
        torch.testing.assert_close(along[row.name].after, row.fitted.after)
        if row.kind == "mlp":
            assert (row.shares < 0).all() and row.error < 1e-6
            assert row.fitted.alignment.min() > 0.1
            torch.testing.assert_close(row.fitted.alignment, -row.tied.alignment)


def test_other_modules():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    h = draw(2, 5, 8)
    report = analyse(stack, h)
    assert [row.name for row in report] == ["layers.0", "layers.1"]
    with torch.no_grad():
        last = stack.layers[0](h[1:2])
    expected = antisymmetry(layer, last, tokens=16).relative
    assert report[1].token.relative == pytest.approx(expected, rel=1e-10) and expected > 0.1

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, h):
            return h + self.inner(h)

    mine = Mine()
    [row] = analyse(mine, h, layers=["inner"])
    W = mine.inner.weight.detach()
    assert row.token.relative == pytest.approx(float((W - W.T).norm() / W.norm()), rel=1e-10)
    with pytest.raises(ValueError, match=r"no layer to analyse in Mine: .*type|`layers="):
        analyse(mine, h)
    with pytest.raises(ValueError, match="Mine has no submodule 'outer': type one of"):
        analyse(mine, h, layers=["outer"])


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="fitted to modules with q_proj, .*: got Linear"):
        fit_energy(nn.Linear(3, 3))
    biased = mlp_of(mlp_bias=True)
    nn.init.zeros_(biased.up_proj.bias)
    with pytest.raises(
        ValueError, match="LlamaMLP with biases of gate_proj, down_proj; use `antisymmetry`"
    ):
        fit_energy(biased)
    normed = attention(tied=False)
    normed.q_norm = nn.RMSNorm(6)
    with pytest.raises(ValueError, match="LlamaAttention with q_norm; use `antisymmetry`"):
        fit_energy(normed)
    with pytest.raises(ValueError, match="is one of silu, gelu, gelu_tanh, relu, sigmoid: got"):
        fit_energy(mlp_of(hidden_act="mish"))
    with pytest.raises(ValueError, match=r"weights of 3 heads are .*: got \(4, 5\), \(4, 5\)"):
        fit_tied(draw(4, 5), draw(4, 5), draw(4, 5), draw(5, 4), heads=3)


def test_a_report_is_kept(tmp_path):
    layer = cem.derive(energies.rotary_interaction, dim=8, heads=2, rank=4, dtype=torch.float64)
    report = analyse(layer, draw(2, 6, 8))
    folder = report.save(tmp_path / "report")
    kept = json.loads((folder / "report.json").read_text("utf-8"))
    assert kept == report.to_dict() and kept["layers"][0]["fitted"]["share_down"] == 1.0
    assert (folder / "report.png").stat().st_size > 10_000
    assert "rotary_interaction" in (folder / "report.txt").read_text("utf-8")
    with pytest.raises(KeyError, match="no layer `mlp` in this report: its layers are rotary"):
        report["mlp"]
