"""When thinking must end, written down a second time: from the issue's text, over whole thoughts, without any of the
plugin's code. Slow and direct on purpose.

A trace is a list of chunks. A chunk is given to the machine in one feed, one token per character; some chunks begin
with a reflection marker, and some state an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Chunk:
    tokens: int
    answer: int | None
    opens: bool


@dataclass
class Limits:
    M: int
    windowed: bool
    share: float
    thoughts: int
    both: bool
    budget: int | None
    min_thought: int
    min_think: int
    max_think: int | None
    cooldown: int
    asks: bool
    """Answers are known only after the look at which their thought was complete: a verifier is asked."""


def agreed_on(answers: list[int], limits: Limits) -> bool:
    if len(answers) < limits.M + 1:
        return False
    if limits.windowed:
        return sum(answer == answers[-1] for answer in answers[-(limits.M + 2) :]) >= limits.M + 1
    return all(answer == answers[-1] for answer in answers[-(limits.M + 1) :])


@dataclass
class State:
    """What is known of a request after some chunks."""

    limits: Limits
    tokens: int = 0
    thoughts: int = 0
    thought_began: int = 0
    answers: list[int] = field(default_factory=list)
    stated: int | None = None  # in the thought that is going on
    ever_agreed: bool = False
    fresh: bool = True
    gentle_ended: int | None = None
    reopened: int | None = None

    def verdict(self) -> tuple[str, str] | None:
        limits = self.limits
        if limits.max_think is not None and self.tokens >= limits.max_think:
            return "ceiling", "forceful"
        if self.tokens < limits.min_think:
            return None
        if self.reopened is not None and self.reopened <= limits.cooldown:
            return "reopened", "forceful"
        if self.fresh and agreed_on(self.answers, limits):
            return "overthinking", "gentle"
        spent = limits.budget is not None and self.tokens >= limits.share * limits.budget
        many = self.thoughts >= limits.thoughts
        if not self.ever_agreed and ((spent and many) if limits.both else (spent or many)):
            return "underthinking", "forceful"
        return None

    def take(self, chunk: Chunk, *, first: bool) -> list[int]:
        """Add a chunk; return the answer of the thought that it completes."""
        began, self.tokens = self.tokens, self.tokens + chunk.tokens
        complete: list[int] = []
        if chunk.opens and not first:
            if self.gentle_ended is not None and self.reopened is None:
                self.reopened = began - self.gentle_ended
            if began - self.thought_began >= self.limits.min_thought:
                self.thoughts += 1
                self.thought_began = began
                complete = [] if self.stated is None else [self.stated]
                self.stated = None
        self.stated = chunk.answer if chunk.answer is not None else self.stated
        return complete


def expected(chunks: list[Chunk], limits: Limits, gentle_tokens: int) -> list[tuple[str, str, int, int]]:
    """(rule, force, chunk number, tokens) of every decision, in order."""
    state, found = State(limits), []
    for number, chunk in enumerate(chunks):
        complete = state.take(chunk, first=number == 0)
        decision = state.verdict() if limits.asks else None
        for answer in complete:
            state.answers.append(answer)
            state.fresh = True
            state.ever_agreed = state.ever_agreed or agreed_on(state.answers, limits)
        decision = decision or state.verdict()
        if decision is None:
            continue
        rule, force = decision
        if state.gentle_ended is not None:
            force = "forceful"
        found.append((rule, force, number, state.tokens))
        if force == "forceful":
            return found
        state.tokens += gentle_tokens
        state.gentle_ended, state.fresh = state.tokens, False
    return found
