"""Rotations by position, and numbers that are made of positions.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def settled(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers made of positions (B or 1, ...) in the type of ``like``, one row a sequence."""
    return numbers.to(like.dtype).expand(like.shape[0], *numbers.shape[1:])


def exact_parts(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (B or 1, ...) as three columns (B, ..., 3) of the type of ``like`` with the digits of float32."""
    parts = []
    for _ in range(3):
        part = numbers.to(like.dtype)
        parts.append(part)
        numbers = numbers - part.to(numbers.dtype)
    columns = torch.stack(parts, -1)
    return columns.expand(like.shape[0], *columns.shape[1:])


def lookup(array: Tensor, number: Tensor) -> Tensor:
    """The last axis of an array (..., N) read at whole numbers (*shape), clamped: (..., *shape)."""
    return array[..., number.floor().long().clamp(0, array.shape[-1] - 1)]


def sharing(position: Tensor) -> Tensor:
    """Positions, a tensor of one's own, that keep the turns made of them for all who are given the same tensor.

    A compiler finds what is computed twice by itself.
    """
    if not torch.compiler.is_compiling():
        position.turns = {}
    return position


def turns(
    position: Tensor,
    frequencies: tuple[float, ...] | float,
    size: int,
    interleaved: bool,
    spread: tuple[int, ...],
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position (...) times frequency, each (..., 2 n), in the type of ``like``.

    There is one for each of the 2 n coordinates that turn, in the order of their pairs; the sine of the first of a
    pair is negative. An axis of size 1 is put in at every place of ``spread``. ``frequencies`` may be the base b of
    n = size/2 frequencies b^(-2i/size). Angles are float32 at least. Positions of :func:`sharing` are turned once.
    """
    kept = getattr(position, "turns", {})
    key = (frequencies, size, interleaved, spread, like.dtype)
    if key in kept:
        return kept[key]
    if isinstance(frequencies, tuple):
        rates = torch.tensor(frequencies, dtype=position.dtype, device=position.device)
    else:
        powers = torch.arange(0, size, 2, dtype=position.dtype, device=position.device) / -size
        rates = frequencies**powers
    pairs = (-rates, rates)
    rates = torch.stack(pairs, -1).flatten() if interleaved else torch.cat(pairs)
    angle = position.unsqueeze(-1) * rates
    for place in spread:
        angle = angle.unsqueeze(place)
    kept[key] = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
    return kept[key]


def rotate(value: Tensor, turns: tuple[Tensor, Tensor], interleaved: bool, inverse: bool) -> Tensor:
    """The first 2 n coordinates of (..., R) turned in pairs, by minus the angle for the inverse."""
    cos, sin = turns
    width = cos.shape[-1]
    turning = value if width == value.shape[-1] else value[..., :width]
    if interleaved:
        swapped = turning.unflatten(-1, (width // 2, 2)).flip(-1).flatten(-2)
    elif (
        torch.compiler.is_compiling()
    ):  # a compiler reads two slices in vectors, and a roll one by one
        swapped = torch.cat(turning.chunk(2, -1)[::-1], -1)
    else:
        swapped = turning.roll(width // 2, -1)
    turned = torch.addcmul(turning * cos, swapped, sin, value=-1 if inverse else 1)
    if width == value.shape[-1]:
        return turned
    return torch.cat((turned, value[..., width:].expand(*turned.shape[:-1], -1)), -1)
