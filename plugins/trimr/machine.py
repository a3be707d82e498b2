"""`Trimmer`: one request's thinking in, checks and decisions out. No I/O, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from jettison.hooks.config import parse_section
from jettison.hooks.errors import InputRefused
from jettison.plugins.trimr.agreement import Agreement
from jettison.plugins.trimr.block import Block, Thought
from jettison.plugins.trimr.config import END, TrimROptions
from jettison.plugins.trimr.question import is_open_ended
from jettison.plugins.trimr.rules import Rule, rules_of
from jettison.plugins.trimr.thinking import Piece, ThinkingTracker
from jettison.plugins.trimr.types import Check, Decision, Force, ThinkingStrings, TraceEvent, Verdict
from jettison.plugins.trimr.window import squeezed

_INPUTS = ("start", "feed", "verdict", "applied", "finish")


class Trimmer:
    """Watches one request and says when its thinking should end.

    Feed it the decoded output in order, forced text excepted (`applied`). When `decision` is not None, append its text
    to the output and call `applied`. Verdicts may come at any time, late, twice or never. What it decides depends on
    the order of the calls alone, so a log of them replays exactly.

    Args:
        options: the request's options (`RequestOptions.applied_to`).
        question: the user's question; decides the kind of answer, names options and units.
        budget_tokens: the most tokens that the request may think (or generate), None where there is no limit.
        thinking: the strings around thinking.
        inside: the output begins inside thinking (the prompt ended with the start string, or only reasoning text is
            fed). Otherwise a thinking block begins at the start string, also a second and later one (interleaved
            thinking: each block has its own state).
        phase: the first look comes this many tokens earlier, so that requests that start together do not all look in
            the same step; below `poll_tokens`.
        log: gets every event; None for no log. Events carry text only with `options.log_text`.

    Attributes:
        decision: what to do now, or None. Stays until `applied`; None again when the thinking ends by itself.
        shadowed: with `options.shadow`: what would have been decided; `decision` stays None.
    """

    def __init__(
        self,
        options: TrimROptions,
        question: str,
        budget_tokens: int | None = None,
        thinking: ThinkingStrings = ThinkingStrings(),  # noqa: B008 - frozen
        *,
        inside: bool = True,
        phase: int = 0,
        log: Callable[[TraceEvent], None] | None = None,
    ) -> None:
        self.options = options
        self.decision: Decision | None = None
        self.shadowed: list[Decision] = []
        self._question = question
        open_ended = options.answer == "open" or (options.answer == "auto" and is_open_ended(question))
        self._rules: tuple[Rule, ...] = rules_of(options, open_ended=open_ended)
        self._thinking = thinking
        self._tracker = ThinkingTracker(thinking, inside)
        self._budget = budget_tokens
        self._wording = squeezed(question)
        self._block = Block(options, budget_tokens, self._wording)
        self._log = log
        self._total = 0
        self._looked_at = -min(phase, options.poll_tokens - 1)
        self._by_words = False
        self._agreement = Agreement(options, question, self._record)
        self._record("start", **self._start_data(inside))

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the current (or last) thinking block, forced ones included."""
        return self._block.tokens

    @property
    def in_thinking(self) -> bool:
        """Whether the text fed so far ends inside a thinking block."""
        return self._tracker.inside

    @property
    def next_look(self) -> int:
        """Tokens (counted since the first feed, forced ones included) from which the next feed is examined; a caller
        that pays for decoding may hold text back until then.
        """
        return self._looked_at + self.options.poll_tokens

    def feed(self, text: str, tokens: int | Sequence[int]) -> list[Check]:
        """Take decoded output.

        Args:
            text: what came since the last call; any split is allowed, also inside a word.
            tokens: ids of its tokens, or their number where ids are unknown (loops are then sought in words). One
                request is fed one way only.

        Returns:
            At most one check to send to the verifier; the next one follows from `answer`.
        """
        self._record_text("feed", text, tokens)
        self._take(text, tokens)
        if self._total < self.next_look:
            return []
        self._looked_at = self._total
        return self._look() if self.in_thinking else []

    def answer(self, check: Check, verdict: Verdict) -> list[Check]:
        """Take a verdict, or `Verdict()` for none; one that is stale, repeated or unknown changes nothing.

        Returns:
            At most one check to send next.
        """
        self._record("verdict", check=check.id, scores=list(verdict.scores))
        if not self._agreement.take(check.id, verdict, self._block):
            return []
        checks = self._agreement.advance(self._block)
        self._decide()
        return checks

    def applied(self, text: str, tokens: int | Sequence[int]) -> None:
        """Say that `decision` was carried out: `text` was appended as `tokens`. Clears `decision`.

        Raises:
            ValueError: there is no decision.
        """
        if self.decision is None:
            raise ValueError("applied() without a decision; call it once for each")
        self._record_text("applied", text, tokens)
        force, self.decision = self.decision.force, None
        count = tokens if isinstance(tokens, int) else len(tokens)
        self._total += count
        block = self._block
        block.tokens += count
        for thought in block.look(by_words=self._by_words):
            self._note(thought)
        pieces = self._tracker.push(text)
        block.add_guidance(text if not pieces else pieces[0].text, force)
        if any(piece.closes for piece in pieces):
            self._close()
        self._looked_at = self._total

    def finish(self) -> list[Check]:
        """The output has ended: what was held back is read for the log; no decision follows."""
        self._record("finish")
        for piece in self._tracker.flush():
            self._take_piece(piece)
        if self.in_thinking:
            self._block.done = True
            self._look()
        self._close()
        return []

    def _take(self, text: str, tokens: int | Sequence[int]) -> None:
        ids = None if isinstance(tokens, int) else tokens
        count = tokens if isinstance(tokens, int) else len(tokens)
        self._by_words = self._by_words or ids is None
        self._total += count
        was_inside = self._tracker.inside
        pieces = self._tracker.push(text)
        turned = any(piece.closes or piece.opens for piece in pieces)
        if not turned:
            if was_inside:
                self._block.push_tokens(count, ids)
        else:
            thinking = sum(len(piece.text) for piece in pieces if piece.thinking)
            share = thinking / max(1, sum(len(piece.text) for piece in pieces))
            self._block.push_tokens(round(count * share), None)
        for piece in pieces:
            self._take_piece(piece)

    def _take_piece(self, piece: Piece) -> None:
        if piece.thinking:
            self._block.push(piece.text)
        if piece.closes:
            self._close()
        if piece.opens:
            self._block = Block(self.options, self._budget, self._wording)

    def _close(self) -> None:
        """The thinking ended: nothing that was asked or decided about it counts any more."""
        self._block.done = True
        self.decision = None
        self._agreement.clear()

    def _look(self) -> list[Check]:
        for thought in self._block.look(by_words=self._by_words):
            self._note(thought)
        checks = self._agreement.advance(self._block)
        self._decide()
        return checks

    def _note(self, thought: Thought) -> None:
        found = "none" if thought.statement is None else "strong" if thought.statement.strong else "weak"
        self._record("thought", index=thought.index, found=found)
        self._agreement.add(thought)

    def _decide(self) -> None:
        block = self._block
        if block.done or self.decision is not None:
            return
        progress = block.update()
        for rule in self._rules:
            if rule.name != "ceiling" and block.tokens < self.options.min_think_tokens:
                continue
            if rule.name not in ("ceiling", "repetition") and block.segmenter.protected:
                continue
            if rule.fires(progress):
                force: Force = "forceful" if "gentle" in block.forces else rule.force
                if force not in block.forces and not block.segmenter.in_tool_call:
                    self._fire(rule, force)
                return

    def _fire(self, rule: Rule, force: Force) -> None:
        guidance = self.options.gentle if force == "gentle" else self.options.forceful
        text = guidance.replace(END, self._thinking.end)
        decision = Decision(rule.name, force, text, self._block.progress.thoughts, self._block.tokens)
        shadow = self.options.shadow
        if shadow:
            self.shadowed.append(decision)
            self._block.done = True
        else:
            self.decision = decision
        self._record("decision", **decision.__dict__, shadow=shadow)

    def _start_data(self, inside: bool) -> dict[str, Any]:
        return {
            "options": self.options.model_dump(mode="json"),
            "question": self._question if self.options.log_text else None,
            "budget_tokens": self._budget,
            "thinking": [self._thinking.start, self._thinking.end],
            "inside": inside,
            "phase": -self._looked_at,
        }

    def _record_text(self, event: Literal["feed", "applied"], text: str, tokens: int | Sequence[int]) -> None:
        if self._log is not None:
            known = self.options.log_text
            count = tokens if isinstance(tokens, int) else list(tokens) if known else len(tokens)
            self._record(event, text=text if known else None, tokens=count)

    def _record(self, event: Any, **data: Any) -> None:
        if self._log is not None:
            self._log(TraceEvent(event=event, at_token=self._block.tokens, data=data))


def replay(events: Iterable[TraceEvent], options: TrimROptions | None = None) -> list[TraceEvent]:
    """Run the inputs of a log through a new `Trimmer` and return the whole log that it writes.

    With other options than those in the log, a decision may come where none came, or not come where one did: guidance
    that was given is then ordinary text, and a verdict on a check that is not asked changes nothing.

    Args:
        events: a log that begins with `start` and was written with `log_text`.
        options: in place of those in the log.

    Raises:
        InputRefused: the log does not begin with `start`, or has no text.
        ConfigError: its options are not valid.
    """
    written: list[TraceEvent] = []
    trimmer: Trimmer | None = None
    for event in events:
        if event.event not in _INPUTS:
            continue
        if event.event == "start":
            if trimmer is not None:
                raise InputRefused("the log has two 'start' events", do="give the events of one request")
            trimmer = _start(event.data, options, written)
        elif trimmer is None:
            raise InputRefused(f"the log begins with {event.event!r}", allowed="the first event is 'start'")
        else:
            _step(trimmer, event)
    return written


def _start(data: dict[str, Any], options: TrimROptions | None, written: list[TraceEvent]) -> Trimmer:
    if data["question"] is None:
        raise InputRefused("the log holds no text", do="record it with the option log_text")
    chosen = options or parse_section(TrimROptions, "trimr", data["options"])
    chosen = chosen.model_copy(update={"log_text": True})
    strings = ThinkingStrings(*data["thinking"])
    inside, phase = data["inside"], data.get("phase", 0)
    return Trimmer(
        chosen, data["question"], data["budget_tokens"], strings, inside=inside, phase=phase, log=written.append
    )


def _step(trimmer: Trimmer, event: TraceEvent) -> None:
    data = event.data
    if event.event == "verdict":
        trimmer.answer(Check(data["check"], "exist", 0, "", ""), Verdict(tuple(data["scores"])))
    elif event.event == "applied" and trimmer.decision is not None:
        trimmer.applied(data["text"], data["tokens"])
    elif event.event in ("feed", "applied"):
        trimmer.feed(data["text"], data["tokens"])
    else:
        trimmer.finish()
