"""`lowering="flex"`: what is seen, where it runs, and the numbers of torch's attention."""

import re
import shutil

import pytest
import torch

import cem
from cem import energies
from cem.inputs import Reader
from cem.lowering import LoweringError
from cem.lowering.kernels import flex
from cem.visibility import packed, visible_mask

T = 150  # no multiple of a block
SIZES = {"dim": 32, "heads": 2, "rank": 16}
GROUPED = {"dim": 32, "groups": 2, "per_group": 2, "rank": 16}


def inputs(count=T, batch=2):
    """States, documents in no order, and padding that leaves some documents without a token."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(batch, count, 32, generator=generator)
    documents = torch.randint(0, 9, (batch, count), generator=generator)
    documents[0] = torch.arange(count) // 37
    present = torch.ones(batch, count, dtype=torch.bool)
    present[0, : count // 3], present[-1, -count // 3 :] = False, False
    pairs = torch.rand(count, count, generator=generator) < 0.3
    pairs[5] = False
    return h, documents, present, pairs


def pair_of_layers(energy, sizes, **options):
    """The layer with ``lowering="auto"`` and the one with ``"flex"``, with the same random parameters."""
    plain, ours = (
        cem.derive(energy, lowering=kind, **sizes, **options) for kind in ("auto", "flex")
    )
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.fixture
def ran(monkeypatch):
    """What ``flex_attention`` was given as a mask, one entry a call."""
    masks, real = [], flex._flex

    def spy(*arguments):
        masks.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(flex, "_flex", spy)
    return masks


@pytest.fixture
def fresh():
    """Room for as many compiled shapes as torch allows."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- what is seen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("numbered", [True, False])
def test_documents_say_what_the_mask_says(causal, padded, numbered):
    _, documents, present, _ = inputs(9)
    given = {
        "visible": present if padded else None,
        "document_ids": documents if numbered else None,
    }
    given |= {"lead": (2,), "T": 9, "causal": causal, "device": "cpu", "name": "e"}
    assert torch.equal(packed(**given).dense(), visible_mask(S=9, **given))


def test_documents_make_no_mask_of_pairs(monkeypatch):
    """Only where the energy, a condition or the user asks for pairs of tokens is there a T x S."""
    h, documents, present, pairs = inputs(9)
    seen, real = [], Reader.__call__

    def spy(*arguments, **keywords):
        found = real(*arguments, **keywords)
        seen.append(type(found[2].visible).__name__)
        return found

    monkeypatch.setattr(Reader, "__call__", spy)
    plain, ours = pair_of_layers(energies.rotary_interaction, SIZES)
    _, window = pair_of_layers(energies.sliding_window_interaction, SIZES)
    _, searching = pair_of_layers(energies.interaction, SIZES, update=cem.LineSearch())
    both = {"document_ids": documents, "visible": present}
    ours(h, **both), ours(h, visible=present), ours(h, document_ids=documents[0])
    plain(h, **both), window(h, **both), ours(h, visible=pairs[None]), searching(h, **both)
    ours.energy(h, **both), ours(h, context=torch.cat([h, h], 1), visible=present.repeat(1, 2))
    assert seen == ["Packed"] * 3 + ["Tensor"] * 6
    found, expected = (cem.trace(layer, h, **both)[0].before for layer in (ours, plain))
    assert torch.equal(found, expected)


def test_documents_are_checked():
    h, documents, present, _ = inputs(9)
    layer = cem.derive(energies.interaction, lowering="flex", **SIZES)
    with pytest.raises(ValueError, match=r"`document_ids` must have shape \(9,\) or \(2, 9\)"):
        layer(h, document_ids=documents[:, 1:])
    with pytest.raises(ValueError, match=r"`visible` must have shape \(2, 9\) or \(2, 9, 9\)"):
        layer(h, visible=present[:, 1:])
    with pytest.raises(TypeError, match="`visible` must be bool"):
        layer(h, visible=present.int())


# -- where it does not run ------------------------------------------------------------------------------------


ELSEWHERE = {
    "float64": lambda layer, h, **seen: layer.double()(h.double(), **seen),
    "float16": lambda layer, h, **seen: layer.half()(h.half(), **seen),
    "training": lambda layer, h, **seen: layer.requires_grad_(True)(h, **seen),
    "inside of torch.func": lambda layer, h, **seen: torch.vmap(lambda z: layer(z, **seen))(
        h[None]
    ),
    "exported": lambda layer, h, **seen: torch.export.export(layer, (h,), seen).module()(h, **seen),
    "compiled": lambda layer, h, **seen: torch.compile(layer, backend="eager", fullgraph=True)(
        h, **seen
    ),
}


@pytest.mark.parametrize("seen", ["documents", "pairs", "nothing hidden"])
@pytest.mark.parametrize("run", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.filterwarnings("ignore:There is a performance drop.*batching rule")
def test_elsewhere_it_is_the_same_call(run, seen, ran, fresh):
    h, documents, present, pairs = inputs()
    given = {
        "documents": {"document_ids": documents, "visible": present},
        "pairs": {"visible": pairs[None]},
        "nothing hidden": {},
    }
    for energy, sizes in ((energies.interaction, SIZES), (energies.grouped_interaction, GROUPED)):
        plain, ours = (x.requires_grad_(False) for x in pair_of_layers(energy, sizes))
        found, expected = (run(layer, h, **given[seen]) for layer in (ours, plain))
        assert torch.equal(found, expected)
    assert not ran


@torch.no_grad()
def test_few_tokens_and_other_contexts_are_the_same_call(ran):
    h, documents, present, pairs = inputs()
    plain, ours = pair_of_layers(energies.rotary_interaction, SIZES)
    short = {"document_ids": documents[:, :127], "visible": present[:, :127]}
    assert torch.equal(ours(h[:, :127], **short), plain(h[:, :127], **short))
    wide = {"context": h, "visible": pairs[None, -140:]}
    assert torch.equal(ours(h[:, -140:], **wide), plain(h[:, -140:], **wide))
    caches = [layer.init_cache(2, T) for layer in (ours, plain)]
    for part in (h[:, :9], h[:, 9:10], h[:, 10:]):
        found, expected = (
            layer(part, cache=cache) for layer, cache in zip((ours, plain), caches, strict=True)
        )
        assert torch.equal(found, expected)
    assert not ran


def test_gradients_are_those_of_the_same_call():
    h, documents, present, _ = inputs()
    layers = pair_of_layers(energies.relative_interaction, {**SIZES, "buckets": 32})
    found, expected = (
        torch.autograd.grad(
            layer(h, document_ids=documents, visible=present).sin().sum(), layer.parameters()
        )
        for layer in layers
    )
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_too_many_shapes_are_the_same_call(monkeypatch):
    def compiled(kind):
        def run(*arguments, **keywords):
            raise torch._dynamo.exc.FailOnRecompileLimitHit("too many")

        return run

    monkeypatch.setattr(flex, "_compiled", compiled)
    h, documents, *_ = inputs()
    plain, ours = pair_of_layers(energies.interaction, SIZES)
    assert torch.equal(ours(h, document_ids=documents), plain(h, document_ids=documents))


@pytest.mark.parametrize("seen", ["documents", "pairs"])
@torch.no_grad()
def test_blocks_are_made_in_one_graph(seen, monkeypatch, ran, fresh):
    """What a GPU compiles together with the layer, with the eager definition of torch's kernel."""
    monkeypatch.setattr(flex, "runs", lambda *tensors: True)
    h, documents, present, pairs = inputs()
    given = {"document_ids": documents, "visible": present}
    given = given if seen == "documents" else {"visible": pairs[None]}
    plain, ours = pair_of_layers(energies.grouped_interaction, GROUPED)
    found = torch.compile(ours, backend="eager", fullgraph=True)(h, **given)
    difference = found - plain(h, **given)
    assert difference.abs().max() <= 1e-5 * plain(h, **given).abs().max()
    assert ran


# -- the choice -----------------------------------------------------------------------------------------------


def test_the_lowering_says_where_it_runs():
    lowering = cem.derive(energies.interaction, lowering="flex", **SIZES).lowering
    assert (lowering.kind, lowering.kernels) == ("fused", ("flex_attention", "matmul"))
    assert lowering.reasons[0].endswith("elsewhere it is `sdpa` with the mask")
    assert re.search(
        r"kernels.flex_attention\(\s*q, k, k, visible, causal, 0.25, None", lowering.code
    )
    plain = cem.derive(energies.interaction, **SIZES).lowering
    assert plain.kernels == ("matmul", "sdpa") and "flex" not in plain.code and not plain.reasons


@pytest.mark.parametrize(
    ("energy", "sizes", "why"),
    [
        (energies.gated, {"dim": 8, "hidden": 4}, "no softmax over the context; type"),
        (energies.soft_capped_interaction, SIZES, "not an average of context features"),
        (energies.sink_interaction, SIZES, "log-sum-exp of attention is wanted too"),
    ],
)
def test_an_energy_without_such_an_attention_is_refused(energy, sizes, why):
    with pytest.raises(LoweringError, match=f"has nothing for `flex_attention`: .*{why}"):
        cem.derive(energy, lowering="flex", **sizes)


def test_a_callable_that_cannot_be_read_is_refused():
    @cem.energy(h="dim")
    def running(h):
        return h.cumsum(0).sum()

    with pytest.raises(LoweringError, match="energy `running` cannot be fused"):
        cem.derive(running, dim=3, lowering="flex")


# -- where it runs --------------------------------------------------------------------------------------------

CASES = {
    "documents": (energies.interaction, SIZES, {}, {"documents"}),
    "rotary, both directions, padding": (
        energies.rotary_interaction,
        SIZES,
        {"causal": False, "steps": 2},
        {"documents", "present"},
    ),
    "grouped heads": (energies.grouped_interaction, GROUPED, {}, {"documents", "present"}),
    "pairs": (energies.grouped_interaction, GROUPED, {}, {"pairs"}),
    "a window": (energies.sliding_window_interaction, SIZES, {}, {"documents"}),
    "a bias": (energies.relative_interaction, {**SIZES, "buckets": 32}, {}, set()),
    "a bias and documents": (
        energies.relative_interaction,
        {**SIZES, "buckets": 32},
        {},
        {"documents", "present"},
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def made(case, count=T):
    """The two layers of a case, states and what they see."""
    energy, sizes, options, names = case
    h, documents, present, pairs = inputs(count)
    seen = {"document_ids": documents} if "documents" in names else {}
    seen |= {"visible": present} if "present" in names else {}
    seen |= {"visible": pairs[None]} if "pairs" in names else {}
    return (*pair_of_layers(energy, sizes, **options), h, seen)


needs_compiler = pytest.mark.skipif(
    not flex.runs(*(torch.zeros(1, 1, 128, 1),) * 3)
    or not (shutil.which("g++") or shutil.which("c++")),
    reason="needs AVX2 and a C++ compiler",
)


# Each compiles for seconds, so not those whose parts are all in others.
@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"documents", "a bias and documents"}))
@torch.no_grad()
def test_the_numbers_on_a_cpu(name, ran, fresh):
    plain, ours, h, seen = made(CASES[name])
    expected = plain(h, **seen) - h
    for _ in range(2):
        difference = ours(h, **seen) - h - expected
        assert difference.abs().max() <= 1e-5 * expected.abs().max()
    assert len(ran) == 2 * ours.steps
    empty = ~plain.reader(plain.norm, h, dense=True, **seen)[2].visible.any(-1)[:, 0]
    assert not (ours(h, **seen) - h)[empty.expand(2, T)].any()


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
def test_bfloat16_on_a_cpu(ran, fresh):
    plain, ours, h, seen = made(CASES["documents"])
    exact = (plain.double()(h.double(), **seen) - h).norm()
    short, error = h.bfloat16(), []
    truth = plain(short.double(), **seen)
    for layer in (plain.bfloat16(), ours.bfloat16()):
        error.append((layer(short, **seen).double() - truth).norm())
    assert len(ran) == 1
    assert error[1] <= 2 * error[0] + 2**-8 * exact


@pytest.mark.gpu
@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_numbers_on_a_gpu(case, dtype, tolerance, ran, fresh):
    """The output and all gradients; bfloat16 keeps 8 bits, and gradients sum many rounded terms."""
    torch.set_float32_matmul_precision("highest")
    plain, ours, h, seen = made(case, 300)
    plain = plain.double()
    ours = ours.to("cuda", dtype)
    h = h.to(dtype)

    def results(layer, h, seen):
        h = h.clone().requires_grad_()
        change = layer(h, **seen) - h
        weights = torch.linspace(-1, 1, change.numel(), device=h.device).view_as(change)
        found = torch.autograd.grad(change, [h, *layer.parameters()], weights.to(h.dtype))
        return [x.double().cpu() for x in (change.detach(), *found)]

    truth = results(plain, h.double(), seen)
    found = results(ours, h.cuda(), {name: mask.cuda() for name, mask in seen.items()})
    # A bias that is learned takes torch's attention in training.
    assert bool(ran) == ("bias" not in ours.state_dict())
    for one, other in zip(found, truth, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
