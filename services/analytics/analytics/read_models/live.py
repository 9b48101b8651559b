"""The role `consumer`: keeps the live generation of a read model, whichever that is."""

from __future__ import annotations

import asyncio
import logging

from analytics import subscriptions
from analytics.read_models import generations
from analytics.read_models.base import GenerationalModel
from analytics.read_models.generations import KeepLive, Superseded
from analytics.settings import Settings
from kehu.kafka.consumer import ConsumerRunner
from kehu.postgres import TRANSIENT, Pool

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_PAUSE_SECONDS = 1.0


async def keep_live(pool: Pool, settings: Settings, name: str, topics: tuple[str, ...] = subscriptions.TOPICS) -> None:
    """Feed a read model until cancelled; after a switch go on as the new generation, from where its builder stopped.

    Raises:
        NotReady: the live generation is of another version than this release writes.
        SubscriptionStopped: too much is parked.
    """
    while True:
        try:
            model = await asyncio.to_thread(_live_model, pool, settings, name)
            await _consume(pool, settings, model, topics)
        except Superseded as error:
            log.info("another generation is live", extra={"projection": name, "reason": str(error)})
        except TRANSIENT as error:
            log.warning("the registry cannot be read", extra={"projection": name, "error": type(error).__name__})
            await asyncio.sleep(_PAUSE_SECONDS)


def _live_model(pool: Pool, settings: Settings, name: str) -> GenerationalModel:
    with pool.connection() as connection:
        return generations.live_model(connection, name, settings.zone)


async def _consume(pool: Pool, settings: Settings, model: GenerationalModel, topics: tuple[str, ...]) -> None:
    """Run one generation until it is not live any more, also when no event comes that would show it."""
    subscription = subscriptions.projection(model, KeepLive(pool, model), settings.consumer_batch)
    runner = ConsumerRunner(pool, settings.kafka_bootstrap, generations.SERVICE, subscription, topics=topics)
    consuming = asyncio.create_task(runner.run(), name=model.consumer)
    try:
        while not (await asyncio.wait({consuming}, timeout=_LOOK_SECONDS))[0]:
            if await asyncio.to_thread(_superseded, pool, model):
                return
        await consuming
    finally:
        consuming.cancel()
        await asyncio.gather(consuming, return_exceptions=True)


def _superseded(pool: Pool, model: GenerationalModel) -> bool:
    with pool.connection() as connection:
        current = generations.live(connection, model.name)
    return (current.version, current.generation) != (model.version, model.generation)
