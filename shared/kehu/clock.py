"""Where the time comes from. Domain code is given instants; only the edges ask a clock."""

from __future__ import annotations

import json
import os
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """The source of business time."""

    def now(self) -> datetime:
        """The present instant, aware, UTC."""
        ...


class SystemClock:
    """The clock of the machine."""

    def now(self) -> datetime:
        return datetime.now(UTC)


class FixedClock:
    """A clock for tests that stands still until it is moved."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def now(self) -> datetime:
        return self.at

    def advance(self, by: timedelta) -> datetime:
        self.at += by
        return self.at


class DevelopmentClock:
    """The machine's clock plus an offset that all processes read from one small file, so that it can be moved.

    Only for development and tests: settings refuse it in production.
    """

    # How long a reading of the file is trusted, in seconds: moving the clock is seen by every process within this time.
    FRESH = 0.02

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = timedelta()
        self._read_at = -1.0
        self._stamp: tuple[int, int] | None = None

    def now(self) -> datetime:
        return datetime.now(UTC) + self.offset()

    def offset(self) -> timedelta:
        """The distance from the machine's clock."""
        monotonic = time.monotonic()
        if monotonic - self._read_at >= self.FRESH:
            self._read_at = monotonic
            try:
                status = self.path.stat()
                stamp = (status.st_mtime_ns, status.st_ino)
                if stamp != self._stamp:
                    self._offset = timedelta(seconds=json.loads(self.path.read_text())["offset_seconds"])
                    self._stamp = stamp
            except FileNotFoundError:
                self._offset, self._stamp = timedelta(), None
        return self._offset

    def set(self, at: datetime) -> datetime:
        """Move the clock so that it is `at` now."""
        self._write(at - datetime.now(UTC))
        return at

    def advance(self, by: timedelta) -> datetime:
        """Move the clock forward (or back) and give the new time."""
        self._read_at = -1.0
        self._write(self.offset() + by)
        return self.now()

    def _write(self, offset: timedelta) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".clock-")
        with os.fdopen(handle, "w") as file:
            json.dump({"offset_seconds": offset.total_seconds()}, file)
        Path(temporary).replace(self.path)  # readers see the old offset or the new one, never half a file
        self._read_at = -1.0
        time.sleep(self.FRESH)  # when this returns, every process goes by the new time
