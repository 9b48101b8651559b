"""The asynchronous front of the command handler: requests that arrive together share one transaction and one flush to disk."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from kehu.commands import CommandHandler, Outcome, Request
from kehu.postgres import TRANSIENT
from kehu.privacy import KeysUnavailable


class Overloaded(Exception):
    """Too many commands wait already: try again in a moment."""


class Unavailable(Exception):
    """The store or the key service cannot be reached; whether the command was carried out is not known. Resend it with the same id."""


@dataclass(slots=True)
class _Waiting:
    request: Request[Any]
    answer: asyncio.Future[Outcome]


class CommandGate:
    """Collects concurrent commands into batches. No command waits for company: a batch is what came while the last one was committed.

    Args:
        batch: the most commands in one transaction.
        workers: transactions under way at once; a second one fills the time in which the first waits for the disk.
        waiting: the most commands that may wait; beyond that submit raises Overloaded.
    """

    def __init__(self, handler: CommandHandler, batch: int = 128, workers: int = 2, waiting: int = 2000) -> None:
        self.handler = handler
        self.batch = batch
        self._workers = workers
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(maxsize=waiting)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to work; call it inside the running event loop."""
        self._tasks = [asyncio.create_task(self._work(), name=f"command-gate-{n}") for n in range(self._workers)]

    async def stop(self) -> None:
        """Finish what waits, then end. No new command may be submitted."""
        await self._queue.join()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    @property
    def depth(self) -> int:
        """Commands that wait now."""
        return self._queue.qsize()

    async def submit(self, request: Request[Any]) -> Outcome:
        """Carry out one command.

        Raises:
            Overloaded: the queue is full; nothing was done.
            Unavailable: the database or the key service cannot be reached.
        """
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise Overloaded from None
        return await waiting.answer

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await self._carry_out(batch)
            finally:
                for waiting in batch:
                    if not waiting.answer.done():  # the gate is being cancelled
                        waiting.answer.set_exception(Unavailable("the service is stopping"))
                    self._queue.task_done()

    async def _carry_out(self, batch: list[_Waiting]) -> None:
        try:
            outcomes = await asyncio.to_thread(self.handler.handle, [w.request for w in batch])
        except (*TRANSIENT, KeysUnavailable) as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(Unavailable(type(error).__name__))
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            for waiting in batch:  # one of them is broken: it must not fail its neighbours
                await self._carry_out([waiting])
        else:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                if not waiting.answer.done():  # the caller may have gone away
                    waiting.answer.set_result(outcome)
