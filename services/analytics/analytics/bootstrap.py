"""How analytics is put together: its parts for each role, no logic."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from analytics.read_models import READ_MODELS, generations
from analytics.read_models.live import keep_live
from analytics.settings import Settings
from analytics.subscriptions import TOPICS
from kehu.migrations import create_database, of_service
from kehu.migrations import migrate as apply_migrations
from kehu.postgres import Pool, open_pool
from kehu.runtime import Service, current_role

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kehu.kafka.guard import Place

log = logging.getLogger(__name__)


def migrate(settings: Settings) -> None:
    """Bring the database up to date."""
    apply_migrations(create_database(settings.postgres_url, settings.database), of_service("analytics"))


async def api(settings: Settings) -> None:
    """The HTTP API."""
    from kehu.http import serve
    from kehu.kafka.tail import Ends

    pool = open_pool(settings.database_url, "analytics", settings.pool_size)
    ends = Ends(settings.kafka_bootstrap, TOPICS)
    try:
        await serve(app_of(settings, pool, ends), settings)
    finally:
        await ends.close()
        pool.close()


def app_of(settings: Settings, pool: Pool, ends: Callable[[], Awaitable[Mapping[Place, int]]]) -> FastAPI:
    """The application over these parts.

    Args:
        ends: gives the end of each partition of the topics.
    """
    from analytics.api.routes import Funnels, parked_events, router
    from kehu.http import create_app

    assert settings.lake_path is not None
    role = current_role()
    return create_app(
        settings,
        title="Kehu analytics",
        description="Funnels, counts, timelines and conversion, over all that was recorded.",
        routers=[router, parked_events],
        health=role.health if role else None,
        state={
            "settings": settings,
            "clock": settings.clock(),
            "pool": pool,
            "ends": ends,
            "funnels": Funnels(settings.lake_path, settings.funnels_at_once),
        },
    )


async def consumer(settings: Settings) -> None:
    """Topics → read models in PostgreSQL, each with its own progress."""
    pool = open_pool(settings.database_url, "analytics-consumer", settings.pool_size)
    try:
        async with asyncio.TaskGroup() as tasks:
            for name in READ_MODELS:
                tasks.create_task(keep_live(pool, settings, name), name=name)
    finally:
        pool.close()


async def stream(settings: Settings) -> None:
    """Topics → live counters, by Faust."""
    from analytics.streams.app import forget_old_minutes, worker

    pool = open_pool(settings.database_url, "analytics-stream", settings.pool_size)
    cleaning = asyncio.create_task(forget_old_minutes(pool, settings.clock()), name="clean")
    try:
        async with worker(settings, pool) as made:
            role = current_role()
            if role is not None:
                role.on_stop(made.stop)
                role.health.add("stream", made.check)
            await made.run()
    finally:
        cleaning.cancel()
        await asyncio.gather(cleaning, return_exceptions=True)
        pool.close()


async def lake(settings: Settings) -> None:
    """Topics → the lake."""
    from analytics.read_models.lake import LakeLoader

    loader = LakeLoader(settings)
    role = current_role()
    if role is not None:
        role.on_stop(loader.stop)
        role.health.add("lake", loader.check)
    await loader.run()


async def rebuild(settings: Settings) -> None:
    """Build one read model anew beside the live one and switch; says on standard output how far it is."""
    from analytics.read_models.rebuild import EXPECTED, Rebuild, print_failure, print_step

    try:
        if settings.projection is None:
            raise generations.UnknownProjection("set KEHU_PROJECTION to the read model to rebuild")
        await Rebuild(settings, settings.projection, print_step, fresh=settings.rebuild_fresh).run()
    except EXPECTED as error:
        print_failure(error)
        raise


SERVICE = Service(
    "analytics",
    Settings,
    {
        "migrate": migrate,
        "api": api,
        "consumer": consumer,
        "stream": stream,
        "lake": lake,
        "rebuild": rebuild,
    },
)
