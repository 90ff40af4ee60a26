"""Words for sequences of tokens: what the past leaves of itself, what a token receives as the context of others."""

from __future__ import annotations

import torch
from sympy import Expr, Idx
from torch import Tensor

from .conversion import as_expression
from .reductions import Reduction


class TokenSum(Reduction):
    """The sum over all tokens t that see a token, of an expression of t and of what it sees: ``args = (body, s)``.

    The index s of the context is bound: it stands for the token that receives. It arises where the
    energies of all tokens are differentiated together. Of zero it is zero.
    """

    def __new__(cls, body: Expr, index: Idx) -> Expr:
        return body if body == 0 else super().__new__(cls, body, index)

    def _sympystr(self, printer) -> str:
        return f"TokenSum({', '.join(map(printer.doprint, self.args))})"

    def _latex(self, printer) -> str:
        body, idx = map(printer.doprint, self.args)
        return rf"\sum_{{t : {idx} \in V(t)}} {body}"


class Decay(Reduction):
    """exp of the sum of the body over the visible context tokens after s: ``args = (body, s)``; s stays free."""

    is_nonnegative = True

    def _sympystr(self, printer) -> str:
        return f"decay({', '.join(map(printer.doprint, self.args))})"

    def _latex(self, printer) -> str:
        body, idx = map(printer.doprint, self.args)
        return rf"\operatorname{{decay}}_{{{idx}}}\left({body}\right)"


def decay(log_gate, index: Idx | None = None):
    """What is left of each context token: the product of the gates of the visible tokens after it.

        decay_s = exp(sum of log_gate_u over u in V with u > s)

    With a number log(gamma) it is gamma^(t - s), with a function of the context token the decay of gated
    linear attention. Sums over the context that are weighted by it keep memory linear in the sequence.

    Args:
        log_gate: in the symbolic pen an expression, at most 0, that does not move with the state; in the torch
            pen a tensor (..., seq).
        index: the index of the context, in the symbolic pen.

    Source: Yang et al., Gated Linear Attention, arXiv:2312.06635, section 4; RetNet, arXiv:2307.08621.

    >>> import torch, cem
    >>> cem.decay(torch.tensor([0.5, 0.5, 0.5]).log()).tolist()
    [0.25, 0.5, 1.0]
    """
    if isinstance(log_gate, torch.fx.Proxy):
        return log_gate.tracer.create_proxy("call_function", decay, (log_gate,), {})
    if isinstance(log_gate, Tensor):
        return later(log_gate).exp()
    if not isinstance(index, Idx):
        raise TypeError(
            f"`decay` runs along the context: got {index!r} of type {type(index).__name__}; type"
            ' `cem.decay(log_gate, s)` with `s = x.index("s")`'
        )
    gate: Expr = as_expression(log_gate)
    return Decay(gate, index)


def later(values: Tensor) -> Tensor:
    """The sum of the entries after each one, along the last axis."""
    return torch.nn.functional.pad(values[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
