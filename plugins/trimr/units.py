"""Units of measure that answers are given in: name, dimension, factor."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_INCH = Fraction(254, 10_000)


class Unit(NamedTuple):
    """`dimension` is what is measured ("length", "noun apple"); a value times `factor` is in the dimension's base."""

    dimension: str
    factor: Fraction


_ROWS: list[tuple[str, str, Fraction | int]] = [
    ("mm millimeter millimetre", "length", Fraction(1, 1000)),
    ("cm centimeter centimetre", "length", Fraction(1, 100)),
    ("m meter metre", "length", 1),
    ("km kilometer kilometre", "length", 1000),
    ("inch inches", "length", _INCH),
    ("ft foot feet", "length", 12 * _INCH),
    ("yd yard", "length", 36 * _INCH),
    ("mi mile", "length", 63_360 * _INCH),
    ("mg milligram", "mass", Fraction(1, 1_000_000)),
    ("g gram", "mass", Fraction(1, 1000)),
    ("kg kilogram kilo", "mass", 1),
    ("lb lbs pound", "weight", 16),
    ("oz ounce", "weight", 1),
    ("ms millisecond", "time", Fraction(1, 1000)),
    ("s sec second", "time", 1),
    ("min mins minute", "time", 60),
    ("h hr hrs hour", "time", 3600),
    ("day", "time", 86_400),
    ("week", "time", 604_800),
    ("month", "months", 1),
    ("yr yrs year", "months", 12),
    ("dollar usd", "dollars", 1),
    ("cent", "dollars", Fraction(1, 100)),
    ("euro eur", "euros", 1),
    ("yuan rmb cny", "yuan", 1),
    ("deg degree", "angle", 1),
    ("degree celsius|degree c|celsius", "celsius", 1),
    ("degree fahrenheit|degree f|fahrenheit", "fahrenheit", 1),
    ("kelvin", "kelvin", 1),
    ("ml milliliter millilitre", "volume", Fraction(1, 1_000_000)),
    ("l liter litre", "volume", Fraction(1, 1000)),
    ("n newton", "force", 1),
    ("j joule", "energy", 1),
    ("kj kilojoule", "energy", 1000),
    ("w watt", "power", 1),
    ("kw kilowatt", "power", 1000),
    ("v volt", "voltage", 1),
    ("hz hertz", "frequency", 1),
    ("km/h|kph|kmh|kilometers per hour|kilometres per hour", "speed", Fraction(1000, 3600)),
    ("m/s|meters per second|metres per second", "speed", 1),
    ("mph|miles per hour", "speed", 63_360 * _INCH / 3600),
]


def _table() -> dict[str, Unit]:
    table = {}
    for names, dimension, factor in _ROWS:
        for name in [part for group in names.split("|") for part in ([group] if "|" in names else group.split())]:
            table[name] = Unit(dimension, Fraction(factor))
    return table


_UNITS = _table()
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NOT_NOUNS = frozenset(
    re.findall(
        r"\w+",
        "and or to of in by with without than the a an if then when where for from not no plus minus times over under "
        "half halves double triple pair pairs quarter quarters third thirds tenth tenths score gross more less fewer "
        "mod modulo remainder squared cubed percent per each every hundreds thousands millions dozens k b is are was "
        "be as at on",
    )
)
_PHRASE = re.compile(r"[a-z]+(?: [a-z]+){0,2}")


def split_scale(text: str) -> tuple[int, str]:
    """Take leading scale words off a unit: "million apples" is (1000000, "apples")."""
    scale, words = 1, text.split()
    while words and words[0].lower() in _SCALES:
        scale *= _SCALES[words.pop(0).lower()]
    return scale, " ".join(words)


def known_unit(text: str) -> Unit | None:
    """The unit of measure that a text names, or None."""
    name = text.strip().strip(".").replace("\\", "")
    folds = len(name) > 3 or name in ("Kg", "KG", "Km", "KM", "Cm", "CM")  # but Mg is no mg, and MW no mW
    return _lookup(name) or (_lookup(name.lower()) if folds else None)


def unit_of(text: str) -> Unit | None:
    """The unit that a text names, or None. A plain noun is a unit of its own: apples are only like apples."""
    found = known_unit(text)
    if found is not None:
        return found
    plain = text.strip().strip(".").replace("\\", "").lower()
    if _PHRASE.fullmatch(plain) and not _NOT_NOUNS & set(plain.split()) and len(plain) > 2:
        return Unit(f"noun {_singular(plain)}", Fraction(1))
    return None


def _lookup(name: str) -> Unit | None:
    raised = re.fullmatch(r"([A-Za-z]+)\s*(?:\^\s*\{?([23])\}?|(?<=m)([23]))", name)
    if raised:
        return _raised(raised[1], int(raised[2] or raised[3]))
    words = name.split()
    if len(words) == 2 and words[0] in _POWERS:
        return _raised(words[1], _POWERS[words[0]])
    if len(words) == 2 and words[1] in ("squared", "cubed"):
        return _raised(words[0], 2 if words[1] == "squared" else 3)
    if len(name) == 1 and name not in "mgshlNJWV":
        return None  # a capital letter is another unit, or none
    name = name.replace("degrees ", "degree ")
    return _UNITS.get(name) or _UNITS.get(name.lower() if len(name) == 1 else _singular(name))


def _raised(name: str, power: int) -> Unit | None:
    base = _UNITS.get(name) or _UNITS.get(_singular(name))
    if base is None or base.dimension != "length":
        return None
    return Unit("area" if power == 2 else "volume", base.factor**power)


def _singular(name: str) -> str:
    if len(name) > 3 and name.endswith("s") and not name.endswith("ss"):
        return name[:-1]
    return name
