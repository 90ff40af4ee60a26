"""Random energies whose descent can often be promised, and trials that look for a broken promise.

Legend: T tokens, S context tokens, D dim.
"""

import random

import sympy
from sympy import Rational, Sum

import cem
from cem.language.symbols import SEQ
from cem.language.words import WORDS

SIZES = {"dim": 4, "heads": 2, "rank": 3, "hidden": 5}
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

FUNCTIONS = [word.function for word in WORDS if word.function is not sympy.log]
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
