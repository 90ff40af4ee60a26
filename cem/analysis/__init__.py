"""How far a layer, ours or another's, is from being the gradient of an energy.

A step u(h) descends an energy if u = -dE/dh, and a field is a gradient if and only if its Jacobian is symmetric. So the
first number of any layer is its antisymmetry |J - J^T| / |J|. It depends on what is held while the state moves:

- With *the context and the gates held* (``"frozen"``), tied attention is the gradient of a log-sum-exp, and a gated MLP
  with down = up^T diag(w) that of a quadratic form: 0, whatever the parameters. Untied attention is no gradient: its
  Jacobian is beta sum_a O_a Cov_a(v, k) Q_a, which is symmetric where O V is a multiple of Q^T K.
- With *the other tokens held* (``"token"``), a token's own key, value and gates follow it. No layer that looks at
  itself is a gradient then, not ours either: the energy that it descends changes with the state.
- With *everything held*, the query too, every update is the gradient of -u(c) . h, which says nothing. The energy
  ``untied_interaction`` of the gallery stands between: it holds the query, but bends with h by the covariance of the
  values, so it is concave and a step of any size descends it. Its Jacobian is symmetric, and is not that of attention.
- *All together* (``"joint"``), tokens follow a gradient where each also feels those that see it, as in Energy
  Transformer.

Behind a norm, g = norm(h), the update is a gradient for g. For h its Jacobian is a Hessian times the Jacobian of the
norm, a product of symmetric matrices that is not symmetric: mirror descent.

An update u = M grad Phi is told by P = M^-1, for which P J is symmetric (:func:`best_preconditioner`). What is no
gradient still goes up or down on the energy nearest to it (:func:`fit_energy`), and :func:`analyse` asks every layer
of a model.

>>> import torch, cem
>>> from cem.analysis import antisymmetry, best_preconditioner
>>> h = torch.randn(40, 4, dtype=torch.float64)
>>> layer = cem.derive(cem.energies.memory, dim=4, hidden=9, dtype=torch.float64)
>>> antisymmetry(layer, h).relative < 1e-12, best_preconditioner(layer, h).null_space
(True, 1)
"""

from .antisymmetry import Antisymmetry, antisymmetry
from .report import Descent, LayerReport, Report, analyse, energies_along
from .sublayers import Sublayer, sublayers
from .symmetriser import Symmetriser, best_preconditioner
from .tie import Fit, Tie, fit_energy, fit_tied

__all__ = [
    "Antisymmetry",
    "Descent",
    "Fit",
    "LayerReport",
    "Report",
    "Sublayer",
    "Symmetriser",
    "Tie",
    "analyse",
    "antisymmetry",
    "best_preconditioner",
    "energies_along",
    "fit_energy",
    "fit_tied",
    "sublayers",
]
