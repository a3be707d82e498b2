"""Real local servers for the tests of trimr: a scripted model behind vLLM's HTTP interface, and verifiers of all moods.

The model's tokenizer is one id per character, but for the thinking strings, which are one special id each.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import ClientSession, web

from trimr_judges import Judge

T = TypeVar("T")
START, END = "<think>", "</think>"
SPECIAL = {START: 0x110000, END: 0x110001}
NAMES = {value: key for key, value in SPECIAL.items()}


def run(work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
    """Run a coroutine with a time limit."""

    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(limited())


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    parts = re.split(f"({re.escape(START)}|{re.escape(END)})", text)
    return [i for part in parts for i in ([SPECIAL[part]] if part in SPECIAL else map(ord, part))]


def decode(ids: list[int]) -> str:
    """Text of token ids."""
    return "".join(NAMES.get(i) or chr(i) for i in ids)


def template(messages: list[dict[str, Any]], opened: bool) -> str:
    """The chat template: opens a thinking block unless the model opens it itself."""
    return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]" + (START if opened else "")


@dataclass
class Upstream:
    """A scripted model and what it was asked.

    Attributes:
        model: the whole text that follows a prompt's text.
        reasoning: key for thinking beside the content, None for servers without a reasoning parser.
        ids: whether the server knows token ids and has a tokenizer.
        opened: the chat template opens the thinking block.
        delay_s: between tokens.
        refuse_continuation: status for completions after a chat, 0 for none.
        die_after: chunks after which the connection is cut, 0 for never.
        lag: tokens by which the text comes after its ids, as where a stop string might begin.
        judge: answers what asks for one token's probabilities.
    """

    model: Callable[[str], str]
    reasoning: str | None = "reasoning"
    ids: bool = True
    opened: bool = True
    delay_s: float = 0.0
    refuse_continuation: int = 0
    die_after: int = 0
    lag: int = 0
    judge: Judge | None = None
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    finished: int = 0
    cancelled: int = 0
    live: int = 0
    sent: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        if self.ids:
            app.router.add_post("/tokenize", self._tokenize)
            app.router.add_post("/detokenize", self._detokenize)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m"}]}, headers={"X-From": "upstream"})

    async def _tokenize(self, request: web.Request) -> web.Response:
        ids = encode((await request.json())["prompt"])
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": 10**6})

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": decode((await request.json())["tokens"])})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(("chat", body))
        prompt = template(body["messages"], self.opened)
        if body.get("continue_final_message"):
            prompt = template(body["messages"][:-1], False) + body["messages"][-1]["content"]
        return await self._answer(request, "chat", body, prompt)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.judge is not None and body.get("logprobs"):
            return await self.judge.answer_completions(request)
        self.requests.append(("completions", body))
        prompt = body["prompt"]
        if self.refuse_continuation and len(self.requests) > 1:
            return web.json_response({"error": {"message": "no"}}, status=self.refuse_continuation)
        return await self._answer(request, "completions", body, decode(prompt) if isinstance(prompt, list) else prompt)

    async def _answer(self, request: web.Request, api: str, body: dict[str, Any], prompt: str) -> web.StreamResponse:
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        tokens = encode(self.model(prompt))
        finish = "stop" if limit is None or len(tokens) <= limit else "length"
        tokens = tokens[:limit]
        usage = {"prompt_tokens": len(encode(prompt)), "total_tokens": 0, "completion_tokens": len(tokens)}
        usage["total_tokens"] = usage["prompt_tokens"] + len(tokens)
        writer = _Writer(self, api, body, encode(prompt))
        if not body.get("stream"):
            return web.json_response(writer.whole(tokens, finish, usage))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        self.live += 1
        try:
            for at, chunk in enumerate(writer.chunks(tokens, finish)):
                await response.write(sse(chunk))
                self.sent += 1
                if self.die_after and at + 1 == self.die_after and request.transport is not None:
                    request.transport.abort()
                await asyncio.sleep(self.delay_s)
            if (body.get("stream_options") or {}).get("include_usage"):
                await response.write(sse({**writer.head, "choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
            self.finished += 1
        except (ConnectionError, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.live -= 1
        return response


class _Writer:
    """Chunks in the style of vLLM 0.32."""

    def __init__(self, upstream: Upstream, api: str, body: dict[str, Any], prompt: list[int]) -> None:
        self.up, self.api, self.body, self.prompt = upstream, api, body, prompt
        kind = "chat.completion.chunk" if api == "chat" else "text_completion"
        self.head = {"id": f"{api}-1", "object": kind, "created": 7, "model": body["model"]}
        self.wants_ids = bool(upstream.ids and body.get("return_token_ids"))
        self.thinking = decode(prompt).rfind(START) > decode(prompt).rfind(END)

    def chunks(self, tokens: list[int], finish: str) -> list[dict[str, Any]]:
        made = []
        if self.api == "chat":
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            made.append({**self.head, "choices": [first]})
            if self.up.ids:
                made[0] |= {"prompt_token_ids": self.prompt if self.wants_ids else None, "prompt_text": None}
        lag = self.up.lag if self.body.get("stop") else 0
        for at, token in enumerate(tokens):
            last = at == len(tokens) - 1
            shown = tokens[max(0, at - lag) : len(tokens) if last else at - lag + 1] if at >= lag or last else []
            made += self._chunk(token, shown, finish if last else None, first=at == 0)
        return made

    def _chunk(self, token: int, shown: list[int], finish: str | None, first: bool) -> list[dict[str, Any]]:
        choice: dict[str, Any] = {"index": 0}
        if self.api == "completions":
            choice |= {"text": decode(self._visible(shown)), "logprobs": None, "finish_reason": finish}
            if self.up.ids:
                choice["prompt_token_ids"] = self.prompt if first and self.wants_ids else None
        else:
            delta = self._delta(shown)
            if not delta and finish is None and not self.wants_ids:
                return []
            choice |= {"delta": delta, "logprobs": None, "finish_reason": finish}
        if self.up.ids:
            choice["token_ids"] = [token] if self.wants_ids else None
        return [{**self.head, "choices": [choice]}]

    def _visible(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i not in NAMES or not self.body.get("skip_special_tokens", True)]

    def _delta(self, shown: list[int]) -> dict[str, str]:
        if self.up.reasoning is None:
            return {"content": decode(self._visible(shown))} if shown else {}
        delta: dict[str, str] = {}
        for token in shown:
            if token in NAMES:
                self.thinking = NAMES[token] == START
            else:
                name = self.up.reasoning if self.thinking else "content"
                delta[name] = delta.get(name, "") + decode([token])
        return delta

    def whole(self, tokens: list[int], finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        text = decode(tokens)
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"text": text} if self.api == "completions" else {"message": {"role": "assistant", "content": text}}
        return {**self.head, "choices": [choice], "usage": usage}


def sse(data: dict[str, Any]) -> bytes:
    """One event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on a local port; yields its URL."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield "http://127.0.0.1:{1}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


async def post(url: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """POST a JSON body; status and the whole answer."""
    async with ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.read()


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    """The JSON objects of a stream."""
    events = [event[6:] for event in body.decode().split("\n\n") if event.startswith("data: ")]
    assert events, body
    assert events[-1] == "[DONE]", body
    return [json.loads(event) for event in events[:-1]]


def joined(chunks: list[dict[str, Any]], *names: str, index: int = 0) -> str:
    """The text under these names of one choice's deltas (or of a completion's choices)."""
    parts = []
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            if choice["index"] == index:
                place = choice.get("delta", choice)
                parts += [place[name] for name in names if place.get(name)]
    return "".join(parts)
