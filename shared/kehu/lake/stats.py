"""The small statistics that the results show."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Args:
        successes, trials: counts; (0, 1) when there were no trials.
        confidence: of the interval, two-sided.

    Raises:
        ValueError: counts that cannot be, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    p = successes / trials
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # At 0 and at all the bound is exact; rounding must not take it past the proportion itself.
    return (0.0 if successes == 0 else max(0.0, middle - half)), (
        1.0 if successes == trials else min(1.0, middle + half)
    )


def quantile(values: NDArray[np.int64], q: float) -> int | None:
    """The nearest-rank quantile: the smallest value that at least a share `q` of them does not exceed.

    It is one of the values, so integers stay integers (SQL: `quantile_disc`). None when there are none.
    """
    if len(values) == 0:
        return None
    rank = max(int(np.ceil(q * len(values))) - 1, 0)
    return int(np.partition(values, rank)[rank])
