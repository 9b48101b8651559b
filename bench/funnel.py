"""The exact funnel: ours beside the bare scan of its columns, ClickHouse's windowFunnel and DuckDB's ASOF joins, same files."""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import chdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from bench.kit import Contender, compare, console
from kehu.lake import FunnelSpec, Lake, LakeWriter, Step, compact
from kehu.lake.engine import connect, scan_events
from kehu.lake.format import SCHEMA, TAIL, ParquetFile, micros
from kehu.lake.log import Change, DataFile, Log
from kehu.lake.sql import funnel_sql

DAYS = 90  # that the events are spread over
EVENTS_A_CUSTOMER = 20
CHUNK = 1_000_000
START = micros(datetime(2026, 1, 1, tzinfo=UTC))
# Two fifths of the events are steps, ever fewer towards the goal; the rest is what customers do besides.
FUNNEL = (
    "lead.captured.v1",
    "lead_score.lead_qualified.v1",
    "opportunity.opened.v1",
    "quote.accepted.v1",
    "contract.signed.v1",
)
WEIGHTS = (0.12, 0.10, 0.08, 0.06, 0.04)
OTHERS = 15


def spec() -> FunnelSpec:
    """Five steps, 30 days."""
    steps = tuple(Step(name=wire.rpartition(".v")[0], types=wire) for wire in FUNNEL)
    return FunnelSpec(steps=steps, window=timedelta(days=30))


def generate(path: Path, rows: int, seed: int = 20260101) -> None:
    """Fill a lake with random events and sort it."""
    buckets = 1 << max(0, round(np.log2(rows / 2_500_000)))
    LakeWriter(path, buckets=buckets)
    random = np.random.default_rng(seed)
    customers = max(1, rows // EVENTS_A_CUSTOMER)
    names = pa.array([str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(customers)])
    kinds = pa.array([*FUNNEL, *(f"behaviour.kind_{n}.v1" for n in range(OTHERS))])
    weights = np.array([*WEIGHTS, *([(1 - sum(WEIGHTS)) / OTHERS] * OTHERS)])
    log = Log(path)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{rows:,} events", total=rows)
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            table = _chunk(random, first, count, names, kinds, weights)
            file = ParquetFile(path, TAIL, SCHEMA)
            file.write(table)
            low, high = START, START + DAYS * 86_400_000_000
            entry = DataFile(
                file.path, "tail", count, file.close(), min_time=low, max_time=high, max_recorded=high + 1_000_000
            )
            log.commit(log.read(), Change("append", add=(entry,)), lambda _: None)
            progress.advance(task, count)
        task = progress.add_task("sorting", total=None)
        started = time.perf_counter()
        compact(path, memory_limit=None)
        progress.remove_task(task)
    console.print(f"{rows:,} events of {customers:,} customers sorted in {time.perf_counter() - started:.1f} s")


def _chunk(
    random: np.random.Generator, first: int, count: int, names: pa.Array, kinds: pa.Array, weights: Any
) -> pa.Table:
    time_ = np.sort(START + random.integers(0, DAYS * 86_400_000_000, count))
    number = np.arange(first, first + count, dtype=np.int64)
    customer = names.take(pa.array(random.integers(0, len(names), count)))
    text = pa.array(number).cast(pa.string())
    columns: dict[str, Any] = {
        "unit": np.full(count, -1, np.int32),
        "type": kinds.take(pa.array(random.choice(len(kinds), count, p=weights))),
        "time": pa.array(time_, pa.timestamp("us", tz="UTC")),
        "customer": customer,
        "sequence": number,
        "recordedtime": pa.array(time_ + 1_000_000, pa.timestamp("us", tz="UTC")),
        "subject": customer,
        "streamversion": number,
        "topic": pa.array(["crm.bench.events"] * count),
        "partition": np.zeros(count, np.int32),
        "offset": number,
        "position": number,
        "id": text,
        "data": pa.array(["{}"] * count),
    }
    return pa.table({f.name: columns.get(f.name, pa.nulls(count, f.type)) for f in SCHEMA}, SCHEMA)


def run(rows: int = 10_000_000, repeat: int = 3, path: Path | None = None) -> list[dict[str, Any]]:
    """Measure, each contender on one thread, and print the table.

    Args:
        rows: events; ignored when `path` holds a lake already.
        repeat: rounds, alternating.
        path: keep the lake there and use it again; None for a temporary one.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="kehu-bench-") as directory:
            return run(rows, repeat, Path(directory) / "lake")
    if not (path / "_log").exists():
        generate(path, rows)
    lake = Lake(path, threads=1)
    snapshot = lake.snapshot()
    files = [str(path.absolute() / f.path) for f in snapshot.of("events")]
    counts: dict[str, list[int]] = {}

    def measured(name: str, work: Callable[[], list[int]]) -> Callable[[], float]:
        def once() -> float:
            started = time.process_time()
            result = work()
            seconds = time.process_time() - started
            if name in counts and counts[name] != result:
                raise AssertionError(f"{name} counted {result}, and {counts[name]} before")
            counts[name] = result
            return snapshot.rows / seconds / 1e6

        return once

    connection = connect(path, threads=1)
    events = scan_events(path, snapshot.of("events"))
    wanted = ", ".join(f"'{wire}'" for wire in FUNNEL)
    plain = spec()

    def scan() -> list[int]:
        query = f'SELECT count(*), max(unit), max("time") FROM {events} WHERE type IN ({wanted})'
        return [int(connection.sql(query).fetchall()[0][0])]

    def columns() -> list[int]:
        total = 0
        for file in files:
            with pq.ParquetFile(file, read_dictionary=["type"], memory_map=True) as parquet:
                for group in range(parquet.num_row_groups):
                    total += parquet.read_row_group(group, ["unit", "type", "time"], use_threads=False).num_rows
        return [total]

    def ours() -> list[int]:
        return [step.reached for step in lake.funnel(plain).steps]

    def asof() -> list[int]:
        return [int(row[1]) for row in connection.sql(funnel_sql(plain, events, unit="unit")).fetchall()]

    conditions = ", ".join(f"type = '{wire}'" for wire in FUNNEL)
    levels = (
        f"SELECT unit, windowFunnel({30 * 86_400_000_000})(toUInt64(toUnixTimestamp64Micro(time)), {conditions}) AS level "
        f"FROM file('{path.absolute()}/events/**/*.parquet', Parquet) WHERE type IN ({wanted}) GROUP BY unit"
    )
    reached = ", ".join(f"countIf(level >= {k})" for k in range(1, len(FUNNEL) + 1))

    def clickhouse() -> list[int]:
        answer = str(chdb.query(f"SELECT {reached} FROM ({levels}) SETTINGS max_threads = 1", "CSV"))  # type: ignore[no-untyped-call]
        return [int(number) for number in answer.split(",")]

    figures = compare(
        f"funnel of 5 steps in 30 days over {snapshot.rows:,} events",
        "M rows per CPU second",
        [
            Contender("scan and filter (DuckDB)", "limit", measured("scan", scan)),
            Contender("columns, undecided (pyarrow)", "limit", measured("columns", columns)),
            Contender("kehu.lake", "ours", measured("ours", ours)),
            Contender("ClickHouse windowFunnel (chdb)", "peer", measured("clickhouse", clickhouse)),
            Contender("ASOF joins (DuckDB)", "peer", measured("asof", asof)),
        ],
        repeat,
    )
    connection.close()
    if not counts["ours"] == counts["clickhouse"] == counts["asof"]:
        raise AssertionError(f"the engines disagree: {counts}")
    console.print(f"reached, the same on every engine: {counts['ours']}")
    return [{**asdict(f), "median": f.median} for f in figures]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="events (default 10 million)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--path", type=Path, help="keep the lake here, and use it when it is there")
    arguments = parser.parse_args()
    run(arguments.rows, arguments.repeat, arguments.path)
