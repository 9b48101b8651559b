"""The live counters on real Kafka and PostgreSQL: exact through kills, rebalances, repeats, broken records and Faust's own errors."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from analytics.read_models import live_counters
from analytics.settings import Settings
from analytics.streams.agents import CountLive
from analytics.streams.app import worker
from kehu import streams
from kehu.kafka import parked
from kehu.kafka.guard import Place
from kehu.kafka.topics import TopicMismatch, ensure_topics
from kehu.migrations import migrate, of_service
from kehu.postgres import Pool, open_pool
from kehu.streams import StreamWorker
from kehu.testing.fixtures import unique_name
from kehu.testing.histories import History, history
from kehu.testing.kafka import Message, message, publish, until

# A worker in a process of its own, on topics of a test.
WORKER = """
import asyncio, sys
from analytics.settings import Settings
from analytics.streams.app import worker
from kehu.postgres import open_pool
from kehu.runtime import end_with_parent

async def main():
    settings = Settings()
    async with worker(settings, open_pool(settings.database_url, "worker", 3), tuple(sys.argv[2:]), sys.argv[1]) as made:
        await made.run()

end_with_parent()
asyncio.run(main())
"""


@pytest.fixture
def settings(database: str, kafka_bootstrap: str, tmp_path: Path) -> Settings:
    migrate(database, of_service("analytics"))
    server, _, name = database.rpartition("/")
    return Settings(
        environment="development",
        jwt_secret="x" * 32,
        postgres_url=f"{server}/postgres",
        database=name,
        kafka_bootstrap=kafka_bootstrap,
        lake_path=tmp_path / "lake",
        stream_batch=200,
        stream_within=0.05,
    )


@pytest.fixture
def pool(settings: Settings) -> Iterator[Pool]:
    opened = open_pool(settings.database_url, "test", 6)
    yield opened
    opened.close()


@pytest.fixture
def name() -> str:
    return unique_name("live_counters")


def counted(pool: Pool, span: str = "day") -> Counter[str]:
    """What the counters say, by type."""
    with pool.connection() as connection:
        rows = connection.execute(
            "SELECT type, sum(events)::int FROM live_counters WHERE span = %s GROUP BY type", (span,)
        )
        return Counter(dict(rows.fetchall()))


def read(pool: Pool, name: str) -> int:
    """How many records the worker has behind it."""
    with pool.connection() as connection:
        row = connection.execute(
            "SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets WHERE consumer = %s", (name,)
        ).fetchone()
    assert row is not None
    return int(row[0])


def total(pool: Pool) -> int:
    return sum(counted(pool).values())


def by_type(made: History) -> Counter[str]:
    return Counter(r.type for recorded in made.recorded().values() for r in recorded)


@asynccontextmanager
async def running(settings: Settings, pool: Pool, topics: tuple[str, ...], name: str) -> AsyncIterator[StreamWorker]:
    """A worker in this process."""
    async with worker(settings, pool, topics, name) as made:
        task = asyncio.create_task(made.run())
        try:
            yield made
            if task.done():
                task.result()
        finally:
            await made.stop()
            await asyncio.gather(task, return_exceptions=True)


def start(settings: Settings, name: str, topics: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A worker in a process of its own."""
    environment = {
        **os.environ,
        "KEHU_ENVIRONMENT": "development",
        "KEHU_JWT_SECRET": "x" * 32,
        "KEHU_POSTGRES_URL": settings.postgres_url,
        "KEHU_DATABASE": settings.database,
        "KEHU_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "KEHU_LAKE_PATH": str(settings.lake_path),
        "KEHU_STREAM_BATCH": "200",
        "KEHU_PARENT": str(os.getpid()),
    }
    return subprocess.Popen([sys.executable, "-c", WORKER, name, *topics], env=environment)


@pytest.mark.req("AN-08")
async def test_counts_are_exact_through_kills_and_rebalances(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str
) -> None:
    """Two workers, killed in turn while events come in, some of them twice as after a crash of a relay."""
    made, rng = history(11, 800), random.Random(3)
    topics = tuple(f"{topic_prefix}.{topic}" for topic in made.topics)
    await ensure_topics(kafka_bootstrap, topics)
    workers = [start(settings, name, topics) for _ in range(2)]
    sent = 0
    try:
        for part in range(10):
            for topic, values in zip(topics, made.topics.values(), strict=True):
                size = -(-len(values) // 10)
                some = [Message(k.encode(), v) for k, v in values[part * size : (part + 1) * size]]
                again = some[-20:] if rng.random() < 0.5 else []  # a relay sends its last batch once more
                await publish(kafka_bootstrap, topic, some + again, 12)
                sent += len(some) + len(again)
            before = total(pool)
            if part in (2, 4, 6):
                await until(lambda: total(pool) > before, "the counters move", 60)  # noqa: B023 - waited for in the loop
                victim = rng.choice(workers)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                workers[workers.index(victim)] = start(settings, name, topics)
        # Everything is read, repeats included, before the sum is taken for final.
        await until(lambda: read(pool, name) == sent, "all records are read", 90)
        assert sent > len(made)
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert counted(pool) == by_type(made)
    with pool.connection() as connection:
        assert connection.execute("SELECT count(*) FROM parked_events").fetchone() == (0,)


async def test_offsets_that_faust_committed_are_not_believed(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str
) -> None:
    """The group's offsets are at the end, the database knows of nothing: everything is read. And the other way round."""
    made = history(12, 60)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    async with running(settings, pool, topics, name):
        await until(lambda: total(pool) == len(made), "all events are counted", 30)
    with pool.connection() as connection:
        for table in ("live_counters", "consumer_offsets", "consumer_streams"):
            connection.execute(f"DELETE FROM {table}")
    async with running(settings, pool, topics, name):
        await until(lambda: total(pool) == len(made), "all events are counted again", 30)
    another = unique_name("live_counters")  # a group that has committed nothing, with offsets in the database
    with pool.connection() as connection:
        connection.execute("UPDATE consumer_offsets SET consumer = %s", (another,))
        connection.execute("UPDATE consumer_streams SET consumer = %s", (another,))
    late = message("channel-late", 1)
    async with running(settings, pool, topics, another):
        await publish(kafka_bootstrap, topics[0], [late], 12)
        await until(lambda: total(pool) == len(made) + 1, "the new event is counted", 30)
    assert counted(pool) == by_type(made) + Counter({"channel.defined.v1": 1})


async def test_a_broken_record_is_parked_and_the_rest_goes_on(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str
) -> None:
    topic = f"{topic_prefix}.events"
    await ensure_topics(kafka_bootstrap, [topic])
    good = [message("channel-good", v) for v in (1, 2, 3)]
    unknown = message("channel-new", 1)
    unknown = Message(unknown.key, (unknown.value or b"").replace(b"channel.defined.v1", b"channel.repainted.v1"))
    bad = [
        Message(good[0].key, b"{not json"),
        Message(None, message("channel-keyless", 1).value),
        Message(b"other", message("channel-odd", 1).value),
        Message(good[0].key, None),
    ]
    await publish(kafka_bootstrap, topic, [good[0], *bad, good[1], unknown, good[2]], 12)
    async with running(settings, pool, (topic,), name):
        await until(lambda: total(pool) == 4, "what is sound is counted", 30)
        await until(lambda: len(parked.list_parked(pool, name)) == 4, "what is broken is parked", 30)
    assert counted(pool) == {"channel.defined.v1": 3, "channel.repainted.v1": 1}
    records = parked.list_parked(pool, name)
    assert {record.value for record in records} == {record.value for record in bad}
    assert all(dict(record.headers)["content-type"] for record in records)


class Picky(CountLive):
    """An effect with a bug for one event."""

    broken: set[tuple[str, int]] = set()
    calls = 0

    def __call__(self, events, progress) -> None:  # type: ignore[no-untyped-def]
        Picky.calls += 1
        if any((e.stream, e.version) in self.broken for e in events):
            raise ZeroDivisionError("a bug")
        super().__call__(events, progress)


async def test_an_event_that_fails_is_parked_with_those_behind_it_and_can_be_sent_again(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analytics.streams.app.CountLive", Picky)
    Picky.broken = {("channel-7", 2)}
    topic = f"{topic_prefix}.events"
    await ensure_topics(kafka_bootstrap, [topic])
    await publish(kafka_bootstrap, topic, [message(f"channel-{i}", v) for v in (1, 2, 3) for i in range(20)], 12)
    async with running(settings, pool, (topic,), name):
        await until(lambda: total(pool) == 58, "all others are counted", 30)
        waiting = await until(lambda: parked.list_parked(pool, name), "it is parked")
        assert [(p.stream, p.version, p.status) for p in waiting] == [
            ("channel-7", 2, "waiting"),
            ("channel-7", 3, "behind"),
        ]
        assert waiting[0].attempts == 4
        Picky.broken = set()
        parked.ask(pool, waiting[0].id, "replay", "user:test")
        await until(lambda: total(pool) == 60, "the repaired stream is counted", 30)
    assert parked.list_parked(pool, name) == []


async def test_the_database_may_go_away(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str, postgres_url: str
) -> None:
    """Nothing is parked or left out while the database refuses connections."""
    import psycopg

    made = history(13, 100)
    topics = tuple(f"{topic_prefix}.{topic}" for topic in made.topics)
    await ensure_topics(kafka_bootstrap, topics)
    async with running(settings, pool, topics, name) as stream:
        await until(lambda: len(stream.guard.positions) == 24, "partitions are ours", 30)
        with psycopg.connect(postgres_url, autocommit=True) as admin:
            admin.execute(f'ALTER DATABASE "{settings.database}" ALLOW_CONNECTIONS false')
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (settings.database,)
            )
            await made.publish(kafka_bootstrap, topic_prefix)
            await until(lambda: stream.guard.blocked, "the worker waits", 60)
            with pytest.raises(streams.Stalled):
                await stream.check()
            admin.execute(f'ALTER DATABASE "{settings.database}" ALLOW_CONNECTIONS true')
        await until(lambda: sum(stream.guard.positions.values()) == len(made), "all is read", 60)
    assert counted(pool) == by_type(made)
    assert parked.list_parked(pool, name) == []


@pytest.mark.req("AN-08")
async def test_without_its_topics_it_does_not_start(
    settings: Settings, pool: Pool, topic_prefix: str, name: str
) -> None:
    async with worker(settings, pool, (f"{topic_prefix}.missing",), name) as made:
        with pytest.raises(TopicMismatch, match="missing"):
            await made.run()
    assert not made.app.started


async def test_a_topic_that_was_made_anew_is_refused(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str
) -> None:
    topic = f"{topic_prefix}.events"
    await ensure_topics(kafka_bootstrap, [topic])
    with pool.connection() as connection:
        connection.execute("INSERT INTO consumer_offsets VALUES (%s, %s, 3, 100)", (name, topic))
    async with worker(settings, pool, (topic,), name) as made:
        with pytest.raises(TopicMismatch, match="another log"):
            await made.run()


async def test_a_worker_that_only_looks_alive_ends_itself(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust stops handing records over without an error."""
    topic = f"{topic_prefix}.events"
    await ensure_topics(kafka_bootstrap, [topic])

    async def nothing(self: object, stream: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(streams.Guard, "work", nothing)
    async with worker(settings, pool, (topic,), name) as made:
        made.stall_seconds, made.look_seconds = 2.0, 0.2
        await publish(kafka_bootstrap, topic, [message("channel-1", 1)], 12)
        with pytest.raises(streams.Stalled):
            await asyncio.wait_for(made.run(), 60)


async def test_records_that_faust_leaves_out_end_the_process(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was skipped is never acknowledged past, and nothing of the batch is applied."""
    ended: list[int] = []

    def give_up(code: int) -> None:
        ended.append(code)
        raise asyncio.CancelledError

    monkeypatch.setattr(streams, "give_up", give_up)
    async with worker(settings, pool, ("t",), name) as made:
        guard = made.guard
        guard.take_over([Place("t", 0)])
        record = _Record("t", 0, 0, message("channel-1", 1))
        await guard.handle([record])
        assert total(pool) == 1
        with pytest.raises(asyncio.CancelledError):
            await guard.handle([_Record("t", 0, 2, message("channel-1", 3))])
    assert ended == [streams.EXIT_UNHANDLED]
    assert total(pool) == 1
    assert guard.positions == {Place("t", 0): 1}


class _Record:
    def __init__(self, topic: str, partition: int, offset: int, made: Message) -> None:
        self.topic, self.partition, self.offset = topic, partition, offset
        self.key, self.value, self.headers = made.key, made.value, made.headers


async def test_a_worker_that_lost_its_partition_cannot_count(settings: Settings, pool: Pool, name: str) -> None:
    """Two guards on one partition, as when a paused process comes back: each record counts once."""
    places = [Place("t", 0)]
    async with worker(settings, pool, ("t",), name) as first, worker(settings, pool, ("t",), name) as second:
        records = [_Record("t", 0, v - 1, message("channel-1", v)) for v in range(1, 11)]
        first.guard.take_over(places)
        await first.guard.handle(records[:4])
        second.guard.take_over(places)
        await second.guard.handle(records[4:8])
        await first.guard.handle(records[2:7])  # it still has these in its buffer
        assert total(pool) == 8
        await first.guard.handle(records[7:])
        await second.guard.handle(records[8:])
    assert total(pool) == 10


def test_minutes_are_kept_for_some_days_only(settings: Settings, pool: Pool) -> None:
    made = [r for recorded in history(14, 20).recorded().values() for r in recorded]
    newest = max(r.time for r in made)
    with pool.connection() as connection:
        live_counters.add(connection, live_counters.buckets(made, settings.zone, newest))
        kept = [r for r in made if r.time >= newest - live_counters.MINUTES_KEPT]
        assert sum(counted(pool, "minute").values()) == len(kept) < len(made)
        assert sum(counted(pool, "day").values()) == len(made)
        gone = live_counters.forget_old_minutes(connection, newest + 2 * live_counters.MINUTES_KEPT)
        assert gone > 0
    assert counted(pool, "minute") == {}
    assert sum(counted(pool, "day").values()) == len(made)
