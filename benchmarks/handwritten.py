"""The layers that a person would write: ordinary modules, against which the derived ones are timed.

They take the parameters of a derived layer and share them. Nothing here knows about energies.

Legend: B batch, T tokens, D dim, H heads, R rank (head dim), M hidden, N = D / H block.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TiedAttention(nn.Module):
    """Causal multi-head attention with the values tied to the keys and the output to the queries.

    Q and K: (H, R, D). Adds the attended values to h, (B, T, D), ``steps`` times with the keys of the first.
    """

    def __init__(self, Q: nn.Parameter, K: nn.Parameter, beta: float, steps: int = 1) -> None:
        super().__init__()
        self.Q, self.K, self.beta, self.steps = Q, K, beta, steps

    def forward(self, h: Tensor) -> Tensor:
        B, T, D = h.shape
        H, R, _ = self.Q.shape
        k = F.linear(h, self.K.view(H * R, D)).view(B, T, H, R).transpose(1, 2)  # (B, H, T, R)
        for _ in range(self.steps):
            q = F.linear(h, self.Q.view(H * R, D)).view(B, T, H, R).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=self.beta)
            mixed = mixed.transpose(1, 2).reshape(B, T, H * R)
            h = h + mixed @ self.Q.view(H * R, D)
        return h


class SpanAttention(TiedAttention):
    """The same steps on what they add up to before the projection back, by the Gram matrix of the queries."""

    def forward(self, h: Tensor) -> Tensor:
        B, T, D = h.shape
        H, R, _ = self.Q.shape
        Q = self.Q.view(H * R, D)
        k = F.linear(h, self.K.view(H * R, D)).view(B, T, H, R).transpose(1, 2)  # (B, H, T, R)
        first = q = F.linear(h, Q)  # (B, T, H R)
        gram = Q @ Q.T
        added = 0.0
        for step in range(self.steps):
            if step:
                q = torch.addmm(first.view(B * T, -1), added.view(B * T, -1), gram)
            heads = q.view(B, T, H, R).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, k, k, is_causal=True, scale=self.beta)
            added = added + mixed.transpose(1, 2).reshape(B, T, H * R)
        return torch.addmm(h.reshape(B * T, D), added.view(B * T, -1), Q).view(B, T, D)


class RotaryAttention(nn.Module):
    """Tied attention whose queries and keys, which are the values, are turned; what it reads is turned back.

    Q and K: (H, R, D), R even. Cosines and sines are made once, for positions below ``max_seq``.
    """

    def __init__(self, Q: nn.Parameter, K: nn.Parameter, beta: float, max_seq: int) -> None:
        super().__init__()
        self.Q, self.K, self.beta = Q, K, beta
        R = Q.shape[1]
        place = torch.arange(max_seq, device=Q.device, dtype=torch.float64)
        rates = 10000.0 ** (-torch.arange(0, R, 2, device=Q.device, dtype=torch.float64) / R)
        angle = place[:, None, None] * rates  # (T, 1, R / 2)
        self.register_buffer("cos", angle.cos().to(Q.dtype))
        self.register_buffer("sin", angle.sin().to(Q.dtype))

    def forward(self, h: Tensor) -> Tensor:
        B, T, D = h.shape
        H, R, _ = self.Q.shape
        cos, sin = self.cos[:T], self.sin[:T]
        q = turn(F.linear(h, self.Q.view(H * R, D)).view(B, T, H, R), cos, sin).transpose(1, 2)
        k = turn(F.linear(h, self.K.view(H * R, D)).view(B, T, H, R), cos, sin).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=self.beta)
        mixed = turn(mixed.transpose(1, 2), cos, -sin).reshape(B, T, H * R)
        return h + mixed @ self.Q.view(H * R, D)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Coordinate n of (..., R) turned with coordinate n + R / 2."""
    u, v = x.chunk(2, -1)
    return torch.cat([u * cos - v * sin, v * cos + u * sin], -1)


class DiagonalAttention(nn.Module):
    """Tied attention whose heads also compare one block of the state directly.

    The score of head a is ``beta * (sum_n lam_an h_an x_an + q_a . k_a)``: query and key are
    features side by side, and one attention call over them gives both parts. Q and K: (H, R, D);
    lam: (H, N).
    """

    def __init__(self, Q: nn.Parameter, K: nn.Parameter, lam: nn.Parameter, beta: float) -> None:
        super().__init__()
        self.Q, self.K, self.lam, self.beta = Q, K, lam, beta

    def forward(self, h: Tensor) -> Tensor:
        B, T, D = h.shape
        H, R, _ = self.Q.shape
        blocks = h.view(B, T, H, D // H)  # (B, T, H, N)
        q = F.linear(h, self.Q.view(H * R, D)).view(B, T, H, R)
        k = F.linear(h, self.K.view(H * R, D)).view(B, T, H, R)
        query = torch.cat([self.lam * blocks, q], dim=-1).transpose(1, 2)  # (B, H, T, N + R)
        key = torch.cat([blocks, k], dim=-1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, key, is_causal=True, scale=self.beta)
        direct, low = mixed.transpose(1, 2).split([D // H, R], dim=-1)  # (B, T, H, N or R)
        diagonal = (self.lam * direct).reshape(B, T, D)
        return h + diagonal + low.reshape(B, T, H * R) @ self.Q.view(H * R, D)


class CachedAttention(nn.Module):
    """Causal multi-head attention with four matrices and a cache of two tensors, for decoding.

    Q, K, V and out: (H, R, D); keys and values: (B, H, max_seq, R), of which ``length`` tokens are filled.
    """

    def __init__(self, Q: Tensor, K: Tensor, V: Tensor, out: Tensor, beta: float) -> None:
        super().__init__()
        self.Q, self.K, self.V, self.out = map(nn.Parameter, (Q, K, V, out))
        self.beta, self.length = beta, 0

    def init_cache(self, batch: int, max_seq: int) -> None:
        H, R, _ = self.K.shape
        self.keys, self.values = self.K.new_zeros(2, batch, H, max_seq, R).unbind()
        self.length = 0

    def forward(self, h: Tensor) -> Tensor:
        B, T, D = h.shape
        H, R, _ = self.Q.shape
        q, k, v = (
            F.linear(h, W.view(H * R, D)).view(B, T, H, R).transpose(1, 2)  # (B, H, T, R)
            for W in (self.Q, self.K, self.V)
        )
        seen = self.length + T
        self.keys[:, :, self.length : seen] = k
        self.values[:, :, self.length : seen] = v
        # A first call may bring many tokens; later ones bring one, which sees all.
        first, self.length = self.length == 0, seen
        mixed = F.scaled_dot_product_attention(
            q, self.keys[:, :, :seen], self.values[:, :, :seen], is_causal=first, scale=self.beta
        )
        mixed = mixed.transpose(1, 2).reshape(B, T, H * R)
        return h + mixed @ self.out.view(H * R, D)


class TiedGatedMLP(nn.Module):
    """Gated MLP with one matrix for up and down. U and G: (M, D)."""

    def __init__(self, U: nn.Parameter, G: nn.Parameter) -> None:
        super().__init__()
        self.U, self.G = U, G

    def forward(self, h: Tensor) -> Tensor:
        hidden = F.silu(F.linear(h, self.G)) * F.linear(h, self.U)  # (B, T, M)
        return h + hidden @ self.U
