"""Muon for the hidden matrices, AdamW for everything else, as one optimizer; and who is trained how."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_OPTIONS = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")


class _SinglePrecision(TorchFunctionMode):
    """Where code asks for bfloat16, a copy in float32: most CPUs emulate bfloat16, at 15 times the cost."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return function(*args, **(kwargs or {}))


class Muon(torch.optim.AdamW):
    """``torch.optim.Muon`` on the groups with ``muon=True``, AdamW on the others.

    A parameter of more than two axes is read as the matrix that maps its last axis: Q of shape
    (heads, rank, dim) sends a state to heads * rank numbers, and is updated as the
    (heads * rank, dim) matrix that a ``q_proj`` of the same size is. So a tied layer and an ordinary
    one are treated alike. (One orthogonal update per head is the alternative; it would give each of
    the heads the same share of the step whatever its gradient.)

    The step is scaled to AdamW's root mean square (``match_rms_adamw``, arXiv 2502.16982), so that
    one learning rate serves both.

    The Newton-Schulz iteration runs in bfloat16 on an accelerator, as in ``torch.optim.Muon``, and in
    float32 on a CPU.

    Args:
        groups: parameter groups; each may say ``muon=True``.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        momentum, nesterov, ns_steps: as in ``torch.optim.Muon``.

    Raises:
        ValueError: a group with ``muon=True`` holds a parameter with less than two axes.

    >>> Q = nn.Parameter(torch.zeros(2, 3, 8))  # (heads, rank, dim)
    >>> optimizer = Muon([{"params": [Q], "muon": True}], lr=1.0, weight_decay=0.0)
    >>> Q.grad = torch.randn(2, 3, 8)
    >>> optimizer.step()
    >>> rms = Q.detach().square().mean().sqrt()
    >>> bool(0.1 < rms < 0.3)  # about 0.2, AdamW's
    True
    """

    def __init__(
        self,
        groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ):
        muon = dict(momentum=momentum, nesterov=nesterov, ns_steps=ns_steps)
        muon["adjust_lr_fn"] = "match_rms_adamw"
        groups = [{"muon": False} | group for group in groups]
        groups = [(muon | group) if group["muon"] else group for group in groups]
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.ndim < 2:
                    raise ValueError(
                        "Muon needs matrices: got a parameter of shape "
                        f"{tuple(parameter.shape)}; put it into a group with `muon=False`"
                    )
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every group; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step(group)
        return loss

    def _step(self, group: dict) -> None:
        # Views are made in every step: a wrapper may have put other tensors into the group.
        views: dict[Tensor, Tensor] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                view = parameter.detach().flatten(0, -2)
                view.grad = parameter.grad.flatten(0, -2)
                views[parameter] = view
        if not views:
            return
        muon = torch.optim.Muon(list(views.values()), **{name: group[name] for name in _OPTIONS})
        muon.state.update({v: self.state[p] for p, v in views.items() if p in self.state})
        on_cpu = all(view.is_cpu for view in views.values())
        with _SinglePrecision() if on_cpu else nullcontext():
            muon.step()
        # AdamW, whose state_dict this is, looks for a step in every state.
        self.state.update({p: {"step": torch.zeros(())} | muon.state[v] for p, v in views.items()})


def decayed(model: nn.Module) -> list[str]:
    """The names of the parameters that weight decay pulls on: matrices, and stacks of them."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def hidden_matrices(model: nn.Module) -> list[str]:
    """The names of the matrices between the embedding and the scores: what Muon is for.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    >>> hidden_matrices(model)
    ['1.weight']
    """
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    scores = getattr(model, "get_output_embeddings", lambda: None)()
    ends |= {id(parameter) for parameter in scores.parameters()} if scores is not None else set()
    named = dict(model.named_parameters())
    return [name for name in decayed(model) if id(named[name]) not in ends]


def parameter_groups(
    model: nn.Module, rate: float, decay: float, said: Mapping[str, Mapping[str, float]], muon: bool
) -> list[dict]:
    """The parameters of a model in groups of one learning rate and one weight decay.

    Matrices decay, and with ``muon`` those between the embedding and the scores are updated by it.

    Args:
        model: whose parameters.
        rate, decay: learning rate and weight decay of a group that says nothing else.
        said: a pattern of names, as in a shell, to ``{"learning_rate": FACTOR, "weight_decay": VALUE}``, where a
            factor is on the learning rate; of several patterns that match a name, the first.
        muon: whether the groups say ``muon``.

    Raises:
        ValueError: a pattern that matches no parameter.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> said = {"0.*": {"learning_rate": 0.5}}
    >>> [(g["lr"], g["weight_decay"], len(g["params"])) for g in parameter_groups(model, 0.01, 0.1, said, False)]
    [(0.01, 0.1, 1), (0.01, 0.0, 1), (0.005, 0.1, 1), (0.005, 0.0, 1)]
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in said:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"a pattern of `groups` matches names of parameters: got {pattern!r}, which matches none; "
                f"type `{next(reversed(named))}` or `*`"
            )
    matrices, hidden = set(decayed(model)), set(hidden_matrices(model)) if muon else set()
    found: dict[tuple, dict] = {}
    # What is not named comes first: its rate is the one that is logged.
    for pattern in (None, *said):
        for name, parameter in named.items():
            match = next((one for one in said if fnmatchcase(name, one)), None)
            if match != pattern:
                continue
            changes = said.get(match, {})
            decays = changes.get("weight_decay", decay) if name in matrices else 0.0
            group = {"lr": rate * changes.get("learning_rate", 1.0), "weight_decay": decays}
            group |= {"muon": name in hidden} if muon else {}
            found.setdefault(tuple(group.items()), group | {"params": []})["params"].append(
                parameter
            )
    return list(found.values())
