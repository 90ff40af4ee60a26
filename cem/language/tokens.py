"""What a token receives as the context of others."""

from __future__ import annotations

from .symbols import Reduction


class TokenSum(Reduction):
    """The sum over all tokens t that see a token, of an expression of t and of what it sees: ``args = (body, s)``.

    The index s of the context is bound: it stands for the token that receives. It arises where the
    energies of all tokens are differentiated together.
    """

    def _sympystr(self, printer) -> str:
        return f"TokenSum({', '.join(map(printer.doprint, self.args))})"

    def _latex(self, printer) -> str:
        body, idx = map(printer.doprint, self.args)
        return rf"\sum_{{t : {idx} \in V(t)}} {body}"
