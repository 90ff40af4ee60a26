"""Layers of the gallery against what their pages say they are, written by hand.

Legend: T tokens, D dim, H heads, R rank.
"""

import math

import pytest
import torch
from gallery import GALLERY, derive
from sympy import Sum

import cem
from cem import energies
from cem.testing import assert_close


def on_slices(lam):
    """diag(lam_a) on the slice of coordinates that head a owns, (H, D, D)."""
    slices = torch.eye(len(lam), dtype=lam.dtype).repeat_interleave(lam.shape[1], 1)  # (H, D)
    return torch.diag_embed(slices * lam.flatten())


LOW_RANK = "ard,arj->adj"
W_OF = {
    "interaction": lambda Q, K: torch.einsum(LOW_RANK, Q, K),
    "diagonal_interaction": on_slices,
    "diagonal_plus_low_rank": lambda Q, K, lam: torch.einsum(LOW_RANK, Q, K) + on_slices(lam),
    "symmetric_interaction": lambda Q, sigma: torch.einsum("ard,ar,arj->adj", Q, sigma, Q),
    "symmetrised_interaction": lambda Q, K: (
        (torch.einsum(LOW_RANK, Q, K) + torch.einsum(LOW_RANK, K, Q)) / 2
    ),
    "collaborative_interaction": lambda Q, K, sigma: torch.einsum("rd,ar,rj->adj", Q, sigma, K),
    "tempered_interaction": lambda Q, K, log_beta: (Q.mT @ K).expand(len(log_beta), -1, -1),
}


@pytest.mark.parametrize("name", W_OF)
def test_a_structure_is_a_point_of_the_dense_interaction(name):
    layer, h = derive(GALLERY[name])
    if name == "tempered_interaction":
        torch.nn.init.zeros_(layer.log_beta)
    dense, _ = derive(energies.dense_interaction, beta=layer.scalars["beta"])
    dense.load_state_dict({"W": W_OF[name](**dict(layer.named_parameters()))})
    torch.testing.assert_close(layer(h), dense(h), rtol=1e-12, atol=1e-12)


def test_heads_with_one_temperature_each():
    """A temperature sharpens the weights of its head and leaves the scale of its force."""
    layer, h = derive(energies.tempered_interaction)
    expected = h.clone()
    for beta in layer.scalars["beta"] * layer.log_beta.exp():
        scores = (beta * h @ layer.Q.mT @ (h @ layer.K.mT).mT).masked_fill(
            ~torch.ones(len(h), len(h)).bool().tril(), -torch.inf
        )
        expected = expected + scores.softmax(-1) @ h @ layer.K.mT @ layer.Q
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
def test_the_mixture_is_a_soft_minimum_of_the_energies_of_its_experts(beta):
    layer, h = derive(energies.mixture_of_experts_relu, beta=beta)
    experts = []
    for U, G in zip(layer.U, layer.G, strict=True):
        expert, _ = derive(energies.gated_relu)
        expert.load_state_dict({"U": U, "G": G})
        experts.append(expert)
    each = torch.stack([expert.energy(h) for expert in experts])  # (experts, T)
    lowest = each.amin(0)
    found = layer.energy(h)
    assert (found <= lowest + 1e-12).all()
    assert (found >= lowest - torch.tensor(len(each)).log() / beta - 1e-12).all()
    weights = torch.softmax(-beta * each, 0)  # (experts, T)
    forces = torch.stack([expert(h) - h for expert in experts])
    expected = h + torch.einsum("et,etd->td", weights, forces)
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_layer_of_a_polynomial_memory(n):
    layer, h = derive(energies.polynomial_memory_by(n))
    expected = h + torch.relu(h @ layer.U.mT) ** (n - 1) @ layer.U
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)
    assert layer.energy_function.curvature == "concave"


def test_a_polynomial_memory_has_a_degree_of_at_least_two():
    assert energies.polynomial_memory_by(2, name="quadratic").name == "quadratic"
    with pytest.raises(ValueError, match="degree of at least 2: got 1; type"):
        energies.polynomial_memory_by(1)


def test_the_step_of_sparse_coding_is_that_of_shrinkage_thresholding():
    """Before its threshold: (1 - eta D^T D) h + eta D^T y, with one signal for all steps."""
    layer, h = derive(energies.sparse_coding, steps=3, update=cem.GradientDescent(0.1))
    D, signal = layer.D, h @ layer.A.mT
    expected = h
    for _ in range(3):
        expected = expected - 0.1 * expected @ D.mT @ D + 0.1 * signal @ D
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


def test_a_parallel_block_moves_along_both_forces():
    layer, h = derive(energies.parallel_block)
    moved = h.clone()
    for name, own in (("interaction", ("Q", "K")), ("gated", ("U", "G"))):
        part, _ = derive(GALLERY[name])
        part.load_state_dict({key: getattr(layer, key) for key in own})
        moved = moved + part(h) - h
    torch.testing.assert_close(layer(h), moved, rtol=1e-12, atol=1e-12)


def causal_softmax(scores):
    """Weights of (..., T, T) scores of which a token sees its past and itself."""
    past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~past, -torch.inf).softmax(-1)


def test_the_layer_of_normalised_queries_and_keys():
    """The force is orthogonal to the query, and a query twice as long moves half as far."""
    layer, h = derive(energies.normalised_interaction)
    q, k = h @ layer.Q.mT, h @ layer.K.mT  # (H, T, R)
    u, v = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
    sharpness = layer.scalars["beta"] * layer.log_beta.exp()[:, None, None]
    mean = causal_softmax(sharpness * u @ v.mT) @ v
    across = mean - (mean * u).sum(-1, keepdim=True) * u
    expected = h + (across / q.norm(dim=-1, keepdim=True) @ layer.Q).sum(0)
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer(2 * h, context=h) - 2 * h, (layer(h) - h) / 2, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(layer.energy(2 * h, context=h), layer.energy(h))


def test_the_layer_of_capped_scores():
    layer, h = derive(energies.soft_capped_interaction, cap=0.5)
    q, k = h @ layer.Q.mT, h @ layer.K.mT  # (H, T, R)
    capped = torch.tanh(layer.scalars["beta"] * q @ k.mT / 0.5)
    weights = causal_softmax(0.5 * capped) * (1 - capped.square())
    expected = h + (weights @ k @ layer.Q).sum(0)
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


def test_a_high_cap_is_no_cap():
    layer, h = derive(energies.soft_capped_interaction, cap=1e8)
    plain, _ = derive(energies.interaction)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(h), plain(h), rtol=1e-10, atol=1e-10)


def test_subspace_compression_is_the_operator_of_its_page():
    """Also with the term along the state, and as a point of the symmetric interaction."""
    layer, h = derive(energies.subspace_compression, update=cem.GradientDescent(0.3))
    own = h @ layer.U.mT  # (H, T, R)
    attended = (causal_softmax(layer.scalars["beta"] * own @ own.mT) @ own @ layer.U).sum(0)
    torch.testing.assert_close(layer(h), h + 0.3 * attended, rtol=1e-12, atol=1e-12)
    i = energies.subspace_compression.state.index("i")
    parabola = cem.Energy(Sum(energies.subspace_compression.state[i] ** 2, i) / 2)
    shrunk, _ = derive(energies.subspace_compression + parabola, update=cem.GradientDescent(0.3))
    shrunk.load_state_dict(layer.state_dict())
    torch.testing.assert_close(shrunk(h), 0.7 * h + 0.3 * attended, rtol=1e-12, atol=1e-12)
    same, _ = derive(energies.symmetric_interaction, update=cem.GradientDescent(0.3))
    same.load_state_dict({"Q": layer.U, "sigma": torch.ones_like(same.sigma)})
    torch.testing.assert_close(layer(h), same(h), rtol=1e-12, atol=1e-12)


def test_gated_linear_attention_is_a_recurrence():
    """One state a head that every token shrinks by its gate and adds to."""
    layer, h = derive(energies.gated_linear_attention)
    state = h.new_zeros(2, 5, 5)  # (H, R, R)
    for t, token in enumerate(h):
        q, k = layer.Q @ token, layer.K @ token  # (H, R)
        gate = torch.sigmoid(layer.G @ token + layer.bias)
        state = gate[:, None, None] * state + k.unsqueeze(2) * k.unsqueeze(1)
        force = torch.einsum("arq,aq,ard->d", state, q, layer.Q)
        assert_close(layer(h)[t], token + force, 1e-12)


def test_the_squared_interaction_knows_its_past_by_one_matrix_a_head():
    layer, h = derive(energies.squared_interaction)
    k = h @ layer.K.mT  # (H, T, R)
    past = torch.einsum("atr,atq->atrq", k, k).cumsum(1)
    force = torch.einsum("atrq,atq->atr", past, h @ layer.Q.mT) @ layer.Q
    torch.testing.assert_close(layer(h), h + force.sum(0), rtol=1e-12, atol=1e-12)


def turned(z, angles):
    """Pairs (n, n + R/2) of (..., T, R) turned by the angles (T, R/2), by matrices of two by two."""
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pairs = torch.stack(z.chunk(2, -1), -1)  # (..., T, R/2, 2)
    return torch.cat((turn @ pairs.unsqueeze(-1)).squeeze(-1).unbind(-1), -1)


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_the_layer_of_rotary_positions_turns_values_and_turns_their_mean_back(base):
    layer, h = derive(energies.rotary_interaction_by(base))
    R = layer.Q.shape[1]
    frequencies = base ** (-2 * torch.arange(R // 2, dtype=h.dtype) / R)
    angles = torch.arange(len(h), dtype=h.dtype)[:, None] * frequencies
    q, k = turned(h @ layer.Q.mT, angles), turned(h @ layer.K.mT, angles)  # (H, T, R)
    mean = turned(causal_softmax(layer.scalars["beta"] * q @ k.mT) @ k, -angles)
    torch.testing.assert_close(layer(h), h + (mean @ layer.Q).sum(0), rtol=1e-12, atol=1e-12)


def test_the_layer_of_linear_biases():
    layer, h = derive(energies.alibi_interaction)
    q, k = h @ layer.Q.mT, h @ layer.K.mT  # (H, T, R)
    t = torch.arange(len(h), dtype=h.dtype)
    bias = layer.slope[:, None, None] * (t[:, None] - t)
    mean = causal_softmax(layer.scalars["beta"] * q @ k.mT - bias) @ k
    torch.testing.assert_close(layer(h), h + (mean @ layer.Q).sum(0), rtol=1e-12, atol=1e-12)


def test_linear_biases_are_columns_of_the_keys():
    """No tensor of all pairs of tokens is made: the program knows no position of a token that looks."""
    code = derive(energies.alibi_interaction)[0].code
    assert "exact_parts(context_position" in code
    assert "attn_mask=visible, is_causal=causal" in code


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 0), (2, 2), (9, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_sliding_window_is_a_mask(window, sinks, causal):
    layer, h = derive(energies.sliding_window_interaction_by(window, sinks), causal=causal)
    plain, _ = derive(energies.interaction, causal=causal)
    plain.load_state_dict(layer.state_dict())
    t = torch.arange(len(h))
    seen = (t[:, None] - t < window) | (t < sinks)
    torch.testing.assert_close(layer(h), plain(h, visible=seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (4, -1)])
def test_a_window_holds_a_token(window, sinks):
    with pytest.raises(
        ValueError, match=f"a window of 1 token or more .*{window} and {sinks}; type"
    ):
        energies.sliding_window_interaction_by(window, sinks)


def test_the_layer_of_a_sink_is_that_of_a_token_with_nothing_in_it():
    """One more column of scores, and a value of zero."""
    layer, h = derive(energies.sink_interaction)
    q, k = h @ layer.Q.mT, h @ layer.K.mT  # (H, T, R)
    scores = layer.scalars["beta"] * q @ k.mT
    past = torch.ones_like(scores, dtype=torch.bool).tril()
    scores = scores.masked_fill(~past, -torch.inf)
    sink = layer.b[:, None, None].expand(-1, len(h), 1)
    mean = torch.cat((sink, scores), -1).softmax(-1)[..., 1:] @ k
    torch.testing.assert_close(layer(h), h + (mean @ layer.Q).sum(0), rtol=1e-12, atol=1e-12)
    energy = -torch.cat((sink, scores), -1).logsumexp(-1).sum(0) / layer.scalars["beta"]
    torch.testing.assert_close(layer.energy(h), energy, rtol=1e-12, atol=1e-12)


def test_without_a_sink_it_is_the_interaction_energy():
    layer, h = derive(energies.sink_interaction)
    torch.nn.init.constant_(layer.b, -1e3)
    plain, _ = derive(energies.interaction)
    plain.load_state_dict({"Q": layer.Q, "K": layer.K})
    torch.testing.assert_close(layer(h), plain(h), rtol=1e-12, atol=1e-12)


def t5_decoder_bucket(distance, buckets=32, furthest=128):
    """The bucket of one distance, after the code of the paper (mesh_tensorflow, bidirectional=False)."""
    distance, near = max(distance, 0), buckets // 2
    if distance < near:
        return distance
    share = math.log(distance / near) / math.log(furthest / near)
    return min(near + int(share * (buckets - near)), buckets - 1)


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 20)])
def test_the_layer_of_a_bias_by_distance(count, furthest):
    """Beyond the furthest distance too, and for tokens ahead."""
    energy = energies.relative_interaction_by(count, furthest)
    sizes = {"dim": 12, "heads": 2, "rank": 5, "buckets": count}
    layer = cem.derive(energy, causal=False, dtype=torch.float64, **sizes)
    h = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 1, 2, 7, 15, 16, 40, 127, 300])
    bucket = [
        [t5_decoder_bucket(t - s, count, furthest) for s in places.tolist()]
        for t in places.tolist()
    ]
    q, k = h @ layer.Q.mT, h @ layer.K.mT  # (H, T, R)
    scores = layer.scalars["beta"] * q @ k.mT + layer.bias[:, torch.tensor(bucket)]
    expected = h + (scores.softmax(-1) @ k @ layer.Q).sum(0)
    found = layer(h, positions=places)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
