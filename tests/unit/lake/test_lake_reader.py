"""Reading: any past, SQL that can only read, timelines, and funnels that agree however the rows are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake_data import BEGIN, TOPIC, envelope, records

from kehu.lake import (
    Exclusion,
    FunnelSpec,
    Lake,
    LakeWriter,
    QueryRefused,
    SnapshotGone,
    Step,
    compact,
    evaluate,
    fold,
    vacuum,
)
from kehu.lake.funnel import FunnelResult

HOUR = timedelta(hours=1)
STEPS = (
    Step(name="captured", types="lead.captured"),
    Step(name="qualified", types="lead_score.lead_qualified"),
    Step(name="won", types="opportunity.won"),
)
KINDS = ["lead.captured.v1", "lead.captured.v2", "lead_score.lead_qualified.v1", "opportunity.won.v1", "note.taken.v1"]


def fill(path: Path, count: int = 400, *, seed: int = 1, buckets: int = 4, tail: int = 0) -> Lake:
    """A lake of random events; the last `tail` of them not sorted yet."""
    random = np.random.default_rng(seed)
    writer = LakeWriter(path, buckets=buckets)
    values = [
        envelope(
            n,
            KINDS[random.integers(0, len(KINDS))],
            f"c{random.integers(0, 40)}",
            int(random.integers(0, 2_000)) * HOUR,
            recorded=int(random.integers(2_000, 4_000)) * HOUR,
            data={
                "channel": ["form", "展会", "ads"][random.integers(0, 3)],
                "score": int(random.integers(0, 3)),
                "hot": bool(random.integers(0, 2)),
                "lead_id": f"lead{random.integers(0, 60)}",
                **({"deal": f"d{random.integers(0, 2)}"} if random.integers(0, 3) else {}),
            },
        )
        for n in range(count)
    ]
    if count > tail:
        writer.append(records(values[: count - tail]))
        compact(path)
    if tail:
        writer.append(records(values[count - tail :], first=count - tail))
    return Lake(path, threads=2)


@pytest.mark.req("AN-07")
@pytest.mark.req("AN-12")
def test_as_known_then_and_as_known_now(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    writer.append(
        records(
            [
                envelope(0, "order.placed.v1", "a", 1 * HOUR),
                envelope(1, "order.placed.v1", "a", 2 * HOUR, recorded=50 * HOUR),  # told late
                envelope(2, "order.placed.v1", "a", 60 * HOUR),
            ]
        )
    )
    lake = Lake(tmp_path)
    query = "SELECT count(*) AS n FROM events WHERE type = 'order.placed.v1'"

    def counted(**more: Any) -> int:
        return int(lake.sql(query, **more)["n"][0].as_py())

    for kept in ("tail", "sorted"):
        first_day = BEGIN + 24 * HOUR
        assert counted(until=first_day, as_of=first_day) == 1, kept
        assert counted(until=first_day) == 2, kept
        assert counted(as_of=first_day) == 1, kept
        assert counted() == 3, kept
        assert counted(as_of=BEGIN + 50 * HOUR) == 2, "the instant itself is in"
        assert counted(as_of=BEGIN + 50 * HOUR - timedelta(microseconds=1)) == 1
        compact(tmp_path)


@pytest.mark.req("AN-09")
def test_events_by_type_and_column(tmp_path: Path) -> None:
    lake = fill(tmp_path, tail=100)
    table = lake.events(types=["opportunity.won.v1"], columns=["customer", "offset", "time"])
    assert table.column_names == ["customer", "offset", "time"]
    assert len(table) == lake.sql("SELECT * FROM events WHERE type = ?", parameters=["opportunity.won.v1"]).num_rows
    assert lake.events(types=[]).num_rows == 0
    assert lake.events().num_rows == 400
    with pytest.raises(ValueError, match="no column nonsense"):
        lake.events(columns=["nonsense"])
    with pytest.raises(ValueError, match="time zone"):
        lake.events(as_of=datetime(2026, 1, 1))


@pytest.mark.req("AN-09")
def test_sql_answers_in_arrow(tmp_path: Path) -> None:
    lake = fill(tmp_path)
    table = lake.sql(
        "SELECT data->>'channel' AS channel, count(*) AS n FROM events WHERE customer = $who GROUP BY 1 ORDER BY 1",
        parameters={"who": "c1"},
    )
    assert isinstance(table, pa.Table)
    assert table["channel"].to_pylist() == ["ads", "form", "展会"]


@pytest.mark.parametrize(
    "query",
    [
        "COPY (SELECT 1) TO '{lake}/tail/x.parquet'",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW events",
        "SET threads = 1",
        "ATTACH '{lake}/x.db'",
        "INSTALL httpfs",
        "PRAGMA version",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{lake}/x.csv'",
        "",
    ],
)
def test_sql_only_reads(tmp_path: Path, query: str) -> None:
    lake = fill(tmp_path / "lake", 10)
    with pytest.raises(QueryRefused):
        lake.sql(query.format(lake=tmp_path / "lake"))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('{other}')",
        "SELECT * FROM '{other}'",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "FROM events, (FROM read_blob('{lake}/../secret.txt'))",
    ],
)
def test_sql_reads_this_lake_and_nothing_else(tmp_path: Path, query: str) -> None:
    lake = fill(tmp_path / "lake", 10)
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(duckdb.Error):
        lake.sql(query.format(other=tmp_path / "secret.txt", lake=tmp_path / "lake"))


@pytest.mark.parametrize("tail", [0, 30, 400])
def test_a_timeline_is_the_customer_s_events_in_order(tmp_path: Path, tail: int) -> None:
    lake = fill(tmp_path, tail=tail)
    rows = lake.timeline("c7").to_pylist()
    assert len(rows) == lake.sql("SELECT * FROM events WHERE customer = 'c7'").num_rows > 2
    assert {row["customer"] for row in rows} == {"c7"}
    assert [(row["time"], row["sequence"]) for row in rows] == sorted((row["time"], row["sequence"]) for row in rows)
    half = rows[len(rows) // 2]["time"]
    assert lake.timeline("c7", until=half).num_rows == sum(row["time"] <= half for row in rows)
    assert lake.timeline("nobody'; DROP VIEW events; --").num_rows == 0


def test_names_with_quotes(tmp_path: Path) -> None:
    path = tmp_path / 'a lake\'s "place"'
    LakeWriter(path).append(records([envelope(0, "it's.odd.v1", "o'hara")]))
    assert Lake(path).timeline("o'hara").num_rows == 1
    assert Lake(path).events(types=["it's.odd.v1"]).num_rows == 1
    spec = FunnelSpec(steps=[Step(name="odd", types="it's.odd", where={"data.channel": "it's"})], window=HOUR)
    assert Lake(path).funnel(spec).entered == 0
    compact(path)
    assert Lake(path).timeline("o'hara").num_rows == 1


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first": {"entry": "first"},
    "later": {"ties": "strictly_later"},
    "strict": {"order": "strict"},
    "unordered": {"order": "unordered"},
    "optional": {"optional": {2}},
    "exclude": {"exclude": (Exclusion(types="note.taken", after=1, before=3),)},
    "hold": {"hold": ("data.deal",)},
    "lead": {"unit": "lead"},
    "by channel": {"breakdown": "data.channel"},
    "by channel, last": {"breakdown": "data.channel", "attribution": "last"},
    "by channel, all": {"breakdown": "data.channel", "attribution": "all"},
    "by month in Shanghai": {"breakdown": "month", "tz": "Asia/Shanghai", "attribution": "step:2"},
    "until": {"until": BEGIN + 1_000 * HOUR},
    "as of": {"as_of": BEGIN + 3_000 * HOUR},
    "both": {"as_of": BEGIN + 3_000 * HOUR, "until": BEGIN + 1_500 * HOUR},
}


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("more", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("tail", [0, 60, 400])
def test_a_funnel_is_the_same_however_the_rows_are_kept(tmp_path: Path, tail: int, more: dict[str, Any]) -> None:
    lake = fill(tmp_path, tail=tail)
    spec = FunnelSpec(steps=STEPS, window=timedelta(days=50), **more)
    got, wanted = lake.funnel(spec), evaluate(lake.events(), spec)
    assert got.rows() == wanted.rows()
    assert got.entered > 10
    assert got.steps[-1].reached > 0
    for k in range(1, 4):
        for kind in ("reached", "converted", "pending", "dropped", "excluded"):
            units = got.units(kind, k)
            assert units == wanted.units(kind, k)
            assert len(units) == getattr(got.steps[k - 1], kind)


@given(st.integers(0, 10_000), st.integers(0, 120), st.integers(0, 60), st.integers(1, 2_000))
@settings(max_examples=12, deadline=None)
@pytest.mark.req("AN-01")
def test_a_plain_funnel_over_files_is_exact(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, tail: int, window: int
) -> None:
    """Months, buckets, a tail and later months for known customers, against one table and against SQL."""
    path = tmp_path_factory.mktemp("lake")
    lake = fill(path, max(count, tail, 1), seed=seed, tail=tail)
    compact(path) if seed % 2 else None
    spec = FunnelSpec(steps=STEPS, window=window * HOUR)
    got = lake.funnel(spec)
    assert got.rows() == evaluate(lake.events(), spec).rows()
    assert [row["reached"] for row in lake.sql(got.sql()).to_pylist()] == [step.reached for step in got.steps]


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("at_a_time", [1, 3, 4_096])
@pytest.mark.parametrize("held", [0, 10**9])
def test_a_plain_funnel_in_blocks_and_in_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int, held: int
) -> None:
    """A few customers at a time where their numbers rise, all of them where they do not or the bucket is too large."""
    monkeypatch.setattr(fold, "CUSTOMERS_AT_A_TIME", at_a_time)
    monkeypatch.setattr(fold, "MAX_HELD_ROWS", held)
    writer = LakeWriter(tmp_path, buckets=2)
    random = np.random.default_rng(3)
    rising = []
    for turn, names in enumerate(("mnop", "mnopqr", "abmnz", "abcmz")):
        values = [
            envelope(
                n,
                KINDS[random.integers(0, 4)],
                None if n % 11 == 0 else f"{names[random.integers(0, len(names))]}{random.integers(0, 5)}",
                int(random.integers(0, 1_500)) * HOUR,
            )
            for n in range(turn * 60, turn * 60 + 60)
        ]
        writer.append(records(values, first=turn * 60))
        lake = Lake(tmp_path)
        rising.append(all(file.rising for file in lake.snapshot().of("events")))
        for more in ({}, {"as_of": BEGIN + 900 * HOUR}, {"until": BEGIN + 700 * HOUR}):
            spec = FunnelSpec(steps=STEPS, window=timedelta(days=30), **more)
            got, wanted = lake.funnel(spec), evaluate(lake.events(), spec)
            assert got.rows() == wanted.rows()
            assert got.units("reached", 1) == wanted.units("reached", 1)
            assert got.units("dropped", 2) == wanted.units("dropped", 2)
        if turn < 3:
            compact(tmp_path)
    assert rising == [True, True, True, False], (
        "customers that come later have greater numbers, and sort where they sort"
    )


@pytest.mark.req("AN-01")
def test_pending_is_not_dropped(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    writer.append(
        records(
            [
                envelope(0, "a.done.v1", "gone", 0 * HOUR),
                envelope(1, "a.done.v1", "won", 5 * HOUR),
                envelope(2, "b.done.v1", "won", 6 * HOUR),
                envelope(3, "a.done.v1", "waits", 15 * HOUR),
                envelope(4, "x.done.v1", "nobody", 20 * HOUR, recorded=20 * HOUR),
            ]
        )
    )
    spec = FunnelSpec(steps=[Step(name="a", types="a.done"), Step(name="b", types="b.done")], window=10 * HOUR)
    result = Lake(tmp_path).funnel(spec)
    one, two = result.steps
    assert (one.entered, one.converted, one.pending, one.dropped) == (3, 1, 1, 1)
    assert (two.reached, two.rate, two.settled, two.settled_rate, two.young) == (1, 1 / 3, 2, 1 / 2, True)
    assert (two.seconds_median, two.gap_median, one.seconds_median) == (3600.0, 3600.0, 0.0)
    assert result.units("pending", 1) == ["waits"]
    assert result.horizon == BEGIN + 20 * HOUR
    # The last instant at which the window is open, and the first at which it is not.
    for limit, pending in ((25 * HOUR, 1), (25 * HOUR + timedelta(microseconds=1), 0)):
        later = Lake(tmp_path).funnel(spec.model_copy(update={"as_of": BEGIN + limit}))
        assert later.steps[0].pending == pending


@pytest.mark.req("AN-07")
def test_a_result_can_be_counted_again(tmp_path: Path) -> None:
    lake = fill(tmp_path, tail=50)
    result = lake.funnel(FunnelSpec(steps=STEPS, window=timedelta(days=9), breakdown="data.channel"))
    text = result.to_json()
    content = json.loads(text)
    assert content["snapshot"] == lake.snapshot().id
    assert content["rows"] == result.rows()
    LakeWriter(tmp_path).append(
        records([envelope(n, "lead.captured.v1", f"new{n}") for n in range(400, 420)], first=400)
    )
    compact(tmp_path)
    assert lake.funnel(result.spec.model_copy(update={"as_of": None})).entered == result.entered + 20
    again = lake.rerun(text)
    assert (again.rows(), again.snapshot, again.spec) == (result.rows(), result.snapshot, result.spec)
    vacuum(tmp_path, keep=1)
    with pytest.raises(SnapshotGone):
        lake.rerun(text)
    with pytest.raises(ValueError, match="not the result"):
        lake.rerun("{}")


def test_a_result_of_another_lake_is_refused(tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one", 50), fill(tmp_path / "two", 60)
    text = one.funnel(FunnelSpec(steps=STEPS, window=HOUR)).to_json()
    with pytest.raises(ValueError, match="of this lake"):
        two.rerun(text)


def test_a_result_as_a_table(tmp_path: Path) -> None:
    result: FunnelResult = fill(tmp_path).funnel(
        FunnelSpec(steps=STEPS, window=timedelta(days=9), breakdown="data.channel")
    )
    assert result.arrow().to_pylist() == result.rows()
    assert result.df().equals(result.arrow())
    assert len(result.values) == 3
    assert sum(counts[0].entered for counts in result.values) == result.entered
    for counts in result.values:
        assert len(result.units("reached", 2, counts[0].value)) == counts[1].reached
    with pytest.raises(ValueError, match="step 4"):
        result.units("reached", 4)
    with pytest.raises(ValueError, match="one query"):
        result.sql()


def test_where_compares_values_as_json_writes_them(tmp_path: Path) -> None:
    lake = fill(tmp_path, tail=100)
    for where, condition in [
        ({"data.channel": "展会"}, "data->>'channel' = '展会'"),
        ({"data.score": (1, 2)}, "CAST(data->>'score' AS INT) IN (1, 2)"),
        ({"data.hot": True}, "data->>'hot' = 'true'"),
        ({"actor": "user:7", "data.missing": "x"}, "false"),
    ]:
        spec = FunnelSpec(steps=[Step(name="x", types=("lead.captured.v1", "note.taken"), where=where)], window=HOUR)
        wanted = lake.sql(
            "SELECT count(DISTINCT customer) AS n FROM events WHERE "
            f"type IN ('lead.captured.v1', 'note.taken.v1') AND {condition}"
        )
        assert lake.funnel(spec).entered == wanted["n"][0].as_py()


def test_too_many_values_are_refused(tmp_path: Path) -> None:
    writer = LakeWriter(tmp_path, buckets=1)
    writer.append(records(envelope(n, customer=f"c{n}") for n in range(1_001)))
    spec = FunnelSpec(steps=[Step(name="x", types="lead.captured")], window=HOUR, breakdown="customer")
    with pytest.raises(ValueError, match="coarser"):
        Lake(tmp_path).funnel(spec)


def test_an_empty_lake(tmp_path: Path) -> None:
    LakeWriter(tmp_path)
    for more in SPECS.values():
        result = Lake(tmp_path).funnel(FunnelSpec(steps=STEPS, window=HOUR, **more))
        assert [step.reached for step in result.steps] == [0, 0, 0]
        assert result.steps[0].rate is None
        json.loads(result.to_json())


def test_threads_do_not_change_the_numbers(tmp_path: Path) -> None:
    fill(tmp_path, buckets=4, tail=50)
    spec = FunnelSpec(steps=STEPS, window=timedelta(days=20))
    one, many = Lake(tmp_path, threads=1), Lake(tmp_path, threads=3)
    for _ in range(3):  # the memory of the funnel before is used again
        assert one.funnel(spec).rows() == many.funnel(spec).rows()


def test_a_table_of_one_s_own() -> None:
    with pytest.raises(ValueError, match="no column time"):
        evaluate(pa.table({"type": ["a"]}), FunnelSpec(steps=STEPS, window=HOUR))


@pytest.mark.req("AN-09")
def test_other_tools_read_the_files(tmp_path: Path) -> None:
    """The sorted files are plain Parquet: any engine reads them with a glob, without this library."""
    lake = fill(tmp_path)
    with duckdb.connect() as connection:
        found = connection.execute(
            f"SELECT count(*), count(DISTINCT customer), min(month), max(bucket) FROM read_parquet('{tmp_path}/events/**/*.parquet', "
            "hive_partitioning = true, hive_types_autocast = false)"
        ).fetchall()
    assert found == [(400, 40, "2026-01", "03")]
    assert lake.snapshot().offsets == {(TOPIC, 0): 400}


def test_the_writer_does_not_load_the_compiler_or_the_charts() -> None:
    code = "import sys, kehu.lake; kehu.lake.LakeWriter; print(sorted({'numba', 'altair', 'fastapi', 'aiokafka'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_kernels_compile_where_nothing_beside_them_can_be_written(tmp_path: Path) -> None:
    """As in an image with a read-only root: numba finds no place for its cache but the temporary directory."""
    code = (
        "from kehu.lake import jit\n"
        "import numba\n"
        "from kehu.lake.kernel import clear\n"
        "import numpy as np\n"
        "state = np.zeros((2, 4, 3), np.int64)\n"
        "clear(state)\n"
        "print(state[1, 1].tolist(), bool(clear.stats.cache_path), clear.stats.cache_path)\n"
    )
    # Only the locator of NUMBA_CACHE_DIR is left, which has nothing until we name a directory.
    environment = {
        "PATH": "/usr/bin",
        "TMPDIR": str(tmp_path),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment
        )
        assert done.stdout.startswith(f"[-1, -1, -1] True {tmp_path}/kehu-numba-")
    assert list(tmp_path.glob("kehu-numba-*/**/*.nbc"))
