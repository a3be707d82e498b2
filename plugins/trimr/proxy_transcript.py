"""Everything of one choice so far, as text and as token ids, and the prompt that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jettison.plugins.trimr.proxy_upstream import Upstream
from jettison.plugins.trimr.types import ThinkingStrings

_TAIL = 24
_AFTER_START = 4
"""Tokens that a chat template may write after the start string: line ends."""
_MAX_BYTES_OF_A_CHARACTER = 4


@dataclass
class Transcript:
    """Args: the model's name and the client's headers, for the server's tokenizer.

    Attributes:
        prompt_ids: the client's prompt, None where the server gave no ids.
        ids: generated and forced ids; None once text came without ids.
        text: the same as raw text, as far as the server gave it.
        start_ids, end_ids: of the thinking strings; empty where the server has no tokenizer for us.
    """

    upstream: Upstream
    model: str
    headers: Mapping[str, str]
    prompt_ids: list[int] | None = None
    ids: list[int] | None = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)
    start_ids: Sequence[int] = ()
    end_ids: Sequence[int] = ()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    async def learn(self, thinking: ThinkingStrings) -> None:
        """Ask the server for the ids of the thinking strings."""
        self.start_ids = await self.upstream.tokenize(self.model, thinking.start, self.headers) or ()
        self.end_ids = await self.upstream.tokenize(self.model, thinking.end, self.headers) or ()

    def add(self, text: str, ids: Sequence[int] | None) -> None:
        """Append what a chunk added."""
        self._parts.append(text)
        if ids is not None and self.ids is not None:
            self.ids.extend(ids)
        elif text:
            self.ids = None

    @staticmethod
    def holds(wanted: Sequence[int], ids: Sequence[int] | None) -> bool:
        """Whether ids hold a thinking string that is one token."""
        return len(wanted) == 1 and ids is not None and wanted[0] in ids

    def begins_inside(self, prompt: object, thinking: ThinkingStrings) -> bool:
        """Whether the prompt ends inside a thinking block.

        A chat's prompt does if its template ended with the start string (`prompt` is None): one that the user wrote
        somewhere opens nothing.
        """
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt.rfind(thinking.start) > prompt.rfind(thinking.end)
        if self.prompt_ids is None or not self.start_ids:
            return False
        ids = self.prompt_ids if prompt is not None else self.prompt_ids[-len(self.start_ids) - _AFTER_START :]
        return _last(ids, self.start_ids) > _last(ids, self.end_ids)

    async def settle(self, *, held: bool) -> str | None:
        """Make ids and text say the same; return text that the client has yet to see, None if they do not match.

        A server holds text back that may begin a stop string, and ids of half a character have no text. Ids of half a
        character at the end are dropped. `held`: the request has stop strings.
        """
        assert self.ids is not None
        text: str | None = ""
        for _ in range(_MAX_BYTES_OF_A_CHARACTER):
            text = await self.upstream.detokenize(self.model, self.ids, self.headers)
            if text is None:
                return ""
            if not text.endswith("\ufffd"):
                break
            self.ids.pop()
        assert text is not None
        known = shown = self.text
        at = text.find(shown)
        if at < 0:
            # NOTES: the server hid special tokens inside the text. Where it holds nothing back, nothing is missing.
            if not held:
                return ""
            known = shown[-_TAIL:]
            at = text.rfind(known)
        if at < 0:
            return None
        missing = text[at + len(known) :]
        self._parts.append(missing)
        return missing


def _last(ids: Sequence[int], wanted: Sequence[int]) -> int:
    size = len(wanted)
    if not size:
        return -1
    return next((at for at in range(len(ids) - size, -1, -1) if list(ids[at : at + size]) == list(wanted)), -1)
