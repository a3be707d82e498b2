"""Thinking as it is taught: attempts with slips, genuine checks, redundant ones, misreadings, wandering and loops.

Slips are part of what is learned, so the model makes slips of its own and has to find them. What it does not learn is
to say the guidance that ends its thinking from outside (`lab.data`): it follows it, and goes on by itself without.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

from lab.problems import Problem, Term, named

THINK, END_THINK = "<think>", "</think>"
GENTLE = "\n\n**Final Answer**\n"
FORCEFUL = "\n\nI have spent enough time on this; I will give the best answer I have.\n"

_CHECKS = (
    "Wait, let me check that.",
    "Let me verify this in another order.",
    "Alternatively, I add them differently.",
    "Hmm, let me do it again.",
    "Just to be sure, once more.",
    "But wait, let me go through it again.",
    "Actually, let me recompute.",
)
_NEW_STARTS = (
    "Hmm, this gets messy. Let me start over.",
    "Alternatively, let me begin elsewhere.",
    "Another approach: take them in turn.",
    "Wait, I lost track. Let me try again.",
)
_RESULTS = ("So the answer is {}.", "Thus the answer is {}.", "Then the answer is {}.")
_STATED = re.compile(r"answer is (-?[0-9]+)\.|(I misread)")
_SURE = ("I am sure now.", "This is settled.", "All of it agrees.")


@dataclass(frozen=True)
class Habits:
    """How often what happens in a trace.

    Attributes:
        slip: probability that a step's result is wrong.
        overthinks: probability of redundant checks, and `redundant` their mean number.
        misreads: probability that a value is misread in the first attempts.
        wanders: probability of a long row of unfinished attempts, and `starts` their mean number.
        loops: probability that the trace ends in a loop.
        steered: probability that guidance ends the thinking at a random place.
        longest: characters up to which an endless loop is written out.
    """

    slip: float = 0.045
    overthinks: float = 0.8
    redundant: float = 5.0
    misreads: float = 0.03
    wanders: float = 0.05
    starts: float = 24.0
    loops: float = 0.05
    steered: float = 0.3
    longest: int = 6_000


@dataclass
class Thinking:
    """A trace in the making: paragraphs, results stated since the last known misreading, whether it never ends."""

    thoughts: list[str] = field(default_factory=list)
    stated: list[int] = field(default_factory=list)
    endless: bool = False

    @property
    def text(self) -> str:
        """The thoughts, as between the tags."""
        return "\n\n".join(self.thoughts)


def stated_in(text: str) -> list[int]:
    """Every result that is stated in some thinking, since the last known misreading."""
    results: list[int] = []
    for match in _STATED.finditer(text):
        if match[1] is None:
            results.clear()
        else:
            results.append(int(match[1]))
    return results


def most_stated(results: list[int]) -> int | None:
    """The most frequent of these results, the latest of equals; None for none."""
    counts = Counter(results)
    return max(reversed(results), key=lambda result: counts[result]) if results else None


def think(rng: Random, problem: Problem, habits: Habits) -> Thinking:
    """Return a complete trace for a problem."""
    thinking = Thinking()
    if rng.random() < habits.wanders:
        starts = 6 + int(rng.expovariate(1 / habits.starts))
        for _ in range(starts):
            _start_over(rng, problem, habits, thinking)
    elif rng.random() < 0.1:
        _start_over(rng, problem, habits, thinking)
    seen = _misread(rng, problem) if rng.random() < habits.misreads else None
    tainted = rng.choice((1, 1, 1, 2, 2, 3, 4)) if seen is not None else 0
    wanted = int(1 + rng.expovariate(1 / habits.redundant)) if rng.random() < habits.overthinks else 0
    loop_at = rng.randint(1, 4) if rng.random() < habits.loops else 0
    agreed = attempts = 0
    while agreed < 1 + wanted or thinking.stated[-1] != most_stated(thinking.stated):
        attempts += 1
        correction = ""
        if seen is not None and attempts > tainted:
            correction = _correction(problem, seen)
            seen, agreed = None, 0
            thinking.stated.clear()
        agreed += _attempt(rng, seen or problem, habits, thinking, correction)
        if attempts == loop_at:
            _loop(rng, habits, thinking)
            break
    return thinking


def _attempt(rng: Random, problem: Problem, habits: Habits, thinking: Thinking, opening: str) -> bool:
    """Add a whole attempt; return whether its result agrees with the one before."""
    previous = thinking.stated[-1] if thinking.stated else None
    first = not thinking.thoughts
    opening = opening or ("" if first else rng.choice(_CHECKS))
    order = list(problem.terms)
    if not first and rng.random() < 0.7:
        rng.shuffle(order)
    steps, result = work_out(rng, problem, order, habits.slip)
    verdict = rng.choice(_RESULTS).format(result)
    if previous is not None:
        verdict += " That agrees." if result == previous else f" But I had {previous}."
    thinking.thoughts.append(" ".join(filter(None, (opening, *steps, verdict))))
    thinking.stated.append(result)
    return previous == result


def work_out(rng: Random, problem: Problem, order: list[Term], slip: float) -> tuple[list[str], int]:
    """Return the sentences that add up the terms in this order, and their result, right or not."""
    steps: list[str] = []
    total: int | None = None
    for term in order:
        name = named(problem, term, first=total is None)
        value = term.value
        if term.factor > 1:
            value = _maybe_slip(rng, term.factor * term.value, slip, 0)
            name += f"{term.factor}*{term.value}={value}, "
        if total is None:
            total = problem.reduce(term.sign * value)
            steps.append(f"{name}{total}.")
            continue
        result = _maybe_slip(rng, problem.reduce(total + term.sign * value), slip, problem.modulus)
        steps.append(f"{name}{total}{'+' if term.sign > 0 else '-'}{value}={result}.")
        total = result
    assert total is not None
    return steps, total


def _maybe_slip(rng: Random, value: int, slip: float, modulus: int) -> int:
    if rng.random() >= slip:
        return value
    wrong = value + rng.choice((1, -1, 10, -10))
    return (value + rng.choice((1, -1))) % modulus if modulus else wrong


def _misread(rng: Random, problem: Problem) -> Problem:
    """The problem with one value misread."""
    index = rng.randrange(len(problem.terms))
    term = problem.terms[index]
    value = int(str(term.value)[::-1])
    wrong = replace(term, value=value if value not in (term.value, 0) else term.value % 9 + 1)
    return replace(problem, terms=(*problem.terms[:index], wrong, *problem.terms[index + 1 :]))


def _correction(problem: Problem, seen: Problem) -> str:
    pairs = zip(problem.terms, seen.terms, strict=True)
    right, wrong = next((right, wrong) for right, wrong in pairs if right != wrong)
    return f"Hold on, I misread: it is {right.value}, not {wrong.value}."


def _start_over(rng: Random, problem: Problem, habits: Habits, thinking: Thinking) -> None:
    """Add an attempt that is given up on the way."""
    order = list(problem.terms)
    rng.shuffle(order)
    steps, _ = work_out(rng, problem, order, habits.slip)
    kept = steps[: rng.randint(1, len(steps) - 1)]
    thinking.thoughts.append(" ".join([rng.choice(_NEW_STARTS), *kept] if thinking.thoughts else kept))


def _loop(rng: Random, habits: Habits, thinking: Thinking) -> None:
    """Replace the end of the trace by a loop that never ends; it is written out up to the longest trace."""
    sentences = thinking.thoughts[-1].split(". ")
    count = rng.randint(1, min(3, len(sentences)))
    start = rng.randint(0, len(sentences) - count)
    block = ". ".join(sentences[start : start + count]).rstrip(".") + ". "
    thinking.thoughts.append("Let me check that again. " + block * (habits.longest // len(block)))
    thinking.endless = True


def ending(rng: Random, answer: int) -> str:
    """How a trace ends by itself, with the answer after it."""
    if rng.random() < 0.5:
        return f"\n\n{rng.choice(_SURE)}\n{END_THINK}{final(answer)}"
    return f"{GENTLE}{answer}\n{END_THINK}{final(answer)}"


def final(answer: int) -> str:
    """The answer part of a response."""
    return f"\n\nThe answer is {answer}."
