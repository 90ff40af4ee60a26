"""Attention of four matrices whose heads score with ranks of their own.

Legend: B batch, T tokens, S tokens so far, H heads with a key, O queries of a head, R rank, D dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankAttention(nn.Module):
    """Takes the place of the attention of Llama or GPT-2: head a scores with ``ranks[a]`` coordinates of its own.

    The projections hold exactly the kept rows, nothing is padded: heads of one rank run in one call of the kernel, so
    a layer makes as many calls as it has different ranks. A cache keeps the keys of all heads side by side, (B, 1, S,
    sum of ranks), and the values as before. A head of rank 0 averages what it sees.

    Args:
        ranks: of every head with a key.
        planes: where positions turn pairs of coordinates, the numbers of the pairs that each head keeps.
        queries: how many share a key.
        value_dim: of a head.
        dim: D.
        scaling: of the scores: that of the full rank.
        slot: the layer of a cache.
        bias: of q and k, of v, and of o.
        dropout, out_dropout: of the weights and of the output, in training.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        planes: Sequence[Sequence[int]] | None = None,
        *,
        queries: int,
        value_dim: int,
        dim: int,
        scaling: float,
        slot: int | None = None,
        bias: tuple[bool, bool, bool] = (False, False, False),
        dropout: float = 0.0,
        out_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ranks = tuple(map(int, ranks))
        self.planes = None if planes is None else tuple(tuple(map(int, row)) for row in planes)
        self.queries, self.head_dim, self.scaling = queries, value_dim, scaling
        self.layer_idx, self.dropout, self.out_dropout = slot, dropout, out_dropout
        heads, total = len(self.ranks), sum(self.ranks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.q_proj = nn.Linear(dim, queries * total, bias=bias[0])
            self.k_proj = nn.Linear(dim, total, bias=bias[0])
        self.v_proj = nn.Linear(dim, heads * value_dim, bias=bias[1])
        self.o_proj = nn.Linear(heads * queries * value_dim, dim, bias=bias[2])
        starts = [0, *accumulate(self.ranks)]
        groups: dict[int, list[int]] = {}
        for head, rank in enumerate(self.ranks):
            groups.setdefault(rank, []).append(head)
        self.groups = tuple((rank, tuple(members)) for rank, members in groups.items())
        # Where the keys and the queries of the heads of a group stand, and the angles that turn them.
        for n, (rank, members) in enumerate(self.groups):
            start = torch.tensor([starts[head] for head in members])[:, None]
            keys = start + torch.arange(rank)  # (members, R)
            asked = torch.arange(queries)[:, None] * rank + torch.arange(rank)
            asked = queries * start[:, None] + asked  # (members, O, R)
            places = {"keys": keys, "queries": asked}
            if self.planes is not None:
                turned = [self.planes[head] for head in members]
                turned = torch.tensor(turned, dtype=torch.long)
                places["turned"] = turned.view(len(members), rank // 2)
            for name, table in places.items():
                self.register_buffer(f"{name}_{n}", table, persistent=False)

    @classmethod
    def like(
        cls,
        module: nn.Module,
        ranks: Sequence[int],
        planes: Sequence[Sequence[int]] | None,
        *,
        biased: bool | None = None,
    ) -> LowRankAttention:
        """The sizes, the values and the outputs of an attention of transformers, with new queries and keys."""
        q, k, v, o = projections(module)
        dim, width = q.weight.shape[1], module.head_dim
        if biased is None:
            biased = q.bias is not None or k.bias is not None
        out = getattr(module, "resid_dropout", None)
        made = cls(
            ranks,
            planes,
            queries=q.weight.shape[0] // k.weight.shape[0],
            value_dim=width,
            dim=dim,
            scaling=module.scaling,
            slot=module.layer_idx,
            bias=(biased, v.bias is not None, o.bias is not None),
            dropout=getattr(module, "attention_dropout", 0.0)
            if out is None
            else module.attn_dropout.p,
            out_dropout=0.0 if out is None else out.p,
        ).to(q.weight)
        made.v_proj.load_state_dict(v.state_dict())
        made.o_proj.load_state_dict(o.state_dict())
        return made.train(module.training)

    @torch.no_grad()
    def fill(self, q: Sequence[Tensor], k: Sequence[Tensor]) -> LowRankAttention:
        """Set the rows of every head: q (O, r, W) and k (r, W), the biases in a last column."""
        dim = self.q_proj.in_features
        for mine, rows in ((self.q_proj, [one.flatten(0, 1) for one in q]), (self.k_proj, k)):
            given = torch.cat(list(rows))
            mine.weight.copy_(given[:, :dim])
            if mine.bias is not None:
                mine.bias.copy_(given[:, dim])
        return self

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache=None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """As the attention whose place it takes; no weights are given back."""
        cache = past_key_values if cache is None else cache
        shape, heads, queries = hidden_states.shape[:-1], len(self.ranks), self.queries
        if self.planes is not None:
            cos, sin = (turn.chunk(2, -1)[0] for turn in position_embeddings)
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        turned_q, turned_k = [], []
        for n in range(len(self.groups)):
            asked = q[..., self.get_buffer(f"queries_{n}")]  # (B, T, members, O, R)
            keys = k[..., self.get_buffer(f"keys_{n}")]  # (B, T, members, R)
            if self.planes is not None:
                turned = self.get_buffer(f"turned_{n}")
                own = cos[..., turned], sin[..., turned]  # (B, T, members, R / 2)
                asked, keys = (
                    _turned(asked, *(one.unsqueeze(3) for one in own)),
                    _turned(keys, *own),
                )
            turned_q.append(asked)
            turned_k.append(keys)
        v = self.v_proj(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        if cache is not None:
            flat = torch.cat([one.flatten(2) for one in turned_k], -1)[:, None]
            flat, v = cache.update(flat, v, self.layer_idx)
            widths = [rank * len(members) for rank, members in self.groups]
            parts = flat[:, 0].split(widths, -1)
            turned_k = [
                part.unflatten(-1, (len(members), rank))
                for part, (rank, members) in zip(parts, self.groups, strict=True)
            ]
        count = v.shape[2]
        mask = None if attention_mask is None else attention_mask[..., :count]
        causal = mask is None and q.shape[1] > 1
        out = v.new_empty(*shape, heads, queries, self.head_dim)
        for (rank, members), query, key in zip(self.groups, turned_q, turned_k, strict=True):
            if rank == 0:  # scores of zero
                query, key = (F.pad(one, (0, 2)) for one in (query, key))
            query = query.flatten(2, 3).transpose(1, 2)  # (B, H O, T, R)
            key = key.transpose(1, 2).repeat_interleave(queries, 1)
            value = v[:, list(members)].repeat_interleave(queries, 1)
            found = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                scale=self.scaling,
            )
            out[:, :, list(members)] = found.transpose(1, 2).unflatten(2, (len(members), queries))
        out = self.o_proj(out.flatten(2))
        return F.dropout(out, self.out_dropout, self.training), None

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}, value_dim={self.head_dim}, queries={self.queries}"


def _turned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split pairs turned, as Llama does."""
    first, second = value.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Q, K, V and O of an attention of transformers, those of GPT-2 cut out of its one matrix."""
    if hasattr(module, "q_proj"):
        return module.q_proj, module.k_proj, module.v_proj, module.o_proj
    parts = zip(module.c_attn.weight.chunk(3, 1), module.c_attn.bias.chunk(3), strict=True)
    parts = [*parts, (module.c_proj.weight, module.c_proj.bias)]
    return tuple(_linear(weight.detach().T, bias.detach()) for weight, bias in parts)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(*weight.shape[::-1], device="meta")
    made.weight, made.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.clone())
    return made
