"""The value of an expression for one token, read off the definition: broadcast, multiply, sum.

Slow and plain on purpose. It shares nothing with the lowering, which is tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from sympy import Add, Expr, Idx, Indexed, Mul, Pow, Sum, Symbol
from torch import Tensor

from .entmax import Entmax, EntmaxConjugate, sparse_maximum, sparse_weights
from .positions import Lookup, Rope, turned
from .reductions import LogSumExp, Softmax
from .symbols import SEQ, Ravel, is_word, size_of, split
from .tokens import Decay, later
from .words import only, word_of

Axes = tuple[Idx, ...]


class Evaluator:
    """Evaluates expressions at given tensors.

    ``tensors`` maps the names of states, contexts, parameters and scalars to their values, ``sizes`` maps named
    sizes to integers; the context holds the visible tokens only.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sizes: Mapping[Symbol, int]) -> None:
        self.tensors = tensors
        self.sizes = sizes
        self.memo: dict[Expr, tuple[Tensor, Axes]] = {}
        self.like = next(iter(tensors.values()))

    def __call__(self, expression: Expr, axes: Axes = ()) -> Tensor:
        """The value with its free indices in the order of ``axes``."""
        return self._spread(self.value(expression), axes)

    def size(self, idx: Idx) -> int:
        return int(size_of(idx).xreplace(self.sizes))

    def value(self, expression: Expr) -> tuple[Tensor, Axes]:
        if expression not in self.memo:
            self.memo[expression] = self._value(expression)
        return self.memo[expression]

    def _spread(self, value: tuple[Tensor, Axes], axes: Axes) -> Tensor:
        """Permute to ``axes`` and repeat along those that are missing."""
        tensor, own = value
        present = [axis for axis in axes if axis in own]
        tensor = tensor.permute([own.index(axis) for axis in present])
        for position, axis in enumerate(axes):
            if axis not in own:
                tensor = tensor.unsqueeze(position)
        return tensor.expand([self.size(axis) for axis in axes])

    def _together(self, expressions) -> tuple[list[Tensor], Axes]:
        values = [self.value(e) for e in expressions]
        axes: dict[Idx, None] = {}
        for _, own in values:
            axes.update(dict.fromkeys(own))
        return [self._spread(v, tuple(axes)) for v in values], tuple(axes)

    def _value(self, expression: Expr) -> tuple[Tensor, Axes]:
        match expression:
            case Indexed():
                return self._leaf(expression)
            case Symbol() if expression.name in self.tensors:
                return self.tensors[expression.name], ()
            case Symbol():
                return self.like.new_tensor(float(self.sizes[expression])), ()
            case Add():
                tensors, axes = self._together(expression.args)
                return torch.stack(tensors).sum(0), axes
            case Mul():
                tensors, axes = self._together(expression.args)
                return torch.stack(tensors).prod(0), axes
            case Pow():
                (base, exponent), axes = self._together(expression.args)
                if expression.base == SEQ and expression.exp.is_negative:
                    # It divides a sum over the visible tokens, which is 0 where there are none.
                    base = base.clamp_min(1.0)
                if expression.exp.is_Integer:
                    return base ** int(expression.exp), axes
                return base**exponent, axes
            case Sum():
                value = self.value(expression.function)
                for limit in expression.limits:
                    value = self._reduce(torch.sum, value, limit[0])
                return value
            case LogSumExp():
                tensor, axes = self._with(self.value(expression.body), expression.index)
                if self.size(expression.index) == 0:
                    return self._reduce(torch.sum, (tensor, axes), expression.index)
                target = _seen_logsumexp if expression.body.has(only) else torch.logsumexp
                return self._reduce(target, (tensor, axes), expression.index)
            case Decay():
                tensor, axes = self._with(self.value(expression.body), expression.index)
                place = axes.index(expression.index)
                return later(tensor.movedim(place, -1)).exp().movedim(-1, place), axes
            case Softmax():
                tensor, axes = self._with(self.value(expression.body), expression.index)
                target = _seen_softmax if expression.body.has(only) else torch.softmax
                return target(tensor, axes.index(expression.index)), axes
            case EntmaxConjugate():
                tensor, axes = self._with(self.value(expression.body), expression.index)
                if self.size(expression.index) == 0:
                    return self._reduce(torch.sum, (tensor, axes), expression.index)
                target = partial(sparse_maximum, alpha=float(expression.args[2]))
                return self._reduce(target, (tensor, axes), expression.index)
            case Entmax():
                tensor, axes = self._with(self.value(expression.body), expression.index)
                where, alpha = axes.index(expression.index), float(expression.args[2])
                return sparse_weights(tensor, where, alpha), axes
            case Ravel():
                body, slot, idx = expression.args
                tensor, axes = self.value(body)
                keep = tuple(axis for axis in axes if axis not in split(slot))
                tensor = self._spread((tensor, axes), (*keep, *split(slot)))
                return tensor.flatten(len(keep)), (*keep, idx)
            case Rope():
                tensor, axes = self._with(self.value(expression.body), expression.index)
                where, others = self.value(expression.position)
                rows = tuple(dict.fromkeys((*(a for a in axes if a != expression.index), *others)))
                tensor = self._spread((tensor, axes), (*rows, expression.index))
                angle = self._spread((where, others), rows).unsqueeze(-1)
                turns = expression.frequencies(tensor.shape[-1])
                tensor = turned(tensor, angle, turns, expression.interleaved)
                return tensor, (*rows, expression.index)
            case Lookup():
                body, idx, number = expression.args
                tensor, axes = self.value(body)
                rest = tuple(axis for axis in axes if axis != idx)
                tensor = self._spread((tensor, axes), (*rest, idx))
                where, others = self.value(number)
                place = where.floor().long().clamp(0, tensor.shape[-1] - 1)
                own = tuple(axis for axis in others if axis in rest)
                if own:
                    raise ValueError(
                        f"`lookup` reads a number that shares an index with the array: got {expression}"
                    )
                return tensor[..., place], (*rest, *others)
        if is_word(expression):
            tensor, axes = self.value(expression.args[0])
            return word_of(expression.func).torch(tensor), axes
        if expression.is_number:
            return self.like.new_tensor(float(expression)), ()
        raise ValueError(
            f"`{type(expression).__name__}` is not a word of the language: got {expression}"
        )

    def _leaf(self, expression: Indexed) -> tuple[Tensor, Axes]:
        tensor = self.tensors[str(expression.base.name)]
        axes: list[Idx] = []
        for slot in expression.indices:
            group = split(slot)
            if len(group) > 1:
                tensor = tensor.unflatten(len(axes), tuple(map(self.size, group)))
            axes += group
        letters = {axis: chr(ord("a") + n) for n, axis in enumerate(dict.fromkeys(axes))}
        spelling = "".join(letters[axis] for axis in axes) + "->" + "".join(letters.values())
        return torch.einsum(spelling, tensor), tuple(letters)

    def _with(self, value: tuple[Tensor, Axes], idx: Idx) -> tuple[Tensor, Axes]:
        if idx in value[1]:
            return value
        axes = (*value[1], idx)
        return self._spread(value, axes), axes

    def _reduce(self, target, value: tuple[Tensor, Axes], idx: Idx) -> tuple[Tensor, Axes]:
        tensor, axes = self._with(value, idx)
        position = axes.index(idx)
        return target(tensor, position), axes[:position] + axes[position + 1 :]


def _seen_logsumexp(scores: Tensor, dim: int) -> Tensor:
    """log sum exp over the finite entries; 0 where there are none."""
    some = (scores > -torch.inf).any(dim, keepdim=True)
    value = torch.logsumexp(torch.where(some, scores, 0.0), dim)
    return torch.where(some.squeeze(dim), value, 0.0)


def _seen_softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax over the finite entries; 0 where there are none."""
    some = (scores > -torch.inf).any(dim, keepdim=True)
    return torch.where(some, torch.softmax(torch.where(some, scores, 0.0), dim), 0.0)
