"""Whether two stated answers are the same value."""

from __future__ import annotations

import re
from fractions import Fraction

from jettison.plugins.trimr import normalise_exact as exact
from jettison.plugins.trimr.normalise import Answer, Context, parse_answer
from jettison.plugins.trimr.normalise_parse import Node
from jettison.plugins.trimr.units import Unit, known_unit, unit_of

_CHOICE = re.compile(r"(?:^|[\s(])\(?([A-J])[).:]\s*(.+?)(?=\s*(?:[\s(]\(?[A-J][).:]\s|$|\n))", re.DOTALL)
_ASKED = re.compile(r"how (?:many|much) ([a-z]+)|\b(?:in|number of) ([a-z]+(?: per [a-z]+)?)", re.IGNORECASE)
_GENOTYPE = re.compile(r"(?:([a-z])\1)+")
_NO_CONTEXT = Context()


def context_of(question: str) -> Context:
    """Read the lettered options and the unit asked for out of a question; neither where it is not plain."""
    question = question[-8_000:]
    options: dict[str, str] = {}
    for letter, text in _CHOICE.findall(question):
        if letter != chr(ord("A") + len(options)):
            continue
        options[letter] = text.strip()
    units = {unit_of(one.lower()) if one else known_unit(two.lower()) for one, two in _ASKED.findall(question)} - {None}
    return Context(options if len(options) > 1 else {}, units.pop() if len(units) == 1 else None)


def same(first: Answer, second: Answer, context: Context = _NO_CONTEXT) -> bool | None:
    """Compare two answers to one question: True is proven, False has a reason, None is unknown."""
    if "option" in (first.kind, second.kind):
        return _same_option(first, second, context)
    if first.variable and second.variable and first.variable != second.variable:
        return None
    if first.kind == second.kind == "number":
        return _same_number(first, second, context)
    if first.kind == second.kind == "equation":
        return _same_equation(first, second)
    if first.kind == second.kind == "bracket":
        return _all(first.ends == second.ends, _in_order(first, second, context))
    if first.kind == second.kind and first.kind in ("set", "union"):
        return _same_members(first, second, context)
    if first.kind == second.kind == "list":
        ordered = _in_order(first, second, context)
        return ordered if ordered or _same_members(first, second, context) is False else None
    if first.kind == second.kind == "truth":
        return _same_truth(first.text, second.text)
    if first.kind == second.kind == "word":
        return True if _same_words(first.text, second.text) else None
    return None


def _same_words(first: str, second: str) -> bool:
    """Equal, but for a capital at the start of a plain word: "Aa" and "aa" are genotypes, "MW" and "mW" units."""
    if first == second:
        return True
    folded = first[:1].lower() + first[1:]
    plain = len(folded) > 3 and folded.isalpha() and folded.islower() and not _GENOTYPE.fullmatch(folded)
    return plain and folded == second[:1].lower() + second[1:]


def _same_truth(first: str, second: str) -> bool | None:
    if first == second:
        return True
    return False if {first, second} in ({"yes", "no"}, {"true", "false"}) else None


def _all(*found: bool | None) -> bool | None:
    """All of them: False if any is, else None if any is unknown."""
    if False in found:
        return False
    return None if None in found else True


def _same_option(first: Answer, second: Answer, context: Context) -> bool | None:
    if first.kind == second.kind == "option":
        return first.letter == second.letter
    option, value = (first, second) if first.kind == "option" else (second, first)
    texts = {letter: parse_answer(text) for letter, text in context.options.items()}
    chosen = texts.get(option.letter)
    if chosen is None or chosen.kind == "option":
        return None
    found = same(chosen, value)
    if found:  # the value must name this option and no other
        others = [
            same(other, value) for letter, other in texts.items() if letter != option.letter and other is not None
        ]
        return True if all(other is False or (other is None and value.kind == "word") for other in others) else None
    if any(other is not None and same(other, value) for letter, other in texts.items() if letter != option.letter):
        return False
    return None


def _same_number(first: Answer, second: Answer, context: Context) -> bool | None:
    assert first.node is not None
    assert second.node is not None
    if ("sym", "oo") in (first.node, second.node) or ("sym", "-oo") in (first.node, second.node):
        return first.node == second.node
    unit, other = first.unit, second.unit
    if unit != other and (unit is None or other is None):
        unit = unit or context.unit
        other = other or context.unit
    if unit is None or other is None:
        alike = unit is other
        scaled = _times(first.node, Fraction(1)), _times(second.node, Fraction(1))
    else:
        alike = unit.dimension == other.dimension
        scaled = _times(first.node, unit.factor), _times(second.node, other.factor)
    if first.percent or second.percent:
        if unit is not None or other is not None:
            return None
        return _same_percent(first, second)
    if not alike:
        return None if unit is None or other is None or unit.dimension.startswith("noun") else _measure(unit, other)
    found = exact.equal(*scaled)
    if found is False and unit == other and _rounded(first, second):
        return None
    return None if found and first.approximate != second.approximate else found


def _measure(unit: Unit, other: Unit) -> bool | None:
    return None if other.dimension.startswith("noun") else False


def _times(node: Node, factor: Fraction) -> Node:
    return node if factor == 1 else ("mul", (("num", factor), node))


def _same_percent(first: Answer, second: Answer) -> bool | None:
    assert first.node is not None
    assert second.node is not None
    if first.percent and second.percent:
        return exact.equal(first.node, second.node)
    share, plain = (first, second) if first.percent else (second, first)
    assert share.node is not None
    assert plain.node is not None
    if exact.equal(_times(share.node, Fraction(1, 100)), plain.node):
        return True
    return None


def _rounded(first: Answer, second: Answer) -> bool:
    """Whether one may be the other, rounded to the places that it shows."""
    for one, two in ((first, second), (second, first)):
        assert one.node is not None
        assert two.node is not None
        shown = re.fullmatch(r"-?\d*\.(\d+)", one.text.strip())
        if one.approximate:
            return True
        try:
            value, other = exact.rational(one.node), exact.rational(two.node)
        except exact.TooHardError:
            return True
        if shown and (other is None or value is None or _shows(value, other, 10 ** len(shown[1]))):
            return True
    return False


def _shows(value: Fraction, other: Fraction, unit: int) -> bool:
    """Whether `value` is `other`, rounded or cut to parts of `unit`."""
    cut = abs(other) * unit // 1
    return 2 * unit * abs(value - other) <= 1 or abs(value) * unit == cut


def _same_equation(first: Answer, second: Answer) -> bool | None:
    """The same up to a constant factor, which must be one of a few that differ only in sign or arrangement."""
    assert first.node is not None
    assert second.node is not None
    for factor in (Fraction(1), Fraction(-1)):
        if exact.equal(first.node, _times(second.node, factor)):
            return True
    return None


def _in_order(first: Answer, second: Answer, context: Context) -> bool | None:
    if len(first.items) != len(second.items):
        return False
    return _all(*(same(one, two, context) for one, two in zip(first.items, second.items, strict=True)))


def _same_members(first: Answer, second: Answer, context: Context) -> bool | None:
    """Two sets without an order: every member has exactly one partner, and every pair is decided."""
    table = [[same(one, two, context) for two in second.items] for one in first.items]
    columns = list(zip(*table, strict=True)) if table else []
    lonely = any(all(found is False for found in line) for line in (*table, *columns))
    if lonely or (not first.items) != (not second.items):
        return False
    decided = all(list(line).count(True) == 1 and None not in line for line in (*table, *columns))
    return True if decided and len(first.items) == len(second.items) else None
