"""Micro-batches: prompts of several requests that come within a short window are asked together (section 5.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from jettison.plugins.trimr.prompts import Message

Prompt = list[Message]


class QueueFullError(Exception):
    """More prompts wait than are allowed."""


class Batcher:
    """Gathers prompts and sends them in batches. Lives in one event loop.

    Args:
        send: returns per prompt of a batch its score, or the exception for who waits for that prompt alone; what it
            raises reaches all who wait for that batch.
        window_s: how long the first prompt of a batch waits for others, seconds.
        max_batch: prompts per batch.
        max_queue: prompts that wait or are under way, at most.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Prompt]], Awaitable[Sequence[float | Exception]]],
        window_s: float,
        max_batch: int,
        max_queue: int,
    ) -> None:
        self._send = send
        self._window_s = window_s
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._waiting: list[tuple[Prompt, asyncio.Future[float]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = 0

    async def ask(self, prompts: Sequence[Prompt]) -> list[float]:
        """Return the scores of `prompts`, in their order.

        Raises:
            QueueFullError: there is no room for them.
        """
        if self._pending + len(prompts) > self._max_queue:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[float]] = [loop.create_future() for _ in prompts]
        self._pending += len(futures)
        try:
            for prompt, future in zip(prompts, futures, strict=True):
                self._waiting.append((prompt, future))
            self._arrange(loop)
            return await asyncio.gather(*futures)
        finally:
            self._pending -= len(futures)
            for future in futures:
                future.cancel()

    async def close(self) -> None:
        """Cancel what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _arrange(self, loop: asyncio.AbstractEventLoop) -> None:
        while len(self._waiting) >= self._max_batch:
            self._flush()
        if self._waiting and self._timer is None:
            self._timer = loop.call_later(self._window_s, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._flush()

    def _flush(self) -> None:
        taken, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
        batch = [(prompt, future) for prompt, future in taken if not future.done()]
        if batch:
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Sequence[tuple[Prompt, asyncio.Future[float]]]) -> None:
        try:
            scores = await self._send([prompt for prompt, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), score in zip(batch, scores, strict=True):
            if future.done():
                continue
            if isinstance(score, Exception):
                future.set_exception(score)
            else:
                future.set_result(score)
