"""One thinking block: its text cut into thoughts, its loops, and what the rules know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.markers import markers_of
from jettison.plugins.trimr.normalise import Answer
from jettison.plugins.trimr.repetition import LoopDetector, Words
from jettison.plugins.trimr.rules import Progress
from jettison.plugins.trimr.segment import Segmenter
from jettison.plugins.trimr.types import Force
from jettison.plugins.trimr.window import Statement, complete_part, excerpt, find_statement

_TAIL = 4_096
_MAX_BUFFER = 200_000
MIN_LETTERS = 3
"""Repeated text of fewer different letters and digits is a line or a filler, not thinking."""

MIN_BYTES = 2
"""Where tokens are shorter than this many bytes, an n-gram is a few words, which honest lists repeat."""


@dataclass
class Kept:
    """An answer that exists: the thought it ends, its excerpt, its value if it can be read, and whom it agrees with."""

    thought: int
    excerpt: str
    answer: Answer | None
    label: int = -1


@dataclass
class Thought:
    """A complete thought on its way through the checks."""

    index: int
    excerpt: str
    statement: Statement | None
    exists: bool = False
    open_to: list[Kept] | None = None
    by: str = "exact"


@dataclass
class Block:
    """State of one thinking block. Token positions inside a feed are estimated from characters, so that what is found
    does not depend on how the text between two looks was split."""

    options: TrimROptions
    budget: int | None
    question: str = ""  # squeezed
    tokens: int = 0
    progress: Progress = field(default_factory=Progress)
    kept: list[Kept] = field(default_factory=list)
    forces: set[Force] = field(default_factory=set)
    done: bool = False

    def __post_init__(self) -> None:
        self.progress.budget = self.budget
        self.segmenter = Segmenter(markers_of(self.options.markers))
        self.loops = LoopDetector(self.options.repeat)
        self._words = Words()
        self._pending: list[str] = []
        self._ids: list[int] = []
        self._thought = ""  # text of the thought that is going on
        self._thought_at = 0  # where it begins
        self._tail = ""
        self._bytes = 0
        self._by_words = False
        self._forced_at: int | None = None  # where gentle guidance ended

    def push(self, text: str) -> None:
        """Take thinking text; it is read at the next `look`."""
        if text:
            self._pending.append(text)

    def push_tokens(self, count: int, ids: Sequence[int] | None) -> None:
        """Take the tokens of the text."""
        self.tokens += count
        if ids is not None and self.options.repeat.enabled:
            self._ids.extend(ids)

    def look(self, *, by_words: bool) -> list[Thought]:
        """Read what came since the last look; return the thoughts that it completes."""
        text = "".join(self._pending)
        self._pending.clear()
        self._bytes += len(text.encode("utf-8", "replace"))
        self._by_words = by_words
        cuts = self.segmenter.push(text)
        self._thought = (self._thought + text)[-_MAX_BUFFER:]
        self._tail = (self._tail + text)[-_TAIL:]
        if self.options.repeat.enabled:
            ids, self._ids = (self._words.push(text) if by_words else self._ids), []
            self.loops.push(ids, self.segmenter.structured)
        self._note_reopening(cuts)
        return self._complete(cuts)

    def add_guidance(self, text: str, force: Force) -> None:
        """Forced text joins the block, all of whose text was looked at; it is neither a thought nor a loop."""
        self.segmenter.push(text)
        self.segmenter.expect_thought()
        self._thought += text
        self._tail += text
        self._forced_at = self.segmenter.length
        self.forces.add(force)
        self.progress.fresh = False

    def update(self) -> Progress:
        """The snapshot for the rules."""
        progress, loops = self.progress, self.loops
        progress.tokens = self.tokens
        found = loops.loops() if self.options.repeat.enabled else []
        progress.loops = found
        progress.coverage = loops.coverage if self._bytes >= MIN_BYTES * self.tokens or self._by_words else 0.0
        progress.structured = self.segmenter.structured or (bool(found) and self._is_filler(found[0].period))
        return progress

    def keep(self, kept: Kept) -> None:
        """A thought has an answer, whose label says whom it agrees with."""
        self.kept.append(kept)
        self.progress.labels.append(kept.label)
        self.progress.fresh = True

    def _tokens_of(self, characters: int) -> float:
        return characters * self.tokens / max(1, self.segmenter.length)

    def _note_reopening(self, cuts: Sequence[int]) -> None:
        if self._forced_at is None or self.progress.reopened is not None:
            return
        later = [cut for cut in cuts if cut >= self._forced_at]
        if later:
            self.progress.reopened = round(self._tokens_of(later[0] - self._forced_at))

    def _complete(self, cuts: Sequence[int]) -> list[Thought]:
        thoughts = []
        least, most = self.options.min_thought_tokens, self.options.max_thought_tokens
        for cut in cuts:
            if cut > self._thought_at and self._tokens_of(cut - self._thought_at) >= least:
                thoughts.append(self._cut(cut, forced=False))
        end = self.segmenter.length
        if self._tokens_of(end - self._thought_at) >= most and not self.segmenter.protected:
            thoughts.append(self._cut(end, forced=True))
        return thoughts

    def _cut(self, cut: int, *, forced: bool) -> Thought:
        first = self.segmenter.length - len(self._thought)
        text, self._thought = self._thought[: cut - first], self._thought[cut - first :]
        self._thought_at = cut
        index = self.progress.thoughts
        self.progress.thoughts += 1
        whole = complete_part(text) if forced else text
        asks = self.options.verifier.mode != "none"
        statement = find_statement(whole, weak=asks, question=self.question)
        if not asks:
            return Thought(index, "", statement)
        characters = max(1, round(self.options.window_tokens * self.segmenter.length / max(1, self.tokens)))
        return Thought(index, excerpt(whole, statement, self.options.window_sentences, characters), statement)

    def _is_filler(self, period: int) -> bool:
        characters = round(period * self.segmenter.length / max(1, self.tokens)) + 1
        signs = {sign for sign in self._tail[-characters:] if sign.isalnum()}
        return len(signs) < MIN_LETTERS
