"""`jettison trimr proxy`: an HTTP server before any OpenAI-compatible one, which ends thinking that has settled.

What it does not watch it passes on byte for byte: other paths, requests with tools, structured output,
log-probabilities or pictures, and everything while trimming is off.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from jettison.hooks.errors import JettisonError
from jettison.plugins.trimr.endpoint import require_aiohttp
from jettison.plugins.trimr.metrics import Metrics
from jettison.plugins.trimr.proxy_reply import UpstreamError, as_events, as_object
from jettison.plugins.trimr.proxy_request import PATHS, Watched, watch
from jettison.plugins.trimr.proxy_stream import ChoiceStream, Tools
from jettison.plugins.trimr.proxy_upstream import HOP_BY_HOP, Upstream
from jettison.plugins.trimr.sse import DONE, StreamError, encode
from jettison.plugins.trimr.types import ThinkingStrings, TraceEvent
from jettison.plugins.trimr.verifier import VerifierClient, client_session

if TYPE_CHECKING:
    from aiohttp import ClientResponse, web

    from jettison.plugins.trimr.config import TrimROptions

METRICS_PATH = "/jettison/metrics"
MAX_REQUEST = 64 << 20
Log = Callable[[str, int, TraceEvent], None]


class Proxy:
    """The application. Use `app()`; it opens and closes what it needs with the server's life.

    Args:
        options: the section `trimr`.
        upstream: URL of the server behind, with or without a final /v1.
        enabled: false passes everything on as it is.
        thinking: the strings around thinking.
        chat_continuation: see `Tools`.
        log: gets (request, choice, event); None for no log.
        metrics: counters; made where None.
    """

    def __init__(
        self,
        options: TrimROptions,
        upstream: str,
        *,
        enabled: bool = True,
        thinking: ThinkingStrings | None = None,
        chat_continuation: bool = False,
        log: Log | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._options, self._url, self._enabled = options, upstream, enabled
        self._thinking = thinking or ThinkingStrings()
        self._chat_continuation = chat_continuation
        self._log = log
        self.metrics = metrics or Metrics()
        self._tools: Tools | None = None
        self._count = 0

    def app(self) -> web.Application:
        """Return the aiohttp application."""
        made = _web().Application(client_max_size=MAX_REQUEST)
        app: web.Application = made
        app.cleanup_ctx.append(self._life)
        app.router.add_get(METRICS_PATH, self._metrics_page)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _life(self, app: web.Application) -> AsyncIterator[None]:
        async with client_session() as session:
            upstream = Upstream(session, self._url)
            settings = self._options.verifier
            judge = None
            if self._enabled and settings.mode != "none":
                judge = VerifierClient(settings, session, self.metrics, url=f"{upstream.root}/v1")
                await judge.resolve()
            self._tools = Tools(upstream, self.metrics, self._thinking, judge, self._chat_continuation)
            yield
            if judge is not None:
                await judge.close()

    async def _metrics_page(self, request: web.Request) -> web.Response:
        return _web().Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """Watch a request or pass it on; an unreachable upstream is 502, options that are not valid are 400."""
        web = _web()
        body = await request.read()
        try:
            watched = self._watched(request, body)
        except JettisonError as error:
            return web.json_response({"error": _error(str(error), "BadRequestError", 400)}, status=400)
        try:
            if isinstance(watched, str):
                self._passed(watched)
                return await self._pass(request, body)
            return await self._reply(request, watched)
        except (require_aiohttp().ClientError, OSError, TimeoutError) as error:
            if request.transport is None or request.transport.is_closing():
                raise
            text = f"the upstream cannot be reached ({type(error).__name__})"
            return web.json_response({"error": _error(text, "BadGatewayError", 502)}, status=502)

    def _watched(self, request: web.Request, body: bytes) -> Watched | str:
        api = PATHS.get(request.path)
        if not self._enabled or api is None or request.method != "POST":
            return ""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return "invalid"
        return watch(api, content, self._options) if isinstance(content, dict) else "invalid"

    def _passed(self, reason: str) -> None:
        if reason:
            self.metrics.passed.labels(reason).inc()
            self.metrics.requests.labels("passed").inc()

    async def _pass(self, request: web.Request, body: bytes) -> web.StreamResponse:
        assert self._tools is not None
        answer = await self._tools.upstream.send(request.method, request.raw_path, _headers(request), body or None)
        return await _forward(request, answer)

    async def _reply(self, request: web.Request, watched: Watched) -> web.StreamResponse:
        assert self._tools is not None
        self._count += 1
        name = f"r{self._count}"
        headers = _headers(request)
        streams = [
            ChoiceStream(self._tools, watched, index, headers, self._log_of(name, index))
            for index in range(watched.choices)
        ]
        try:
            for stream in streams:
                answer = await stream.open()
                if answer.status != 200 or not answer.content_type.startswith("text/event-stream"):
                    return await _forward(request, answer)
            write = _stream if watched.stream else _object
            return await write(request, watched, streams)
        finally:
            for stream in streams:
                await stream.close()
            trimmed = any(stream.usage.cuts for stream in streams)
            self.metrics.requests.labels("trimmed" if trimmed else "whole").inc()

    def _log_of(self, request: str, choice: int) -> Callable[[TraceEvent], None] | None:
        log = self._log
        return None if log is None else lambda event: log(request, choice, event)


async def _stream(request: web.Request, watched: Watched, streams: list[ChoiceStream]) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    response: web.StreamResponse = _web().StreamResponse(headers=headers)
    await response.prepare(request)
    try:
        async for event in as_events(watched, streams):
            await response.write(event)
    except (require_aiohttp().ClientPayloadError, StreamError):
        await response.write(encode({"error": _error("the upstream broke off", "BadGatewayError", 502)}))
        await response.write(DONE)
    await response.write_eof()
    return response


async def _object(request: web.Request, watched: Watched, streams: list[ChoiceStream]) -> web.StreamResponse:
    try:
        content = await as_object(watched, streams)
    except UpstreamError as error:
        found = error.body.get("error")
        code = found.get("code") if isinstance(found, dict) else None
        status = code if type(code) is int and 400 <= code < 600 else 502
        return _web().json_response(error.body, status=status)
    except StreamError:
        return _web().json_response({"error": _error("the upstream broke off", "BadGatewayError", 502)}, status=502)
    return _web().json_response(content)


async def _forward(request: web.Request, answer: ClientResponse) -> web.StreamResponse:
    """Pass an answer on: status, headers and body as they are."""
    async with answer:
        dropped = HOP_BY_HOP - {"content-length"}
        kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in dropped]
        response: web.StreamResponse = _web().StreamResponse(status=answer.status, reason=answer.reason, headers=kept)
        await response.prepare(request)
        try:
            async for part in answer.content.iter_any():
                await response.write(part)
            await response.write_eof()
        except require_aiohttp().ClientPayloadError:
            # NOTES: the body was cut short, and so must ours be: a clean end would make it look whole.
            if request.transport is not None:
                request.transport.abort()
        return response


def _headers(request: web.Request) -> Mapping[str, str]:
    return {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": code}


def _web() -> Any:
    require_aiohttp()
    from aiohttp import web

    return web
