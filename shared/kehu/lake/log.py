"""The log of the lake: what is in it, version by version.

Each commit is one file `_log/<version>.json` that names the files it adds and removes and the Kafka offsets that it
moves. It is written beside, flushed, and then linked to its name: `link` fails when the name is taken, so of two
processes one commits and the other learns it, and a crash leaves either the whole commit or nothing. A data file that no
commit names is not in the lake. Every 64 commits the whole state is written next to them, so that opening stays quick.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from errno import ENOENT
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import orjson

from kehu.lake.errors import LakeConflict, LakeCorrupt, LakeError, LakeMissing, SnapshotGone
from kehu.lake.format import FORMAT, LOG, MAX_BUCKETS, ensure_directory, fsync_directory

CHECKPOINT_EVERY = 64
MAX_COMMIT_ATTEMPTS = 100
MAX_READ_ATTEMPTS = 5

_ENTRY = re.compile(r"^(\d{10})\.json$")
_CHECKPOINT = re.compile(r"^(\d{10})\.checkpoint\.json$")

Level = Literal["tail", "events", "customers", "rejected"]
Place = tuple[str, int]  # topic, partition


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file of the lake, as its commit described it. Times are microseconds since 1970 UTC.

    Attributes:
        ranges: [topic, partition, first offset, next offset] that came in with a file of the tail.
        rising: `unit` never falls from row to row of a sorted file, up to those without a customer at its end.
    """

    path: str
    level: Level
    rows: int
    bytes: int
    month: str | None = None
    bucket: int | None = None
    min_time: int | None = None
    max_time: int | None = None
    max_recorded: int | None = None
    ranges: tuple[tuple[str, int, int, int], ...] = ()
    rising: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit does."""

    kind: Literal["append", "compact"]
    add: tuple[DataFile, ...] = ()
    remove: tuple[str, ...] = ()
    offsets: Mapping[Place, int] = field(default_factory=dict)  # next offset by place
    positions: Mapping[Place, int] = field(default_factory=dict)  # highest store position seen by place


@dataclass(frozen=True)
class Snapshot:
    """One version of the lake. It does not change; reading it sees the same rows whatever is committed meanwhile.

    Attributes:
        version: number of the last commit in it.
        offsets: the next Kafka offset of each (topic, partition).
        max_recorded: latest recorded time in the lake, microseconds since 1970 UTC; None when it is empty.
    """

    lake_id: str
    buckets: int
    version: int
    files: Mapping[str, DataFile]
    offsets: Mapping[Place, int]
    positions: Mapping[Place, int]
    max_recorded: int | None

    @cached_property
    def id(self) -> str:
        """Names the content: the version, and a digest of the offsets that are in it."""
        content = orjson.dumps([self.lake_id, sorted([t, p, n] for (t, p), n in self.offsets.items())])
        return f"{self.version}-{sha256(content).hexdigest()[:12]}"

    @cached_property
    def rows(self) -> int:
        """How many events."""
        return sum(f.rows for f in self.files.values() if f.level in ("tail", "events"))

    def of(self, *levels: Level) -> list[DataFile]:
        """The files of these levels, in a stable order."""
        return sorted((f for f in self.files.values() if f.level in levels), key=lambda f: f.path)

    def after(self, version: int, change: Change) -> Snapshot:
        """The snapshot after a commit.

        Raises:
            LakeConflict: the commit removes a file that is not there any more.
        """
        files = dict(self.files)
        for path in change.remove:
            if files.pop(path, None) is None:
                raise LakeConflict(f"another process replaced {path} first")
        files.update((f.path, f) for f in change.add)
        recorded = [f.max_recorded for f in change.add if f.max_recorded is not None]
        if self.max_recorded is not None:
            recorded.append(self.max_recorded)
        return replace(
            self,
            version=version,
            files=files,
            offsets={**self.offsets, **change.offsets},
            positions={**self.positions, **change.positions},
            max_recorded=max(recorded, default=None),
        )


class Log:
    """The commits of the lake in a directory.

    Args:
        root: the lake.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._directory = root / LOG

    def create(self, buckets: int) -> Snapshot:
        """Make the lake, or open the one that is there.

        Args:
            buckets: a power of two up to 1024; fixed for the life of the lake. About one for each two million events
                a month.

        Raises:
            ValueError: not such a number.
            LakeError: the lake that is there has another number of buckets.
        """
        if not 1 <= buckets <= MAX_BUCKETS or buckets & (buckets - 1):
            raise ValueError(f"buckets must be a power of two up to {MAX_BUCKETS}, not {buckets}")
        ensure_directory(self._directory)
        birth = {"format": FORMAT, "version": 0, "kind": "create", "lake": uuid.uuid4().hex, "buckets": buckets}
        with suppress(FileExistsError):  # it is there, perhaps since a moment ago
            self._link(self._entry(0), orjson.dumps({**birth, "committed": _now()}))
        return self._same_buckets(self.read(), buckets)

    def read(self, version: int | None = None) -> Snapshot:
        """A snapshot of the lake, the newest unless a version is given.

        Raises:
            LakeMissing: no lake here.
            SnapshotGone: this version is not there, or no longer.
            LakeCorrupt: a commit in between is missing or cannot be read.
        """
        missing = ""
        for _ in range(MAX_READ_ATTEMPTS):
            try:
                return self._read(version)
            except FileNotFoundError as error:
                # Commits came or a vacuum ran while we listed: list again. A real hole stays one.
                missing = str(error.filename)
        raise LakeCorrupt(f"{missing} is missing")

    def newer(self, base: Snapshot) -> list[tuple[int, Change]]:
        """The commits after a snapshot, oldest first.

        Raises:
            SnapshotGone: some of them were vacuumed.
        """
        entries, _ = self._listing()
        try:
            return [
                (v, _change(self._json(self._entry(v)))) for v in range(base.version + 1, max(entries, default=0) + 1)
            ]
        except FileNotFoundError:
            raise SnapshotGone(f"commits after version {base.version} of {self.root} were vacuumed") from None

    def commit(self, base: Snapshot, change: Change, check: Callable[[Change], None]) -> Snapshot:
        """Add a commit after `base`, or after what others committed meanwhile when that does not touch it.

        Args:
            check: raises LakeConflict when a commit of another process stands in the way of this one.

        Raises:
            LakeConflict: the other was first.
        """
        for _ in range(MAX_COMMIT_ATTEMPTS):
            after = base.after(base.version + 1, change)
            try:
                self._link(self._entry(after.version), orjson.dumps(_entry_json(after.version, change)))
            except FileExistsError:
                try:
                    others = self.newer(base)
                except SnapshotGone as error:
                    raise LakeConflict(f"too much happened meanwhile: {error}") from None
                for version, other in others:
                    check(other)
                    base = base.after(version, other)
                continue
            if after.version % CHECKPOINT_EVERY == 0:
                self.checkpoint(after)
            return after
        raise LakeConflict(f"{self.root}: others committed {MAX_COMMIT_ATTEMPTS} times in a row")

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Write the whole state of a version. Safe to do twice: its content is fixed by the version."""
        state = {
            "format": FORMAT,
            "version": snapshot.version,
            "lake": snapshot.lake_id,
            "buckets": snapshot.buckets,
            "files": [_file_json(f) for f in snapshot.of("tail", "events", "customers", "rejected")],
            "offsets": _places_json(snapshot.offsets),
            "positions": _places_json(snapshot.positions),
            "max_recorded": snapshot.max_recorded,
        }
        temporary = self._write_beside(orjson.dumps(state))
        temporary.replace(self._directory / f"{snapshot.version:010d}.checkpoint.json")
        fsync_directory(self._directory)

    def forget_before(self, snapshot: Snapshot) -> None:
        """Remove the commits before a version; the version itself and all after it stay readable."""
        self.checkpoint(snapshot)
        entries, checkpoints = self._listing()
        for version in sorted(entries):
            if 0 < version < snapshot.version:  # the first stays: it says that a lake is here, and which
                self._entry(version).unlink(missing_ok=True)
        for version in sorted(checkpoints):
            if version < snapshot.version:
                (self._directory / f"{version:010d}.checkpoint.json").unlink(missing_ok=True)

    def versions(self) -> range:
        """The versions that can be read.

        Raises:
            LakeMissing: no lake here.
        """
        return _readable(*self._listing())

    def _read(self, version: int | None) -> Snapshot:
        entries, checkpoints = self._listing()
        versions = _readable(entries, checkpoints)
        if not versions:
            hole = next(v for v in range(max(entries), 0, -1) if v - 1 not in entries) - 1
            raise FileNotFoundError(ENOENT, "missing", self._entry(hole))
        target = versions[-1] if version is None else version
        if target not in versions:
            raise SnapshotGone(f"{self.root} has the versions {versions[0]} to {versions[-1]}, not {target}")
        start = max((v for v in checkpoints if v <= target), default=0)
        if start in checkpoints:
            snapshot = _from_checkpoint(self._json(self._directory / f"{start:010d}.checkpoint.json"))
        else:
            snapshot = _from_birth(self._json(self._entry(0)))
        for number in range(snapshot.version + 1, target + 1):
            snapshot = snapshot.after(number, _change(self._json(self._entry(number))))
        return snapshot

    def _listing(self) -> tuple[set[int], set[int]]:
        try:
            names = [path.name for path in self._directory.iterdir()]
        except FileNotFoundError:
            raise LakeMissing(f"no lake in {self.root}") from None
        entries = {int(m[1]) for m in map(_ENTRY.match, names) if m}
        if not entries:
            raise LakeMissing(f"no lake in {self.root}")
        checkpoints = {int(m[1]) for m in map(_CHECKPOINT.match, names) if m}
        return entries, checkpoints

    def _same_buckets(self, snapshot: Snapshot, buckets: int) -> Snapshot:
        if snapshot.buckets != buckets:
            raise LakeError(f"{self.root} has {snapshot.buckets} buckets, not {buckets}")
        return snapshot

    def _entry(self, version: int) -> Path:
        return self._directory / f"{version:010d}.json"

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            content = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise LakeCorrupt(f"{path}: {error}") from None
        if content.get("format") != FORMAT:
            raise LakeCorrupt(f"{path}: format {content.get('format')}, this release reads {FORMAT}")
        return dict(content)

    def _link(self, target: Path, content: bytes) -> None:
        temporary = self._write_beside(content)
        try:
            os.link(temporary, target)
        finally:
            temporary.unlink()
        fsync_directory(self._directory)

    def _write_beside(self, content: bytes) -> Path:
        temporary = self._directory / f".{uuid.uuid4().hex}.tmp"
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return temporary


def _readable(entries: set[int], checkpoints: set[int]) -> range:
    """The versions to the newest without a hole, from the first or from a checkpoint; none when there is a hole."""
    newest = max(entries)
    lowest = newest
    while lowest - 1 in entries:
        lowest -= 1
    if lowest > 0:  # older commits were vacuumed: the history begins at a checkpoint
        lowest = min((v for v in checkpoints if v >= lowest - 1), default=newest + 1)
    return range(lowest, newest + 1)


def _now() -> int:
    return time.time_ns() // 1000


def _places_json(places: Mapping[Place, int]) -> list[list[Any]]:
    return sorted([topic, partition, number] for (topic, partition), number in places.items())


def _places(rows: Iterable[list[Any]]) -> dict[Place, int]:
    return {(topic, partition): number for topic, partition, number in rows}


def _file_json(file: DataFile) -> dict[str, Any]:
    return {
        name: value for name, value in asdict(file).items() if value is not None and value is not False and value != ()
    }


def _file(content: dict[str, Any]) -> DataFile:
    ranges = tuple((t, p, first, end) for t, p, first, end in content.get("ranges", ()))
    return DataFile(**{**content, "ranges": ranges})


def _entry_json(version: int, change: Change) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": version,
        "kind": change.kind,
        "committed": _now(),
        "add": [_file_json(f) for f in change.add],
        "remove": list(change.remove),
        "offsets": _places_json(change.offsets),
        "positions": _places_json(change.positions),
    }


def _change(content: dict[str, Any]) -> Change:
    return Change(
        kind=content["kind"],
        add=tuple(_file(f) for f in content["add"]),
        remove=tuple(content["remove"]),
        offsets=_places(content["offsets"]),
        positions=_places(content["positions"]),
    )


def _from_birth(content: dict[str, Any]) -> Snapshot:
    return Snapshot(content["lake"], content["buckets"], 0, {}, {}, {}, None)


def _from_checkpoint(content: dict[str, Any]) -> Snapshot:
    files = {f.path: f for f in map(_file, content["files"])}
    return Snapshot(
        content["lake"],
        content["buckets"],
        content["version"],
        files,
        _places(content["offsets"]),
        _places(content["positions"]),
        content["max_recorded"],
    )
