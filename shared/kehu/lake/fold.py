"""The plain funnel over the sorted files of a snapshot: columns straight from Parquet into the kernel.

Each bucket is a world of its own (a customer is in one bucket), its months follow each other in time, and within a file
rows are sorted by customer: so the state of a bucket's customers is folded over its files, and nothing is sorted or
joined. Customers with rows in the tail are counted apart, from their sorted rows and their tail rows together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
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
from kehu.lake.outcome import Scratch, Tally, Units
from kehu.lake.spec import FunnelSpec, matches_type
from kehu.lake.sql import mask_sql, time_limits

Ints = NDArray[np.int64]
Codes = NDArray[np.int32]

CUSTOMERS_AT_A_TIME = 4_096  # whose state fits into the processor's second cache
MAX_HELD_ROWS = 30_000_000  # of a bucket in memory, 16 bytes each; a larger one is read row group by row group


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
        units = [u for b in mine for u in _Bucket(root, snapshot, spec, b, tail.get(b), horizon, scratch).count()]
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


@dataclass(slots=True)
class _Group:
    """The columns of a row group: the customer's number, an index into `masks`, the time; and the steps of each code.

    The last of `masks` is that of no step.
    """

    unit: Codes
    code: Codes
    time: Ints
    masks: Ints
    single: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.single = single_steps(self.masks)


class _Bucket:
    def __init__(
        self,
        root: Path,
        snapshot: Snapshot,
        spec: FunnelSpec,
        bucket: int,
        tail: _TailRows | None,
        horizon: int,
        scratch: Scratch,
    ) -> None:
        self.root = root
        self.spec = spec
        self.tail = tail
        self.horizon = horizon
        self.scratch = scratch
        self.steps = len(spec.steps)
        self.window = spec.window // MICROSECOND
        self.shift = snapshot.buckets.bit_length() - 1
        self.files = sorted((f for f in snapshot.of("events") if f.bucket == bucket), key=lambda f: f.month or "")
        self.numbered = [f for f in snapshot.of("customers") if f.bucket == bucket]
        self.known = sum(f.rows for f in self.numbered)

    def count(self) -> list[Units]:
        """The customers of the sorted files, and apart from them those that have rows in the tail."""
        groups: Iterable[_Group] = self._groups()
        late = []
        if self.tail is not None:
            groups = list(groups)
            late.append(self._count_late(groups, self.tail))
        held = sum(f.rows for f in self.files) <= MAX_HELD_ROWS and all(f.rising for f in self.files)
        return [self._count_held(list(groups)) if held else self._count_streamed(groups), *late]

    def _count_held(self, groups: list[_Group]) -> Units:
        """Some thousand customers at a time: their numbers rise in every file, so their rows are slices of it."""
        tally = Tally(self.known, self.steps, self.horizon, self.window, self.scratch)
        edges = np.append(np.arange(0, self.known, CUSTOMERS_AT_A_TIME), self.known)
        cuts = [_cuts(group.unit, edges, self.shift) for group in groups]
        for block, (first, end) in enumerate(pairwise(edges.tolist())):
            state = self._state(end - first)
            for group, cut in zip(groups, cuts, strict=True):
                if cut[block] < cut[block + 1]:
                    self._fold(group, slice(cut[block], cut[block + 1]), first, state)
            self._add(tally, first, state)
        return tally.units(self._known_names)

    def _count_streamed(self, groups: Iterable[_Group]) -> Units:
        """All customers at a time and one row group after the other: less memory, and more of it to reach at random."""
        tally = Tally(self.known, self.steps, self.horizon, self.window, self.scratch)
        state = self._state(self.known)
        for group in groups:
            self._fold(group, slice(None), 0, state)
        self._add(tally, 0, state)
        return tally.units(self._known_names)

    def _count_late(self, groups: list[_Group], tail: _TailRows) -> Units:
        """The customers of the tail, whose rows are taken out of the row groups."""
        encoded = tail.customer.dictionary_encode()
        customers = encoded.dictionary
        number = pc.index_in(customers, value_set=self._customers()).fill_null(-1).to_numpy()
        place = np.full(self.known, -1, np.int64)  # of each known customer among those of the tail
        place[number[number >= 0]] = np.flatnonzero(number >= 0)
        parts = [(encoded.indices.to_numpy().astype(np.int64), tail.time, tail.mask)]
        for group in groups:
            late = (
                np.where(group.unit >= 0, place[group.unit >> self.shift], -1)
                if self.known
                else np.full(len(group.unit), -1)
            )
            rows = np.flatnonzero(late >= 0)
            parts.append((late[rows], group.time[rows], group.masks[group.code[rows]]))
            group.code = np.where(late >= 0, np.int32(len(group.masks) - 1), group.code)
        unit, time, mask = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.lexsort((time, unit))
        masks, code = np.unique(mask[order], return_inverse=True)
        state = self._state(len(customers))
        group = _Group((unit[order] << self.shift).astype(np.int32), code.astype(np.int32), time[order], masks)
        self._fold(group, slice(None), 0, state)
        tally = Tally(len(customers), self.steps, self.horizon, self.window, self.scratch)
        self._add(tally, 0, state)
        return tally.units(lambda index: list(customers.take(pa.array(index)).to_pylist()))

    def _groups(self) -> Iterator[_Group]:
        """The row groups, in the order of time; rows beyond `as_of` and `until` are no steps."""
        until = None if self.spec.until is None else micros(self.spec.until)
        as_of = None if self.spec.as_of is None else micros(self.spec.as_of)
        for file in self.files:
            if until is not None and file.min_time is not None and file.min_time > until:
                continue
            late = as_of is not None and (file.max_recorded is None or file.max_recorded > as_of)
            columns = ["unit", "type", "time", *(["recordedtime"] if late else [])]
            with pq.ParquetFile(self.root / file.path, read_dictionary=["type"], memory_map=True) as parquet:
                for number in range(parquet.num_row_groups):
                    table = parquet.read_row_group(number, columns=columns, use_threads=False)
                    group = self._group(table)
                    keep = np.ones(len(group.unit), np.bool_)
                    if until is not None and (file.max_time is None or file.max_time > until):
                        keep &= group.time <= until
                    if as_of is not None and late:
                        keep &= _integers(table["recordedtime"]) <= as_of
                    if not keep.all():
                        group.code = np.where(keep, group.code, np.int32(len(group.masks) - 1))
                    yield group

    def _group(self, table: pa.Table) -> _Group:
        types = _one_chunk(table["type"].unify_dictionaries())
        masks = np.zeros(len(types.dictionary) + 1, np.int64)
        for code, actual in enumerate(types.dictionary.to_pylist()):
            for k, step in enumerate(self.spec.steps):
                if any(matches_type(declared, actual) for declared in step.types):
                    masks[code] |= 1 << k
        return _Group(_one_chunk(table["unit"]).to_numpy(), types.indices.to_numpy(), _integers(table["time"]), masks)

    def _state(self, customers: int) -> Ints:
        state: Ints = self.scratch.take("state", customers * BLOCKS * (self.steps + 1))
        state = state.reshape(customers, BLOCKS, self.steps + 1)
        clear(state)
        return state

    def _fold(self, group: _Group, rows: slice, first: int, state: Ints) -> None:
        unit = group.unit[rows]
        fold_ordered(
            unit,
            group.code[rows],
            group.time[rows],
            group.single,
            group.masks,
            self.shift,
            first,
            self.window,
            self.steps,
            self.spec.entry == "first",
            self.spec.ties == "strictly_later",
            state.reshape(-1),
            self.scratch.take("picked", len(unit) + 1, np.int32),
        )

    def _add(self, tally: Tally, first: int, state: Ints) -> None:
        broken = np.zeros(len(state), np.bool_)  # nothing is excluded here
        tally.add(first, state[:, TOOK, 1:], state[:, GAP, 1:], state[:, START, 1], broken)

    def _customers(self) -> pa.Array:
        """The customers of the bucket in the order of their numbers."""
        parts = [pq.read_table(self.root / f.path, columns=["customer"])["customer"] for f in self.numbered]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return pa.chunked_array(chunks, pa.string()).combine_chunks()

    def _known_names(self, index: Ints) -> list[str]:
        return list(self._customers().take(pa.array(index)).to_pylist())


def single_steps(masks: Ints) -> Ints:
    """By code: 0 for no step, k for step k alone, -1 for several."""
    alone = (masks & (masks - 1)) == 0
    k = np.zeros(len(masks), np.int64)
    k[masks > 0] = np.log2(masks[masks > 0]).astype(np.int64) + 1
    return np.where(alone, k, -1)


def _cuts(unit: Codes, edges: Ints, shift: int) -> list[int]:
    """Where the rows of each block of customers begin and end; rows without a customer, at the end, are in none."""
    if len(unit) and unit[-1] < 0:
        unit = unit[: np.count_nonzero(unit >= 0)]
    cuts: list[int] = np.searchsorted(unit, (edges[:-1] << shift).astype(np.int32)).tolist()
    return [*cuts, len(unit)]


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _integers(column: pa.ChunkedArray) -> Ints:
    values: Ints = _one_chunk(column).view(pa.int64()).to_numpy()
    return values
