import itertools
import random
import string
import time

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.plugins.trimr.normalise import parse_answer
from jettison.plugins.trimr.normalise_same import same


def verdict(first, second):
    one, two = parse_answer(first), parse_answer(second)
    return None if one is None or two is None else same(one, two)


@st.composite
def expressions(draw, depth=3):
    """Text of an expression in x and y, and the same built by sympy."""
    if depth == 0 or draw(st.booleans()):
        leaf = draw(st.sampled_from(["number", "x", "y", "root", "pi"]))
        if leaf == "number":
            number = draw(st.integers(0, 12))
            return str(number), sympy.Integer(number)
        if leaf == "root":
            number = draw(st.integers(2, 12))
            return rf"\sqrt{{{number}}}", sympy.sqrt(number)
        return (r"\pi ", sympy.pi) if leaf == "pi" else (leaf, sympy.Symbol(leaf))
    one, first = draw(expressions(depth=depth - 1))
    kind = draw(st.sampled_from("+-*/^"))
    if kind == "^":
        power = draw(st.integers(0, 3))
        return f"({one})^{power}", first**power
    two, second = draw(expressions(depth=depth - 1))
    if kind == "+":
        return f"({one}+{two})", first + second
    if kind == "-":
        return f"({one}-({two}))", first - second
    if kind == "*":
        return f"({one})*({two})", first * second
    return rf"\frac{{{one}}}{{{two}}}", first / second


@settings(max_examples=250, deadline=None, derandomize=True)
@given(expressions(), expressions())
def test_t4_expressions_agree_with_sympy(first, second):
    found = verdict(first[0], second[0])
    point = {sympy.Symbol("x"): sympy.Rational(31, 11), sympy.Symbol("y"): sympy.Rational(-17, 13)}
    values = [sympy.N(value.subs(point), 50) for value in (first[1], second[1])]
    if found is True:
        assert all(value.is_finite for value in values), f"{first[0]} and {second[0]}"
        assert abs(values[0] - values[1]) < 1e-40, f"{first[0]} and {second[0]}"
    if found is False:
        assert sympy.simplify(first[1] - second[1]) != 0, f"{first[0]} and {second[0]}"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(expressions(depth=2))
def test_t4_an_expression_equals_its_expansion(pair):
    text, value = pair
    if value.has(sympy.zoo, sympy.nan):
        assert verdict(text, text) is not False
        return
    spelled = sympy.latex(sympy.expand(value), mul_symbol="times")
    assert verdict(text, spelled) is not False, f"{text} and {spelled}"


HOSTILE = [
    "__import__('os').system('true')",
    "().__class__.__bases__",
    "9" * 390,
    "9^9^9^9^9",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(" * 190 + "1" + ")" * 190,
    "{" * 390,
    "\\frac" * 70,
    "\\sqrt{" * 60 + "2" + "}" * 60,
    "-" * 390 + "1",
    "(a+b+c+d+x+y)^{24}*(a+b+c+d+x+z)^{24}",
    "+".join("abcdxyz" * 20),
    "99999999999999999999^{1/2}+" * 9 + "1",
    "1000000007*998244353^(1/3)",
    "sin(" * 60 + "1" + ")" * 60,
    "sin(10^{30})",
    "exp(exp(exp(exp(9))))",
    "40!^40!",
    "(x+1)^{24}" * 10,
    "{" + ",".join(["x"] * 150) + "}",
    "1 or " * 70 + "1",
    "\\text{" * 60,
    "$" * 390,
    "0.(3)",
    "\x00\ud800",
    "٣",
    "x" * 399,
    "1" + " apples" * 50,
    "\\pm " * 90 + "1",
    "x=" * 150 + "1",
    "(1,(2,(3,(4,(5,(6,(7,8)))))))",
    "\\left" * 70,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_t4_hostile_answers_cost_no_time(text):
    start = time.process_time()
    for other in ("1", text, "x", "sin(1)", "{1,2}", text[::-1]):
        assert verdict(text, other) in (True, False, None)
    assert time.process_time() - start < 1.0, f"{text[:60]!r} took {time.process_time() - start:.2f} s"


def test_t4_random_text_never_raises():
    rng = random.Random(0)
    alphabet = string.printable + "\\\\{}{}^_()[]$$,,=<>±√½π∞等于 "
    words = ["\\frac", "\\sqrt", "\\boxed{", "\\text{", "\\cup", " or ", "sin", "cm", "%", "\\pm", "\\infty", "\\le"]
    texts = []
    for _ in range(3_000):
        parts = [rng.choice(words) if rng.random() < 0.2 else rng.choice(alphabet) for _ in range(rng.randint(0, 30))]
        texts.append("".join(parts))
    start = time.process_time()
    for one, two in itertools.pairwise(texts):
        assert verdict(one, two) in (True, False, None)
    assert time.process_time() - start < 20
