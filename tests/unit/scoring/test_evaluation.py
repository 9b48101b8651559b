"""The arithmetic of a score: parts add up, time only takes fading points away, and the next change is found to the second."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import get_args
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kehu.events.scoring import Condition, Dimension, Rule, ScoringModel
from scoring.domain.evaluation import (
    SECOND,
    BehaviourInput,
    Evaluation,
    Inputs,
    ProfileInput,
    Rulebook,
    band_of,
    evaluate,
    quiet,
)

START = datetime(2026, 3, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)


def book(*rules: Rule, **settings: object) -> Rulebook:
    return Rulebook(ScoringModel(rules=rules, **settings), 1, START)  # type: ignore[arg-type]


def did(kind: str, at: datetime = START, number: int = 1, **attributes: object) -> BehaviourInput:
    return BehaviourInput(UUID(int=number), at, kind, attributes)


def is_so(at: datetime = START, number: int = 1, **attributes: object) -> ProfileInput:
    return ProfileInput(UUID(int=number), at, {name.replace("__", "."): value for name, value in attributes.items()})


def points(evaluation: Evaluation) -> dict[str, float]:
    return {part.rule: part.points for part in evaluation.parts}


OPENED = Rule(name="opened", title="Opened an email", dimension="frequency", behaviours=("email_opened",), points=4.0)
DEMO = Rule(
    name="demo",
    title="Attended a demo",
    dimension="depth",
    behaviours=("demo_attended",),
    points=30.0,
    half_life_days=10.0,
)
LEFT = Rule(
    name="left",
    title="Unsubscribed",
    dimension="frequency",
    behaviours=("unsubscribed",),
    points=-10.0,
    half_life_days=10.0,
)
RICH = Rule(
    name="budget",
    title="Has a budget",
    dimension="fit",
    conditions=(Condition(attribute="facts.budget", operator="ge", value=1000),),
    points=20.0,
)


@pytest.mark.req("SC-01")
def test_points_of_three_dimensions_add_up() -> None:
    inputs = Inputs.of([is_so(facts__budget=5000)], [did("email_opened", number=2), did("demo_attended", number=3)])
    evaluation = evaluate(book(OPENED, DEMO, RICH, base=5.0), inputs, START)
    assert points(evaluation) == {"base": 5.0, "opened": 4.0, "demo": 30.0, "budget": 20.0}
    assert evaluation.score == 59.0


@pytest.mark.req("SC-01")
def test_points_halve_in_a_half_life_at_any_moment() -> None:
    inputs = Inputs.of(behaviours=[did("demo_attended")])
    rules = book(DEMO)
    assert evaluate(rules, inputs, START + 10 * DAY).score == 15.0
    assert evaluate(rules, inputs, START + 20 * DAY).score == 7.5
    assert evaluate(rules, inputs, START + timedelta(days=5)).score == 21.21  # 30 / √2


@pytest.mark.req("SC-01")
def test_caps_limit_a_rule_and_a_dimension() -> None:
    capped = OPENED.model_copy(update={"cap": 10.0})
    many = Inputs.of(behaviours=[did("email_opened", number=n) for n in range(1, 6)])
    assert points(evaluate(book(capped), many, START)) == {"opened": 10.0}

    caps = {"frequency": 12.0, "depth": 40.0, "fit": 30.0}
    evaluation = evaluate(book(OPENED, caps=caps), many, START)
    assert points(evaluation) == {"opened": 20.0, "cap.frequency": -8.0}
    assert evaluation.score == 12.0


@pytest.mark.req("SC-01")
def test_negative_points_take_away_and_the_scale_ends_at_0_and_100() -> None:
    evaluation = evaluate(
        book(OPENED, LEFT), Inputs.of(behaviours=[did("email_opened"), did("unsubscribed", number=2)]), START
    )
    assert points(evaluation) == {"opened": 4.0, "left": -10.0, "cap.score": 6.0}
    assert evaluation.score == 0.0

    everything = {"frequency": 100.0, "depth": 100.0, "fit": 100.0}
    demos = Inputs.of(behaviours=[did("demo_attended", number=n) for n in range(1, 5)])
    evaluation = evaluate(book(DEMO, caps=everything, base=5.0), demos, START)
    assert points(evaluation) == {"base": 5.0, "demo": 120.0, "cap.depth": -20.0, "cap.score": -5.0}
    assert evaluation.score == 100.0


@pytest.mark.req("SC-04")
def test_a_part_names_the_newest_events_behind_it() -> None:
    inputs = Inputs.of(
        [is_so(number=900, industry="software"), is_so(START + SECOND, number=901, facts__budget=2000)],
        [did("email_opened", START + n * SECOND, n) for n in range(1, 16)],
    )
    parts = {part.rule: part for part in evaluate(book(OPENED, RICH), inputs, START + DAY).parts}
    assert parts["opened"].count == 15
    assert [event.int for event in parts["opened"].events] == list(range(15, 5, -1))
    assert parts["budget"].events == (UUID(int=901),)


@pytest.mark.req("SC-04")
def test_what_happened_later_does_not_count() -> None:
    inputs = Inputs.of(
        [is_so(facts__budget=2000), is_so(START + 2 * DAY, number=2, facts__budget=10)],
        [did("demo_attended", START + DAY)],
    )
    rules = book(DEMO, RICH)
    assert evaluate(rules, inputs, START - SECOND).score == 0.0
    assert points(evaluate(rules, inputs, START)) == {"budget": 20.0}
    assert points(evaluate(rules, inputs, START + DAY)) == {"budget": 20.0, "demo": 30.0}
    assert points(evaluate(rules, inputs, START + 11 * DAY)) == {"demo": 15.0}


@pytest.mark.parametrize(
    ("operator", "wanted", "yes", "no"),
    [
        ("eq", "a", ["a"], ["b", None, 1]),
        ("eq", 1, [1, 1.0], [True, "1", None]),
        ("eq", True, [True], [1, "true", None]),
        ("ne", "a", ["b", 1], ["a", None]),
        ("in", ("a", 2), ["a", 2], ["b", True, None]),
        ("ge", 5, [5, 6.5], [4, "6", None, True]),
        ("gt", 5, [6], [5, "6", None]),
        ("le", 5, [5, -1], [6, "1", None, False]),
        ("lt", 5, [4.9], [5, None]),
        ("present", None, [0, "", False], [None]),
        ("present", True, [0, "x"], [None]),
        ("present", False, [None], [0, "x"]),
    ],
)
def test_conditions(operator: str, wanted: object, yes: list[object], no: list[object]) -> None:
    condition = Condition(attribute="facts.it", operator=operator, value=wanted)  # type: ignore[arg-type]
    rules = book(RICH.model_copy(update={"conditions": (condition,)}))
    for value, points_given in [*((v, 20.0) for v in yes), *((v, 0.0) for v in no)]:
        profile = is_so() if value is None else is_so(facts__it=value)
        assert evaluate(rules, Inputs.of([profile]), START).score == points_given, value


@pytest.mark.req("SC-03")
def test_a_band_is_left_only_below_the_hysteresis() -> None:
    model = book(OPENED).model
    path = [
        (39.99, "cold"),
        (40.0, "warm"),
        (35.0, "warm"),
        (34.99, "cold"),
        (80.0, "hot"),
        (75.0, "hot"),
        (74.99, "warm"),
    ]
    band = "cold"
    for score, expected in path:
        band = band_of(model, round(score * 100), band)  # type: ignore[arg-type]
        assert band == expected, score
    assert band_of(model, 3600, "hot") == "warm"
    assert band_of(model, 3499, "hot") == "cold"


# --- properties over random models, histories and instants

KINDS = ("email_opened", "page_viewed", "demo_attended")
hundredths = st.integers(-10_000, 10_000).filter(bool).map(lambda n: n / 100)


@st.composite
def rules(draw: st.DrawFn, index: int) -> Rule:
    dimension = draw(st.sampled_from(get_args(Dimension)))
    return Rule(
        name=f"rule-{index}",
        title="A rule",
        dimension=dimension,
        behaviours=() if dimension == "fit" else tuple(draw(st.lists(st.sampled_from(KINDS), max_size=2, unique=True))),
        conditions=(Condition(attribute="facts.size", operator="ge", value=draw(st.integers(0, 9))),)
        if dimension == "fit"
        else (),
        points=draw(hundredths),
        cap=draw(st.none() | st.integers(0, 10_000).map(lambda n: n / 100)),
        half_life_days=None if dimension == "fit" else draw(st.none() | st.floats(0.01, 3650)),
    )


@st.composite
def books(draw: st.DrawFn, rule: st.SearchStrategy[Rule] | None = None) -> Rulebook:
    made = tuple(
        draw(rules(n) if rule is None else rule).model_copy(update={"name": f"rule-{n}"})
        for n in range(draw(st.integers(1, 6)))
    )
    caps = {dimension: draw(st.integers(0, 100)) / 1 for dimension in ("frequency", "depth", "fit")}
    return book(*made, caps=caps, base=draw(st.integers(0, 30)) / 1)


seconds = st.floats(0, 400 * 86_400).map(lambda n: START + timedelta(seconds=n))


@st.composite
def histories(draw: st.DrawFn) -> Inputs:
    profile = [is_so(draw(seconds), n + 1, facts__size=draw(st.integers(0, 9))) for n in range(draw(st.integers(0, 3)))]
    times = draw(st.lists(seconds, max_size=25))
    return Inputs.of(profile, [did(draw(st.sampled_from(KINDS)), at, n + 100) for n, at in enumerate(times)])


@pytest.mark.req("SC-04")
@settings(max_examples=120, deadline=None)
@given(books(), histories(), seconds)
def test_the_parts_always_add_up_to_the_score(rulebook: Rulebook, inputs: Inputs, at: datetime) -> None:
    evaluation = evaluate(rulebook, inputs, at)
    assert 0 <= evaluation.score <= 100
    assert (
        sum(round(part.points * 100) for part in evaluation.parts) == round(evaluation.score * 100) == evaluation.units
    )
    assert round(sum(part.points for part in evaluation.parts), 2) == evaluation.score
    assert all(part.points for part in evaluation.parts)


def falling(index: int) -> st.SearchStrategy[Rule]:
    return rules(index).map(lambda rule: rule.model_copy(update={"points": abs(rule.points)}))


@pytest.mark.req("SC-07")
@settings(max_examples=80, deadline=None)
@given(books(falling(0)), histories(), st.lists(st.floats(0, 900 * 86_400), min_size=2, max_size=8))
def test_time_alone_never_raises_points_that_fade(rulebook: Rulebook, inputs: Inputs, after: list[float]) -> None:
    last = inputs.newest or START
    scores = [evaluate(rulebook, inputs, last + timedelta(seconds=s)).units for s in sorted(after)]
    assert scores == sorted(scores, reverse=True)


@settings(max_examples=80, deadline=None)
@given(books(), histories(), seconds, st.randoms(use_true_random=False))
def test_the_order_in_which_facts_become_known_does_not_matter(
    rulebook: Rulebook, inputs: Inputs, at: datetime, rng: object
) -> None:
    same_time = [BehaviourInput(b.event_id, START, b.kind, b.attributes) for b in inputs.behaviours[:8]]
    profile, behaviours = list(inputs.profile), [*inputs.behaviours[8:], *same_time]
    before = evaluate(rulebook, Inputs.of(profile, behaviours), at)
    rng.shuffle(profile)  # type: ignore[attr-defined]
    rng.shuffle(behaviours)  # type: ignore[attr-defined]
    after = evaluate(rulebook, Inputs.of(profile, behaviours), at)
    assert (after.score, after.parts) == (before.score, before.parts)


@pytest.mark.req("SC-07")
@settings(max_examples=120, deadline=None)
@given(books(), histories(), st.sampled_from(["hot", "warm", "cold"]), st.booleans(), st.data())
def test_the_next_change_is_the_first_second_outside(
    rulebook: Rulebook, inputs: Inputs, band: str, qualified: bool, data: st.DataObject
) -> None:
    at = inputs.newest or START
    now = evaluate(rulebook, inputs, at)
    low, high = quiet(
        rulebook.model,
        band_of(rulebook.model, now.units, band),  # type: ignore[arg-type]
        qualified or now.score >= rulebook.model.qualify_at,
    )
    found = now.next_outside(low, high)

    def outside(when: datetime) -> bool:
        return not low <= evaluate(rulebook, inputs, when).units < high

    if found is None:
        later = at + timedelta(seconds=data.draw(st.floats(1, 40_000 * 86_400)))
        assert not outside(later.replace(microsecond=0) + SECOND)
    else:
        assert found > at
        assert found.microsecond == 0
        assert outside(found)
        span = int((found - at).total_seconds())
        before = found - data.draw(st.integers(1, max(1, span))) * SECOND
        assert before <= at or not outside(before)


def test_only_the_newest_thousand_behaviours_count() -> None:
    one_point = OPENED.model_copy(update={"points": 0.01})
    inputs = Inputs.of(behaviours=[did("email_opened", START + n * SECOND, n + 1) for n in range(1_500)])
    assert evaluate(book(one_point), inputs, START + DAY).score == 10.0
