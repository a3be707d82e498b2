"""No client waits for ever on a server that stops: the middleware of `--middleware` in every composed command.

On SIGTERM vLLM 0.32 stops the engine first and its HTTP server second. In its default mode the engine's process gets
no time between its SIGTERM and its SIGKILL, and the task that receives its outputs is cancelled: whether the outputs
that abort the requests under way arrive is a race. A request whose output was lost waits for it without limit, and so
do its client and the HTTP server, which waits for its connections to close.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

GRACE_S = 1.0
"""Time for the requests that did get their output, after the engine has stopped."""

POLL_S = 0.1

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_ERROR = {"error": {"message": "the server is shutting down", "type": "ServiceUnavailableError", "code": 503}}


class EndOpenRequests:
    """ASGI middleware: once the server is told to exit, requests still open after `GRACE_S` are ended.

    A request that has no response yet is answered with status 503; a response that has begun breaks off.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.open: set[asyncio.Task[Any]] = set()
        self.ending = False
        self.watcher: asyncio.Task[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection of any ASGI type; only requests are watched."""
        server = getattr(scope["app"].state, "server", None) if "app" in scope else None
        task = asyncio.current_task()
        if scope["type"] not in ("http", "websocket") or server is None or task is None:
            await self.app(scope, receive, send)
            return
        if self.watcher is None:
            self.watcher = asyncio.create_task(self._watch(server))
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self.open.add(task)
        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            if not self.ending:
                raise
            if not begun and scope["type"] == "http":
                await _refuse(send)
        finally:
            self.open.discard(task)

    async def _watch(self, server: Any) -> None:
        while not server.should_exit:
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(GRACE_S)
        self.ending = True
        while True:
            for task in self.open:
                task.cancel("the server is shutting down")
            await asyncio.sleep(GRACE_S)


async def _refuse(send: Send) -> None:
    body = json.dumps(_ERROR).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
