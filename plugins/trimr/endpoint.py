"""Calls to an OpenAI-compatible server that return next-token distributions, with everything bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jettison.hooks.errors import EnvironmentRefused
from jettison.plugins.trimr.prompts import Message, as_text
from jettison.plugins.trimr.scoring import NoAnswerError, chat_distribution, completion_distributions

if TYPE_CHECKING:
    import aiohttp

    from jettison.plugins.trimr.metrics import Fault

MAX_BODY = 4 << 20
"""Bytes of an answer that are read; a longer one is no answer."""
TOP = 20
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "stream": False}


class BadAnswerError(Exception):
    """The call failed; `reason` is the label it is counted under."""

    def __init__(self, reason: Fault) -> None:
        super().__init__(reason)
        self.reason = reason


class Endpoint:
    """One model of one server.

    Plain completions are used, all prompts of a batch in one call: they need no chat template, so no template can put
    a thinking block before Yes or No. A server that has none is asked by chat, one call per prompt, thinking switched
    off.

    Args:
        session: for all calls.
        url: base URL that ends in the version, for example http://127.0.0.1:8001/v1.
        model: its name, None for the server's first.
        headers: sent with every call.
        deadline_s: for each call, seconds.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str | None, headers: Mapping[str, str], deadline_s: float
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._model = model
        self._headers = dict(headers)
        self._deadline_s = deadline_s
        self._by_chat = False

    async def distributions(self, asked: Sequence[list[Message]]) -> list[list[tuple[str, float]]]:
        """Return each prompt's likeliest next tokens as (text, log-probability in nats).

        Raises:
            BadAnswerError: the call failed.
            NoAnswerError: the answer has another shape.
        """
        model = await self.model()
        if not self._by_chat:
            body = {"model": model, "prompt": [as_text(one) for one in asked], "logprobs": TOP, **_ONE_TOKEN}
            status, answer = await self._call("POST", f"{self._url}/completions", body)
            if status not in (404, 405):
                return completion_distributions(_good(status, answer), len(asked))
            self._by_chat = True
        return list(await asyncio.gather(*(self._chat(model, one) for one in asked)))

    async def model(self) -> str:
        """Return the model's name, asked for once."""
        if self._model is None:
            answer = _good(*await self._call("GET", f"{self._url}/models"))
            try:
                self._model = str(answer["data"][0]["id"])
            except (LookupError, TypeError) as error:
                raise BadAnswerError("shape") from error
        return self._model

    async def pieces(self, forms: Sequence[str]) -> dict[str, list[str]]:
        """Return how the server's tokenizer cuts each form; empty where the server does not tell."""
        root = self._url.removesuffix("/v1")
        found: dict[str, list[str]] = {}
        for form in forms:
            try:
                body = {"model": await self.model(), "prompt": form, "add_special_tokens": False}
                sent = {**body, "return_token_strs": True}
                answer = _good(*await self._call("POST", f"{root}/tokenize", sent))
                found[form] = [str(piece) for piece in answer["token_strs"]]
            except (BadAnswerError, LookupError, TypeError):
                return {}
        return found

    async def _chat(self, model: str, messages: list[Message]) -> list[tuple[str, float]]:
        body = {
            "model": model,
            "messages": [message._asdict() for message in messages],
            "logprobs": True,
            "top_logprobs": TOP,
            "chat_template_kwargs": {"enable_thinking": False},
            **_ONE_TOKEN,
        }
        return chat_distribution(_good(*await self._call("POST", f"{self._url}/chat/completions", body)))

    async def _call(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        aiohttp = require_aiohttp()
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                self._session.request(
                    method, url, json=body, headers={**self._headers, "Accept-Encoding": "identity"}
                ) as response,
            ):
                return response.status, await _bounded(response)
        except TimeoutError as error:
            raise BadAnswerError("timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise BadAnswerError("connection") from error


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_BODY:
            raise BadAnswerError("shape")
        parts.append(part)
    return b"".join(parts)


def _good(status: int, answer: bytes) -> Any:
    if status != 200:
        raise BadAnswerError("status")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise NoAnswerError("the answer is not JSON") from error


def require_aiohttp() -> Any:
    """Return the module aiohttp.

    Raises:
        EnvironmentRefused: it is not installed.
    """
    try:
        import aiohttp
    except ImportError as error:
        raise EnvironmentRefused("package 'aiohttp' is not installed", do="pip install 'jettison[think]'") from error
    return aiohttp
