"""How lead-intake is put together: its parts for each role, no logic."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kehu.clock import Clock
from kehu.commands import CommandHandler
from kehu.eventstore import EventStore
from kehu.follower import Listener, Notifier
from kehu.kafka.topics import topic_of
from kehu.migrations import create_database, of_service
from kehu.migrations import migrate as apply_migrations
from kehu.postgres import Pool, open_pool
from kehu.privacy import PostgresKeyring
from kehu.read_models import Projector
from kehu.runtime import Service, current_role
from lead_intake.handlers import handlers
from lead_intake.read_models.leads import Leads
from lead_intake.settings import LeadIntakeSettings

# What only one role needs is imported there: the other processes start sooner and are smaller.
if TYPE_CHECKING:
    from fastapi import FastAPI

# How long a thread that writes a batch may keep the interpreter's lock while the event loop waits for it, in seconds. With
# Python's 5 ms a single capture beside an import takes twice as long.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class Parts:
    """What roles are made of."""

    settings: LeadIntakeSettings
    clock: Clock
    pool: Pool
    store: EventStore
    keyring: PostgresKeyring
    handler: CommandHandler


@contextlib.contextmanager
def parts(settings: LeadIntakeSettings) -> Iterator[Parts]:
    """The parts of one process, closed at its end."""
    assert settings.master_key is not None and settings.hash_key is not None, "the settings made sure"
    clock = settings.clock()
    pool = open_pool(settings.database_url, "lead-intake", settings.pool_size)
    keys = open_pool(settings.database_url, "lead-intake-keys", 2)  # asked while a connection of the other pool is held
    notifier = Notifier(pool)
    try:
        store = EventStore(pool, "lead-intake")
        keyring = PostgresKeyring(keys, settings.master_key)
        table = handlers(store, keyring, settings.hash_key, clock)
        handler = CommandHandler(store, table, clock, keyring, notifier.ring)
        yield Parts(settings, clock, pool, store, keyring, handler)
    finally:
        notifier.stop()
        keys.close()
        pool.close()


def migrate(settings: LeadIntakeSettings) -> None:
    """Make the database and bring its tables up to date."""
    apply_migrations(create_database(settings.postgres_url, settings.database), of_service("lead_intake"))


async def api(settings: LeadIntakeSettings) -> None:
    """The HTTP API."""
    from kehu.http import serve

    sys.setswitchinterval(SWITCH_SECONDS)
    with parts(settings) as made:
        await serve(app_of(made), settings)


def app_of(made: Parts) -> FastAPI:
    """The application over these parts."""
    from kehu.gate import CommandGate
    from kehu.http import create_app
    from lead_intake.api.bulk import BulkLane, Files
    from lead_intake.api.routes import Desk, router

    role = current_role()

    async def postgres() -> None:
        await asyncio.to_thread(made.store.pool.check)

    if role is not None:
        role.health.add("postgres", postgres)
    gate = CommandGate(made.handler)
    lane = BulkLane(made.handler, made.settings.bulk_at_once)
    files = Files(made.settings.imports_at_once)
    return create_app(
        made.settings,
        title="Kehu lead intake",
        description="Leads, customers, their behaviours, channels and imports.",
        routers=[router],
        gate=gate,
        health=role.health if role is not None else None,
        state={"desk": Desk(made.store, made.keyring, made.clock, gate, lane, files)},
    )


async def relay(settings: LeadIntakeSettings) -> None:
    """The log → Kafka."""
    from kehu.kafka.relay import Relay

    with parts(settings) as made:
        await Relay(made.pool, made.store, settings.kafka_bootstrap, topic_of("lead-intake"), clock=made.clock).run()


async def projector(settings: LeadIntakeSettings) -> None:
    """The log → lists of leads."""
    with parts(settings) as made:
        async with Listener(settings.database_url) as listener:
            await Projector(made.store, Leads()).run(listener)


def rebuild(settings: LeadIntakeSettings) -> None:
    """Lists of leads anew, from the first event on. The projector must stand still meanwhile."""
    with parts(settings) as made:
        Projector(made.store, Leads()).rebuild()


SERVICE = Service(
    "lead-intake",
    LeadIntakeSettings,
    {"migrate": migrate, "api": api, "relay": relay, "projector": projector, "rebuild": rebuild},
)
