"""Which answers exist and which agree: exact comparison first, the verifier for what it leaves open (section 3.2).

Thoughts are settled in order, one question to the verifier at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from jettison.plugins.trimr.block import Block, Kept, Thought
from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.normalise_same import context_of, same
from jettison.plugins.trimr.rules import Overthinking
from jettison.plugins.trimr.types import Check, Verdict

_MAX_WAITING = 8
"""Thoughts that wait for a verdict on an earlier one; beyond, the oldest counts as unanswered."""


class Agreement:
    """Settles the thoughts of one request's thinking blocks.

    Args:
        options: of the request.
        question: the user's question.
        record: gets the events `check` and `same`.
    """

    def __init__(self, options: TrimROptions, question: str, record: Callable[..., None]) -> None:
        self._options = options
        self._question = question
        self._context = context_of(question)
        self._consensus = Overthinking(options.M, options.count_mode)
        self._record = record
        self._next_check = 0
        self._asked: Check | None = None
        self._waiting: deque[Thought] = deque()

    def add(self, thought: Thought) -> None:
        """Take a complete thought; if too many wait, the oldest one's question is given up."""
        self._waiting.append(thought)
        if len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft()
            self._asked = None

    def clear(self) -> None:
        """Give up whatever waits."""
        self._asked = None
        self._waiting.clear()

    def take(self, check: int, verdict: Verdict, block: Block) -> bool:
        """Take the verdict on check number `check`; False if that is not what was asked last."""
        if self._asked is None or check != self._asked.id:
            return False
        asked, self._asked = self._asked, None
        thought = self._waiting[0]
        if asked.kind == "exist":
            thought.exists = verdict.accepts(self._options.tau_exist)
            if not thought.exists:
                self._waiting.popleft()
        else:
            assert thought.open_to
            other = thought.open_to.pop(0)
            if verdict.accepts(self._options.tau_equiv):
                self._settle(block, thought, other.label, "verifier")
        return True

    def advance(self, block: Block) -> list[Check]:
        """Settle waiting thoughts in order until one needs a verdict; return its question, if any."""
        while self._waiting and self._asked is None:
            thought = self._waiting[0]
            thought.exists = thought.exists or (thought.statement is not None and thought.statement.strong)
            if not thought.exists:
                if self._options.verifier.mode != "none":
                    return [self._ask("exist", thought)]
                self._waiting.popleft()
                continue
            label = self._compare(thought, block) if thought.open_to is None else None
            if label is not None:
                self._settle(block, thought, label, "exact")
            elif thought.open_to:
                return [self._ask("equiv", thought)]
            else:
                self._settle(block, thought, len(block.kept), thought.by)
        return []

    def _compare(self, thought: Thought, block: Block) -> int | None:
        """The label of an earlier answer that counts and is the same; what stays open is left for the verifier."""
        reach = 1 if self._options.count_mode == "consecutive" else self._options.M + 1
        newest: dict[int, Kept] = {}
        for kept in reversed(block.kept[-reach:]):
            newest.setdefault(kept.label, kept)
        answer = thought.statement.answer if thought.statement is not None else None
        thought.open_to = []
        for kept in newest.values():
            alike = same(answer, kept.answer, self._context) if answer and kept.answer else None
            if alike:
                return kept.label
            if alike is None:
                thought.open_to.append(kept)
        if thought.open_to and self._options.verifier.mode == "none":
            thought.open_to, thought.by = [], "unclear"
        elif thought.open_to:
            thought.by = "verifier"
        return None

    def _settle(self, block: Block, thought: Thought, label: int, by: str) -> None:
        answer = thought.statement.answer if thought.statement is not None else None
        equal = bool(block.kept) and block.kept[-1].label == label
        block.keep(Kept(thought.index, thought.excerpt, answer, label))
        block.progress.agreed = block.progress.agreed or self._consensus.agrees(block.progress.labels)
        self._record("same", thought=thought.index, equal=equal, by=by, label=label)
        self._waiting.popleft()

    def _ask(self, kind: Literal["exist", "equiv"], thought: Thought) -> Check:
        first, second = thought.excerpt, ""
        if kind == "equiv":
            assert thought.open_to
            first, second = thought.open_to[0].excerpt, thought.excerpt
        self._asked = Check(self._next_check, kind, thought.index, self._question, first, second)
        self._next_check += 1
        self._record("check", id=self._asked.id, kind=kind, thought=thought.index)
        return self._asked
