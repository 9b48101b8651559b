"""Being the only one: a lease row on the database's clock, with an epoch, that a paused holder cannot keep.

An advisory lock alone is not enough: a stopped process keeps its connection and with it the lock. Here a standby that
sees an expired lease raises the epoch and ends the old holder's backend; a holder whose backend is gone loses the lease
at once, without waiting for it to expire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Self

import psycopg
from psycopg.rows import TupleRow

from kehu.eventstore import Cursor
from kehu.postgres import dsn

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process holds the lease, or this one slept past its end: nothing of it may be used any more."""


# The holder is the backend's application_name as well, so that a process id that PostgreSQL gave to somebody else in
# the meantime is neither taken for the holder nor ended.
_LOOK = """
SELECT epoch, expires_at > clock_timestamp()
       AND EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = l.backend_pid AND a.application_name = l.holder)
FROM leases l WHERE name = %s
"""
_TAKE = """
INSERT INTO leases AS l (name, holder, epoch, expires_at, backend_pid)
VALUES (%(name)s, %(holder)s, 1, clock_timestamp() + make_interval(secs => %(seconds)s), pg_backend_pid())
ON CONFLICT (name) DO UPDATE SET holder = EXCLUDED.holder, epoch = l.epoch + 1, expires_at = EXCLUDED.expires_at,
    backend_pid = EXCLUDED.backend_pid
WHERE l.epoch = %(seen)s
RETURNING epoch
"""
_END = """
SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a
WHERE a.pid = %(pid)s AND a.application_name = %(holder)s AND a.pid <> pg_backend_pid()
"""
# One statement, so that the lease's row lock covers the move of the cursor: nobody else can be in between.
_RENEW = """
WITH mine AS (
    UPDATE leases SET expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
    WHERE name = %(name)s AND epoch = %(epoch)s RETURNING epoch
), moved AS (
    INSERT INTO cursors AS c (name, txid, position)
    SELECT %(name)s, %(txid)s::text::xid8, %(position)s FROM mine
    ON CONFLICT (name) DO UPDATE SET txid = EXCLUDED.txid, position = EXCLUDED.position, moved_at = now()
    WHERE (c.txid, c.position) < (EXCLUDED.txid, EXCLUDED.position)
)
SELECT count(*) FROM mine
"""


class Lease:
    """A lease on a name, held by one connection of its own. The connection must go to PostgreSQL directly or by session.

    Args:
        url: of the service's database.
        name: what is leased; the cursor of the same name is moved together with it.
        holder: who asks, for people; at most 63 bytes and unique to the process.
        seconds: how long the lease lasts without renewal. It is renewed every fifth of that.
        look: seconds between a standby's looks.
    """

    def __init__(self, url: str, name: str, holder: str, seconds: float = 5.0, look: float = 0.25) -> None:
        self.name, self.seconds, self.look = name, seconds, look
        self.holder = holder.encode()[:63].decode(errors="ignore")
        self.epoch = 0
        self._dsn = dsn(url, self.holder, statement_timeout=seconds)
        self._connection: psycopg.AsyncConnection[TupleRow] | None = None
        self._until = 0.0
        # One statement at a time; a renewal that waits behind another would renew too late to know.
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Wait until the lease is ours. Raises psycopg.OperationalError when the database cannot be reached."""
        self._connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
        try:
            while not await self._try():  # noqa: ASYNC110 what we wait for happens in the database
                await asyncio.sleep(self.look)
        except BaseException:
            await self._connection.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give it back, so that a standby need not wait; when that fails it expires by itself."""
        assert self._connection is not None
        self._until = 0.0
        try:
            async with asyncio.timeout(2.0):
                await self._connection.execute(
                    "UPDATE leases SET expires_at = clock_timestamp() WHERE name = %s AND epoch = %s",
                    (self.name, self.epoch),
                )
        except (psycopg.Error, TimeoutError) as error:
            log.info("the lease was not given back", extra={"lease": self.name, "error": type(error).__name__})
        finally:
            await self._connection.close()

    async def _try(self) -> bool:
        assert self._connection is not None
        row = await (await self._connection.execute(_LOOK, (self.name,))).fetchone()
        if row is not None and row[1]:
            return False
        seen = row[0] if row is not None else 0
        old = await (
            await self._connection.execute(
                "SELECT backend_pid, holder FROM leases WHERE name = %s AND epoch = %s", (self.name, seen)
            )
        ).fetchone()
        asked = time.monotonic()
        taken = await (
            await self._connection.execute(
                _TAKE, {"name": self.name, "holder": self.holder, "seconds": self.seconds, "seen": seen}
            )
        ).fetchone()
        if taken is None:
            return False  # another standby was quicker
        self.epoch, self._until = taken[0], asked + self.seconds
        if old is not None:
            await self._connection.execute(_END, {"pid": old[0], "holder": old[1]})
        log.info("the lease is ours", extra={"lease": self.name, "epoch": self.epoch, "holder": self.holder})
        return True

    def check(self) -> None:
        """Raises LeaseLost when the lease may have expired, without asking the database: after a pause of the process this
        is what stops it before it acts."""
        if time.monotonic() >= self._until:
            raise LeaseLost(
                f"{self.name}: the lease of epoch {self.epoch} ran out {time.monotonic() - self._until:.1f} s ago"
            )

    async def renew(self, cursor: Cursor) -> None:
        """Renew the lease and move its cursor forward, in one statement. The cursor never moves back.

        Raises:
            LeaseLost: another process holds it now.
            psycopg.OperationalError: the database cannot be reached.
        """
        assert self._connection is not None
        async with self._turn:
            self.check()
            asked = time.monotonic()
            parameters = {
                "name": self.name,
                "epoch": self.epoch,
                "seconds": self.seconds,
                "txid": str(cursor.txid),
                "position": cursor.position,
            }
            row = await (await self._connection.execute(_RENEW, parameters)).fetchone()
            if row is None or row[0] != 1:
                self._until = 0.0
                raise LeaseLost(f"{self.name}: the lease of epoch {self.epoch} was taken by another holder")
            self._until = asked + self.seconds

    async def cursor(self) -> Cursor:
        """The saved cursor; 0:0 when there is none yet."""
        assert self._connection is not None
        async with self._turn:
            row = await (
                await self._connection.execute(
                    "SELECT txid::text::bigint, position FROM cursors WHERE name = %s", (self.name,)
                )
            ).fetchone()
        return Cursor(*row) if row is not None else Cursor()

    async def reset(self) -> None:
        """Set the cursor back to the beginning of the log."""
        assert self._connection is not None
        async with self._turn:
            self.check()
            await self._connection.execute(
                "UPDATE cursors SET txid = '0', position = 0, moved_at = now() WHERE name = %s", (self.name,)
            )
