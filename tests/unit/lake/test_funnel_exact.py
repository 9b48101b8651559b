"""Random small histories: the kernels against every combination, against SQL, and against ClickHouse."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import chdb
import duckdb
import numpy as np
import pyarrow as pa
import pytest
from funnel_oracle import Event, Rules, Verdict, judge
from hypothesis import given, settings
from hypothesis import strategies as st

from kehu.lake import Exclusion, FunnelSpec, Step
from kehu.lake.fold import single_steps
from kehu.lake.histories import count
from kehu.lake.kernel import (
    BLOCKS,
    CONVERTED,
    DROPPED,
    EXCLUDED,
    GAP,
    NONE,
    PENDING,
    TOOK,
    clear,
    fold_ordered,
)
from kehu.lake.sql import funnel_sql

OUTCOMES = {NONE: "none", CONVERTED: "converted", PENDING: "pending", DROPPED: "dropped", EXCLUDED: "excluded"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
KINDS = "abcdx"

Held = list[list[int | None]] | None

steps_of_kind = st.lists(st.frozensets(st.sampled_from("abcd"), min_size=1, max_size=2), min_size=1, max_size=4)
history = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(KINDS)), max_size=7)
histories = st.lists(history, min_size=1, max_size=6)


def spec_of(steps: list[frozenset[str]], window: int, **more: object) -> FunnelSpec:
    return FunnelSpec(
        steps=tuple(Step(name=f"step {k}", types=tuple(sorted(kinds))) for k, kinds in enumerate(steps, 1)),
        window=timedelta(microseconds=window),
        **more,
    )


def rows_of(
    units: list[list[tuple[int, str]]], spec: FunnelSpec, held: list[list[int | None]] | None = None
) -> pa.Table:
    """The rows that `rows_sql` would give."""
    rows = []
    for unit, events in enumerate(units):
        for sequence, (time, kind) in enumerate(events):
            mask = sum(1 << k for k, step in enumerate(spec.steps) if kind in step.types)
            breaks = sum(1 << r for r, exclusion in enumerate(spec.exclude) if kind in exclusion.types)
            hold = held[unit][sequence] if held else 0
            if mask or breaks or spec.order == "strict":
                rows.append((f"u{unit}", time, sequence, mask, breaks, None if hold is None else str(hold), str(time)))
    columns = list(zip(*rows, strict=True)) or [()] * 7
    kinds = [pa.string(), pa.int64(), pa.int64(), pa.int64(), pa.int64(), pa.string(), pa.string()]
    names = ["unit", "t", "sequence", "mask", "breaks", "h0", "b"]
    table = pa.table({n: pa.array(c, k) for n, c, k in zip(names, columns, kinds, strict=True)})
    return table.filter(pa.compute.is_valid(table["h0"]))


def counted(units: list[list[tuple[int, str]]], spec: FunnelSpec, horizon: int, held: Held = None) -> list[Verdict]:
    """The kernel's verdicts by unit."""
    spec = spec.model_copy(update={"breakdown": "type"})  # which keeps the times of each unit
    result = count(rows_of(units, spec, held), spec, horizon)
    assert result.times is not None
    took, gap = result.times
    found = [Verdict() for _ in units]
    for index, name in enumerate(result.names(np.arange(len(result.level)))):
        steps = [k for k in range(1, len(spec.steps) + 1) if result.reached[index] >> (k - 1) & 1]
        found[int(name[1:])] = Verdict(
            level=int(result.level[index]),
            took={k: int(took[index, k - 1]) for k in steps},
            gap={k: int(gap[index, k - 1]) for k in steps},
            outcome=OUTCOMES[int(result.outcome[index])],
        )
    return found


def expected(units: list[list[tuple[int, str]]], spec: FunnelSpec, horizon: int) -> list[Verdict]:
    """The oracle's verdicts by unit."""
    return [judge(events_of(events, spec), rules_of(spec), horizon) for events in units]


def events_of(events: list[tuple[int, str]], spec: FunnelSpec) -> list[Event]:
    return [
        Event(
            time,
            frozenset(k for k, step in enumerate(spec.steps, 1) if kind in step.types),
            frozenset(r for r, exclusion in enumerate(spec.exclude) if kind in exclusion.types),
        )
        for time, kind in events
    ]


def rules_of(spec: FunnelSpec) -> Rules:
    return Rules(
        steps=len(spec.steps),
        window=spec.window // timedelta(microseconds=1),
        order=spec.order,
        first_only=spec.entry == "first",
        later=spec.ties == "strictly_later",
        optional=frozenset(spec.optional),
        exclude=tuple((e.after, e.before) for e in spec.exclude),
    )


def facts(verdicts: list[Verdict]) -> list[tuple[object, ...]]:
    return [(v.level, v.took, v.gap, v.outcome) for v in verdicts]


@given(
    steps_of_kind,
    st.integers(0, 10),
    st.sampled_from(["ordered", "strict"]),
    st.sampled_from(["any", "first"]),
    st.sampled_from(["step_order", "strictly_later"]),
    st.frozensets(st.integers(2, 3), max_size=2),
    histories,
    st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.req("AN-01")
def test_ordered_and_strict_are_exact(
    steps: list[frozenset[str]],
    window: int,
    order: str,
    entry: str,
    ties: str,
    optional: frozenset[int],
    units: list[list[tuple[int, str]]],
    horizon: int,
) -> None:
    optional = frozenset(k for k in optional if 1 < k < len(steps))
    spec = spec_of(steps, window, order=order, entry=entry, ties=ties, optional=optional)
    assert facts(counted(units, spec, horizon)) == facts(expected(units, spec, horizon))


@given(
    st.lists(st.frozensets(st.sampled_from("abcd"), min_size=1, max_size=2), min_size=2, max_size=4),
    st.integers(0, 10),
    st.sampled_from(["any", "first"]),
    st.sampled_from(["step_order", "strictly_later"]),
    st.lists(st.tuples(st.sampled_from("bdx"), st.integers(1, 3), st.integers(2, 4)), min_size=1, max_size=2),
    st.frozensets(st.integers(2, 3), max_size=1),
    histories,
    st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.req("AN-01")
def test_exclusions_are_exact(
    steps: list[frozenset[str]],
    window: int,
    entry: str,
    ties: str,
    excluded: list[tuple[str, int, int]],
    optional: frozenset[int],
    units: list[list[tuple[int, str]]],
    horizon: int,
) -> None:
    exclude = tuple(
        Exclusion(types=(kind,), after=after, before=before)
        for kind, after, before in excluded
        if after < before <= len(steps)
    )
    optional = frozenset(k for k in optional if 1 < k < len(steps))
    spec = spec_of(steps, window, entry=entry, ties=ties, exclude=exclude, optional=optional)
    assert facts(counted(units, spec, horizon)) == facts(expected(units, spec, horizon))


@given(steps_of_kind, st.integers(0, 10), st.sampled_from(["any", "first"]), histories, st.integers(0, 20))
@settings(max_examples=60, deadline=None)
@pytest.mark.req("AN-01")
def test_unordered_is_exact(
    steps: list[frozenset[str]], window: int, entry: str, units: list[list[tuple[int, str]]], horizon: int
) -> None:
    units = [events[:5] for events in units]  # the oracle tries every assignment
    spec = spec_of(steps, window, order="unordered", entry=entry)
    assert facts(counted(units, spec, horizon)) == facts(expected(units, spec, horizon))


@given(steps_of_kind, st.integers(0, 10), histories, st.data(), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_hold_takes_the_value_that_got_furthest(
    steps: list[frozenset[str]], window: int, units: list[list[tuple[int, str]]], data: st.DataObject, horizon: int
) -> None:
    held = [[data.draw(st.sampled_from([0, 1, 2, None])) for _ in events] for events in units]
    spec = spec_of(steps, window, hold=("data.deal",))
    wanted = []
    for events, values in zip(units, held, strict=True):
        verdicts = [
            judge(
                events_of([e for e, v in zip(events, values, strict=True) if v == value], spec), rules_of(spec), horizon
            )
            for value in (0, 1, 2)
        ]
        verdicts = [v for v in verdicts if v.level] or [Verdict()]
        best = min(verdicts, key=lambda v: (-v.level, v.reached_at))
        latest = max((v.open_start for v in verdicts if v.open_start is not None), default=None)
        if best.outcome in ("pending", "dropped") and latest is not None:
            is_open = horizon - latest <= window
            best.outcome = "pending" if is_open else "dropped"
        wanted.append(best)
    got = counted(units, spec, horizon, held=held)
    # Two values may get equally far at the same instant; either is the furthest, and the chains may differ.
    assert [(v.level, v.outcome) for v in got] == [(v.level, v.outcome) for v in wanted]


@given(
    steps_of_kind,
    st.integers(0, 10),
    st.sampled_from(["ordered", "strict", "unordered"]),
    st.sampled_from(["step_order", "strictly_later"]),
    st.frozensets(st.integers(2, 3), max_size=2),
    st.lists(st.tuples(st.sampled_from("bdx"), st.integers(1, 3), st.integers(2, 4)), max_size=2),
    st.sampled_from(["first", "last", "all", "step:1", "step:2", "step:3"]),
    histories,
)
@settings(max_examples=60, deadline=None)
@pytest.mark.req("AN-01")
def test_the_breakdown_is_that_of_the_chain_that_counts(
    steps: list[frozenset[str]],
    window: int,
    order: str,
    ties: str,
    optional: frozenset[int],
    excluded: list[tuple[str, int, int]],
    attribution: str,
    units: list[list[tuple[int, str]]],
) -> None:
    """Each event's value is its time here, so the value of a unit says which event was taken."""
    plain = order == "unordered"
    if plain:
        units = [events[:5] for events in units]
        attribution = attribution if attribution in ("first", "last") else "first"
    if attribution in {f"step:{k}" for k in range(len(steps) + 1, 4)}:
        attribution = "last"
    exclude = tuple(
        Exclusion(types=(kind,), after=after, before=before)
        for kind, after, before in excluded
        if after < before <= len(steps) and order == "ordered"
    )
    spec = spec_of(
        steps,
        window,
        order=order,
        ties="step_order" if plain else ties,
        optional=frozenset() if plain else frozenset(k for k in optional if 1 < k < len(steps)),
        exclude=exclude,
    )
    wanted = values_wanted(expected(units, spec, 0), spec, attribution)
    assert values_of(units, spec, attribution) == wanted


def crowd(random: np.random.Generator, kinds: str, count: int, longest: int, span: int) -> list[list[tuple[int, str]]]:
    """Histories that are long enough for every rule to matter, more than a search for counterexamples begins with."""
    return [
        [(int(random.integers(0, span)), str(random.choice(list(kinds)))) for _ in range(random.integers(1, longest))]
        for _ in range(count)
    ]


CROWDS: dict[str, dict[str, Any]] = {
    "ordered": {},
    "later": {"ties": "strictly_later"},
    "first": {"entry": "first"},
    "optional": {"optional": {2}},
    "exclude first": {"exclude": (Exclusion(types="x", after=1, before=2),)},
    "exclude second": {"exclude": (Exclusion(types="x", after=2, before=3),)},
    "exclude all": {"exclude": (Exclusion(types="x", after=1, before=3), Exclusion(types="d", after=2, before=3))},
    "exclude, optional": {"exclude": (Exclusion(types="x", after=1, before=3),), "optional": {2}},
    "strict": {"order": "strict"},
    "strict, later": {"order": "strict", "ties": "strictly_later"},
    "strict, later, first": {"order": "strict", "ties": "strictly_later", "entry": "first"},
    "strict, optional": {"order": "strict", "optional": {2}},
    "unordered": {"order": "unordered"},
    "unordered, first": {"order": "unordered", "entry": "first"},
}


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("kinds", [("a", "b", "c"), ("a", "ab", "bc"), ("a", "b", "ac")], ids="-".join)
@pytest.mark.parametrize("more", CROWDS.values(), ids=CROWDS)
def test_crowds_are_exact(more: dict[str, Any], kinds: tuple[str, ...]) -> None:
    random = np.random.default_rng(len(str(more)))
    steps = [frozenset(kind) for kind in kinds]
    unordered = more.get("order") == "unordered"
    outcomes = set()
    for window in (2, 5, 9):
        spec = spec_of(steps, window, **more)
        units = crowd(random, "abcx" if unordered else "aabbcdx", 300, 6 if unordered else 9, 16)
        got, wanted = counted(units, spec, 14), expected(units, spec, 14)
        assert facts(got) == facts(wanted)
        if spec.order == "ordered" and not (spec.exclude or spec.optional):
            assert folded(units, spec) == [(v.level, v.took, v.gap) for v in wanted]
        outcomes |= {v.outcome for v in wanted}
        for attribution in ("first", "last") if unordered else ("first", "last", "step:2", "all"):
            assert values_of(units, spec, attribution) == values_wanted(wanted, spec, attribution)
    if kinds == ("a", "b", "c"):  # else one event may take a chain past a step where it could end
        assert outcomes == {"none", "converted", "pending", "dropped", *(["excluded"] if "exclude" in more else [])}


def values_of(units: list[list[tuple[int, str]]], spec: FunnelSpec, attribution: str) -> dict[str, set[int]]:
    """The values of the breakdown by unit, where the value of an event is its time."""
    spec = spec.model_copy(update={"breakdown": "customer", "attribution": attribution})
    result = count(rows_of(units, spec), spec, 0)
    assert result.split is not None
    found: dict[str, set[int]] = {}
    for name, value in zip(result.names(result.split.unit), result.split.value, strict=True):
        found.setdefault(name, set()).add(int(result.split.values[value] or -1))
    return found


def values_wanted(verdicts: list[Verdict], spec: FunnelSpec, attribution: str) -> dict[str, set[int]]:
    """The same from the paths of the oracle."""
    wanted = {}
    for index, verdict in enumerate(verdicts):
        chosen = {
            "first": {min(verdict.path, default=0)},
            "last": {max(verdict.path, default=0)},
            "all": set(verdict.path),
        }.get(attribution, {int(attribution[-1]) if attribution.startswith("step:") else 0})
        times = {verdict.path[step] for step in chosen if step in verdict.path}
        if times:
            wanted[f"u{index}"] = times
    return wanted


def folded(units: list[list[tuple[int, str]]], spec: FunnelSpec) -> list[tuple[int, dict[int, int], dict[int, int]]]:
    """The plain kernel, with the rows cut into two files at a point in time as months are."""
    steps = len(spec.steps)
    masks = np.array([sum(1 << k for k, s in enumerate(spec.steps) if kind in s.types) for kind in KINDS], np.int64)
    state = np.empty((len(units), BLOCKS, steps + 1), np.int64)
    clear(state)
    for low, high in ((0, 6), (6, 99)):
        rows = sorted(
            (unit, time, sequence, KINDS.index(kind))
            for unit, events in enumerate(units)
            for sequence, (time, kind) in enumerate(events)
            if low <= time < high
        )
        unit, time, _, code = (
            (np.array(c, np.int64) for c in zip(*rows, strict=True)) if rows else [np.empty(0, np.int64)] * 4
        )
        fold_ordered(
            unit.astype(np.int32), code.astype(np.int32), time, single_steps(masks), masks, 0, 0,
            spec.window // timedelta(microseconds=1), steps, spec.entry == "first", spec.ties == "strictly_later",
            state.reshape(-1), np.empty(len(unit) + 1, np.int32),
        )  # fmt: skip
    verdicts = []
    for took, gap in zip(state[:, TOOK, 1:], state[:, GAP, 1:], strict=True):
        reached = [k for k in range(1, steps + 1) if took[k - 1] >= 0]
        times, gaps = ({k: int(values[k - 1]) for k in reached} for values in (took, gap))
        verdicts.append((len(reached), times, gaps))
    return verdicts


def queried(units: list[list[tuple[int, str]]], spec: FunnelSpec) -> list[int]:
    """Units by step, from the SQL of the spec."""
    rows = [(f"u{u}", EPOCH + timedelta(microseconds=t), kind) for u, events in enumerate(units) for t, kind in events]
    columns = list(zip(*rows, strict=True)) or [()] * 3
    kinds = [pa.string(), pa.timestamp("us", tz="UTC"), pa.string()]
    events = pa.table({n: pa.array(c, k) for n, c, k in zip(("customer", "time", "type"), columns, kinds, strict=True)})
    with duckdb.connect(":memory:") as connection:
        connection.register("events", events)
        return [reached for _, reached in connection.execute(funnel_sql(spec)).fetchall()]


@given(
    steps_of_kind,
    st.integers(0, 10),
    st.sampled_from(["any", "first"]),
    st.sampled_from(["step_order", "strictly_later"]),
    histories,
)
@settings(max_examples=40, deadline=None)
@pytest.mark.req("AN-01")
@pytest.mark.req("AN-09")
def test_the_plain_kernel_and_sql_are_exact(
    steps: list[frozenset[str]], window: int, entry: str, ties: str, units: list[list[tuple[int, str]]]
) -> None:
    spec = spec_of(steps, window, entry=entry, ties=ties)
    wanted = expected(units, spec, 0)
    assert folded(units, spec) == [(v.level, v.took, v.gap) for v in wanted]
    assert queried(units, spec) == [sum(k in v.took for v in wanted) for k in range(1, len(steps) + 1)]


def clickhouse(units: list[list[tuple[int, str]]], spec: FunnelSpec, *modes: str) -> list[int]:
    """Levels by unit, from windowFunnel."""
    values = ", ".join(f"({u}, {t}, '{kind}')" for u, events in enumerate(units) for t, kind in events)
    conditions = ", ".join(f"kind IN ({', '.join(repr(kind) for kind in step.types)})" for step in spec.steps)
    arguments = ", ".join([str(spec.window // timedelta(microseconds=1)), *(repr(mode) for mode in modes)])
    query = (
        f"SELECT unit, windowFunnel({arguments})(t, {conditions}) "
        f"FROM values('unit UInt64, t UInt64, kind String', {values}) GROUP BY unit"
    )
    levels = [0] * len(units)
    answer = str(chdb.query(query, "CSV"))  # type: ignore[no-untyped-call]
    for line in answer.splitlines():
        unit, level = map(int, line.split(","))
        levels[unit] = level
    return levels


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("seed", range(8))
def test_the_default_is_clickhouse_s(seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = [
        frozenset(map(str, random.choice(list("abcd"), size=random.integers(1, 3), replace=False)))
        for _ in range(2 + seed % 3)
    ]
    spec = spec_of(steps, int(random.integers(0, 12)))
    units = [
        [(int(random.integers(0, 15)), str(random.choice(list(KINDS)))) for _ in range(random.integers(1, 9))]
        for _ in range(3_000)
    ]
    levels = [v.level for v in counted(units, spec, 0)]
    assert levels == clickhouse(units, spec)
    assert {0, len(steps)} <= set(levels)
    assert [level for level, _, _ in folded(units, spec)] == levels


@pytest.mark.req("AN-01")
def test_strictly_later_is_clickhouse_s_where_no_two_events_share_an_instant() -> None:
    """ClickHouse's strict_increase remembers only the last event of a chain, and so misses some ties; see the table."""
    random = np.random.default_rng(7)
    steps = [frozenset("a"), frozenset("b"), frozenset("c")]
    spec = spec_of(steps, 9, ties="strictly_later")
    units = []
    for _ in range(3_000):
        times = random.choice(16, size=random.integers(1, 8), replace=False)
        units.append([(int(t), str(random.choice(list(KINDS)))) for t in times])
    levels = [v.level for v in counted(units, spec, 0)]
    assert levels == clickhouse(units, spec, "strict_increase")
    assert set(levels) == {0, 1, 2, 3}
