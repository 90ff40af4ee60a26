"""Energies of curvatures that are given: least squares, and layers of them."""

import torch

import cem


@cem.energy(h="dim", U="hidden dim", y="hidden")
def least_squares(h, *, U, y):
    """|U h - y|^2 / 2: convex, with the curvatures of U^T U."""
    return 0.5 * (U @ h - y).square().sum()


def quadratic_layer(width, low=0.2, high=1.0, shift=False, **options):
    """A layer of sum_i w_i (h_i - c_i)^2 / 2 in float64, with w between two curvatures, and w and c.

    c is 0 unless ``shift``.
    """
    layer = cem.derive(least_squares, dim=width, hidden=width, dtype=torch.float64, **options)
    spectrum = torch.linspace(low, high, width, dtype=torch.float64)
    lowest = torch.linspace(-1.0, 2.0, width, dtype=torch.float64) * shift
    with torch.no_grad():
        layer.U.copy_(spectrum.sqrt().diag())
        layer.y.copy_(spectrum.sqrt() * lowest)
    return layer, spectrum, lowest
