"""The rules that end thinking, each a small class over the same snapshot (paper, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jettison.plugins.trimr.config import Counting, Mode, Repeat, TrimROptions
from jettison.plugins.trimr.repetition import Loop
from jettison.plugins.trimr.types import Force, RuleName


@dataclass
class Progress:
    """How far one thinking block has come.

    Attributes:
        tokens: thinking tokens so far.
        budget: the most it may have, or None.
        thoughts: number of complete thoughts.
        labels: of every kept answer in order, equal for answers that agree.
        agreed: answers have agreed often enough at any time.
        fresh: an answer was kept since guidance was last given (or none was given).
        loops, coverage, structured: what the loop detector and the segmenter see now.
        reopened: tokens after gentle guidance at which a marker opened a thought again, None without.
    """

    tokens: int = 0
    budget: int | None = None
    thoughts: int = 0
    labels: list[int] = field(default_factory=list)
    agreed: bool = False
    fresh: bool = True
    loops: Sequence[Loop] = ()
    coverage: float = 0.0
    structured: bool = False
    reopened: int | None = None


class Rule(Protocol):
    """A rule: a name, the force it asks for, and a predicate."""

    name: RuleName
    force: Force

    def fires(self, progress: Progress) -> bool:
        """Whether thinking should end."""


@dataclass(frozen=True)
class Overthinking:
    """Algorithm 1: `M` kept answers in a row agree with the one before (or, windowed, M + 1 of the last M + 2)."""

    M: int
    count_mode: Counting
    name: RuleName = "overthinking"
    force: Force = "gentle"

    def fires(self, progress: Progress) -> bool:
        """Whether the newest answers agree, and one was kept since guidance was given."""
        return progress.fresh and self.agrees(progress.labels)

    def agrees(self, labels: Sequence[int]) -> bool:
        """Whether the newest answer is agreed on."""
        if len(labels) <= self.M:
            return False
        last = labels[-(self.M + (2 if self.count_mode == "windowed" else 1)) :]
        return last.count(labels[-1]) > self.M


@dataclass(frozen=True)
class Underthinking:
    """Algorithm 2: the share of the budget and the number of thoughts are spent, and answers never agreed."""

    r_thres: float
    n_thres: int
    mode: Mode
    name: RuleName = "underthinking"
    force: Force = "forceful"

    def fires(self, progress: Progress) -> bool:
        """Whether budget and thoughts are spent, and answers never agreed."""
        if progress.agreed:
            return False
        spent = progress.budget is not None and progress.tokens >= self.r_thres * progress.budget
        many = progress.thoughts >= self.n_thres
        return (spent and many) if self.mode == "and" else (spent or many)


@dataclass(frozen=True)
class Repetition:
    """The text repeats verbatim, back to back or in large parts (section 3.4)."""

    options: Repeat
    name: RuleName = "repetition"
    force: Force = "forceful"

    def fires(self, progress: Progress) -> bool:
        """Whether the text loops now."""
        if not self.options.enabled:
            return False
        if progress.coverage >= self.options.coverage:
            return True
        return any(self.is_loop(loop, progress.structured) for loop in progress.loops)

    def is_loop(self, loop: Loop, structured: bool) -> bool:
        """Whether a run is long enough, and repeats often enough, for the text that it stands in."""
        least = self.options.structure_tokens if structured else self.options.times * self.options.window
        return loop.tokens >= max(self.options.times * loop.period, least)


@dataclass(frozen=True)
class Ceiling:
    """The most thinking tokens that the options allow."""

    max_think_tokens: int | None
    name: RuleName = "ceiling"
    force: Force = "forceful"

    def fires(self, progress: Progress) -> bool:
        """Whether the ceiling is reached."""
        return self.max_think_tokens is not None and progress.tokens >= self.max_think_tokens


@dataclass(frozen=True)
class Reopened:
    """A reflection marker came soon after gentle guidance: the model did not conclude."""

    cooldown_tokens: int
    name: RuleName = "reopened"
    force: Force = "forceful"

    def fires(self, progress: Progress) -> bool:
        """Whether a thought began within the cool-down."""
        return progress.reopened is not None and progress.reopened <= self.cooldown_tokens


def rules_of(options: TrimROptions, *, open_ended: bool) -> tuple[Rule, ...]:
    """The rules of a request in the order in which they are asked; an open-ended one has no overthinking rule."""
    overthinking = () if open_ended else (Overthinking(options.M, options.count_mode),)
    return (
        Ceiling(options.max_think_tokens),
        Repetition(options.repeat),
        Reopened(options.cooldown_tokens),
        *overthinking,
        Underthinking(options.r_thres, options.n_thres, options.under_mode),
    )
