"""How scoring is put together: its parts for each role, no logic."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kehu.clock import Clock
from kehu.commands import CommandHandler, Context, Request
from kehu.eventstore import EventStore
from kehu.follower import Listener, Notifier
from kehu.ids import derived
from kehu.kafka.topics import group_of, topic_of
from kehu.migrations import create_database, of_service
from kehu.migrations import migrate as apply_migrations
from kehu.postgres import Pool, open_pool
from kehu.privacy import NoKeys
from kehu.read_models import Projector
from kehu.runtime import Service, current_role
from kehu.timers import Timer, TimerRunner
from scoring.domain.default_model import DEFAULT_MODEL
from scoring.domain.scoring_model import PublishModel
from scoring.handlers import Reconsider, handlers
from scoring.processes import decay
from scoring.processes.rescoring import Rescoring
from scoring.read_models.published_models import Books
from scoring.read_models.scores import Scores
from scoring.settings import ScoringSettings

# What only one role needs is imported there: the other processes start sooner and are smaller.
if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass(frozen=True)
class Parts:
    """What roles are made of."""

    settings: ScoringSettings
    clock: Clock
    pool: Pool
    store: EventStore
    books: Books
    handler: CommandHandler


@contextlib.contextmanager
def parts(settings: ScoringSettings) -> Iterator[Parts]:
    """The parts of one process, closed at its end."""
    clock = settings.clock()
    pool = open_pool(settings.database_url, "scoring", settings.pool_size)
    notifier = Notifier(pool)
    try:
        store = EventStore(pool, "scoring")
        books = Books()
        handler = CommandHandler(store, handlers(books, clock), clock, NoKeys(), notifier.ring)
        yield Parts(settings, clock, pool, store, books, handler)
    finally:
        notifier.stop()
        pool.close()


def migrate(settings: ScoringSettings) -> None:
    """Bring the database up to date and publish the first model, both once."""
    apply_migrations(create_database(settings.postgres_url, settings.database), of_service("scoring"))
    with parts(settings) as made:
        command_id = derived("scoring", "the first model")
        context = Context("service:scoring", str(command_id), str(command_id))
        command = PublishModel(DEFAULT_MODEL, "The model that a new suite begins with.", made.clock.now())
        made.handler.handle([Request(command, command_id, context)])


async def api(settings: ScoringSettings) -> None:
    """The HTTP API."""
    from kehu.http import serve

    with parts(settings) as made:
        await serve(app_of(made), settings)


def app_of(made: Parts) -> FastAPI:
    """The application over these parts."""
    from kehu.gate import CommandGate
    from kehu.http import create_app
    from scoring.api.routes import parked_events, router

    role = current_role()

    async def postgres() -> None:
        await asyncio.to_thread(made.pool.check)

    if role is not None:
        role.health.add("postgres", postgres)
    return create_app(
        made.settings,
        title="Kehu scoring",
        description="How ready is this lead, and why.",
        routers=[router, parked_events],
        gate=CommandGate(made.handler),
        health=role.health if role else None,
        state={"clock": made.clock, "pool": made.pool, "store": made.store, "books": made.books},
    )


async def relay(settings: ScoringSettings) -> None:
    """The log → Kafka."""
    from kehu.kafka.relay import Relay

    with parts(settings) as made:
        await Relay(made.pool, made.store, settings.kafka_bootstrap, topic_of("scoring"), clock=made.clock).run()


async def projector(settings: ScoringSettings) -> None:
    """The log → lists."""
    with parts(settings) as made:
        async with Listener(settings.database_url) as listener:
            await Projector(made.store, Scores()).run(listener)


async def consumer(settings: ScoringSettings) -> None:
    """Leads and behaviours → scores."""
    from kehu.kafka.consumer import ConsumerRunner
    from scoring import subscriptions

    with parts(settings) as made:
        subscription = subscriptions.scores(made.handler)
        await ConsumerRunner(made.pool, settings.kafka_bootstrap, "scoring", subscription).run()


async def timer(settings: ScoringSettings) -> None:
    """What goes on over time: scores that fade, and leads under a new model."""
    from kehu.kafka.heard import HeardClock
    from scoring import subscriptions

    with parts(settings) as made:
        subscription = subscriptions.scores(made.handler)
        heard = HeardClock(
            made.clock,
            made.pool,
            settings.kafka_bootstrap,
            group_of("scoring", subscription.name),
            [topic_of(name) for name in subscription.services],
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(heard.run(), name="heard")
            tasks.create_task(timers(made, heard).run(), name="decay")
            tasks.create_task(Rescoring(made.handler, made.books, made.clock).run(), name="rescoring")


def timers(made: Parts, clock: Clock) -> TimerRunner:
    """Fires the timers of fading scores.

    Args:
        clock: tells which are due. One that waits for what was not heard yet, so that no score fades by deafness.
    """
    return TimerRunner(made.handler, clock, "scoring", {decay.PROCESS: let_fade})


def let_fade(timer: Timer) -> Reconsider:
    """A timer is due: look at the lead as of then."""
    return Reconsider(decay.lead_of(timer), "decay", timer.due_at)


def rebuild(settings: ScoringSettings) -> None:
    """Build the read models from the beginning; the role `projector` must stand still."""
    with parts(settings) as made:
        Projector(made.store, Scores()).rebuild()


SERVICE = Service(
    "scoring",
    ScoringSettings,
    {
        "migrate": migrate,
        "api": api,
        "relay": relay,
        "projector": projector,
        "consumer": consumer,
        "timer": timer,
        "rebuild": rebuild,
    },
)
