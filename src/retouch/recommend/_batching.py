"""Questions that arrive at about the same time are computed together, in one thread, in the order in which they came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .answers import Answer, Request

__all__ = ["Batcher", "Late"]

Work = Callable[[Sequence[Request], float], Sequence[Answer]]


class Late(Exception):
    """An answer was not there when it was due."""


@dataclass(eq=False)
class _Asked:
    request: Request
    until: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Collect questions and compute them together.

    A question that comes alone does not wait. Where others wait already, a few milliseconds more fill the batch.

    Args:
        work: Answers a batch; the second argument is when the first of them is due, by `time.monotonic`.
        most: Questions of a batch.
        wait_s: How long a batch waits for more.
    """

    def __init__(self, work: Work, most: int, wait_s: float) -> None:
        self.work, self.most, self.wait_s = work, most, wait_s
        self._task: asyncio.Task[None] | None = None
        self._closed = True

    def start(self) -> None:
        """Begin to compute, in the loop that is running."""
        self._queue: asyncio.Queue[_Asked | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "retouch-answers")
        self._closed = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Compute what was asked before, then end."""
        self._closed = True
        await self._queue.put(None)
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def ask(self, request: Request, until: float) -> Answer:
        """Return the answer to one question.

        Raises:
            Late: It is not there by `until`, or the server is shutting down.
        """
        if self._closed:
            raise Late
        asked = _Asked(request, until, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(asked)
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                return await asked.answer
        except TimeoutError:
            raise Late from None

    async def in_thread(self, function: Callable[[], object]) -> object:
        """Run something in the thread that computes, after what is running."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _run(self) -> None:
        going = True
        while going:
            batch, going = await self._batch()
            batch = [asked for asked in batch if not asked.answer.done() and asked.until > time.monotonic()]
            if batch:
                await self._compute(batch)

    async def _batch(self) -> tuple[list[_Asked], bool]:
        first = await self._queue.get()
        if 1 <= self._queue.qsize() < self.most - 1 and first is not None:
            await asyncio.sleep(self.wait_s)
        batch: list[_Asked] = []
        at: _Asked | None = first
        while at is not None:
            batch.append(at)
            if len(batch) >= self.most or self._queue.empty():
                return batch, True
            at = self._queue.get_nowait()
        return batch, False

    async def _compute(self, batch: list[_Asked]) -> None:
        requests, until = [asked.request for asked in batch], min(asked.until for asked in batch)
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self.work, requests, until)
        except Exception as error:  # told to everyone who asked; the server goes on
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
            return
        for asked, answer in zip(batch, answers):
            if not asked.answer.done():
                asked.answer.set_result(answer)
