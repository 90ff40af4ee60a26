"""More parameter tokens: what each rule keeps, what can learn afterwards, and what is refused.

Legend: n old tokens, D features, T tokens of the input.
"""

import math

import pytest
import torch

from cem.token_parameters import TokenformerBlock, TokenParameterAttention

NORMALISERS = ("l2_norm_gelu", "gelu_l2_norm", "softmax", "none", "energy_consistent")
D, OLD, NEW = 8, 12, 36
EXACT = [
    *(("frozen", name, False) for name in NORMALISERS if name != "softmax"),
    ("norm_matched", "l2_norm_gelu", False),
    *(("duplicate", name, False) for name in NORMALISERS),
    *(("frozen", name, True) for name in NORMALISERS),
    ("norm_matched", "l2_norm_gelu", True),
    *(("duplicate", name, True) for name in NORMALISERS),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(tokens=OLD, dtype=torch.float64, **options):
    layer = TokenParameterAttention(D, D, tokens, dtype=dtype, **options)
    source = generator()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=source)
    return layer


def inputs(dtype=torch.float64):
    return torch.randn(64, D, dtype=dtype, generator=generator(1))


def change(new, old, x):
    return ((new(x) - old(x)).norm() / old(x).norm()).item()


@pytest.mark.parametrize(("rule", "normaliser", "tie"), EXACT)
def test_the_function_is_kept_and_everything_new_can_learn(rule, normaliser, tie):
    old, x = drawn(normaliser=normaliser, tie=tie), inputs()
    before = {name: value.clone() for name, value in old.state_dict().items()}
    new = old.grow(rule=rule, tokens=NEW, generator=generator(2))
    assert new.tokens == len(new.K) == NEW and new is not old
    assert change(new, old, x) <= (1e-14 if rule == "frozen" else 1e-13)
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    # One step of training: afterwards every new row, of keys and of values, has got a gradient.
    for _ in range(2):
        new.zero_grad()
        (new(x) - x).square().sum().backward()
        with torch.no_grad():
            for parameter in new.parameters():
                parameter -= 1e-4 * parameter.grad
    for parameter in new.parameters():
        grad = parameter.grad[OLD:].reshape(NEW - OLD, -1)
        assert (grad.abs().amax(-1) > 1e-8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "normaliser", "tie"), EXACT)
def test_in_lower_precision_to_its_rounding(rule, normaliser, tie, dtype):
    old = drawn(normaliser=normaliser, tie=tie, dtype=dtype)
    new = old.grow(rule=rule, tokens=NEW, generator=generator(2))
    x = inputs(dtype)
    assert new(x).dtype == dtype
    assert change(new, old, x) <= 8 * torch.finfo(dtype).eps


def test_copies_do_not_stay_equal():
    """Under Adam, which moves what has proportional gradients alike."""
    new = drawn().grow(rule="duplicate", tokens=2 * OLD, generator=generator(2))
    (new(inputs()) - inputs()).square().sum().backward()
    first, second = new.K.grad.split(OLD)
    assert torch.nn.functional.cosine_similarity(first, second).abs().max() < 0.99


def test_tied_copies_in_any_number():
    old = drawn(tie=True)
    new = old.grow(rule="duplicate", tokens=OLD + 5, generator=generator(2))
    assert change(new, old, inputs()) <= 1e-13
    assert (new.gain.sign() == old.gain.sign()[torch.arange(OLD + 5) % OLD]).all()


@pytest.mark.parametrize("rule", ["frozen", "norm_matched", "duplicate"])
def test_what_is_added_to_the_norm_grows_with_it(rule):
    old = drawn(additive_eps=0.1, activation="gelu_tanh")
    assert change(old.grow(rule=rule, tokens=NEW), old, inputs()) <= 1e-13


def test_keys_of_low_rank_are_matched_by_few_tokens():
    old = drawn()
    with torch.no_grad():
        old.K[:, 3:] = old.K[:, :3] @ torch.randn(3, D - 3, dtype=torch.float64)
    new = old.grow(rule="norm_matched", tokens=OLD + 3)
    assert change(new, old, inputs()) <= 1e-13
    with pytest.raises(
        ValueError, match="the rank of the keys, 3: got 2; type at least `tokens=15`"
    ):
        old.grow(rule="norm_matched", tokens=OLD + 2)


# -- the published growth -------------------------------------------------------------------------


def recomputed(normaliser, zero_keys, zero_values=False):
    """12 tokens become 32 and the scale becomes that of 32, as in the published code."""
    old, new = drawn(normaliser=normaliser), drawn(32, normaliser=normaliser)
    with torch.no_grad():
        new.K[:OLD], new.V[:OLD] = old.K, old.V
        if zero_keys:
            new.K[OLD:] = 0
        if zero_values:
            new.V[OLD:] = 0
    return new, old


def test_zero_keys_under_a_new_scale_change_the_function():
    changes = {name: change(*recomputed(name, True), inputs()) for name in NORMALISERS[:3]}
    # The scale is outside of the activation here, so that the change is the same for any numbers,
    assert changes["gelu_l2_norm"] == pytest.approx(math.sqrt(32 / 12) - 1, abs=1e-12)
    # and inside here: between that of a linear activation, 0.633, and what negative scores add.
    assert changes["l2_norm_gelu"] == pytest.approx(0.74, abs=0.05)
    assert changes["softmax"] > 1.0
    # Two keys and values that are both zero: neither ever gets a gradient.
    new, _ = recomputed("l2_norm_gelu", True, zero_values=True)
    new(inputs()).square().sum().backward()
    assert not new.K.grad[OLD:].any() and not new.V.grad[OLD:].any()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_random_growth_is_the_published_one(normaliser, tie):
    old = drawn(normaliser=normaliser, tie=tie)
    new = old.grow(rule="random", tokens=32, generator=generator(2))
    assert torch.equal(new.K[:OLD], old.K) and new.K[OLD:].std() > 0
    assert new.scale.item() == pytest.approx(
        TokenParameterAttention(D, D, 32, normaliser=normaliser).scale.item()
    )
    assert change(new, old, inputs()) > 1e-3


# -- what stays, and what is refused --------------------------------------------------------------


def test_a_second_growth_and_the_scale_in_the_checkpoint():
    old = drawn()
    new = old.grow(tokens=20).grow(tokens=32)
    assert new.scale.item() == math.sqrt(OLD)
    loaded = TokenParameterAttention(D, D, 32, dtype=torch.float64)
    loaded.load_state_dict(new.state_dict())
    assert change(loaded, old, inputs()) <= 1e-14


def test_a_block_grows():
    block = TokenformerBlock(
        16, heads=2, tokens=6, ffn_tokens=18, rotary=0.5, dtype=torch.float64
    ).eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator(1))
    for rule, tokens in (("frozen", 10), ("norm_matched", 24), ("duplicate", 12)):
        new = block.grow(rule=rule, tokens=tokens, generator=generator(2))
        assert new.q.tokens == tokens and new.ffn.tokens == 3 * tokens and not new.training
        assert change(new, block, x) <= 1e-13
    assert block.q.tokens == 6
    assert block.grow(tokens=8, ffn_tokens=20).ffn.tokens == 20


@pytest.mark.parametrize(
    ("options", "rule", "tokens", "message"),
    [
        ({}, "zero", 24, "`rule` is one of frozen, norm_matched, duplicate, random: got 'zero'"),
        ({}, "frozen", 12, "grows to more: got tokens=12; type at least `tokens=13`"),
        ({"normaliser": "softmax"}, "frozen", 24, r"a score of 0 by exp\(0\) = 1"),
        ({"activation": "softplus"}, "frozen", 24, "softplus has 0.693 and 0.5"),
        ({"activation": "relu"}, "frozen", 24, "relu has 0 and 0"),
        ({"normaliser": "gelu_l2_norm"}, "norm_matched", 24, "which only l2_norm_gelu divides by"),
        ({}, "norm_matched", 16, "the rank of the keys, 8: got 4; type at least `tokens=20`"),
        ({}, "duplicate", 30, "got 12 tokens and tokens=30; type `tokens=24`"),
    ],
)
def test_refused(options, rule, tokens, message):
    with pytest.raises(ValueError, match=message):
        drawn(**options).grow(rule=rule, tokens=tokens)


@pytest.mark.parametrize(
    ("options", "rule", "zero", "what"),
    [
        ({}, "frozen", "V", "values"),
        ({}, "norm_matched", "K", "keys"),
        ({"normaliser": "none"}, "frozen", "K", "keys"),
        ({"tie": True}, "frozen", "K", "keys"),
    ],
)
def test_dead_tokens_are_refused(options, rule, zero, what):
    layer = drawn(**options)
    torch.nn.init.zeros_(getattr(layer, zero))
    with pytest.raises(ValueError, match=f"`{rule}` draws new {what} .* and get no gradient"):
        layer.grow(rule=rule, tokens=24)
