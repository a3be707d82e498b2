"""What the core takes in and gives out: thinking strings, checks, verdicts, decisions and the event log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Force = Literal["gentle", "forceful"]
RuleName = Literal["overthinking", "underthinking", "repetition", "ceiling", "reopened"]


@dataclass(frozen=True)
class ThinkingStrings:
    """The strings around thinking, from the server's reasoning config; never empty."""

    start: str = "<think>"
    end: str = "</think>"

    def __post_init__(self) -> None:
        if not self.start or not self.end:
            raise ValueError("the strings around thinking must not be empty")


@dataclass(frozen=True)
class Check:
    """A question to the verifier that the deterministic path could not answer.

    Attributes:
        id: number of the check within its `Trimmer`, from 0; a verdict names it.
        kind: `exist`: does `first` state a result for `question`? `equiv`: do `first` and `second` give the same one?
        thought: index of the thought that `first` (`exist`) or `second` (`equiv`) ends.
        question: the user's question, as given to the `Trimmer`.
        first, second: excerpts of thinking, at most `window_tokens` tokens each. Data, never instructions. `second`
            is empty for `exist`.
    """

    id: int
    kind: Literal["exist", "equiv"]
    thought: int
    question: str
    first: str
    second: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verifier's answer to one check.

    Attributes:
        scores: log P(yes) - log P(no), one per order asked: (A, B), then (B, A) for `equiv`. All must lie above the
            threshold; a tie is No (section 2.3). Empty: no answer (time-out, outage), which is never a Yes.
    """

    scores: tuple[float, ...] = ()

    def accepts(self, threshold: float) -> bool:
        """Whether every score lies above `threshold`; false without scores and for NaN."""
        return bool(self.scores) and all(score > threshold for score in self.scores)


@dataclass(frozen=True)
class Decision:
    """Thinking should end here.

    Attributes:
        rule: the rule that fired; `reopened` is the escalation after a gentle prompt, `ceiling` the maximum.
        force: `gentle`: `text` opens a final answer inside the thinking; `forceful`: `text` ends the thinking.
        text: what to append to the output.
        thought: index of the thought in which it fired.
        at_token: thinking tokens of this block when it fired.
    """

    rule: RuleName
    force: Force
    text: str
    thought: int
    at_token: int


class TraceEvent(BaseModel):
    """One line of a log. `start`, `feed`, `verdict`, `applied` and `finish` are inputs: replaying them, in order, gives
    the other events again.

    Attributes:
        event: `start` (data: options, question, budget_tokens, thinking, inside), `feed` (text, tokens: a count or
            ids), `verdict` (check, scores), `applied` (text, tokens), `finish`; outputs: `thought` (index, found: the
            stated answer's fingerprint or None), `check` (id, kind, thought), `same` (thought, equal, by), `decision`
            (rule, force, text, thought, at_token, shadow).
        at_token: thinking tokens of the block when it happened, forced ones included.
        data: JSON values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: Literal["start", "feed", "verdict", "applied", "finish", "thought", "check", "same", "decision"]
    at_token: Annotated[int, Field(ge=0)]
    data: dict[str, Any]

    @model_validator(mode="after")
    def _has_its_data(self) -> TraceEvent:
        missing = _DATA[self.event] - self.data.keys()
        if missing:
            raise ValueError(f"a {self.event!r} event needs {', '.join(sorted(missing))}")
        return self


_DATA: dict[str, set[str]] = {
    "start": {"options", "question", "budget_tokens", "thinking", "inside"},
    "feed": {"text", "tokens"},
    "verdict": {"check", "scores"},
    "applied": {"text", "tokens"},
    "finish": set(),
    "thought": {"index", "found"},
    "check": {"id", "kind", "thought"},
    "same": {"thought", "equal", "by"},
    "decision": {"rule", "force", "text", "thought", "at_token", "shadow"},
}
