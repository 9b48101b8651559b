"""Scoring on real PostgreSQL: every event counts once, merges and models and time change scores, and any past score can be told again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from kehu.clock import FixedClock
from kehu.commands import CommandHandler, Context, Done, Failed, Outcome, Request
from kehu.events import Envelope, Event, Personal, Recorded
from kehu.events.lead_intake import (
    BehaviourRecorded,
    CustomerErased,
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
    LeadRejected,
)
from kehu.events.scoring import (
    Condition,
    LeadQualified,
    LeadScoreBandChanged,
    LeadScoreChanged,
    Rule,
    ScoringModel,
)
from kehu.eventstore import Cursor, EventStore
from kehu.kafka.effects import Policy
from kehu.migrations import migrate, of_service
from kehu.postgres import Connection, Pool, open_pool
from kehu.privacy import NoKeys
from kehu.read_models import Projector
from kehu.testing.histories import history
from kehu.timers import TimerRunner
from scoring.bootstrap import let_fade
from scoring.domain.default_model import DEFAULT_MODEL
from scoring.domain.scoring_model import PublishModel
from scoring.handlers import handlers
from scoring.policies import LEARN, REACTS_TO, learn
from scoring.processes import decay
from scoring.processes.rescoring import Rescoring
from scoring.read_models import scores
from scoring.read_models.explanation import Explanation, explain
from scoring.read_models.published_models import Books
from scoring.read_models.scores import Scores

START = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
CAPS: dict[Any, float] = {"frequency": 100.0, "depth": 100.0, "fit": 100.0}
DEMO = Rule(
    name="demo", title="Demo", dimension="depth", behaviours=("demo_attended",), points=45.0, half_life_days=10.0
)
VIEW = Rule(
    name="view",
    title="View",
    dimension="frequency",
    behaviours=("page_viewed",),
    points=2.0,
    cap=10.0,
    half_life_days=3.0,
)
BANK = Rule(
    name="bank",
    title="Bank",
    dimension="fit",
    conditions=(Condition(attribute="industry", operator="eq", value="bank"),),
    points=20.0,
)
MODEL = ScoringModel(rules=(DEMO, VIEW, BANK), caps=CAPS)


class NoProgress:
    """The progress of a consumer that keeps none."""

    def write(self, connection: Connection) -> None:
        connection.execute("SELECT 1")


class Intake:
    """Makes the events that lead-intake would publish."""

    def __init__(self, clock: FixedClock) -> None:
        self.clock = clock
        self.versions: dict[str, int] = {}

    def event(self, stream: str, event: Event, customer: UUID, at: datetime | None = None) -> Recorded:
        version = self.versions[stream] = self.versions.get(stream, 0) + 1
        now = self.clock.now()
        envelope = Envelope(
            id=uuid4(), producer="lead-intake", stream=stream, version=version, time=at or now, recorded=now,
            partition_key=str(customer), customer_id=str(customer), correlation_id="c", causation_id="r",
            actor="user:test", traceparent=None, store_epoch="test",
        )  # fmt: skip
        return Recorded.from_bytes(envelope.encode(event))

    def captured(self, lead: UUID, customer: UUID, at: datetime | None = None, **more: Any) -> Recorded:
        given = {"source": "api", "channel": "web", "contact": Personal.sealed("c2VhbGVk"), "rating": "warm", **more}
        return self.event(f"lead-{lead}", LeadCaptured(lead_id=lead, customer_id=customer, **given), customer, at)

    def did(self, customer: UUID, kind: str, at: datetime | None = None, **more: Any) -> Recorded:
        happened = at or self.clock.now()
        event = BehaviourRecorded(behaviour_id=uuid4(), customer_id=customer, kind=kind, **more)
        return self.event(f"activity-{customer}-{happened:%Y%m}", event, customer, at)

    def merged(self, lead: UUID, customer: UUID, survivor: UUID) -> Recorded:
        event = LeadMerged(
            lead_id=lead, customer_id=customer, survivor_lead_id=survivor, confidence=1.0, rule="exact_phone"
        )
        return self.event(f"lead-{lead}", event, customer)

    def rejected(self, lead: UUID, customer: UUID) -> Recorded:
        return self.event(
            f"lead-{lead}", LeadRejected(lead_id=lead, customer_id=customer, reason="no_budget"), customer
        )


class Suite:
    """Scoring's parts without its processes."""

    def __init__(self, pool: Pool, clock: FixedClock) -> None:
        self.pool, self.clock = pool, clock
        self.books = Books()
        self.store = EventStore(pool, "scoring")
        self.handler = CommandHandler(self.store, handlers(self.books, clock), clock, NoKeys())
        self.policy = Policy(self.handler, LEARN, "scoring", learn, REACTS_TO)
        self.timers = TimerRunner(self.handler, clock, "scoring", {decay.PROCESS: let_fade})
        self.rescoring = Rescoring(self.handler, self.books, clock, batch=3)
        self.intake = Intake(clock)

    def publish(self, model: ScoringModel, expected: int | None = None) -> Outcome:
        request = Request(
            PublishModel(model, None, self.clock.now()),
            uuid4(),
            Context("user:test", "c", "r"),
            expected_version=expected,
        )
        return self.handler.handle([request])[0]

    def hear(self, *events: Recorded) -> None:
        self.policy(events, NoProgress())

    def events(self, lead: UUID) -> list[Recorded]:
        return self.store.stream(f"lead_score-{lead}").events

    def names(self, lead: UUID) -> list[str]:
        return [recorded.event.NAME.removeprefix("lead_score.") for recorded in self.events(lead)]

    def score(self, lead: UUID) -> float | None:
        told = [r.event.score for r in self.events(lead) if isinstance(r.event, LeadScoreChanged)]
        return told[-1] if told else None

    def explain(self, lead: UUID, as_of: datetime | None = None, until: datetime | None = None) -> Explanation | None:
        with self.pool.connection() as connection:
            return explain(connection, self.books, lead, until or as_of or self.clock.now(), as_of)

    def due(self) -> dict[UUID, datetime]:
        with self.pool.connection() as connection:
            rows = connection.execute("SELECT key, due_at FROM timers WHERE process = 'decay'").fetchall()
        return {UUID(key): due for key, due in rows}


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock(START)


@pytest.fixture
def suite(database: str, clock: FixedClock) -> Iterator[Suite]:
    migrate(database, of_service("scoring"))
    pool = open_pool(database, "test", 4)
    made = Suite(pool, clock)
    made.publish(MODEL)
    yield made
    pool.close()


def whole(outcomes: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Events without what differs between two runs of the same history."""
    return [{"type": r.type, "stream": r.stream, "time": r.time, "data": r.data} for r in outcomes]


@pytest.mark.req("SC-01")
def test_a_capture_and_behaviours_give_scores_that_say_why(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    captured = suite.intake.captured(lead, customer, industry="bank")
    suite.hear(captured)
    suite.clock.advance(MINUTE)
    demos = [suite.intake.did(customer, "demo_attended") for _ in range(2)]
    suite.hear(*demos)
    assert suite.names(lead) == ["changed", "changed", "band_changed", "changed", "band_changed", "lead_qualified"]
    first, second, _, third, *_ = [r.event for r in suite.events(lead)]
    assert isinstance(first, LeadScoreChanged)
    assert (first.score, first.cause, first.cause_events) == (20.0, "profile", (captured.id,))
    assert isinstance(second, LeadScoreChanged)
    assert (second.score, second.cause, second.cause_events) == (65.0, "behaviour", (demos[0].id,))
    assert isinstance(third, LeadScoreChanged)
    assert third.score == 100.0
    assert {part.rule: part.points for part in third.parts} == {"demo": 90.0, "bank": 20.0, "cap.score": -10.0}
    envelope = suite.events(lead)[1]
    assert (envelope.partition_key, envelope.customer_id) == (str(customer), str(customer))
    assert (envelope.causation_id, envelope.correlation_id) == (str(demos[0].id), "c")
    assert envelope.actor == "service:scoring"


@pytest.mark.req("SC-01")
def test_hearing_the_same_events_again_does_nothing(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    told = [suite.intake.captured(lead, customer), suite.intake.did(customer, "demo_attended")]
    suite.hear(*told)
    before = [r.id for r in suite.events(lead)]
    suite.hear(*told)
    suite.hear(told[1], suite.intake.did(customer, "opened_nothing"))
    assert [r.id for r in suite.events(lead)] == before


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_scores_do_not_depend_on_how_events_are_batched(
    suite: Suite, database: str, clock: FixedClock, seed: int
) -> None:
    told = [Recorded.from_bytes(value) for _, value in history(seed, 12).lead_intake]
    told = [recorded for recorded in told if recorded.is_a(*REACTS_TO)]
    streams: list[dict[str, list[dict[str, Any]]]] = []
    for size in (1, 7, len(told)):
        with suite.pool.connection() as connection:
            connection.execute(
                "TRUNCATE stored_events, commands, leads, profile_inputs, behaviour_inputs, scoring_models, timers, scores_v1"
            )
        fresh = Suite(suite.pool, clock)
        fresh.publish(DEFAULT_MODEL)
        for start in range(0, len(told), size):
            fresh.hear(*told[start : start + size])
        found: dict[str, list[dict[str, Any]]] = {}
        cursor = Cursor()
        while rows := fresh.store.read(cursor, 1000):
            cursor = rows[-1].cursor
            for row in rows:
                found.setdefault(row.stream, []).extend(whole([row.recorded()]))
        streams.append(found)
    assert len(streams[0]) > 10
    assert streams[0] == streams[1] == streams[2]


@pytest.mark.req("SC-01")
def test_behaviour_before_the_capture_counts(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.did(customer, "demo_attended"))
    assert suite.score(lead) is None
    suite.hear(suite.intake.captured(lead, customer))
    assert suite.score(lead) == 45.0


@pytest.mark.req("SC-04")
def test_a_merged_lead_gives_what_is_known_to_the_survivor(suite: Suite) -> None:
    first, second, customer = uuid4(), uuid4(), uuid4()
    suite.hear(suite.intake.captured(first, customer))
    suite.hear(suite.intake.captured(second, customer, industry="bank"), suite.intake.merged(second, customer, first))
    suite.hear(suite.intake.did(customer, "demo_attended"))
    assert suite.score(first) == 65.0
    assert suite.names(second) == []
    found = suite.explain(second)
    assert found is not None
    assert (found.lead_id, found.asked_for, found.score) == (first, second, 65.0)


@pytest.mark.req("SC-04")
def test_a_merge_across_customers_is_scored_and_named_as_the_cause(suite: Suite) -> None:
    (first, anna), (second, bo) = (uuid4(), uuid4()), (uuid4(), uuid4())
    suite.hear(suite.intake.captured(first, anna), suite.intake.captured(second, bo, industry="bank"))
    suite.hear(suite.intake.did(bo, "demo_attended"))
    merged = suite.intake.merged(second, bo, first)
    suite.hear(merged)
    last = [r.event for r in suite.events(first) if isinstance(r.event, LeadScoreChanged)][-1]
    assert (last.score, last.cause, last.cause_events) == (65.0, "merge", (merged.id,))
    before = suite.names(second)
    suite.hear(suite.intake.did(bo, "page_viewed"))
    assert suite.score(first) == 67.0
    assert suite.names(second) == before
    assert set(suite.due()) == {first}


def test_a_rejected_lead_is_left_alone_and_the_next_one_starts_with_what_is_known(suite: Suite) -> None:
    first, second, customer = uuid4(), uuid4(), uuid4()
    suite.hear(suite.intake.captured(first, customer), suite.intake.did(customer, "demo_attended"))
    assert set(suite.due()) == {first}
    suite.hear(suite.intake.rejected(first, customer))
    assert suite.due() == {}
    before = suite.names(first)
    suite.clock.advance(DAY)
    suite.hear(suite.intake.did(customer, "demo_attended"))
    assert suite.names(first) == before
    suite.hear(suite.intake.captured(second, customer))
    assert suite.score(second) == pytest.approx(45.0 + 45.0 * 0.5**0.1, abs=0.01)
    ended = suite.explain(first)
    assert ended is not None
    assert (ended.lead_id, ended.open, ended.score, ended.at) == (first, False, 45.0, START)


def test_an_erased_customer_is_not_scored_any_more(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer))
    erased = CustomerErased(customer_id=customer, key_destroyed=True)
    suite.hear(
        suite.intake.event(f"customer-{customer}", erased, customer), suite.intake.did(customer, "demo_attended")
    )
    assert suite.names(lead) == ["changed"]


@pytest.mark.req("SC-01")
def test_more_known_of_the_profile_changes_the_fit(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer, industry="bank"))
    suite.clock.advance(MINUTE)
    told = LeadDetailsUpdated(lead_id=lead, customer_id=customer, industry="farming")
    suite.hear(suite.intake.event(f"lead-{lead}", told, customer))
    assert suite.score(lead) == 0.0


@pytest.mark.req("SC-02")
def test_a_lead_is_qualified_once_in_its_life(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer))
    for _ in range(3):
        suite.hear(*[suite.intake.did(customer, "demo_attended") for _ in range(2)])
        suite.clock.advance(60 * DAY)
        while suite.timers.step():
            pass
    names = suite.names(lead)
    assert names.count("lead_qualified") == 1
    assert [r.event.band for r in suite.events(lead) if isinstance(r.event, LeadScoreBandChanged)] == [
        "warm", "hot", "warm", "cold", "warm", "hot", "warm", "cold", "warm", "hot", "warm", "cold",
    ]  # fmt: skip


@pytest.mark.req("SC-07")
def test_time_alone_moves_the_band_at_the_second_at_which_it_is_due(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer), suite.intake.did(customer, "demo_attended"))
    (due,) = suite.due().values()
    suite.clock.at = due - timedelta(seconds=1)
    assert suite.timers.step() == 0
    suite.clock.at = due
    assert suite.timers.step() == 1
    changed, band = suite.events(lead)[-2:]
    assert isinstance(changed.event, LeadScoreChanged)
    assert (changed.event.cause, changed.event.score, changed.time) == ("decay", 34.99, due)
    assert isinstance(band.event, LeadScoreBandChanged)
    assert (band.event.band, band.time) == ("cold", due)
    assert suite.due() == {}
    assert suite.timers.step() == 0


@pytest.mark.req("SC-07")
def test_after_downtime_bands_change_at_the_instants_at_which_they_were_due(suite: Suite) -> None:
    leads = [(uuid4(), uuid4()) for _ in range(5)]
    for lead, customer in leads:
        suite.clock.advance(MINUTE)
        suite.hear(
            suite.intake.captured(lead, customer), *[suite.intake.did(customer, "demo_attended") for _ in range(2)]
        )
    due = suite.due()
    suite.clock.advance(90 * DAY)
    while suite.timers.step():
        pass
    for lead, _ in leads:
        warm, cold = [r for r in suite.events(lead) if isinstance(r.event, LeadScoreBandChanged)][-2:]
        assert (warm.data["band"], cold.data["band"]) == ("warm", "cold")
        assert warm.time == due[lead]
        assert abs((cold.time - warm.time).total_seconds() - 864_000 * math.log2(74.995 / 34.995)) <= 1
    assert suite.due() == {}


@pytest.mark.req("SC-07")
def test_a_timer_that_comes_early_finds_nothing_and_is_set_anew(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer), suite.intake.did(customer, "demo_attended"))
    (due,) = suite.due().values()
    early = START + DAY
    with suite.pool.connection() as connection:
        connection.execute("UPDATE timers SET due_at = %s", (early,))
    suite.clock.at = early
    before = suite.names(lead)
    assert suite.timers.step() == 1
    assert suite.names(lead) == before
    assert suite.due() == {lead: due}


@pytest.mark.req("SC-04")
def test_a_score_as_of_any_past_instant_is_what_the_live_run_said_then(suite: Suite) -> None:
    told = [Recorded.from_bytes(value) for _, value in history(5, 15, days=20).lead_intake]
    told = sorted((r for r in told if r.is_a(*REACTS_TO)), key=lambda r: r.time)
    leads = {UUID(r.data["lead_id"]) for r in told if r.is_a(LeadCaptured)}
    suite.publish(DEFAULT_MODEL)
    said: list[tuple[UUID, datetime, Explanation | None]] = []
    for number, recorded in enumerate(told):
        suite.clock.at = max(suite.clock.at + timedelta(seconds=37), recorded.time)
        suite.hear(recorded)
        if number % 20 == 0:
            suite.publish(MODEL if number % 40 == 0 else DEFAULT_MODEL)
        if number % 7 == 0:
            suite.rescoring.step()
        if number % 3 == 0:
            suite.timers.step()
        suite.clock.advance(timedelta(seconds=number % 5 * 1000, microseconds=number))
        if number % 6 == 0:
            said += [(lead, suite.clock.now(), suite.explain(lead)) for lead in leads]
        suite.clock.advance(timedelta(microseconds=1))
    assert sum(known is not None for _, _, known in said) > 100
    assert any(known is None for _, _, known in said)
    suite.clock.advance(30 * DAY)
    for lead, then, known in said:
        assert suite.explain(lead, as_of=then) == known


@pytest.mark.req("SC-04")
def test_every_recorded_score_can_be_explained_again_and_its_parts_add_up(suite: Suite) -> None:
    told = [Recorded.from_bytes(value) for _, value in history(6, 8).lead_intake]
    suite.publish(DEFAULT_MODEL)
    suite.clock.advance(MINUTE)
    leads = set()
    for recorded in (r for r in told if r.is_a(*REACTS_TO)):
        suite.clock.at = max(suite.clock.at + timedelta(seconds=1), recorded.time)
        suite.hear(recorded)
        leads |= {UUID(recorded.data["lead_id"])} if recorded.is_a(LeadCaptured) else set()
    checked = 0
    for lead in leads:
        for recorded in suite.events(lead):
            event = recorded.event
            if isinstance(event, LeadScoreChanged):
                assert round(sum(part.points for part in event.parts) * 100) == round(event.score * 100)
                again = suite.explain(lead, as_of=recorded.recorded, until=event.at)
                assert again is not None
                assert (again.score, again.model_version) == (event.score, event.model_version)
                assert [(p["rule"], p["points"]) for p in again.parts] == [(p.rule, p.points) for p in event.parts]
                checked += 1
    assert checked > 50


@pytest.mark.req("SC-04")
def test_until_leaves_out_what_happened_later_and_looks_ahead(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer), suite.intake.did(customer, "demo_attended"))
    suite.clock.advance(DAY)
    late = suite.intake.did(customer, "demo_attended", at=START + MINUTE)
    suite.hear(late)
    now = suite.clock.now()
    scores_of = {
        "known then": suite.explain(lead, as_of=START + 2 * MINUTE),
        "known now": suite.explain(lead, as_of=now, until=START + 2 * MINUTE),
        "ahead": suite.explain(lead, as_of=now, until=START + MINUTE + 10 * DAY),
    }
    rounded = {name: round(found.score) for name, found in scores_of.items() if found}
    assert rounded == {"known then": 45, "known now": 90, "ahead": 45}
    assert suite.explain(lead, as_of=START - MINUTE) is None
    assert suite.explain(uuid4()) is None


@pytest.mark.req("SC-05")
def test_a_new_model_scores_all_leads_again_in_batches_that_can_be_interrupted(suite: Suite) -> None:
    leads = [(uuid4(), uuid4()) for _ in range(8)]
    for lead, customer in leads:
        suite.hear(suite.intake.captured(lead, customer, industry="bank"))
    better = MODEL.model_copy(update={"rules": (DEMO, VIEW, BANK.model_copy(update={"points": 85.0}))})
    outcome = suite.publish(better, expected=1)
    assert isinstance(outcome, Done)
    assert outcome.result == {"published": True, "model_version": 2}
    assert suite.rescoring.step() == 3
    again = Suite(suite.pool, suite.clock)  # another process goes on where this one stopped
    assert [again.rescoring.step() for _ in range(3)] == [3, 2, 0]
    for lead, _ in leads:
        last = suite.events(lead)[-1].event
        assert isinstance(last, LeadQualified)
        changed = [r.event for r in suite.events(lead) if isinstance(r.event, LeadScoreChanged)][-1]
        assert (changed.cause, changed.score, changed.model_version) == ("model", 85.0, 2)


@pytest.mark.req("SC-05")
def test_a_lead_that_was_scored_by_the_old_model_meanwhile_is_found(suite: Suite) -> None:
    lead, customer = uuid4(), uuid4()
    suite.hear(suite.intake.captured(lead, customer))
    suite.publish(MODEL.model_copy(update={"base": 10.0}))
    while suite.rescoring.step():
        pass
    with suite.pool.connection() as connection:  # as a transaction does that had read version 1 and commits late
        connection.execute("UPDATE leads SET model_version = 1")
    assert suite.rescoring.step() == 1
    assert suite.rescoring.step() == 0
    assert suite.score(lead) == 10.0


@pytest.mark.req("SC-05")
def test_publishing_checks_the_version_that_was_seen(suite: Suite) -> None:
    better = MODEL.model_copy(update={"base": 1.0})
    lost = suite.publish(better, expected=7)
    assert isinstance(lost, Failed)
    assert lost.kind == "conflict"
    wrong = suite.publish(MODEL.model_copy(update={"warm_at": 90.0}))
    assert isinstance(wrong, Failed)
    assert wrong.refusal.slug == "scoring-model-invalid"
    same = suite.publish(MODEL)
    assert isinstance(same, Done)
    assert same.result == {"published": False, "model_version": None}


@pytest.mark.req("SC-03")
def test_the_list_equals_the_fold_of_the_log_also_after_a_rebuild(suite: Suite) -> None:
    told = [Recorded.from_bytes(value) for _, value in history(9, 15).lead_intake]
    suite.hear(*[recorded for recorded in told if recorded.is_a(*REACTS_TO)])
    projector = Projector(suite.store, Scores(), batch=11)
    while projector.step():
        pass
    expected: dict[UUID, tuple[float, str, bool]] = {}
    cursor = Cursor()
    while rows := suite.store.read(cursor, 1000):
        cursor = rows[-1].cursor
        for row in rows:
            event = row.recorded().event
            if isinstance(event, LeadScoreChanged | LeadScoreBandChanged):
                expected[event.lead_id] = (event.score, event.band, event.qualified)
    for rebuilt in (False, True):
        if rebuilt:
            projector.rebuild()
        with suite.pool.connection() as connection:
            table = connection.execute(
                "SELECT lead_id, score::float8, band, qualified_at IS NOT NULL FROM scores_v1"
            ).fetchall()
            closed = {
                lead
                for (lead,) in connection.execute("SELECT lead_id FROM leads WHERE closed_at IS NOT NULL").fetchall()
            }
            pages: list[dict[str, Any]] = []
            after: tuple[float, UUID] | None = None
            while page := scores.page(connection, 4, after=after):
                pages += page
                after = (page[-1]["score"], page[-1]["lead_id"])
            warm = scores.page(connection, 100, band="warm")
        assert {lead: (score, band, qualified) for lead, score, band, qualified in table} == expected
        assert [row["lead_id"] for row in pages] == sorted(
            expected.keys() - closed, key=lambda lead: (-expected[lead][0], lead.int)
        )
        assert {row["lead_id"] for row in warm} == {
            lead for lead, (_, band, _) in expected.items() if band == "warm" and lead not in closed
        }
