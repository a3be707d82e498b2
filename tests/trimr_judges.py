"""A local verifier for the tests of trimr: right, or failing in every way a server can fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import Any

from aiohttp import web

MOODS = ("429", "500", "huge", "utf8", "shape", "list", "nan", "no logprobs", "echo", "deep", "reset", "hang")


@dataclass
class Judge:
    """A verifier whose answers are scripted.

    Attributes:
        decide: P(yes) for a prompt's text.
        mood: `right`, or how it fails: see `_mood`.
        chat_only: it has no plain completions.
        words: token texts of yes and no.
        pieces: how its tokenizer cuts a form, None where it has no /tokenize.
    """

    decide: Callable[[str], float] = lambda prompt: 0.9
    mood: str = "right"
    chat_only: bool = False
    words: tuple[str, str] = (" Yes", " No")
    pieces: Callable[[str], list[str]] | None = None
    prompts: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        if not self.chat_only:
            app.router.add_post("/v1/completions", self.answer_completions)
        if self.pieces is not None:
            app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/v1/models", self._models)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "judge"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        assert self.pieces is not None
        return web.json_response({"tokens": [1], "token_strs": self.pieces((await request.json())["prompt"])})

    async def answer_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a list of prompts."""
        body = await request.json()
        return await self._mood(request, body, list(body["prompt"]), self._completion)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = "\n".join(message["content"] for message in body["messages"])
        return await self._mood(request, body, [prompt], self._chat_answer)

    def _top(self, prompt: str) -> list[tuple[str, float]]:
        yes = self.decide(prompt)
        return [(self.words[0], log(yes)), (self.words[1], log(1 - yes))]

    def _completion(self, prompts: list[str]) -> dict[str, Any]:
        tops = [{"top_logprobs": [dict(self._top(prompt))]} for prompt in prompts]
        return {"choices": [{"index": i, "text": "", "logprobs": top} for i, top in enumerate(tops)]}

    def _chat_answer(self, prompts: list[str]) -> dict[str, Any]:
        top = [{"token": token, "logprob": logprob} for token, logprob in self._top(prompts[0])]
        return {"choices": [{"index": 0, "logprobs": {"content": [{"top_logprobs": top}]}}]}

    async def _mood(
        self, request: web.Request, body: dict[str, Any], prompts: list[str], answer: Callable[[list[str]], Any]
    ) -> web.StreamResponse:
        self.prompts += prompts
        self.batches.append(len(prompts))
        self.bodies.append(body)
        if self.mood == "right":
            return web.json_response(answer(prompts))
        if self.mood == "hang":
            await asyncio.sleep(60)
        if self.mood == "reset":
            assert request.transport is not None
            request.transport.abort()
        bad: dict[str, Any] = {
            "429": web.Response(status=429), "500": web.Response(status=500, text="oops"),
            "huge": web.Response(body=b" " * (10 << 20)), "utf8": web.Response(body=b'{"choices": "\xff\xfe"}'),
            "shape": web.json_response({"choices": [{"index": 0, "message": {"content": "Yes"}}]}),
            "list": web.json_response([1, 2]), "nan": web.Response(text='{"choices": NaN}'),
            "no logprobs":
                web.json_response({"choices": [{"index": i, "logprobs": None} for i, _ in enumerate(prompts)]}),
            "echo": web.json_response({"prompt": prompts}), "deep": web.Response(text="[" * 100_000),
            "reset": web.Response(),
        }  # fmt: skip
        found = bad[self.mood]
        assert isinstance(found, web.StreamResponse)
        return found
