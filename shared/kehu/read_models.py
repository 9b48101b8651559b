"""Read models: one query family each, fed from a log in batches, with the place in the log in the same transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from kehu.commands import StaleProgress
from kehu.events import Event, Recorded
from kehu.eventstore import Cursor, EventStore
from kehu.follower import Listener
from kehu.postgres import TRANSIENT, Connection

log = logging.getLogger(__name__)


class ReadModel(Protocol):
    """Rows that answer one family of questions. A change of its tables is a new version with new tables, never an ALTER in place.

    `name` and `version` name the cursor (`leads_v1`); `types` are the events it looks at (None: all).
    """

    name: str
    version: int
    types: tuple[type[Event], ...] | None

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        """Write the rows of these events, in order, in the caller's transaction: one or few statements for the batch.

        A recorded fact is never refused.
        """
        ...

    def truncate(self, connection: Connection) -> None:
        """Forget everything, before a rebuild."""
        ...


def label(read_model: ReadModel) -> str:
    """The name of its cursor, tables and metrics, e.g. `leads_v1`."""
    return f"{read_model.name}_v{read_model.version}"


def of_interest(read_model: ReadModel, events: Sequence[Recorded]) -> list[Recorded]:
    """The events that a read model looks at."""
    return [e for e in events if read_model.types is None or e.is_a(*read_model.types)]


class Projector:
    """Feeds a read model from the service's own log.

    Args:
        batch: events in one transaction, 1 to 10 000.
    """

    def __init__(self, store: EventStore, read_model: ReadModel, batch: int = 500) -> None:
        self.store, self.read_model, self.batch = store, read_model, batch
        self.name = label(read_model)
        self.cursor: Cursor | None = None

    def position(self, connection: Connection) -> Cursor:
        """The stored cursor; made at zero when there is none."""
        connection.execute("INSERT INTO cursors (name) VALUES (%s) ON CONFLICT DO NOTHING", (self.name,))
        row = connection.execute(
            "SELECT txid::text::bigint, position FROM cursors WHERE name = %s", (self.name,)
        ).fetchone()
        assert row is not None
        return Cursor(*row)

    def step(self) -> int:
        """Apply the next batch in one transaction and give the number of events.

        Raises:
            StaleProgress: another projector of this read model moved on; the next step starts from its place.
        """
        with self.store.pool.connection() as connection:
            if self.cursor is None:
                self.cursor = self.position(connection)
            rows = self.store.read(self.cursor, self.batch, connection)
            if not rows:
                return 0
            last = rows[-1].cursor
            try:
                with connection.transaction():
                    moved = connection.execute(
                        "UPDATE cursors SET txid = %s::text::xid8, position = %s, moved_at = now()"
                        " WHERE name = %s AND txid = %s::text::xid8 AND position = %s",
                        (str(last.txid), last.position, self.name, str(self.cursor.txid), self.cursor.position),
                    )
                    if moved.rowcount != 1:
                        raise StaleProgress(self.name)
                    wanted = of_interest(self.read_model, [row.recorded() for row in rows])
                    if wanted:
                        self.read_model.apply(connection, wanted)
            except BaseException:
                self.cursor = None  # read it again: it may or may not have been committed
                raise
            self.cursor = last
            return len(rows)

    def rebuild(self) -> int:
        """Empty the read model and feed it from the beginning. Returns the number of events. The live projector must stand still."""
        with self.store.pool.connection() as connection, connection.transaction():
            self.position(connection)
            connection.execute("UPDATE cursors SET txid = '0', position = 0 WHERE name = %s", (self.name,))
            self.read_model.truncate(connection)
        self.cursor = None
        total = 0
        while count := self.step():
            total += count
        return total

    async def run(self, listener: Listener) -> None:
        """Follow the log until cancelled. Transient errors are waited out; any other ends the process, which is started again."""
        pause = 0.1
        async for _ in listener.rings():
            try:
                while await asyncio.to_thread(self.step) > 0:
                    pause = 0.1
            except (*TRANSIENT, StaleProgress) as error:
                log.warning("projector waits", extra={"projector": self.name, "error": type(error).__name__})
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)
