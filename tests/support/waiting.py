"""Waiting for what must come true."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Generous: a busy machine must not make a test fail. What comes true at once costs nothing.
DEADLINE = 120.0


def until(
    condition: Callable[[], T], what: str | Callable[[], str], deadline: float = DEADLINE, step: float = 0.05
) -> T:
    """Ask `condition` until it gives something true, and give that.

    Args:
        what: for the error; a function is asked only then, e.g. for what is still missing.
        deadline: seconds.
        step: seconds between two questions.

    Raises:
        AssertionError: it did not come true in time.
    """
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not (result := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:g} s: {what if isinstance(what, str) else what()}")
        pause.wait(step)
    return result
