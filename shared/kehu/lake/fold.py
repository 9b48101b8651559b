"""The plain funnel over the sorted files of a snapshot: columns straight from Parquet into the kernel.

Each bucket is a world of its own (a customer is in one bucket), its months follow each other in time, and within a file
rows are sorted by customer: so the state of a bucket's customers is folded over its files, and nothing is sorted or
joined. Customers with rows in the tail are counted once more, from their sorted rows and their tail rows together.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kehu.lake.engine import connect, scan_events
from kehu.lake.format import MICROSECOND, bucket_sql, micros
from kehu.lake.kernel import BLOCKS, GAP, START, TOOK, clear, fold_ordered
from kehu.lake.log import Snapshot
from kehu.lake.outcome import Scratch, Units
from kehu.lake.spec import FunnelSpec, matches_type
from kehu.lake.sql import mask_sql, time_limits

Ints = NDArray[np.int64]


def is_plain(spec: FunnelSpec) -> bool:
    """Whether the spec needs nothing but the type, the time and the customer of each event."""
    return (
        spec.order == "ordered"
        and spec.unit == "customer"
        and not (spec.hold or spec.exclude or spec.optional or spec.breakdown)
        and not any(step.where for step in spec.steps)
    )


def fold(
    root: Path, snapshot: Snapshot, spec: FunnelSpec, horizon: int, threads: int, spare: list[Scratch]
) -> list[Units]:
    """Count a plain funnel, bucket by bucket.

    Args:
        horizon: microseconds since 1970 UTC at which windows are open or closed.
        threads: buckets at a time.
        spare: memory of earlier funnels, taken and given back.
    """
    tail = _tail_rows(root, snapshot, spec)
    buckets = sorted({f.bucket for f in snapshot.of("events") if f.bucket is not None} | set(tail))

    def work(mine: list[int]) -> list[Units]:
        try:
            scratch = spare.pop()
        except IndexError:
            scratch = Scratch()
        units = [_Bucket(root, snapshot, spec, b, tail.get(b), scratch).count(horizon) for b in mine]
        if len(spare) < threads:
            spare.append(scratch)
        return units

    workers = max(1, min(threads, len(buckets)))
    shares = [buckets[first::workers] for first in range(workers)]
    if workers == 1:
        return work(buckets)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return [units for part in pool.map(work, shares) for units in part]


@dataclass(frozen=True, slots=True)
class _TailRows:
    customer: pa.Array
    time: Ints
    mask: Ints


def _tail_rows(root: Path, snapshot: Snapshot, spec: FunnelSpec) -> dict[int, _TailRows]:
    """The rows of the tail that are steps, by bucket."""
    files = snapshot.of("tail")
    if not files:
        return {}
    limits = " AND ".join([*time_limits(spec.as_of, spec.until), "customer IS NOT NULL"])
    query = (
        f'SELECT customer, epoch_us("time") AS t, {mask_sql(spec)} AS mask, '  # noqa: S608 - parts are quoted there
        f"{bucket_sql('customer', snapshot.buckets)} AS bucket "
        f"FROM {scan_events(root, files)} WHERE {limits}"
    )
    with connect(root, threads=1) as connection:
        table = connection.sql(f"SELECT * FROM ({query}) WHERE mask <> 0").to_arrow_table().combine_chunks()  # noqa: S608 - as above
    bucket = table["bucket"].to_numpy()
    found = {}
    for number in np.unique(bucket).tolist():
        rows = table.take(pa.array(np.flatnonzero(bucket == number)))
        customer = rows["customer"].combine_chunks()
        found[int(number)] = _TailRows(customer, rows["t"].to_numpy(), rows["mask"].to_numpy())
    return found


class _Bucket:
    def __init__(
        self, root: Path, snapshot: Snapshot, spec: FunnelSpec, bucket: int, tail: _TailRows | None, scratch: Scratch
    ) -> None:
        self.root = root
        self.spec = spec
        self.tail = tail
        self.steps = len(spec.steps)
        self.shift = snapshot.buckets.bit_length() - 1
        self.files = sorted((f for f in snapshot.of("events") if f.bucket == bucket), key=lambda f: f.month or "")
        self.numbered = [f for f in snapshot.of("customers") if f.bucket == bucket]
        self.known = sum(f.rows for f in self.numbered)
        self.scratch = scratch

    def count(self, horizon: int) -> Units:
        numbers, strangers = self._numbers()
        touched = np.zeros(self.known + len(strangers), np.bool_)
        if numbers is not None:
            touched[numbers] = True
        units = len(touched)
        state: Ints = self.scratch.take("state", (units + 1) * BLOCKS * (self.steps + 1))
        state = state.reshape(units + 1, BLOCKS, self.steps + 1)
        clear(state, np.arange(len(state)))
        again: list[tuple[Ints, Ints, Ints]] = []
        for unit, code, time, masks in self._rows():
            self._fold(unit, code, time, masks, state)
            if numbers is not None:
                index = unit >> self.shift
                rows = np.flatnonzero((masks[code] != 0) & (unit >= 0) & touched[np.maximum(index, 0)])
                again.append((index[rows].astype(np.int64), time[rows], masks[code[rows]]))
        if numbers is not None and self.tail is not None:
            again.append((numbers, self.tail.time, self.tail.mask))
            self._count_again(again, touched, state)
        return self._units(state, strangers, horizon)

    def _numbers(self) -> tuple[Ints | None, list[str]]:
        """The index of the customer of each tail row, and the customers that have no number yet."""
        if self.tail is None:
            return None, []
        encoded = self.tail.customer.dictionary_encode()
        known = pc.index_in(encoded.dictionary, value_set=self._customers()).to_numpy(zero_copy_only=False)
        new = np.isnan(known.astype(np.float64))
        index = np.where(new, self.known + np.cumsum(new) - 1, np.where(new, 0, known)).astype(np.int64)
        strangers = encoded.dictionary.filter(pa.array(new)).to_pylist()
        return index[encoded.indices.to_numpy()], strangers

    def _customers(self) -> pa.Array:
        """The customers of the bucket in the order of their numbers."""
        parts = [pq.read_table(self.root / f.path, columns=["customer"])["customer"] for f in self.numbered]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return pa.chunked_array(chunks, pa.string()).combine_chunks()

    def _rows(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], Ints, Ints]]:
        """By row group: unit, code, time, and the steps (mask) of each code."""
        until = None if self.spec.until is None else micros(self.spec.until)
        as_of = None if self.spec.as_of is None else micros(self.spec.as_of)
        for file in self.files:
            if until is not None and file.min_time is not None and file.min_time > until:
                continue
            check_until = until is not None and (file.max_time is None or file.max_time > until)
            check_as_of = as_of is not None and (file.max_recorded is None or file.max_recorded > as_of)
            columns = ["unit", "type", "time", *(["recordedtime"] if check_as_of else [])]
            with pq.ParquetFile(self.root / file.path, read_dictionary=["type"], memory_map=True) as parquet:
                for number in range(parquet.num_row_groups):
                    group = parquet.read_row_group(number, columns=columns, use_threads=False)
                    kinds = _one_chunk(group["type"].unify_dictionaries())
                    masks = self._masks(kinds.dictionary.to_pylist())
                    code = kinds.indices.to_numpy()
                    time = _integers(group["time"])
                    if check_until or check_as_of:
                        keep = np.ones(len(code), np.bool_)
                        if until is not None and check_until:
                            keep &= time <= until
                        if as_of is not None and check_as_of:
                            keep &= _integers(group["recordedtime"]) <= as_of
                        code = np.where(keep, code, np.int32(len(masks) - 1))
                    yield _one_chunk(group["unit"]).to_numpy(), code, time, masks

    def _masks(self, types: list[str]) -> Ints:
        """The steps of each type, and of no event at all in the last place."""
        masks = np.zeros(len(types) + 1, np.int64)
        for code, actual in enumerate(types):
            for k, step in enumerate(self.spec.steps):
                if any(matches_type(declared, actual) for declared in step.types):
                    masks[code] |= 1 << k
        return masks

    def _fold(self, unit: NDArray[np.int32], code: NDArray[np.int32], time: Ints, masks: Ints, state: Ints) -> None:
        fold_ordered(
            unit,
            code,
            time,
            _single(masks),
            masks,
            self.shift,
            self.spec.window // MICROSECOND,
            self.steps,
            self.spec.entry == "first",
            self.spec.ties == "strictly_later",
            state.reshape(-1),
            self.scratch.take("picked", len(unit) + 1, np.int32),
        )

    def _count_again(self, parts: list[tuple[Ints, Ints, Ints]], touched: NDArray[np.bool_], state: Ints) -> None:
        unit, time, mask = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.lexsort((time, unit))
        masks, code = np.unique(mask[order], return_inverse=True)
        clear(state, np.flatnonzero(touched) + 1)
        self._fold((unit[order] << self.shift).astype(np.int32), code.astype(np.int32), time[order], masks, state)

    def _units(self, state: Ints, strangers: list[str], horizon: int) -> Units:
        def names(index: Ints) -> list[str]:
            known = self._customers()
            return [known[i].as_py() if i < self.known else strangers[i - self.known] for i in index.tolist()]

        units = state[1:]
        return Units.of(
            names,
            units[:, TOOK, 1:],
            units[:, GAP, 1:],
            units[:, START, 1],
            np.zeros(len(units), np.bool_),
            horizon,
            self.spec.window // MICROSECOND,
            self.scratch,
        )


def _single(masks: Ints) -> Ints:
    """By code: 0 for no step, k for step k alone, -1 for several."""
    alone = (masks & (masks - 1)) == 0
    k = np.zeros(len(masks), np.int64)
    k[masks > 0] = np.log2(masks[masks > 0]).astype(np.int64) + 1
    return np.where(alone, k, -1)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _integers(column: pa.ChunkedArray) -> Ints:
    values: Ints = _one_chunk(column).view(pa.int64()).to_numpy()
    return values
