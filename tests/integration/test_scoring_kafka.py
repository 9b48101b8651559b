"""Scoring's roles on real Kafka and PostgreSQL: from lead-intake's topic to scores on scoring's own, through restarts and downtime."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest

from kehu.clock import DevelopmentClock
from kehu.commands import Context, Request
from kehu.events import Event, Recorded
from kehu.events.lead_intake import BehaviourRecorded, Contact, LeadCaptured
from kehu.events.scoring import LeadScoreBandChanged, LeadScoreChanged, Rule, ScoringModel
from kehu.events.values import Personal
from kehu.kafka.consumer import ConsumerRunner
from kehu.kafka.heard import HeardClock
from kehu.kafka.relay import Relay
from kehu.kafka.topics import Topic, ensure_topics
from kehu.testing.histories import history
from kehu.testing.kafka import Message, envelope, publish, read_topic, until
from scoring.bootstrap import Parts, migrate, parts, timers
from scoring.domain.scoring_model import PublishModel
from scoring.policies import REACTS_TO
from scoring.settings import ScoringSettings
from scoring.subscriptions import scores

SECRET = "a-secret-of-thirty-two-characters!"
START = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
PARTITIONS = 4
DEMO = Rule(
    name="demo", title="Demo", dimension="depth", behaviours=("demo_attended",), points=40.0, half_life_days=10.0
)


@pytest.fixture
def made(database: str, kafka_bootstrap: str, tmp_path: Path) -> Iterator[Parts]:
    DevelopmentClock(tmp_path / "clock.json").set(START)
    settings = ScoringSettings(
        environment="development",
        postgres_url=database,
        database=urlsplit(database).path.removeprefix("/"),
        kafka_bootstrap=kafka_bootstrap,
        jwt_secret=SECRET,
        clock_file=tmp_path / "clock.json",
    )
    migrate(settings)
    with parts(settings) as opened:
        yield opened


class World:
    """Topics of one test, and scoring's consumer as a task that can be stopped and started."""

    def __init__(self, made: Parts, prefix: str) -> None:
        self.made = made
        self.intake, self.scores = f"{prefix}.lead-intake.events", f"{prefix}.scoring.events"
        self.versions: dict[str, int] = {}
        self.sent = 0

    @property
    def clock(self) -> DevelopmentClock:
        assert isinstance(self.made.clock, DevelopmentClock)
        return self.made.clock

    @contextlib.asynccontextmanager
    async def consuming(self) -> AsyncIterator[ConsumerRunner]:
        bootstrap = self.made.settings.kafka_bootstrap
        runner = ConsumerRunner(
            self.made.pool, bootstrap, "scoring", scores(self.made.handler), topics=[self.intake], session_seconds=6.0
        )
        async with running(runner.run()):
            yield runner

    def message(self, stream: str, event: Event, customer: UUID) -> Message:
        version = self.versions[stream] = self.versions.get(stream, 0) + 1
        attributes = Recorded.from_bytes(envelope(stream, version, str(customer)).encode(event)).attributes
        now = self.clock.now().isoformat()
        value = Recorded({**attributes, "time": now, "recordedtime": now}).attributes
        return Message(str(customer).encode(), as_json(value))

    def captured(self, lead: UUID, customer: UUID) -> Message:
        contact: Personal[Contact] = Personal.sealed("c2VhbGVk")
        event = LeadCaptured(
            lead_id=lead, customer_id=customer, source="api", channel="web", contact=contact, rating="warm"
        )
        return self.message(f"lead-{lead}", event, customer)

    def demo(self, customer: UUID) -> Message:
        event = BehaviourRecorded(behaviour_id=uuid4(), customer_id=customer, kind="demo_attended")
        return self.message(f"activity-{customer}-202603", event, customer)

    async def send(self, *messages: Message) -> None:
        await publish(self.made.settings.kafka_bootstrap, self.intake, messages, PARTITIONS)
        self.sent += len(messages)

    async def handled(self) -> None:
        def done() -> bool:
            with self.made.pool.connection() as connection:
                row = connection.execute("SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets").fetchone()
            return row is not None and row[0] >= self.sent

        await until(done, f"{self.sent} records handled", 60)

    def events(self, lead: UUID) -> list[Recorded]:
        return self.made.store.stream(f"lead_score-{lead}").events

    def publish_model(self, model: ScoringModel) -> None:
        command = PublishModel(model, None, self.clock.now())
        self.made.handler.handle([Request(command, uuid4(), Context("user:test", "c", "r"))])


def as_json(attributes: object) -> bytes:
    return json.dumps(attributes).encode()


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Roles as tasks, ended in order. One that fails fails the test."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result


@pytest.fixture
async def world(made: Parts, topic_prefix: str) -> World:
    world = World(made, topic_prefix)
    topics = [Topic(world.intake, partitions=PARTITIONS), Topic(world.scores, partitions=PARTITIONS)]
    await ensure_topics(made.settings.kafka_bootstrap, topics)
    return world


def told(events: Sequence[Recorded]) -> list[tuple[str, object, object]]:
    return [(r.type, r.time, {k: v for k, v in r.data.items() if k != "model_version"}) for r in events]


@pytest.mark.req("SC-01")
async def test_from_the_topic_of_leads_to_the_topic_of_scores_through_restarts(world: World) -> None:
    made = history(11, 40)
    wanted = [Message(key.encode(), value) for key, value in made.lead_intake]
    third = len(wanted) // 3
    async with world.consuming():
        await world.send(*wanted[:third])
        await world.handled()
    async with world.consuming():
        await world.send(*wanted[third:])
    async with world.consuming():  # stopped in the middle of its work, and started again
        await world.handled()
    with world.made.pool.connection() as connection:
        parked = connection.execute("SELECT count(*) FROM parked_events").fetchone()
        leads = [row[0] for row in connection.execute("SELECT lead_id FROM leads WHERE model_version > 0").fetchall()]
        facts = connection.execute(
            "SELECT (SELECT count(*) FROM profile_inputs) + (SELECT count(*) FROM behaviour_inputs)"
        ).fetchone()
    assert parked == (0,)
    told_facts = [r for r in made.recorded()["crm.lead-intake.events"] if r.is_a(LeadCaptured, BehaviourRecorded)]
    assert facts == (len(told_facts),)
    stored = {lead: world.events(lead) for lead in leads}
    assert len(stored) > 40
    for events in stored.values():
        assert [r.version for r in events] == list(range(1, len(events) + 1))
        causes = [c for r in events if isinstance(r.event, LeadScoreChanged) for c in r.event.cause_events]
        assert len(causes) == len(set(causes))

    bootstrap = world.made.settings.kafka_bootstrap
    relay = Relay(world.made.pool, world.made.store, bootstrap, world.scores)
    total = sum(map(len, stored.values())) + 1  # and the model
    async with running(relay.run()):
        await until(lambda: asyncio.run(count(bootstrap, world.scores)) >= total, "all scores on the topic", 60, 0.2)
    records = await read_topic(bootstrap, world.scores)
    published: dict[str, list[Recorded]] = {}
    for record in records:
        recorded = Recorded.from_bytes(record.value)
        published.setdefault(recorded.stream, []).append(recorded)
        assert record.key == recorded.partition_key.encode()
    for lead, events in stored.items():
        assert [r.id for r in published[f"lead_score-{lead}"]] == [r.id for r in events]


async def count(bootstrap: str, topic: str) -> int:
    return len(await read_topic(bootstrap, topic))


@pytest.mark.req("SC-07")
async def test_after_downtime_no_score_fades_by_what_was_not_heard(world: World) -> None:
    """A second demo happened while scoring was down, before the first one had faded: its timer waits for the consumer."""
    world.publish_model(ScoringModel(rules=(DEMO,), caps={"frequency": 0.0, "depth": 100.0, "fit": 0.0}))
    lead, customer = uuid4(), uuid4()
    async with world.consuming() as runner:
        await world.send(world.captured(lead, customer), world.demo(customer))
        await world.handled()
        consumer = runner.consumer
    with world.made.pool.connection() as connection:
        row = connection.execute("SELECT due_at FROM timers").fetchone()
    assert row is not None
    due: datetime = row[0]
    world.clock.set(due - timedelta(hours=1))
    await world.send(world.demo(customer))
    world.clock.set(due + timedelta(days=1))

    heard = HeardClock(
        world.clock, world.made.pool, world.made.settings.kafka_bootstrap, consumer, [world.intake], relay_seconds=0.05
    )
    async with running(heard.run(), timers(world.made, heard).run()):
        looked = asyncio.Event()
        handled = heard._handled

        def watched(ends: dict[object, int]) -> bool:
            answer = handled(ends)
            loop.call_soon_threadsafe(looked.set)
            return answer

        loop = asyncio.get_running_loop()
        heard._handled = watched  # type: ignore[method-assign, assignment]
        async with asyncio.timeout(30):
            await looked.wait()
        assert heard.now() < due
        before = told(world.events(lead))
        async with world.consuming():
            await until(lambda: heard.now() >= due, "everything heard", 60)
            await until(lambda: len(world.events(lead)) > len(before), "the second demo scored")
    bands = [(r.event.band, r.time) for r in world.events(lead) if isinstance(r.event, LeadScoreBandChanged)]
    assert [band for band, _ in bands] == ["warm"]
    changes = [r.event for r in world.events(lead) if isinstance(r.event, LeadScoreChanged)]
    assert [change.cause for change in changes] == ["profile", "behaviour", "behaviour"]


def test_the_policy_hears_all_that_tells_of_a_lead() -> None:
    assert {cls.NAME for cls in REACTS_TO} == {
        "lead.captured", "lead.details_updated", "lead.merged", "lead.rejected", "behaviour.recorded", "customer.erased",
    }  # fmt: skip
