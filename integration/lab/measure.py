"""What a reasoner's responses show: right or wrong, how long, and which of the phenomena occurred."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from lab.levels import Level
from lab.problems import Problem, draw
from lab.traces import END_THINK, stated_in

Interval = tuple[float, float, float]
"""A figure and its 95 % interval."""

ANSWER = re.compile(r"The answer is (-?[0-9]+)\.")
AGREEING = 3
"""So many equal results in a row, and the answer counts as settled."""

PERIODS = range(4, 241)
REPETITIONS = 6
"""A thinking loops if its end has a period of so many characters, so many times."""


@dataclass(frozen=True)
class Outcome:
    """One response.

    Attributes:
        thinking_tokens: token ids up to and with the end of thinking; all of them where it never ended.
        answer: what the answer part says, None where it says nothing.
        correct: whether that is the exact answer.
        truncated: the output's limit came before an answer.
        first: the first result stated in the thinking, None for none.
        first_correct: whether that is the exact answer.
        redundant: share of the thinking's characters that came after three equal results in a row; 0 for none.
        loops: the thinking ends in six or more repetitions.
        wanders: no result was stated in the first half of the output's limit.
    """

    thinking_tokens: int
    answer: int | None
    correct: bool
    truncated: bool
    first: int | None
    first_correct: bool
    redundant: float
    loops: bool
    wanders: bool


def held_out(level: Level, count: int, seed: int = 1) -> list[Problem]:
    """Return `count` different problems that no training trace shows."""
    rng = Random(f"held-out {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw(rng, level.difficulty, held_out=True)
        found.setdefault(problem.question, problem)
    return list(found.values())


def outcome(problem: Problem, text: str, tokens: int, answer_tokens: int, limit: int) -> Outcome:
    """Judge one response.

    Args:
        problem: what was asked.
        text: the whole output, special tokens included.
        tokens: of the output.
        answer_tokens: of the part after the end of thinking, 0 without one.
        limit: most tokens of an output.
    """
    thinking, ended, rest = text.partition(END_THINK)
    match = ANSWER.search(rest) if ended else None
    answer = int(match[1]) if match else None
    results = stated_in(thinking)
    first = results[0] if results else None
    half = thinking[: len(thinking) * limit // (2 * max(1, tokens - answer_tokens))]
    return Outcome(
        thinking_tokens=tokens - answer_tokens,
        answer=answer,
        correct=answer == problem.answer,
        truncated=answer is None and tokens >= limit,
        first=first,
        first_correct=first == problem.answer,
        redundant=_redundant(thinking),
        loops=_loops(thinking),
        wanders=tokens - answer_tokens > limit // 2 and not stated_in(half),
    )


def _redundant(thinking: str) -> float:
    """The share of a text after the end of the first three equal results in a row."""
    matches = list(re.finditer(r"answer is (-?[0-9]+)\.", thinking))
    for index in range(AGREEING - 1, len(matches)):
        window = matches[index - AGREEING + 1 : index + 1]
        if len({match[1] for match in window}) == 1:
            return 1 - window[-1].end() / len(thinking)
    return 0.0


def _loops(thinking: str) -> bool:
    return any(
        len(thinking) >= REPETITIONS * period
        and thinking[-(REPETITIONS - 1) * period :] == thinking[-REPETITIONS * period : -period]
        for period in PERIODS
    )


def phenomena(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return shares and means over many responses.

    `first_accuracy` is over all responses: what stopping at the first stated result would give at best. `overthinking`
    is the share of responses that went on for a tenth of their thinking or more after three equal results in a row.
    """
    rows = {
        "accuracy": [one.correct for one in outcomes],
        "first_accuracy": [one.first_correct for one in outcomes],
        "thinking_tokens": [one.thinking_tokens for one in outcomes],
        "truncated_share": [one.truncated for one in outcomes],
        "overthinking": [one.redundant >= 0.1 for one in outcomes],
        "redundant_share": [one.redundant for one in outcomes],
        "loops": [one.loops for one in outcomes],
        "underthinking": [one.wanders for one in outcomes],
    }
    return {name: float(np.mean(values)) for name, values in rows.items()}


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of `ours - theirs`, both per problem, and its 95 % interval."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(samples)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def saved_share(ours: Sequence[float], theirs: Sequence[float], samples: int = 10_000, seed: int = 0) -> Interval:
    """Return the share of `theirs` that `ours` saves in the mean, with its 95 % interval; both are per problem."""
    mine, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(mine), len(mine)) for _ in range(samples))
    low, high = np.quantile([1 - mine[rows].mean() / other[rows].mean() for rows in draws], (0.025, 0.975))
    return 1 - float(mine.mean() / other.mean()), float(low), float(high)


def wilson(hits: int, count: int) -> Interval:
    """Return a share and its 95 % Wilson interval; zeros for no cases."""
    from scipy.stats import binomtest

    if count == 0:
        return 0.0, 0.0, 0.0
    bounds = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return hits / count, float(bounds.low), float(bounds.high)
