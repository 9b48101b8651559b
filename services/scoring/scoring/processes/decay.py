"""Scores fade while nothing happens. A durable timer stands at the second at which that next changes a lead's band."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from kehu.postgres import Row
from kehu.timers import Timer, cancel, schedule

PROCESS = "decay"


def start(lead_id: UUID, due: datetime) -> Row:
    """Look at the lead again then; replaces the timer that stands."""
    return schedule(PROCESS, lead_id, due)


def stop(lead_id: UUID) -> Row:
    """The lead has ended."""
    return cancel(PROCESS, lead_id)


def lead_of(timer: Timer) -> UUID:
    """The lead that a timer is about."""
    return UUID(timer.key)
