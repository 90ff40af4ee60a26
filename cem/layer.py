"""derive: from an energy to the layer that descends it.

Legend: B batch, T tokens, S context tokens, D dim.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from sympy import Symbol
from torch import Tensor, nn

from . import descent, spectrum
from .cache import Cache, decode, new_cache
from .certificate import certify
from .descent import LayerObjective, descend
from .energy import Energy
from .growth import Growth, grow_layer
from .initialisation import initialise
from .inputs import Reader
from .language.symbols import Scalar
from .lowering import Lowering, lower
from .preconditioner import AbstractPreconditioner, preconditioner_of
from .sizes import check_maskable, check_names, solve_scalars, solve_sizes, width_of
from .update import AbstractUpdate, GradientDescent

ATTRIBUTES = tuple(
    "dim context_dim reader update preconditioner norm lowering steps causal refresh dense packs moving joint"
    " tolerance checkpoint steps_taken".split()
)


class EnergyLayer(nn.Module):
    """The layer h+ = h - step_size * P dE/dh of an energy; made by :func:`derive`.

    Parameters are registered under their own names (``layer.Q``); a learned scalar that must stay positive is
    registered as its logarithm (``layer.log_beta``). A learned number has shape (1,), as FSDP asks.

    Attributes:
        energy_function: the :class:`~cem.Energy`.
        sizes: the named sizes, by name.
        scalars: the fixed scalars, by name.
        lowering: how dE/dh is computed: ``.kind``, ``.kernels``, ``.reasons``.
        code: the program of dE/dh as readable Python.
        certificate: what is guaranteed about its descent, a :class:`~cem.Certificate`.
        growth: what :meth:`grow` did to make this layer, a :class:`~cem.Growth` for each size; () if nothing.
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
        moving: bool,
        joint: bool,
        tolerance: float | None,
        checkpoint: bool,
        lowering: str,
    ) -> None:
        super().__init__()
        self.energy_function = energy
        self.causal, self.steps, self.refresh, self.moving = causal, steps, refresh, moving
        self.joint = joint
        self.tolerance, self.checkpoint, self.steps_taken = tolerance, checkpoint, steps
        self._sizes, self._asked = dict(sizes), lowering
        self._fixed = {s: v for s, v in scalars.items() if s.name not in learn}
        self.dim = width_of(energy.width, sizes)
        self.context_dim = self.dim
        if energy.context is not None:
            self.context_dim = width_of(energy.context.shape[1], sizes)
        self.reader = Reader(energy, self.dim, self.context_dim, causal, energy.has_positions)
        self.update, self.preconditioner, self.norm = update, preconditioner, norm
        for parameter in energy.parameters:
            shape = [width_of(size, sizes) for size in parameter.shape]
            self.register_parameter(str(parameter.name), nn.Parameter(torch.empty(shape)))
        self._learned = tuple(s for s in scalars if s.name in learn)
        for scalar in self._learned:
            value, name = torch.tensor([float(scalars[scalar])]), scalar.name
            if scalar.is_positive:
                value, name = value.log(), f"log_{name}"
            self.register_parameter(name, nn.Parameter(value))
        self.reset_parameters()
        self.lowering = self._lower()

    def _lower(self) -> Lowering:
        names = tuple(str(p.name) for p in self.energy_function.parameters)
        names += tuple(s.name for s in self._learned)
        options = {"kind": self._asked, "fixed": descent.steady(self, names), "joint": self.joint}
        options["still"] = descent.is_still(self)
        lowering = lower(self.energy_function, self._sizes, self._fixed, names, **options)
        self.dense = descent.needs_dense(self, lowering)
        self.packs = lowering.packs and not self.update.needs and self.tolerance is None
        return lowering

    def options(self) -> dict:
        """What :func:`derive` was told beside energy, sizes and scalars, for a layer like this; modules are copied."""
        names = ("causal", "steps", "refresh", "moving", "joint", "tolerance", "checkpoint")
        kept = {name: getattr(self, name) for name in names}
        modules = {n: copy.deepcopy(getattr(self, n)) for n in ("update", "preconditioner", "norm")}
        return kept | modules | {"lowering": self._asked, "learn": [s.name for s in self._learned]}

    def reset_parameters(self) -> None:
        """Draw every parameter afresh; see :func:`~cem.initialisation.initialise`."""
        tensors = {p: getattr(self, str(p.name)) for p in self.energy_function.parameters}
        initialise(tensors, self.energy_function, self.dim)

    def forward(
        self,
        h: Tensor,
        *,
        context: Tensor | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        memory: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The state after ``steps`` updates.

        Args:
            h: states, shape (..., T, D).
            context: the tokens to look at, shape (..., S, D); the states themselves if None. A causal layer sees
                s <= t + S - T: the states are the last T tokens of the context.
            visible: bool, True where a token may look: (..., S) for padding, or (..., T, S). It adds to
                causality. A token that sees nothing gets no force from the context.
            positions: whole numbers, (T,) or (..., T), for energies with ``position`` or ``rope``; those of the
                last T context tokens if None, or 0, 1, ... for a layer that is not causal.
            context_positions: (S,) or (..., S); ``positions`` if the context is None, else 0, 1, ...
            document_ids: whole numbers (..., S): tokens see those of their own document only.
            memory: what a rule with momentum remembers, (..., T, D), to be carried from layer to layer: the first
                gets ``layer.update.init(h)``, the next what this one returns.
            cache: of :meth:`init_cache`; the states are then the next T tokens, which see those of earlier calls and
                are taken in. ``visible`` is over all tokens so far.

        Returns:
            states, shape (..., T, D); the pair (states, memory) if a memory is given.
        """
        if self.moving:
            descent.refuse_context(self, context)
        shape = h.shape
        h, first = self.begin(
            h,
            context=context,
            visible=visible,
            positions=positions,
            context_positions=context_positions,
            document_ids=document_ids,
            cache=cache,
        )
        if memory is None:
            h, _ = descend(self, first, h)
            return h if h.shape == shape else h.reshape(shape)  # FSDP warns of views
        h, memory = descend(self, first, h, descent.carried(self, memory, shape).reshape(h.shape))
        return h.reshape(shape), memory.reshape(shape)

    def begin(
        self,
        h: Tensor,
        *,
        dense: bool = False,
        kind: type[LayerObjective] = LayerObjective,
        cache: Cache | None = None,
        **inputs: Tensor | None,
    ) -> tuple[Tensor, LayerObjective]:
        """States (B, T, D) from the inputs of :meth:`forward`, and what the first step descends."""
        if cache is not None:
            return decode(self, cache, h, **inputs)
        packed = self.packs and kind is LayerObjective
        h, g, seen = self.reader(self.norm, h, dense=dense or self.dense, packed=packed, **inputs)
        values = self.values()
        fixed = self.lowering.prepare(g, g, *seen, *values)
        return h, kind(self, g, g, seen, values, fixed)

    def init_cache(self, batch: int, max_seq: int) -> Cache:
        """An empty :class:`~cem.cache.Cache` for ``batch`` sequences of up to ``max_seq`` tokens.

        It holds what the program of the layer computes from the context alone, in the type and on the device of the
        parameters: for tied attention one tensor (batch, heads, max_seq, rank).

        Raises:
            ValueError: a layer that is not causal, moves its context or asks for energies in its steps; an energy
                whose program needs all pairs of tokens, or that has no context.

        >>> import torch, cem
        >>> from cem.energies import interaction
        >>> layer = cem.derive(interaction, dim=16, heads=2, rank=8)
        >>> h, cache = torch.randn(1, 5, 16), layer.init_cache(1, 64)
        >>> parts = [layer(h[:, :3], cache=cache), layer(h[:, 3:4], cache=cache), layer(h[:, 4:], cache=cache)]
        >>> torch.allclose(torch.cat(parts, 1), layer(h), atol=1e-6), cache.nbytes == 64 * 16 * 4
        (True, True)
        """
        return new_cache(self, batch, max_seq)

    def values(self) -> tuple[Tensor, ...]:
        """Parameters and learned scalars in the order in which the lowering takes them."""
        found = [getattr(self, str(p.name)) for p in self.energy_function.parameters]
        for scalar in self._learned:
            if scalar.is_positive:
                found.append(getattr(self, f"log_{scalar.name}")[0].exp())
            else:
                found.append(getattr(self, scalar.name)[0])
        return tuple(found)

    def energy(self, h: Tensor, *, frozen: Tensor | None = None, **inputs: Tensor | None) -> Tensor:
        """The energy of every token, shape (..., T), dimensionless, lower is better.

        ``inputs`` are those of :meth:`forward`. The context and ``frozen`` default to ``h``: give both the states
        *before* a step to ask for the energy after it at the context and the gates that the step saw.
        """
        shape = h.shape
        frozen = h if frozen is None else frozen
        if frozen.shape != shape:
            raise ValueError(
                f"layer `{self.energy_function.name}`: `frozen` must have the shape of the state:"
                f" got {tuple(frozen.shape)} and {tuple(shape)}; give the states before the step"
            )
        values = self.values()
        function = self.lowering.energy
        _, g, seen = self.reader(self.norm, h, **inputs, dense=function.needs_mask)
        frozen = self.norm(frozen.reshape(g.shape))
        return function(g, frozen, *seen, *values).reshape(shape[:-1])

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
        """The program of dE/dh as readable Python, and that of a step in the span, where the layer takes such."""
        return descent.code(self)

    @property
    def derivation(self):
        """The worked mathematics from the energy to this layer, a :class:`~cem.derivation.Derivation`."""
        return self.energy_function.derivation(layer=self)

    certificate = property(certify, doc="What is guaranteed about its descent as it stands.")
    curvature = spectrum.curvature
    grow = grow_layer
    growth: tuple[Growth, ...] = ()

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
    preconditioner: AbstractPreconditioner
    | Callable[[int], AbstractPreconditioner]
    | Sequence
    | None = None,
    norm: nn.Module | Callable[[int], nn.Module] | None = None,
    refresh: str = "layer",
    moving: bool = False,
    joint: bool = False,
    tolerance: float | None = None,
    checkpoint: bool = False,
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
        steps: updates with the same parameters and the same context; what depends on it alone is computed once, and
            linear features of the state follow from their Gram matrix where that is cheaper (:mod:`cem.lowering.span`).
        update: an update rule; ``cem.GradientDescent()`` if None.
        preconditioner: P, a module or a class that is called with the width of the state, or a list of them, one
            a step; the identity if None.
        norm: a module, or a class called with the width, in front of the energy: state and context are read
            through it, the gradient is taken with respect to its output and moves h. A context of another width
            than the state is read as it is.
        refresh: when ``frozen(h)`` is taken: ``"layer"`` once, at the input, or ``"step"``, before every step.
        moving: all tokens move together and each step sees the others where they are by then: the context is the
            state itself, read again before every step. Nothing is promised about the energy then.
        joint: differentiate the energies of all tokens together, as Energy Transformer does: a token is then also
            moved as the context of those that see it. It needs ``causal=False``, since a token that is seen
            learns of those after it, and moves as with ``moving=True``.
        tolerance: stop when the mean energy over all tokens, at the context and gates of a step, falls by no more than
            this in the step; ``steps`` is the most, ``layer.steps_taken`` how many there were. It reads data, so
            ``torch.compile`` breaks the graph at every step.
        checkpoint: keep one state a step for the backward pass and take the step again there.
        lowering: ``"auto"``, ``"fused"`` (an error where only autograd is possible), ``"flex"`` (also
            ``flex_attention`` under masks and biases where it runs, on CUDA and, without gradients, on CPUs: the
            same numbers, no T x S for documents and padding, compiled once a shape) or ``"autograd"``.
        learn: names of scalars to learn; the others keep their value.
        device, dtype: where and in what the parameters are held, as in ``nn.Module.to``.
        **sizes_and_scalars: every named size (``heads=4``), and scalars that differ from their default.

    Raises:
        ValueError: an unknown or missing size or scalar, sizes that do not multiply to the width, a causal or
            masked layer of a callable that cannot be masked; ``LoweringError`` where ``"fused"`` or
            ``"flex"`` cannot be had.
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
    check_maskable(energy, causal)
    width = width_of(energy.width, sizes)
    same = energy.context is not None and width == width_of(energy.context.shape[1], sizes)
    moving = moving or joint
    descent.check_recursion(energy, steps, refresh, moving, tolerance, same)
    if joint and causal:
        raise ValueError(
            f"a joint layer of energy `{energy.name}` moves a token by the energies of those that see it, so it"
            " cannot be causal: type `causal=False`"
        )
    if not isinstance(norm, nn.Module):
        norm = nn.Identity() if norm is None else norm(width)
    update = GradientDescent() if update is None else update
    preconditioner = preconditioner_of(preconditioner, width, steps, norm)
    update.check(energy, steps, preconditioner)
    layer = EnergyLayer(
        energy,
        sizes,
        scalars,
        learn=learn,
        causal=causal,
        steps=steps,
        update=update,
        preconditioner=preconditioner,
        norm=norm,
        refresh=refresh,
        moving=moving,
        joint=joint,
        tolerance=tolerance,
        checkpoint=checkpoint,
        lowering=lowering,
    )
    return layer.to(device=device, dtype=dtype)
