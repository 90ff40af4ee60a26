"""What the tokens of one call see, read from the arguments that transformers passes.

Legend: B batch, T tokens of the call, S tokens that a cache gives back and those of the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from cem.lowering.kernels import sharing

from .cache import CACHE


class View(NamedTuple):
    """What T tokens see.

    Attributes:
        mask: as transformers makes it, for Llama's attention.
        visible: the same as bool, (B or 1, T, S), or None where causality says it all.
        padding: bool (B, T), False at padding, or None if there is none. It, ``real`` and ``pairs`` are for states of
            linear attention and for routers, and are looked for only where there are some.
        real: the same of all tokens so far, (B, S), or None if none of them is padding.
        pairs: whether the mask says more than padding and causality.
        positions: (B or 1, T), one tensor for all layers, so that its angles are computed once.
        counted: whether the positions are 0, 1, 2, ..., so that a window may be read block by block.
        places: positions of all S tokens, (B or 1, S), or None where they are those of the call.
        past: S - T.
        seen: how many tokens came before, which is less than ``past`` where a cache has room to spare.
    """

    mask: Tensor | None
    visible: Tensor | None
    padding: Tensor | None
    real: Tensor | None
    pairs: bool
    positions: Tensor
    counted: bool
    places: Tensor | None
    past: int
    seen: int | Tensor


def view_of(
    config,
    h: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    cache,
    *,
    placed: bool,
    stateful: bool,
) -> View:
    """The :class:`View` of states h (B, T, D), before a new cache is made for them.

    Args:
        config: of the model.
        attention_mask: (B, S), 0 at padding, or (B, 1, T, S).
        positions: (B, T); where they begin anew, and there is no cache and no mask, a document begins.
        cache: of transformers, or None.
        placed: whether positions of the tokens in a cache are read.
        stateful: whether states will be kept, or tokens chosen.
    """
    count, flat = h.shape[1], attention_mask is not None and attention_mask.dim() == 2
    seen, past = 0, 0
    if cache is not None:
        seen, past = cache.get_seq_length(), cache.get_mask_sizes(count, 0)[0] - count
        seen = int(seen) if stateful else seen
    given, new = positions, torch.arange(count, device=h.device)
    positions = seen + new[None] if given is None else given
    mask = create_causal_mask(
        config=config,
        inputs_embeds=h,
        attention_mask=attention_mask,
        position_ids=positions,
        **{CACHE: cache},
    )
    visible = mask if mask is None or mask.dtype == torch.bool else mask == 0
    if mask is None and cache is not None and (isinstance(seen, Tensor) or past != seen):
        # A cache with room to spare gives back more than there is.
        visible = torch.arange(past + count, device=h.device) <= (seen + new)[:, None]
        visible = visible[None, None]
    places = None
    if placed and cache is not None:
        places = torch.arange(past + count, device=h.device)[None]
        if flat:
            known = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            places = torch.cat([known, places.expand(len(known), -1)[:, known.shape[1] :]], 1)
    padding, real, pairs = None, None, False
    if stateful and flat:
        real = attention_mask.bool()
        padding = real[:, -count:]
        padding, real = (None if each.all() else each for each in (padding, real))
    elif stateful:
        fresh = cache is None and given is not None
        pairs = attention_mask is not None or (fresh and bool((given.diff() != 1).any()))
    visible = None if visible is None else visible[:, 0]
    counted = given is None and cache is None
    positions = sharing(positions.to(torch.promote_types(h.dtype, torch.float32)))
    return View(mask, visible, padding, real, pairs, positions, counted, places, past, seen)
