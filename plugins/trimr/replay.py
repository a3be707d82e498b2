"""What other thresholds would have done to logged requests: where each would have been cut, and what that costs.

A trace of a whole, uncut request (shadow mode, or one on which nothing fired) is run again through the same core. The
answer at the cut is the last one stated before it; the cut is a *false stop* if the whole request ended in another
answer (paper: never reported; its reviewers ask for it). An answer that cannot be compared counts as another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jettison.hooks.errors import InputRefused
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.machine import replay as replay_events
from jettison.plugins.trimr.normalise import Answer, parse_answer
from jettison.plugins.trimr.normalise_same import context_of, same
from jettison.plugins.trimr.shadow import Trace
from jettison.plugins.trimr.types import TraceEvent
from jettison.plugins.trimr.window import find_statement

_INPUTS = ("start", "feed", "verdict", "finish")


@dataclass(frozen=True)
class Whole:
    """An uncut request.

    Attributes:
        trace: its log.
        thinking, answer: text before and after the end of thinking.
        thinking_tokens: of the first thinking block.
        ends: (tokens so far, characters so far) after each feed.
        truncated: thinking never ended.
    """

    trace: Trace
    question: str
    options: TrimROptions
    thinking: str
    answer: str
    thinking_tokens: int
    ends: tuple[tuple[int, int], ...]
    truncated: bool

    @cached_property
    def final(self) -> Answer | None:
        """The answer of the whole request: stated after thinking, else the last one stated in it."""
        stated = find_statement(self.answer)
        if stated is not None and stated.answer is not None:
            return stated.answer
        plain = parse_answer(self.answer.strip()) if 0 < len(self.answer.strip()) <= 200 else None
        return plain or _stated(self.thinking)

    @cached_property
    def expected(self) -> Answer | None:
        """The right answer, where the log says it."""
        return parse_answer(self.trace.expected) if self.trace.expected is not None else None

    def at(self, tokens: int) -> Answer | None:
        """The last answer stated in the first `tokens` tokens of thinking."""
        characters = next((size for count, size in self.ends if count >= tokens), len(self.thinking))
        return _stated(self.thinking[:characters])

    def agree(self, first: Answer | None, second: Answer | None) -> bool:
        """Whether two answers are proven to be the same."""
        return first is not None and second is not None and same(first, second, context_of(self.question)) is True


@dataclass(frozen=True)
class Outcome:
    """What some options do to one request.

    Attributes:
        rule: that cut it, None where nothing fires.
        tokens: thinking tokens at the end of it: at the cut, or all.
        whole_tokens: thinking tokens without a cut.
        kept: the answer is that of the whole request.
        right, whole_right: the answer is the expected one, with and without the cut; None where that is unknown.
    """

    rule: str | None
    tokens: int
    whole_tokens: int
    kept: bool
    right: bool | None
    whole_right: bool | None


def wholes(traces: Sequence[Trace]) -> tuple[list[Whole], int]:
    """Return the traces that can be replayed, and how many were left out because their request was cut.

    Raises:
        InputRefused: none is left, or they have no text.
    """
    kept = [trace for trace in traces if all(event.event != "applied" for event in trace.events)]
    if not kept:
        raise InputRefused(
            "every trace was cut while it ran, so nobody knows how it would have ended", do="log with --shadow"
        )
    return [_whole(trace) for trace in kept], len(traces) - len(kept)


def run(whole: Whole, options: TrimROptions) -> Outcome:
    """Run one request again under other options and return what would have come of it."""
    fires = whole.options.model_copy(update={**_changed(options), "shadow": False, "log_text": True})
    inputs = [event for event in whole.trace.events if event.event in _INPUTS]
    decided = next((event for event in replay_events(inputs, fires) if event.event == "decision"), None)
    whole_right = whole.agree(whole.final, whole.expected) if whole.expected is not None else None
    if decided is None:
        return Outcome(None, whole.thinking_tokens, whole.thinking_tokens, True, whole_right, whole_right)
    at = int(decided.data["at_token"])
    answer = whole.at(at)
    right = whole.agree(answer, whole.expected) if whole.expected is not None else None
    kept = whole.agree(answer, whole.final)
    return Outcome(
        decided.data["rule"], min(at, whole.thinking_tokens), whole.thinking_tokens, kept, right, whole_right
    )


def decisions(events: Sequence[TraceEvent]) -> list[dict[str, object]]:
    """What a log decided, shadowed or not, in a form that live and replay share."""
    names = ("rule", "force", "thought", "at_token")
    return [{name: event.data[name] for name in names} for event in events if event.event == "decision"]


def _changed(options: TrimROptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in options.model_fields_set}


def _whole(trace: Trace) -> Whole:
    start = trace.events[0].data
    text, ends, tokens, size = [], [], 0, 0
    for event in trace.events:
        if event.event != "feed":
            continue
        if not isinstance(event.data["text"], str):
            raise InputRefused(f"trace {trace.name} has no text", do="log with --log-text")
        counted = event.data["tokens"]
        tokens += counted if isinstance(counted, int) else len(counted)
        size += len(event.data["text"])
        text.append(event.data["text"])
        ends.append((tokens, size))
    output = "".join(text)
    begin, end = start["thinking"]
    opened = 0 if start["inside"] else output.find(begin) + len(begin)
    before, found, after = output.partition(end)
    thinking_tokens = next((count for count, size in ends if size >= len(before)), tokens)
    return Whole(
        trace=trace,
        question=str(start["question"] or ""),
        options=TrimROptions.model_validate_json(_json(start["options"])),
        thinking=before[opened:] if start["inside"] else before,
        answer=after,
        thinking_tokens=thinking_tokens,
        ends=tuple(ends),
        truncated=not found,
    )


def _json(content: object) -> str:
    import json

    return json.dumps(content)


def _stated(text: str) -> Answer | None:
    found = find_statement(text)
    return found.answer if found is not None else None
