"""The relay on real Kafka and PostgreSQL: everything, in order, without a hole, through the deaths and pauses of all."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import kehu.migrations
from kehu.devstack.kafka import EmbeddedKafka
from kehu.events import Recorded
from kehu.events.envelope import CONTENT_TYPE
from kehu.events.lead_intake import ChannelDefined
from kehu.eventstore import Cursor, EventStore, Pending
from kehu.follower import CHANNEL
from kehu.kafka import metrics
from kehu.kafka.lease import Lease, LeaseLost
from kehu.kafka.relay import ForkDetected, Relay, Unsendable, key_of
from kehu.kafka.topics import Topic, TopicMismatch, ensure_topics, partition_of
from kehu.migrations import find, migrate
from kehu.postgres import Pool, open_pool
from kehu.testing.fixtures import unique_name
from kehu.testing.kafka import Message, envelope, event_of, publish, read_topic, until

PARTITIONS = 4


@pytest.fixture
def pool(database: str) -> Iterator[Pool]:
    migrate(database, find("kehu", Path(kehu.migrations.__file__).parent))
    opened = open_pool(database, "test", 16)
    yield opened
    opened.close()


@pytest.fixture
def store(pool: Pool) -> EventStore:
    return EventStore(pool, "lead-intake")


@pytest.fixture
async def topic(kafka_bootstrap: str) -> str:
    name = f"{unique_name('relay')}.events"
    await ensure_topics(kafka_bootstrap, [Topic(name, partitions=PARTITIONS)])
    return name


def append(store: EventStore, *new: tuple[str, int], size: int = 0) -> None:
    """Append these (stream, version) in one transaction."""
    event = ChannelDefined(channel="web", title="x", kind="web")
    if size:  # past the limits of our events: a bug, or a restored store, can bring what no topic takes
        event = event.model_copy(update={"title": "x" * size})
    with store.pool.connection() as connection, connection.transaction():
        store.append(
            connection, [Pending(envelope(s, v, epoch=store.epoch), event if size else event_of(v)) for s, v in new]
        )


def ring(pool: Pool) -> None:
    with pool.connection() as connection:
        connection.execute(f"NOTIFY {CHANNEL}")


class Writers:
    """Threads that append to streams of their own, as many streams each, until all versions are written or they are stopped."""

    def __init__(self, store: EventStore, threads: int, streams: int, versions: int, pause: float = 0.0) -> None:
        # The last version of each stream that was committed.
        self.expected = {f"s{t}-{n}": 0 for t in range(threads) for n in range(streams)}
        self.errors: list[BaseException] = []
        self._stopping = threading.Event()
        arguments = [(store, t, streams, versions, pause) for t in range(threads)]
        self._threads = [threading.Thread(target=self._write, args=a, daemon=True) for a in arguments]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
        assert not self.errors, self.errors
        self.expected = {stream: last for stream, last in self.expected.items() if last}

    @property
    def writing(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _write(self, store: EventStore, number: int, streams: int, versions: int, pause: float) -> None:
        rng = random.Random(number)
        left = [f"s{number}-{n}" for n in range(streams)]
        try:
            while left and not self._stopping.is_set():
                new = [(s, self.expected[s] + 1) for s in rng.sample(left, min(len(left), rng.randint(1, 4)))]
                append(store, *new)
                self.expected.update(new)
                left = [s for s in left if self.expected[s] < versions]
                if pause:
                    self._stopping.wait(pause * rng.random())
        except BaseException as error:
            self.errors.append(error)


def check(records: list[Any], expected: dict[str, int]) -> Counter[str]:
    """Nothing lost, nothing unknown, first deliveries in order without a hole. Gives repeats by stream."""
    seen: dict[str, int] = {}
    repeats: Counter[str] = Counter()
    for record in records:
        event = Recorded.from_bytes(record.value)
        assert record.key == event.partition_key.encode()
        assert record.partition == partition_of(record.key, PARTITIONS)
        known = seen.get(event.stream, 0)
        if event.version <= known:
            repeats[event.stream] += 1
            continue
        assert event.version == known + 1, f"a hole: {event} after version {known}"
        seen[event.stream] = event.version
    assert seen == expected
    return repeats


class Running:
    """A relay in this process, as a task."""

    def __init__(self, pool: Pool, store: EventStore, bootstrap: str, topic: str, **options: Any) -> None:
        self.relay = Relay(pool, store, bootstrap, topic, **{"lease_seconds": 3.0, **options})
        self.store = store

    async def __aenter__(self) -> Running:
        self.task = asyncio.create_task(self.relay.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def caught_up(self, deadline: float = 20.0) -> None:
        def done() -> bool:
            if self.task.done():
                self.task.result()
            with self.store.pool.connection() as connection:
                newest = self.store.newest(connection)
            return self.relay.acknowledged is not None and self.relay.acknowledged >= newest

        await until(done, "everything acknowledged", deadline)


PROCESS = """
import asyncio, logging, sys
from kehu.eventstore import EventStore
from kehu.kafka.relay import Relay
from kehu.postgres import open_pool
url, bootstrap, topic, holder, lease = sys.argv[1:]
logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
pool = open_pool(url, "relay", 3)
asyncio.run(Relay(pool, EventStore(pool, "lead-intake"), bootstrap, topic, holder, lease_seconds=float(lease)).run())
"""


class Processes:
    """Relays in processes of their own, found by the holder in the lease."""

    def __init__(self, pool: Pool, url: str, bootstrap: str, topic: str, lease: float, log: Path) -> None:
        self.pool, self.arguments, self.topic, self.lease, self.log = pool, [url, bootstrap, topic], topic, lease, log
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._made = 0

    def start(self) -> str:
        self._made += 1
        holder = f"relay-{self._made}"
        with self.log.open("ab") as log:
            self.running[holder] = subprocess.Popen(
                [sys.executable, "-c", PROCESS, *self.arguments, holder, str(self.lease)], stderr=log
            )
        return holder

    def leader(self, but: str = "") -> str | None:
        """Who holds the lease now, if it is valid and not `but`."""
        with self.pool.connection() as connection:
            row = connection.execute(
                "SELECT holder FROM leases WHERE name = %s AND expires_at > clock_timestamp()", (f"relay:{self.topic}",)
            ).fetchone()
        return row[0] if row and row[0] != but and row[0] in self.running else None

    def end(self, holder: str, how: signal.Signals) -> int:
        process = self.running.pop(holder)
        process.send_signal(how)
        return process.wait(20)

    def end_all(self) -> None:
        for holder in list(self.running):
            self.end(holder, signal.SIGKILL)


@pytest.fixture
def processes(pool: Pool, database: str, kafka_bootstrap: str, topic: str, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(pool, database, kafka_bootstrap, topic, 2.0, tmp_path / "relays.log")
    yield made
    made.end_all()


def saved(pool: Pool, topic: str) -> Cursor:
    with pool.connection() as connection:
        row = connection.execute(
            "SELECT txid::text::bigint, position FROM cursors WHERE name = %s", (f"relay:{topic}",)
        ).fetchone()
    return Cursor(*row) if row else Cursor()


def landed(pool: Pool, topic: str, store: EventStore) -> bool:
    with pool.connection() as connection:
        return saved(pool, topic) >= store.newest(connection)


@pytest.mark.req("DC-01")
@pytest.mark.req("DC-03")
async def test_what_is_published(pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str) -> None:
    append(store, *[(f"s0-{n % 7}", n // 7 + 1) for n in range(700)])
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
        append(store, ("s0-7", 1))
        ring(pool)
        await running.caught_up()
    records = await read_topic(kafka_bootstrap, topic)
    assert not check(records, {**{f"s0-{n}": 100 for n in range(7)}, "s0-7": 1})
    for record in records:
        headers = dict(record.headers)
        event = Recorded.from_bytes(record.value)
        assert headers["content-type"] == CONTENT_TYPE.encode()
        assert headers["relay-epoch"] == b"1"
        assert Cursor.parse(headers["cursor"].decode()).position == event.position > 0
        assert event.store_epoch == store.epoch
        assert event.event == event_of(event.version)
    assert saved(pool, topic) == running_newest(store), "the last cursor is saved on the way out"
    assert metrics.RELAY_SENT.labels(topic)._value.get() == 701
    assert metrics.RELAY_LEADER.labels(topic)._value.get() == 0


def running_newest(store: EventStore) -> Cursor:
    with store.pool.connection() as connection:
        return store.newest(connection)


async def test_what_commits_late_is_not_skipped(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str
) -> None:
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        with pool.connection() as early, early.transaction():
            store.append(early, [Pending(envelope("early", 1), event_of(1))])
            append(store, ("late", 1))
            append(store, ("late", 2))
            await until(lambda: metrics.RELAY_OUTBOX.labels(topic)._value.get() >= 2, "the outbox is seen")
            assert running.relay.acknowledged == Cursor(), "nothing goes past a transaction that is still open"
        await running.caught_up()
        assert not check(await read_topic(kafka_bootstrap, topic), {"early": 1, "late": 2})
        await until(lambda: metrics.RELAY_OUTBOX.labels(topic)._value.get() == 0, "the outbox is empty")


@pytest.mark.req("DC-03")
async def test_leader_killed_again_and_again(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str, processes: Processes
) -> None:
    """Two relays, writers all the time, the leader killed with -9 six times: none lost, none out of order, no repeats."""
    processes.start()
    processes.start()
    writers = Writers(store, threads=4, streams=25, versions=1_000_000, pause=0.03)
    writers.start()
    for _ in range(6):
        leader = await until(processes.leader, "somebody leads")
        before = saved(pool, topic)
        await until(lambda seen=before: saved(pool, topic) > seen, "the leader publishes")
        processes.end(leader, signal.SIGKILL)
        processes.start()
    writers.stop()
    writers.join()
    await until(lambda: landed(pool, topic, store), "everything is acknowledged", 20)
    records = await read_topic(kafka_bootstrap, topic)
    repeats = check(records, writers.expected)
    epochs = {int(dict(record.headers)["relay-epoch"]) for record in records}
    assert len(epochs) >= 3, "many leaders published something"
    assert repeats.total() == 0, f"{repeats.total()} repeats in {len(records)} records"


@pytest.mark.req("DC-03")
async def test_paused_leader_is_replaced_and_exits(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str, processes: Processes
) -> None:
    first = processes.start()
    await until(lambda: processes.leader() == first, "the first leads")
    second = processes.start()
    writers = Writers(store, threads=2, streams=20, versions=60, pause=0.01)
    writers.start()
    await until(lambda: saved(pool, topic) > Cursor(), "it publishes")
    processes.running[first].send_signal(signal.SIGSTOP)
    await until(lambda: processes.leader(but=first) == second, "the other takes over")
    writers.join()
    await until(lambda: landed(pool, topic, store), "the other publishes everything")
    before = saved(pool, topic)
    assert processes.end(first, signal.SIGCONT) != 0, "the woken leader ends"
    assert "LeaseLost" in processes.log.read_text()
    append(store, ("after", 1))
    await until(lambda: landed(pool, topic, store), "the other goes on")
    assert saved(pool, topic) > before
    repeats = check(await read_topic(kafka_bootstrap, topic), {**writers.expected, "after": 1})
    assert repeats.total() <= 400, "at most the round that was in the paused process"


@pytest.mark.req("DC-03")
async def test_broker_killed_and_restarted(pool: Pool, store: EventStore, tmp_path: Path) -> None:
    broker = EmbeddedKafka(tmp_path / "kafka", throw_away=True)
    await asyncio.to_thread(broker.start)
    try:
        await ensure_topics(broker.url, [Topic("killed.events", partitions=PARTITIONS)])
        writers = Writers(store, threads=2, streams=25, versions=40, pause=0.01)
        async with Running(pool, store, broker.url, "killed.events", send_seconds=3.0) as running:
            writers.start()
            await until(lambda: running.relay.acknowledged, "it publishes")
            await asyncio.to_thread(broker.kill)
            stuck = running.relay.acknowledged or Cursor()
            await until(
                lambda: running_newest(store) > stuck and not writers.writing, "the store goes on without Kafka"
            )
            await asyncio.to_thread(broker.start)
            await running.caught_up(30)
            writers.join()
        assert check(await read_topic(broker.url, "killed.events"), writers.expected).total() == 0
    finally:
        await asyncio.to_thread(lambda: broker.stop(discard=True))
        broker.remove()


async def test_its_connections_are_cut(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str, database: str
) -> None:
    """As when PostgreSQL is restarted: the same process goes on, under a new epoch."""
    relay_pool = open_pool(database, "relay-cut", 3)
    writers = Writers(store, threads=2, streams=10, versions=50, pause=0.01)
    async with Running(
        relay_pool, EventStore(relay_pool, "lead-intake"), kafka_bootstrap, topic, holder="cut"
    ) as running:
        writers.start()
        await until(lambda: running.relay.acknowledged, "it publishes")
        for _ in range(3):
            with pool.connection() as connection:
                cut = connection.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND application_name IN ('relay-cut', 'cut', 'listener')"
                ).fetchone()
            assert cut is not None and cut[0] >= 2
            await until(lambda: running.relay.acknowledged is None, "it noticed")
            await until(lambda: running.relay.acknowledged, "it publishes again")
        writers.join()
        await running.caught_up()
    relay_pool.close()
    assert check(await read_topic(kafka_bootstrap, topic), writers.expected).total() == 0


async def test_what_no_topic_takes_stops_the_relay(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str
) -> None:
    append(store, ("s", 1), ("t", 1))
    append(store, ("s", 2), size=2_000_000)
    append(store, ("s", 3), ("t", 2))
    for _ in range(2):  # starting again does not help, and skips nothing
        with pytest.raises(Unsendable, match=r"channel.defined.v1 s@2 .* bytes"):
            await asyncio.wait_for(Relay(pool, store, kafka_bootstrap, topic).run(), 20)
        assert check(await read_topic(kafka_bootstrap, topic), {"s": 1, "t": 1}).total() == 0


async def test_what_the_broker_refuses_stops_the_relay(pool: Pool, store: EventStore, kafka_bootstrap: str) -> None:
    topic = f"{unique_name('small')}.events"
    await ensure_topics(kafka_bootstrap, [Topic(topic, partitions=PARTITIONS, configs={"max.message.bytes": "20000"})])
    append(store, ("s", 1))
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
    append(store, ("s", 2), size=50_000)
    with pytest.raises(Unsendable, match="MessageSizeTooLarge"):
        await asyncio.wait_for(Relay(pool, store, kafka_bootstrap, topic).run(), 20)
    assert check(await read_topic(kafka_bootstrap, topic), {"s": 1}).total() == 0


async def test_fork_is_reported_and_nothing_overwritten(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str
) -> None:
    append(store, ("s", 1), ("t", 1))
    append(store, ("s", 2))
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
    with pool.connection() as connection:  # a failover lost the last commit, and the store went on with another one
        connection.execute("DELETE FROM stored_events WHERE originator_id = 's' AND originator_version = 2")
    with pytest.raises(ForkDetected, match="s@2"):
        await asyncio.wait_for(Relay(pool, store, kafka_bootstrap, topic).run(), 20)
    other = Pending(envelope("s", 2, epoch=store.epoch), event_of(3))
    other = Pending(envelope_with_id(other), other.event)
    with pool.connection() as connection, connection.transaction():
        store.append(connection, [other])
    with pytest.raises(ForkDetected, match=store.epoch):
        await asyncio.wait_for(Relay(pool, store, kafka_bootstrap, topic).run(), 20)
    assert len(await read_topic(kafka_bootstrap, topic)) == 3


def envelope_with_id(pending: Pending) -> Any:
    from dataclasses import replace
    from uuid import uuid4

    return replace(pending.envelope, id=uuid4())


async def test_topic_made_anew_gets_everything_again(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str
) -> None:
    append(store, *[("s", n) for n in range(1, 50)])
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    await admin.delete_topics([topic])
    await admin.close()
    with pytest.raises(TopicMismatch):
        await asyncio.wait_for(Relay(pool, store, kafka_bootstrap, topic).run(), 20)
    await ensure_topics(kafka_bootstrap, [Topic(topic, partitions=PARTITIONS)])
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
    assert check(await read_topic(kafka_bootstrap, topic), {"s": 49}).total() == 0


async def test_records_of_strangers_do_not_hide_the_tail(
    pool: Pool, store: EventStore, kafka_bootstrap: str, topic: str
) -> None:
    append(store, *[(f"s{n}", 1) for n in range(20)])
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
    with pool.connection() as connection:  # as after a kill: acknowledged, and not saved
        connection.execute("UPDATE cursors SET txid = '0', position = 0")
    stranger = Message(b"k", b"not ours", [("cursor", b"9:9")])
    await publish(kafka_bootstrap, topic, [stranger._replace(key=b"k%d" % n) for n in range(600)], PARTITIONS)
    async with Running(pool, store, kafka_bootstrap, topic) as running:
        await running.caught_up()
    ours = [r for r in await read_topic(kafka_bootstrap, topic) if r.value != b"not ours"]
    assert check(ours, {f"s{n}": 1 for n in range(20)}).total() == 0


async def test_lease_has_one_holder_and_a_cursor_that_never_moves_back(pool: Pool, database: str) -> None:
    async with Lease(database, "one", "first", seconds=30) as first:
        await first.renew(Cursor(5, 7))
        waiting = asyncio.create_task(Lease(database, "one", "second", seconds=30, look=0.05).__aenter__())
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done, "the first holds it"
        with pool.connection() as connection:  # the first slept too long, in the eyes of the database
            connection.execute("UPDATE leases SET expires_at = now()")
        second = await asyncio.wait_for(waiting, 5)
        assert second.epoch == first.epoch + 1
        await second.renew(Cursor(6, 1))
        with pytest.raises((LeaseLost, psycopg.OperationalError)):
            await first.renew(Cursor(9, 9))
        await second.renew(Cursor(5, 8))
        assert await second.cursor() == Cursor(6, 1)
        await second.__aexit__()


async def test_lease_of_a_dead_process_is_taken_at_once(pool: Pool, database: str) -> None:
    first = await Lease(database, "dead", "first", seconds=3600).__aenter__()
    assert first._connection is not None
    await first._connection.close()
    second = await asyncio.wait_for(Lease(database, "dead", "second", look=0.05).__aenter__(), 5)
    assert second.epoch == 2
    await second.__aexit__()


def test_key_is_found_without_parsing(store: EventStore) -> None:
    tricky = ChannelDefined(channel="web", title='"partitionkey":"wrong"', kind="web")
    for key in ("plain", 'with "quotes" and \\', "客户", '","partitionkey":"x'):
        state = envelope("s", 1, key).encode(tricky)
        assert key_of(state) == key.encode() == Recorded.from_bytes(state).partition_key.encode()
