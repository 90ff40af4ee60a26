"""The catalogue on a CUDA device: float32 and bfloat16, compiled and not."""

import pytest
import torch
from helpers import CONTEXT, ENERGIES, S, T, assert_same, by_name, copy_of, gradients
from torch import nn

import cem
from cem.testing import assert_close, relative_error

pytestmark = pytest.mark.gpu
every = pytest.mark.parametrize("case", ENERGIES, ids=by_name)
with_context = pytest.mark.parametrize("case", CONTEXT, ids=by_name)
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_float32():
    """Products of float32 in float32, so that the tolerance of the CPU holds."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def truth(case, **fixed):
    layer = case.derive()
    return gradients(layer, layer, case.inputs(), **fixed)


def on_cpu(found):
    return {name: value.double().cpu() for name, value in found.items()}


@every
def test_float32(case):
    layer = case.derive().to(CUDA, torch.float32)
    found = gradients(layer, layer, case.inputs(dtype=torch.float32, device=CUDA))
    assert_same(on_cpu(found), truth(case), 1e-5)


@every
def test_float64(case):
    layer = case.derive().to(CUDA)
    found = gradients(layer, layer, case.inputs(device=CUDA))
    assert_same(on_cpu(found), truth(case), 1e-12)


@every
def test_bfloat16_is_as_good_as_eager_autograd(case):
    exact = case.derive()
    exact.load_state_dict({n: p.bfloat16().double() for n, p in exact.state_dict().items()})
    inputs = {name: z.bfloat16() for name, z in case.inputs(device=CUDA).items()}
    expected = gradients(exact, exact, {name: z.double().cpu() for name, z in inputs.items()})
    layer = copy_of(exact).to(CUDA, torch.bfloat16)
    slow = copy_of(exact, lowering="autograd").to(CUDA, torch.bfloat16)
    found = on_cpu(gradients(layer, layer, inputs))
    eager = on_cpu(gradients(slow, slow, inputs))
    for name, value in expected.items():
        limit = 2 * relative_error(eager[name], value) + torch.finfo(torch.bfloat16).eps
        assert_close(found[name], value, limit, name=name)


@every
def test_compiled(case):
    torch._dynamo.reset()
    layer = case.derive(steps=2, norm=nn.RMSNorm).to(CUDA, torch.float32)
    inputs = case.inputs(dtype=torch.float32, device=CUDA)
    compiled = torch.compile(layer, fullgraph=True)
    found, plain = gradients(compiled, layer, inputs), gradients(layer, layer, inputs)
    assert_same(on_cpu(found), on_cpu(plain), 1e-5)


@with_context
@pytest.mark.parametrize("causal", [False, True])
def test_masks(case, causal):
    visible = torch.rand(2, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[:, 2] = False
    exact = case.derive(causal=causal)
    expected = gradients(exact, exact, case.inputs(context=True), visible=visible)
    layer = case.derive(causal=causal).to(CUDA, torch.float32)
    inputs = case.inputs(context=True, dtype=torch.float32, device=CUDA)
    found = gradients(layer, layer, inputs, visible=visible.to(CUDA))
    assert all(value.isfinite().all() for value in found.values())
    assert_same(on_cpu(found), expected, 1e-5)


@with_context
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causality_to_the_bit(case, dtype):
    layer = case.derive().to(CUDA, dtype)
    inputs = case.inputs(dtype=dtype, device=CUDA)
    t = T // 2
    later = {
        name: torch.cat([z[:, : t + z.shape[1] - T], z[:, t + z.shape[1] - T :].cos()], 1)
        for name, z in inputs.items()
    }
    assert torch.equal(layer(**later)[:, :t], layer(**inputs)[:, :t])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energies_from_the_kernel(case, dtype):
    exact = case.derive()
    exact.load_state_dict({n: p.to(dtype).double() for n, p in exact.state_dict().items()})
    inputs = case.inputs(dtype=dtype, device=CUDA)
    with torch.no_grad():
        expected = exact.energy(**{name: z.double().cpu() for name, z in inputs.items()})
        found = copy_of(exact).to(CUDA, dtype).energy(**inputs)
    # An energy is one sum of many rounded terms, which may cancel.
    rtol = 1e-5 if dtype == torch.float32 else 0.1
    assert_close(found.double().cpu(), expected, rtol)


@with_context
def test_masked_energies_from_the_kernel(case):
    visible = torch.rand(2, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[:, 2] = False
    inputs = case.inputs(context=True)
    with torch.no_grad():
        expected = case.derive(causal=False).energy(**inputs, visible=visible)
        layer = case.derive(causal=False).to(CUDA, torch.float32)
        inputs = {name: z.to(CUDA, torch.float32) for name, z in inputs.items()}
        found = layer.energy(**inputs, visible=visible.to(CUDA))
    assert_close(found.double().cpu(), expected, 1e-5)


def test_autocast_and_trace():
    case = CONTEXT[0]
    layer = case.derive(norm=nn.RMSNorm).to(CUDA, torch.float32)
    inputs = case.inputs(dtype=torch.float32, device=CUDA)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = gradients(layer, layer, inputs)
        (found,) = cem.trace(layer, **inputs)
    assert_same(on_cpu(low), on_cpu(gradients(layer, layer, inputs)), 4e-2)
    assert (found.drop > 0).all()


def test_long_sequences_in_bfloat16():
    """A head dimension and a length at which the fused kernels of the device are used."""
    options = {"dim": 256, "heads": 4, "rank": 64, "dtype": torch.bfloat16, "device": CUDA}
    layer = cem.derive(cem.energies.interaction, **options)
    slow = cem.derive(cem.energies.interaction, **options | {"dtype": torch.float32})
    slow.load_state_dict(layer.state_dict())
    h = torch.randn(2, 512, 256, device=CUDA).bfloat16()
    found = gradients(layer, layer, {"h": h})
    expected = gradients(slow, slow, {"h": h.float()})
    # bfloat16 keeps 8 bits.
    assert_same(on_cpu(found), on_cpu(expected), 2e-2)
