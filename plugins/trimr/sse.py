"""Server-sent events as OpenAI-compatible servers write them: cut apart without changing a byte, and written."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Any

MAX_EVENT = 16 << 20
"""Bytes of one event; a stream with a longer one is broken off."""
DONE = b"data: [DONE]\n\n"
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class StreamError(Exception):
    """The upstream's stream is not one of events, or an event is too long."""


@dataclass(frozen=True)
class Event:
    """One event. `raw` are its bytes with the blank line, `data` the JSON object in it or None (comment, [DONE])."""

    raw: bytes
    data: dict[str, Any] | None

    @property
    def done(self) -> bool:
        """Whether this is the end mark."""
        return self.data is None and _payload(self.raw) == b"[DONE]"


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[Event]:
    """Cut a body, in any chunks, into events; what follows the last blank line is an event too.

    Raises:
        StreamError: an event is longer than `MAX_EVENT`.
    """
    buffer = b""
    async for chunk in chunks:
        buffer += chunk
        while found := _END.search(buffer):
            # NOTES: "\r\n\r\n" may still be on its way when "\r" ends the buffer, but never after a match.
            yield event(buffer[: found.end()])
            buffer = buffer[found.end() :]
        if len(buffer) > MAX_EVENT:
            raise StreamError(f"an event is longer than {MAX_EVENT} bytes")
    if buffer:
        yield event(buffer)


def event(raw: bytes) -> Event:
    """Return one event of these bytes; data that is no JSON object is kept as bytes only."""
    payload = _payload(raw)
    if not payload.startswith(b"{"):
        return Event(raw, None)
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError):
        return Event(raw, None)
    return Event(raw, data if isinstance(data, dict) else None)


def encode(data: dict[str, Any]) -> bytes:
    """Return an event with this object, written as compactly as vLLM does."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")


def _payload(raw: bytes) -> bytes:
    if raw.startswith(b"data:") and raw.count(b"data:") == 1:
        return raw[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in raw.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip()
