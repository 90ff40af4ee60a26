"""What moves and what stays while an update is differentiated: an update as a map of independent rows.

Legend: B batch, T tokens, D dim, N rows, W width of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import descent
from ..descent import LayerObjective, descend
from ..layer import EnergyLayer
from ..lowering import Fused
from ..preconditioner import NormJacobian

READINGS = ("frozen", "token", "joint")
COORDINATES = ("read", "state")


@dataclass(frozen=True)
class Rows:
    """A map whose row n depends on row n of its argument alone: (N, W) -> (N, W), and where to differentiate it.

    Attributes:
        function: the map.
        at: the point, (N, W).
        reading: what was held, one of ``READINGS``.
    """

    function: Callable[[Tensor], Tensor]
    at: Tensor
    reading: str

    def transposed(self) -> Callable[[Tensor], Tensor]:
        """w -> J^T w, row by row."""
        z = self.at.detach().requires_grad_()
        out = self.function(z)
        if not out.requires_grad:
            return torch.zeros_like
        options = {"retain_graph": True, "materialize_grads": True}
        return lambda w: torch.autograd.grad(out, z, w, **options)[0]

    def product(self, v: Tensor) -> Tensor:
        """J v, row by row: forward mode, or twice the reverse where a kernel has no forward mode."""
        try:
            return torch.func.jvp(self.function, (self.at,), (v,))[1].detach()
        except RuntimeError:  # what is wrong with the function fails again below
            z = self.at.detach().requires_grad_()
            w = torch.zeros_like(z, requires_grad=True)
            options = {"materialize_grads": True, "create_graph": True}
            (pulled,) = torch.autograd.grad(self.function(z), z, w, **options)
            if not pulled.requires_grad:
                return torch.zeros_like(z)
            return torch.autograd.grad(pulled, w, v, materialize_grads=True)[0]

    def jacobian(self) -> Tensor:
        """All of J, (N, W, W), one pass a line."""
        transposed, lines = self.transposed(), []
        for i in range(self.at.shape[1]):
            w = torch.zeros_like(self.at)
            w[:, i] = 1.0
            lines.append(transposed(w))
        return torch.stack(lines, 1)


@contextmanager
def rows(
    update: nn.Module | Callable[..., Tensor],
    h: Tensor,
    *,
    reading: str | None = None,
    hold: Sequence[str] = (),
    tokens: int | None = 8,
    residual: bool | None = None,
    coordinates: str | None = None,
    **inputs,
) -> Iterator[Rows]:
    """The update as :class:`Rows` in one reading; see :func:`~cem.analysis.antisymmetry` for the arguments."""
    if h.dim() < 2:
        raise ValueError(
            f"states have shape (..., T, D): got {tuple(h.shape)}; type `h[None]` for one token"
        )
    h = h.detach()
    own = isinstance(update, EnergyLayer)
    if reading is None:
        reading = "token"
        if own or hold:
            reading = "joint" if own and update.joint else "frozen"
    _check(update, reading, hold, coordinates)
    if residual is None:
        residual = own or isinstance(update, nn.TransformerEncoderLayer)
    if own:
        update, h, inputs = _in_coordinates(update, h, coordinates, inputs)
    given, h = h.shape, h.reshape(-1, *h.shape[-2:])  # (B, T, D)

    def call(z: Tensor) -> Tensor:
        out = update(z.reshape(given) if len(z) == len(h) else z, **inputs)
        out = (out[0] if isinstance(out, tuple) else out).reshape(z.shape)
        return out - z if residual else out

    with ExitStack() as stack:
        # Fused attention has no second derivative and no forward mode; encoder layers have a path without any.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        if own and reading == "frozen":
            call = _frozen(update, h.reshape(given), inputs)
        if hold:
            stack.enter_context(_held(update, hold, lambda: call(h)))
        if reading == "token":
            yield _one_token(call, h, tokens)
        elif reading == "frozen":
            if not own:
                _refuse_mixing(call, h, update)
            shape = h.shape
            yield Rows(lambda z: call(z.reshape(shape)).reshape(z.shape), h.flatten(0, 1), reading)
        else:
            shape = h.shape
            yield Rows(lambda z: call(z.reshape(shape)).flatten(1), h.flatten(1), reading)


def _check(update, reading: str, hold: Sequence[str], coordinates: str | None) -> None:
    if reading not in READINGS:
        raise ValueError(
            f'`reading` is one of {", ".join(READINGS)}: got {reading!r}; type `reading="token"`'
        )
    if coordinates not in (None, *COORDINATES):
        raise ValueError(
            f'`coordinates` is "read" or "state": got {coordinates!r}; type `coordinates="read"`'
        )
    if coordinates is not None and not isinstance(update, EnergyLayer):
        raise ValueError(
            f"`coordinates` are those of an EnergyLayer: got {type(update).__name__}; give the module without its norm"
            " for what it reads, or with it for the state"
        )
    if hold and (isinstance(update, EnergyLayer) or not isinstance(update, nn.Module)):
        raise ValueError(
            f"`hold` names submodules of a module: got {type(update).__name__}; an energy layer holds its context and"
            " gates by itself, and a function holds what it closes over"
        )


def _in_coordinates(layer: EnergyLayer, h: Tensor, coordinates: str | None, inputs: dict):
    """The layer, the point and the inputs, read behind the norm where that is asked for."""
    if coordinates is None:
        bare = isinstance(layer.norm, nn.Identity)
        coordinates = "state" if bare or isinstance(layer.preconditioner, NormJacobian) else "read"
    if coordinates == "state":
        return layer, h, inputs
    if isinstance(layer.preconditioner, NormJacobian):
        raise ValueError(
            f"layer `{layer.energy_function.name}` is preconditioned by the Jacobian of its norm, which depends on the"
            ' state: got coordinates="read"; type `coordinates="state"`'
        )
    context = inputs.get("context")
    with torch.no_grad():
        if context is not None and layer.context_dim == layer.dim:
            inputs = inputs | {"context": layer.norm(context)}
        return _with(layer, norm=nn.Identity()), layer.norm(h), inputs


def _with(layer: EnergyLayer, **parts) -> EnergyLayer:
    """A copy that shares its parameters and has other parts."""
    found = copy.copy(layer)
    found._modules = dict(found._modules)
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def _frozen(layer: EnergyLayer, h: Tensor, inputs: dict) -> Callable[[Tensor], Tensor]:
    """The update of one call as a function of the state alone: context and gates stay those of h.

    The program of a layer may have put the state in the place of its frozen value, so it is made again without that.
    """
    lowering = layer.lowering
    if lowering.kind == "fused":
        lowering = Fused(replace(lowering.plan, still=False), ())
    layer = _with(layer, lowering=lowering, packs=False, tolerance=None, checkpoint=False)
    layer.dense = descent.needs_dense(layer, layer.lowering)
    _, first = layer.begin(h, **inputs)
    frozen, seen = first.frozen, first.seen

    def program(*given: Tensor) -> Tensor:  # another function, so that no step is taken in the span
        return layer.lowering.gradient(*given)

    def update(z: Tensor) -> Tensor:
        around = (layer, layer.norm(z), frozen, seen, first.values, first.fixed)
        moved, _ = descend(layer, LayerObjective(*around, program=program), z)
        return moved - z

    return update


@contextmanager
def _held(module: nn.Module, names: Sequence[str], run: Callable[[], Tensor]) -> Iterator[None]:
    """Within it the named submodules return what they return in ``run()``, whatever they are given."""
    names = (names,) if isinstance(names, str) else tuple(names)
    kept: dict[str, Tensor] = {}
    known = dict(module.named_modules())
    with ExitStack() as stack:
        for name in names:
            if name not in known:
                raise ValueError(
                    f"`hold` names submodules of {type(module).__name__}: got {name!r}; its submodules are"
                    f" {', '.join(filter(None, known))}"
                )

            def hook(_, __, out, name=name):
                return kept.setdefault(name, out.detach())

            stack.callback(known[name].register_forward_hook(hook).remove)
        with torch.no_grad():
            run()
        missing = [name for name in names if name not in kept]
        if missing:
            raise ValueError(
                f"`hold` names submodules that run: {type(module).__name__} did not call {', '.join(missing)}; give a"
                " function of the state that closes over the context"
            )
        yield


def _refuse_mixing(call: Callable[[Tensor], Tensor], h: Tensor, update) -> None:
    """``ValueError`` where another token moves the output of one although the context should be held.

    Two tokens differ in a bit of their places, so moving those with a bit, and those without, meets every pair.
    """
    places = torch.arange(h.shape[1], device=h.device)
    away = torch.linspace(-1.0, 2.0, h.shape[2]).to(h)  # no norm takes this away
    with torch.no_grad():
        before = call(h)
        most = 1e3 * torch.finfo(h.dtype).eps * before.abs().max()
        for bit in range((h.shape[1] - 1).bit_length()):
            for moved in (0, 1):
                moves = (places >> bit & 1) == moved
                after = call(h + moves[:, None] * away)
                if ((after - before)[:, ~moves].abs() > most).any():
                    raise ValueError(
                        "in the frozen reading tokens do not see each other move: got"
                        f" {type(update).__name__}, which mixes them; name what reads the context, such as"
                        " `hold=('k_proj', 'v_proj')`, or type `reading=\"token\"`"
                    )


def _one_token(call, h: Tensor, tokens: int | None) -> Rows:
    """Chosen tokens, each in a copy of its sequence in which it alone moves."""
    B, T, _ = h.shape
    count = B * T if tokens is None else min(tokens, B * T)
    chosen = torch.linspace(0, B * T - 1, count).round().long().to(h.device)
    b, t = chosen // T, chosen % T
    base, row = h[b], torch.arange(count, device=h.device)  # (N, T, D)

    def function(z: Tensor) -> Tensor:
        return call(base.index_put((row, t), z))[row, t]

    return Rows(function, h[b, t], "token")
