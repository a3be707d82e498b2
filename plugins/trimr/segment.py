"""The segmenter: thoughts begin where a reflection marker begins a paragraph (paper, section 3.1).

It works on decoded text in whatever pieces it comes; where it cuts depends on the text alone. Code, display formulas,
quotations and tool calls are not cut. Everything is decided line by line, because a marker counts only at the head of
a line: after a blank line, or after a line that ends a sentence.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from jettison.plugins.trimr.markers import compile_markers

_TOOLS = ("tool_call", "tool_calls", "function_call", "tool_code", "invoke", "tool_use")
_SENTENCE_END = re.compile(r"(?:[.!?。！？…]|\\\]|\$\$)[\"'”’」』）)\]*_`$]*\s*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_TABLE_ROW = re.compile(r"\s*(?:\||.*\S\s*\|.*\|)|.*\t.*\t|[^,;\s]{0,40}(?:[,;][^,;\s]{0,40}){3,}$")
_SIGNS = re.compile(
    r"`[^`]*`|\\\\"
    rf"|(?P<tool><(?:{'|'.join(_TOOLS)})(?:[\s>])|<\|tool_calls?_begin\|>|\[TOOL_CALLS\])"
    r"|(?P<open>\\\[|\\\(|\\begin\{[A-Za-z]+\*?\}|[“「『])|(?P<close>\\\]|\\\)|\\end\{[A-Za-z]+\*?\}|[”」』])"
    r"|(?P<both>\$\$|(?<!\\)\")"
)
_MAY_OPEN = re.compile(r"[\\<\[“「『$\"]")
_TOOL_END = re.compile(rf"</(?:{'|'.join(_TOOLS)})>|<\|tool_calls?_end\|>|\[/TOOL_CALLS\]")
_CLOSES = {"\\[": "\\]", "\\(": "\\)", "“": "”", "「": "」", "『": "』", "$$": "$$", '"': '"'}


class _Kind(NamedTuple):
    limit: int  # characters after which an opening that never closed is forgotten
    paragraph: bool  # ends with its paragraph


_KINDS = {
    "fence": _Kind(20_000, False),
    "tool": _Kind(50_000, False),
    '"': _Kind(2_000, True),
    "\\)": _Kind(2_000, True),
}
_OTHER = _Kind(2_000, False)


class Segmenter:
    """Finds where thoughts begin.

    Args:
        markers: the reflection markers.

    Attributes:
        length: characters pushed so far.
    """

    def __init__(self, markers: Sequence[str]) -> None:
        self._pattern, self._enough = compile_markers(tuple(markers))
        self.length = 0
        self._line_start = 0
        self._line: list[str] = []
        self._line_length = 0
        self._decided = False
        self._opens = False
        self._begun = False
        self._until: str | None = None  # what closes the protected text that we are in
        self._since = 0
        self._fence = ""
        self._rows: deque[bool] = deque(maxlen=3)

    @property
    def in_tool_call(self) -> bool:
        """Whether the text ends inside a tool call."""
        line = "".join(self._line)
        closed = max((match.end() for match in _TOOL_END.finditer(line)), default=0)
        if self._until == "tool" and not closed:
            return True
        return any(sign["tool"] and sign.start() >= closed for sign in _SIGNS.finditer(line))

    @property
    def protected(self) -> bool:
        """Whether the last complete line ends inside code, a formula, a quotation or a tool call."""
        return self._until is not None

    @property
    def structured(self) -> bool:
        """Whether the last complete line ends inside code, or one of the last three is a row of a table."""
        return self._until in ("fence", "tool") or any(self._rows)

    def push(self, text: str) -> list[int]:
        """Take text and return the new cuts: offsets in the whole text, in order, of lines that begin a thought.

        A line's head is judged when it is long enough for any marker, or complete; so a cut may be found some
        characters late, but its place does not depend on how the text was split.
        """
        cuts: list[int] = []
        start = 0
        while (end := text.find("\n", start)) >= 0:
            self._extend(text[start:end], cuts)
            self._end_line(cuts)
            start = end + 1
        self._extend(text[start:], cuts)
        return cuts

    def expect_thought(self) -> None:
        """Guidance was given: a marker at the head of the line that begins now opens a thought."""
        if not self._line_length:
            self._opens = self._begun = True

    def flush(self) -> list[int]:
        """The text has ended: judge an incomplete last line."""
        cuts: list[int] = []
        self._judge("".join(self._line), cuts)
        return cuts

    def _extend(self, part: str, cuts: list[int]) -> None:
        if not part:
            return
        self._line.append(part)
        self._line_length += len(part)
        self.length += len(part)
        if not self._decided and self._line_length >= self._enough:
            self._judge("".join(self._line), cuts)

    def _judge(self, head: str, cuts: list[int]) -> None:
        if self._decided:
            return
        self._decided = True
        if self._opens and self._begun and self._until is None:
            match = self._pattern.match(head)
            if match is not None:
                cuts.append(self._line_start + len(match[1]))

    def _end_line(self, cuts: list[int]) -> None:
        line = "".join(self._line)
        self._judge(line, cuts)
        self.length += 1
        self._line_start = self.length
        self._line, self._line_length, self._decided = [], 0, False
        blank = not line.strip()
        self._begun = self._begun or not blank
        self._opens = blank or _SENTENCE_END.search(line) is not None
        if not blank:
            self._rows.append(_TABLE_ROW.match(line[:400]) is not None)
        protected = self._until
        self._follow(line, blank)
        self._opens = self._opens or (protected in ("fence", "tool") and self._until is None)

    def _follow(self, line: str, blank: bool) -> None:
        """Update what protects the next line."""
        if self._until is not None:
            kind = _KINDS.get(self._until, _OTHER)
            if self.length - self._since > kind.limit or (blank and kind.paragraph):
                self._until = None
        at = 0
        while at <= len(line):
            look = self._look_for_opening if self._until is None else self._look_for_closing
            at = look(line, at)

    def _look_for_opening(self, line: str, at: int) -> int:
        if at == 0 and (fence := _FENCE.match(line)) is not None:
            if fence[1][0] in line[fence.end() :]:
                return fence.end()  # ```code``` within one line
            self._protect("fence")
            self._fence = fence[1]
            return len(line) + 1
        if _MAY_OPEN.search(line, at) is None:
            return len(line) + 1
        for sign in _SIGNS.finditer(line, at):
            if sign["tool"]:
                self._protect("tool")
            elif sign["open"] or sign["both"]:
                opened = sign["open"] or sign["both"]
                self._protect(_CLOSES.get(opened) or opened.replace("begin", "end", 1))
            else:
                continue
            return sign.end()
        return len(line) + 1

    def _look_for_closing(self, line: str, at: int) -> int:
        assert self._until is not None
        if self._until == "fence":
            fence = _FENCE.match(line)
            if fence is not None and fence[1].startswith(self._fence) and not line[fence.end() :].strip():
                self._until = None
            return len(line) + 1
        if self._until == "tool":
            match = _TOOL_END.search(line, at)
            end = match.end() if match else -1
        else:
            found = line.find(self._until, at)
            end = found + len(self._until) if found >= 0 else -1
        if end < 0:
            return len(line) + 1
        self._until = None
        return end

    def _protect(self, until: str) -> None:
        self._until, self._since = until, self.length
