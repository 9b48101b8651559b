"""Rebuilding read models from the first event: events a second, switch included, beside the barest loop over the same topics."""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import orjson
import typer
from aiokafka import AIOKafkaConsumer, TopicPartition

from analytics.read_models import READ_MODELS
from analytics.read_models.rebuild import Rebuild, Step
from analytics.settings import Settings
from bench.kit import Contender, compare, console
from kehu.devstack import DevStack, create_database
from kehu.kafka.topics import PARTITIONS
from kehu.migrations import migrate, of_service
from kehu.postgres import Pool, open_pool
from kehu.testing.histories import history

TABLE = "CREATE TABLE bare (lead_id text PRIMARY KEY, events integer NOT NULL, newest text NOT NULL)"
UPSERT = (
    "INSERT INTO bare AS b SELECT * FROM unnest(%s::text[], %s::int[], %s::text[]) ON CONFLICT (lead_id)"
    " DO UPDATE SET events = b.events + EXCLUDED.events, newest = EXCLUDED.newest"
)


def bare(pool: Pool, bootstrap: str, topics: tuple[str, ...], events: int, batch: int) -> float:
    """The limit: getmany, orjson, one upsert a batch. Nothing is guarded, decoded, attributed or switched."""

    async def run() -> float:
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
        await consumer.start()
        consumer.assign([TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)])
        done, start = 0, time.perf_counter()
        try:
            while done < events:
                sums: dict[str, list[int | str]] = {}
                for records in (await consumer.getmany(timeout_ms=500, max_records=batch)).values():
                    for record in records:
                        envelope = orjson.loads(record.value)
                        lead = envelope["data"].get("lead_id") or envelope["subject"]
                        known = sums.setdefault(lead, [0, ""])
                        known[0] = int(known[0]) + 1
                        known[1] = envelope["time"]
                    done += len(records)
                if sums:
                    await asyncio.to_thread(write, sums)
            return events / (time.perf_counter() - start)
        finally:
            await consumer.stop()

    def write(sums: dict[str, list[int | str]]) -> None:
        with pool.connection() as connection:
            rows = sorted(sums.items())
            connection.execute(UPSERT, ([k for k, _ in rows], [v[0] for _, v in rows], [v[1] for _, v in rows]))

    with pool.connection() as connection:
        connection.execute("TRUNCATE bare")
    return asyncio.run(run())


def rebuild(settings: Settings, topics: tuple[str, ...], name: str, events: int) -> float:
    """From the first event that is read to the moment when the new generation is live."""
    steps: list[Step] = []
    asyncio.run(Rebuild(settings, name, steps.append, topics=topics).run())
    (live,) = [step for step in steps if step.state == "live"]
    if live.done != events:
        raise RuntimeError(f"{live.done} events of {events}")
    return live.rate


def main(
    events: Annotated[int, typer.Option(min=2000, help="About how many events on the topics.")] = 200_000,
    batch: Annotated[int, typer.Option(min=100, max=10_000, help="Events in one transaction.")] = 2000,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 3,
) -> None:
    """Every read model of analytics, rebuilt beside its live one. The mark is a million events a minute: 16 667 a second."""
    with DevStack() as stack:
        address = stack.address
        with console.status("publishing"):
            made = history(1, events // 17)
            topics = asyncio.run(made.publish(address.kafka_bootstrap, secrets.token_hex(4)))
        count = len(made)
        del made
        database = f"bench_{secrets.token_hex(4)}"
        url = create_database(address.postgres_url, database)
        migrate(url, of_service("analytics"))
        settings = Settings(
            environment="development",
            jwt_secret="x" * 32,
            postgres_url=address.postgres_url,
            database=database,
            kafka_bootstrap=address.kafka_bootstrap,
            lake_path=Path("lake"),
            rebuild_batch=batch,
        )
        pool = open_pool(url, "bench", 2)
        with pool.connection() as connection:
            connection.execute(TABLE)
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)  # as kehu.runtime sets it in every process; for all contenders
        limit = Contender(
            "getmany, orjson, one upsert", "limit", partial(bare, pool, address.kafka_bootstrap, topics, count, batch)
        )
        ours = [Contender(name, "ours", partial(rebuild, settings, topics, name, count)) for name in READ_MODELS]
        figures = compare(f"Rebuild, {count:,} events, {batch} a transaction", "events/s", [limit, *ours], repeat)
        for figure in figures[1:]:
            console.print(f"{figure.name}: {figure.median * 60 / 1e6:.2f} million events a minute")
        pool.close()


if __name__ == "__main__":
    typer.run(main)
