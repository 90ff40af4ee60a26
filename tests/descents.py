"""Random energies whose descent can often be promised, and trials that look for a broken promise.

Legend: T tokens, S context tokens, D dim.
"""

import math
import random
from dataclasses import dataclass

import sympy
import torch
from helpers import sizes_of
from sympy import Rational, Sum

import cem
from cem import energies
from cem.calculus.smoothness import smoothness
from cem.language.evaluation import Evaluator
from cem.language.symbols import SEQ
from cem.language.words import WORDS
from cem.testing.reference import values_of

SIZES = {"dim": 4, "heads": 2, "rank": 3, "hidden": 5, "block": 2, "experts": 2, "features": 3}
SIZES |= {"copies": 2, "groups": 2, "per_group": 2, "far": 4, "buckets": 32, "tokens": 3}
NAMED = {cem.Dim(name): size for name, size in SIZES.items()}
GALLERY = [getattr(energies, name) for name in energies.__all__]
GALLERY = [energy for energy in GALLERY if isinstance(energy, cem.Energy)]

dim, heads, rank, hidden = cem.dims("dim heads rank hidden")
h, x = cem.state(dim), cem.context(dim)
c = cem.frozen(h)
Q, K = cem.parameter("Q", heads, rank, dim), cem.parameter("K", heads, rank, dim)
U, G = cem.parameter("U", hidden, dim), cem.parameter("G", hidden, dim)
w, v, lam = cem.parameter("w", dim), cem.parameter("v", hidden), cem.parameter("lam", heads)
W = cem.parameter("W", dim, dim)
beta = cem.scalar("beta", default=Rational(2, 3), positive=True)
gamma = cem.scalar("gamma", default=Rational(-3, 4))
i, j, a, r, m, s = (
    size.index(name)
    for size, name in zip((dim, dim, heads, rank, hidden, SEQ), "ijarms", strict=True)
)

# Those that are finite everywhere: log has a domain, and `only` hides tokens.
FUNCTIONS = [word.function for word in WORDS if word.name not in ("log", "only")]
FUNCTIONS += [lambda z: z**2, lambda z: z**2, lambda z: z**3, lambda z: z**4, lambda z: z]


def up(vector=h, weight=U):
    return Sum(weight[m, i] * vector[i], i)


class Energies:
    """Draws sums of one to three terms; half of the terms point downward."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def draw(self):
        """An expression that moves with the state."""
        while True:
            terms = [self.factor() * self.term() for _ in range(self.random.randint(1, 3))]
            found = sum(terms)
            if found.has(h) and not found.has(sympy.nan, sympy.zoo):
                return found

    def one_of(self, *choices):
        return self.random.choice(choices)

    def factor(self):
        size = self.one_of(1, 1, Rational(1, 2), 2, beta, 1 / beta, gamma)
        return self.one_of(-1, -1, 1) * size

    def term(self):
        return self.one_of(self.attention, self.units, self.units, self.pool, self.direct)()

    def function(self):
        return self.random.choice(FUNCTIONS)

    def score(self):
        query = Sum(Q[a, r, i] * self.one_of(h, h, h, c)[i], i)
        key = Sum(K[a, r, j] * x[s, j], j)
        found = Sum(self.one_of(query, query, sympy.tanh(query)) * key, r)
        return found + self.one_of(
            0,
            0,
            lam[a] * Sum(h[i] * x[s, i], i),
            Sum(w[i] * x[s, i], i),
            -Sum((query - key) ** 2, r) / 2,
            lam[a] * Sum(w[i] * h[i], i),
        )

    def attention(self):
        if self.random.random() < 0.2:
            body = self.function()(self.score()) * self.one_of(
                1, sympy.tanh(Sum(w[i] * x[s, i], i))
            )
            return Sum(body, s, a) * self.one_of(1, 1 / SEQ)
        attended = cem.logsumexp(self.one_of(beta, beta, gamma) * self.score(), s)
        return Sum(self.one_of(1, 1, lam[a]) * attended, a)

    def units(self):
        """A sum over hidden units of weights times a word of something affine."""
        slope = self.one_of(up(), up(), up() + v[m], gamma * up(), up() + up(c, G), up() * up(c, G))
        gate = self.function()(up(c, G))
        weight = self.one_of(1, 1, v[m], v[m] ** 2, gate, gate, v[m] * gate, -gate)
        return Sum(weight * self.function()(slope), m)

    def pool(self):
        body = self.one_of(1, beta, gamma) * self.one_of(up(), up() + v[m], self.function()(up()))
        query = Sum(Q[a, r, i] * h[i], i)
        return self.one_of(
            cem.logsumexp(body, m),
            cem.logsumexp(beta * query, a, r),
            Sum(lam[a] * cem.logsumexp(query, r), a),
            Sum(cem.logsumexp(beta * query + lam[a], a) * cem.sigmoid(up(c, G)), r, m),
        )

    def direct(self):
        square = Sum(h[i] ** 2, i)
        along = Sum(w[i] * h[i], i)
        return self.one_of(
            square,
            square / 2,
            Sum(w[i] * h[i] ** 2, i),
            Sum(h[i] * W[i, j] * h[j], i, j),
            Sum(h[i] * W[i, j] * c[j], i, j),
            Sum(up() * up(h, G), m),
            Sum(up() * cem.sigmoid(up(h, G)), m),
            Sum(sympy.Abs(h[i]), i),
            square ** Rational(3, 2),
            self.function()(along),
            along * sympy.tanh(self.one_of(along, square)),
        )


@dataclass(frozen=True)
class Trial:
    """A layer and its inputs; ``excess`` runs it."""

    layer: cem.EnergyLayer
    inputs: dict

    def excess(self):
        """The largest rise of an energy in any step of any token over its rounding, and <= 1 if none rose.

        Energies are those of the definition, one token at a time at the context and the gates of the step. What
        rounding may do to an energy is 1e-12 of 1 and the largest magnitude of any of its sub-expressions: some
        thousand units in the last place. NaN where an energy is not finite.
        """
        layer = self.layer
        seen = cem.trace(layer, **self.inputs)[0].states
        states = seen.reshape(len(seen), -1, layer.dim)  # norm(h), (N + 1, T, D)
        context = self.inputs.get("context", self.inputs["h"])[0]
        context = layer.norm(context).detach() if layer.context_dim == layer.dim else context
        worst = -math.inf
        for t in range(states.shape[1]):
            place = len(context) - states.shape[1] + t if layer.causal else t
            visible = context[: place + 1] if layer.causal else context
            for step in range(layer.steps):
                gate = states[step if layer.refresh == "step" else 0, t]
                pair = states[step : step + 2, t]
                (before, room), (after, more) = (
                    self._energy(g, gate, visible, place) for g in pair
                )
                worst = max(worst, (after - before) / (room + more))
                if not math.isfinite(worst):
                    return math.nan
        return worst

    def _energy(self, g, gate, visible, place):
        """The energy of one token and what rounding may have done to it."""
        energy, layer = self.layer.energy_function, self.layer
        tensors = {"h": g, "hbar": gate, **values_of(layer)}
        tensors = {k: torch.as_tensor(z, dtype=torch.float64).detach() for k, z in tensors.items()}
        if energy.context is not None:
            tensors["x"] = visible
        tensors["position"] = g.new_tensor(place)
        tensors["context_position"] = torch.arange(len(visible)).to(g)
        evaluate = Evaluator(tensors, {**layer._sizes, SEQ: len(visible)})
        value = float(evaluate(energy.expression))
        sizes = [float(z.abs().max()) for z, _ in evaluate.memo.values() if z.numel()]
        sizes = [size for size in sizes if size != math.inf]
        return value, 1e-12 * (1.0 + max(sizes))


class Trials(Energies):
    """Draws layers: an energy, its parameters and a way to descend it; each of them often promised."""

    def __init__(self, seed):
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.torch, dtype=torch.float64)

    def log_uniform(self, low, high):
        return math.exp(self.random.uniform(math.log(low), math.log(high)))

    def energy(self):
        """An energy of the gallery or a drawn one; six are drawn to find one that has a bound."""
        if self.random.random() < 0.2:
            return self.random.choice(GALLERY)
        for _ in range(6):
            found = cem.Energy(self.draw())
            shapes = {p: [size.xreplace(NAMED) for size in p.shape] for p in found.parameters}
            values = {str(p.name): self.normal(*map(int, shape)) for p, shape in shapes.items()}
            scalars = {"beta": 2 / 3, "gamma": self.random.gauss(0, 1)}
            if math.isfinite(smoothness(found.expression, {**values, **scalars}, NAMED).largest):
                break
        return found

    def norm(self):
        """None, or a norm with or without a gain, equal or not."""
        kind = self.one_of(None, None, torch.nn.RMSNorm, torch.nn.LayerNorm)
        if kind is None:
            return None
        gain = self.one_of(*3 * ["none"], *2 * ["equal"], "unequal", "negative")
        eps = self.one_of(1e-5, 1.0, 1e-2)
        norm = kind(SIZES["dim"], eps=eps, elementwise_affine=gain != "none", dtype=torch.float64)
        with torch.no_grad():
            if gain == "equal":
                norm.weight.fill_(self.log_uniform(0.1, 10.0))
            elif gain != "none":
                norm.weight.copy_(
                    self.normal(SIZES["dim"]).abs() * (-1 if gain == "negative" else 1)
                )
            if gain != "none" and kind is torch.nn.LayerNorm:
                norm.bias.copy_(self.normal(SIZES["dim"]))
        return norm

    def preconditioner(self):
        dim = SIZES["dim"]
        kinds = (
            lambda: cem.ScaledIdentity(dim),
            lambda: cem.Diagonal(dim),
            lambda: cem.DiagonalPlusLowRank(dim, 2),
            lambda: cem.BlockDiagonal(dim, 2),
            lambda: cem.Diagonal(dim, signed=True),
        )
        make = self.one_of(None, None, None, *kinds)
        if make is None:
            return None
        found = make()
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=self.torch))
        return found

    def update(self, learned):
        size = self.log_uniform(1e-3, 1e3)
        kinds = (
            lambda: cem.Momentum(size, 0.9, learn=learned),
            lambda: cem.Nesterov(size, 0.9, learn=learned),
            lambda: cem.LineSearch(),
        )
        plain = [lambda: cem.GradientDescent(size, learn=learned)] * 5
        return self.one_of(*plain, *kinds)()

    def trial(self, energy):
        """A layer of an energy and inputs."""
        learned = self.random.random() < 0.3
        update = self.update(learned)
        sizes = sizes_of(energy, SIZES)
        scalars = {"gamma": self.random.gauss(0, 1), "beta": self.log_uniform(0.1, 10.0)}
        names = {scalar.name for scalar in energy.scalars}
        scalars = {name: value for name, value in scalars.items() if name in names}
        held = {str(parameter.name) for parameter in energy.parameters}
        free = [name for name in sorted(names) if f"log_{name}" not in held]
        layer = cem.derive(
            energy,
            causal=self.one_of(True, False),
            steps=self.one_of(1, 1, 2, 3),
            refresh=self.one_of("layer", "step"),
            moving=energy.context is not None and self.random.random() < 0.1,
            update=update,
            norm=self.norm(),
            preconditioner=self.preconditioner(),
            learn=[name for name in free if self.random.random() < 0.5],
            dtype=torch.float64,
            **sizes,
            **scalars,
        )
        scale = self.log_uniform(0.05, 5.0)
        with torch.no_grad():
            for parameter in energy.parameters:
                tensor = getattr(layer, str(parameter.name))
                tensor.copy_(scale * self.normal(*tensor.shape))
        self.set_step_size(layer)
        inputs = {"h": self.log_uniform(0.1, 10.0) * self.normal(1, 3, layer.dim)}
        if energy.context is not None and not layer.moving and self.random.random() < 0.5:
            inputs["context"] = self.log_uniform(0.1, 10.0) * self.normal(1, 4, layer.dim)
        return Trial(layer, inputs)

    def set_step_size(self, layer):
        """Mostly as drawn; often right below the bound of the certificate, sometimes negative."""
        bound, update = layer.certificate.bound, layer.update
        if isinstance(update, cem.LineSearch):
            return
        size = float(torch.as_tensor(update.step_size).detach())
        if bound and math.isfinite(bound) and self.random.random() < 0.7:
            size = bound * self.one_of(0.9, 0.99, 0.999999, 0.5)
        if update.learn and self.random.random() < 0.1:
            size = -size
        if update.learn:
            update.step_size.data.fill_(size)
        else:
            update.step_size = size
