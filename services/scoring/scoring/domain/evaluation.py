"""From a model and what is known of a lead to a score with its parts, at any instant.

All arithmetic after the rules is done in whole hundredths of a point: each rule's points are rounded once, and everything
behind that (caps, base, clamp) is integer addition. So the parts of a score add up to it exactly, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from kehu.events.scoring import Band, Condition, Part, Rule, ScoringModel

# Hundredths of a point in a point.
UNIT = 100
HIGHEST = 100 * UNIT
# Only the newest behaviours of a lead count, so that the cost of a score is bounded.
MOST_BEHAVIOURS = 1_000
# Ids of events that a part names.
MOST_EVENTS = 10
# Spans of time that the search for the next change looks at before it gives a safe early answer.
MOST_SPANS = 2_000

Attributes = Mapping[str, Any]
# Sums by dimension are lists in this order.
DIMENSIONS = ("frequency", "depth", "fit")
DAY = 86_400.0
SECOND = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class ProfileInput:
    """Facts about who the lead is, from one event.

    Args:
        event_id: the event that told it.
        time: when it was so (business time).
        attributes: `industry`, `channel`, `facts.budget`…
    """

    event_id: UUID
    time: datetime
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class BehaviourInput:
    """One thing that the customer did.

    Args:
        attributes: `object`, `channel`, `duration_seconds`, `device`, `facts.contacts`…
    """

    event_id: UUID
    time: datetime
    kind: str
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that scores a lead, each list in order of (time, event id)."""

    profile: tuple[ProfileInput, ...] = ()
    behaviours: tuple[BehaviourInput, ...] = ()

    @classmethod
    def of(cls, profile: Iterable[ProfileInput] = (), behaviours: Iterable[BehaviourInput] = ()) -> Inputs:
        """Inputs from facts in any order; of the behaviours the newest MOST_BEHAVIOURS."""
        return cls(
            tuple(sorted(profile, key=_order)),
            tuple(sorted(behaviours, key=_order)[-MOST_BEHAVIOURS:]),
        )

    @property
    def newest(self) -> datetime | None:
        """The business time of the last thing known."""
        times = [inputs[-1].time for inputs in (self.profile, self.behaviours) if inputs]
        return max(times, default=None)


def _order(item: ProfileInput | BehaviourInput) -> tuple[datetime, int]:
    return item.time, item.event_id.int


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule in the form that is fast to apply.

    Args:
        dimension: its place in DIMENSIONS.
        cap: in hundredths.
        half_life: in seconds.
        attributes: what its conditions look at.
    """

    name: str
    dimension: int
    points: float
    cap: int
    half_life: float | None
    attributes: tuple[str, ...]
    matches: Callable[[Attributes], bool]

    def units(self, points: float) -> int:
        """Points after the rule's own cap, in hundredths. The one place where points are rounded."""
        return max(-self.cap, min(self.cap, round(points * UNIT)))


class Rulebook:
    """A model compiled once and used for many leads.

    Args:
        model: the rules.
        version: the number under which the model was published.
        since: the instant from which it is in force.
    """

    def __init__(self, model: ScoringModel, version: int, since: datetime) -> None:
        self.model, self.version, self.since = model, version, since
        self.base = round(model.base * UNIT)
        self.caps = tuple(round(model.caps[dimension] * UNIT) for dimension in DIMENSIONS)  # type: ignore[index]
        self.rules = tuple(_compile(rule) for rule in model.rules)
        about_behaviour = [
            (index, frozenset(rule.behaviours)) for index, rule in enumerate(model.rules) if rule.dimension != "fit"
        ]
        self.about_profile = tuple(index for index, rule in enumerate(model.rules) if rule.dimension == "fit")
        self._about_any = tuple(index for index, kinds in about_behaviour if not kinds)
        self._about_kind = {
            kind: tuple(index for index, named in about_behaviour if not named or kind in named)
            for kind in frozenset().union(*(kinds for _, kinds in about_behaviour))
        }

    def sums(self, contributions: Iterable[Contribution]) -> list[int]:
        """What contributions give by dimension, in hundredths, before the caps of the dimensions."""
        sums = [0, 0, 0]
        for each in contributions:
            sums[each.rule.dimension] += each.units
        return sums

    def total(self, sums: Sequence[int]) -> int:
        """The score in hundredths: base and dimensions, each under its cap, within the scale."""
        total = self.base
        for units, cap in zip(sums, self.caps, strict=True):
            total += min(cap, units)
        return 0 if total < 0 else min(total, HIGHEST)

    def about(self, kind: str) -> tuple[int, ...]:
        """The rules, by index, that look at behaviours of this kind."""
        return self._about_kind.get(kind, self._about_any)


def _compile(rule: Rule) -> CompiledRule:
    tests = tuple((condition.attribute, _test(condition)) for condition in rule.conditions)

    def matches(attributes: Attributes) -> bool:
        for attribute, test in tests:  # noqa: SIM110 the innermost loop: a generator costs twice as much
            if not test(attributes.get(attribute)):
                return False
        return True

    return CompiledRule(
        name=rule.name,
        dimension=DIMENSIONS.index(rule.dimension),
        points=rule.points,
        # Nothing can count for more than a hundred times the whole scale, however many behaviours there are.
        cap=round(rule.cap * UNIT) if rule.cap is not None else HIGHEST * 100,
        half_life=rule.half_life_days * DAY if rule.half_life_days is not None else None,
        attributes=tuple(attribute for attribute, _ in tests),
        matches=matches,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(left: Any, right: Any) -> bool:
    """Equality in which a yes/no is never a number: 1 is not True."""
    return bool(left == right) and isinstance(left, bool) is isinstance(right, bool)


def _test(condition: Condition) -> Callable[[Any], bool]:
    """The test of one value. A value that is absent or of another kind satisfies nothing but `present: false`."""
    wanted: Any = condition.value
    match condition.operator:
        case "present":
            expected = wanted is not False
            return lambda value: (value is not None) is expected
        case "eq":
            return lambda value: _same(value, wanted)
        case "ne":
            return lambda value: value is not None and not _same(value, wanted)
        case "in":
            choices = frozenset((isinstance(choice, bool), choice) for choice in wanted)
            return lambda value: (isinstance(value, bool), value) in choices
        case "ge":
            return lambda value: _is_number(value) and value >= wanted
        case "gt":
            return lambda value: _is_number(value) and value > wanted
        case "le":
            return lambda value: _is_number(value) and value <= wanted
        case "lt":
            return lambda value: _is_number(value) and value < wanted


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one rule gives at an instant, and what it comes from.

    Args:
        points: before the rule's cap.
        units: after it, in hundredths.
        events: newest first, at most MOST_EVENTS.
    """

    rule: CompiledRule
    points: float
    units: int
    count: int
    events: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A score at an instant, and how it came about.

    Args:
        units: the score in hundredths.
    """

    book: Rulebook
    at: datetime
    contributions: tuple[Contribution, ...]
    units: int

    @property
    def score(self) -> float:
        """The score, 0 to 100, with two decimals."""
        return self.units / UNIT

    @property
    def parts(self) -> tuple[Part, ...]:
        """What makes the score: base, rules in the model's order, what dimension caps cut off, what the scale cuts off.

        `sum(round(part.points * 100)) == round(score * 100)` holds for every evaluation.
        """
        parts: list[Part] = []
        total = self.book.base
        if total:
            parts.append(Part(rule="base", dimension="base", points=total / UNIT))
        for each in self.contributions:
            if each.units:
                total += each.units
                parts.append(
                    Part.model_construct(  # all of it was checked when the model was published
                        rule=each.rule.name,
                        dimension=DIMENSIONS[each.rule.dimension],  # type: ignore[arg-type]
                        points=each.units / UNIT,
                        count=each.count,
                        events=each.events,
                    )
                )
        for name, units, cap in zip(DIMENSIONS, self.book.sums(self.contributions), self.book.caps, strict=True):
            if units > cap:
                total += cap - units
                parts.append(Part(rule=f"cap.{name}", dimension="cap", points=(cap - units) / UNIT))
        if total != self.units:
            parts.append(Part(rule="cap.score", dimension="cap", points=(self.units - total) / UNIT))
        return tuple(parts)

    @property
    def fades_up(self) -> bool:
        """Whether time alone can raise the score: there are penalties that fade."""
        return any(each.points < 0 and each.rule.half_life is not None for each in self.contributions)

    @property
    def fades_down(self) -> bool:
        """Whether time alone can lower the score: there are points that fade."""
        return any(each.points > 0 and each.rule.half_life is not None for each in self.contributions)

    def next_outside(self, low: int, high: int, until: datetime | None = None) -> datetime | None:
        """The first whole second after `at` at which time alone puts the score outside low ≤ score < high (hundredths).

        Points of one rule fade together: S·0.5^(t/half-life), S being their sum now. Fading points only fall and fading
        penalties only shrink, so over any span the score lies between (points at its end, penalties at its start) and
        (points at its start, penalties at its end). Spans whose bounds stay inside are left out, others are halved down
        to one second. After MOST_SPANS spans the start of the first unresolved one is given: an early look, never a
        late one.

        Args:
            until: look no further than this instant; None looks until nothing is left to fade.
        """
        fading = [each for each in self.contributions if each.rule.half_life is not None and each.units]
        # Whole seconds are counted from the first one after `at`.
        first = self.at.replace(microsecond=0) + SECOND
        offset = (first - self.at).total_seconds()
        steady = self.book.sums(each for each in self.contributions if each.rule.half_life is None)
        curves = [
            (each.rule.dimension, each.points * UNIT * 0.5 ** (offset / half_life), half_life, each.rule.cap)
            for each in fading
            if (half_life := each.rule.half_life) is not None
        ]
        # A curve is flat when it has come below half a hundredth.
        last = math.ceil(max((h * max(0.0, math.log2(abs(s)) + 1) for _, s, h, _ in curves), default=-1.0))
        if until is not None:
            last = min(last, math.floor((until - first).total_seconds()))
        if last < 0:
            return None

        def total(points_after: int, penalties_after: int) -> int:
            sums = steady.copy()
            for dimension, start, half_life, cap in curves:
                units = round(start * 0.5 ** ((points_after if start > 0 else penalties_after) / half_life))
                sums[dimension] += cap if units > cap else max(units, -cap)
            return self.book.total(sums)

        spans = [(0, last)]
        for _ in range(MOST_SPANS):
            if not spans:
                return None
            start, end = spans.pop()
            if low <= total(end, start) and total(start, end) < high:
                continue
            if end - start <= 1:
                if not low <= total(start, start) < high:
                    return first + start * SECOND
                if not low <= total(end, end) < high:
                    return first + end * SECOND
                continue
            middle = (start + end) // 2
            spans += [(middle, end), (start, middle)]
        return first + spans[-1][0] * SECOND if spans else None


def evaluate(book: Rulebook, inputs: Inputs, at: datetime) -> Evaluation:
    """The score of a lead at an instant. What happened after it does not count.

    A rule about behaviours gives, for each behaviour that matches, points × 0.5^(age / half-life) (all its points when it
    has no half-life); a rule about the profile gives its points once.

    Args:
        at: the instant, aware; any, past or future.
    """
    contributions: list[Contribution | None] = [None] * len(book.rules)
    told = [each for each in inputs.profile if each.time <= at]
    profile: dict[str, Any] = {}
    for each in told:  # the newest word on an attribute holds
        profile.update(each.attributes)
    for index in book.about_profile:
        rule = book.rules[index]
        if rule.matches(profile):
            events = _told_by(told, rule.attributes)
            contributions[index] = Contribution(rule, rule.points, rule.units(rule.points), 1, events)

    matched: dict[int, list[BehaviourInput]] = {}
    for behaviour in reversed(inputs.behaviours):
        if behaviour.time <= at:
            for index in book.about(behaviour.kind):
                if book.rules[index].matches(behaviour.attributes):
                    matched.setdefault(index, []).append(behaviour)
    for index, behaviours in matched.items():
        rule = book.rules[index]
        if rule.half_life is None:
            points = rule.points * len(behaviours)
        else:
            # fsum is exact before it rounds, so the order of the behaviours cannot show.
            half_life = rule.half_life
            points = rule.points * math.fsum(
                0.5 ** ((at - each.time).total_seconds() / half_life) for each in behaviours
            )
        events = tuple(each.event_id for each in behaviours[:MOST_EVENTS])
        contributions[index] = Contribution(rule, points, rule.units(points), len(behaviours), events)
    made = tuple(each for each in contributions if each is not None)
    return Evaluation(book, at, made, book.total(book.sums(made)))


def _told_by(told: Sequence[ProfileInput], names: Iterable[str]) -> tuple[UUID, ...]:
    """The events that told what holds of these attributes."""
    events: dict[UUID, None] = {}
    for name in names:
        for each in reversed(told):
            if name in each.attributes:
                events[each.event_id] = None
                break
    return tuple(events)[:MOST_EVENTS]


def band_of(model: ScoringModel, units: int, current: Band) -> Band:
    """The band of a score (hundredths) for a lead that is in `current`: a band is left only `hysteresis` below its edge."""
    hot, warm, slack = edges(model)
    if units >= hot or (current == "hot" and units >= hot - slack):
        return "hot"
    if units >= warm or (current != "cold" and units >= warm - slack):
        return "warm"
    return "cold"


def edges(model: ScoringModel) -> tuple[int, int, int]:
    """Lower edge of hot, lower edge of warm, and the hysteresis, in hundredths."""
    return round(model.hot_at * UNIT), round(model.warm_at * UNIT), round(model.hysteresis * UNIT)


def quiet(model: ScoringModel, band: Band, qualified: bool) -> tuple[int, int]:
    """The scores (low ≤ score < high, hundredths) at which a lead in this band stays as it is."""
    hot, warm, slack = edges(model)
    low, high = {"hot": (hot - slack, HIGHEST + 1), "warm": (warm - slack, hot), "cold": (0, warm)}[band]
    return low, high if qualified else min(high, round(model.qualify_at * UNIT))
