"""When something happened: not in the future, and not before anything of interest was recorded."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

from kehu.decider import Refused

# Times in files that name no zone, and the months of customer numbers, are China's: one offset all year since 1992, so that
# no table of time zones is needed.
CHINA = timezone(timedelta(hours=8), "Asia/Shanghai")
# How far the clock of a browser or a partner's system may go ahead of ours.
AHEAD = timedelta(minutes=5)
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
_LOCAL = re.compile(
    r"(\d{4})\s*[-/.年]\s*(\d{1,2})\s*[-/.月]\s*(\d{1,2})日?(?:[T\s]+(\d{1,2}):(\d{1,2})(?::(\d{1,2})(?:\.\d+)?)?)?",
    re.ASCII,
)


def refused_time(field: str, at: datetime | None, received_at: datetime) -> Refused | None:
    """Why an instant cannot be when something happened; None when it can."""
    if at is None:
        return None
    if at > received_at + AHEAD:
        return Refused("in-the-future", f"{field} is more than five minutes ahead of the service's clock", field)
    if at < EARLIEST:
        return Refused("too-early", f"{field} is before the year 2000", field)
    return None


def local_time(text: str) -> datetime | None:
    """The instant of a date or time without a zone as people write it: 2024-05-17, 2024/5/17 8:30, 2024年5月17日. None when it is none."""
    match = _LOCAL.fullmatch(text.strip())
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups())
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=CHINA)
    except ValueError:
        return None
