"""Energies as JSON: exact round trips, and nothing but words in between."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sympy import Float, Integer, Rational, Sum, Symbol, exp, log, pi, sqrt

from cem.calculus.gradient import gradient
from cem.language.canonical import canonical
from cem.language.reductions import logsumexp
from cem.language.serial import MAX_DEPTH, from_json, to_json
from cem.language.symbols import context, dims, frozen, index, parameter, scalar, state
from cem.language.words import WORDS, silu, silu_antiderivative

dim, heads, rank, hidden, block = dims("dim heads rank hidden block")
h, x = state(dim), context(dim)
i, j, a, r, m = (
    size.index(name) for size, name in zip((dim, dim, heads, rank, hidden), "ijarm", strict=True)
)
b, s = block.index("b"), x.index("s")
U, G = parameter("U", hidden, dim), parameter("G", hidden, dim)


def interaction():
    Q, K = parameter("Q", heads, rank, dim), parameter("K", heads, rank, dim)
    beta = scalar("beta", default=rank ** Rational(-1, 2), positive=True)
    score = Sum(Sum(Q[a, r, i] * h[i], i) * Sum(K[a, r, j] * x[s, j], j), r)
    return -Sum(logsumexp(beta * score, s), a) / beta, dim


def block_support():
    wide = heads * block
    h, x = state(wide), context(wide)
    lam = parameter("lam", heads, block)
    score = Sum(lam[a, b] * h[block * a + b] * x[s, block * a + b], b)
    return -Sum(logsumexp(score, s), a), wide


def gated():
    gate = silu(Sum(G[m, i] * frozen(h)[i], i))
    return -Sum(gate * Sum(U[m, i] * h[i], i) ** 2, m) / 2, dim


def memory():
    beta = scalar("beta", default=0.1)
    scores = beta * Sum(U[m, i] * h[i], i)
    return Sum(h[i] ** 2, i) / 2 - log(Sum(exp(scores), m)) / beta, dim


@pytest.mark.parametrize("energy", [interaction, block_support, gated, memory])
def test_round_trip(energy):
    written, width = energy()
    normal = canonical(written)
    for expression in (written, normal, gradient(normal, width)):
        text = to_json(expression, name=energy.__name__)
        back, name = from_json(text)
        assert back == expression and name == energy.__name__
        assert to_json(back, name=name) == text
        assert canonical(back) == canonical(expression)


def test_defaults_and_assumptions_survive():
    tenth = Float("0.1", 40)
    beta = scalar("beta", default=tenth, positive=True)
    gamma = scalar("gamma", default=beta * rank**-0.5)
    back, _ = from_json(to_json(beta * gamma * h[i]))
    found = {symbol.name: symbol for symbol in back.free_symbols if hasattr(symbol, "default")}
    assert found["beta"].is_positive and found["beta"].default == tenth
    assert found["beta"].default._prec == tenth._prec
    assert found["gamma"].is_positive is None and found["gamma"].default == beta * rank**-0.5


@pytest.mark.parametrize("row", WORDS, ids=lambda row: row.name)
def test_every_word_survives(row):
    expression = row.function(h[i])
    assert from_json(to_json(expression))[0] == expression


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_exact(value):
    back, _ = from_json(to_json(Float(value) * h[i] if value else Float(value)))
    assert (back.args[0] if value else back) == Float(value)


@given(st.fractions())
def test_rationals_are_exact(value):
    number = Rational(value.numerator, value.denominator)
    assert from_json(to_json(number))[0] == number


numbers = st.integers(-9, 9).map(Integer) | st.floats(-9, 9).map(Float)
leaves = numbers | st.sampled_from(
    [h[i], h[j], frozen(h)[i], x[s, i], U[m, i], dim, Rational(2, 3), pi, sqrt(2 / pi)]
    + [scalar("beta", default=0.5, positive=True), scalar("mu")]
)


def grow(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda pair: pair[0] + pair[1]),
        two.map(lambda pair: pair[0] * pair[1]),
        inner.filter(lambda e: e.free_symbols).map(lambda e: e**2),
        inner.map(silu),
        inner.map(silu_antiderivative),
        inner.map(lambda e: Sum(e, i)),
        inner.map(lambda e: logsumexp(e, s)),
    )


@given(st.recursive(leaves, grow, max_leaves=12))
def test_fuzzed_expressions_survive(expression):
    assert from_json(to_json(expression))[0] == expression


def document(energy, symbols=None, **changes):
    whole = {"cem": 1, "name": "n", "symbols": {} if symbols is None else symbols, "energy": energy}
    return json.dumps({**whole, **changes})


def word(name, *args):
    return {"word": name, "args": list(args)}


I = word("index", "i", "dim")  # noqa: E741
STATE = {"h": {"kind": "state", "shape": ["dim"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^\$ must be JSON"),
        (7, r"^\$ must be JSON text: got .int"),
        ("[]", r"^\$ must be an object: got a list of 0; allowed: the keys cem, name"),
        (document(0, cem=2), r"^\$\.cem must be a known version: got 2; allowed: 1$"),
        (document(0, cem=True), r"^\$\.cem must be a known version"),
        (document(0, name="a\nb"), r"^\$\.name must be one line"),
        (document(0, symbols=[]), r"^\$\.symbols must be an object"),
        ('{"cem": 1, "cem": 1}', "a key that is written twice"),
        (document(float("nan")), "the number NaN"),
        (document(True), r"^\$\.energy must be an object: got true"),
        (document(0.5), r"^\$\.energy must be an object: got 0\.5"),
        (document({"word": "silu"}), r'got an object with the keys \["word"\]'),
        (
            document(word("eval", "1")),
            r'^\$\.energy\.word must be a word of the language: got "eval"',
        ),
        (document(word("Add", 1, word("os.system", "ls"))), r"^\$\.energy\.args\[1\]\.word must"),
        (document(word("silu", 1, 2)), r"^\$\.energy\.args must fit `silu`: got 2; allowed: 1$"),
        (document(word("Add", 1)), "allowed: 2 or more"),
        (document({"word": "silu", "args": 1}), r"^\$\.energy\.args must be a list: got 1"),
        (document("lambda"), "must be a name"),
        (document("__class__"), "must be a name"),
        (document("a b"), "must be a name"),
        (document("\ud800"), "must be a name"),
        (document(word("scalar", "beta")), r"declared in \$\.symbols: got \"beta\"; allowed: none"),
        (document(word("scalar", ["beta"])), r"declared in \$\.symbols: got a list"),
        (
            document(word("scalar", "h"), STATE),
            'symbol of another kind: got "state"; allowed: scalar',
        ),
        (document(word("entry", "h", I, I), STATE), "index every axis"),
        (document(word("entry", "h", 0), STATE), "must be a slot"),
        (document(word("entry", "h", word("Mul", "dim", I)), STATE), "must be a slot"),
        (document(word("Sum", 1, 2)), r"^\$\.energy\.args\[1\] must be an index: got 2"),
        (document(word("index", "i", -1)), "must be a size"),
        (document(word("index", "i", word("silu", "dim"))), "must be a size"),
        (document(word("rational", 1, 0)), "must be a denominator"),
        (document(word("rational", 1, "2")), "whole numbers"),
        (document(word("float", 8, 0, 2)), "precision"),
        (document(word("float", 1, 2**40, 53)), "must be an exponent"),
        (document(word("Pow", 10, 10**12)), "not be a number to work out"),
        (document(0, STATE), r"^\$\.symbols must be used in \$\.energy: got \"h\""),
        (document(0, {"h": 1}), "must be used"),
        (document(word("entry", "h", I), {"h": 1}), r"^\$\.symbols\.h\.kind must be a kind"),
        (document(word("entry", "h"), {"h": {"kind": "state", "shape": []}}), "fit `entry`"),
        (
            document(word("entry", "h", I), {"h": {"kind": "state", "shape": []}}),
            "one size or more",
        ),
    ],
)
def test_refusals_say_where(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


def test_a_default_does_not_lead_back_to_itself():
    row = {"kind": "scalar", "default": word("scalar", "a"), "positive": False}
    with pytest.raises(ValueError, match=r"^\$\.symbols\.a\.default must not lead back"):
        from_json(document(word("scalar", "a"), {"a": row}))


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1_000, 100_000])
@pytest.mark.parametrize(
    ("left", "right"), [("[", "]"), ('{"a":', "}"), ('{"word": "silu", "args": [', "]}")]
)
def test_hostile_nesting_is_refused(depth, left, right):
    tree = left * depth + "1" + right * depth
    with pytest.raises(ValueError, match=r"^\$"):
        from_json('{"cem": 1, "name": "n", "symbols": {}, "energy": ' + tree + "}")


def test_large_texts_are_refused():
    with pytest.raises(ValueError, match="too many nodes"):
        from_json(document(word("Add", *[1] * 100_001)))
    with pytest.raises(ValueError, match="characters"):
        from_json(" " * 4_000_001)


def test_deep_trees_within_the_limit_survive():
    expression = h[i]
    for _ in range(MAX_DEPTH - 4):
        expression = silu(expression)
    back, _ = from_json(to_json(expression))
    assert back == expression and canonical(back) == expression
    for _ in range(10):
        expression = silu(expression)
    with pytest.raises(ValueError, match="too many levels"):
        to_json(expression)


HOSTILE = [
    "__import__('os').mkdir('{path}')",
    "open('{path}', 'w')",
    "exec(\"open('{path}', 'w')\")",
    "Symbol('x', **{{'a': open('{path}', 'w')}})",
    "h[i for i in [open('{path}', 'w')]]",
]


@pytest.mark.parametrize("payload", HOSTILE)
def test_nothing_is_evaluated(payload, tmp_path):
    target = tmp_path / "made"
    payload = payload.format(path=target)
    row = {"kind": "scalar", "default": payload, "positive": True}
    entry = word("entry", "h", I)
    places = [
        document(payload),
        document(word(payload)),
        document(word("silu", payload)),
        document(word("index", payload, "dim")),
        document(word("index", "i", payload)),
        document(word("scalar", payload), {payload: {**row, "default": None}}),
        document(word("scalar", "beta"), {"beta": row}),
        document(word("rational", payload, 1)),
        document(entry, {"h": {"kind": payload, "shape": ["dim"]}}),
        document(entry, {"h": {"kind": "state", "shape": [payload]}}),
        document(0, cem=payload),
        payload,
    ]
    for text in places:
        with pytest.raises(ValueError):
            from_json(text)
    with pytest.raises(TypeError, match="of type str; type it without quotes"):
        to_json(payload)
    assert from_json(document(0, name=payload)) == (0, payload)
    assert not target.exists()


@given(st.text())
def test_no_text_gets_past_the_words(text):
    for broken in (text, document(word(text, 1)), document(word("Add", 1, word(text)))):
        try:
            from_json(broken)
        except ValueError as error:
            assert "\n" not in str(error)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["i", "dim", "h", "mu"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["word", "args", "kind", "shape"]), inner, max_size=2)
        | st.builds(
            lambda name, args: word(name, *args),
            st.sampled_from(
                ["Sum", "Mul", "Pow", "index", "entry", "Ravel", "Softmax", "silu", "float"]
            ),
            st.lists(inner, max_size=3),
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_tree_is_read_or_refused(tree):
    try:
        expression, _ = from_json(document(tree, STATE))
    except ValueError:
        return
    assert from_json(to_json(expression))[0] == expression


def test_writing_refuses_what_is_not_of_the_language():
    with pytest.raises(
        ValueError, match=r"^\$\.energy\.args\[\d\] must be of the language: got \"Symbol y"
    ):
        to_json(silu(h[i]) * Symbol("y"))
    with pytest.raises(ValueError, match="must have a name of its own"):
        to_json(h[i] + state(hidden)[m])
    with pytest.raises(ValueError, match="must be a name: got .a b"):
        to_json(parameter("a b", dim)[i])
    with pytest.raises(ValueError, match="cannot be written"):
        to_json(h[i] * Sum(h[i], (i, 2, dim - 1)))


def test_the_text_is_the_same_for_equal_expressions():
    one = Sum(U[m, i] * h[i], i) + Sum(G[m, j] * h[j], j)
    other = Sum(G[m, j] * h[j], j) + Sum(h[i] * U[m, i], i)
    assert one == other and to_json(one) == to_json(other)
    assert list(json.loads(to_json(one))["symbols"]) == ["G", "U", "h"]


def test_free_indices_survive():
    assert from_json(to_json(index("d", heads * block)))[0] == index("d", heads * block)
