"""Answers as values: numbers, fractions, percentages, units, sets, intervals, equations, options (section 5.4).

`same` says True only with a proof and False only with a reason; what it cannot decide is None, for the verifier. A
false True costs accuracy, a None costs a question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from jettison.plugins.trimr import normalise_exact as exact
from jettison.plugins.trimr.normalise_parse import Node, UnreadableError, parse
from jettison.plugins.trimr.normalise_text import clean
from jettison.plugins.trimr.units import Unit, known_unit, split_scale, unit_of

Kind = Literal["option", "number", "set", "list", "bracket", "union", "equation", "truth", "word"]
_MAX_ITEMS = 12

_OPTION = re.compile(
    r"(?:(?:option|choice|answer|选项)\s*)?(?:\(([A-Ja-j])\)[.):]?|([A-J])(?:[.):]|$))\s*(.*)", re.IGNORECASE
)
_TRUTHS = {"yes": "yes", "no": "no", "true": "true", "false": "false", "correct": "true", "incorrect": "false"}
_TRUTHS |= {"是": "yes", "否": "no", "对": "true", "错": "false", "正确": "true", "错误": "false"}
_NUMERALS = tuple(
    re.findall(
        r"\w+",
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty",
    )
)
_APPROXIMATE = re.compile(r"^(?:\\approx|approximately|about|roughly|around|approx\.?|约)\s*", re.IGNORECASE)
_VARIABLE = r"(?:[A-Za-z]|\\?(?:theta|alpha|beta|lambda|mu))(?:_\{?[A-Za-z0-9]{1,3}\}?)?(?:\([A-Za-z]\))?"
_ASSIGNMENT = re.compile(rf"({_VARIABLE})\s*(?:=|\\approx)\s*([^=<>]+)")
_MEMBER = re.compile(rf"({_VARIABLE})\s*\\in\s*(.+)")
_RELATION = re.compile(r"([^<>=!]+?)\s*(<=|>=|<|>)\s*([^<>=!]+?)(?:\s*(<=|>=|<|>)\s*([^<>=!]+))?")
_CURRENCY = re.compile(r"^(\\\$|€|£|¥)\s*(?=[\d.])|(?:(?<=\d)\s*(\\\$|€|£|¥))$")
_CURRENCIES = {"\\$": "dollars", "€": "euros", "£": "pounds sterling", "¥": "yuan"}
_MEASURED = re.compile(r"(.*?[\d)}\]!])\s*\\?([A-Za-z°][A-Za-z /.^{}0-9\\]*)")
_DASHED = re.compile(r"\d[\d.]*(?:\s*-\s*\d[\d.]*)+")
"""A range, a score or a date: 3-1 is not 4-2."""
_AMBIGUOUS_COMMA = re.compile(r"\d,\d{3}(?!\d)")


@dataclass(frozen=True)
class Answer:
    """One stated answer.

    Attributes:
        kind: what sort of value.
        text: its cleaned spelling.
        node: of numbers: the expression; of equations: left minus right.
        unit: of numbers, or None; `percent` is a value out of 100.
        approximate: said to be rounded.
        items, ends: of sets, lists, brackets and unions: the members, and the two bracket signs.
        variable: the name it was given to ("x" in x = 5), or None.
        letter: of options.
    """

    kind: Kind
    text: str
    node: Node | None = None
    unit: Unit | None = None
    percent: bool = False
    approximate: bool = False
    items: tuple[Answer, ...] = ()
    ends: str = ""
    variable: str | None = None
    letter: str = ""


@dataclass(frozen=True)
class Context:
    """What the question says about its answers.

    Attributes:
        options: text of each lettered option.
        unit: the one unit that the question asks for, or None.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    unit: Unit | None = None


@lru_cache(maxsize=4_096)
def parse_answer(text: str) -> Answer | None:
    """Read one answer, None if it is empty, too long or ambiguous."""
    plain = clean(text)
    return _parse(plain, 0) if plain else None


def _parse(text: str, depth: int) -> Answer | None:
    if depth > 4:
        return None
    readers: tuple[Callable[[str, int], Answer | None], ...] = (
        _option, _named, _relation, _collection, _equation, _number, _word,
    )  # fmt: skip
    for reader in readers:
        found = reader(text, depth)
        if found is not None:
            return found
    return None


def _option(text: str, depth: int) -> Answer | None:
    match = _OPTION.fullmatch(text)
    if match is None or depth or (match[2] or "A").islower():
        return None
    return Answer("option", text, letter=(match[1] or match[2]).upper(), items=_some(clean(match[3])))


def _some(text: str) -> tuple[Answer, ...]:
    found = _parse(text, 1) if text else None
    return (found,) if found is not None else ()


def _named(text: str, depth: int) -> Answer | None:
    """`x = 5`, `x in {1, 2}`, `x = 1 or x = 2`."""
    parts = re.split(r"\s+or\s+|\s*或者?\s*", text)
    if 1 < len(parts) <= _MAX_ITEMS:
        items = [_parse(part, depth + 1) for part in parts]
        names = {item.variable for item in items if item is not None}
        if None in items or len(names) > 1 or any(item.kind == "word" for item in items if item):
            return Answer("word", text)
        return Answer("set", text, items=tuple(item for item in items if item), variable=names.pop())
    match = _ASSIGNMENT.fullmatch(text) or _MEMBER.fullmatch(text)
    if match is None:
        return None
    inner = _parse(match[2].strip(), depth + 1)
    if inner is None or inner.variable is not None or inner.kind in ("word", "option"):
        return None
    name = match[1].lstrip("\\")
    if inner.kind == "number" and inner.node and name[:1] in exact.symbols(inner.node):
        return None  # x = 2x - 1: an equation, not a value
    return _replace(inner, variable=re.sub(r"[{}]", "", name), approximate=inner.approximate or "\\approx" in text)


def _replace(answer: Answer, **changes: object) -> Answer:
    return Answer(**{**answer.__dict__, **changes})


def _relation(text: str, depth: int) -> Answer | None:
    """`x > 3` and `1 <= x < 3` are intervals."""
    match = _RELATION.fullmatch(text)
    if match is None:
        return None
    left, sign, right, sign_2, far = (part.strip() if part else "" for part in match.groups())
    if far:
        if sign[0] != sign_2[0]:
            return None
        low, name, high = (left, right, far) if sign[0] == "<" else (far, right, left)
        first, second = (sign, sign_2) if sign[0] == "<" else (sign_2, sign)
    else:
        below = sign[0] == "<"
        if re.fullmatch(_VARIABLE, left):
            name, low, high = left, "" if below else right, right if below else ""
        else:
            name, low, high = right, left if below else "", "" if below else left
        first = second = sign
    if not re.fullmatch(_VARIABLE, name):
        return None
    ends = ("[" if "=" in first and low else "(") + ("]" if "=" in second and high else ")")
    items = [_parse(part, depth + 1) for part in (low or r"-\infty", high or r"\infty")]
    if any(item is None or item.kind != "number" for item in items):
        return None
    return Answer("bracket", text, items=tuple(item for item in items if item), ends=ends, variable=name.lstrip("\\"))


def _collection(text: str, depth: int) -> Answer | None:
    if text in (r"\emptyset", "{}", r"\{\}", r"\{ \}"):
        return Answer("set", text)
    if r"\cup" in text:
        parts = [_parse(part.strip(), depth + 1) for part in text.split(r"\cup")]
        if len(parts) > _MAX_ITEMS or any(part is None or part.kind not in ("bracket", "set") for part in parts):
            return None
        return Answer("union", text, items=tuple(part for part in parts if part))
    signed = re.fullmatch(r"\\pm\s*(.+)", text)
    if signed:
        both = [_parse(sign + f"({signed[1]})", depth + 1) for sign in ("", "-")]
        return Answer("set", text, items=tuple(item for item in both if item)) if None not in both else None
    for kind, left, right in (("set", r"\{", r"\}"), ("set", "{", "}"), ("bracket", "([", ")]")):
        inner = _inside(text, left, right)
        if inner is not None:
            items = _items(inner, depth)
            if items is None or (kind == "bracket" and len(items) < 2):
                return Answer("word", text) if "," in inner else None
            return Answer("set" if kind == "set" else "bracket", text, items=items, ends=text[0] + text[-1])
    if "," in text or re.search(r"\s(?:and|和)\s|;", text):
        items = _items(text, depth)
        if items is not None and len(items) >= 2 and all(item.kind in ("number", "bracket") for item in items):
            return Answer("list", text, items=items)
    return None


def _inside(text: str, left: str, right: str) -> str | None:
    """What stands between two brackets that belong together."""
    if left == "([":
        if text[:1] not in left or text[-1:] not in right or "," not in text:
            return None
        inner = text[1:-1]
    elif text.startswith(left) and text.endswith(right) and len(text) > len(left) + 1:
        inner = text[len(left) : -len(right)]
    else:
        return None
    depth = 0
    for sign in inner:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return None
    return inner if depth == 0 else None


def _items(text: str, depth: int) -> tuple[Answer, ...] | None:
    """The members of a list; None if a comma may be a thousands separator, or a member cannot be read."""
    text = re.sub(r",?\s+and\s+|\s*和\s*|;\s*|、", ", ", text)
    parts, level, start = [], 0, 0
    spaced = ", " in text
    for at, sign in enumerate(text):
        level += (sign in "([{") - (sign in ")]}")
        if sign == "," and level == 0 and (not spaced or text[at + 1 : at + 2] == " "):
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    if len(parts) > _MAX_ITEMS or (not spaced and _AMBIGUOUS_COMMA.search(text)):
        return None
    items = [_parse(part.strip(), depth + 1) if part.strip() else None for part in parts]
    return None if None in items else tuple(item for item in items if item)


def _equation(text: str, depth: int) -> Answer | None:
    sides = text.split("=")
    if len(sides) != 2 or not sides[0].strip() or not sides[1].strip():
        return None
    try:
        left, right = parse(sides[0]), parse(sides[1])
    except UnreadableError:
        return None
    return Answer("equation", text, node=("add", (left, ("mul", (("num", Fraction(-1)), right)))))


def _number(text: str, depth: int) -> Answer | None:
    plain, approximate = _APPROXIMATE.subn("", text)
    infinite = re.fullmatch(r"([+-]?)\s*\(?\s*([+-]?)\s*\\infty\s*\)?", plain)
    if infinite:
        negative = (infinite[1] == "-") != (infinite[2] == "-")
        return Answer("number", text, node=("sym", "-oo" if negative else "oo"))
    percent = re.fullmatch(r"(.+?)\s*(?:\\?%|percent|per cent)", plain)
    attached = re.fullmatch(r".*?[\d)}](\s*)([A-Za-z]+(?:/[a-z]+|\s*\^\s*\{?[23]\}?)?)", plain)
    if attached and (attached[1] or attached[2][1:2].isalpha()) and known_unit(attached[2]):
        return _measured(plain, bool(approximate))
    node = _expression(percent[1] if percent else plain)
    if node is not None:
        return Answer("number", plain, node=node, percent=percent is not None, approximate=bool(approximate))
    currency = _CURRENCY.search(plain)
    if currency:
        sign = currency[1] or currency[2]
        rest = _number(_CURRENCY.sub("", plain), depth)
        if rest is None or rest.unit is not None or rest.percent:
            return None
        return _replace(rest, unit=Unit(_CURRENCIES[sign], Fraction(1)), approximate=bool(approximate))
    return _measured(plain, bool(approximate))


def _expression(text: str) -> Node | None:
    if _DASHED.fullmatch(text):
        return None
    if text.casefold() in _NUMERALS:
        return ("num", Fraction(_NUMERALS.index(text.casefold())))
    try:
        return parse(text)
    except UnreadableError:
        return None


def _measured(text: str, approximate: bool) -> Answer | None:
    match = _MEASURED.fullmatch(text)
    words = text.split(" ", 1)
    if match is None and len(words) == 2 and words[0].casefold() in _NUMERALS:
        match = re.fullmatch(r"(\S+) (.+)", text)
    if match is None:
        return None
    node = _expression(match[1])
    scale, rest = split_scale(match[2])
    unit = unit_of(rest) if rest else None
    if node is None or (rest and unit is None):
        return None
    if scale > 1:
        node = ("mul", (node, ("num", Fraction(scale))))
    return Answer("number", text, node=node, unit=unit, approximate=approximate)


def _word(text: str, depth: int) -> Answer | None:
    plain = re.sub(r"^(?:[Tt]he|[Aa]n?)\s+", "", " ".join(text.split()))
    if plain.lower() in _TRUTHS:
        return Answer("truth", _TRUTHS[plain.lower()])
    return Answer("word", plain) if plain else None
