"""What became of each unit: the common ground of the kernels and the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kehu.lake.kernel import KINDS, REACHED, summarise, tally

Ints = NDArray[np.int64]
Names = Callable[[Ints], list[str]]


@dataclass(frozen=True, slots=True)
class Split:
    """The values of the breakdown that units have: pairs (unit, value), values as indices into `values`."""

    unit: Ints
    value: Ints
    values: tuple[str | None, ...]

    def of(self, value: str | None) -> Ints:
        """The units that have a value."""
        return self.unit[self.value == self.values.index(value)] if value in self.values else self.unit[:0]


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of `kernel.summarise`, and by step from the second on the times of the units that reached it."""

    counts: Ints
    took: tuple[Ints, ...]
    gap: tuple[Ints, ...]


class Scratch:
    """Memory that is used again from one part to the next: to have it anew costs more than to count."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, type[np.generic]], NDArray[Any]] = {}

    def take(self, name: str, size: int, kind: type[np.generic] = np.int64) -> NDArray[Any]:
        """An array of at least that size, with anything in it."""
        held = self._held.get((name, kind))
        if held is None or len(held) < size:
            held = self._held[name, kind] = np.empty(size, kind)
        return held[:size]


@dataclass(frozen=True, slots=True)
class Units:
    """Units of one part of the data, by index.

    Attributes:
        names: their ids, for some indices.
        level: the furthest step, 0 for none.
        outcome: NONE, CONVERTED, PENDING, DROPPED or EXCLUDED of the kernel.
        reached: bit k-1 for each step k that was reached.
        counts: of all of them.
        split: of the breakdown, when there is one.
        times: by unit and step the time from the start and from the step before, microseconds; with a split.
    """

    names: Names
    level: NDArray[np.int8]
    outcome: NDArray[np.int8]
    reached: NDArray[np.int32]
    counts: Counts
    split: Split | None = None
    times: tuple[Ints, Ints] | None = None

    def with_value(self, value: str | None) -> Counts:
        """The counts of the units with one value of the breakdown."""
        assert self.split is not None
        assert self.times is not None
        index = self.split.of(value)
        took, gap = (times[index] for times in self.times)
        steps = took.shape[1]
        room = _room(len(index), steps, Scratch())
        summarise(took, gap, self.level[index], self.outcome[index], steps, *room)
        return _filled(*room)


class Tally:
    """Gathers the units of one part, block by block, into `Units`.

    Args:
        units, steps: how many.
        horizon: microseconds since 1970 UTC at which windows are open or closed.
        window: microseconds.
        scratch: for memory that is free again after `units`.
    """

    def __init__(self, units: int, steps: int, horizon: int, window: int, scratch: Scratch) -> None:
        self._limits = horizon, window, steps
        self._level, self._outcome = np.zeros(units, np.int8), np.zeros(units, np.int8)
        self._reached = np.zeros(units, np.int32)
        self._room = _room(units, steps, scratch)

    def add(self, first: int, took: Ints, gap: Ints, open_start: Ints, broken: NDArray[np.bool_]) -> None:
        """Add what the kernels left of the units from index `first` on; it may be overwritten afterwards."""
        block = slice(first, first + len(took))
        ends = self._level[block], self._outcome[block], self._reached[block]
        tally(took, gap, open_start, broken, *self._limits, *ends, *self._room)

    def units(self, names: Names) -> Units:
        """All that was added."""
        return Units(names, self._level, self._outcome, self._reached, _filled(*self._room))


def _room(units: int, steps: int, scratch: Scratch) -> tuple[Ints, Ints, Ints]:
    took, gap = (scratch.take(name, steps * (units + 1)).reshape(steps, units + 1) for name in ("took", "gap"))
    return np.zeros((KINDS, steps), np.int64), took, gap


def _filled(counts: Ints, took: Ints, gap: Ints) -> Counts:
    reached = counts[REACHED].tolist()
    return Counts(
        counts,
        tuple(row[:n].copy() for row, n in zip(took[1:], reached[1:], strict=True)),
        tuple(row[:n].copy() for row, n in zip(gap[1:], reached[1:], strict=True)),
    )
