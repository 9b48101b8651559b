"""Appending events: ours beside the stock `eventsourcing` recorder and beside one-row commits; 1, 8 and 32 writers, and batches."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import StoredEvent
from eventsourcing.postgres import PostgresApplicationRecorder, PostgresDatastore

import kehu.migrations
from bench.kit import Contender, compare, console
from kehu.clock import SystemClock
from kehu.commands import CommandHandler, Context, Done, Handles, Plan, Request, Step
from kehu.decider import Decider
from kehu.devstack import DevStack, create_database
from kehu.events import Event, Personal
from kehu.events.lead_intake import Contact, LeadDetailsUpdated
from kehu.eventstore import EventStore
from kehu.gate import CommandGate
from kehu.migrations import find, migrate
from kehu.postgres import open_pool

KEY = bytes(32)
CONTEXT = Context("user:bench", "correlation", "causation", None)


@dataclass(frozen=True)
class Update:
    """A command with personal data, so that the figure has decision and encryption in it."""

    lead_id: UUID
    customer_id: UUID


def _decide(command: Update, _: None) -> list[Event]:
    contact = Personal(Contact(name="王小明", phone="+8613800138000", email="wang.xiaoming@example.com"))
    facts: dict[str, str | int | float | bool] = {"employees": 120, "budget": 50_000, "wants_demo": True}
    return [LeadDetailsUpdated(lead_id=command.lead_id, customer_id=command.customer_id, contact=contact, facts=facts)]


update: Decider[Update, None] = Decider("lead", None, _decide, lambda state, _: state)


class OneKey:
    """Every customer has the same key: the look-up of keys is measured elsewhere."""

    def keys(self, customer_ids: Any) -> dict[str, bytes | None]:
        return dict.fromkeys(customer_ids, KEY)


def per_second(writers: int, seconds: float, once: Callable[[int], int]) -> float:
    """Let so many threads repeat `once` (which gives how many events it wrote) for some seconds."""
    counts = [0] * writers
    end = time.monotonic() + seconds

    def write(number: int) -> None:
        while time.monotonic() < end:
            counts[number] += once(number)

    start = time.monotonic()
    with ThreadPoolExecutor(writers) as threads:
        for finished in [threads.submit(write, number) for number in range(writers)]:
            finished.result()  # a writer that broke breaks the benchmark
    return sum(counts) / (time.monotonic() - start)


def through_the_gate(handler: CommandHandler, writers: int, seconds: float) -> float:
    """As the API does it: so many requests at once, each waiting for its own answer; the gate collects them."""

    async def scenario() -> float:
        gate = CommandGate(handler)
        gate.start()
        end = time.monotonic() + seconds

        async def client() -> int:
            count = 0
            while time.monotonic() < end:
                count += isinstance(await gate.submit(new_request()), Done)
            return count

        start = time.monotonic()
        total = sum(await asyncio.gather(*(client() for _ in range(writers))))
        elapsed = time.monotonic() - start
        await gate.stop()
        return total / elapsed

    return asyncio.run(scenario())


def new_request() -> Request[Update]:
    """A command on a stream that does not exist yet."""
    return Request(Update(uuid4(), uuid4()), uuid4(), CONTEXT)


def plan_update(request: Request[Update], _: Any) -> Plan:
    """As capture does it: the id is new, so there is nothing to load."""
    command = request.command
    return Plan([Step(f"lead-{command.lead_id}", update, command, str(command.customer_id), new=True)])


def contenders(
    url: str, seconds: float, most_writers: int
) -> tuple[Callable[[int, int], list[Contender]], Callable[[], None]]:
    """Set everything up once; gives a function of (writers, batch) and one that closes."""
    ours_url, stock_url, bare_url = (create_database(url, name) for name in ("bench_ours", "bench_stock", "bench_bare"))
    migrate(ours_url, find("kehu", Path(kehu.migrations.__file__).parent))
    pool = open_pool(ours_url, "bench", most_writers + 2)
    handler = CommandHandler(
        EventStore(pool, "lead-intake"),
        {Update: Handles(plan_update)},
        SystemClock(),
        OneKey(),
    )
    parts = psycopg.conninfo.conninfo_to_dict(stock_url)
    datastore = PostgresDatastore(
        str(parts["dbname"]), str(parts["host"]), str(parts["port"]), str(parts["user"]), str(parts.get("password", "")),
        pool_size=most_writers, max_overflow=2,
    )  # fmt: skip
    stock = PostgresApplicationRecorder(datastore, events_table_name="stored_events")
    stock.create_table()
    bare_connections = [psycopg.connect(bare_url, autocommit=True) for _ in range(most_writers)]
    bare_connections[0].execute(
        "CREATE TABLE IF NOT EXISTS events (stream uuid, version bigint, data bytea, PRIMARY KEY (stream, version))"
    )
    payload = json.dumps(
        {"contact": "x" * 180, "facts": {"employees": 120, "budget": 50_000}, "pad": "y" * 220}
    ).encode()

    def ours(batch: int) -> int:
        requests = [new_request() for _ in range(batch)]
        return sum(isinstance(outcome, Done) for outcome in handler.handle(requests))

    def stock_once(batch: int) -> int:
        stock.insert_events([StoredEvent(uuid4(), 1, "bench:Event", payload) for _ in range(batch)])
        return batch

    def bare(number: int, batch: int) -> int:
        if batch == 1:
            bare_connections[number].execute("INSERT INTO events VALUES (%b, 1, %b)", (uuid4(), payload))
        else:
            bare_connections[number].execute(
                "INSERT INTO events SELECT s, 1, d FROM unnest(%b::uuid[], %b::bytea[]) AS new (s, d)",
                ([uuid4() for _ in range(batch)], [payload] * batch),
            )
        return batch

    def make(writers: int, batch: int) -> list[Contender]:
        def ours_alone() -> float:
            return per_second(1, seconds, lambda _: ours(batch))

        limit = "one commit a row (psycopg)" if batch == 1 else f"unnest of {batch} (psycopg)"
        return [
            Contender(limit, "limit", lambda: per_second(writers, seconds, lambda n: bare(n, batch))),
            Contender(
                "eventsourcing recorder", "peer", lambda: per_second(writers, seconds, lambda _: stock_once(batch))
            ),
            Contender(
                "kehu", "ours", ours_alone if writers == 1 else lambda: through_the_gate(handler, writers, seconds)
            ),
        ]

    def close() -> None:
        pool.close()
        datastore.close()
        for connection in bare_connections:
            connection.close()

    return make, close


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one round")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batch", type=int, default=500, help="size of the batched append, 0 to leave it out")
    options = parser.parse_args()
    assert Aggregate is not None  # the library's domain module is loaded for all contenders alike
    with DevStack(kafka=False) as stack:
        make, close = contenders(stack.address.postgres_url, options.seconds, max(options.writers))
        try:
            for writers in options.writers:
                compare(f"Append one event a commit, {writers} writer(s)", "events/s", make(writers, 1), options.repeat)
            if options.batch:
                compare(
                    f"Append in batches of {options.batch}, 1 writer",
                    "events/s",
                    make(1, options.batch),
                    options.repeat,
                )
        finally:
            close()
    console.print(
        "Ours decides, encrypts the contact and records the command id; the others only write ready-made bytes."
    )


if __name__ == "__main__":
    main()
