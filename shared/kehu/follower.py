"""Following a store's own log: polling that cannot miss an event, and a wake-up that only makes it quicker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator

import psycopg

from kehu.postgres import TRANSIENT, Pool, dsn

log = logging.getLogger(__name__)

CHANNEL = "kehu_events"
POLL_SECONDS = 0.1


class Notifier:
    """Rings after commits. NOTIFY stays outside the append's transaction, on its own connection, and rings that come together are one.

    A lost ring costs followers one poll interval, never an event, so errors only end the connection.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._bell = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Something was appended. Returns at once."""
        self._bell.set()

    def stop(self) -> None:
        self._stopping = True
        self._bell.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._bell.wait()
            self._bell.clear()
            if self._stopping:
                return
            try:
                with self._pool.connection(timeout=2) as connection:
                    connection.execute(f"NOTIFY {CHANNEL}")
            except psycopg.Error as error:
                log.debug("a wake-up was not sent", extra={"error": type(error).__name__})


class Listener:
    """Wakes a follower when the Notifier rings, and at the latest after the poll interval.

    Args:
        url: of the service's database. The connection is made anew when it breaks.
        poll: seconds after which to look without a ring.
    """

    def __init__(self, url: str, poll: float = POLL_SECONDS) -> None:
        self._dsn = dsn(url, "listener")
        self._poll = poll
        self._rung = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Listener:
        self._task = asyncio.create_task(self._listen(), name="listener")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def wait(self) -> None:
        """Return at a ring or after the poll interval."""
        with contextlib.suppress(TimeoutError):
            # Not wait_for: before Python 3.12 it can swallow a cancellation that comes together with a ring.
            async with asyncio.timeout(self._poll):
                await self._rung.wait()
        self._rung.clear()

    async def rings(self) -> AsyncIterator[None]:
        """Yield at once, then at every ring or poll interval."""
        while True:
            yield
            await self.wait()

    async def _listen(self) -> None:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._rung.set()  # something may have been committed before we listened
                    async for _ in connection.notifies():
                        self._rung.set()
            except TRANSIENT as error:
                log.info("listening again after an error", extra={"error": type(error).__name__})
            await asyncio.sleep(1.0)
