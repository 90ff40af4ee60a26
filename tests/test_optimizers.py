"""Optimizers: Muon on matrices, AdamW elsewhere, and who gets what."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn
from training_runs import LLAMA, tiny_run

from cem.lm import training
from cem.lm.optimizer import Muon, decayed, hidden_matrices, parameter_groups
from cem.lm.tokenizer import byte_tokenizer
from cem.lm.trainer import Trainer


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere():
    W, b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    own_W, own_b = nn.Parameter(W.detach().clone()), nn.Parameter(b.detach().clone())
    groups = [{"params": [own_W], "muon": True}, {"params": [own_b], "weight_decay": 0.0}]
    own = Muon(groups, lr=0.1, weight_decay=0.2)
    muon = torch.optim.Muon([W], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([b], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(4):
        W.grad, b.grad = torch.randn(6, 4), torch.randn(5)
        own_W.grad, own_b.grad = W.grad.clone(), b.grad.clone()
        for optimizer in (own, muon, adamw):
            optimizer.step()
    assert torch.equal(own_b, b)
    assert (own_W - W).norm() < 0.02 * W.norm()  # torch's iteration rounds to bfloat16


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_muon_on_a_cpu_orthogonalises_in_float32(shape):
    W = nn.Parameter(torch.zeros(shape))
    W.grad = torch.randn(shape)
    wide = W.grad.double() if shape[0] < shape[1] else W.grad.double().T
    wanted = wide / wide.norm()
    for _ in range(5):
        gram = wanted @ wanted.T
        wanted = 3.4445 * wanted + (-4.7750 * gram + 2.0315 * gram @ gram) @ wanted
    Muon([{"params": [W], "muon": True}], lr=1.0, weight_decay=0.0, nesterov=False).step()
    found = -W.detach() / (0.2 * 7**0.5)
    found = found if shape[0] < shape[1] else found.T
    assert (found - wanted).abs().max() < 1e-4


def test_a_stack_of_heads_is_one_matrix_for_muon():
    Q = nn.Parameter(torch.randn(2, 3, 8))
    flat = nn.Parameter(Q.detach().flatten(0, 1).clone())
    optimizers = [Muon([{"params": [p], "muon": True}], lr=0.1) for p in (Q, flat)]
    for _ in range(3):
        Q.grad = torch.randn(2, 3, 8)
        flat.grad = Q.grad.flatten(0, 1).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(Q.flatten(0, 1), flat)


def test_muon_goes_on_from_its_state():
    def made(seed):
        torch.manual_seed(seed)
        Q, b = nn.Parameter(torch.randn(2, 3, 8)), nn.Parameter(torch.randn(5))
        return (Q, b), Muon([{"params": [Q], "muon": True}, {"params": [b]}], lr=0.1)

    def steps(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    first, optimizer = made(0)
    steps(first, optimizer, 1)
    second, again = made(5)
    for ours, theirs in zip(second, first, strict=True):
        ours.data.copy_(theirs.data)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(first, optimizer, 2)
    steps(second, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"Muon needs matrices: got a parameter of shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


@pytest.mark.parametrize("tied", [True, False])
def test_who_gets_what(tied):
    model = training.build(LLAMA | {"tie_word_embeddings": tied}, byte_tokenizer())
    matrices, hidden = decayed(model), hidden_matrices(model)
    assert "model.embed_tokens.weight" in matrices and not any("norm" in n for n in matrices)
    assert len(hidden) == 2 * 7 and all(name.startswith("model.layers") for name in hidden)


@pytest.mark.parametrize("muon", [True, False])
def test_weight_decay_is_for_matrices(muon, tmp_path):
    model = training.build(LLAMA, byte_tokenizer())
    args = training.arguments(tiny_run(), tmp_path)
    trainer = Trainer(model, args, eval_dataset=[], bytes_per_token=1.0, muon=muon)
    found = {}
    for group in trainer.create_optimizer().param_groups:
        found |= {id(p): (group["weight_decay"], p.ndim >= 2) for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    assert {*found.values()} == {(0.1, True), (0.0, False)}


@pytest.mark.parametrize("muon", [True, False])
def test_groups_have_rates_and_decay_of_their_own(muon, tmp_path):
    model = training.build(LLAMA, byte_tokenizer())
    args = training.arguments(tiny_run(), tmp_path)
    said = {
        "*.layers.0.*q_proj*": {"learning_rate": 0.5, "weight_decay": 0.3},
        "*q_proj*": {"weight_decay": 0.0},
    }
    trainer = Trainer(model, args, eval_dataset=[], bytes_per_token=1.0, muon=muon, groups=said)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Muon) == muon
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(names)
    for name, group in found.items():
        first, second = (f"layers.{n}.self_attn.q_proj" in name for n in (0, 1))
        decay = 0.3 if first else 0.1 if name in decayed(model) and not second else 0.0
        assert (group["lr"], group["weight_decay"]) == (args.learning_rate / (1 + first), decay)
        assert group.get("muon", False) == (muon and name in hidden_matrices(model))
    assert optimizer.param_groups[0]["lr"] == args.learning_rate


def test_a_pattern_that_matches_nothing_is_refused():
    model = training.build(LLAMA, byte_tokenizer())
    with pytest.raises(ValueError, match="a pattern of `groups` .* got 'Q', which matches none"):
        parameter_groups(model, 0.1, 0.1, {"Q": {}}, muon=False)
