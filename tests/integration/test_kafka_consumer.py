"""Consumers on real Kafka and PostgreSQL: each event takes effect once, in order, whatever is repeated, lost, broken or dead."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import kehu.migrations
from kehu.clock import FixedClock
from kehu.commands import CommandHandler, Handles, on
from kehu.decider import Decider, Refused
from kehu.events import Event, Recorded
from kehu.events.lead_intake import ChannelDefined, LeadRejected
from kehu.eventstore import EventStore
from kehu.kafka import metrics, parked
from kehu.kafka.consumer import ConsumerRunner, Subscription, SubscriptionStopped
from kehu.kafka.effects import Effect, Policy, Project
from kehu.kafka.topics import Topic, TopicMismatch, ensure_topics
from kehu.migrations import find, migrate
from kehu.postgres import Connection, Pool, open_pool
from kehu.privacy import KeysUnavailable
from kehu.testing.fixtures import unique_name
from kehu.testing.kafka import AT, Message, message, publish, until

PARTITIONS = 4


@pytest.fixture
def pool(database: str) -> Iterator[Pool]:
    migrate(database, find("kehu", Path(kehu.migrations.__file__).parent))
    opened = open_pool(database, "test", 12)
    with opened.connection() as connection:
        connection.execute("CREATE TABLE seen_v1 (stream text PRIMARY KEY, versions bigint[] NOT NULL)")
    yield opened
    opened.close()


@pytest.fixture
async def topic(kafka_bootstrap: str) -> str:
    name = f"{unique_name('consumer')}.events"
    await ensure_topics(kafka_bootstrap, [Topic(name, partitions=PARTITIONS, configs={"max.message.bytes": "4000000"})])
    return name


class Seen:
    """A read model that keeps every version in the order in which it was applied; it breaks where a test says so."""

    name, version = "seen", 1
    types: tuple[type[Event], ...] | None = (ChannelDefined,)

    def __init__(self) -> None:
        self.broken: set[tuple[str, int]] = set()
        self.error: Exception | None = None
        self.errors_left = 0

    def apply(self, connection: Connection, events: Sequence[Recorded]) -> None:
        connection.execute(
            "INSERT INTO seen_v1 AS s SELECT stream, array_agg(version ORDER BY n) FROM unnest(%s::text[], %s::bigint[])"
            " WITH ORDINALITY AS e (stream, version, n) GROUP BY stream"
            " ON CONFLICT (stream) DO UPDATE SET versions = s.versions || EXCLUDED.versions",
            ([e.stream for e in events], [e.version for e in events]),
        )
        if self.errors_left > 0 and self.error is not None:
            self.errors_left -= 1
            raise self.error
        for event in events:
            if (event.stream, event.version) in self.broken:
                raise ZeroDivisionError("a bug, with a secret 13800138000")

    def truncate(self, connection: Connection) -> None:
        connection.execute("TRUNCATE seen_v1")


def seen(pool: Pool) -> dict[str, list[int]]:
    with pool.connection() as connection:
        return dict(connection.execute("SELECT stream, versions FROM seen_v1").fetchall())


def up_to(**streams: int) -> dict[str, list[int]]:
    return {stream: list(range(1, last + 1)) for stream, last in streams.items()}


class Running:
    """A consumer in this process, as a task."""

    def __init__(self, pool: Pool, bootstrap: str, topic: str, effect: Effect, name: str = "", **options: Any) -> None:
        self.subscription = Subscription(name or topic, ("lead-intake",), effect, **options)
        self.runner = ConsumerRunner(
            pool, bootstrap, "analytics", self.subscription, topics=[topic], session_seconds=6.0
        )

    async def __aenter__(self) -> Running:
        self.task = asyncio.create_task(self.runner.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def count(self, outcome: str) -> float:
        return float(metrics.CONSUMER_EVENTS.labels(self.runner.consumer, outcome)._value.get())


@pytest.fixture
def model() -> Seen:
    return Seen()


def consumer_of(topic: str) -> str:
    """A group for each test: a member that was killed in one must not hold partitions in the next."""
    return f"crm.analytics.{topic}"


async def handled(pool: Pool, topic: str, records: int, consumer: str = "") -> None:
    """Wait until a consumer has moved past that many records of the topic."""

    def done() -> bool:
        with pool.connection() as connection:
            row = connection.execute(
                "SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets WHERE consumer = %s AND topic = %s",
                (consumer or consumer_of(topic), topic),
            ).fetchone()
        return row is not None and row[0] >= records

    await until(done, f"{records} records handled", 20)


def streams(count: int, last: int) -> list[Message]:
    """Events of that many streams, interleaved."""
    return [message(f"channel-{n}", version) for version in range(1, last + 1) for n in range(count)]


@pytest.mark.req("DC-04")
async def test_repeats_are_dropped(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    """Each record three times, then the whole topic again."""
    history = streams(20, 10)
    await publish(kafka_bootstrap, topic, [m for m in history for _ in range(3)], PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), batch=70) as running:
        await handled(pool, topic, 600)
        await publish(kafka_bootstrap, topic, history, PARTITIONS)
        await handled(pool, topic, 800)
    assert seen(pool) == up_to(**{f"channel-{n}": 10 for n in range(20)})
    assert running.count("repeat") == 600
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)):  # it goes on where it was
        await publish(kafka_bootstrap, topic, [message("channel-0", 11)], PARTITIONS)
        await handled(pool, topic, 801)
    assert seen(pool)["channel-0"] == list(range(1, 12))


@pytest.mark.req("DC-04")
async def test_swapped_neighbours_heal_and_a_hole_stops_its_stream(
    pool: Pool, kafka_bootstrap: str, topic: str, model: Seen
) -> None:
    order = [1, 3, 2, 4, 6, 7, 5, 8]
    await publish(kafka_bootstrap, topic, [message("swapped", n) for n in order], PARTITIONS)
    await publish(kafka_bootstrap, topic, [message("hole", n) for n in (1, 2, 4, 5)], PARTITIONS)
    await publish(kafka_bootstrap, topic, [message("fine", n) for n in (1, 2, 3)], PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)):
        await handled(pool, topic, len(order) + 7)
        await until(lambda: seen(pool).get("swapped") == list(range(1, 9)), "the swapped ones are applied in order")
        assert seen(pool) == {**up_to(swapped=8, fine=3), "hole": [1, 2]}
        waiting = parked.list_parked(pool)
        assert [(p.stream, p.version, p.status) for p in waiting] == [("hole", 4, "waiting"), ("hole", 5, "behind")]
        assert waiting[0].error == "hole: expected version 3, got 4"
        assert metrics.CONSUMER_HOLES.labels(consumer_of(topic))._value.get() >= 2
        # A person decides that version 3 will not come.
        with pytest.raises(parked.NotFirst):
            parked.ask(pool, waiting[1].id, "accept_hole", "user:1")
        parked.ask(pool, waiting[0].id, "accept_hole", "user:1")
        await until(lambda: seen(pool)["hole"] == [1, 2, 4, 5], "it goes on without version 3")
        await publish(kafka_bootstrap, topic, [message("hole", 3), message("hole", 6)], PARTITIONS)
        await until(lambda: seen(pool)["hole"] == [1, 2, 4, 5, 6], "and version 3 comes too late")
    assert not parked.list_parked(pool)


@pytest.mark.req("DC-04")
async def test_poison_is_parked_with_all_headers_and_its_stream_waits(
    pool: Pool, kafka_bootstrap: str, topic: str, model: Seen
) -> None:
    odd = (("content-type", b"text/plain"), ("binary", b"\xff\x00"), ("twice", b"1"), ("twice", "二".encode()))
    good = message("s", 1)
    assert good.value is not None
    unknown = message("unknown", 1)._replace(
        value=message("unknown", 1).value.replace(b"channel.defined.v1", b"channel.defined.v9")
    )
    unfit = message("unfit", 2)._replace(
        value=message("unfit", 2).value.replace(b'"kind":"web"', b'"kind":13800138000')
    )
    poison = [
        Message(b"broken", b'{"specversion":', odd),
        Message(b"huge", b"x" * 2_000_000, odd),
        Message(b"not-an-envelope", b"[]", odd),
        Message(b"nothing", None, odd),
        unknown,
        unfit,
        message("no-key", 1)._replace(key=None),
        message("wrong-key", 1)._replace(key=b"another"),
        # What neither the tables nor their indexes can hold must not stop the partition.
        message("nul", 1)._replace(value=message("nul", 1).value.replace(b'"subject":"nul"', b'"subject":"n\\u0000"')),
        message("long", 1)._replace(
            value=message("long", 1).value.replace(b'"subject":"long"', b'"subject":"%s"' % (b"l" * 9000))
        ),
        message("far", 1)._replace(
            value=message("far", 1).value.replace(b'"streamversion":1', b'"streamversion":%d' % 10**30)
        ),
        unknown._replace(key=b"odd", value=b'{"type":"\\u0000"}', headers=[("\0", b"\0")]),
    ]
    around = [message(f"fine-{n}", v) for v in (1, 2) for n in range(10)]
    behind = [message("unfit", 3), message("unknown", 2)]
    everything = [message("unfit", 1), *around[:10], *poison, *behind, *around[10:]]
    await publish(kafka_bootstrap, topic, everything, PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)):
        await handled(pool, topic, len(everything))
        assert seen(pool) == up_to(unfit=1, **{f"fine-{n}": 2 for n in range(10)})
        by_place = {(p.stream or (p.key or b"").decode(), p.version): p for p in parked.list_parked(pool)}
        assert {place: p.status for place, p in by_place.items()} == {
            ("broken", None): "waiting",
            ("huge", None): "waiting",
            ("not-an-envelope", None): "waiting",
            ("nothing", None): "waiting",
            ("unknown", 1): "waiting",
            ("unknown", 2): "behind",
            ("unfit", 2): "waiting",
            ("unfit", 3): "behind",
            ("no-key", 1): "waiting",
            ("wrong-key", 1): "waiting",
            ("nul", None): "waiting",
            ("long", None): "waiting",
            ("far", None): "waiting",
            ("odd", None): "waiting",
        }
        for original in poison[:4]:
            kept = by_place[original.key.decode() if original.key else "", None]
            assert (kept.key, kept.value, tuple(kept.headers)) == (original.key, original.value, odd)
        assert "channel.defined.v9" in by_place["unknown", 1].error
        assert by_place["unfit", 2].error == "the data does not fit the type: kind: string_type"
        assert not any("13800138000" in p.error for p in by_place.values()), "no value of an event in an error"
        # What can never be read is dropped by a person; a replay of what is still broken changes nothing.
        for key in ("broken", "huge", "not-an-envelope", "nothing"):
            parked.ask(pool, by_place[key, None].id, "drop", "user:1")
        parked.ask(pool, by_place["unfit", 2].id, "replay", "user:1")
        await until(lambda: parked.show(pool, by_place["unfit", 2].id).attempts == 2, "it was tried and failed again")
        parked.ask(pool, by_place["unfit", 2].id, "drop", "user:1")
        await until(lambda: seen(pool)["unfit"] == [1, 3], "the stream goes on behind the dropped one")
        await until(lambda: len(parked.list_parked(pool)) == 8, "only what was dropped or repaired does not wait")
        assert {p.status for p in parked.list_parked(pool, statuses=("dropped", "resolved"))} == {"dropped", "resolved"}


@pytest.mark.req("DC-04")
async def test_an_effect_that_fails_is_retried_parked_and_replayed_in_order(
    pool: Pool, kafka_bootstrap: str, topic: str, model: Seen
) -> None:
    model.broken = {("channel-3", 4), ("channel-7", 2)}
    await publish(kafka_bootstrap, topic, streams(10, 6), PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), retries=2) as running:
        await handled(pool, topic, 60)
        healthy = {f"channel-{n}": 6 for n in range(10) if n not in (3, 7)}
        assert seen(pool) == up_to(**healthy, **{"channel-3": 3, "channel-7": 1})
        waiting = {(p.stream, p.version): p for p in parked.list_parked(pool)}
        assert {place for place, p in waiting.items() if p.status == "waiting"} == model.broken
        assert len(waiting) == 3 + 5, "later events of both streams wait behind"
        assert waiting["channel-3", 4].attempts == 3, "the first try and two retries"
        assert waiting["channel-3", 4].error.startswith("ZeroDivisionError at Seen.apply:")
        await publish(kafka_bootstrap, topic, [message("channel-3", 7), message("channel-0", 7)], PARTITIONS)
        await handled(pool, topic, 62)
        model.broken = {("channel-3", 6)}  # repaired, but not quite
        assert parked.ask_all(pool, running.runner.consumer, "user:1") == 2
        await until(lambda: seen(pool)["channel-7"] == list(range(1, 7)), "channel-7 caught up")
        await until(lambda: seen(pool)["channel-3"] == list(range(1, 6)), "channel-3 up to what still fails")
        await until(
            lambda: [(p.version, p.status) for p in parked.list_parked(pool)] == [(6, "waiting"), (7, "behind")],
            "they wait",
        )
        model.broken = set()
        parked.ask(pool, parked.list_parked(pool)[0].id, "replay", "user:1")
        await until(lambda: not parked.list_parked(pool), "nothing waits")
        await publish(kafka_bootstrap, topic, [message("channel-3", 8)], PARTITIONS)
        await handled(pool, topic, 63)
    assert seen(pool) == up_to(**{**healthy, "channel-0": 7, "channel-3": 8, "channel-7": 6})


async def test_transient_errors_are_waited_out(
    pool: Pool, kafka_bootstrap: str, topic: str, model: Seen, database: str
) -> None:
    """The key service is away for more attempts than there are retries; then the database cuts our connections."""
    own = open_pool(database, "cut", 3)
    model.error, model.errors_left = KeysUnavailable("the key service does not answer"), 5
    await publish(kafka_bootstrap, topic, streams(5, 4), PARTITIONS)
    async with Running(own, kafka_bootstrap, topic, Project(own, model), retries=1):
        await handled(pool, topic, 20)
        assert model.errors_left == 0
        for version in range(5, 9):
            with pool.connection() as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cut'"
                )
            await publish(kafka_bootstrap, topic, [message(f"channel-{n}", version) for n in range(5)], PARTITIONS)
        await handled(pool, topic, 40)
    own.close()
    assert seen(pool) == up_to(**{f"channel-{n}": 8 for n in range(5)})
    assert not parked.list_parked(pool, statuses=("waiting", "behind", "resolved"))


async def test_waiting_for_a_transient_error_keeps_the_partitions(
    pool: Pool, kafka_bootstrap: str, topic: str, model: Seen
) -> None:
    """It waits longer than Kafka's session, and still the same member goes on."""
    model.error, model.errors_left = KeysUnavailable("away"), 7  # pauses of 0.1 to 6.4 s
    await publish(kafka_bootstrap, topic, [message("s", 1)], PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)) as running:
        await until(lambda: running.runner.positions, "it has its partitions")
        owned, coordinator = dict(running.runner.positions), running.runner._kafka._coordinator
        generation = coordinator.generation
        await handled(pool, topic, 1)
        assert set(running.runner.positions) == set(owned) and coordinator.generation == generation
    assert seen(pool) == up_to(s=1)


async def test_stop_instead_of_parking(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    model.broken = {("channel-1", 2)}
    await publish(kafka_bootstrap, topic, streams(3, 3), PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), on_failure="stop", retries=1) as running:
        with pytest.raises(SubscriptionStopped, match=r"channel-1@2: ZeroDivisionError"):
            await asyncio.wait_for(asyncio.shield(running.task), 20)
    assert seen(pool)["channel-1"] == [1]
    assert not parked.list_parked(pool)


async def test_too_much_parked_stops(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    """When everything fails, the effect is broken and not the events."""
    model.broken = {(f"channel-{n}", 1) for n in range(50)}
    await publish(kafka_bootstrap, topic, streams(50, 1), PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), retries=0, park_limit=10) as running:
        with pytest.raises(SubscriptionStopped, match="10 events are parked and the limit is 10"):
            await asyncio.wait_for(asyncio.shield(running.task), 20)
    assert len(parked.list_parked(pool)) == 10


async def test_only_wanted_events_need_to_be_known(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    """An event of a newer release that this subscription does not want moves the version of its stream, and no more."""
    other = message("s", 2)
    assert other.value is not None
    newer = other._replace(value=other.value.replace(b"channel.defined.v1", b"channel.renamed.v3"))
    await publish(kafka_bootstrap, topic, [message("s", 1), newer, message("s", 3)], PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)):
        await handled(pool, topic, 3)
    assert seen(pool) == {"s": [1, 3]}
    assert not parked.list_parked(pool)


async def test_where_a_subscription_starts(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    await publish(kafka_bootstrap, topic, [message("old", 5), message("old", 6)], PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), "anywhere", start="anywhere"):
        await handled(pool, topic, 2, "crm.analytics.anywhere")
        assert seen(pool) == {"old": [5, 6]}
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), "end", start="end") as running:
        await until(lambda: running.runner.positions, "it has its partitions")
        await publish(kafka_bootstrap, topic, [message("old", 7)], PARTITIONS)
        await handled(pool, topic, 3, "crm.analytics.end")
        assert seen(pool) == {"old": [5, 6, 7]}
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model), "strict"):
        await handled(pool, topic, 3, "crm.analytics.strict")
    first, *_ = parked.list_parked(pool, "crm.analytics.strict")
    assert (first.version, first.error) == (5, "hole: expected version 1, got 5")


async def test_a_topic_that_was_made_anew_is_noticed(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    await publish(kafka_bootstrap, topic, streams(5, 1), PARTITIONS)
    with pool.connection() as connection:
        connection.execute("INSERT INTO consumer_offsets VALUES (%s, %s, 0, 1000)", (consumer_of(topic), topic))
    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)) as running:
        with pytest.raises(SubscriptionStopped, match="made anew"):
            await asyncio.wait_for(asyncio.shield(running.task), 20)


class Held:
    """An effect that waits for a sign before it does what another one does."""

    types = None

    def __init__(self, effect: Effect) -> None:
        self.effect, self.reached, self.go = effect, threading.Event(), threading.Event()

    def __call__(self, events: Sequence[Recorded], progress: Any) -> None:
        if events and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(30)
        self.effect(events, progress)


async def test_late_commit_of_a_zombie_is_refused(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    """A consumer hangs in its effect until Kafka gives its partitions to another one, then wakes and commits."""
    model.types = None
    zombie = Held(Project(pool, model))
    await publish(kafka_bootstrap, topic, streams(20, 5), PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, zombie, batch=10_000) as first:
        await until(zombie.reached.is_set, "the first is in its effect")
        async with Running(pool, kafka_bootstrap, topic, Project(pool, model)):
            await handled(pool, topic, 100)  # after the first one's session
            zombie.go.set()
            await publish(kafka_bootstrap, topic, [message(f"channel-{n}", 6) for n in range(20)], PARTITIONS)
            await handled(pool, topic, 120)
            await until(
                lambda: first.runner.positions or first.runner._kafka.assignment() is not None, "the first is back"
            )
    assert seen(pool) == up_to(**{f"channel-{n}": 6 for n in range(20)})


PROCESS = """
import asyncio, logging, sys
from kehu.kafka.consumer import ConsumerRunner, Subscription
from kehu.kafka.effects import Project
from kehu.postgres import open_pool
sys.path.insert(0, sys.argv[4])
from test_kafka_consumer import Seen
logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
url, bootstrap, topic = sys.argv[1:4]
pool = open_pool(url, "consumer", 3)
subscription = Subscription(topic, ("lead-intake",), Project(pool, Seen()), batch=50)
asyncio.run(ConsumerRunner(pool, bootstrap, "analytics", subscription, topics=[topic], session_seconds=6.0).run())
"""


@dataclass
class Processes:
    """Consumers in processes of their own."""

    arguments: list[str]
    running: list[subprocess.Popen[bytes]]

    def start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", PROCESS, *self.arguments, str(Path(__file__).parent)])
        self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes], how: signal.Signals) -> None:
        self.running.remove(process)
        process.send_signal(how)
        process.wait(20)


@pytest.fixture
def processes(database: str, kafka_bootstrap: str, topic: str) -> Iterator[Processes]:
    made = Processes([database, kafka_bootstrap, topic], [])
    yield made
    for process in list(made.running):
        made.end(process, signal.SIGKILL)


async def test_rebalances_and_kills_under_load(
    pool: Pool, kafka_bootstrap: str, topic: str, processes: Processes
) -> None:
    """One consumer, three, one again, ended in order and with -9, while events come in."""
    sent = 0

    async def feed() -> None:
        nonlocal sent
        version = 0
        while not enough.is_set():
            version += 1
            await publish(kafka_bootstrap, topic, [message(f"channel-{n}", version) for n in range(40)], PARTITIONS)
            sent = version * 40
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), 0.03)  # else the arrays of the read model grow too long

    enough = asyncio.Event()
    feeding = asyncio.create_task(feed())
    first = processes.start()
    await handled(pool, topic, 80)
    others = [processes.start(), processes.start()]
    for how in (signal.SIGTERM, signal.SIGKILL):
        now = sent
        await handled(pool, topic, now + 40)
        await asyncio.to_thread(processes.end, others.pop(), how)
    await asyncio.to_thread(processes.end, first, signal.SIGKILL)
    processes.start()
    now = sent
    await handled(pool, topic, now + 40)
    enough.set()
    await feeding
    await handled(pool, topic, sent)
    assert seen(pool) == up_to(**{f"channel-{n}": sent // 40 for n in range(40)})


@dataclass(frozen=True)
class Copy:
    channel: str
    title: str


def _copy(command: Copy, titles: tuple[str, ...]) -> list[Event]:
    if command.title == "v3":
        raise Refused("not-this-one", "version three is not copied")
    return [ChannelDefined(channel=command.channel, title=command.title, kind="copy")]


async def test_policy_reacts_once(pool: Pool, kafka_bootstrap: str, topic: str) -> None:
    """Commands, their events and the progress are one transaction; a repeat of the topic makes no second command."""
    decider: Decider[Copy, tuple[str, ...]] = Decider("channel", (), _copy, lambda s, _: s)
    handlers: dict[type[Any], Handles] = {Copy: on(decider, lambda c: c.channel)}
    store = EventStore(pool, "scoring")
    handler = CommandHandler(store, handlers, FixedClock(AT), {})  # type: ignore[arg-type]

    def react(recorded: Recorded) -> list[Copy]:
        event = recorded.event
        assert isinstance(event, ChannelDefined)
        return [Copy(recorded.stream, event.title)] if event.title != "v2" else []

    policy = Policy(handler, "copies", "scoring", react, (ChannelDefined, LeadRejected))
    history = streams(6, 5)
    await publish(kafka_bootstrap, topic, [*history, *history], PARTITIONS)
    async with Running(pool, kafka_bootstrap, topic, policy):
        await handled(pool, topic, 60)
    with pool.connection() as connection:  # as if the progress had been lost: the commands are known by their ids
        connection.execute("DELETE FROM consumer_streams; DELETE FROM consumer_offsets")
    async with Running(pool, kafka_bootstrap, topic, policy):
        await handled(pool, topic, 60)
    for n in range(6):
        copies = store.stream(f"channel-channel-{n}").events
        assert [c.event.title for c in copies] == ["v1", "v4", "v5"]  # type: ignore[attr-defined]
        assert copies[0].actor == "service:scoring" and copies[0].time == AT
        assert copies[0].correlation_id == "c-1"
    assert metrics.POLICY_REFUSED.labels("copies", "not-this-one")._value.get() >= 6


def test_bad_subscriptions_are_refused(model: Seen) -> None:
    class Nothing(BaseModel):
        pass

    with pytest.raises(ValueError, match="batch"):
        Subscription("x", ("a",), Nothing(), batch=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="services"):
        Subscription("x", (), Nothing())  # type: ignore[arg-type]


async def test_lag_is_visible_while_it_is_blocked(pool: Pool, kafka_bootstrap: str, topic: str, model: Seen) -> None:
    model.error, model.errors_left = KeysUnavailable("away"), 1_000_000
    await publish(kafka_bootstrap, topic, streams(20, 2), PARTITIONS)
    consumer = consumer_of(topic)

    def lag() -> float:
        lags = [metrics.CONSUMER_LAG.labels(consumer, topic, p)._value.get() for p in range(PARTITIONS)]
        return float(sum(lags))

    async with Running(pool, kafka_bootstrap, topic, Project(pool, model)):
        await until(lambda: lag() == 40, "the lag is shown")
        await until(lambda: metrics.CONSUMER_BLOCKED.labels(consumer)._value.get() == 1, "it is shown as blocked")
        assert metrics.CONSUMER_OLDEST.labels(consumer)._child_samples()[0].value > 0
        await publish(kafka_bootstrap, topic, streams(20, 1), PARTITIONS)
        await until(lambda: lag() == 60, "the lag grows")
        model.errors_left = 0
        await until(lambda: lag() == 0, "it catches up", 25)
        assert metrics.CONSUMER_OLDEST.labels(consumer)._child_samples()[0].value == 0


async def test_a_missing_topic_is_refused(pool: Pool, kafka_bootstrap: str, model: Seen) -> None:
    async with Running(pool, kafka_bootstrap, unique_name("nowhere"), Project(pool, model)) as running:
        with pytest.raises(TopicMismatch, match="there is no topic nowhere_"):
            await asyncio.wait_for(asyncio.shield(running.task), 20)
