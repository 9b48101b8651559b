"""Durable timers: set in the transaction of a command, fired to the second, caught up after downtime.

A timer fires by a command whose id is derived from the timer and its due time, so firing twice does nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from kehu.clock import Clock
from kehu.commands import CommandHandler, Context, Failed, Request, StaleProgress
from kehu.eventstore import Conflict
from kehu.ids import derived
from kehu.postgres import TRANSIENT, Connection, Statement
from kehu.privacy import KeysUnavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timer:
    """Something to do at an instant of the domain's clock. One for each process and key."""

    process: str
    key: str
    due_at: datetime
    payload: Mapping[str, Any]
    attempts: int = 0

    @property
    def command_id(self) -> UUID:
        return derived("timer", self.process, self.key, self.due_at.isoformat())


def schedule(process: str, key: object, due_at: datetime, payload: Mapping[str, Any] | None = None) -> Statement:
    """Set or move a timer, as a row of a command's transaction."""
    return (
        "INSERT INTO timers (process, key, due_at, payload) VALUES (%s, %s, %s, %s) ON CONFLICT (process, key) DO UPDATE"
        " SET due_at = EXCLUDED.due_at, payload = EXCLUDED.payload, claimed_until = NULL, attempts = 0, error = NULL",
        (process, str(key), due_at, json.dumps(payload or {})),
    )


def cancel(process: str, key: object) -> Statement:
    """Take a timer back, as a row of a command's transaction."""
    return "DELETE FROM timers WHERE process = %s AND key = %s", (process, str(key))


@dataclass(frozen=True, slots=True)
class _Fired:
    """Removes the timers in the transaction of what they caused, unless they were moved meanwhile."""

    timers: Sequence[Timer]

    def write(self, connection: Connection) -> None:
        connection.execute(
            "DELETE FROM timers t USING unnest(%s::text[], %s::text[], %s::timestamptz[]) AS f (process, key, due_at)"
            " WHERE t.process = f.process AND t.key = f.key AND t.due_at = f.due_at",
            ([t.process for t in self.timers], [t.key for t in self.timers], [t.due_at for t in self.timers]),
        )


class TimerRunner:
    """Fires due timers. Several may run: each claims its own.

    Args:
        fire: for each process, what a timer becomes: a command with its business time, usually the due time.
        batch: timers in one transaction.
    """

    CLAIM_SECONDS = 30
    POLL_SECONDS = 0.25
    MOST_ATTEMPTS = 20

    def __init__(
        self,
        handler: CommandHandler,
        clock: Clock,
        service: str,
        fire: Mapping[str, Callable[[Timer], Any]],
        batch: int = 200,
    ) -> None:
        self.handler, self.clock, self.service, self.fire, self.batch = handler, clock, service, fire, batch
        self._pool = handler.store.pool

    def claim(self) -> list[Timer]:
        """Take due timers for this runner for half a minute, the earliest first."""
        with self._pool.connection() as connection:
            rows = connection.execute(
                "UPDATE timers t SET claimed_until = now() + make_interval(secs => %s), attempts = attempts + 1 FROM ("
                " SELECT process, key FROM timers WHERE due_at <= %s AND process = ANY(%s) AND attempts < %s"
                " AND (claimed_until IS NULL OR claimed_until < now()) ORDER BY due_at LIMIT %s FOR UPDATE SKIP LOCKED) due"
                " WHERE t.process = due.process AND t.key = due.key"
                " RETURNING t.process, t.key, t.due_at, t.payload, t.attempts",
                (self.CLAIM_SECONDS, self.clock.now(), list(self.fire), self.MOST_ATTEMPTS, self.batch),
            ).fetchall()
        return sorted((Timer(*row) for row in rows), key=lambda t: t.due_at)

    def step(self) -> int:
        """Fire one batch and give its size."""
        timers = self.claim()
        if timers:
            self._fire(timers)
        return len(timers)

    def _fire(self, timers: list[Timer]) -> None:
        try:
            requests = [self._request(timer) for timer in timers]
            outcomes = self.handler.handle(requests, _Fired(timers))
        except (*TRANSIENT, KeysUnavailable):
            raise
        except Exception as error:
            if len(timers) > 1:
                for timer in timers:  # find the broken one; the others must not wait for it
                    self._fire([timer])
                return
            self._note(timers[0], error)
            return
        for timer, outcome in zip(timers, outcomes, strict=True):
            if isinstance(outcome, Failed):  # a rule says that it is no longer due: that is an answer, not an error
                log.info("a timer was refused", extra={"timer": timer.process, "slug": outcome.refusal.slug})

    def _request(self, timer: Timer) -> Request[Any]:
        context = Context(f"service:{self.service}", str(timer.command_id), str(timer.command_id))
        return Request(self.fire[timer.process](timer), timer.command_id, context, at=timer.due_at)

    def _note(self, timer: Timer, error: Exception) -> None:
        """Keep the reason; it is tried again when the claim has run out, at most MOST_ATTEMPTS times, then stays for a person."""
        log.error(
            "a timer failed", extra={"timer": timer.process, "error": type(error).__name__, "attempts": timer.attempts}
        )
        with self._pool.connection() as connection:
            connection.execute(
                "UPDATE timers SET error = %s WHERE process = %s AND key = %s AND due_at = %s",
                (f"{type(error).__name__}: {error}"[:500], timer.process, timer.key, timer.due_at),
            )

    async def run(self) -> None:
        """Fire timers until cancelled."""
        while True:
            try:
                fired = await asyncio.to_thread(self.step)
            except (*TRANSIENT, KeysUnavailable, StaleProgress, Conflict) as error:
                log.warning("timers wait", extra={"error": type(error).__name__})
                fired = 0
            if fired < self.batch:
                await asyncio.sleep(self.POLL_SECONDS)
