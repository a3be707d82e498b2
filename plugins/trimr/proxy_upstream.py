"""The server behind the proxy: streams, and its tokenizer where it offers one (`/tokenize`, `/detokenize` of vLLM)."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jettison.plugins.trimr.endpoint import require_aiohttp

if TYPE_CHECKING:
    import aiohttp

HOP_BY_HOP = frozenset((
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "host", "content-length", "accept-encoding",
))  # fmt: skip
TOKENIZER_DEADLINE_S = 5.0
MAX_CACHED = 4096


class Upstream:
    """One server.

    Args:
        session: for all calls, without a time limit of its own and without decompression.
        url: where the server is, with or without a final /v1.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.root = url.rstrip("/").removesuffix("/v1")
        self._ids: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._no_tokenizer: set[str] = set()

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> aiohttp.ClientResponse:
        """Send a request and return the answer as soon as its headers are there; the caller closes it."""
        kept = {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
        kept.setdefault("Accept-Encoding", "identity")
        from yarl import URL

        url = URL(self.root + path, encoded=True)
        return await self._session.request(method, url, headers=kept, data=body, allow_redirects=False)

    async def post(self, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        """Send a JSON body."""
        kept = {name: value for name, value in headers.items() if name.lower() != "content-type"}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return await self.send("POST", path, {**kept, "Content-Type": "application/json"}, data)

    async def tokenize(self, model: str, text: str, headers: Mapping[str, str]) -> list[int] | None:
        """Return the token ids of a text (guidance, thinking strings: remembered), None where the server has none."""
        if (model, text) in self._ids:
            return self._ids[model, text]
        if model in self._no_tokenizer:
            return None
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = await self._ask("/tokenize", headers, body)
        ids = answer.get("tokens")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            if answer.get("status") in (404, 405, 501):
                self._no_tokenizer.add(model)
            return None
        self._ids[model, text] = ids
        if len(self._ids) > MAX_CACHED:
            self._ids.popitem(last=False)
        return ids

    async def detokenize(self, model: str, ids: list[int], headers: Mapping[str, str]) -> str | None:
        """Return the text of token ids, special ones included, or None where the server does not tell."""
        answer = await self._ask("/detokenize", headers, {"model": model, "tokens": ids})
        text = answer.get("prompt")
        return text if isinstance(text, str) else None

    async def _ask(self, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object that answers, or {"status": code} (0 where there was no answer)."""
        aiohttp = require_aiohttp()
        try:
            async with asyncio.timeout(TOKENIZER_DEADLINE_S):
                response = await self.post(path, headers, body)
                async with response:
                    if response.status != 200:
                        return {"status": response.status}
                    content = json.loads(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return {"status": 0}
        return content if isinstance(content, dict) else {"status": 0}
