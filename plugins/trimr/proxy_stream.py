"""One choice of one request while it is watched: forwarded chunk by chunk, and cut where the core decides so.

A cut opens the continuation first and lets go of the running stream then, so a continuation that the server refuses
costs nothing: the request runs on as it was, untrimmed. With token ids the continuation's prompt is token-exact: the
prompt's ids, the generated ids whose text the client has seen, and the guidance's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jettison.plugins.trimr.endpoint import require_aiohttp
from jettison.plugins.trimr.proxy_shape import Piece, Shape, Splitter, read
from jettison.plugins.trimr.proxy_transcript import Transcript
from jettison.plugins.trimr.proxy_usage import Usage
from jettison.plugins.trimr.proxy_watch import Watch
from jettison.plugins.trimr.sse import events
from jettison.plugins.trimr.types import Decision, ThinkingStrings, TraceEvent

if TYPE_CHECKING:
    import aiohttp

    from jettison.plugins.trimr.metrics import Metrics
    from jettison.plugins.trimr.proxy_request import Watched
    from jettison.plugins.trimr.proxy_upstream import Upstream
    from jettison.plugins.trimr.verifier import VerifierClient

CONTINUE_DEADLINE_S = 10.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Chunk = dict[str, Any]
Out = tuple[Chunk, bytes | None]
"""A chunk, and the bytes of its event where they may be forwarded as they are. An empty chunk is a comment."""
_IDS = re.compile(rb'(?<=[{,])"(token_ids|prompt_token_ids)":\[[\d,]*\]')
"""Never matches inside a JSON string: a quotation mark there has a backslash before it."""


@dataclass(frozen=True)
class Tools:
    """What all streams of a proxy share.

    Attributes:
        verifier: None: unclear pairs count as different.
        chat_continuation: on servers without token ids, go on in the assistant's last message. Templates that strip
            thinking from it spoil the prompt, so it is off unless asked for.
    """

    upstream: Upstream
    metrics: Metrics
    thinking: ThinkingStrings
    verifier: VerifierClient | None = None
    chat_continuation: bool = False


class CannotContinueError(Exception):
    """A cut cannot be made here; the text is the label it is counted under."""


class ChoiceStream:
    """Args: the tools, the client's request, the choice's index, the client's headers, and who gets the event log.

    Attributes:
        usage: of this choice, complete when the stream has ended.
        last: the upstream's event with the usage and no choice, if it sent one.
    """

    def __init__(
        self,
        tools: Tools,
        watched: Watched,
        index: int,
        headers: Mapping[str, str],
        log: Callable[[TraceEvent], None] | None = None,
    ) -> None:
        self._tools, self._watched, self._index, self._headers, self._log = tools, watched, index, headers, log
        self._shape = Shape(watched.api, tools.thinking)
        self._transcript = Transcript(tools.upstream, str(watched.body.get("model") or ""), headers)
        self._response: aiohttp.ClientResponse | None = None
        self._watch: Watch | None = None
        self._splitter: Splitter | None = None
        self._tools_called = False
        self.usage = Usage()
        self.last: bytes | None = None

    async def open(self) -> aiohttp.ClientResponse:
        """Start the first upstream stream and return its response."""
        path = CHAT if self._watched.api == "chat" else COMPLETIONS
        self._response = await self._tools.upstream.post(path, self._headers, self._watched.first(self._index))
        if self._response.status == 200:
            await self._transcript.learn(self._tools.thinking)
        return self._response

    async def close(self) -> None:
        """Let go of the upstream, which cancels what still runs there, and of the verifier."""
        if self._response is not None:
            self._response.close()
        if self._watch is not None:
            await self._watch.close()
            if not self.usage.cuts:
                self._tools.metrics.whole(self._watch.thinking_tokens)

    async def chunks(self) -> AsyncIterator[Out]:
        """Yield chunks in the client's shape across all cuts, the one with only usage left out."""
        take, running, first = self._take_first, True, True
        while running:
            assert self._response is not None
            running = False
            async for event in events(self._response.content.iter_any()):
                if event.data is None:
                    if first and not event.done:
                        yield {}, event.raw
                    continue
                if "error" in event.data:
                    yield event.data, event.raw
                    return
                self.usage.see(event.data)
                if not event.data.get("choices"):
                    self.last = self._without_ids(event.raw)
                    continue
                chunk, ended = take(event.data)
                if chunk is not None:
                    yield chunk, self._without_ids(event.raw) if first else None
                decision = None if ended or self._watch is None or self._tools_called else self._watch.decision
                forced = await self._cut(decision) if decision is not None else None
                if forced is not None:
                    for one in forced:
                        yield one, None
                    take, running, first = self._take_next, True, False
                    break

    def _take_first(self, data: Chunk) -> tuple[Chunk | None, bool]:
        """Take a chunk of the client's own interface; return it as the client is to see it, and whether it ends it."""
        choice = data["choices"][0]
        self._shape.learn(data, choice)
        piece = read(self._watched.api, choice)
        ids = data.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if ids:
            self._transcript.prompt_ids, self.usage.prompt = ids, len(ids)
        self._tools_called = self._tools_called or piece.tools
        self._feed(piece)
        choice["index"] = self._index
        self._hide_ids(data, choice)
        only_ids = self._watched.api == "chat" and piece.ids is not None and not choice.get("delta")
        wanted = self._watched.wants_ids or piece.finish is not None or not only_ids
        return (data if wanted else None), piece.finish is not None

    def _hide_ids(self, data: Chunk, choice: Chunk) -> None:
        """Make the ids null, as vLLM writes them for a client that did not ask for them."""
        if self._watched.wants_ids:
            return
        for place, name in ((choice, "token_ids"), (choice, "prompt_token_ids"), (data, "prompt_token_ids")):
            if name in place:
                place[name] = None

    def _without_ids(self, raw: bytes) -> bytes:
        """The same for an event's bytes, of which nothing else may change."""
        return raw if self._watched.wants_ids else _IDS.sub(rb'"\1":null', raw)

    def _take_next(self, data: Chunk) -> tuple[Chunk | None, bool]:
        """Take a chunk of a continuation; return it in the client's shape."""
        choice = data["choices"][0]
        piece = read("completions" if "text" in choice else "chat", choice)
        parts = self._apart(self._feed(piece), last=piece.finish is not None)
        if not any(parts) and piece.finish is None and not self._watched.wants_ids:
            return None, False
        chunk = self._shape.chunk(self._index, *parts, finish=piece.finish, like=choice)
        if self._watched.wants_ids:
            chunk["choices"][0]["token_ids"] = piece.ids
        return chunk, piece.finish is not None

    def _apart(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Return (reasoning, content) of raw text, as the client gets it."""
        return self._splitter.feed(text, last=last) if self._splitter is not None else ("", text)

    def _feed(self, piece: Piece) -> str:
        """Take what a chunk adds; return its raw text."""
        transcript, start, end = self._transcript, self._tools.thinking.start, self._tools.thinking.end
        ended = transcript.holds(transcript.end_ids, piece.ids)
        text = self._shape.raw(piece, ended=ended)
        transcript.add(text, piece.ids)
        tokens = self.usage.count(piece.ids, text)
        watched = text
        if self._splitter is None and self._shape.reasoning is None:
            # NOTES: the strings may be special tokens whose text the server hides, or holds back for a while.
            began = transcript.holds(transcript.start_ids, piece.ids) and start not in text
            watched = (start if began else "") + text + (end if ended and end not in text else "")
        fed = piece.ids if piece.ids is not None else tokens
        if self._watch is None and watched:
            # NOTES: tokens without text (special ones) may have come before.
            fed = self.usage.generated if transcript.ids is None else list(transcript.ids)
            self._watch = self._begin()
        if self._watch is not None and (watched or tokens):
            self._watch.feed(watched, fed)
        return text

    def _begin(self) -> Watch:
        inside = self._shape.apart or self._transcript.begins_inside(
            self._watched.body.get("prompt"), self._tools.thinking
        )
        return Watch(
            self._watched.options,
            self._watched.question,
            self._watched.max_tokens,
            self._tools.thinking,
            inside=inside,
            verifier=self._tools.verifier,
            metrics=self._tools.metrics,
            log=self._log,
        )

    async def _cut(self, decision: Decision) -> list[Chunk] | None:
        """Carry out a decision: return the chunks that show the guidance, or None where that cannot be done."""
        assert self._watch is not None
        metrics = self._tools.metrics
        try:
            missing, ids, response = await self._continue(decision)
        except CannotContinueError as error:
            self._watch.stop()
            metrics.failures.labels(str(error)).inc()
            return None
        assert self._response is not None
        late = _buffered(self._response)
        self._response.close()
        self._response = response
        forced = ids if ids is not None else _estimate(decision.text)
        if missing:
            self._watch.feed(missing, 0)
        self._watch.applied(decision.text, forced)
        self._transcript.add(decision.text, ids)
        self.usage.cut(decision, forced if isinstance(forced, int) else len(forced))
        self.usage.late += late
        metrics.late_tokens.inc(late)
        metrics.saved(decision.at_token)
        metrics.stopped.labels(decision.rule, decision.force, "false").inc()
        if self._splitter is None and self._shape.apart:
            self._splitter = Splitter(self._tools.thinking.end)
        self._shape.restart()
        reasoning, content = self._apart(missing + decision.text)
        chunks = [self._shape.chunk(self._index, *parts) for parts in ((reasoning, ""), ("", content)) if any(parts)]
        if self._watched.wants_ids and ids is not None:
            chunks[0]["choices"][0]["token_ids"] = ids
        return chunks

    async def _continue(self, decision: Decision) -> tuple[str, list[int] | None, aiohttp.ClientResponse]:
        """Return (text to show first, ids of the guidance or None, the running continuation)."""
        transcript, watched = self._transcript, self._watched
        prompt = watched.body.get("prompt")
        prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str) else prompt
        used = self.usage.generated + self.usage.forced
        forced = await transcript.upstream.tokenize(transcript.model, decision.text, self._headers)
        if transcript.prompt_ids and transcript.ids is not None and forced:
            missing = await transcript.settle(held=bool(watched.body.get("stop")))
            if missing is None or self._tools.thinking.end in missing:
                raise CannotContinueError("alignment")
            used = len(transcript.ids) + len(forced)
            path, body = COMPLETIONS, watched.continuation(
                self._index, [*transcript.prompt_ids, *transcript.ids, *forced], used,
                parsed=self._shape.reasoning is not None and self._tools.thinking.end not in decision.text,
            )  # fmt: skip
            return missing, forced, await self._opened(path, body, used)
        used += _estimate(decision.text)
        if isinstance(prompt, str):
            body = watched.continuation(self._index, prompt + transcript.text + decision.text, used, parsed=False)
            return "", None, await self._opened(COMPLETIONS, body, used)
        if watched.api == "chat" and self._tools.chat_continuation:
            start = self._tools.thinking.start if self._shape.reasoning is not None else ""
            body = watched.chat_continuation(self._index, start + transcript.text + decision.text, used)
            return "", None, await self._opened(CHAT, body, used)
        raise CannotContinueError("ids")

    async def _opened(self, path: str, body: Chunk, used: int) -> aiohttp.ClientResponse:
        if self._watched.remaining(used) == 0:
            raise CannotContinueError("room")
        aiohttp = require_aiohttp()
        try:
            async with asyncio.timeout(CONTINUE_DEADLINE_S):
                response = await self._tools.upstream.post(path, self._headers, body)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise CannotContinueError("connection") from error
        if response.status != 200:
            response.close()
            raise CannotContinueError("status")
        return response


def _buffered(response: aiohttp.ClientResponse) -> int:
    """Chunks that have arrived and will not be read."""
    try:
        return response.content.read_nowait().count(b"data: {")
    except (OSError, require_aiohttp().ClientError):
        return 0


def _estimate(text: str) -> int:
    """Tokens of a text whose ids are unknown: about four characters each."""
    return -(-len(text) // 4)
