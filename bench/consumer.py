"""From Kafka to a read model: events a second, with guard and decoding, beside the barest loop that does the same sums."""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Annotated

import orjson
import typer
from aiokafka import AIOKafkaConsumer, TopicPartition

from bench.kit import Contender, compare, console
from bench.relay import fresh_store, history
from kehu.devstack import DevStack
from kehu.events import Event, Recorded
from kehu.events.envelope import with_position
from kehu.events.lead_intake import BehaviourRecorded, LeadCaptured
from kehu.kafka.consumer import ConsumerRunner, Subscription
from kehu.kafka.effects import Effect, Project
from kehu.kafka.topics import PARTITIONS, ensure_topics
from kehu.postgres import Connection, Pool
from kehu.testing.kafka import HEADERS, Message, publish

TABLE = "CREATE TABLE customers_v1 (customer_id text PRIMARY KEY, leads integer NOT NULL, behaviours integer NOT NULL)"
UPSERT = (
    "INSERT INTO customers_v1 AS c SELECT * FROM unnest(%s::text[], %s::int[], %s::int[]) ON CONFLICT (customer_id)"
    " DO UPDATE SET leads = c.leads + EXCLUDED.leads, behaviours = c.behaviours + EXCLUDED.behaviours"
)


def upsert(connection: Connection, sums: dict[str, list[int]]) -> None:
    """One statement for a batch."""
    connection.execute(UPSERT, (list(sums), [s[0] for s in sums.values()], [s[1] for s in sums.values()]))


class Customers:
    """The read model: leads and behaviours of each customer, from decoded events."""

    name, version = "customers", 1
    types: tuple[type[Event], ...] | None = (LeadCaptured, BehaviourRecorded)

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        sums: dict[str, list[int]] = {}
        for recorded in events:
            assert recorded.customer_id is not None
            sums.setdefault(recorded.customer_id, [0, 0])[isinstance(recorded.event, BehaviourRecorded)] += 1
        upsert(connection, sums)

    def truncate(self, connection: Connection) -> None:
        connection.execute("TRUNCATE customers_v1")


def bare(pool: Pool, bootstrap: str, topic: str, events: int, batch: int, write: bool) -> float:
    """The limit: getmany, orjson, a fold, and with `write` one upsert and the offsets in one transaction a batch. No version
    of a stream is looked at, nothing is validated, and a record it cannot read would end it."""

    async def run() -> float:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        )
        await consumer.start()
        consumer.assign([TopicPartition(topic, p) for p in range(PARTITIONS)])
        consumer_name, done, start = secrets.token_hex(4), 0, time.perf_counter()
        try:
            while done < events:
                sums: dict[str, list[int]] = {}
                ends: dict[int, int] = {}
                for tp, records in (await consumer.getmany(timeout_ms=500, max_records=batch)).items():
                    for record in records:
                        envelope = orjson.loads(record.value)
                        behaviour = envelope["type"].startswith("behaviour")
                        sums.setdefault(envelope["data"]["customer_id"], [0, 0])[behaviour] += 1
                    ends[tp.partition] = records[-1].offset + 1
                    done += len(records)
                if write and sums:
                    await asyncio.to_thread(commit, consumer_name, sums, ends)
            return events / (time.perf_counter() - start)
        finally:
            await consumer.stop()

    def commit(name: str, sums: dict[str, list[int]], ends: dict[int, int]) -> None:
        with pool.connection() as connection, connection.transaction():
            upsert(connection, sums)
            connection.execute(
                "INSERT INTO consumer_offsets (consumer, topic, partition, next_offset) SELECT %s, %s, * FROM"
                " unnest(%s::int[], %s::bigint[]) ON CONFLICT (consumer, topic, partition)"
                " DO UPDATE SET next_offset = EXCLUDED.next_offset",
                (name, topic, list(ends), list(ends.values())),
            )

    empty(pool)
    return asyncio.run(run())


def ours(pool: Pool, bootstrap: str, topic: str, events: int, batch: int) -> float:
    """The consumer: every event parsed, guarded by its stream's version and decoded, from the takeover to the last commit."""
    effect: Effect = Project(pool, Customers())

    async def run() -> float:
        subscription = Subscription(secrets.token_hex(4), ("lead-intake",), effect, batch=batch)
        runner = ConsumerRunner(pool, bootstrap, "bench", subscription, topics=[topic])
        task = asyncio.create_task(runner.run())
        try:
            while not runner.positions:  # noqa: ASYNC110 it is measured as it is, without an event for us
                await asyncio.sleep(0.0005)
            start = time.perf_counter()
            while sum(runner.positions.values()) < events:
                await asyncio.sleep(0.002)
                if task.done():
                    task.result()
            return events / (time.perf_counter() - start)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    empty(pool)
    rate = asyncio.run(run())
    with pool.connection() as connection:
        row = connection.execute("SELECT sum(leads + behaviours) FROM customers_v1").fetchone()
    if row is None or row[0] != events:
        raise RuntimeError(f"the read model has {row} events of {events}")
    return rate


def empty(pool: Pool) -> None:
    with pool.connection() as connection:
        connection.execute("TRUNCATE customers_v1, consumer_streams, consumer_offsets")


def main(
    events: Annotated[int, typer.Option(min=1000, help="Events on the topic.")] = 100_000,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 3,
) -> None:
    """Our consumer beside bare aiokafka with the same sums, at batches of 500 and 2 000, in the same run."""
    with DevStack() as stack:
        bootstrap = stack.address.kafka_bootstrap
        pool, store, _ = fresh_store(stack.address.postgres_url)
        with pool.connection() as connection:
            connection.execute(TABLE)
        topic = f"bench.{secrets.token_hex(4)}"
        asyncio.run(ensure_topics(bootstrap, [topic]))
        pending = history(store.epoch)
        with console.status(f"publishing {events} events"):
            for begin in range(0, events, 10_000):
                some = islice(pending, min(10_000, events - begin))
                messages = [
                    Message(
                        p.envelope.partition_key.encode(), with_position(p.envelope.encode(p.event), begin + n), HEADERS
                    )
                    for n, p in enumerate(some)
                ]
                asyncio.run(publish(bootstrap, topic, messages, PARTITIONS))
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)  # as kehu.runtime sets it in every process; for all contenders
        for batch in (2000, 500):
            compare(
                f"Kafka to read model, {events} events, {batch} a transaction",
                "events/s",
                [
                    Contender(
                        "getmany, orjson, fold", "limit", partial(bare, pool, bootstrap, topic, events, batch, False)
                    ),
                    Contender(
                        "with one upsert and offsets",
                        "limit",
                        partial(bare, pool, bootstrap, topic, events, batch, True),
                    ),
                    Contender(
                        "consumer: guard, decoding", "ours", partial(ours, pool, bootstrap, topic, events, batch)
                    ),
                ],
                repeat,
            )
        pool.close()


if __name__ == "__main__":
    typer.run(main)
