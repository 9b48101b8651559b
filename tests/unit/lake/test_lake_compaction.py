"""Compaction and vacuum: the same events, better sorted, and readers undisturbed."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake_data import TOPIC, envelope, history, records

from kehu.lake import Lake, LakeConflict, LakeWriter, SnapshotGone, compact, vacuum
from kehu.lake.format import bucket_of, bucket_sql, micros, month_of
from kehu.lake.log import Change, Log, Snapshot

customers = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "孔夫子", "o'hara", "é" * 20]), st.uuids().map(str))
event = st.tuples(customers, st.integers(-100, 400), st.sampled_from(["lead.captured.v1", "x.done.v2"]))
turn = st.one_of(st.just("compact"), st.just("vacuum"), st.lists(event, min_size=1, max_size=12))


@given(st.lists(turn, min_size=1, max_size=6), st.sampled_from([1, 4]))
@settings(max_examples=25, deadline=None)
@pytest.mark.req("AN-09")
def test_the_events_stay_the_same(tmp_path_factory: pytest.TempPathFactory, turns: list[Any], buckets: int) -> None:
    path = tmp_path_factory.mktemp("lake")
    writer = LakeWriter(path, buckets=buckets)
    number = 0
    for what in turns:
        before = history(Lake(path).events())
        if what == "compact":
            compact(path, target=5)
            assert not (Lake(path).snapshot().of("tail"))
            assert history(Lake(path).events()) == before
        elif what == "vacuum":
            vacuum(path, keep=1, orphan_age=timedelta())
            assert history(Lake(path).events()) == before
        else:
            values = [
                envelope(number + i, wire, customer, timedelta(days=day))
                for i, (customer, day, wire) in enumerate(what)
            ]
            assert writer.append(records(values, first=number)).events == len(what)
            number += len(what)
            assert len(Lake(path).events()) == number
    _check_layout(path, buckets)


def _check_layout(path: Path, buckets: int) -> None:
    units: dict[str | None, int] = {}
    for file in Lake(path).snapshot().of("events"):
        table = pq.ParquetFile(path / file.path).read()
        rows = table.to_pylist()
        assert len(rows) == file.rows
        keys = [((r["customer"] is None, r["customer"]), r["time"], r["sequence"]) for r in rows]
        assert keys == sorted(keys, key=lambda k: (k[0][0], (k[0][1] or "").encode(), k[1], k[2]))
        for row in rows:
            bucket = bucket_of(row["customer"], buckets)
            assert f"month={month_of(micros(row['time']))}/bucket={bucket:02d}/" in file.path
            assert units.setdefault(row["customer"], row["unit"]) == row["unit"]
            assert row["unit"] == -1 if row["customer"] is None else row["unit"] % buckets == bucket
        groups = [
            set(pq.ParquetFile(path / file.path).read_row_group(g, columns=["customer"])["customer"].to_pylist())
            for g in range(pq.ParquetFile(path / file.path).num_row_groups)
        ]
        spread = Counter(customer for group in groups for customer in group)
        assert set(spread.values()) <= {1}, "a customer is never in two row groups"
    assert len(set(units.values())) == len(units), "each customer has a number of its own"
    numbered = {
        row["customer"]: row["unit"]
        for file in Lake(path).snapshot().of("customers")
        for row in pq.ParquetFile(path / file.path).read().to_pylist()
    }
    assert numbered == {customer: unit for customer, unit in units.items() if customer is not None}


@given(st.text(min_size=1, max_size=30), st.sampled_from([1, 2, 16, 1024]))
@settings(max_examples=60, deadline=None)
def test_the_bucket_is_the_same_in_python_and_sql(customer: str, buckets: int) -> None:
    if "\x00" in customer:
        customer = customer.replace("\x00", "0")
    with duckdb.connect() as connection:
        found = connection.execute(
            f"SELECT {bucket_sql('c', buckets)} FROM (SELECT $1::VARCHAR AS c)", [customer]
        ).fetchall()
    assert found == [(bucket_of(customer, buckets),)]


def test_the_bucket_is_the_same_for_ever() -> None:
    """Files of years are laid out by it."""
    assert [bucket_of(c, 1024) for c in (None, "", "a", "客户")] == [0, 205, 859, 519]


def test_a_reader_keeps_the_version_it_opened(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    writer.append(records(envelope(n, at=timedelta(days=n)) for n in range(40)))
    lake = Lake(tmp_path)
    opened = lake.snapshot()
    with lake.connect(snapshot=opened) as connection:
        writer.append(records((envelope(n) for n in range(40, 50)), first=40))
        compact(tmp_path)
        assert connection.sql("SELECT count(*) FROM events").fetchall() == [(40,)]
    assert lake.events(snapshot=opened).num_rows == 40
    assert lake.snapshot().rows == 50
    assert not lake.snapshot().of("tail")


def test_vacuum_keeps_what_kept_versions_need(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    for n in range(5):
        writer.append(records([envelope(n)], first=n))
        compact(tmp_path)
    newest = Lake(tmp_path).snapshot()
    result = vacuum(tmp_path, keep=3)
    assert result.oldest == newest.version - 2
    lake = Lake(tmp_path)
    for version in range(result.oldest, newest.version + 1):
        assert lake.events(snapshot=lake.snapshot(version)).num_rows == lake.snapshot(version).rows
    with pytest.raises(SnapshotGone):
        lake.snapshot(result.oldest - 1)
    assert history(lake.events()) == history(lake.events(snapshot=newest))
    writer.append(records([envelope(5)], first=5))
    assert lake.snapshot().rows == 6
    with pytest.raises(ValueError, match="newest"):
        vacuum(tmp_path, keep=0)


def test_orphans_are_not_read_and_are_swept_by_age(tmp_path: Path) -> None:
    LakeWriter(tmp_path, buckets=1).append(records([envelope(0)]))
    known = next((tmp_path / "tail").iterdir())
    orphan = tmp_path / "tail" / "0123456789abcdef.parquet"
    orphan.write_bytes(known.read_bytes())
    half = tmp_path / "_log" / ".0123.tmp"
    half.write_text("{")
    assert Lake(tmp_path).events().num_rows == 1
    assert vacuum(tmp_path).removed == ()
    assert set(vacuum(tmp_path, orphan_age=timedelta()).removed) == {"tail/0123456789abcdef.parquet", "_log/.0123.tmp"}
    assert known.exists()
    assert Lake(tmp_path).events().num_rows == 1


def test_of_two_compactions_the_second_learns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    writer.append(records(envelope(n) for n in range(3)))
    commit = Log.commit

    def late(log: Log, base: Snapshot, change: Change, check: Any) -> Snapshot:
        monkeypatch.setattr(Log, "commit", commit)
        compact(tmp_path)
        return commit(log, base, change, check)

    monkeypatch.setattr(Log, "commit", late)
    with pytest.raises(LakeConflict):
        compact(tmp_path)
    assert Lake(tmp_path).events().num_rows == 3
    on_disk = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "events").rglob("*.parquet")}
    assert on_disk == {f.path for f in Lake(tmp_path).snapshot().of("events")}, "what the loser wrote is gone"


def test_an_append_during_a_compaction_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    writer.append(records(envelope(n) for n in range(3)))
    commit = Log.commit

    def late(log: Log, base: Snapshot, change: Change, check: Any) -> Snapshot:
        monkeypatch.setattr(Log, "commit", commit)
        writer.append(records([envelope(3)], first=3))
        return commit(log, base, change, check)

    monkeypatch.setattr(Log, "commit", late)
    assert compact(tmp_path).rows == 3
    snapshot = Lake(tmp_path).snapshot()
    assert (snapshot.rows, len(snapshot.of("tail")), snapshot.offsets) == (4, 1, {(TOPIC, 0): 4})


def test_nothing_to_compact(tmp_path: Path) -> None:
    LakeWriter(tmp_path)
    assert compact(tmp_path).version == 0


def test_a_sort_larger_than_its_memory(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    payload = {"text": "长" * 300}
    for first in range(0, 60_000, 20_000):
        values = [
            envelope(n, customer=f"c{n * 7919 % 5003}", at=timedelta(seconds=n), data=payload)
            for n in range(first, first + 20_000)
        ]
        writer.append(records(values, first=first))
    result = compact(tmp_path, memory_limit="96MB", threads=1)
    assert result.rows == 60_000
    lake = Lake(tmp_path)
    assert lake.sql("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM events").to_pylist() == [
        {"n": 60_000, "ids": 60_000}
    ]
    assert not list((tmp_path / "_tmp").glob("*"))
