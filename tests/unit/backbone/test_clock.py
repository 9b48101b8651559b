"""The development clock: every process that reads the file sees the same moved time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from kehu.clock import DevelopmentClock, FixedClock, SystemClock


def near(one: datetime, other: datetime) -> bool:
    return abs(one - other) < timedelta(seconds=5)


def test_system_clock_is_aware() -> None:
    assert SystemClock().now().tzinfo is UTC


def test_without_a_file_it_is_the_machines_time(tmp_path: Path) -> None:
    assert near(DevelopmentClock(tmp_path / "clock.json").now(), datetime.now(UTC))


def test_moving_is_seen_by_another_reader(tmp_path: Path) -> None:
    mover, reader = DevelopmentClock(tmp_path / "clock.json"), DevelopmentClock(tmp_path / "clock.json")
    at = datetime(2008, 5, 5, 9, 0, tzinfo=UTC)
    mover.set(at)
    assert near(reader.now(), at)
    mover.advance(timedelta(hours=48))
    assert near(mover.now(), at + timedelta(hours=48))
    reader.FRESH = 0.0
    assert near(reader.now(), at + timedelta(hours=48))


def test_fixed_clock_stands_still() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    clock = FixedClock(at)
    assert clock.now() == clock.now() == at
    assert clock.advance(timedelta(days=1)) == datetime(2026, 1, 2, tzinfo=UTC)
