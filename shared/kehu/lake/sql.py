"""A funnel as SQL: what its parts mean in DuckDB, the rows that the kernels take, and a whole funnel as one query.

The query is a second implementation that shares no code with the kernels but the meaning of a step; the tests hold both
to the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from kehu.lake.engine import identifier, quoted
from kehu.lake.format import MICROSECOND, micros
from kehu.lake.spec import UNITS, Exclusion, FunnelSpec, Step

_PERIOD = {
    "day": "strftime({at}, '%Y-%m-%d')",
    "week": "strftime(date_trunc('week', {at}), '%Y-%m-%d')",  # the Monday
    "month": "strftime({at}, '%Y-%m')",
    "quarter": "strftime({at}, '%Y') || '-Q' || quarter({at})",
    "year": "strftime({at}, '%Y')",
}


def attribute_sql(name: str) -> str:
    """The value of an attribute as text; NULL when an event does not have it."""
    if name.startswith("data."):
        return f"json_extract_string(data, {quoted('$' + name.removeprefix('data'))})"
    return f"CAST({identifier(name)} AS VARCHAR)"


def match_sql(match: Step | Exclusion) -> str:
    """Whether an event is meant."""
    conditions = ["(" + " OR ".join(_type_sql(declared) for declared in match.types) + ")"]
    for name, values in match.where.items():
        texts = ", ".join(quoted(str(v).lower() if isinstance(v, bool) else str(v)) for v in values)
        conditions.append(f"{attribute_sql(name)} IN ({texts})")
    return "coalesce(" + " AND ".join(conditions) + ", false)"


def unit_sql(unit: str) -> str:
    """The unit that an event belongs to; NULL when there is none."""
    if unit == "customer":
        return "customer"
    field, prefix = UNITS[unit]
    stream = f"CASE WHEN starts_with(subject, {quoted(prefix)}) THEN substr(subject, {len(prefix) + 1}) END"
    return f"coalesce({attribute_sql('data.' + field)}, {stream})"


def time_limits(as_of: datetime | None, until: datetime | None) -> list[str]:
    """Conditions on recorded time and business time, both inclusive."""
    limits = []
    if as_of is not None:
        limits.append(f"epoch_us(recordedtime) <= {micros(as_of)}")
    if until is not None:
        limits.append(f'epoch_us("time") <= {micros(until)}')
    return limits


def rows_sql(spec: FunnelSpec, source: str, *more: str) -> str:
    """The rows that a funnel needs: unit, t, sequence, mask, breaks, the held attributes h0… and the breakdown b.

    Args:
        source: SQL of the events.
        more: further columns.
    """
    columns = [
        f"{unit_sql(spec.unit)} AS unit",
        'epoch_us("time") AS t',
        "sequence",
        f"{_bits(spec.steps)} AS mask",
        f"{_bits(spec.exclude)} AS breaks",
        *(f"{attribute_sql(name)} AS h{index}" for index, name in enumerate(spec.hold)),
        *more,
    ]
    if spec.breakdown is not None:
        columns.append(f"{_breakdown_sql(spec.breakdown, spec.tz)} AS b")
    conditions = ["unit IS NOT NULL", *(f"h{index} IS NOT NULL" for index in range(len(spec.hold)))]
    if spec.order != "strict":  # a strict funnel must see every event
        conditions.append("(mask <> 0 OR breaks <> 0)")
    inner = " AND ".join(time_limits(spec.as_of, spec.until)) or "true"
    return f"SELECT * FROM (SELECT {', '.join(columns)} FROM {source} WHERE {inner}) WHERE {' AND '.join(conditions)}"  # noqa: S608 - parts are quoted here


def funnel_sql(spec: FunnelSpec, source: str = "events", unit: str | None = None) -> str:
    """A plain ordered funnel as one query: (step, reached).

    A chain of ASOF joins: an event of step k carries on the latest chain that came to step k-1 by then. It is right
    where first-touch joins are not, because a later start replaces an earlier one at every step.

    Args:
        source: SQL of the events.
        unit: SQL of the unit, when it is not that of the spec.

    Raises:
        ValueError: the spec asks for what this query does not do.
    """
    if spec.order != "ordered" or spec.hold or spec.exclude or spec.optional or spec.breakdown:
        raise ValueError("only an ordered funnel without hold, exclude, optional and breakdown is one query")
    window = spec.window // MICROSECOND
    limits = " AND ".join([*time_limits(spec.as_of, spec.until), "unit IS NOT NULL"])
    flags = ", ".join(f"{match_sql(step)} AS s{k}" for k, step in enumerate(spec.steps, 1))
    any_flag = " OR ".join(f"s{k}" for k in range(1, len(spec.steps) + 1))
    parts = [
        f'e AS (SELECT {unit or unit_sql(spec.unit)} AS unit, epoch_us("time") AS t, {flags} '  # noqa: S608 - parts are quoted here
        f"FROM {source} WHERE {limits} AND ({any_flag}))"
    ]
    if spec.entry == "first":
        parts.append("c1 AS (SELECT unit, min(t) AS t, min(t) AS start FROM e WHERE s1 GROUP BY unit)")
    else:
        parts.append("c1 AS (SELECT unit, t, t AS start FROM e WHERE s1)")
    before = ">=" if spec.ties == "step_order" else ">"
    parts += [
        f"c{k} AS (SELECT x.unit, x.t, c.start FROM (SELECT unit, t FROM e WHERE s{k}) x "  # noqa: S608 - parts are quoted here
        f"ASOF JOIN c{k - 1} c ON x.unit = c.unit AND x.t {before} c.t WHERE x.t - c.start <= {window})"
        for k in range(2, len(spec.steps) + 1)
    ]
    counts = " UNION ALL ".join(
        f"SELECT {k} AS step, count(DISTINCT unit) AS reached FROM c{k}"  # noqa: S608 - a number
        for k in range(1, len(spec.steps) + 1)
    )
    return f"WITH {', '.join(parts)} {counts} ORDER BY step"


def mask_sql(spec: FunnelSpec) -> str:
    """The steps that an event is, one bit each."""
    return _bits(spec.steps)


def _bits(matches: Sequence[Step | Exclusion]) -> str:
    if not matches:
        return "CAST(0 AS BIGINT)"
    bits = (f"CASE WHEN {match_sql(match)} THEN {1 << bit} ELSE 0 END" for bit, match in enumerate(matches))
    return f"CAST({' + '.join(bits)} AS BIGINT)"


def _type_sql(declared: str) -> str:
    prefix = f"{declared}.v"
    version = f"regexp_full_match(substr(type, {len(prefix) + 1}), '[0-9]+')"
    return f"(type = {quoted(declared)} OR (starts_with(type, {quoted(prefix)}) AND {version}))"


def _breakdown_sql(breakdown: str, tz: str) -> str:
    if breakdown in _PERIOD:
        return _PERIOD[breakdown].format(at=f'timezone({quoted(tz)}, "time")')
    return attribute_sql(breakdown)
