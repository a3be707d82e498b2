"""A small parser of mathematical expressions, plain or LaTeX, into a tree of tuples; nothing is ever evaluated as code.

What could be read in two ways is refused: `1/2x`, `x^23` in LaTeX, a function of an unknown name. Length, depth, number
of nodes and size of numbers are bounded, so that hostile text costs no time.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

Node = tuple[Any, ...]
"""("num", Fraction), ("sym", name), ("add" or "mul", nodes), ("div" or "pow", a, b) or ("fn", name, a)."""

MAX_NODES = 120
MAX_DEPTH = 24
MAX_DIGITS = 60
FUNCTIONS = ("sqrt", "cbrt", "sin", "cos", "tan", "ln", "log", "exp")

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?P<power>[eE][+-]?\d{1,2}(?![\w.]))?"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^_(){}\[\]!]))"
)
_GREEK = {"alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho", "pi", "epsilon"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_VARIABLES = ("x", "y", "z", "n")
_LETTERS = set("abcdhkmnpqrstuvwxyzABC")


class UnreadableError(ValueError):
    """The text is not an expression that can be read in one way only."""


class _Token(NamedTuple):
    kind: str
    text: str
    spaced: bool


def parse(text: str) -> Node:
    """Parse a whole text.

    Raises:
        UnreadableError: it is no expression, is ambiguous, or exceeds a bound.
    """
    parser = _Parser(text)
    node = parser.sum(0)
    if parser.at < len(parser.tokens):
        raise UnreadableError
    return node


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or len(tokens) >= 2 * MAX_NODES:
            raise UnreadableError
        kind = str(match.lastgroup if match.lastgroup != "power" else "number")
        tokens.append(_Token(kind, match[0].strip(), match[0][:1].isspace()))
        at = match.end()
    return tokens


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.latex = "\\" in text or "{" in text
        self.at = 0
        self.nodes = 0

    def node(self, *parts: Any) -> Node:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise UnreadableError
        return parts

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise UnreadableError
        self.at += 1

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise UnreadableError
        terms = [self.term(depth)]
        while self.peek() in ("+", "-"):
            negative = self.peek() == "-"
            self.at += 1
            term = self.term(depth)
            terms.append(self.negated(term) if negative else term)
        return terms[0] if len(terms) == 1 else self.node("add", tuple(terms))

    def negated(self, node: Node) -> Node:
        return self.node("mul", (("num", Fraction(-1)), node))

    def term(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise UnreadableError
        if self.peek() in ("+", "-"):
            sign = self.peek()
            self.at += 1
            inner = self.term(depth + 1)
            return self.negated(inner) if sign == "-" else inner
        left, divided = self.power(depth), False
        while True:
            if self.peek() == "*":
                self.at += 1
                left = self.node("mul", (left, self.signed_power(depth)))
            elif self.peek() == "/":
                if divided:
                    raise UnreadableError  # 1/2/2020: a date
                self.at += 1
                left, divided = self.node("div", left, self.signed_power(depth)), True
            elif self.begins_factor():
                if divided:
                    raise UnreadableError  # 1/2x: two readings
                left = self.node("mul", (left, self.power(depth)))
            else:
                return left

    def signed_power(self, depth: int) -> Node:
        if self.peek() == "-":
            self.at += 1
            return self.negated(self.power(depth + 1))
        return self.power(depth)

    def begins_factor(self) -> bool:
        return self.kind() in ("command", "word", "letter") or self.peek() == "("

    def power(self, depth: int) -> Node:
        base = self.atom(depth + 1)
        if self.peek() == "!":
            self.at += 1
            base = self.factorial(base)
        if self.peek() not in ("^", "**"):
            return base
        plain = self.peek() == "**"
        self.at += 1
        if self.peek() == "{":
            exponent = self.group(depth)
        elif (self.latex or base[0] != "num") and not plain and self.kind() == "number" and len(self.peek()) > 1:
            raise UnreadableError  # x^23 is x^2 times 3 in LaTeX
        else:
            exponent = self.signed_power(depth + 1)
        return self.node("pow", base, exponent)

    def factorial(self, base: Node) -> Node:
        if base[0] != "num" or base[1].denominator != 1 or not 0 <= base[1] <= 40 or self.peek() == "!":
            raise UnreadableError
        value = 1
        for factor in range(2, int(base[1]) + 1):
            value *= factor
        return self.node("num", Fraction(value))

    def group(self, depth: int) -> Node:
        closing = _CLOSING[self.peek()]
        self.at += 1
        inner = self.sum(depth + 1)
        self.expect(closing)
        return inner

    def atom(self, depth: int) -> Node:
        if depth > MAX_DEPTH or self.at >= len(self.tokens):
            raise UnreadableError
        token = self.tokens[self.at]
        if token.kind == "number":
            return self.number()
        if token.text in _CLOSING:
            return self.group(depth)
        if token.kind == "command":
            return self.command(token.text[1:], depth)
        if token.kind == "word":
            return self.word(token.text, depth)
        if token.kind == "letter":
            self.at += 1
            return self.symbol(token.text)
        raise UnreadableError

    def number(self) -> Node:
        value = _value(self.peek())
        self.at += 1
        if self.kind() == "number":  # 1 1/2
            if self.peek(1) == "/" and self.kind(2) == "number" and self.peek(3) in ("", ")", "}"):
                top, bottom = _value(self.peek()), _value(self.peek(2))
                self.at += 3
                return self.mixed(value, top, bottom)
            raise UnreadableError
        if self.peek() == "\\frac" and value.denominator == 1:
            at, node = self.at, self.command_frac(0)
            if node[1][0] == "num" and node[2][0] == "num":
                return self.mixed(value, node[1][1], node[2][1])
            self.at = at
        return self.node("num", value)

    def mixed(self, whole: Fraction, top: Fraction, bottom: Fraction) -> Node:
        if whole.denominator != 1 or not 0 < top < bottom or (top.denominator, bottom.denominator) != (1, 1):
            raise UnreadableError
        return self.node("num", whole + top / bottom)

    def command(self, name: str, depth: int) -> Node:
        if name == "frac":
            return self.command_frac(depth)
        self.at += 1
        if name == "sqrt" and self.peek() == "[":
            self.at += 1
            index = self.sum(depth + 1)
            self.expect("]")
            return self.node("pow", self.argument(depth), self.node("div", ("num", Fraction(1)), index))
        if name in FUNCTIONS:
            return self.function(name, depth)
        if name in _GREEK:
            return self.symbol(name)
        raise UnreadableError

    def command_frac(self, depth: int) -> Node:
        self.at += 1
        digits = self.peek()
        if self.kind() == "number" and digits.isdigit() and len(digits) == 2 and not self.tokens[self.at].spaced:
            self.at += 1
            return self.node("div", ("num", Fraction(int(digits[0]))), ("num", Fraction(int(digits[1]))))
        top = self.argument(depth)
        return self.node("div", top, self.argument(depth))

    def argument(self, depth: int) -> Node:
        if self.peek() == "{":
            return self.group(depth)
        if self.kind() == "number" and (not self.latex or len(self.peek()) == 1):
            return self.number()
        if self.peek() == "(" or self.kind() == "command":
            return self.atom(depth + 1)
        raise UnreadableError

    def function(self, name: str, depth: int) -> Node:
        enclosed = self.peek() in ("(", "{")
        argument = self.argument(depth)
        if not enclosed and (self.begins_factor() or self.peek() == "^") and not (self.latex and name == "sqrt"):
            raise UnreadableError  # ln 2x: two readings
        if name == "sqrt":
            return self.node("pow", argument, ("num", Fraction(1, 2)))
        if name == "cbrt":
            return self.node("pow", argument, ("num", Fraction(1, 3)))
        return self.node("fn", name, argument)

    def word(self, text: str, depth: int) -> Node:
        after_number = self.at > 0 and self.kind(-1) == "number"
        spaced = self.tokens[self.at].spaced and after_number
        self.at += 1
        if text in FUNCTIONS:
            return self.function(text, depth)
        if text in _GREEK:
            return self.symbol(text)
        if after_number and (text[0].isupper() or (spaced and text not in _VARIABLES)):
            raise UnreadableError  # 0 K, 0C: units, not products
        if len(text) > 1 and (len(text) > 3 or spaced or len(self.tokens) == 1 or not set(text) <= _LETTERS):
            raise UnreadableError
        self.at -= 1  # a product: each letter is a factor of its own, with its own exponent
        self.tokens[self.at : self.at + 1] = [_Token("letter", letter, False) for letter in text]
        return self.atom(depth + 1)

    def symbol(self, name: str) -> Node:
        if self.peek() == "_":
            self.at += 1
            braced = self.peek() == "{"
            self.at += braced
            if self.kind() not in ("number", "word") or not (braced or len(self.peek()) == 1):
                raise UnreadableError
            name += "_" + self.peek()
            self.at += 1
            if braced:
                self.expect("}")
        if self.peek() == "(" and name != "pi" and (name in "fghFGHPE" or not self.occurs_inside(name)):
            raise UnreadableError  # f(2): a function, not a product
        return self.node("sym", name)

    def occurs_inside(self, name: str) -> bool:
        depth = 0
        for token in self.tokens[self.at :]:
            depth += (token.text == "(") - (token.text == ")")
            if token.text.lstrip("\\") == name:
                return True
            if depth == 0:
                return False
        return False


def _value(text: str) -> Fraction:
    text = text.replace(",", "")
    if len(text) > MAX_DIGITS or re.match(r"0\d", text):
        raise UnreadableError  # 007 may be a code
    return Fraction(text)
