"""Why a step descends: the theorems behind `layer.certificate`.

Legend: D dim. E is the energy of one token at a fixed context and fixed gates, g = dE/dh, P >= 0 a
symmetric matrix, eta >= 0 the step size. "E curves by at most L" says that no eigenvalue of the
Hessian of E is above L, anywhere; a concave E curves by at most 0. Everything follows from

    E(h+) <= E(h) + g.(h+ - h) + (L/2) |h+ - h|^2,                                              (*)

which is Taylor's formula with the largest curvature, and for L = 0 says that a concave function
lies below its tangents.

1. Concave energies. For h+ = h - eta P g and every eta,

       E(h+) <= E(h) - eta g.Pg.

   Proof. (*) with L = 0 and h+ - h = -eta P g.

2. Bounded curvature. With p the largest eigenvalue of P, every eta <= 2 / (L p) descends:

       E(h+) <= E(h) - eta (1 - eta L p / 2) g.Pg.

   Proof. (*), and |Pg|^2 <= p g.Pg. No larger eta would do: on L h^2 / 2 the step beyond 2 / L
   climbs the opposite slope.

3. A norm in front. The layer reads N(h), takes g = dE/dN there, and moves h+ = h - eta p g. RMSNorm
   and LayerNorm are gradients of convex functions, with the projection C = 1 - 11^T/D,

       h / sqrt(|h|^2/D + e) = d/dh D sqrt(|h|^2/D + e),
       Ch / sqrt(|Ch|^2/D + e) = d/dh D sqrt(|Ch|^2/D + e),

   each the length of a vector that is affine in h. Write d = h+ - h, v = N(h+) - N(h). Such
   gradients are monotone, v.d >= 0, and with a Lipschitz constant l (here 1/sqrt(e)) co-coercive,
   v.d >= |v|^2 / l. So for a concave E and every eta

       E(N(h+)) <= E(N(h)) + g.v = E(N(h)) - v.d / (eta p) <= E(N(h)),

   and where E curves by at most L, every eta <= 2 / (L p l) descends. A gain that differs between
   coordinates multiplies N by a diagonal, a P that is not scalar multiplies g by a matrix; either
   way v.d >= 0 is lost, and even small steps can climb.

4. Proximal steps. For R convex and h+ = prox_{eta R}(h - eta g), the sum F = E + R obeys

       F(h+) <= F(h) - (1/eta - L/2) |h+ - h|^2.

   Proof. r = (h - h+)/eta - g is a subgradient of R at h+, so R(h+) <= R(h) + r.(h+ - h). Add (*).
   For an R that is not convex, half of it is left: h+ minimises R(z) + |z - h + eta g|^2 / (2 eta),
   compare with z = h, and F(h+) <= F(h) - (1/(2 eta) - L/2) |h+ - h|^2.

5. Newton directions. Conjugate gradients on A d = g, A positive definite, started at 0 and stopped
   after any number of steps, give g.d > 0; so h+ = h - eta d lowers a concave E for every eta.
   Proof. The iterate minimises d.Ad/2 - g.d over a space that contains 0 and g, where it is below
   0: g.d > d.Ad/2 >= 0. Then (*) with L = 0.

6. Line search. Halve eta until E(h - eta P g) <= E(h) - c eta g.Pg, and stay where none is found:
   both ends descend, whatever E is.

`check()` draws random instances of each and looks for one that breaks it, and finds the
counterexamples: one percent beyond the bound of 2, an unequal gain and a diagonal P for 3.

Sources: Nesterov, Lectures on Convex Optimization, 2018, sections 1.2 and 2.1 (1, 2); Baillon and
Haddad, Israel J. Math. 26 (1977) 137 (3); Beck and Teboulle, SIAM J. Imaging Sci. 2 (2009) 183 (4);
Nocedal and Wright, Numerical Optimization, 2006, sections 3.1 and 7.1 (5, 6).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev
from torch.nn import functional as F

D = 5
Function = Callable[[Tensor], Tensor]


class Instances:
    """Draws energies, matrices, states and step sizes, in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step_size(self) -> float:
        """Log-uniform between 1e-3 and 1e3."""
        return 10.0 ** float(6 * torch.rand((), generator=self.generator) - 3)

    def concave(self) -> Function:
        """-log sum exp of affine scores, less squares, less what is convex and has a kink."""
        A, b, B = self.normal(7, D), self.normal(7), self.normal(3, D)

        def energy(h: Tensor) -> Tensor:
            return (
                -(A @ h + b).logsumexp(0) - (B @ h).square().sum() / 2 - F.relu(B @ h - b[:3]).sum()
            )

        return energy

    def curved(self) -> tuple[Function, float]:
        """A concave energy plus a form and softplus units, and a bound of its curvature."""
        down, W, U = self.concave(), self.normal(D, D), self.normal(4, D)
        top = float(torch.linalg.eigvalsh(W @ W.mT)[-1] + torch.linalg.matrix_norm(U, 2) ** 2 / 4)
        return lambda h: down(h) + (W.mT @ h).square().sum() / 2 + F.softplus(U @ h).sum(), top

    def positive(self) -> Tensor:
        """A symmetric positive semi-definite matrix, one in three of them singular."""
        M = self.normal(D, (2, 5, 8)[int(3 * torch.rand((), generator=self.generator))])
        return M @ M.mT

    def norm(self) -> tuple[Function, float]:
        """RMSNorm or LayerNorm with an equal gain, and its Lipschitz constant."""
        eps, gain = 10.0 ** float(-3 * torch.rand((), generator=self.generator)), self.step_size()
        centred = bool(torch.rand((), generator=self.generator) < 0.5)

        def norm(h: Tensor) -> Tensor:
            h = h - h.mean() if centred else h
            return gain * h / (h.square().mean() + eps).sqrt()

        return norm, gain / math.sqrt(eps)


def soft_threshold(z: Tensor, eta: float) -> Tensor:
    """prox of eta |z|_1."""
    return z.sign() * F.relu(z.abs() - eta)


def hard_threshold(z: Tensor, eta: float) -> Tensor:
    """prox of eta times the number of entries that are not 0, which is not convex."""
    return torch.where(z.square() > 2 * eta, z, 0.0)


def conjugate_gradients(A: Tensor, g: Tensor, steps: int) -> Tensor:
    """The iterate for A d = g after some steps from 0."""
    d, r = torch.zeros_like(g), g
    p = r
    for _ in range(steps):
        q = A @ p
        length = r @ r / (p @ q)
        d, rest = d + length * p, r - length * q
        p, r = rest + (rest @ rest) / (r @ r) * p, rest
    return d


def _assert_at_most(found: Tensor, promised: Tensor, what: str, *sizes: Tensor) -> None:
    """Up to what float64 loses: 1e-12 of the values that were subtracted."""
    size = 1.0 + sum(float(z.abs()) for z in (found, promised, *sizes))
    assert float(found - promised) <= 1e-12 * size, f"{what}: {found:.17g} is above {promised:.17g}"


def check_concave(draw: Instances) -> None:
    """Theorem 1, and 6 for an energy that is not concave."""
    E, P, h, eta = draw.concave(), draw.positive(), draw.normal(D), draw.step_size()
    g = grad(E)(h)
    _assert_at_most(E(h - eta * P @ g), E(h) - eta * g @ P @ g, "concave", eta * g @ P @ g)
    up = draw.curved()[0]
    g = grad(up)(h)
    for step in [eta * 0.5**n for n in range(40)] + [0.0]:
        if up(h - step * P @ g) <= up(h) - 1e-4 * step * g @ P @ g:
            break
    _assert_at_most(up(h - step * P @ g), up(h), "line search")


def check_bounded(draw: Instances) -> None:
    """Theorem 2, and that its bound is the best."""
    (E, L), P, h = draw.curved(), draw.positive(), draw.normal(D)
    values, vectors = torch.linalg.eigh(P)
    p, g = float(values[-1]), grad(E)(h)
    eta = min(draw.step_size(), 2 / (L * p))
    promised = E(h) - eta * (1 - eta * L * p / 2) * g @ P @ g
    _assert_at_most(E(h - eta * P @ g), promised, "bounded curvature")
    along = vectors[:, -1]
    beyond = along - 1.01 * 2 / (L * p) * P @ (L * along)
    assert beyond.square().sum() > along.square().sum(), "a step beyond the bound climbs"


def check_normed(draw: Instances) -> None:
    """Theorem 3: the lemma and both of its cases."""
    (N, slope), h, eta, p = draw.norm(), draw.normal(D), draw.step_size(), draw.step_size()
    J = jacrev(N)(h)
    assert (J - J.mT).abs().max() <= 1e-12 * slope, "the Jacobian of a norm is symmetric"
    eigenvalues = torch.linalg.eigvalsh(J)
    assert eigenvalues[0] >= -1e-12 * slope and eigenvalues[-1] <= slope * (1 + 1e-12)
    E = draw.concave()
    after = h - eta * p * grad(E)(N(h))
    d, moved = after - h, N(after) - N(h)
    _assert_at_most(moved.square().sum() / slope, moved @ d, "co-coercive", moved.norm() * d.norm())
    _assert_at_most(E(N(after)), E(N(h)), "concave behind a norm", N(h).square().sum())
    E, L = draw.curved()
    eta = min(eta, 2 / (L * p * slope))
    after = h - eta * p * grad(E)(N(h))
    _assert_at_most(E(N(after)), E(N(h)), "curved behind a norm", L * N(h).square().sum())


def check_proximal(draw: Instances) -> None:
    """Theorem 4, for l1 and for the number of entries that are not 0."""
    regularisers = ((soft_threshold, lambda z: z.abs().sum(), 1), (hard_threshold, _count, 2))
    for E, L in ((draw.concave(), 0.0), draw.curved()):
        for prox, R, halves in regularisers:
            h, eta = draw.normal(D) * (draw.normal(D) > 0), draw.step_size()
            eta = min(eta, 2 / L) if L else eta
            after = prox(h - eta * grad(E)(h), eta)
            moved = (after - h).square().sum()
            promised = E(h) + R(h) - (1 / (halves * eta) - L / 2) * moved
            _assert_at_most(E(after) + R(after), promised, "proximal", L * moved, moved / eta)


def _count(z: Tensor) -> Tensor:
    return (z != 0).double().sum()


def check_newton(draw: Instances) -> None:
    """Theorem 5, with |Hess E| + lam for A, after every number of steps."""
    E, h, eta = draw.concave(), draw.normal(D), draw.step_size()
    g, A = grad(E)(h), -hessian(E)(h) + 0.1 * torch.eye(D, dtype=torch.float64)
    for steps in range(1, D + 1):
        d = conjugate_gradients(A, g, steps)
        assert g @ d > 0, "a Newton direction points downhill"
        _assert_at_most(E(h - eta * d), E(h) - eta * g @ d, "Newton", eta * g @ d)


def climbs(draw: Instances) -> tuple[bool, bool]:
    """Whether a small step climbs a concave energy behind an unequal gain, and with a diagonal P."""
    (N, _), E, h = draw.norm(), draw.concave(), draw.normal(D)
    gain, diagonal = 10.0 ** draw.normal(2, D)

    def rate(norm: Function, P: Tensor) -> Tensor:
        """dE/dt = -g.JPg of the limit of small steps."""
        g = grad(E)(norm(h))
        return -g @ jacrev(norm)(h) @ (P * g)

    one = torch.ones(D, dtype=torch.float64)
    return bool(rate(lambda z: gain * N(z), one) > 0), bool(rate(N, diagonal) > 0)


def check(instances: int = 50) -> None:
    """Raise ``AssertionError`` where a theorem is broken, or no counterexample is found."""
    for seed in range(instances):
        draw = Instances(seed)
        check_concave(draw)
        check_bounded(draw)
        check_normed(draw)
        check_proximal(draw)
        check_newton(draw)
    for found in zip(*(climbs(Instances(seed)) for seed in range(200)), strict=True):
        assert any(found), "unequal gains and diagonal preconditioners climb somewhere"


if __name__ == "__main__":
    check()
    print(__doc__.strip())
