"""All leads under a new model, in the background, in bounded batches.

What is left to do is what the leads themselves say: those whose last score is of an older model. So it needs no place of
its own to go on from, a restart loses nothing, and a lead that slipped through while the model changed is found as well.
"""

from __future__ import annotations

import asyncio
import logging
from uuid import UUID

from kehu.clock import Clock
from kehu.commands import CommandHandler, Context, Request
from kehu.eventstore import Conflict
from kehu.ids import uuid7
from kehu.postgres import TRANSIENT
from scoring.handlers import Reconsider
from scoring.read_models import inputs
from scoring.read_models.published_models import Books, NoModel

log = logging.getLogger(__name__)
# Held while a batch is scored, so that several processes do not score the same leads.
_LOCK = 0x73636F7265


class Rescoring:
    """Scores leads again whose last score is of an older model.

    Args:
        batch: leads in one transaction.
    """

    POLL_SECONDS = 1.0

    def __init__(self, handler: CommandHandler, books: Books, clock: Clock, batch: int = 200) -> None:
        self.handler, self.books, self.clock, self.batch = handler, books, clock, batch
        self._pool = handler.store.pool

    def step(self) -> int:
        """Score one batch and give its size; 0 as well when another process is at it."""
        with self._pool.connection() as connection:
            row = connection.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK,)).fetchone()
            if row is None or not row[0]:
                return 0
            try:
                version = self.books.in_force(connection).version
                leads = inputs.behind(connection, version, self.batch)
                if leads:
                    self._score(leads, version)
            finally:
                connection.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
        return len(leads)

    def _score(self, leads: list[UUID], version: int) -> None:
        now = self.clock.now()
        cause = f"scoring_model:{version}"
        self.handler.handle(
            [
                Request(Reconsider(lead, "model", now), uuid7(now), Context("service:scoring", cause, cause), at=now)
                for lead in leads
            ]
        )
        log.info("leads scored again", extra={"count": len(leads), "model_version": version})

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                scored = await asyncio.to_thread(self.step)
            except (*TRANSIENT, Conflict, NoModel) as error:
                log.warning("rescoring waits", extra={"error": type(error).__name__})
                scored = 0
            if scored < self.batch:
                await asyncio.sleep(self.POLL_SECONDS)
