"""Multi-step problems with exact answers: chains of signed terms, plain, with factors, as a story, or modulo a number.

They are of the families `chain_sum`, `products` and `gsm_symbolic` of reasoning-gym, cut to what a model of a few
million parameters can work out. Every problem belongs to the training part or to the held-out part, by its text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

FAMILIES = ("sum", "factors", "story", "modular")
LABELS = "abcdefghij"
HELD_OUT_SHARE = 16
"""One problem in so many is held out."""

_GAINS = ("gets", "finds", "buys")
_LOSSES = ("loses", "sells", "gives away")
_PEOPLE = (("Ann", "She"), ("Bob", "He"), ("Eve", "She"), ("Tom", "He"))
_THINGS = ("apples", "coins", "books", "cards")


@dataclass(frozen=True)
class Term:
    """`sign * factor * value`, where the question calls the value `label`."""

    label: str
    value: int
    sign: int = 1
    factor: int = 1


@dataclass(frozen=True)
class Problem:
    """A question, the terms to add up, and the modulus of all results, or 0 for none."""

    family: str
    question: str
    terms: tuple[Term, ...]
    modulus: int = 0

    @property
    def answer(self) -> int:
        """The exact result."""
        return self.reduce(sum(term.sign * term.factor * term.value for term in self.terms))

    def reduce(self, value: int) -> int:
        """`value` in the ring of this problem."""
        return value % self.modulus if self.modulus else value

    @property
    def is_held_out(self) -> bool:
        """Whether no training trace may show this question."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Difficulty:
    """What problems are drawn from.

    Attributes:
        families: of equal share.
        terms: fewest and most terms.
        largest: of the values; factors go to 9.
        modulus: of the family "modular".
    """

    families: tuple[str, ...] = FAMILIES
    terms: tuple[int, int] = (3, 9)
    largest: int = 99
    modulus: int = 10


def draw(rng: Random, difficulty: Difficulty, *, held_out: bool) -> Problem:
    """Return a random problem of the training or the held-out part."""
    while True:
        problem = _draw(rng, difficulty)
        if problem.is_held_out == held_out:
            return problem


def _draw(rng: Random, difficulty: Difficulty) -> Problem:
    family = rng.choice(difficulty.families)
    fewest, most = difficulty.terms
    count = rng.randint(fewest, max(fewest, most // 2 if family == "factors" else most))
    if family == "story":
        return _story(rng, count, difficulty.largest)
    if family == "modular":
        return _modular(rng, count, difficulty.modulus)
    terms = tuple(
        Term(
            LABELS[index],
            rng.randint(1, difficulty.largest),
            sign=1 if index == 0 else rng.choice((1, -1)),
            factor=rng.randint(2, 9) if family == "factors" else 1,
        )
        for index in range(count)
    )
    known = ", ".join(f"{term.label}={term.value}" for term in terms)
    wanted = "".join(signed(term, first=index == 0) for index, term in enumerate(terms))
    return Problem(family, f"Let {known}. Find {wanted}.", terms)


def _modular(rng: Random, count: int, modulus: int) -> Problem:
    terms = tuple(Term(LABELS[index], rng.randrange(modulus)) for index in range(count))
    known = ", ".join(f"{term.label}{term.value}" for term in terms)
    return Problem("modular", f"Add up {known} modulo {modulus}.", terms, modulus)


def named(problem: Problem, term: Term, *, first: bool) -> str:
    """How a step names its term: `-3b: `, `+b: `, `b: ` at the start, `b7: ` modulo a number, nothing in a story."""
    if not term.label:
        return ""
    return f"{term.label}{term.value}: " if problem.modulus else f"{signed(term, first=first)}: "


def signed(term: Term, *, first: bool) -> str:
    """`-3b`, `+b`, or `b` at the start."""
    sign = "-" if term.sign < 0 else "" if first else "+"
    return f"{sign}{term.factor if term.factor > 1 else ''}{term.label}"


def _story(rng: Random, count: int, largest: int) -> Problem:
    name, pronoun = rng.choice(_PEOPLE)
    thing = rng.choice(_THINGS)
    total = rng.randint(largest // 2, largest)
    terms = [Term("", total)]
    sentences = [f"{name} has {total} {thing}."]
    for _ in range(count - 1):
        gains = total < largest // 3 or rng.random() < 0.5
        value = rng.randint(1, largest if gains else min(total, largest))
        total += value if gains else -value
        terms.append(Term("", value, 1 if gains else -1))
        sentences.append(f"{pronoun} {rng.choice(_GAINS if gains else _LOSSES)} {value}.")
    return Problem("story", " ".join([*sentences, f"How many {thing} are left?"]), tuple(terms))
