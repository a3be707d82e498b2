"""A scripted thinker and the proxy before it, for the tests of trimr."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from jettison.plugins.trimr.config import TrimROptions
from jettison.plugins.trimr.proxy import Proxy
from trimr_servers import END, START, Upstream, post, run, serving

QUESTION = "How much is 7 times 6?"
ROUND = "Seven times six: let me compute it step by step. So the answer is 42.\n\nWait, let me double-check that. "
THOUGHTS = "First I look at the question.\n\n" + ROUND * 12
ANSWER = "The result is **42**."
FAST = {"min_think_tokens": 0, "min_thought_tokens": 8, "poll_tokens": 1}


def model(prompt: str) -> str:
    """Thinks twelve rounds unless guidance is there; after gentle guidance it concludes, after an end it answers."""
    if END in prompt.rsplit("[assistant]", 1)[-1]:
        return ANSWER
    if prompt.endswith("**Final Answer**\n"):
        return "42" + END + "\n\n" + ANSWER
    opened = prompt.endswith(START)
    return ("" if opened else START) + THOUGHTS + END + "\n\n" + ANSWER


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": QUESTION}], **more}


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": f"[user]{QUESTION}[assistant]{START}", "max_tokens": 9000, **more}


@asynccontextmanager
async def before(
    upstream: Upstream, options: TrimROptions | None = None, url_end: str = "", **more: Any
) -> AsyncIterator[tuple[Proxy, str]]:
    """(proxy, its address) with the proxy before an upstream."""
    async with serving(upstream.app()) as url:
        proxy = Proxy(options or TrimROptions(**FAST), url + url_end, **more)
        async with serving(proxy.app()) as address:
            yield proxy, address


def through(
    upstream: Upstream, path: str, body: dict[str, Any], options: TrimROptions | None = None, **more: Any
) -> tuple[tuple[int, bytes], Proxy]:
    """(status, body) by the proxy, and the proxy."""

    async def work() -> tuple[tuple[int, bytes], Proxy]:
        async with before(upstream, options, **more) as (proxy, address):
            return await post(address + path, body), proxy

    return run(work())


def direct(upstream: Upstream, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """(status, body) without the proxy."""

    async def work() -> tuple[int, bytes]:
        async with serving(upstream.app()) as url:
            return await post(url + path, body)

    return run(work())


def count(proxy: Proxy, name: str, **labels: str) -> float:
    """A counter."""
    return proxy.metrics.registry.get_sample_value(name, labels) or 0.0


BODIES = {
    "chat": ("/v1/chat/completions", chat(stream=True)),
    "chat with usage": ("/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True})),
    "chat, not streamed": ("/v1/chat/completions", chat()),
    "completion": ("/v1/completions", completion(stream=True)),
    "completion, not streamed": ("/v1/completions", completion()),
}
