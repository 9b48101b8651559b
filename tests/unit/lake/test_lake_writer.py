"""The writer: exactly once, whatever Kafka sends again, and nothing lost."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake_data import BEGIN, TOPIC, envelope, records

import kehu.lake.repeats as repeats_module
from kehu.lake import (
    Lake,
    LakeConflict,
    LakeError,
    LakeGap,
    LakeMissing,
    LakeWriter,
    Record,
    SnapshotGone,
    compact,
    vacuum,
)
from kehu.lake.errors import LakeCorrupt
from kehu.lake.format import COLUMNS
from kehu.lake.log import CHECKPOINT_EVERY, Change, Log, Snapshot


@pytest.mark.req("AN-09")
def test_a_row_is_the_whole_envelope(tmp_path: Path) -> None:
    value = envelope(4, data={"channel": "展会", "amount": "12.30", "nested": {"n": 1}}, traceparent="00-ab-cd-01")
    result = LakeWriter(tmp_path).append([Record(TOPIC, 3, 0, value)])
    assert (result.events, result.rejected, result.offsets) == (1, 0, {(TOPIC, 3): 1})
    row = Lake(tmp_path).events().to_pylist()[0]
    assert tuple(row) == COLUMNS
    assert json.loads(row.pop("data")) == {"channel": "展会", "amount": "12.30", "nested": {"n": 1}}
    assert row == {
        "unit": -1,
        "type": "lead.captured.v1",
        "time": BEGIN,
        "customer": "kunde-1",
        "sequence": 5,
        "recordedtime": BEGIN + timedelta(seconds=1),
        "subject": "lead-kunde-1",
        "streamversion": 5,
        "topic": TOPIC,
        "partition": 3,
        "offset": 0,
        "position": 5,
        "storeepoch": "e-1",
        "id": "00000000-0000-0000-0000-000000000004",
        "source": "/kehu/lead-intake",
        "actor": "user:7",
        "partitionkey": "kunde-1",
        "correlationid": "c-1",
        "causationid": "c-0",
        "traceparent": "00-ab-cd-01",
        "dataschema": "urn:kehu:schema:lead.captured.v1",
    }


def test_what_is_sent_again_is_passed_over(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path)
    batch = records(envelope(n) for n in range(5))
    first = writer.append(batch)
    again = writer.append(batch)
    assert (again.version, again.events, again.known) == (first.version, 0, 5)
    more = LakeWriter(tmp_path).append(records((envelope(n) for n in range(3, 8)), first=3))
    assert (more.events, more.known) == (3, 2)
    assert Lake(tmp_path).offsets() == {(TOPIC, 0): 8}
    assert Lake(tmp_path).snapshot().rows == 8


def test_a_record_twice_in_a_batch_is_one(tmp_path: Path) -> None:
    batch = records(envelope(n) for n in range(3))
    result = LakeWriter(tmp_path).append([*batch, batch[1]])
    assert (result.events, result.known) == (3, 1)


def test_a_hole_is_refused(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path)
    with pytest.raises(LakeGap) as first:
        writer.append(records([envelope(0)], first=7))
    assert (first.value.expected, first.value.got) == (0, 7)
    writer.append(records([envelope(0)]))
    with pytest.raises(LakeGap):
        writer.append([*records([envelope(1)], first=1), *records([envelope(3)], first=3)])
    assert writer.offsets() == {(TOPIC, 0): 1}
    assert writer.append(records([envelope(5)], first=5), allow_gaps=True).offsets == {(TOPIC, 0): 6}


@pytest.mark.req("DC-03")
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("sort_first", [False, True])
def test_an_event_under_a_new_offset_is_kept_once(tmp_path: Path, restart: bool, sort_first: bool) -> None:
    """A relay that lost its way sends some events again: the same ids, new offsets."""
    writer = LakeWriter(tmp_path)
    values = [envelope(n) for n in range(6)]
    writer.append(records(values))
    if sort_first:
        compact(tmp_path)
    if restart:
        writer = LakeWriter(tmp_path)
    result = writer.append(records([values[4], values[5], envelope(6), values[2], envelope(6)], first=6))
    assert (result.events, result.repeated, result.offsets) == (1, 4, {(TOPIC, 0): 11})
    found = Lake(tmp_path).sql('SELECT id, min("offset") o FROM events GROUP BY id HAVING count(*) = 1 ORDER BY id')
    assert found["o"].to_pylist() == [0, 1, 2, 3, 4, 5, 8]


def test_positions_out_of_order_are_not_repeats(tmp_path: Path) -> None:
    """The store hands out positions before transactions commit, so a partition is not sorted by them."""
    writer = LakeWriter(tmp_path)
    assert writer.append(records(envelope(n) for n in (0, 2, 1, 5))).events == 4
    assert writer.append(records((envelope(n) for n in (4, 3, 6)), first=4)).events == 3
    assert LakeWriter(tmp_path).append(records((envelope(n) for n in (9, 7, 8)), first=7)).events == 3
    assert Lake(tmp_path).snapshot().rows == 10


def test_events_without_a_position_are_told_apart_by_id(tmp_path: Path) -> None:
    values = [envelope(n, position=None) for n in range(3)]
    LakeWriter(tmp_path).append(records(values))
    result = LakeWriter(tmp_path).append(records([values[1], envelope(3, position=None)], first=3))
    assert (result.events, result.repeated) == (1, 1)


def test_repeats_beyond_what_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats_module, "RECENT", 3)
    writer = LakeWriter(tmp_path)
    values = [envelope(n) for n in range(10)]
    assert writer.append(records([*values, values[0], values[9]])).repeated == 2
    assert writer.append(records([values[1], values[8], envelope(10)], first=12)).repeated == 2


@pytest.mark.req("DC-04")
def test_poison_is_kept_apart_and_stops_nothing(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path)
    bad: list[bytes | None] = [
        b"\xff\x00",
        b"[1]",
        b"{}",
        None,
        envelope(1, time="yesterday"),
        envelope(1, streamversion=True),
    ]
    batch = [Record(TOPIC, 0, offset, value) for offset, value in enumerate([envelope(0), *bad, envelope(2)])]
    result = writer.append(batch)
    assert (result.events, result.rejected, result.offsets) == (2, 6, {(TOPIC, 0): 8})
    rejected = Lake(tmp_path).rejected().to_pylist()
    assert [row["offset"] for row in rejected] == [1, 2, 3, 4, 5, 6]
    assert [row["value"] for row in rejected] == bad
    assert all(row["reason"] for row in rejected)
    assert writer.append(batch).version == result.version


@given(st.lists(st.one_of(st.binary(max_size=40), st.none(), st.integers(0, 5).map(envelope)), max_size=12))
@settings(max_examples=30, deadline=None)
def test_no_record_is_ever_lost(tmp_path_factory: pytest.TempPathFactory, values: list[bytes | None]) -> None:
    lake = tmp_path_factory.mktemp("lake")
    result = LakeWriter(lake).append([Record(TOPIC, 0, offset, value) for offset, value in enumerate(values)])
    assert result.events + result.rejected + result.repeated == len(values)
    kept = Lake(lake).sql('SELECT "offset" AS o FROM events UNION ALL SELECT "offset" FROM rejected ORDER BY 1')
    distinct = {v if v is not None and v.startswith(b'{"spec') else (n,) for n, v in enumerate(values)}
    assert len(kept) == len(distinct)


@given(
    st.dictionaries(
        st.sampled_from(
            ["id", "type", "subject", "time", "recordedtime", "streamversion", "position", "customerid", "data"]
        ),
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=2)),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_an_envelope_is_a_row_or_is_rejected(tmp_path_factory: pytest.TempPathFactory, odd: dict[str, Any]) -> None:
    lake = tmp_path_factory.mktemp("lake")
    value = json.dumps({**json.loads(envelope(0)), **odd}).encode()
    result = LakeWriter(lake).append([Record(TOPIC, 0, 0, value)])
    assert (result.events, result.rejected) in {(1, 0), (0, 1)}
    assert len(Lake(lake).events()) == result.events


def test_of_two_writers_the_second_learns_it(tmp_path: Path) -> None:
    one, two = LakeWriter(tmp_path), LakeWriter(tmp_path)
    batch = records(envelope(n) for n in range(3))
    one.append(batch)
    with pytest.raises(LakeConflict, match=r"crm\.lead-intake\.events\[0\]"):
        two.append(batch)
    assert len(list((tmp_path / "tail").iterdir())) == 1, "what the loser wrote is gone"
    assert two.append(batch).known == 3, "after the conflict it goes on from where the lake is"
    assert Lake(tmp_path).snapshot().rows == 3


def test_writers_of_different_topics_do_not_meet(tmp_path: Path) -> None:
    one, two = LakeWriter(tmp_path), LakeWriter(tmp_path)
    one.append(records([envelope(0)]))
    two.append(records([envelope(0)], topic="crm.scoring.events"))
    one.append(records([envelope(1)], first=1))
    assert Lake(tmp_path).offsets() == {(TOPIC, 0): 2, ("crm.scoring.events", 0): 1}
    assert Lake(tmp_path).snapshot().rows == 3


def test_a_writer_that_slept_through_a_vacuum(tmp_path: Path) -> None:
    sleeper, other = LakeWriter(tmp_path), LakeWriter(tmp_path)
    sleeper.append(records([envelope(0)]))
    for n in range(4):
        other.append(records([envelope(n)], first=n, topic="crm.scoring.events"))
    vacuum(tmp_path, keep=1)
    assert sleeper.append(records([envelope(1)], first=1)).events == 1
    assert other.offsets()[TOPIC, 0] == 2
    for n in range(2, 5):
        other.append(records([envelope(n)], first=n))
    vacuum(tmp_path, keep=1)
    with pytest.raises(LakeConflict):
        sleeper.append(records([envelope(2)], first=2))
    assert Lake(tmp_path).snapshot().rows == 9


def test_the_race_is_decided_at_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commits between our look at the log and our commit."""
    writer, other = LakeWriter(tmp_path), LakeWriter(tmp_path)
    commit = Log.commit

    def late(log: Log, base: Snapshot, change: Change, check: Any) -> Snapshot:
        monkeypatch.setattr(Log, "commit", commit)
        other.append(records([envelope(0)]))
        return commit(log, base, change, check)

    monkeypatch.setattr(Log, "commit", late)
    with pytest.raises(LakeConflict):
        writer.append(records([envelope(0)]))
    assert Lake(tmp_path).snapshot().rows == 1


def test_a_failed_commit_is_not_remembered_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LakeWriter(tmp_path)
    batch = records(envelope(n) for n in range(4))

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Log, "_link", full)
        with pytest.raises(OSError, match="no space"):
            writer.append(batch)
    assert Lake(tmp_path).snapshot().rows == 0
    assert writer.append(batch).events == 4


def test_a_batch_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit"):
        LakeWriter(tmp_path).append([Record(TOPIC, 0, 0, b"")] * 200_001)


def test_an_empty_batch_is_no_commit(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path)
    assert writer.append([]).version == 0
    assert Lake(tmp_path).events().num_rows == 0


@pytest.mark.parametrize("buckets", [0, 3, 2048])
def test_buckets_are_a_power_of_two(tmp_path: Path, buckets: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        LakeWriter(tmp_path, buckets=buckets)


def test_buckets_stay(tmp_path: Path) -> None:
    LakeWriter(tmp_path, buckets=4)
    assert LakeWriter(tmp_path).append(records([envelope(0)])).events == 1
    with pytest.raises(LakeError, match="4 buckets"):
        LakeWriter(tmp_path, buckets=8)


def test_no_lake(tmp_path: Path) -> None:
    with pytest.raises(LakeMissing):
        Lake(tmp_path / "nothing")
    with pytest.raises(LakeMissing):
        compact(tmp_path)


def test_every_version_can_be_read(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path)
    commits = CHECKPOINT_EVERY + 5
    for n in range(commits):
        writer.append(records([envelope(n)], first=n))
    lake = Lake(tmp_path)
    assert (tmp_path / "_log" / f"{CHECKPOINT_EVERY:010d}.checkpoint.json").exists()
    for version in (0, 1, CHECKPOINT_EVERY - 1, CHECKPOINT_EVERY, CHECKPOINT_EVERY + 1, commits):
        snapshot = lake.snapshot(version)
        assert (snapshot.version, snapshot.rows, snapshot.offsets.get((TOPIC, 0), 0)) == (version, version, version)
    with pytest.raises(SnapshotGone):
        lake.snapshot(commits + 1)


def test_a_hole_in_the_log_is_seen(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path)
    for n in range(3):
        writer.append(records([envelope(n)], first=n))
    (tmp_path / "_log" / "0000000003.json").write_text('{"format": 2}')
    with pytest.raises(LakeCorrupt, match="format 2"):
        Lake(tmp_path)
    (tmp_path / "_log" / "0000000003.json").write_text("{")
    with pytest.raises(LakeCorrupt):
        Lake(tmp_path)
    (tmp_path / "_log" / "0000000002.json").unlink()
    with pytest.raises(LakeCorrupt, match=r"0000000002\.json is missing"):
        Lake(tmp_path)
