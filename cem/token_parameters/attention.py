"""The layer: tokens attend to parameters.

Legend: T tokens, I features in, O features out, N parameter tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .growing import grow
from .normalisers import ACTIVATIONS, NORMALISERS
from .potential import potential


class TokenParameterAttention(nn.Module):
    """Attention whose keys and values are parameters: y = V^T w(K x).

    K: (tokens, in_features), V: (tokens, out_features). With the scores a = K x, the scale s and the
    activation f, the weights w are, by ``normaliser``:

        l2_norm_gelu       f(s a / |a|)                       the default, s = sqrt(tokens)
        gelu_l2_norm       s f(a) / |f(a)|                    s = sqrt(tokens)
        softmax            s softmax(a)                       s = tokens
        none               s f(a)                             s = 1
        energy_consistent  f(z) + u sum_j (F(z_j)/s - u_j f(z_j)),  u = a / |a|, z = s u, F' = f, F(0) = 0

    A row of zero scores has zero for a / |a|, and no gradient through it.

    With ``tie=True`` the values are the keys times a gain, V = diag(gain) K, and the layer is a step down an
    energy: see :attr:`potential`. Token j then counts as gain_j tokens in norms and partition functions, so a
    gain of 0 is a token that is not there; all gains start at 1.

    Args:
        in_features, out_features: the widths of x and y.
        tokens: the number of keys.
        normaliser: how scores become weights, a name from the table.
        activation: f: gelu, gelu_tanh, relu, silu, tanh, softplus or sigmoid; a softmax has none.
        tie: values are keys times a gain; the widths must be equal.
        scale: s, if it is not the one of the table; a number that is saved with the weights, for it must not move
            when tokens are added.
        additive_eps: added to the norm, as the weights trained on TPUs need (1e-5 for l2_norm_gelu, 1e-8 for
            gelu_l2_norm, with the activation gelu_tanh).
        layers: the number of layers of the model, which the values at the start are divided by.
        device, dtype: of the parameters.

    Shape: (..., in_features) -> (..., out_features).

    Keys start normal with standard deviation 0.02 and values with 2 / (layers sqrt(out_features)), as published;
    tied keys with 1 / sqrt(in_features).

    Raises:
        ValueError: an unknown normaliser or activation, a tie between unequal widths, ``additive_eps`` without a
            norm to add it to.

    >>> import torch
    >>> layer = TokenParameterAttention(8, 6, tokens=64)
    >>> layer(torch.zeros(3, 8)).shape, layer.scale.item()
    (torch.Size([3, 6]), 8.0)

    Source: Wang et al., TokenFormer, arXiv:2410.23168, equations 4 to 6, and its published code.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tokens: int,
        *,
        normaliser: str = "l2_norm_gelu",
        activation: str = "gelu",
        tie: bool = False,
        scale: float | None = None,
        additive_eps: float | None = None,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for what, name, table in (
            ("normaliser", normaliser, NORMALISERS),
            ("activation", activation, ACTIVATIONS),
        ):
            if name not in table:
                raise ValueError(f"`{what}` is one of {', '.join(table)}: got {name!r}")
        if tie and in_features != out_features:
            raise ValueError(
                f"tied values are as wide as keys: got in_features={in_features} and"
                f" out_features={out_features}; type `tie=False`"
            )
        if additive_eps is not None and not NORMALISERS[normaliser].has_norm:
            raise ValueError(
                f"`additive_eps` is added to the norm of l2_norm_gelu or gelu_l2_norm: got the normaliser"
                f" {normaliser!r}; type `additive_eps=None`"
            )
        self.in_features, self.out_features, self.tokens = in_features, out_features, tokens
        self.normaliser, self.activation, self.tie = normaliser, activation, tie
        self.additive_eps, self.layers = additive_eps, layers
        like = {"device": device, "dtype": dtype}
        self.K = nn.Parameter(torch.empty(tokens, in_features, **like))
        if tie:
            self.gain = nn.Parameter(torch.empty(tokens, **like))
        else:
            self.V = nn.Parameter(torch.empty(tokens, out_features, **like))
        if scale is None:
            scale = tokens ** NORMALISERS[normaliser].power
        wide = torch.promote_types(self.K.dtype, torch.float32)
        self.register_buffer("scale", torch.tensor(float(scale), device=device, dtype=wide))
        self.reset_parameters()

    @property
    def key_std(self) -> float:
        """The standard deviation of keys at the start."""
        return self.in_features**-0.5 if self.tie else 0.02

    @property
    def value_std(self) -> float:
        """The standard deviation of values at the start, where they are not tied."""
        return 2 / (self.layers * self.out_features**0.5)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw keys and values afresh."""
        nn.init.normal_(self.K, std=self.key_std, generator=generator)
        if self.tie:
            nn.init.ones_(self.gain)
        else:
            nn.init.normal_(self.V, std=self.value_std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """y, (..., out_features), of x, (..., in_features)."""
        return self.weights(F.linear(x, self.K)) @ self.values

    def weights(self, scores: Tensor) -> Tensor:
        """w, (..., tokens), of the scores K x; the gains of tied tokens are not in it."""
        word, gain = ACTIVATIONS[self.activation], self.gain if self.tie else None
        return NORMALISERS[self.normaliser].weights(
            scores, self.scale, word, gain, self.additive_eps
        )

    @property
    def values(self) -> Tensor:
        """V, (tokens, out_features); the keys times their gains where they are tied."""
        return self.gain.unsqueeze(-1) * self.K if self.tie else self.V

    def resized(self, tokens: int, factor: float) -> TokenParameterAttention:
        """A layer with other tokens, drawn afresh, and ``factor`` times the scale and what is added to the norm."""
        eps = None if self.additive_eps is None else factor * self.additive_eps
        return TokenParameterAttention(
            self.in_features,
            self.out_features,
            tokens,
            normaliser=self.normaliser,
            activation=self.activation,
            tie=self.tie,
            scale=factor * self.scale.item(),
            additive_eps=eps,
            layers=self.layers,
            device=self.K.device,
            dtype=self.K.dtype,
        )

    def grow(
        self,
        *,
        rule: str = "frozen",
        tokens: int,
        generator: torch.Generator | None = None,
    ) -> TokenParameterAttention:
        """A new layer of ``tokens`` tokens that begins with these and, but for ``random``, computes the same.

        - ``frozen``: zero keys and random values, the scale kept. Needs f(0) = 0 and f'(0) != 0, and no softmax.
        - ``norm_matched``: keys whose scores have sqrt(m/n) times the norm of the old ones for every input, n old
          and m new tokens, and zero values; the scale grows. Needs l2_norm_gelu and m at least the rank of K.
        - ``duplicate``: copies, whose values add up to the old ones; the scale grows. Needs a multiple of n.
        - ``random``: drawn as at the start while the scale grows, as published. The function changes.

        Without a normaliser ``frozen`` draws keys and sets the values to zero. Copies share a value unevenly, since
        equal ones would stay equal under any training. Tied tokens: new gains are 0, with random or matched keys, and
        copies share a gain, in any number; the scale is kept.

        Raises:
            ValueError: fewer tokens, an unknown rule, a rule that would change the function of this layer, or
                new tokens that would never get a gradient: keys and values that are both zero.
        """
        return grow(self, rule=rule, tokens=tokens, generator=generator)

    potential = property(
        potential, doc="Which energy it descends, :func:`cem.token_parameters.potential`."
    )

    def extra_repr(self) -> str:
        shape = f"{self.in_features}, {self.out_features}, tokens={self.tokens}"
        return (
            f"{shape}, normaliser={self.normaliser}, activation={self.activation}, tie={self.tie}"
        )
