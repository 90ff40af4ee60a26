"""A preconditioned step: attention whose update passes through a positive semi-definite matrix.

Legend: T tokens, S context tokens, D dim, H heads, R rank, C columns of V.

1. The energy. That of weight-tied attention, with q_a = Q_a h and k_as = K_a x_s:

       E(h | x) = -(1/beta) sum_a log sum_{s in V} exp(beta q_a . k_as).

2. The adjoints. With p_a = softmax_s(beta q_a . k_as), the force on a query is the mean of the keys:

       -dE/dq_a = sum_{s in V} p_as k_as.

3. The gradient. It returns to the state through the matrix that made the query:

       -dE/dh = f(h) = sum_a Q_a^T sum_{s in V} p_as k_as.

4. The layer. A step along the force turned by a matrix P (D, D) that does not depend on h:

       h+ = h + eta P f(h),        P = diag(softplus(d)) + V V^T,    V of shape (D, C).

   P is never formed: P f = softplus(d) * f + V (V^T f) costs 2 D C multiplications a token, where
   the two projections of attention cost 4 H R D. It mixes what the heads have written into the
   output, which is what an output projection of its own would do; but since P is symmetric and
   positive semi-definite, the step still goes down.

   P is semi-definite for every d and V: u^T P u = sum_i softplus(d_i) u_i^2 + |V^T u|^2 >= 0. Every
   semi-definite matrix is some V V^T with C = D, so what is given up is rank.

   The start. V = 0 would be the identity, and a dead point: d(V V^T) = dV V^T + V dV^T = 0 there.
   The rows of V may instead be orthogonal, so that V V^T is diagonal and d makes up for it:
   V[c_r, r] = 1/2 at C coordinates c_r and 0 elsewhere, softplus(d) = 3/4 at the c_r and 1
   elsewhere. Then P = I, and dP[i, c_r] = dP[c_r, i] = dV[i, r] / 2 for i other than c_r: every entry
   of V has a slope.

5. Descent. Along the line h(t) = h + t P f the energy starts with the slope

       dE/dt = -f^T P f <= 0,

   for every P >= 0; it is zero only where P f = 0. That is first order, true of small steps for
   every energy. Here E is concave in h (minus a log-sum-exp of scores linear in h), so it lies
   below its tangents, and for every eta >= 0

       E(h + eta P f) <= E(h) - eta f^T P f.

   Nothing weaker than P >= 0 gives this: if u^T P u < 0 for some u, the step raises the energy -u.h,
   whose force is u. A preconditioner with signs gives the guarantee up.

   P is the geometry of the step: h+ is the minimiser of the tangent of E at h plus
   |z - h|^2 / (2 eta) in the norm u^T P^-1 u, so a large softplus(d_i) is a coordinate in which
   moving is cheap.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import cem
from cem.derivations.checks import assert_gradient_matches_sympy, assert_layer_matches
from cem.energies import interaction as energy

STEP_SIZE = 0.5


def closed_form(
    h: Tensor,
    x: Tensor,
    *,
    Q: Tensor,
    K: Tensor,
    d: Tensor,
    V: Tensor,
    beta: float | None = None,
    causal: bool = True,
) -> Tensor:
    """h + eta (softplus(d) * f + V V^T f), for states (..., T, D) and context (..., S, D).

    A causal token t sees s <= t + S - T. ``beta`` is 1/sqrt(rank) if None.
    """
    force = attention(h, x, Q=Q, K=K, beta=beta, causal=causal)
    return h + STEP_SIZE * (F.softplus(d) * force + (force @ V) @ V.mT)


def attention(
    h: Tensor, x: Tensor, *, Q: Tensor, K: Tensor, beta: float | None = None, causal: bool = True
) -> Tensor:
    """The force f(h) = -dE/dh (..., T, D)."""
    beta = Q.shape[-2] ** -0.5 if beta is None else beta
    q = torch.einsum("ard,...td->...atr", Q, h)  # (..., H, T, R)
    k = torch.einsum("ard,...sd->...asr", K, x)  # (..., H, S, R)
    score = beta * q @ k.mT  # (..., H, T, S)
    if causal:
        T, S = score.shape[-2:]
        past = torch.ones(T, S, dtype=torch.bool, device=h.device).tril(S - T)
        score = score.masked_fill(~past, -torch.inf)
    return torch.einsum("ard,...atr->...td", Q, score.softmax(-1) @ k)


def layer(*, causal: bool = True) -> cem.EnergyLayer:
    """The derived layer at small odd sizes, in float64, with a preconditioner away from the identity."""
    made = cem.derive(
        energy,
        dim=13,
        heads=3,
        rank=5,
        causal=causal,
        update=cem.GradientDescent(STEP_SIZE),
        preconditioner=cem.DiagonalPlusLowRank(13, rank=4),
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in made.preconditioner.parameters():
            parameter += torch.linspace(-0.8, 0.9, parameter.numel()).view_as(parameter)
    return made


def derivation() -> cem.Derivation:
    """The same derivation as the toolkit finds it."""
    return layer().derivation


def check() -> None:
    """Raise ``AssertionError`` unless closed form and layer, gradient and SymPy, bound and energies agree."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 9, 13, dtype=torch.float64, generator=generator)
    for causal in (True, False):

        def by_hand(h, x=None, *, causal=causal, **parameters):
            own = {name.split(".")[-1]: value for name, value in parameters.items()}
            return closed_form(h, h if x is None else x, causal=causal, **own)

        assert_layer_matches(layer(causal=causal), by_hand, h)
        assert_layer_matches(layer(causal=causal), by_hand, h, context=x)
    assert_gradient_matches_sympy(energy, heads=2, dim=3, seq=3, rank=2)
    check_start()
    check_descent(layer(), h)


def check_start() -> None:
    """The preconditioner starts at the identity, and no entry of it is stuck there."""
    part = cem.DiagonalPlusLowRank(13, rank=4).double()
    eye = torch.eye(13, dtype=torch.float64)
    assert float((part.dense() - eye).detach().abs().max()) < 1e-6  # float32 at the start
    weights = torch.linspace(0.1, 2.0, 169, dtype=torch.float64).view(13, 13)
    slopes = torch.autograd.grad((part.dense() * weights).sum(), [part.d, part.V])
    assert all(bool((slope != 0).all()) for slope in slopes)


def check_descent(made: cem.EnergyLayer, h: Tensor) -> None:
    """E(h + eta P f) <= E(h) - eta f^T P f for small and large eta, at the context of before."""
    with torch.no_grad():
        force = attention(h, h, Q=made.Q, K=made.K)
        turned = made.preconditioner(force)
        fall = (force * turned).sum(-1)
        assert bool((fall > 0).all())
        before = made.energy(h)
        for eta in (1e-2, 1.0, 1e2):
            after = made.energy(h + eta * turned, context=h, frozen=h)
            assert bool((after <= before - eta * fall + 1e-9 * eta).all())


if __name__ == "__main__":
    check()
    print(derivation())
