"""What became of each unit: the common ground of the kernels and the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NONE, CONVERTED, PENDING, DROPPED, EXCLUDED = range(5)  # as kernel.tally writes them


@dataclass(frozen=True, slots=True)
class Split:
    """The values of the breakdown that units have: pairs (unit, value), values as indices into `values`."""

    unit: NDArray[np.int64]
    value: NDArray[np.int64]
    values: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Units:
    """Units of one part of the data, by index.

    Attributes:
        names: their ids, for some indices.
        took: by unit and step, microseconds from the start of the first chain that reached the step; -1 when none did.
        gap: the same from the step before.
        level: the furthest step, 0 for none.
        outcome: NONE, CONVERTED, PENDING, DROPPED or EXCLUDED.
        split: of the breakdown, when there is one.
    """

    names: Callable[[NDArray[np.int64]], list[str]]
    took: NDArray[np.int64]
    gap: NDArray[np.int64]
    level: NDArray[np.int8]
    outcome: NDArray[np.int8]
    split: Split | None = None
