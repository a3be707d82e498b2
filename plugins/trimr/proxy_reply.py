"""What the client gets of its watched choices: a stream of events, or one object for a client that does not stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from jettison.plugins.trimr.proxy_shape import REASONING
from jettison.plugins.trimr.proxy_usage import merged
from jettison.plugins.trimr.sse import DONE, encode

if TYPE_CHECKING:
    from jettison.plugins.trimr.proxy_request import Api, Watched
    from jettison.plugins.trimr.proxy_stream import ChoiceStream, Out


_OF_ONE_CHUNK = ("choices", "usage", "prompt_token_ids", "prompt_text")


class UpstreamError(Exception):
    """The upstream reported an error in the middle of a stream; `body` is what it said."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__("the upstream reported an error")
        self.body = body


async def together(streams: Sequence[ChoiceStream]) -> AsyncIterator[Out]:
    """Yield the chunks of all choices as they come, those of one choice in order."""
    if len(streams) == 1:
        async for out in streams[0].chunks():
            yield out
        return
    queue: asyncio.Queue[Out | BaseException | None] = asyncio.Queue(maxsize=len(streams))

    async def run(stream: ChoiceStream) -> None:
        try:
            async for out in stream.chunks():
                await queue.put(out)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(run(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def as_events(watched: Watched, streams: Sequence[ChoiceStream]) -> AsyncIterator[bytes]:
    """Yield the events of the reply, the last with the usage if the client asked for it; an error ends the stream."""
    template: dict[str, Any] = {}
    alone = len(streams) == 1
    async for chunk, raw in together(streams):
        if "error" in chunk:
            yield raw or encode(chunk)
            break
        if chunk and not template:
            template = {name: value for name, value in chunk.items() if name not in _OF_ONE_CHUNK}
        if alone and raw is not None:
            yield raw
        elif chunk:
            yield encode({**chunk, "id": template["id"]} if "id" in template else chunk)
    else:
        if watched.include_usage:
            own = {**template, "choices": [], "usage": merged([stream.usage.total() for stream in streams])}
            whole = alone and not streams[0].usage.cuts
            yield (streams[0].last if whole else None) or encode(own)
    yield DONE


async def as_object(watched: Watched, streams: Sequence[ChoiceStream]) -> dict[str, Any]:
    """Return the reply of a client that does not stream.

    Raises:
        UpstreamError: the upstream reported an error.
    """
    choices = [_Choice(watched.api, index) for index in range(len(streams))]
    template: dict[str, Any] = {}
    async for chunk, _ in together(streams):
        if "error" in chunk:
            raise UpstreamError(chunk)
        template = template or {name: chunk[name] for name in ("id", "created", "model") if name in chunk}
        for choice in chunk.get("choices", ()):
            choices[choice["index"]].add(choice)
    kind = "chat.completion" if watched.api == "chat" else "text_completion"
    usage = merged([stream.usage.total() for stream in streams])
    return {
        "id": template.get("id"),
        "object": kind,
        "created": template.get("created"),
        "model": template.get("model"),
        "choices": [choice.finished() for choice in choices],
        "usage": usage,
    }


class _Choice:
    """Gathers the chunks of one choice."""

    def __init__(self, api: Api, index: int) -> None:
        self._api, self._index = api, index
        self._texts: dict[str, list[str]] = {}
        self._end: dict[str, Any] = {"finish_reason": None}
        self._ids: list[int] | None = None

    def add(self, choice: dict[str, Any]) -> None:
        texts = choice if self._api == "completions" else choice.get("delta") or {}
        for name in ("text", "content", *REASONING):
            if isinstance(texts.get(name), str):
                self._texts.setdefault(name, []).append(texts[name])
        if isinstance(choice.get("token_ids"), list):
            self._ids = (self._ids or []) + choice["token_ids"]
        if choice.get("finish_reason") is not None:
            self._end = {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}

    def finished(self) -> dict[str, Any]:
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        ids = {"token_ids": self._ids} if self._ids is not None else {}
        if self._api == "completions":
            return {"index": self._index, "text": texts.get("text", ""), "logprobs": None, **self._end, **ids}
        thinking = {name: texts[name] for name in REASONING if texts.get(name)}
        message = {"role": "assistant", "content": texts.get("content") or None, **thinking}
        return {"index": self._index, "message": message, "logprobs": None, **self._end, **ids}
