"""The Faust application of analytics and its worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from analytics.read_models import live_counters
from analytics.settings import Settings
from analytics.streams.agents import CountLive, register
from analytics.subscriptions import LIVE_COUNTERS, TOPICS
from kehu.clock import Clock
from kehu.kafka.envelopes import EnvelopeReader
from kehu.kafka.tail import Ends
from kehu.postgres import TRANSIENT, Pool
from kehu.streams import Guard, StreamWorker, create_app

log = logging.getLogger(__name__)

_CLEAN_EVERY = 600.0  # seconds


@asynccontextmanager
async def worker(
    settings: Settings, pool: Pool, topics: tuple[str, ...] = TOPICS, name: str = LIVE_COUNTERS
) -> AsyncIterator[StreamWorker]:
    """The worker of the live counters."""
    effect = CountLive(pool, settings.clock(), settings.zone)
    guard = Guard(pool, name, effect, EnvelopeReader(), batch=settings.stream_batch, within=settings.stream_within)
    app = create_app(name, settings.kafka_bootstrap, guard.take_over)
    register(app, guard, topics)
    ends = Ends(settings.kafka_bootstrap, topics)
    try:
        yield StreamWorker(app, guard, settings.kafka_bootstrap, topics, ends, stall_seconds=settings.stall_seconds)
    finally:
        await ends.close()


async def forget_old_minutes(pool: Pool, clock: Clock) -> None:
    """Delete minutes that are not kept any longer, from time to time, until cancelled."""

    def clean() -> int:
        with pool.connection() as connection:
            return live_counters.forget_old_minutes(connection, clock.now())

    while True:
        try:
            deleted = await asyncio.to_thread(clean)
            while deleted:
                deleted = await asyncio.to_thread(clean)
        except TRANSIENT as error:
            log.warning("old minutes stay for now", extra={"error": type(error).__name__})
        await asyncio.sleep(_CLEAN_EVERY)
