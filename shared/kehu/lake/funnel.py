"""Runs a funnel, over a lake or over any table of events, and holds what came out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from kehu.lake.engine import connect, identifier, scan_events, sql_type
from kehu.lake.fold import fold, is_plain
from kehu.lake.format import SCHEMA, bucket_sql, instant, micros
from kehu.lake.histories import count
from kehu.lake.kernel import CONVERTED, DROPPED, EXCLUDED, KINDS, PENDING, REACHED, WAITING, WENT_ON
from kehu.lake.log import DataFile, Snapshot
from kehu.lake.outcome import Counts, Scratch, Units
from kehu.lake.spec import FunnelSpec
from kehu.lake.sql import funnel_sql, rows_sql
from kehu.lake.stats import quantile, wilson

if TYPE_CHECKING:
    import altair as alt

MAX_VALUES = 1_000  # of a breakdown

_OUTCOMES = {"pending": PENDING, "dropped": DROPPED, "excluded": EXCLUDED}

Kind = Literal["reached", "converted", "pending", "dropped", "excluded"]


@dataclass(frozen=True, slots=True)
class StepCount:
    """One step of a result, of all units or of those with one value of the breakdown.

    Attributes:
        value: of the breakdown; None without one, and for events that do not have it.
        step, name: 1-based number, and the name in the spec.
        entered: units that reached step 1, without the excluded ones.
        reached: units that reached this step: `converted + pending + dropped`, at the last step `converted`.
        converted: units that went on to a later step, or reached the last one.
        pending: units whose furthest step this is and whose window is open: they may still go on.
        dropped: units whose furthest step this is and whose window is closed.
        excluded: units whose furthest step this is, which an exclusion took out of all other counts.
        rate, rate_low, rate_high: reached / entered, with its 95 % Wilson interval; None without units.
        settled: entered without the pending units that did not reach this step: those about whom all is known.
        settled_rate, settled_low, settled_high: reached / settled.
        step_rate: reached / reached of the step before that is not optional.
        seconds_median, seconds_p90: from the chain's first event to this step, over the units that reached it.
        gap_median, gap_p90: from the chain's step before, seconds.
        young: some of the units are still pending, so the rate will rise.
    """

    value: str | None
    step: int
    name: str
    entered: int
    reached: int
    converted: int
    pending: int
    dropped: int
    excluded: int
    rate: float | None
    rate_low: float | None
    rate_high: float | None
    settled: int
    settled_rate: float | None
    settled_low: float | None
    settled_high: float | None
    step_rate: float | None
    seconds_median: float | None
    seconds_p90: float | None
    gap_median: float | None
    gap_p90: float | None
    young: bool


@dataclass(frozen=True)
class FunnelResult:
    """The numbers of a funnel, and the units behind them.

    Attributes:
        spec: that was run, with the `as_of` that it was run at.
        snapshot: id of the version of the lake; None when the funnel ran over a table.
        horizon: the instant at which windows were open or closed: `as_of`, or `until` when that is earlier.
        steps: of all units.
        values: of the units by value of the breakdown, in the order of the units that entered; empty without one.
    """

    spec: FunnelSpec
    snapshot: str | None
    horizon: datetime | None
    steps: tuple[StepCount, ...]
    values: tuple[tuple[StepCount, ...], ...]
    _parts: tuple[Units, ...]

    def units(self, kind: Kind, step: int, value: str | None = None) -> list[str]:
        """The ids of the units behind a number, sorted.

        Args:
            kind: a count of StepCount.
            step: 1-based.
            value: of the breakdown; None for all units.

        Raises:
            ValueError: no such step or kind, or a value without a breakdown.
            FileNotFoundError: the version of the lake was vacuumed since.
        """
        if not 1 <= step <= len(self.spec.steps):
            raise ValueError(f"step {step} of {len(self.spec.steps)}")
        if value is not None and self.spec.breakdown is None:
            raise ValueError("the funnel has no breakdown")
        found: list[str] = []
        for part in self._parts:
            chosen = _of_kind(part, kind, step)
            if value is not None and part.split is not None:
                member = np.zeros(len(chosen), np.bool_)
                member[part.split.of(value)] = True
                chosen &= member
            found += part.names(np.flatnonzero(chosen))
        return sorted(found)

    def rows(self) -> list[dict[str, Any]]:
        """Each step of all units, then each step of each value of the breakdown."""
        return [asdict(step) for step in self._all()]

    def arrow(self) -> pa.Table:
        """`rows` as an Arrow table."""
        return pa.Table.from_pylist(self.rows(), _ROWS)

    def df(self) -> pa.Table:
        """The same table; `.df().to_pandas()` where pandas is installed, `polars.from_arrow(….df())` for Polars."""
        return self.arrow()

    def sql(self) -> str:
        """The DuckDB query over the view `events` that gives the same `reached`.

        Raises:
            ValueError: the spec asks for more than one query does.
        """
        return funnel_sql(self.spec)

    def chart(self) -> alt.LayerChart:
        """The funnel as bars, the pending part apart."""
        from kehu.lake.charts import funnel_chart

        return funnel_chart(self)

    def to_json(self) -> str:
        """Spec, snapshot and numbers: `Lake.rerun` gives the same numbers from it."""
        content = {
            "kind": "funnel",
            "format": 1,
            "spec": self.spec.model_dump(mode="json"),
            "snapshot": self.snapshot,
            "horizon": None if self.horizon is None else self.horizon.isoformat(),
            "rows": self.rows(),
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2).decode()

    def _all(self) -> Iterable[StepCount]:
        yield from self.steps
        for steps in self.values:
            yield from steps

    @cached_property
    def entered(self) -> int:
        """Units that reached step 1, without the excluded ones."""
        return self.steps[0].entered


_ROWS = pa.schema(
    [
        ("value", pa.string()),
        ("step", pa.int32()),
        ("name", pa.string()),
        *((name, pa.int64()) for name in ("entered", "reached", "converted", "pending", "dropped", "excluded")),
        *((name, pa.float64()) for name in ("rate", "rate_low", "rate_high")),
        ("settled", pa.int64()),
        *((name, pa.float64()) for name in ("settled_rate", "settled_low", "settled_high", "step_rate")),
        *((name, pa.float64()) for name in ("seconds_median", "seconds_p90", "gap_median", "gap_p90")),
        ("young", pa.bool_()),
    ]
)


def evaluate(events: pa.Table, spec: FunnelSpec) -> FunnelResult:
    """Run a funnel over a table of events.

    Args:
        events: at least `type` (text) and `time` (timestamp with a zone); `customer`, `sequence` (order within one
            instant, else that of the table), `recordedtime`, `subject`, `data` (JSON text) and the other columns of
            the lake as the spec needs them.

    Raises:
        ValueError: a column that every funnel needs is missing.
    """
    missing = [name for name in ("type", "time") if name not in events.column_names]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}")
    connection = duckdb.connect(":memory:", config={"autoinstall_known_extensions": False})
    with connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("given", events)
        connection.execute(f"CREATE TEMP VIEW events AS SELECT {_completed(events.column_names)} FROM given")  # noqa: S608 - column names of the schema
        if spec.as_of is None:
            spec = _at(spec, connection.execute("SELECT epoch_us(max(recordedtime)) FROM events").fetchall()[0][0])
        horizon = _horizon(spec)
        rows = connection.sql(rows_sql(spec, "events")).to_arrow_table()
    return _result(spec, None, horizon, [count(rows, spec, horizon)])


def run(
    root: Path,
    snapshot: Snapshot,
    spec: FunnelSpec,
    *,
    threads: int,
    memory_limit: str | None,
    spare: list[Scratch],
) -> FunnelResult:
    """Run a funnel over a snapshot of a lake. See `Lake.funnel`."""
    if spec.as_of is None:
        spec = _at(spec, snapshot.max_recorded)
    horizon = _horizon(spec)
    if is_plain(spec):
        return _result(spec, snapshot.id, horizon, fold(root, snapshot, spec, horizon, threads, spare))
    with connect(root, threads=threads, memory_limit=memory_limit) as connection:
        if spec.unit == "customer":  # a customer's events are in one bucket: one at a time is enough in memory
            tables = _by_bucket(connection, root, snapshot, spec)
        else:
            query = rows_sql(spec, scan_events(root, snapshot.of("events", "tail")))
            tables = iter([connection.sql(query).to_arrow_table()])
        parts = [count(rows, spec, horizon) for rows in tables]
    return _result(spec, snapshot.id, horizon, parts)


def _by_bucket(
    connection: duckdb.DuckDBPyConnection, root: Path, snapshot: Snapshot, spec: FunnelSpec
) -> Iterator[pa.Table]:
    """The rows of each bucket: of its sorted files, and of the tail, which is read once."""
    bucket = f"{bucket_sql('customer', snapshot.buckets)} AS bucket"
    tail = connection.sql(rows_sql(spec, scan_events(root, snapshot.of("tail")), bucket)).to_arrow_table()
    of_tail = tail["bucket"].to_numpy()
    files: dict[int | None, list[DataFile]] = {}
    for file in snapshot.of("events"):
        files.setdefault(file.bucket, []).append(file)
    for number in sorted({f for f in files if f is not None} | set(np.unique(of_tail).tolist())):
        rows = connection.sql(rows_sql(spec, scan_events(root, files.get(number, [])))).to_arrow_table()
        late = tail.take(pa.array(np.flatnonzero(of_tail == number))).drop_columns("bucket")
        yield pa.concat_tables([rows, late])


def _at(spec: FunnelSpec, latest: int | None) -> FunnelSpec:
    """The spec as of the latest that is recorded, so that running it again later gives the same."""
    return spec if latest is None else spec.model_copy(update={"as_of": instant(latest)})


def _horizon(spec: FunnelSpec) -> int:
    limits = [micros(limit) for limit in (spec.as_of, spec.until) if limit is not None]
    return min(limits, default=0)


def _completed(columns: Sequence[str]) -> str:
    """The columns of the lake from those that a table has."""
    defaults = {"sequence": "row_number() OVER ()", "recordedtime": '"time"'}
    return ", ".join(
        identifier(f.name)
        if f.name in columns
        else f"{defaults.get(f.name, f'CAST(NULL AS {sql_type(f)})')} AS {identifier(f.name)}"
        for f in SCHEMA
    )


def _of_kind(part: Units, kind: str, step: int) -> NDArray[np.bool_]:
    """Which units of a part are behind a count."""
    reached: NDArray[np.bool_] = (part.outcome != EXCLUDED) & (part.reached & (1 << (step - 1)) != 0)
    here: NDArray[np.bool_] = np.equal(part.level, step)
    match kind:
        case "reached":
            return reached
        case "converted":
            reached &= ~here | np.equal(part.outcome, CONVERTED)
            return reached
        case "pending" | "dropped" | "excluded":
            here &= np.equal(part.outcome, _OUTCOMES[kind])
            return here
    raise ValueError(f"no units are {kind!r}")


def _result(spec: FunnelSpec, snapshot: str | None, horizon: int, parts: Sequence[Units]) -> FunnelResult:
    steps = _counts(spec, None, [part.counts for part in parts])
    values: list[tuple[StepCount, ...]] = []
    if spec.breakdown is not None:
        names = {value for part in parts if part.split is not None for value in part.split.values}
        if len(names) > MAX_VALUES:
            raise ValueError(
                f"{spec.breakdown} has {len(names)} values, the limit is {MAX_VALUES}: choose a coarser one"
            )
        values = [_counts(spec, name, [part.with_value(name) for part in parts]) for name in names]
        values = [counts for counts in values if any(c.entered or c.excluded for c in counts)]
        values.sort(key=lambda counts: (-counts[0].entered, counts[0].value or ""))
    at = instant(horizon) if horizon else None
    return FunnelResult(spec, snapshot, at, tuple(steps), tuple(values), tuple(parts))


def _counts(spec: FunnelSpec, value: str | None, parts: Sequence[Counts]) -> tuple[StepCount, ...]:
    counts = sum((part.counts for part in parts), np.zeros((KINDS, len(spec.steps)), np.int64))
    found: list[StepCount] = []
    entered = before = int(counts[REACHED, 0])
    for k, step in enumerate(spec.steps):
        reached, settled = int(counts[REACHED, k]), entered - int(counts[WAITING, k])
        took, gap = (_times(parts, name, k) for name in ("took", "gap"))
        rate, rate_low, rate_high = _rate(reached, entered)
        settled_rate, settled_low, settled_high = _rate(reached, settled)
        found.append(
            StepCount(
                value=value,
                step=k + 1,
                name=step.name,
                entered=entered,
                reached=reached,
                converted=int(counts[WENT_ON, k]),
                pending=int(counts[PENDING, k]),
                dropped=int(counts[DROPPED, k]),
                excluded=int(counts[EXCLUDED, k]),
                rate=rate,
                rate_low=rate_low,
                rate_high=rate_high,
                settled=settled,
                settled_rate=settled_rate,
                settled_low=settled_low,
                settled_high=settled_high,
                step_rate=reached / before if before else None,
                seconds_median=_seconds(quantile(took, 0.5)),
                seconds_p90=_seconds(quantile(took, 0.9)),
                gap_median=_seconds(quantile(gap, 0.5)),
                gap_p90=_seconds(quantile(gap, 0.9)),
                young=settled < entered,
            )
        )
        if k + 1 not in spec.optional:
            before = reached
    return tuple(found)


def _times(parts: Sequence[Counts], name: Literal["took", "gap"], step: int) -> NDArray[np.int64]:
    """How long the units that reached a step (from 0) took; at step 1 that is no time for any of them."""
    if step == 0:
        return np.zeros(min(1, sum(int(part.counts[REACHED, 0]) for part in parts)), np.int64)
    return np.concatenate([getattr(part, name)[step - 1] for part in parts] or [np.empty(0, np.int64)])


def _rate(successes: int, trials: int) -> tuple[float | None, float | None, float | None]:
    return (successes / trials, *wilson(successes, trials)) if trials else (None, None, None)


def _seconds(value: int | None) -> float | None:
    return None if value is None else value / 1_000_000
