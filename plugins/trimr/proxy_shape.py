"""What a stream's chunks say, whichever interface they came by, and how our own chunks are written in its shape.

Thinking comes in three forms: as `reasoning` (or, of older servers, `reasoning_content`) beside the content, inside the
content between the thinking strings, or inside a completion's text. The core sees one form: the raw text of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jettison.plugins.trimr.proxy_request import Api
from jettison.plugins.trimr.types import ThinkingStrings

REASONING = ("reasoning", "reasoning_content")


@dataclass(frozen=True)
class Piece:
    """What one chunk adds.

    Attributes:
        reasoning, content: text beside and inside the content; a completion's text is content.
        ids: token ids, None where the server gives none.
        finish: finish_reason.
        tools: whether it carries a part of a tool call.
    """

    reasoning: str = ""
    content: str = ""
    ids: list[int] | None = None
    finish: str | None = None
    tools: bool = False


def read(api: Api, choice: dict[str, Any]) -> Piece:
    """Return what a choice of a chunk adds."""
    ids = choice.get("token_ids")
    ids = ids if isinstance(ids, list) else None
    finish = choice.get("finish_reason")
    if api == "completions":
        return Piece("", str(choice.get("text") or ""), ids, finish)
    delta = choice.get("delta") or {}
    reasoning = next((delta[name] for name in REASONING if delta.get(name)), "")
    return Piece(str(reasoning), str(delta.get("content") or ""), ids, finish, bool(delta.get("tool_calls")))


@dataclass
class Shape:
    """The stream as the client sees it, learnt from its first chunks.

    Attributes:
        api: the client's interface.
        thinking: the strings around thinking.
        template: of a chunk, all but its choices.
        reasoning: the delta's key for thinking, None while none was seen.
        apart: the chunk's text is inside `reasoning`, so that the next content begins with the end string.
    """

    api: Api
    thinking: ThinkingStrings
    template: dict[str, Any] = field(default_factory=dict)
    reasoning: str | None = None
    apart: bool = False
    _was_content: bool = False

    def learn(self, chunk: dict[str, Any], choice: dict[str, Any]) -> None:
        """Take note of a chunk of the first upstream stream."""
        if not self.template:
            kept = ("id", "object", "created", "model", "system_fingerprint")
            self.template = {name: chunk[name] for name in kept if name in chunk}
        if self.reasoning is None and self.api == "chat":
            delta = choice.get("delta") or {}
            self.reasoning = next((name for name in REASONING if delta.get(name)), None)

    def raw(self, piece: Piece, *, ended: bool = False) -> str:
        """Return the model's raw text of a piece, thinking strings put back where the server took them out.

        `ended`: the piece's ids hold the end of thinking, which may come before any content does.
        """
        text = ""
        if piece.reasoning:
            text += piece.reasoning if self.apart or not self._was_content else self.thinking.start + piece.reasoning
            self.apart = True
        if piece.content or piece.tools or (ended and self.apart):
            text += (self.thinking.end if self.apart else "") + piece.content
            self.apart = False
            self._was_content = True
        return text

    def restart(self) -> None:
        """A continuation begins: its text is raw, or comes as chat chunks of which nothing is known yet."""
        self.apart, self._was_content = False, False

    def chunk(
        self,
        index: int,
        reasoning: str,
        content: str,
        finish: str | None = None,
        like: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return a chunk of our own; of `like`, the upstream's choice, it takes over why it stopped."""
        more = {"stop_reason": like["stop_reason"]} if like is not None and "stop_reason" in like else {}
        if self.api == "completions":
            text: dict[str, Any] = {"text": reasoning + content}
        else:
            parts = {self.reasoning or "reasoning": reasoning, "content": content}
            text = {"delta": {name: part for name, part in parts.items() if part}}
        choice = {"index": index, **text, "logprobs": None, "finish_reason": finish, **more}
        return {**self.template, "choices": [choice]}


class Splitter:
    """Cuts raw text that begins inside thinking at the end string, in any split of the text.

    Attributes:
        inside: whether the end string is still to come.
    """

    def __init__(self, end: str) -> None:
        self._end = end
        self._held = ""
        self.inside = True

    def feed(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Return (thinking, answer) of what can be told apart by now; `last` holds nothing back."""
        if not self.inside:
            return "", text
        text = self._held + text
        before, found, after = text.partition(self._end)
        if found:
            self._held, self.inside = "", False
            return before, after
        held = 0 if last else _overlap(text, self._end)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], ""


def _overlap(text: str, end: str) -> int:
    """Length of the longest suffix of `text` that begins `end`."""
    longest = min(len(text), len(end) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(end[:size])), 0)
