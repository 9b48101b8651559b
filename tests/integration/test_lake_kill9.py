"""Real processes write a lake and are killed at every step of it; the lake has each event once."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from kehu.lake import Lake, vacuum
from kehu.lake.log import Log

EVENTS = 110  # of each of the three partitions

# A consumer of a topic that is known beforehand. Every call that makes something durable is counted, and at the one that
# is asked for the process kills itself: before the call when the number is odd, after it when it is even.
CONSUMER = f"""
import json, os, pathlib, signal, sys
from datetime import UTC, datetime, timedelta
from uuid import UUID
from kehu.lake import LakeConflict, LakeWriter, Record, compact, vacuum

lake, kill_at, sort = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "sort"
calls = 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at and kill_at % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

os.fsync, os.link = counted(os.fsync), counted(os.link)
pathlib.Path.replace, pathlib.Path.unlink = counted(pathlib.Path.replace), counted(pathlib.Path.unlink)

def value(partition, offset):
    number = offset * 3 + partition
    at = datetime(2026, 1, 20, tzinfo=UTC) + timedelta(hours=number)
    return json.dumps({{
        "specversion": "1.0", "id": str(UUID(int=number)), "source": "/kehu/x", "type": "thing.done.v1",
        "subject": f"thing-{{number}}", "time": at.isoformat(), "recordedtime": at.isoformat(), "streamversion": 1,
        "customerid": f"c{{number % 17}}", "partitionkey": f"c{{number % 17}}", "position": number + 1, "data": {{}},
    }}).encode()

writer = LakeWriter(lake, buckets=2)
print("ready", flush=True)
sys.stdin.readline()
conflicts = turn = 0
while True:
    offsets = writer.offsets()
    batch = [
        Record("crm.x.events", p, o, value(p, o))
        for p in range(3)
        for o in range(offsets.get(("crm.x.events", p), 0), min(offsets.get(("crm.x.events", p), 0) + 5 + p, {EVENTS}))
    ]
    if not batch:
        break
    try:
        writer.append(batch)
        turn += 1
        if sort and turn % 3 == 0:
            compact(lake, threads=1)
            vacuum(lake, keep=3)
    except LakeConflict:
        conflicts += 1
print("conflicts", conflicts, flush=True)
"""


def start(lake: Path, kill_at: int, *, sort: bool = True) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(lake), str(kill_at), "sort" if sort else "append"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Let it go on, and wait for its end."""
    try:
        out, error = process.communicate("go\n", timeout=120)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode, out


def check_whole(lake: Path) -> None:
    """Each event once, the offsets at the end, and after a sweep no file that is not part of the lake."""
    reader = Lake(lake, threads=1)
    table = reader.sql('SELECT "partition" AS p, "offset" AS o, count(*) AS n FROM events GROUP BY ALL ORDER BY ALL')
    assert [(r["p"], r["o"], r["n"]) for r in table.to_pylist()] == [(p, o, 1) for p in range(3) for o in range(EVENTS)]
    assert reader.offsets() == {("crm.x.events", p): EVENTS for p in range(3)}
    vacuum(lake, keep=1, orphan_age=timedelta())
    on_disk = {file.relative_to(lake).as_posix() for file in lake.rglob("*.parquet")}
    assert on_disk == set(reader.snapshot().files)
    assert not list((lake / "_log").glob(".*"))
    assert reader.sql("SELECT count(*) AS n FROM events")["n"].to_pylist() == [3 * EVENTS]


@pytest.mark.req("AN-09")
@pytest.mark.req("DC-03")
@pytest.mark.timeout(600)
def test_killed_at_every_step_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    kills = 0
    for kill_at in range(1, 120):
        code, _ = finished(start(lake, kill_at))
        if code == 0:
            break
        kills += 1
        if (lake / "_log").exists() and list((lake / "_log").glob("*.json")):
            snapshot = Log(lake).read()  # whatever happened, it can be read, and rows and offsets agree
            assert snapshot.rows == sum(snapshot.offsets.values())
            for file in snapshot.files.values():
                assert (lake / file.path).stat().st_size == file.bytes
    assert kills >= 15
    check_whole(lake)


@pytest.mark.req("AN-09")
@pytest.mark.timeout(300)
def test_processes_that_race_write_each_event_once(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    never = 10**9
    racers = [start(lake, never), start(lake, never, sort=False), start(lake, never, sort=False)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        outs = [finished(racer) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait(10)
    assert [code for code, _ in outs] == [0, 0, 0]
    check_whole(lake)
