"""The operations of torch that the torch pen understands: one table from names to meanings.

A function, a method and an operator that do the same share one entry: ``torch.sum(x)`` and
``x.sum()`` are ``sum``. Handlers take the arguments that torch takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sympy import Indexed

from . import torch_pointwise as pointwise
from . import torch_products as products
from . import torch_reductions as reductions
from . import torch_shapes as shapes
from . import words
from .positions import lookup, rope
from .tokens import decay
from .torch_tensor import Untranslatable, elementwise, lift

ALIASES = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "truediv": "div",
    "true_divide": "div",
    "float_power": "pow",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "view": "reshape",
    "mm": "matmul",
    "bmm": "matmul",
    "mv": "matmul",
    "dot": "matmul",
    "vdot": "matmul",
    "linalg_matmul": "matmul",
    "linalg_vecdot": "vecdot",
}
"""Names that mean the same as another one on the arguments that a translation allows."""


def _getattr(input, name: str):
    if name in ("dtype", "device", "layout"):
        return name
    if name in ATTRIBUTES:
        return ATTRIBUTES[name](input)
    raise Untranslatable(f"the attribute `.{name}` of a tensor has no translation: leave it out")


ATTRIBUTES: dict[str, Callable] = {
    "T": shapes.reverse,
    "mT": shapes.matrix_transpose,
    "shape": shapes.size,
    "ndim": lambda input: input.ndim,
    "data": shapes.detach,
}

TABLE: dict[str, Callable] = {
    **{
        name: partial(pointwise.pointwise, function=function)
        for name, function in pointwise.ELEMENTWISE.items()
    },
    "add": pointwise.add,
    "sub": pointwise.sub,
    "rsub": pointwise.rsub,
    "mul": pointwise.mul,
    "div": pointwise.div,
    "floordiv": pointwise.floordiv,
    "floor_divide": pointwise.floordiv,
    "pow": pointwise.pow,
    "addcmul": pointwise.addcmul,
    "lerp": pointwise.lerp,
    "logaddexp": pointwise.logaddexp,
    "relu": pointwise.relu,
    "leaky_relu": pointwise.leaky_relu,
    "silu": pointwise.silu,
    "mish": pointwise.mish,
    "gelu": pointwise.gelu,
    "softplus": pointwise.softplus,
    "clamp": pointwise.clamp,
    "clamp_min": lambda input, min: pointwise.clamp(input, min=min),
    "clamp_max": lambda input, max: pointwise.clamp(input, max=max),
    "maximum": pointwise.maximum,
    "minimum": partial(pointwise.maximum, sign=-1),
    "gt": pointwise.greater,
    "lt": pointwise.less,
    "ge": lambda input, other: pointwise.no(pointwise.less(input, other)),
    "le": lambda input, other: pointwise.no(pointwise.greater(input, other)),
    "and": pointwise.mul,
    "logical_and": pointwise.mul,
    "or": lambda input, other: pointwise.no(
        pointwise.mul(pointwise.no(input), pointwise.no(other))
    ),
    "logical_or": lambda input, other: pointwise.no(
        pointwise.mul(pointwise.no(input), pointwise.no(other))
    ),
    "invert": pointwise.no,
    "logical_not": pointwise.no,
    "eq": partial(pointwise.compare, same=True),
    "ne": partial(pointwise.compare, same=False),
    "sum": reductions.sum,
    "mean": reductions.mean,
    "var": reductions.var,
    "std": reductions.std,
    "norm": reductions.norm,
    "linalg_norm": reductions.linalg_norm,
    "linalg_vector_norm": reductions.linalg_vector_norm,
    "logsumexp": reductions.logsumexp,
    "softmax": reductions.softmax,
    "log_softmax": reductions.log_softmax,
    "einsum": products.einsum,
    "matmul": products.matmul,
    "linear": products.linear,
    "inner": products.inner,
    "outer": products.outer,
    "tensordot": products.tensordot,
    "vecdot": products.vecdot,
    "addmm": products.addmm,
    "addmv": products.addmm,
    "baddbmm": products.addmm,
    "trace": products.trace,
    "diagonal": products.diagonal,
    "permute": shapes.permute,
    "transpose": shapes.transpose,
    "t": shapes.reverse,
    "adjoint": shapes.matrix_transpose,
    "movedim": shapes.movedim,
    "unsqueeze": shapes.unsqueeze,
    "squeeze": shapes.squeeze,
    "getitem": shapes.getitem,
    "reshape": shapes.reshape,
    "reshape_as": shapes.reshape_as,
    "view_as": shapes.reshape_as,
    "flatten": shapes.flatten,
    "ravel": shapes.flatten,
    "unflatten": shapes.unflatten,
    "expand": shapes.expand,
    "broadcast_to": shapes.expand,
    "expand_as": shapes.expand_as,
    "contiguous": shapes.same,
    "clone": shapes.same,
    "to": shapes.same,
    "type": shapes.same,
    "type_as": shapes.same,
    "float": shapes.same,
    "double": shapes.same,
    "half": shapes.same,
    "bfloat16": shapes.same,
    "detach": shapes.detach,
    "ones_like": partial(shapes.full_like, fill_value=1),
    "zeros_like": partial(shapes.full_like, fill_value=0),
    "full_like": shapes.full_like,
    "size": shapes.size,
    "dim": lambda input: input.ndim,
    "numel": shapes.numel,
    "getattr": _getattr,
}

ADVICE = {
    **dict.fromkeys(
        "max min amax amin argmax argmin aminmax median mode kthvalue quantile prod all any "
        "count_nonzero".split(),
        "a mask over the context can enter a sum only: use `sum`, `mean` or `logsumexp`",
    ),
    **dict.fromkeys(
        "cumsum cumprod logcumsumexp sort argsort topk flip roll unique".split(),
        "it depends on the order of the tokens, which a masked context does not have: use `sum`"
        " or `logsumexp`",
    ),
    **dict.fromkeys(
        "stack cat concat concatenate hstack vstack chunk split tensor_split unbind narrow select "
        "index_select gather take".split(),
        "an expression has no joined or cut tensors: add the terms, or declare a parameter for"
        " each part",
    ),
    **dict.fromkeys(
        "where masked_fill tril triu masked_select".split(),
        "the toolkit masks the context by itself: leave the mask out, or use `torch.relu` for a"
        " kink",
    ),
    **dict.fromkeys(
        "dropout rand_like randn_like bernoulli multinomial".split(),
        "an energy is a function of its arguments: leave the random numbers out",
    ),
    **dict.fromkeys(
        "layer_norm rms_norm normalize batch_norm group_norm".split(),
        "give `norm=` to `cem.derive`, or write the mean and the square root out",
    ),
}
"""What to do instead of an operation without a meaning here."""


def call(target: str | Callable, arguments: tuple, options: dict):
    """Apply an operation of torch, a method by its name or a function, to symbolic tensors."""
    if isinstance(target, type) and issubclass(target, words.Activation):
        return elementwise(target, *arguments)
    if target is decay:
        return reductions.decayed(*arguments)
    if target is rope:
        return pointwise.turned(*arguments, **options)
    if target is lookup:
        return pointwise.looked_up(*arguments)
    if arguments and callable(target) and all(isinstance(one, int | float) for one in arguments):
        return target(*arguments, **options)
    spelled = target if isinstance(target, str) else target.__name__
    if not isinstance(target, str) and (target.__module__ or "torch").split(".")[0] not in HOMES:
        raise Untranslatable(
            f"`{spelled}` is not a function of torch: write it with torch operations"
        )
    if getattr(target, "__module__", "") == "math" and lift(arguments[0]).expression.has(Indexed):
        raise Untranslatable(f"`math.{spelled}` makes a number of a tensor: type `torch.{spelled}`")
    name = spelled.strip("_") if spelled.endswith("__") else spelled.removeprefix("special_")
    if name.endswith("_"):
        raise Untranslatable(
            f"`{spelled}` writes into a tensor: type `{name[:-1]}` and keep its result"
        )
    handler = TABLE.get(ALIASES.get(name, name))
    if handler is None:
        advice = ADVICE.get(name, "write it with products, sums and the words of `cem`")
        raise Untranslatable(f"`{spelled}` has no translation; {advice}")
    options = {KEYWORDS.get(option, option): value for option, value in options.items()}
    if options.pop("out", None) is not None:
        raise Untranslatable(
            f"`{spelled}` writes into a tensor: leave `out=` out and keep its result"
        )
    try:
        return handler(*arguments, **options)
    except Untranslatable as error:
        raise Untranslatable(f"`{spelled}`: {error}") from None
    except TypeError as error:
        raise Untranslatable(
            f"`{spelled}` with these arguments has no translation ({error})"
        ) from error


HOMES = ("torch", "_operator", "operator", "builtins", "math")
KEYWORDS = {"axis": "dim", "keepdims": "keepdim"}
