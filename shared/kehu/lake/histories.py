"""Any funnel over a table of rows: sorts them into histories and hands these to the kernel of the funnel's order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kehu.lake.format import MICROSECOND
from kehu.lake.kernel import ordered_histories, strict_histories, unordered_histories
from kehu.lake.outcome import Scratch, Split, Tally, Units
from kehu.lake.spec import FunnelSpec

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Results:
    """What the kernels write, by history."""

    took: Ints
    gap: Ints
    level: Ints
    reached_at: Ints
    open_start: Ints
    broken: NDArray[np.bool_]
    path: Ints

    @classmethod
    def of(cls, histories: int, steps: int) -> _Results:
        return cls(
            took=np.full((histories, steps), -1, np.int64),
            gap=np.full((histories, steps), -1, np.int64),
            level=np.zeros(histories, np.int64),
            reached_at=np.zeros(histories, np.int64),
            open_start=np.zeros(histories, np.int64),
            broken=np.zeros(histories, np.bool_),
            path=np.full((histories, steps), -1, np.int64),
        )


def count(rows: pa.Table, spec: FunnelSpec, horizon: int) -> Units:
    """Count a funnel over the rows of `kehu.lake.sql.rows_sql`, in any order.

    Args:
        rows: unit, t, sequence, mask, breaks, the held attributes h0… and the breakdown b.
        horizon: microseconds since 1970 UTC at which windows are open or closed.
    """
    rows = rows.combine_chunks()
    unit, names = _codes(rows["unit"])
    history = unit.copy()
    for index in range(len(spec.hold)):
        held, values = _codes(rows[f"h{index}"])
        _, history = np.unique(history * max(len(values), 1) + held, return_inverse=True)
    order = np.lexsort((_int64(rows["sequence"]), _int64(rows["t"]), history))
    history, unit = history[order], unit[order]
    time, mask, breaks = (_int64(rows[name])[order] for name in ("t", "mask", "breaks"))
    bounds = np.concatenate([np.flatnonzero(np.diff(history, prepend=-1)), [len(history)]])
    result = _run(spec, bounds, time, mask, breaks)
    if spec.hold:
        unit_of, chosen = _furthest(unit[bounds[:-1]], result, len(names))
        result = chosen
    else:
        unit_of = unit[bounds[:-1]]
    ids = names.take(pa.array(unit_of))
    tally = Tally(len(unit_of), len(spec.steps), horizon, spec.window // MICROSECOND, Scratch())
    tally.add(0, result.took, result.gap, result.open_start, result.broken)
    units = tally.units(lambda index: list(ids.take(pa.array(index)).to_pylist()))
    if spec.breakdown is None:
        return units
    split = _split(spec, result.path, units.level, rows["b"].take(pa.array(order)))
    return replace(units, split=split, times=(result.took, result.gap))


def _run(spec: FunnelSpec, bounds: Ints, time: Ints, mask: Ints, breaks: Ints) -> _Results:
    steps = len(spec.steps)
    window = spec.window // MICROSECOND
    first_only, later = spec.entry == "first", spec.ties == "strictly_later"
    out = _Results.of(len(bounds) - 1, steps)
    results = (out.took, out.gap, out.level, out.reached_at, out.open_start)
    if spec.order == "unordered":
        capacity = sum(int(m).bit_count() for m in np.unique(mask))
        unordered_histories(bounds, time, mask, window, steps, first_only, capacity, *results, out.path)
        return out
    lowest = np.array([_lowest(spec, k) for k in range(1, steps + 1)], np.int64)
    if spec.order == "strict":
        strict_histories(
            bounds, time, mask, lowest, window, steps, first_only, later, bool(spec.optional), *results, out.path
        )
        return out
    after = np.array([e.after for e in spec.exclude], np.int64)
    before = np.array([e.before for e in spec.exclude], np.int64)
    ordered_histories(
        bounds, time, mask, breaks, lowest, after, before, window, steps, first_only, later, bool(spec.optional),
        *results, out.broken, out.path,
    )  # fmt: skip
    return out


def _lowest(spec: FunnelSpec, k: int) -> int:
    lowest = k - 1
    while lowest in spec.optional:
        lowest -= 1
    return lowest


def _furthest(unit: Ints, result: _Results, units: int) -> tuple[Ints, _Results]:
    """Of a unit's histories (one for each value that is held), the one that got furthest, of those the earliest.

    Broken ones come last; a window that is open in any unbroken history keeps the unit's open.
    """
    order = np.lexsort((np.arange(len(unit)), result.reached_at, -result.level, result.broken, unit))
    first = order[np.flatnonzero(np.diff(unit[order], prepend=-1))]
    latest = np.full(units, np.iinfo(np.int64).min // 2, np.int64)
    whole = ~result.broken
    np.maximum.at(latest, unit[whole], result.open_start[whole])
    chosen = _Results(
        took=result.took[first],
        gap=result.gap[first],
        level=result.level[first],
        reached_at=result.reached_at[first],
        open_start=latest[unit[first]],
        broken=result.broken[first],
        path=result.path[first],
    )
    return unit[first], chosen


def _split(spec: FunnelSpec, path: Ints, level: NDArray[np.int8], breakdown: pa.ChunkedArray) -> Split:
    """The breakdown values of the rows that the attribution names."""
    codes, values = _codes(breakdown)
    entered = np.flatnonzero(level > 0)
    k = spec.attributed_step()
    if spec.attribution == "all":
        unit, step = np.nonzero(path >= 0)
        pairs = np.unique(np.stack([unit, codes[path[unit, step]]], axis=1), axis=0)
        return Split(pairs[:, 0], pairs[:, 1], tuple(values.to_pylist()))
    if k is not None:
        unit = np.flatnonzero(path[:, k - 1] >= 0)
        row = path[unit, k - 1]
    elif spec.order == "unordered" and spec.attribution == "first":
        # Rows of a history are in the order of time, so the first event is the least row and the last the greatest.
        unit, row = entered, np.where(path >= 0, path, np.iinfo(np.int64).max).min(axis=1)[entered]
    elif spec.order == "unordered":
        unit, row = entered, path.max(axis=1)[entered]
    else:
        reached = (
            np.zeros(len(entered), np.int64) if spec.attribution == "first" else level[entered].astype(np.int64) - 1
        )
        unit, row = entered, path[entered, reached]
    return Split(unit, codes[row], tuple(values.to_pylist()))


def _codes(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """A column as dense codes and their values; null is a value."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = array.dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def _int64(column: pa.ChunkedArray) -> Ints:
    values: Ints = column.to_numpy().astype(np.int64, copy=False)
    return values
