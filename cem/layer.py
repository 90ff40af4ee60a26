"""derive: from an energy to the layer that descends it.

Legend: B batch, T tokens, S context tokens, D dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

import torch
from sympy import Symbol
from torch import Tensor, nn

from . import spectrum
from .certificate import certify
from .energy import Energy
from .initialisation import initialise
from .language.symbols import Scalar
from .lowering import Lowering, lower
from .preconditioner import AbstractPreconditioner
from .sizes import check_names, solve_scalars, solve_sizes, width_of
from .update import AbstractUpdate, GradientDescent
from .visibility import visible_mask

REFRESH = ("layer", "step")
ATTRIBUTES = (
    "dim",
    "context_dim",
    "update",
    "preconditioner",
    "norm",
    "lowering",
    "steps",
    "causal",
    "refresh",
)


class EnergyLayer(nn.Module):
    """The layer h+ = h - step_size * P dE/dh of an energy; made by :func:`derive`.

    Parameters are registered under their own names (``layer.Q``); a learned scalar that must stay positive is
    registered as its logarithm (``layer.log_beta``).

    Attributes:
        energy_function: the :class:`~cem.Energy`.
        sizes: the named sizes, by name.
        scalars: the fixed scalars, by name.
        lowering: how dE/dh is computed: ``.kind``, ``.kernels``, ``.reasons``.
        code: the program of dE/dh as readable Python.
        certificate: what is guaranteed about its descent, a :class:`~cem.Certificate`.
    """

    def __init__(
        self,
        energy: Energy,
        sizes: Mapping[Symbol, int],
        scalars: Mapping[Scalar, float],
        *,
        learn: Iterable[str],
        causal: bool,
        steps: int,
        update: AbstractUpdate,
        preconditioner: AbstractPreconditioner | None,
        norm: nn.Module,
        refresh: str,
        lowering: str,
    ) -> None:
        super().__init__()
        self.energy_function = energy
        self.causal, self.steps, self.refresh = causal, steps, refresh
        self._sizes, self._asked = dict(sizes), lowering
        self._fixed = {s: v for s, v in scalars.items() if s.name not in learn}
        self.dim = width_of(energy.width, sizes)
        self.context_dim = self.dim
        if energy.context is not None:
            self.context_dim = width_of(energy.context.shape[1], sizes)
        self.update, self.preconditioner, self.norm = update, preconditioner, norm
        for parameter in energy.parameters:
            shape = [width_of(size, sizes) for size in parameter.shape]
            self.register_parameter(str(parameter.name), nn.Parameter(torch.empty(shape)))
        self._learned = tuple(s for s in scalars if s.name in learn)
        for scalar in self._learned:
            value, name = torch.tensor(float(scalars[scalar])), scalar.name
            if scalar.is_positive:
                value, name = value.log(), f"log_{name}"
            self.register_parameter(name, nn.Parameter(value))
        self.reset_parameters()
        self.lowering = self._lower()

    def _lower(self) -> Lowering:
        names = tuple(str(p.name) for p in self.energy_function.parameters)
        names += tuple(s.name for s in self._learned)
        fixed: tuple[str, ...] = ()
        if self.steps > 1:
            fixed = ("x", "visible", "causal", *names)
            fixed += ("frozen",) if self.refresh == "layer" else ()
        return lower(
            self.energy_function, self._sizes, self._fixed, names, kind=self._asked, fixed=fixed
        )

    def reset_parameters(self) -> None:
        """Draw every parameter afresh; see :func:`~cem.initialisation.initialise`."""
        tensors = {p: getattr(self, str(p.name)) for p in self.energy_function.parameters}
        initialise(tensors, self.energy_function, self.dim)

    def forward(
        self, h: Tensor, *, context: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """The state after ``steps`` updates.

        Args:
            h: states, shape (..., T, D).
            context: the tokens to look at, shape (..., S, D); the states themselves if None. A causal layer sees
                s <= t + S - T: the states are the last T tokens of the context.
            visible: bool, True where a token may look: (..., S) for padding, or (..., T, S). It adds to
                causality. A token that sees nothing gets no force from the context.

        Returns:
            states, shape (..., T, D).
        """
        shape = h.shape
        h, g, x, mask, causal = self.inputs(h, context, visible, self.lowering.needs_mask)
        values = self.values()
        frozen = g
        fixed = self.lowering.prepare(g, frozen, x, mask, causal, *values)
        state = self.update.init(h)
        for step in range(self.steps):
            if step:
                g = self.norm(h)
                frozen = g if self.refresh == "step" else frozen
            gradient = self.lowering.gradient(g, frozen, x, mask, causal, *values, *fixed)
            h, state = self.move(h, gradient, state)
        return h.reshape(shape)

    def move(self, h: Tensor, gradient: Tensor, state):
        """One update of h (B, T, D) along what ``lowering.gradient`` returned."""
        if self.preconditioner is not None:
            gradient = self.preconditioner(gradient)
        return self.update.update(h, gradient, state, self.lowering.scale)

    def values(self) -> tuple[Tensor, ...]:
        """Parameters and learned scalars in the order in which the lowering takes them."""
        found = [getattr(self, str(p.name)) for p in self.energy_function.parameters]
        for scalar in self._learned:
            if scalar.is_positive:
                found.append(getattr(self, f"log_{scalar.name}").exp())
            else:
                found.append(getattr(self, scalar.name))
        return tuple(found)

    def energy(
        self,
        h: Tensor,
        *,
        context: Tensor | None = None,
        frozen: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The energy of every token, shape (..., T), dimensionless, lower is better.

        ``context`` and ``frozen`` default to ``h``. Give both the states *before* a step to ask for the energy
        after it at the context and the gates that the step saw.
        """
        shape = h.shape
        frozen = h if frozen is None else frozen
        if frozen.shape != shape:
            raise ValueError(
                f"layer `{self.energy_function.name}`: `frozen` must have the shape of the state:"
                f" got {tuple(frozen.shape)} and {tuple(shape)}; give the states before the step"
            )
        values = self.values()
        tensors = (h, context, frozen, *values, *self.norm.parameters())
        tracked = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        function = self.lowering.energy if tracked else self.lowering.fast_energy
        _, g, x, mask, causal = self.inputs(h, context, visible, function.needs_mask)
        frozen = self.norm(frozen.reshape(g.shape))
        return function(g, frozen, x, mask, causal, *values).reshape(shape[:-1])

    def inputs(
        self, h: Tensor, context: Tensor | None, visible: Tensor | None, dense: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
        """Checked inputs with one batch axis: (h, norm(h), norm(context), mask, causal).

        ``dense`` asks for the mask (B or 1, 1, T, S) even where a kernel could do with ``causal`` alone.
        """
        self._check(h, "state", self.dim)
        tokens = h.reshape(-1, *h.shape[-2:])
        g = self.norm(tokens)
        if self.energy_function.context is None:
            if context is not None or visible is not None:
                what = "context" if context is not None else "visible"
                raise ValueError(
                    f"layer `{self.energy_function.name}` has no context: got `{what}`;"
                    f" call it without `{what}`"
                )
            return tokens, g, None, None, False
        if context is None:
            if self.context_dim != self.dim:
                raise ValueError(
                    f"layer `{self.energy_function.name}` needs a context of width {self.context_dim}: got none;"
                    " call it with `context=`"
                )
            x = g
        else:
            self._check(context, "context", self.context_dim)
            if context.shape[:-2] != h.shape[:-2]:
                raise ValueError(
                    f"layer `{self.energy_function.name}`: state and context must have the same leading sizes:"
                    f" got {tuple(h.shape)} and {tuple(context.shape)}; expand one of them"
                )
            x = context.reshape(-1, *context.shape[-2:])
            x = self.norm(x) if self.context_dim == self.dim else x
        mask, causal = self._visible(tokens.shape[1], x.shape[1], visible, h, dense)
        return tokens, g, x, mask, causal

    def _check(self, h: Tensor, what: str, width: int) -> None:
        name = self.energy_function.name
        if not h.is_floating_point():
            raise TypeError(
                f"layer `{name}` takes a floating-point {what}: got {h.dtype}; embed tokens first or type"
                " `h.float()`"
            )
        if h.dim() < 2 or h.shape[-1] != width:
            raise ValueError(
                f"layer `{name}` takes a {what} of shape (..., tokens, {width}): got {tuple(h.shape)}"
            )
        if h.shape[-2] == 0:
            raise ValueError(
                f"layer `{name}` needs at least one token: got a {what} of shape {tuple(h.shape)}"
            )

    def _visible(
        self, T: int, S: int, visible: Tensor | None, h: Tensor, dense: bool
    ) -> tuple[Tensor | None, bool]:
        """The mask (B or 1, 1, T, S) or None, and whether a kernel must still apply causality."""
        energy = self.energy_function
        if self.causal and S < T:
            raise ValueError(
                f"causal layer `{energy.name}` needs a context at least as long as the state: got {S} context"
                f" tokens for {T}; derive it with `causal=False` for cross attention"
            )
        if visible is None and not dense and not (self.causal and S != T):
            return None, self.causal
        if visible is not None and energy.expression is None and not energy.masks_itself:
            raise ValueError(
                f"layer `{energy.name}` cannot be masked: {energy.reason}; give the callable an argument"
                " `visible` (bool, (seq,)) and mask with it"
            )
        lead = h.shape[:-2]
        return visible_mask(
            visible, lead, T, S, causal=self.causal, device=h.device, name=energy.name
        ), False

    @property
    def sizes(self) -> dict[str, int]:
        """The named sizes, by name."""
        return {str(size): int(value) for size, value in self._sizes.items()}

    @property
    def scalars(self) -> dict[str, float]:
        """The scalars by name; a learned one at its present value."""
        found = {scalar.name: float(value) for scalar, value in self._fixed.items()}
        for scalar, value in zip(
            self._learned, self.values()[len(self.energy_function.parameters) :], strict=True
        ):
            found[scalar.name] = float(value.detach())
        return found

    @property
    def code(self) -> str:
        """The program of dE/dh as readable Python."""
        return self.lowering.code

    @property
    def derivation(self):
        """The worked mathematics from the energy to this layer, a :class:`~cem.derivation.Derivation`."""
        return self.energy_function.derivation(layer=self)

    certificate = property(certify, doc="What is guaranteed about its descent as it stands.")
    curvature = spectrum.curvature

    def _repr_latex_(self) -> str:
        return self.derivation._repr_latex_()

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        flags = f"causal={self.causal}, " if self.energy_function.context is not None else ""
        kernels = " + ".join(self.lowering.kernels)
        return f"energy={self.energy_function.name}, {sizes}, {flags}steps={self.steps}, kernels={kernels}"

    def __getstate__(self) -> dict:
        # Programs are emitted anew from the energy, so that a copy does not depend on how torch pickles graphs.
        state = dict(self.__dict__)
        state.pop("lowering")
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.lowering = self._lower()


def derive(
    energy: Energy,
    *,
    causal: bool = True,
    steps: int = 1,
    update: AbstractUpdate | None = None,
    preconditioner: AbstractPreconditioner | Callable[[int], AbstractPreconditioner] | None = None,
    norm: nn.Module | Callable[[int], nn.Module] | None = None,
    refresh: str = "layer",
    lowering: str = "auto",
    learn: Iterable[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **sizes_and_scalars: float,
) -> EnergyLayer:
    """The layer that descends an energy: h+ = h - step_size * P dE/dh, repeated ``steps`` times.

    With the defaults the layer is exactly h - dE/dh at step size 1.

    Args:
        energy: what to descend.
        causal: token t sees the context tokens s <= t; otherwise all of them.
        steps: updates with the same parameters and the same context.
        update: an update rule; ``cem.GradientDescent()`` if None.
        preconditioner: P, a module or a class that is called with the width of the state; the identity if None.
        norm: a module, or a class called with the width, in front of the energy: state and context are read
            through it, the gradient is taken with respect to its output and moves h. A context of another width
            than the state is read as it is.
        refresh: when ``frozen(h)`` is taken: ``"layer"`` once, at the input, or ``"step"``, before every step.
        lowering: ``"auto"``, ``"fused"`` (an error where only autograd is possible) or ``"autograd"``.
        learn: names of scalars to learn; the others keep their value.
        device, dtype: where and in what the parameters are held, as in ``nn.Module.to``.
        **sizes_and_scalars: every named size (``heads=4``), and scalars that differ from their default.

    Raises:
        ValueError: an unknown or missing size or scalar, sizes that do not multiply to the width, a causal or
            masked layer of a callable that cannot be masked; ``LoweringError`` where ``"fused"`` cannot be had.
        TypeError: something that is not an ``Energy``.

    >>> import cem
    >>> from cem.energies import interaction
    >>> layer = cem.derive(interaction, dim=16, heads=2, rank=8)
    >>> layer.lowering.kind, layer.lowering.kernels
    ('fused', ('matmul', 'sdpa'))
    """
    if not isinstance(energy, Energy):
        raise TypeError(
            f'`derive` takes an Energy: got {type(energy).__name__}; type `@cem.energy(h="dim", ...)` above a'
            " callable, or `cem.Energy(expression)`"
        )
    if update is not None and not isinstance(update, AbstractUpdate):
        raise TypeError(
            f"`update` is an update rule: got {update!r}; type `update=cem.GradientDescent(step_size=0.5)`"
        )
    learn = (learn,) if isinstance(learn, str) else tuple(learn)
    arguments = set(inspect.signature(derive).parameters) - {"sizes_and_scalars"}
    check_names(energy, learn, {*dir(EnergyLayer), *ATTRIBUTES}, arguments)
    sizes = solve_sizes(energy, sizes_and_scalars)
    scalars = solve_scalars(energy, sizes, sizes_and_scalars, learn)
    looks_back = causal and energy.context is not None
    if energy.expression is None and looks_back and not energy.masks_itself:
        raise ValueError(
            f"energy `{energy.name}` cannot be masked, so a causal layer of it could see the future:"
            f" {energy.reason}; give the callable an argument `visible` (bool, (seq,)) and mask with it, or type"
            " `causal=False`"
        )
    width = width_of(energy.width, sizes)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` is a positive integer: got {steps!r}; type `steps=1`")
    if refresh not in REFRESH:
        raise ValueError(f'`refresh` is "layer" or "step": got {refresh!r}; type `refresh="layer"`')
    layer = EnergyLayer(
        energy,
        sizes,
        scalars,
        learn=learn,
        causal=causal,
        steps=steps,
        update=GradientDescent() if update is None else update,
        preconditioner=_made(preconditioner, width),
        norm=nn.Identity() if norm is None else _made(norm, width),
        refresh=refresh,
        lowering=lowering,
    )
    return layer.to(device=device, dtype=dtype)


def _made(part: nn.Module | Callable | None, width: int) -> nn.Module | None:
    """A module as it is; a class called with the width."""
    if isinstance(part, AbstractPreconditioner) and part.dim != width:
        kind = type(part).__name__
        raise ValueError(
            f"the preconditioner has dim={part.dim} and the state {width}: got {part}; type `cem.{kind}({width})`"
        )
    return part if part is None or isinstance(part, nn.Module) else part(width)
