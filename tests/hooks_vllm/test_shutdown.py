"""The middleware that ends open requests, under a real uvicorn server with a real client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from jettison.hooks.vllm import shutdown
from jettison.hooks.vllm.shutdown import EndOpenRequests


def app() -> FastAPI:
    made = FastAPI()
    made.add_middleware(EndOpenRequests)
    made.state.cancelled = 0

    @made.get("/never")
    async def never(request: Request) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            request.app.state.cancelled += 1
            raise

    @made.get("/soon")
    async def soon() -> dict[str, str]:
        await asyncio.sleep(shutdown.GRACE_S / 2)
        return {"answer": "whole"}

    @made.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> Any:
            yield b"first"
            await asyncio.Event().wait()

        return StreamingResponse(chunks())

    return made


async def ask(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


async def stopped_while(paths: list[str]) -> tuple[list[bytes], FastAPI]:
    """Ask for all paths, tell the server to exit while they are open, return what the clients got."""
    made = app()
    server = uvicorn.Server(uvicorn.Config(made, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    made.state.server = server
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    asking = [asyncio.create_task(ask(port, path)) for path in paths]
    await asyncio.sleep(0.2)
    server.should_exit = True
    answers = await asyncio.wait_for(asyncio.gather(*asking), 10 * shutdown.GRACE_S)
    await asyncio.wait_for(serving, 10 * shutdown.GRACE_S)
    return list(answers), made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "GRACE_S", 0.3)
    monkeypatch.setattr(shutdown, "POLL_S", 0.02)


def test_requests_that_would_wait_for_ever_are_answered_with_503() -> None:
    answers, made = asyncio.run(stopped_while(["/never"] * 8))
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503"), answer
        assert "shutting down" in json.loads(body)["error"]["message"]
    assert made.state.cancelled == 8


def test_requests_that_end_in_time_keep_their_answer() -> None:
    answers, _ = asyncio.run(stopped_while(["/soon", "/never"]))
    assert answers[0].startswith(b"HTTP/1.1 200")
    assert b"whole" in answers[0]
    assert answers[1].startswith(b"HTTP/1.1 503")


def test_a_stream_that_has_begun_breaks_off() -> None:
    answers, _ = asyncio.run(stopped_while(["/stream"]))
    assert answers[0].startswith(b"HTTP/1.1 200")
    assert b"first" in answers[0]
    assert not answers[0].endswith(b"0\r\n\r\n"), "a broken stream must not look complete"


def test_without_a_known_server_requests_pass_through() -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(EndOpenRequests(inner)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    asyncio.run(EndOpenRequests(inner)({"type": "http"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan", "http"]
