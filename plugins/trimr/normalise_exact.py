"""Exact equality of parsed expressions: rationals by `Fraction`, the rest by sympy, within bounds known before.

Both sides become a fraction of two sums without division; they are equal if the expanded cross product is zero, which
is a proof. They differ if the numbers do, by a margin far above the error of evaluation. Everything else is unknown.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

from jettison.hooks.errors import EnvironmentRefused
from jettison.plugins.trimr.normalise_parse import Node

_MAX_BITS = 2_048
_MAX_TERMS = 300
_MAX_POWER = 24
_MAX_RADICAND = 10**12
_DIGITS = 60
_MARGIN = 1e-25
_UNSURE = {"i", "j", "e"}  # may be the unit or Euler's number
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


class TooHardError(ValueError):
    """The expression exceeds a bound, or divides by zero."""


def rational(node: Node) -> Fraction | None:
    """The exact value, or None where there is a symbol, a root or a function.

    Raises:
        TooHardError: a number grows beyond 2,048 bits, or is divided by zero.
    """
    kind = node[0]
    if kind == "num":
        return _bounded(node[1])
    if kind in ("add", "mul"):
        total = Fraction(kind == "mul")
        for part in node[1]:
            value = rational(part)
            if value is None:
                return None
            total = _bounded(total + value if kind == "add" else total * value)
        return total
    if kind == "div":
        top, bottom = rational(node[1]), rational(node[2])
        if bottom == 0:
            raise TooHardError
        return None if top is None or bottom is None else _bounded(top / bottom)
    if kind == "pow":
        base, exponent = rational(node[1]), rational(node[2])
        return None if base is None or exponent is None else _power(base, exponent)
    return None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        if exponent == Fraction(1, 2) and base >= 0:
            top, bottom = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if top * top == base.numerator and bottom * bottom == base.denominator:
                return Fraction(top, bottom)
        return None
    if base == 0 and exponent <= 0:
        raise TooHardError
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > _MAX_BITS:
        raise TooHardError
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise TooHardError
    return value


def symbols(node: Node) -> frozenset[str]:
    """Names of the symbols in an expression, without pi."""
    if node[0] == "sym":
        return frozenset() if node[1] == "pi" else frozenset((node[1],))
    parts = node[1] if node[0] in ("add", "mul") else node[1:]
    return frozenset().union(*(symbols(part) for part in parts if isinstance(part, tuple)))


def warm_up() -> None:
    """Import sympy now, so that no request waits for it.

    Raises:
        EnvironmentRefused: it is not installed.
    """
    try:
        import sympy  # noqa: F401
    except ImportError as error:
        raise EnvironmentRefused(
            "trimr compares answers by sympy, which is not installed", do="pip install 'jettison[think]'"
        ) from error


@lru_cache(maxsize=4_096)
def equal(first: Node, second: Node) -> bool | None:
    """Whether two expressions are equal for all values of their symbols: True and False are proven, None is unknown."""
    try:
        one, two = rational(first), rational(second)
        if one is not None and two is not None:
            return one == two
        return _symbolic(first, second)
    except (TooHardError, ArithmeticError, RecursionError, ImportError):
        return None


def _symbolic(first: Node, second: Node) -> bool | None:
    import sympy

    (top, bottom), (other_top, other_bottom) = _fraction(first), _fraction(second)
    if _terms(top) * _terms(other_bottom) + _terms(other_top) * _terms(bottom) > _MAX_TERMS:
        raise TooHardError
    below = sympy.expand(bottom * other_bottom)
    difference = sympy.expand(top * other_bottom - other_top * bottom)
    if difference == 0:
        return True if _differs_from_zero(below) else None
    names = symbols(first) | symbols(second)
    if names & _UNSURE:
        return None
    return False if _differs_from_zero(difference) else None


def _differs_from_zero(expression: Any) -> bool:
    import sympy

    free = sorted(expression.free_symbols, key=str)
    if len(free) > len(_PRIMES):
        return False
    point = {symbol: sympy.Rational(prime, 7) for symbol, prime in zip(free, _PRIMES, strict=False)}
    value = sympy.N(expression.xreplace(point), _DIGITS, maxn=2 * _DIGITS)
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
        return False
    return bool(abs(complex(value)) > _MARGIN)


def _terms(expression: Any) -> int:
    """At most how many terms the expanded expression has."""
    import sympy

    if isinstance(expression, sympy.Add):
        total = sum(_terms(part) for part in expression.args)
    elif isinstance(expression, sympy.Mul):
        total = math.prod(_terms(part) for part in expression.args)
    elif isinstance(expression, sympy.Pow) and expression.exp.is_Integer:
        count, power = _terms(expression.base), abs(int(expression.exp))
        total = math.comb(count + power - 1, power)
    else:
        total = 1
    if total > _MAX_TERMS:
        raise TooHardError
    return total


def _fraction(node: Node) -> tuple[Any, Any]:
    """Numerator and denominator in sympy, both without division."""
    import sympy

    kind = node[0]
    if kind == "num":
        value = _bounded(node[1])
        return sympy.Integer(value.numerator), sympy.Integer(value.denominator)
    if kind == "sym":
        return (sympy.pi if node[1] == "pi" else sympy.Symbol(node[1])), sympy.Integer(1)
    if kind == "fn":
        return _function(node[1], node[2]), sympy.Integer(1)
    if kind == "pow":
        return _power_fraction(node[1], node[2])
    if kind == "div":
        (top, bottom), (over, under) = _fraction(node[1]), _fraction(node[2])
        return _checked(top * under), _checked(bottom * over)
    total = (sympy.Integer(kind == "mul"), sympy.Integer(1))
    for part in node[1]:
        top, bottom = _fraction(part)
        joined = total[0] * top if kind == "mul" else total[0] * bottom + top * total[1]
        total = _checked(joined), _checked(total[1] * bottom)
    return total


def _checked(expression: Any) -> Any:
    _terms(expression)
    return expression


def _power_fraction(base: Node, exponent: Node) -> tuple[Any, Any]:
    import sympy

    power = rational(exponent)
    if power is None:
        constant = rational(base)
        if constant is None or constant <= 0 or max(constant.numerator, constant.denominator) > _MAX_RADICAND:
            raise TooHardError
        over, under = _fraction(exponent)
        if under.free_symbols or _terms(over) > 4:
            raise TooHardError
        return sympy.Pow(sympy.Rational(constant.numerator, constant.denominator), over / under), sympy.Integer(1)
    if power.denominator == 1:
        top, bottom = _fraction(base)
        if abs(power) > _MAX_POWER:
            raise TooHardError
        if power < 0:
            top, bottom = bottom, top
        return _checked(top ** abs(int(power))), _checked(bottom ** abs(int(power)))
    return _root(base, power), sympy.Integer(1)


def _root(base: Node, power: Fraction) -> Any:
    import sympy

    if power.denominator > 12 or abs(power.numerator) > 12:
        raise TooHardError
    constant = rational(base)
    if constant is not None:
        if (
            constant < 0
            or (constant == 0 and power < 0)
            or max(constant.numerator, constant.denominator) > _MAX_RADICAND
        ):
            raise TooHardError
        inner: Any = sympy.Rational(constant.numerator, constant.denominator)
    else:
        top, bottom = _fraction(base)
        inner = sympy.expand(top) / sympy.expand(bottom)
    return sympy.Pow(inner, sympy.Rational(power.numerator, power.denominator))


def _function(name: str, argument: Node) -> Any:
    import sympy

    top, bottom = _fraction(argument)
    inner = top / bottom
    value = rational(argument)
    if value is not None and max(abs(value.numerator), value.denominator) > 10**6:
        raise TooHardError
    if name == "log":  # base 10 or e: equal only to itself
        return sympy.Function("log_of_unknown_base")(sympy.expand(inner))
    known = {"sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "ln": sympy.log, "exp": sympy.exp}
    return known[name](inner)
