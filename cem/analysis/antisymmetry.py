"""How far the Jacobian of an update is from symmetric.

Legend: B batch, T tokens, D dim, N rows, W width of a row, P probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .readings import Rows, rows


@dataclass(frozen=True)
class Antisymmetry:
    """|J - J^T| / |J| of an update in one reading, Frobenius norms over all rows.

    Attributes:
        relative: |J - J^T| / |J|: 0 for the gradient of a potential, 2 for a rotation, about sqrt(2) for a matrix
            with independent entries.
        error: the standard error of ``relative`` over the probes; 0 where J was computed in full.
        rows: the same for each token that moved, (N,); of each sequence in the joint reading.
        reading: ``"frozen"``, ``"token"`` or ``"joint"``.
        exact: whether J was computed in full.
    """

    relative: float
    error: float
    rows: Tensor
    reading: str
    exact: bool

    @property
    def ratio(self) -> float:
        """|J - J^T| / |J + J^T|, from 0 to infinity; 1 where turning and stretching are equal."""
        rest = 4.0 - self.relative**2
        return self.relative / math.sqrt(rest) if rest > 0 else math.inf

    def __str__(self) -> str:
        spread = "" if self.exact else f" ± {self.error:.1g}"
        return f"{self.relative:.3g}{spread} ({self.reading})"


def antisymmetry(
    update: nn.Module | Callable[..., Tensor],
    h: Tensor,
    *,
    reading: str | None = None,
    hold: Sequence[str] = (),
    tokens: int | None = 8,
    residual: bool | None = None,
    coordinates: str | None = None,
    probes: int = 32,
    exact: bool | None = None,
    generator: torch.Generator | None = None,
    **inputs,
) -> Antisymmetry:
    """How far an update u(h) is from the gradient of a potential: |J - J^T| / |J|, J = du/dh, Frobenius norms.

    A field on all of R^D is the gradient of a scalar if and only if its Jacobian is symmetric everywhere; this
    measures it at one state. What J is depends on what is held while the state of a token moves, the *reading*:

    - ``"frozen"``: the context, and gates, stay what they were: keys and values do not follow, those of the token
      itself included. The reading in which an energy layer is a gradient, and its default. Of another module say
      with ``hold`` which submodules read the context, or give a function that closes over it; a module that still
      mixes tokens is refused. Hold no more than that: with everything held J is 0, and says nothing.
    - ``"token"``: one token moves, the others stay. A token that attends to itself then moves its own key and value
      too. The default of modules.
    - ``"joint"``: all tokens of a sequence move, J is (T D, T D). Of a causal module it is triangular in blocks, so
      never symmetric unless no token looks back.

    J costs min(W, 2 P) passes: in full where that is no dearer, else by Hutchinson's estimator with P probes v of
    random signs, |J - J^T|^2 = E |J v - J^T v|^2 and |J|^2 = E (|J v|^2 + |J^T v|^2) / 2, which is exactly 0 for a
    symmetric J whatever the probes.

    Args:
        update: an :class:`~cem.EnergyLayer`, a module or a function, (..., T, D) to the same; of a tuple the first.
        h: states, (..., T, D); float64 gives the most digits. Put modules with dropout in eval mode.
        reading: as above.
        hold: names of submodules whose outputs stay what they are at h, such as ``("k_proj", "v_proj")``.
        tokens: how many tokens of the batch move, one at a time, in the ``"token"`` reading; all if None.
        residual: whether ``update`` returns h + u(h), so that h is subtracted; by default for energy layers and
            ``nn.TransformerEncoderLayer``. It makes no difference to J - J^T, but to |J|.
        coordinates: of an energy layer behind a norm: ``"read"``, the default, differentiates for g = norm(h), in
            which the update is a gradient; ``"state"`` for h: there the Jacobian is the Hessian times that of the
            norm, a product of symmetric matrices that is not symmetric (it is mirror descent).
        probes: P.
        exact: compute all of J, or never.
        generator: where probes are drawn from.
        **inputs: further arguments of ``update``. In the ``"token"`` reading the batch is one copy a token, over
            which they must broadcast.

    Raises:
        ValueError: an unknown reading; a module that mixes tokens in the frozen one; ``hold`` of something that is
            not there or does not run; coordinates of something without.

    >>> import torch, cem
    >>> from cem.analysis import antisymmetry
    >>> from cem.energies import interaction
    >>> h = torch.randn(5, 12, dtype=torch.float64)
    >>> layer = cem.derive(interaction, dim=12, heads=2, rank=4, dtype=torch.float64)
    >>> antisymmetry(layer, h).relative < 1e-12, antisymmetry(layer, h, reading="token").relative > 0.1
    (True, True)
    >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> antisymmetry(lambda h: h @ turn, torch.randn(3, 2)).relative
    2.0

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
    """
    if probes < 2:
        raise ValueError(f"`probes` is at least 2, for an error: got {probes}; type `probes=32`")
    options = {"reading": reading, "hold": hold, "tokens": tokens, "residual": residual}
    with rows(update, h, **options, coordinates=coordinates, **inputs) as found:
        if exact is None:
            exact = found.at.shape[1] <= 2 * probes
        if exact:
            J = found.jacobian()
            turned, size = (J - J.mT).square().sum((1, 2))[None], J.square().sum((1, 2))[None]
        else:
            turned, size = _probed(found, probes, generator)
    relative, error = _ratio(turned.sum(1), size.sum(1))
    each = (turned.mean(0) / size.mean(0)).nan_to_num(0.0, 0.0, 0.0).sqrt()
    return Antisymmetry(relative, error, each, found.reading, exact)


def _probed(found: Rows, probes: int, generator) -> tuple[Tensor, Tensor]:
    """|J v - J^T v|^2 and (|J v|^2 + |J^T v|^2) / 2 of each probe and row, (P, N)."""
    transposed, at = found.transposed(), found.at
    turned, size = [], []
    for _ in range(probes):
        signs = torch.randint(0, 2, at.shape, generator=generator, device=at.device)
        v = (2 * signs - 1).to(at.dtype)
        forth, back = found.product(v), transposed(v)
        turned.append((forth - back).square().sum(1))
        size.append((forth.square() + back.square()).sum(1) / 2)
    return torch.stack(turned), torch.stack(size)


def _ratio(turned: Tensor, size: Tensor) -> tuple[float, float]:
    """sqrt(mean(turned) / mean(size)) and its standard error by the delta method; 0 for J = 0."""
    turned, size = turned.double(), size.double()
    if not size.mean() > 0:
        return 0.0, 0.0
    square = turned.mean() / size.mean()
    if len(turned) == 1 or square == 0:
        return float(square.sqrt()), 0.0
    spread = (turned - square * size).std() / size.mean() / len(turned) ** 0.5
    return float(square.sqrt()), float(spread / (2 * square.sqrt()))
