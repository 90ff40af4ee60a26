"""How far two tensors are apart."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The larger of two ratios: RMS(difference) / RMS(expected), max|difference| / max|expected|.

    0 where both are exactly zero or empty, infinity where only ``expected`` is zero, NaN for NaN.
    """
    difference = (actual.detach().double() - expected.detach().double()).flatten()
    expected = expected.detach().double().flatten()
    if not len(expected):
        return 0.0
    worst = 0.0
    for size in (lambda v: v.square().mean().sqrt(), lambda v: v.abs().max()):
        error, scale = float(size(difference)), float(size(expected))
        if math.isnan(error) or math.isnan(scale):
            return math.nan
        worst = max(worst, error / scale if scale else (0.0 if error == 0 else math.inf))
    return worst


def assert_close(
    actual: Tensor, expected: Tensor, rtol: float, *, atol: float = 0.0, name: str = "tensors"
) -> float:
    """Assert that the :func:`relative_error` of two tensors of one shape is at most ``rtol``.

    ``atol`` is a largest difference that always passes, for values that cancel to rounding noise.
    Returns the relative error.

    >>> import torch
    >>> assert_close(torch.ones(2), torch.ones(2), 1e-6)
    0.0
    """
    if actual.shape != expected.shape:
        shapes = f"got {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        raise AssertionError(f"{name}: the shapes differ: {shapes}")
    error = relative_error(actual, expected)
    if error <= rtol:
        return error
    difference = float((actual.detach().double() - expected.detach().double()).abs().max())
    if not difference <= atol:
        raise AssertionError(
            f"{name}: the relative error is {error:.3g}, more than {rtol:.3g}"
            f" (largest difference {difference:.3g})"
        )
    return error
