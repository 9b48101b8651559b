"""What is done with the events of a batch, and the agent that brings them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zoneinfo import ZoneInfo

from analytics.read_models import live_counters
from kehu.clock import Clock
from kehu.commands import Progress
from kehu.events import Event, Recorded
from kehu.postgres import Pool
from kehu.streams import App, Guard, source


class CountLive:
    """Adds a batch to the live counters and moves the progress, in one transaction."""

    types: tuple[type[Event], ...] | None = None

    def __init__(self, pool: Pool, clock: Clock, timezone: ZoneInfo) -> None:
        self.pool, self.clock, self.timezone = pool, clock, timezone

    def __call__(self, events: Sequence[Recorded], progress: Progress) -> None:
        counts = live_counters.buckets(events, self.timezone, self.clock.now())
        with self.pool.connection() as connection, connection.transaction():
            live_counters.add(connection, counts)
            progress.write(connection)


def register(app: App, guard: Guard, topics: Sequence[str]) -> None:
    """Declare the agents of this application."""

    @app.agent(source(app, topics), concurrency=1, name="live_counters")
    async def live_counters_agent(stream: Any) -> None:
        await guard.work(stream)
