"""When a score, a band and the qualification are recorded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kehu.events import Event
from kehu.events.scoring import (
    Dimension,
    LeadQualified,
    LeadScoreBandChanged,
    LeadScoreChanged,
    Part,
    Rule,
    ScoringModel,
)
from kehu.testing.specs import Spec
from scoring.domain.evaluation import SECOND, BehaviourInput, Inputs, ProfileInput, Rulebook
from scoring.domain.lead_score import LEAD_SCORE, Rescore, assess

START = datetime(2026, 3, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)
LEAD, CUSTOMER = UUID(int=1), UUID(int=2)
DEMO = Rule(
    name="demo", title="Demo", dimension="depth", behaviours=("demo_attended",), points=50.0, half_life_days=10.0
)
PAGE = Rule(name="page", title="Page", dimension="frequency", behaviours=("page_viewed",), points=1.0, cap=3.0)
BYE = Rule(
    name="bye", title="Bye", dimension="frequency", behaviours=("unsubscribed",), points=-40.0, half_life_days=5.0
)
CAPS: dict[Dimension, float] = {"frequency": 100.0, "depth": 100.0, "fit": 100.0}
BOOK = Rulebook(ScoringModel(rules=(DEMO, PAGE, BYE), caps=CAPS), 1, START)
BIRTH = ProfileInput(UUID(int=9), START, {})


def did(kind: str, at: datetime, number: int) -> BehaviourInput:
    return BehaviourInput(UUID(int=number), at, kind, {})


def rescore(at: datetime, *behaviours: BehaviourInput, cause: Any = "behaviour", book: Rulebook = BOOK) -> Rescore:
    causes = (behaviours[-1].event_id,) if behaviours and cause == "behaviour" else ()
    return Rescore(LEAD, CUSTOMER, at, cause, causes, book, Inputs.of([BIRTH], behaviours))


def changed(score: float, previous: float, at: datetime, **fields: Any) -> LeadScoreChanged:
    given: dict[str, Any] = {
        "band": "cold",
        "qualified": False,
        "parts": (),
        "cause": "behaviour",
        "cause_events": (),
        "model_version": 1,
        **fields,
    }
    return LeadScoreChanged(lead_id=LEAD, customer_id=CUSTOMER, score=score, previous=previous, at=at, **given)


def band(to: Any, previous: Any, score: float, at: datetime) -> LeadScoreBandChanged:
    return LeadScoreBandChanged(
        lead_id=LEAD,
        customer_id=CUSTOMER,
        band=to,
        previous=previous,
        score=score,
        qualified=False,
        model_version=1,
        at=at,
    )


def kinds(events: Any) -> list[str]:
    return [event.NAME.removeprefix("lead_score.") for event in events]


FIRST = changed(0.0, 0.0, START, cause="profile")
D1, D2 = did("demo_attended", START, 11), did("demo_attended", START + SECOND, 12)


@pytest.mark.req("SC-01")
def test_the_first_score_is_recorded_even_when_it_is_nothing() -> None:
    Spec(LEAD_SCORE).when(rescore(START, cause="profile")).then(FIRST)


@pytest.mark.req("SC-03")
def test_a_behaviour_changes_score_and_band() -> None:
    part = Part(rule="demo", dimension="depth", points=50.0, count=1, events=(D1.event_id,))
    Spec(LEAD_SCORE).given(FIRST).when(rescore(START, D1)).then(
        changed(50.0, 0.0, START, band="warm", parts=(part,), cause_events=(D1.event_id,)),
        band("warm", "cold", 50.0, START),
    )


@pytest.mark.req("SC-02")
def test_a_lead_is_qualified_once_however_often_it_crosses_the_line() -> None:
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START + SECOND, D1, D2))
    assert kinds(spec.events) == ["changed", "band_changed", "lead_qualified"]
    assert spec.events[2] == LeadQualified(
        lead_id=LEAD, customer_id=CUSTOMER, score=100.0, band="hot", threshold=80.0, model_version=1, at=START + SECOND
    )
    spec.when(rescore(START + 30 * DAY, D1, D2, cause="decay"))
    assert kinds(spec.events) == ["changed", "band_changed"]
    again = [did("demo_attended", START + 31 * DAY, n) for n in (21, 22)]
    spec.when(rescore(START + 31 * DAY, D1, D2, *again))
    assert kinds(spec.events) == ["changed", "band_changed"]


def test_a_resend_and_a_behaviour_that_no_rule_counts_do_nothing() -> None:
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START, D1))
    spec.when(rescore(START, D1)).then_nothing()
    spec.when(rescore(START, D1, did("call_answered", START, 30))).then_nothing()


@pytest.mark.req("SC-03")
def test_a_band_is_left_only_below_the_hysteresis() -> None:
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START, D1))
    # 50 points fall to 38.8 in 3.7 days: below the edge of 40, not yet below 35
    spec.when(rescore(START + timedelta(days=3.7), D1, did("other", START + timedelta(days=3.7), 31)))
    assert kinds(spec.events) == ["changed"]
    spec.when(rescore(START + timedelta(days=5.2), D1, did("other", START + timedelta(days=5.2), 32)))
    assert kinds(spec.events) == ["changed", "band_changed", "changed"]  # 34.99 when time came there, then 34.87


@pytest.mark.req("SC-07")
def test_time_alone_takes_the_band_to_the_second() -> None:
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START, D1))
    due = assess(rescore(START, D1), LEAD_SCORE.fold([FIRST])).next_change
    # 50 × 0.5^(t / 10 d) rounds below 35.00 at t = 10 d × log2(50 / 34.995)
    assert due is not None
    assert abs((due - START).total_seconds() - 444_769.5) < 1
    spec.when(rescore(due - SECOND, D1, cause="decay")).then_nothing()
    spec.when(rescore(due, D1, cause="decay"))
    assert kinds(spec.events) == ["changed", "band_changed"]
    assert [(e.cause, e.cause_events, e.score, e.at) for e in spec.events if isinstance(e, LeadScoreChanged)] == [
        ("decay", (), 34.99, due)
    ]


@pytest.mark.req("SC-07")
def test_a_penalty_that_fades_can_qualify_a_lead() -> None:
    bye = did("unsubscribed", START + 2 * SECOND, 13)
    command = rescore(START + 2 * SECOND, D1, D2, bye)
    assessment = assess(command, LEAD_SCORE.fold([FIRST]))
    assert kinds(assessment.events) == ["changed", "band_changed"]
    assert assessment.state.band == "warm"
    # 100 × 0.5^(t/10) − 40 × 0.5^(t/5) = 60 at first, and no more than 62.5 later: never hot again, so the next is cold
    assert assessment.next_change is not None
    events = LEAD_SCORE.decide(rescore(assessment.next_change, D1, D2, bye, cause="decay"), assessment.state)
    assert [e.band for e in events if isinstance(e, LeadScoreBandChanged)] == ["cold"]

    steady = DEMO.model_copy(update={"half_life_days": None})
    book = Rulebook(ScoringModel(rules=(steady, PAGE, BYE), caps=CAPS), 1, START)
    assessment = assess(rescore(START + 2 * SECOND, D1, D2, bye, book=book), LEAD_SCORE.fold([FIRST]))
    due = assessment.next_change
    assert due is not None
    assert abs((due - bye.time).total_seconds() - 431_844.2) < 1  # 5 d × log2(40 / 20.005)
    assert kinds(LEAD_SCORE.decide(rescore(due, D1, D2, bye, cause="decay", book=book), assessment.state)) == [
        "changed", "band_changed", "lead_qualified",
    ]  # fmt: skip


@pytest.mark.req("SC-07")
def test_the_history_is_the_same_when_the_timer_is_slower_than_the_next_event() -> None:
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START, D1))
    due = assess(rescore(START, D1), LEAD_SCORE.fold([FIRST])).next_change
    assert due is not None
    later = START + 20 * DAY
    command = rescore(later, D1, did("page_viewed", later, 40))
    slow = Spec(LEAD_SCORE).given(*spec._given).when(command).events
    quick = spec.when(rescore(due, D1, cause="decay")).events
    assert kinds(slow) == ["changed", "band_changed", "changed"]
    assert list(slow) == [*quick, *spec.when(command).events]


def test_a_new_model_is_not_taken_for_time() -> None:
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START, D1))
    stricter = Rulebook(ScoringModel(rules=(DEMO.model_copy(update={"points": 10.0}),), caps=CAPS), 2, START + DAY)
    spec.when(rescore(START + 2 * DAY, D1, cause="model", book=stricter))
    assert [(e.cause, e.model_version) for e in spec.events if isinstance(e, LeadScoreChanged)] == [("model", 2)]
    assert kinds(spec.events) == ["changed", "band_changed"]


def test_a_late_fact_counts_from_the_last_known_instant() -> None:
    page = did("page_viewed", START + DAY, 40)
    spec = Spec(LEAD_SCORE).given(FIRST).when(rescore(START + DAY, page))
    spec.when(rescore(START, D1, page))
    assert [(e.score, e.at) for e in spec.events if isinstance(e, LeadScoreChanged)] == [(47.65, START + DAY)]


steps = st.lists(
    st.tuples(st.sampled_from(["demo_attended", "page_viewed", "unsubscribed"]), st.floats(0, 40)), max_size=15
)


@pytest.mark.req("SC-02")
@settings(max_examples=80, deadline=None)
@given(steps, st.lists(st.booleans(), min_size=200, max_size=200))
def test_any_life_of_a_lead(life: list[tuple[str, float]], timer_first: list[bool]) -> None:
    """Whatever happens: one qualification, bands that follow each other, scores that follow each other, and one history
    whether timers fire in time or never."""
    histories: list[list[Event]] = []
    for timers in (timer_first, [False] * 200):
        known: list[BehaviourInput] = []
        events: list[Event] = []
        at, due, fired = START, None, iter(timers)
        for number, (kind, days) in enumerate(life):
            at += timedelta(days=days)
            while due is not None and due < at and next(fired, False):
                assessment = assess(rescore(due, *known, cause="decay"), LEAD_SCORE.fold(events))
                events += assessment.events
                due = assessment.next_change
            known.append(did(kind, at, number + 100))
            assessment = assess(rescore(at, *known), LEAD_SCORE.fold(events))
            events += assessment.events
            due = assessment.next_change
        histories.append(events)
        assert sum(isinstance(e, LeadQualified) for e in events) <= 1
        scores = [e for e in events if isinstance(e, LeadScoreChanged)]
        assert all(b.previous == a.score for a, b in pairwise(scores))
        bands = [e for e in events if isinstance(e, LeadScoreBandChanged)]
        assert all(e.band != e.previous for e in bands)
        assert all(b.previous == a.band for a, b in pairwise(bands))
        times = [e.happened for e in events]
        assert LEAD_SCORE.fold(events) == LEAD_SCORE.fold(events[-1:])  # the newest event alone is the state
        assert times == sorted(times)  # type: ignore[type-var]
    assert histories[0] == histories[1]
