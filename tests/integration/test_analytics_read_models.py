"""The read models of analytics: right in any order of arrival, exact through kills, and rebuilt beside the live one without a gap."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from analytics.read_models import READ_MODELS, generations
from analytics.read_models.base import GenerationalModel
from analytics.read_models.customer_timeline import timeline
from analytics.read_models.event_counts import counts
from analytics.read_models.lead_journey import conversion
from analytics.read_models.live import keep_live
from analytics.read_models.rebuild import Rebuild, RebuildRunning, Step
from analytics.settings import Settings
from kehu.events import Recorded
from kehu.events.lead_intake import BehaviourRecorded, LeadCaptured, LeadMerged, LeadRejected
from kehu.events.scoring import LeadQualified, LeadScoreChanged
from kehu.kafka.topics import ensure_topics
from kehu.migrations import migrate, of_service
from kehu.postgres import Connection, Pool, open_pool
from kehu.read_models import of_interest
from kehu.testing.histories import SEALED, History, history
from kehu.testing.kafka import Message, publish, until

CONSUMER = """
import asyncio, sys
from analytics.read_models import READ_MODELS
from analytics.read_models.live import keep_live
from analytics.settings import Settings
from kehu.postgres import open_pool
from kehu.runtime import end_with_parent

async def main():
    settings = Settings()
    pool = open_pool(settings.database_url, "consumer", 6)
    async with asyncio.TaskGroup() as tasks:
        for name in READ_MODELS:
            tasks.create_task(keep_live(pool, settings, name, tuple(sys.argv[1:])))

end_with_parent()
asyncio.run(main())
"""
REBUILD = """
import asyncio, sys
from analytics.read_models.rebuild import Rebuild, print_step
from analytics.settings import Settings
from kehu.runtime import end_with_parent

end_with_parent()
asyncio.run(Rebuild(Settings(), sys.argv[1], print_step, topics=tuple(sys.argv[2:])).run())
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
        consumer_batch=200,
        rebuild_batch=300,
    )


@pytest.fixture
def pool(settings: Settings) -> Iterator[Pool]:
    opened = open_pool(settings.database_url, "test", 12)
    yield opened
    opened.close()


def spawn(settings: Settings, script: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "KEHU_ENVIRONMENT": "development",
        "KEHU_JWT_SECRET": "x" * 32,
        "KEHU_POSTGRES_URL": settings.postgres_url,
        "KEHU_DATABASE": settings.database,
        "KEHU_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "KEHU_LAKE_PATH": str(settings.lake_path),
        "KEHU_CONSUMER_BATCH": "100",
        "KEHU_REBUILD_BATCH": "100",
        "KEHU_PARENT": str(os.getpid()),
    }
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, stdout=subprocess.PIPE)


# What the read models must say, folded the plain way -----------------------------------------------------------------


def journeys(made: History) -> dict[UUID, tuple[Any, ...]]:
    """(customer, channel, captured, qualified, converted, score at conversion, merged into, rejected) of each lead."""
    intake, scoring = made.recorded().values()
    leads: dict[UUID, dict[str, Any]] = {}
    conversions: list[tuple[datetime, UUID, UUID | None]] = []
    scores: dict[UUID, list[tuple[datetime, int, float]]] = {}
    qualified: dict[UUID, datetime] = {}
    for r in intake:
        match r.event:
            case LeadCaptured() as e:
                leads[e.lead_id] = {
                    "customer": e.customer_id,
                    "channel": e.channel,
                    "captured": r.time,
                    "merged": None,
                    "rejected": None,
                }
            case LeadMerged() as e:
                leads[e.lead_id]["merged"] = e.survivor_lead_id
            case LeadRejected() as e:
                leads[e.lead_id]["rejected"] = r.time
            case BehaviourRecorded(kind="offer_accepted") as e:
                conversions.append((r.time, e.customer_id, e.lead_id))
    for r in scoring:
        match r.event:
            case LeadScoreChanged() as changed:
                scores.setdefault(changed.lead_id, []).append((r.time, r.version, changed.score))
            case LeadQualified() as first:
                qualified[first.lead_id] = r.time
    converted: dict[UUID, datetime] = {}
    for time, customer, lead in conversions:
        target = lead
        if target is None:
            own = sorted(
                (known["captured"], i)
                for i, known in leads.items()
                if known["customer"] == customer and known["merged"] is None
            )
            still = [i for _, i in own if leads[i]["rejected"] is None or leads[i]["rejected"] > time]
            target = (still or [own[0][1]])[0]
        while leads[target]["merged"] is not None:
            target = leads[target]["merged"]
        converted[target] = min(time, converted.get(target, time))
    answers = {}
    for lead, known in leads.items():
        at = converted.get(lead)
        before = [(t, v, s) for t, v, s in scores.get(lead, []) if at is not None and t < at]
        score = max(before)[2] if before else None
        answers[lead] = (
            known["customer"],
            known["channel"],
            known["captured"],
            qualified.get(lead),
            at,
            score,
            known["merged"],
            known["rejected"],
        )
    return answers


def stored_journeys(connection: Connection) -> dict[UUID, tuple[Any, ...]]:
    rows = connection.execute(
        "SELECT lead_id, customer_id, channel, captured_at, qualified_at, converted_at, score_at_conversion, merged_into, rejected_at"
        " FROM lead_journey_v1"
    ).fetchall()
    return {row[0]: tuple(row[1:]) for row in rows}


def by_day(made: History, settings: Settings) -> Counter[tuple[str, str, Any]]:
    return Counter(
        (r.producer, r.type, r.time.astimezone(settings.zone).date())
        for recorded in made.recorded().values()
        for r in recorded
    )


def stored_by_day(connection: Connection) -> Counter[tuple[str, str, Any]]:
    return Counter(
        {(s, t, d): n for s, t, d, n in connection.execute("SELECT service, type, day, events FROM event_counts_v1")}
    )


def feed(
    connection: Connection, model: GenerationalModel, queues: Sequence[list[Recorded]], seed: int, batch: int
) -> None:
    """Apply topics in a random interleaving and random batches; each topic keeps its order."""
    rng = random.Random(seed)
    left = [list(reversed(queue)) for queue in queues]
    while any(left):
        queue = rng.choice([q for q in left if q])
        events = of_interest(model, [queue.pop() for _ in range(min(rng.randint(1, batch), len(queue)))])
        if events:
            with connection.transaction():
                model.apply(connection, events)


# Applying ------------------------------------------------------------------------------------------------------------


@pytest.mark.req("AN-02")
@pytest.mark.parametrize(("seed", "batch"), [(1, 3), (2, 40), (3, 1000)])
def test_a_lead_journey_is_the_same_in_any_order_of_arrival(
    pool: Pool, settings: Settings, seed: int, batch: int
) -> None:
    made = history(20 + seed, 150)
    with pool.connection() as connection:
        feed(connection, READ_MODELS["lead_journey"](1), list(made.recorded().values()), seed, batch)
        stored, expected = stored_journeys(connection), journeys(made)
        assert stored == expected
        assert sum(journey[4] is not None for journey in expected.values()) > 20  # there are conversions to get wrong
        groups = {g.group: (g.leads, g.converted) for g in conversion(connection, "channel")}
    open_leads = [j for j in expected.values() if j[6] is None]
    assert {c: n for c, (n, _) in groups.items()} == Counter(j[1] for j in open_leads)
    assert {c: n for c, (_, n) in groups.items() if n} == Counter(j[1] for j in open_leads if j[4])


def test_conversion_by_month_and_score_band(pool: Pool, settings: Settings) -> None:
    made = history(31, 120)
    with pool.connection() as connection:
        feed(connection, READ_MODELS["lead_journey"](1), list(made.recorded().values()), 1, 500)
        months = conversion(connection, "month")
        bands = conversion(connection, "score-band", hot=80, warm=40)
        january = conversion(connection, "channel", last=datetime(2026, 1, 1, tzinfo=UTC).date())
    expected = [j for j in journeys(made).values() if j[6] is None]
    assert {m.group: m.leads for m in months} == Counter(
        j[2].astimezone(settings.zone).strftime("%Y-%m") for j in expected
    )
    assert sum(b.leads for b in bands) == sum(m.leads for m in months) == len(expected)
    assert sum(b.converted for b in bands) == sum(j[4] is not None for j in expected)
    assert {b.group for b in bands} == {"cold", "hot", "none", "warm"}
    assert sum(g.leads for g in january) == next(m.leads for m in months if m.group == "2026-01")


@pytest.mark.req("LI-11")
def test_a_timeline_has_no_personal_data_and_comes_in_pages(pool: Pool, settings: Settings) -> None:
    made = history(32, 30)
    with pool.connection() as connection:
        feed(connection, READ_MODELS["customer_timeline"](1), list(made.recorded().values()), 1, 100)
        everything = " ".join(row[0] for row in connection.execute("SELECT t::text FROM customer_timeline_v1 t"))
        assert "深圳远航科技有限公司" in everything
        assert SEALED not in everything
        assert "sealed" not in everything
        busiest = connection.execute(
            "SELECT customer_id, count(*) FROM customer_timeline_v1 GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
        ).fetchone()
        assert busiest is not None
        customer, count = busiest
        pages, before = [], None
        while page := timeline(connection, customer, before, 4):
            pages += page
            before = (page[-1].time, page[-1].event_id)
    expected = [r for recorded in made.recorded().values() for r in recorded if r.customer_id == str(customer)]
    assert [e.event_id for e in pages] == [r.id for r in sorted(expected, key=lambda r: (r.time, r.id), reverse=True)]
    assert len(pages) == count > 8


@pytest.mark.req("AN-07")
async def test_read_models_are_exact_through_kills(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str
) -> None:
    """The consumer is killed again and again under load; some events come twice."""
    made, rng = history(33, 500), random.Random(5)
    topics = tuple(f"{topic_prefix}.{topic}" for topic in made.topics)
    await ensure_topics(kafka_bootstrap, topics)
    process = spawn(settings, CONSUMER, *topics)
    sent = 0
    try:
        for part in range(6):
            for topic, values in zip(topics, made.topics.values(), strict=True):
                size = -(-len(values) // 6)
                some = [Message(k.encode(), v) for k, v in values[part * size : (part + 1) * size]]
                again = some[-15:] if rng.random() < 0.5 else []
                await publish(kafka_bootstrap, topic, some + again, 12)
                sent += len(some) + len(again)
            if part in (1, 3):
                before = _read(pool)
                await until(lambda: _read(pool) != before, "the consumer moves", 60)  # noqa: B023 - waited for in the loop
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = spawn(settings, CONSUMER, *topics)
        await until(lambda: set(_read(pool).values()) == {sent} and len(_read(pool)) == 3, "all is read", 90)
        assert sent > len(made)
    finally:
        process.kill()
        process.wait()
    with pool.connection() as connection:
        assert stored_by_day(connection) == by_day(made, settings)
        assert stored_journeys(connection) == journeys(made)
        assert connection.execute("SELECT count(*) FROM customer_timeline_v1").fetchone() == (len(made),)
        assert connection.execute("SELECT count(*) FROM parked_events").fetchone() == (0,)
        first, last = min(day for _, _, day in by_day(made, settings)), max(day for _, _, day in by_day(made, settings))
        assert sum(c.events for c in counts(connection, first, last)) == len(made)


def _read(pool: Pool) -> dict[str, int]:
    with pool.connection() as connection:
        rows = connection.execute(
            "SELECT consumer, sum(next_offset)::int FROM consumer_offsets GROUP BY consumer"
        ).fetchall()
    return dict(rows)


# Rebuilding ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def live_consumer(settings: Settings, pool: Pool, name: str, topics: tuple[str, ...]) -> AsyncIterator[None]:
    task = asyncio.create_task(keep_live(pool, settings, name, topics))
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.req("AN-08")
async def test_a_rebuild_under_load_takes_over_without_a_gap(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str
) -> None:
    """Events come in all the time; the counts that readers see never go back; the result is that of a fresh run."""
    made = history(41, 600)
    topics = tuple(f"{topic_prefix}.{topic}" for topic in made.topics)
    await ensure_topics(kafka_bootstrap, topics)
    seen: list[int] = []
    steps: list[Step] = []
    switched = asyncio.Event()

    async def load() -> None:
        """A good part at once, then one small portion after the other, each when the last is counted, and after the switch
        the rest."""
        queues = zip(topics, made.topics.values(), strict=True)
        left = {topic: [Message(key.encode(), value) for key, value in values] for topic, values in queues}
        size = 2500
        while any(left.values()):
            for topic, messages in left.items():
                await publish(kafka_bootstrap, topic, messages[:size], 12)
                left[topic] = messages[size:]
            assert all(left.values()) or switched.is_set(), "nothing is left to come in during the switch"
            sent = len(made) - sum(map(len, left.values()))
            await until(lambda: look() >= sent, "what came in is counted", 60)  # noqa: B023 - waited for in the loop
            size = 10_000 if switched.is_set() else 5

    def report(step: Step) -> None:
        steps.append(step)
        if step.state == "live":
            switched.set()

    def look() -> int:
        with pool.connection() as connection:
            row = connection.execute("SELECT coalesce(sum(events), 0)::int FROM event_counts_v1").fetchone()
        assert row is not None
        return int(row[0])

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(look))

    async with live_consumer(settings, pool, "event_counts", topics):
        watching, loading = asyncio.create_task(watch()), asyncio.create_task(load())
        await until(lambda: look() > 500, "the live one counts", 60)
        model = await Rebuild(settings, "event_counts", report, topics=topics).run()
        await loading
        await until(lambda: look() == len(made), "the new live one counts on", 60)
        watching.cancel()
        assert len(seen) > 20
        with pool.connection() as connection:
            consumers = {c for (c,) in connection.execute("SELECT DISTINCT consumer FROM consumer_offsets")}
            tables = {
                t for (t,) in connection.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'event_counts%'")
            }
            assert stored_by_day(connection) == by_day(made, settings)
    assert seen == sorted(seen), "readers saw the counts go back"
    assert model.generation == 2
    assert consumers == {generations.progress_name("event_counts", 2)}
    assert tables == {"event_counts_v1_g2"}
    assert [s.state for s in steps][-2:] == ["live", "done"]
    assert steps[0].done <= steps[-1].done == steps[-1].total


@pytest.mark.req("AN-07")
async def test_a_rebuilt_lead_journey_is_the_one_of_a_fresh_run(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str
) -> None:
    made = history(42, 300)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    async with live_consumer(settings, pool, "lead_journey", topics):
        await until(
            lambda: _read(pool).get(generations.progress_name("lead_journey", 1)) == len(made), "all is read", 60
        )
        with pool.connection() as connection:
            fresh = generations.checksum(connection, READ_MODELS["lead_journey"](1))
        for generation in (2, 3):
            model = await Rebuild(settings, "lead_journey", lambda _: None, topics=topics).run()
            assert model.generation == generation
            with pool.connection() as connection:
                assert generations.checksum(connection, model) == fresh
                assert stored_journeys(connection) == journeys(made)
                assert generations.live(connection, "lead_journey").generation == generation
    assert fresh["lead_journey"][0] == len(journeys(made))


async def test_a_killed_rebuild_goes_on_where_it_was(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str
) -> None:
    made = history(43, 400)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    building = generations.progress_name("customer_timeline", 2)
    process = spawn(settings, REBUILD, "customer_timeline", *topics)
    try:
        await until(lambda: _read(pool).get(building, 0) > 500, "the rebuild moves", 60)
    finally:
        process.kill()
        process.wait()
    done = _read(pool)[building]
    assert done < len(made), "it was finished before it was killed"
    with pool.connection() as connection:
        assert generations.live(connection, "customer_timeline").generation == 1
    steps: list[Step] = []
    await Rebuild(settings, "customer_timeline", steps.append, topics=topics).run()
    assert {step.generation for step in steps} == {2}
    with pool.connection() as connection:
        rows = connection.execute("SELECT count(*), count(DISTINCT event_id) FROM customer_timeline_v1").fetchone()
    assert rows == (len(made), len(made))


async def test_one_rebuild_at_a_time_and_only_of_what_there_is(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str
) -> None:
    topics = await history(44, 5).publish(kafka_bootstrap, topic_prefix)
    with pytest.raises(generations.UnknownProjection, match="customer_timeline"):
        await Rebuild(settings, "no_such", lambda _: None, topics=topics).run()
    rebuild = Rebuild(settings, "lead_journey", lambda _: None, topics=topics)
    held = rebuild._exclude_others()
    try:
        with pytest.raises(RebuildRunning):
            await Rebuild(settings, "lead_journey", lambda _: None, topics=topics).run()
        await Rebuild(settings, "event_counts", lambda _: None, topics=topics).run()
    finally:
        held.close()


async def test_a_generation_with_parked_events_does_not_become_live(
    settings: Settings, pool: Pool, kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(45, 20)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    monkeypatch.setattr("analytics.read_models.rebuild._SWITCHES", 2)
    await publish(kafka_bootstrap, topics[0], [Message(b"k", b"broken")], 12)
    with pytest.raises(generations.NotReady, match="parked"):
        await Rebuild(settings, "lead_journey", lambda _: None, topics=topics).run()
    with pool.connection() as connection:
        assert generations.live(connection, "lead_journey").generation == 1
        assert connection.execute("SELECT count(*) FROM lead_journey_v1").fetchone() == (0,)


def test_a_switch_waits_for_the_builder_and_gives_up(pool: Pool, settings: Settings) -> None:
    with pool.connection() as connection:
        model = generations.begin(connection, "event_counts", settings.zone)
        for consumer, offset in (
            (generations.progress_name("event_counts", 1), 10),
            (generations.progress_name("event_counts", 2), 9),
        ):
            connection.execute("INSERT INTO consumer_offsets VALUES (%s, 't', 0, %s)", (consumer, offset))
        with pytest.raises(generations.NotReady, match="behind"):
            generations.switch(connection, model, deadline=0.1)
        connection.execute("UPDATE consumer_offsets SET next_offset = 10")
        assert generations.switch(connection, model).generation == 1
        with pytest.raises(psycopg.errors.UndefinedTable):
            generations.remove_retired(connection, "event_counts", False)
            connection.execute("SELECT FROM event_counts_v1_g1")
        assert generations.remove_retired(connection, "event_counts", True) == []
