"""What an energy in torch that cannot be read is told: the line, what was got, what to type."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_pen import Quadratic, declared

from cem.language.tracing import Untranslatable, signature, translate


def branches(h):
    if h.sum() > 0:
        return h.sum()
    return -h.sum()


def asserts(h, *, U):
    assert U.shape[0] == h.shape[0]
    return (U @ h).sum()


def loops(h, *, U):
    return sum(row @ h for row in U)


def ranges(h, *, U):
    return sum(U[m] @ h for m in range(U.shape[0]))


def in_place(h):
    return h.exp_().sum()


def writes(h):
    h[0] = 1.0
    return h.sum()


def without_gradient(h):
    with torch.no_grad():
        c = h.exp()
    return (c * h).sum()


LEARNED = nn.Parameter(torch.tensor(0.5))
UNTRANSLATABLE = {
    "maximum over tokens": (
        lambda h, x: (x @ h).max(),
        "`max` has no translation; .*mask over the context",
    ),
    "amax": (lambda h, x: torch.amax(x @ h, 0), "`amax` has no translation; .*`logsumexp`"),
    "order": (
        lambda h, x: torch.cumsum(x @ h, 0).sum(),
        "`cumsum` has no translation; .*order of the tokens",
    ),
    "topk": (lambda h, x: torch.topk(x @ h, 2)[0].sum(), "`topk` has no translation"),
    "sort": (lambda h, x: (x @ h).sort()[0].sum(), "`sort` has no translation"),
    "token by number": (lambda h, x: x[-1] @ h, "picking entries by number, `.-1.`"),
    "part of a state": (lambda h: h[1:].sum(), "picking entries by number"),
    "stack": (lambda h: torch.stack([h, h]).sum(), "`stack` has no translation; .*joined"),
    "cat": (lambda h: torch.cat([h, h], dim=0).sum(), "`cat` has no translation; .*joined"),
    "mask": (
        lambda h, x: torch.where(x @ h > 0, 1.0, 0.0).sum(),
        "`where` has no translation; .*masks",
    ),
    "noise": (lambda h: F.dropout(h).sum(), "`dropout` has no translation; .*random"),
    "norms": (
        lambda h: F.layer_norm(h, (5,)).sum(),
        "`layer_norm` has no translation; give `norm=`",
    ),
    "unknown": (
        lambda h: torch.special.i0(h).sum(),
        "`special_i0` has no translation; write it with",
    ),
    "branch": (branches, "`if`, `while`, `and` and `assert` cannot ask"),
    "assert": (asserts, "`hidden` == `dim` is not known"),
    "loop": (loops, "a loop over the axis of a tensor .* `einsum`"),
    "range": (ranges, "TypeError, .*no Python numbers made of them"),
    "float": (lambda h: h.sum() * float(h.shape[0]), "TypeError, .*no Python numbers made of them"),
    "math": (
        lambda h: math.sqrt(h @ h),
        "`math.sqrt` makes a number of a tensor: type `torch.sqrt`",
    ),
    "in place": (in_place, "`exp_` writes into a tensor: type `exp`"),
    "assignment": (writes, "TypeError, .*item assignment"),
    "out": (
        lambda h: torch.exp(h, out=torch.ones(()) * 1).sum(),
        "`exp` writes into a tensor: leave `out=`",
    ),
    "no_grad": (without_gradient, "`torch.no_grad` .* type `cem.frozen"),
    "visible": (lambda h, x, *, visible: (x @ h * visible).sum(), "masks by itself with `visible`"),
    "foreign tensor": (
        lambda h: (torch.ones(5) * h).sum(),
        r"reads a tensor of shape \(5,\) that is not an argument: pass it as a keyword-only",
    ),
    "learned number": (
        Quadratic(LEARNED).__call__,
        r"a tensor of shape \(\) that is not an argument",
    ),
    "foreign weights": (lambda h: nn.Linear(5, 2)(h).sum(), r"reads a tensor of shape \(2, 5\)"),
    "sizes": (lambda h, *, b: (h * b).sum(), "`mul`: the sizes `dim` and `hidden` do not match"),
    "sizes of a product": (lambda h, *, Q: Q.T @ h, "the sizes `heads` and `dim` do not match"),
    "view": (
        lambda h, *, Q: h.view(Q.shape[0], -1).sum(),
        r"cannot view the shape \(dim,\) as \(heads, -1\)",
    ),
    "view by number": (lambda h: h.view(1, 5).sum(), "the size 5 is not a named one"),
    "view out of order": (
        lambda h, *, Q: Q.view(Q.shape[1], Q.shape[0], -1).sum(),
        "do not line up in row-major order",
    ),
    "expand": (
        lambda h, *, b: h.expand(b.shape).sum(),
        r"cannot expand the shape \(dim,\) to \(hidden,\)",
    ),
    "expand to a sum": (
        lambda h, *, b: h.sum().expand(b.shape[0] + 1).sum(),
        "`hidden \\+ 1` is not a named size",
    ),
    "expand to tokens": (
        lambda h, x: h.sum().expand(x.numel()).sum(),
        "`dim\\*seq` mixes tokens with coordinates",
    ),
    "equation": (
        lambda h: torch.einsum("ij->i", h).sum(),
        r"a term of `ij->i` does not fit .* \(dim,\)",
    ),
    "terms": (lambda h: torch.einsum("i,i->", h), "has 2 terms for 1 tensors"),
    "dtype": (
        lambda h: h.sum() if h.dtype == torch.float64 else h.exp().sum(),
        "`eq`: a tensor or a number is",
    ),
    "axis": (lambda h: h.sum(1), "there is no axis 1 in a tensor with 1 axes"),
    "clamp": (lambda h: h.clamp(-1, 1).sum(), "`clamp` is understood at 0 only"),
    "maximum": (
        lambda h: torch.maximum(h, h.exp()).sum(),
        "`maximum` and `minimum` are understood",
    ),
    "norm": (lambda h: h.norm(p=3), "the norm of order 3 has no translation"),
    "spectral": (lambda h, *, U: torch.linalg.norm(U, 2), "the matrix norm of order 2"),
    "rounding": (
        lambda h: torch.div(h, 2, rounding_mode="floor").sum(),
        "leave `rounding_mode` out",
    ),
    "integers": (lambda h: h.to(torch.int64).sum(), "a conversion to torch.int64 rounds"),
    "softmax": (lambda h: F.softmax(h).sum(), "a softmax needs the axis"),
    "attribute": (lambda h: h.grad.sum(), "`.grad` of a tensor has no translation"),
    "infinity": (lambda h: h.sum() * float("inf"), "the number inf"),
    "option": (lambda h: torch.sum(h, nowhere=1), "`sum` with these arguments has no translation"),
    "tuple": (lambda h: (h.sum(), h), "returns a tuple: return one tensor"),
    "nothing": (lambda h: None, "returns a NoneType: return one tensor"),
    "scalar product": (lambda h: h.sum() @ h, "`@` needs tensors with axes"),
    "comparison": (lambda h: (h == h.exp()).sum(), "comparing entries has no gradient"),
    "quotient": (
        lambda h, *, b: h.sum() * (h.shape[0] // b.shape[0]),
        "`dim // hidden` is no product",
    ),
    "diagonal": (lambda h, *, W: W.diagonal(1).sum() + h.sum(), "only the main diagonal"),
    "permute": (lambda h, *, U: U.permute(0, 0).sum(), "must name each axis"),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_untranslatable_says_what_to_do(name):
    function, message = UNTRANSLATABLE[name]
    with pytest.raises(Untranslatable, match=message):
        translate(function, declared(function))


def test_untranslatable_names_the_line_of_an_object():
    with pytest.raises(Untranslatable, match="energy `Quadratic`, line .*`return self.weight"):
        translate(Quadratic("two"), {"h": "dim", "U": "hidden dim"})


def test_untranslatable_names_the_line():
    line = without_gradient.__code__.co_firstlineno + 2
    with pytest.raises(
        Untranslatable, match=f"energy `without_gradient`, line {line}, `c = h.exp\\(\\)`: "
    ):
        translate(without_gradient, {"h": "dim"})


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda h, *, lam: lam * h.sum(), r"\(heads,\)"),
        (lambda h, x: x @ h, r"\(seq,\)"),
        (lambda h, *, Q: Q @ h, r"\(heads, rank\)"),
        (lambda h: h.sum(keepdim=True), r"\(1,\)"),
    ],
)
def test_result_must_be_one_value(function, shape):
    function.__name__ = "wide"
    message = rf"energy `wide` must return one value per token: got shape {shape}; did you forget"
    with pytest.raises(ValueError, match=message + r" `.sum\(\)`\?$"):
        translate(function, declared(function))


def named(function):
    function.__name__ = "wrong"
    return function


DECLARATIONS = {
    "no state": (
        lambda *, U: 0,
        {"U": "hidden dim"},
        "energy `wrong` has no state: type it as the first",
    ),
    "state without shape": (
        lambda h: 0,
        {},
        "the state `h` of energy `wrong` must have one axis.*got 'no shape'",
    ),
    "state with two axes": (
        lambda h: 0,
        {"h": "heads dim"},
        "must have one axis.*got 'heads dim'; type",
    ),
    "state over tokens": (lambda h: 0, {"h": "seq"}, "must have one axis.*got 'seq'"),
    "context with one axis": (
        lambda h, x: 0,
        {"h": "dim", "x": "seq"},
        "the context `x` .* two axes.*got 'seq'",
    ),
    "unknown argument": (
        lambda h: 0,
        {"h": "dim", "y": "dim"},
        "energy `wrong` has no argument `y`.*`h`",
    ),
    "positional": (
        lambda h, U: 0,
        {"h": "dim", "U": "m dim"},
        r"`U` of energy `wrong` is positional.*`\*` before",
    ),
    "positional scalar": (
        lambda h, beta=1.0: 0,
        {"h": "dim"},
        "`beta` of energy `wrong` is positional: got no shape",
    ),
    "third": (
        lambda h, x, y: 0,
        {"h": "dim", "x": "seq dim", "y": "seq dim"},
        "`y` .* is positional",
    ),
    "starred": (
        lambda h, **rest: 0,
        {"h": "dim"},
        "argument `rest` of energy `wrong` collects arguments",
    ),
    "tokens": (
        lambda h, *, x: 0,
        {"h": "dim", "x": "seq dim"},
        "`x` of energy `wrong` has an axis over tokens",
    ),
    "name of a size": (
        lambda h, *, dim: 0,
        {"h": "dim"},
        "argument `dim` .* has the name of a size",
    ),
    "default": (lambda h, *, f=torch.relu: 0, {"h": "dim"}, "argument `f` .* got the default <"),
    "empty": (
        lambda h: 0,
        {"h": ""},
        "the shape of `h` in energy `wrong` must be names .*: got ''",
    ),
    "number": (lambda h: 0, {"h": "4"}, "must be names separated by blanks.*: got '4'"),
    "parenthesis": (lambda h: 0, {"h": "(heads rank"}, r"must be names.*: got '\(heads rank'"),
    "empty group": (lambda h: 0, {"h": "()"}, "must be names"),
    "comma": (lambda h: 0, {"h": "a, b"}, "must be names"),
    "no text": (lambda h: 0, {"h": 4}, "must be names.*: got 4"),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_declaration_is_checked(name):
    function, shapes, message = DECLARATIONS[name]
    with pytest.raises(ValueError, match=message):
        signature(named(function), shapes)
