"""What every test shares: one thread, a seed, the device under test."""

import logging
import os

# Set before torch and matplotlib are imported, and inherited by the subprocesses of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

# With more threads, torch spins against every other process of a small machine.
torch.set_num_threads(1)

# A first example may compile or trace for seconds, so no deadline; the same examples every time.
settings.register_profile("cem", deadline=None, derandomize=True)
settings.load_profile("cem")

DEVICE = torch.device(os.environ.get("CEM_DEVICE", "cpu"))


def pytest_configure(config):
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"CEM_DEVICE={DEVICE}, but torch {torch.__version__} sees no CUDA device"
        )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def device():
    """The device that the suite runs on: the environment variable CEM_DEVICE, or the CPU."""
    return DEVICE


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and leaves the default dtype as it found it: float32."""
    torch.manual_seed(0)
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left is torch.float32, f"the test left the default dtype at {left}"


@pytest.fixture
def said(caplog, monkeypatch):
    """What transformers and cem log."""
    for name in ("transformers", "cem"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing: pictures are slow, and tested by themselves."""
    from cem.lm import pictures

    monkeypatch.setattr(pictures, "save", lambda out: None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder and the result of a run that nothing interrupted."""
    from training_runs import tiny_run

    from cem.lm import pictures, train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", lambda out: None)
        out = tmp_path_factory.mktemp("trained")
        return out, train(tiny_run(), out)


@pytest.fixture
def double():
    """New tensors are of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
