"""From the store to Kafka: events a second in bulk, and the time from commit to topic at a trickle."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from uuid import NAMESPACE_OID, UUID, uuid5

import psycopg
import typer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

import kehu.migrations
from bench.kit import Contender, compare, console
from kehu.devstack import DevStack, create_database
from kehu.events import Envelope, Personal
from kehu.events.lead_intake import BehaviourRecorded, LeadCaptured
from kehu.eventstore import Cursor, EventStore, Pending
from kehu.follower import CHANNEL
from kehu.kafka.relay import BATCH_BYTES, Relay, key_of
from kehu.kafka.topics import PARTITIONS, ensure_topics, partition_of
from kehu.migrations import find, migrate
from kehu.postgres import Pool, dsn, open_pool

START = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
KINDS = ("page_viewed", "content_downloaded", "email_opened", "demo_attended")


def history(epoch: str, seed: str = "") -> Iterator[Pending]:
    """Endless events as they come in: for each customer a lead and four behaviours, 600 to 900 bytes in the envelope."""
    number = 0
    while True:
        customer, lead = uuid5(NAMESPACE_OID, f"c{seed}{number}"), uuid5(NAMESPACE_OID, f"l{seed}{number}")
        at = START + timedelta(seconds=number)
        captured = LeadCaptured(
            lead_id=lead,
            customer_id=customer,
            source="form",
            channel="website",
            contact=Personal.sealed("x" * 160),
            company="杭州云启科技有限公司",
            industry="software",
            region="zhejiang",
            rating="warm",
        )
        yield Pending(_envelope(f"lead-{lead}", 1, customer, at, epoch), captured)
        for version, kind in enumerate(KINDS, 1):
            behaviour = BehaviourRecorded(
                behaviour_id=uuid5(lead, kind),
                customer_id=customer,
                lead_id=lead,
                kind=kind,
                object="/pricing",
                channel="website",
            )
            yield Pending(_envelope(f"activity-{customer}-202601", version, customer, at, epoch), behaviour)
        number += 1


def _envelope(stream: str, version: int, customer: UUID, at: datetime, epoch: str) -> Envelope:
    return Envelope(
        id=uuid5(NAMESPACE_OID, f"{stream}@{version}"),
        producer="lead-intake",
        stream=stream,
        version=version,
        time=at,
        recorded=at,
        partition_key=str(customer),
        customer_id=str(customer),
        correlation_id=str(customer),
        causation_id=str(customer),
        actor="service:bench",
        traceparent=None,
        store_epoch=epoch,
    )


def fresh_store(postgres_url: str) -> tuple[Pool, EventStore, str]:
    """An empty store in a database of its own, with its URL."""
    url = create_database(postgres_url, f"bench_{secrets.token_hex(4)}")
    migrate(url, find("kehu", Path(kehu.migrations.__file__).parent))
    pool = open_pool(url, "bench", size=6)
    return pool, EventStore(pool, "lead-intake"), url


def fill(store: EventStore, events: int) -> None:
    """Append that many events, a thousand in a transaction."""
    pending = history(store.epoch)
    while events > 0:
        some = list(islice(pending, min(1000, events)))
        with store.pool.connection() as connection, connection.transaction():
            store.append(connection, some)
        events -= len(some)


async def _fresh_topic(bootstrap: str) -> str:
    """A topic whose partitions have taken a record each: right after it was made they refuse for a moment."""
    topic = f"bench.{secrets.token_hex(4)}"
    await ensure_topics(bootstrap, [topic])
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        await asyncio.gather(*[producer.send_and_wait(topic, b"{}", partition=p) for p in range(PARTITIONS)])
    return topic


# Bulk ----------------------------------------------------------------------------------------------------------------


def bare(bootstrap: str, messages: list[tuple[bytes, bytes]]) -> float:
    """The limit: aiokafka with nothing around it, a thousand records sent and then awaited, over and over."""

    async def run() -> float:
        topic = await _fresh_topic(bootstrap)
        producer = AIOKafkaProducer(
            bootstrap_servers=bootstrap, enable_idempotence=True, linger_ms=5, max_batch_size=BATCH_BYTES
        )
        await producer.start()
        try:
            start = time.perf_counter()
            for begin in range(0, len(messages), 1000):
                futures = [await producer.send(topic, value, key) for key, value in messages[begin : begin + 1000]]
                await asyncio.gather(*futures)
            return len(messages) / (time.perf_counter() - start)
        finally:
            await producer.stop()

    return asyncio.run(run())


def ours(bootstrap: str, pool: Pool, store: EventStore, events: int) -> float:
    """The relay from the first read of the log to the acknowledgement of the last event, its start not counted."""

    async def run() -> float:
        relay = Relay(pool, store, bootstrap, await _fresh_topic(bootstrap), compression=None)
        with pool.connection() as connection:
            newest = store.newest(connection)
        task = asyncio.create_task(relay.run())
        try:
            while relay.acknowledged is None:  # noqa: ASYNC110 it is measured as it is, without an event for us
                await asyncio.sleep(0.0005)
            start = time.perf_counter()
            while relay.acknowledged is None or relay.acknowledged < newest:
                await asyncio.sleep(0.002)
                if task.done():
                    task.result()
            return events / (time.perf_counter() - start)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return asyncio.run(run())


def bare_batches(bootstrap: str, messages: list[tuple[bytes, bytes]]) -> float:
    """The limit of the relay's own way: whole batches built by hand, four thousand records at a time, nothing read or saved."""

    async def run() -> float:
        topic = await _fresh_topic(bootstrap)
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True, max_batch_size=BATCH_BYTES)
        await producer.start()

        async def in_order(partition: int, batches: list[Any]) -> None:
            for batch in batches:
                await (await producer.send_batch(batch, topic, partition=partition))

        try:
            start = time.perf_counter()
            for begin in range(0, len(messages), 4000):
                batches: dict[int, list[Any]] = {}
                for key, value in messages[begin : begin + 4000]:
                    queue = batches.setdefault(partition_of(key), [])
                    if not queue or queue[-1].append(timestamp=None, key=key, value=value) is None:
                        queue.append(producer.create_batch())
                        queue[-1].append(timestamp=None, key=key, value=value)
                await asyncio.gather(*(in_order(p, queue) for p, queue in batches.items()))
            return len(messages) / (time.perf_counter() - start)
        finally:
            await producer.stop()

    return asyncio.run(run())


# Trickle -------------------------------------------------------------------------------------------------------------


async def bare_loop(url: str, store: EventStore, bootstrap: str, topic: str) -> None:
    """The limit of a trickle: LISTEN, read what is new, send it and wait, with no lease, no resuming and no order kept."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True)
    await producer.start()
    cursor = Cursor()
    async with await psycopg.AsyncConnection.connect(dsn(url, "bare"), autocommit=True) as connection:
        await connection.execute(f"LISTEN {CHANNEL}")
        while True:
            while rows := store.read(cursor, 500):
                futures = [await producer.send(topic, row.value(), key_of(row.state)) for row in rows]
                await asyncio.gather(*futures)
                cursor = rows[-1].cursor
            async for _ in connection.notifies(timeout=0.05, stop_after=1):
                pass


def publisher(kind: str, url: str, bootstrap: str, topic: str) -> None:
    """The process that publishes, in the trickle."""
    pool = open_pool(url, "publisher", size=3)
    store = EventStore(pool, "lead-intake")
    asyncio.run(
        bare_loop(url, store, bootstrap, topic) if kind == "bare" else Relay(pool, store, bootstrap, topic).run()
    )


def trickle(kind: str, postgres_url: str, bootstrap: str, seconds: float, rate: float) -> list[float]:
    """Milliseconds from the return of each commit to the arrival of its event at a consumer."""
    pool, store, url = fresh_store(postgres_url)

    async def run() -> list[float]:
        topic = await _fresh_topic(bootstrap)
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.relay", "--publisher", kind, "--of", f"{url} {bootstrap} {topic}"]
        )
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", fetch_max_wait_ms=500
        )
        await consumer.start()
        pending = history(store.epoch, secrets.token_hex(2))
        committed: dict[str, float] = {}
        arrived: dict[str, float] = {}  # may come before the writer's thread has noted that the commit returned

        async def arrivals() -> None:
            async for record in consumer:
                begin = record.value.find(b'"id":"') + 6
                arrived.setdefault(record.value[begin : begin + 36].decode(), time.perf_counter())

        def commit(connection: Any, one: Pending) -> None:
            with connection.transaction():
                store.append(connection, [one])
            committed[str(one.envelope.id)] = time.perf_counter()
            bell.execute(f"NOTIFY {CHANNEL}")  # outside the append's transaction, as the API does

        task = asyncio.create_task(arrivals())
        try:
            with psycopg.connect(dsn(url, "bell"), autocommit=True) as bell, pool.connection() as connection:
                for length in (3.0, seconds):  # the first one warms everything up
                    committed.clear()
                    begin = time.perf_counter()
                    for number in range(int(length * rate)):
                        await asyncio.to_thread(commit, connection, next(pending))
                        await asyncio.sleep(max(0.0, begin + (number + 1) / rate - time.perf_counter()))
                    deadline = time.perf_counter() + 30
                    while missing := committed.keys() - arrived.keys():
                        if time.perf_counter() > deadline:
                            raise RuntimeError(f"{len(missing)} events did not reach the topic in 30 s")
                        await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await consumer.stop()
            process.terminate()
            process.wait(10)
        return [(arrived[one] - at) * 1000 for one, at in committed.items()]

    try:
        return asyncio.run(run())
    finally:
        pool.close()


def main(
    events: Annotated[int, typer.Option(min=1000, help="Events of a round in bulk.")] = 60_000,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 3,
    rate: Annotated[float, typer.Option(min=1, help="Commits a second at the trickle.")] = 100.0,
    seconds: Annotated[float, typer.Option(min=1, help="Length of one trickle.")] = 8.0,
    publisher_: Annotated[str, typer.Option("--publisher", hidden=True)] = "",
    of: Annotated[str, typer.Option("--of", hidden=True)] = "",
) -> None:
    """Our relay beside bare aiokafka, in bulk and at a trickle, in the same run."""
    if publisher_:
        publisher(publisher_, *of.rsplit(" ", 2))
        return
    with DevStack() as stack:
        postgres, bootstrap = stack.address.postgres_url, stack.address.kafka_bootstrap
        pool, store, _ = fresh_store(postgres)
        with console.status(f"appending {events} events"):
            fill(store, events)
        messages: list[tuple[bytes, bytes]] = []
        cursor = Cursor()
        while rows := store.read(cursor, 10_000):
            messages += [(key_of(row.state), row.value()) for row in rows]
            cursor = rows[-1].cursor
        console.print(
            f"{len(messages)} events, {sum(len(v) for _, v in messages) // len(messages)} bytes each on average"
        )
        compare(
            f"Relay, {events} events in bulk",
            "events/s",
            [
                Contender("bare aiokafka, idempotent, 1 000 a batch", "limit", partial(bare, bootstrap, messages)),
                Contender("bare aiokafka, batches by hand", "limit", partial(bare_batches, bootstrap, messages)),
                Contender("relay: read, order, send, save", "ours", partial(ours, bootstrap, pool, store, events)),
            ],
            repeat,
        )
        pool.close()
        rounds: dict[str, list[list[float]]] = {"bare": [], "relay": []}

        def median(kind: str) -> float:
            rounds[kind].append(trickle(kind, postgres, bootstrap, seconds, rate))
            return statistics.median(rounds[kind][-1])

        def p99(kind: str) -> float:  # of the same rounds, in the same order
            return statistics.quantiles(rounds[kind].pop(0), n=100, method="inclusive")[98]

        for name, figure in (("p50", median), ("p99", p99)):
            compare(
                f"Commit to topic at {rate:.0f} commits/s, {name}",
                "ms",
                [
                    Contender("bare loop woken by NOTIFY", "limit", partial(figure, "bare")),
                    Contender("relay", "ours", partial(figure, "relay")),
                ],
                repeat,
                more_is_better=False,
            )


if __name__ == "__main__":
    typer.run(main)
