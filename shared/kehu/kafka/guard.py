"""What makes handling exactly-once: the version of every stream and the offset of every partition, written with the effect.

A version that was applied is a repeat and is skipped. A version further on than the next is a hole: the stream is stopped,
never applied out of order. Progress is compared before it is set, so that a process that lost its partition and comes
back late cannot write anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kehu.commands import StaleProgress
from kehu.events import MalformedEnvelope, Recorded
from kehu.kafka.effects import Types
from kehu.postgres import Connection


class Place(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int


@dataclass(slots=True)
class Item:
    """A record on its way through a consumer: parsed, or with the reason why not.

    Args:
        poison: why it can never be handled as it is; None when it can.
    """

    place: Place
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    recorded: Recorded | None
    wanted: bool
    poison: str | None = None

    @property
    def stream(self) -> str:
        return self.recorded.stream if self.recorded is not None else ""

    @property
    def version(self) -> int | None:
        return self.recorded.version if self.recorded is not None else None


# What the tables can hold: what comes from outside must not stop a partition.
_LONGEST_STREAM, _GREATEST_VERSION = 500, 2**62


class Reader:
    """Parses records and decodes the wanted events, so that what is broken is known before anything is applied."""

    def __init__(self, types: Types) -> None:
        self._names = None if types is None else frozenset(cls.NAME for cls in types)
        self._wanted: dict[str, bool] = {}

    def item(
        self, place: Place, offset: int, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> Item:
        """One record, parsed."""
        try:
            recorded = Recorded.from_bytes(value)
        except MalformedEnvelope as error:
            return Item(place, offset, key, value, headers, None, True, describe(error))
        if len(recorded.stream) > _LONGEST_STREAM or "\0" in recorded.stream or recorded.version > _GREATEST_VERSION:
            return Item(place, offset, key, value, headers, None, True, "no store of ours has such a stream")
        if key is None or key != recorded.partition_key.encode():
            reason = "the record's key is not its partitionkey"
            return Item(place, offset, key, value, headers, recorded, True, reason)
        wanted = self._wanted.get(recorded.type)
        if wanted is None:
            wanted = self._wants(recorded.type)
        if wanted:
            try:
                _ = recorded.event
            except (LookupError, ValueError, TypeError) as error:  # unknown, does not fit, or a failing upcaster
                return Item(place, offset, key, value, headers, recorded, True, describe(error))
        return Item(place, offset, key, value, headers, recorded, wanted, None)

    def _wants(self, wire: str) -> bool:
        wanted = self._names is None or wire.rpartition(".v")[0] in self._names
        if len(self._wanted) < 1000:  # types come from outside
            self._wanted[wire] = wanted
        return wanted


# Messages of these are ours and have no data of people in them. Of other errors only the class and the place are kept.
_OURS = ("kehu.",)


def describe(error: BaseException) -> str:
    """An error for the table of parked events: what, and where, without any value of the event."""
    return _described(error).replace("\0", "").encode(errors="replace").decode()[:500]


def _described(error: BaseException) -> str:
    kind = type(error)
    errors = getattr(error, "errors", None)
    if kind.__module__.startswith("pydantic") and callable(errors):
        places = [
            f"{'.'.join(map(str, e['loc'])) or 'event'}: {e['type']}"
            for e in errors(include_input=False, include_url=False)
        ]
        return f"the data does not fit the type: {'; '.join(places[:10])}"
    diag = getattr(error, "diag", None)
    if diag is not None and getattr(error, "sqlstate", None):
        what = ", ".join(part for part in (diag.table_name, diag.column_name, diag.constraint_name) if part)
        return f"{kind.__name__} ({error.sqlstate}{' ' + what if what else ''}) at {_where(error)}"  # type: ignore[attr-defined]
    if kind.__module__.startswith(_OURS):
        return f"{kind.__name__}: {error}"
    return f"{kind.__name__} at {_where(error)}"


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "?"
    code = trace.tb_frame.f_code
    return f"{code.co_qualname}:{trace.tb_lineno}"


@dataclass(slots=True)
class Open:
    """The parked part of a stream: versions from `first` to `last` wait (0 when they are not known), `count` rows."""

    first: int
    last: int
    count: int


@dataclass(slots=True)
class Parking:
    """A record that is going to be parked."""

    item: Item
    status: str
    error: str
    attempts: int = 1


@dataclass(slots=True)
class Verdict:
    """What is to be done with a batch."""

    events: list[Recorded] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    parking: list[Parking] = field(default_factory=list)
    holes: int = 0
    passed: int = 0
    repeats: int = 0


def judge(items: Sequence[Item], versions: dict[str, int], parked: Mapping[str, Open], anywhere: bool) -> Verdict:
    """Decide for each record of a batch, in order: apply, skip, or park.

    Args:
        versions: last applied version of the streams that have one; updated.
        parked: streams that are stopped.
        anywhere: the first version seen of an unknown stream is taken as it is; else it must be 1.
    """
    verdict = Verdict()
    # The first version of each stream that is parked: only what comes before it may still be applied.
    first_parked = {stream: waiting.first for stream, waiting in parked.items()}

    def park(item: Item, status: str, error: str) -> None:
        verdict.parking.append(Parking(item, status, error))
        if item.version is not None:
            first_parked[item.stream] = min(first_parked.get(item.stream, item.version), item.version)

    for item in items:
        recorded = item.recorded
        if recorded is None:
            park(item, "waiting", item.poison or "malformed")
            continue
        stream, version = recorded.stream, recorded.version
        known = versions.get(stream, -1)
        if version <= known:
            verdict.repeats += 1
            continue
        next_one = version == known + 1 or (known < 0 and (version == 1 or anywhere))
        first = first_parked.get(stream)
        if first is not None and not (next_one and version < first):
            park(item, "behind", "an earlier event of the stream waits")
        elif item.poison is not None:
            park(item, "waiting", item.poison)
        elif not next_one:
            verdict.holes += 1
            park(item, "waiting", f"hole: expected version {max(known, 0) + 1}, got {version}")
        else:
            versions[stream] = verdict.versions[stream] = version
            if item.wanted:
                verdict.events.append(recorded)
            else:
                verdict.passed += 1
    return verdict


def presume(items: Sequence[Item], parked: Mapping[str, Open]) -> tuple[Verdict, dict[str, int]] | None:
    """The verdict on a batch in which every event is the next one of its stream, as nearly all batches are, without looking
    at the stored versions; and the first version of each stream, which `Moved` compares with what is stored.

    Returns:
        None when the batch alone shows that it is not like that.
    """
    verdict, firsts = Verdict(), {}
    lasts, events = verdict.versions, verdict.events
    for item in items:
        recorded = item.recorded
        if recorded is None or item.poison is not None:
            return None
        stream, version = recorded.stream, recorded.version
        last = lasts.get(stream)
        if last is None:
            firsts[stream] = version
        elif version != last + 1:
            return None
        lasts[stream] = version
        if item.wanted:
            events.append(recorded)
        else:
            verdict.passed += 1
    if parked and not parked.keys().isdisjoint(lasts):
        return None
    return verdict, firsts


_VERSIONS = "SELECT stream, version FROM consumer_streams WHERE consumer = %s AND stream = ANY(%b)"
# None of these is prepared: a plan made when the table was small would read all of it for ever.
# One statement for the progress of a batch. Everything in it is rolled back when a count is not what it must be.
_MOVE = """
WITH moved AS (
    UPDATE consumer_offsets o SET next_offset = n.next, moved_at = now()
    FROM unnest(%(topics)b::text[], %(partitions)b::int[], %(expected)b::bigint[], %(next)b::bigint[])
        AS n (topic, partition, expected, next)
    WHERE o.consumer = %(consumer)s AND o.topic = n.topic AND o.partition = n.partition AND o.next_offset = n.expected
    RETURNING 1
), known AS (
    INSERT INTO consumer_streams AS s (consumer, stream, version)
    SELECT %(consumer)s, * FROM unnest(%(streams)b::text[], %(lasts)b::bigint[])
    ON CONFLICT (consumer, stream) DO UPDATE SET version = EXCLUDED.version WHERE s.version < EXCLUDED.version
)
SELECT (SELECT count(*) FROM moved), 0
"""
# The same when the stored versions were not looked at: a new stream must be new, another one must be where it was presumed.
_MOVE_PRESUMED = """
WITH moved AS (
    UPDATE consumer_offsets o SET next_offset = n.next, moved_at = now()
    FROM unnest(%(topics)b::text[], %(partitions)b::int[], %(expected)b::bigint[], %(next)b::bigint[])
        AS n (topic, partition, expected, next)
    WHERE o.consumer = %(consumer)s AND o.topic = n.topic AND o.partition = n.partition AND o.next_offset = n.expected
    RETURNING 1
), begun AS (
    INSERT INTO consumer_streams (consumer, stream, version)
    SELECT %(consumer)s, * FROM unnest(%(new)b::text[], %(new_lasts)b::bigint[])
), went_on AS (
    UPDATE consumer_streams s SET version = n.last
    FROM unnest(%(streams)b::text[], %(before)b::bigint[], %(lasts)b::bigint[]) AS n (stream, before, last)
    WHERE s.consumer = %(consumer)s AND s.stream = n.stream AND s.version = n.before
    RETURNING 1
)
SELECT (SELECT count(*) FROM moved), (SELECT count(*) FROM went_on)
"""
# A replay of a topic brings the same versions again: they are parked once.
_PARK = """
INSERT INTO parked_events (consumer, stream, version, topic, partition, "offset", key, value, headers, status, error, attempts)
SELECT %(consumer)s, %(stream)s, %(version)s, %(topic)s, %(partition)s, %(offset)s, %(key)s, %(value)s, %(headers)s::jsonb,
       %(status)s, %(error)s, %(attempts)s
WHERE NOT EXISTS (
    SELECT FROM parked_events p WHERE p.consumer = %(consumer)s AND p.stream = %(stream)s AND p.version = %(version)s
    AND p.status IN ('waiting', 'behind'))
ON CONFLICT (consumer, topic, partition, "offset") DO UPDATE SET
    stream = EXCLUDED.stream, version = EXCLUDED.version, key = EXCLUDED.key, value = EXCLUDED.value,
    headers = EXCLUDED.headers, status = EXCLUDED.status, error = EXCLUDED.error, attempts = EXCLUDED.attempts,
    first_failed_at = now(), parked_at = now(), resolved_at = NULL, request = NULL
WHERE parked_events.status IN ('resolved', 'dropped')
"""


def known_versions(connection: Connection, consumer: str, streams: Sequence[str]) -> dict[str, int]:
    """The last applied version of those streams that have one."""
    return dict(connection.execute(_VERSIONS, (consumer, streams), prepare=False, binary=True).fetchall())


def open_streams(connection: Connection, consumer: str, places: Sequence[Place]) -> dict[str, Open]:
    """The stopped streams of these partitions."""
    rows = connection.execute(
        "SELECT stream, coalesce(min(version), 0), coalesce(max(version), 0), count(*) FROM parked_events p"
        " JOIN unnest(%s::text[], %s::int[]) AS owned (topic, partition) USING (topic, partition)"
        " WHERE consumer = %s AND stream <> '' AND status IN ('waiting', 'behind') GROUP BY stream",
        ([p.topic for p in places], [p.partition for p in places], consumer),
    ).fetchall()
    return {stream: Open(first, last, count) for stream, first, last, count in rows}


class Presumed(Exception):
    """The stored versions are not those that were presumed: look at them."""


@dataclass(slots=True)
class Moved:
    """The progress of a batch, written by the effect in its transaction.

    Args:
        offsets: for each partition the offset that is stored now and the one to store.
        firsts: when the stored versions were not looked at (`presume`), the first version of each stream in the batch.
    """

    consumer: str
    offsets: Mapping[Place, tuple[int, int]]
    verdict: Verdict
    firsts: Mapping[str, int] | None = None

    def write(self, connection: Connection) -> None:
        """Raises StaleProgress when the stored offsets are others: another process handles these partitions. Raises Presumed,
        or a unique violation of `consumer_streams`, when the versions are not those that were presumed."""
        places, versions, firsts = sorted(self.offsets), self.verdict.versions, self.firsts
        known = sorted(versions if firsts is None else [stream for stream, first in firsts.items() if first > 1])
        parameters: dict[str, Any] = {
            "consumer": self.consumer,
            "topics": [p.topic for p in places],
            "partitions": [p.partition for p in places],
            "expected": [self.offsets[p][0] for p in places],
            "next": [self.offsets[p][1] for p in places],
            "streams": known,
            "lasts": [versions[s] for s in known],
        }
        if firsts is not None:
            new = sorted(stream for stream, first in firsts.items() if first == 1)
            parameters.update(new=new, new_lasts=[versions[s] for s in new], before=[firsts[s] - 1 for s in known])
        statement = _MOVE if firsts is None else _MOVE_PRESUMED
        moved, went_on = connection.execute(statement, parameters, prepare=False).fetchone() or (0, 0)
        if moved != len(places):
            raise StaleProgress(f"{self.consumer}: another process has moved on")
        if firsts is not None and went_on != len(known):
            raise Presumed(self.consumer)
        if self.verdict.parking:
            with connection.cursor() as cursor:
                cursor.executemany(_PARK, [self._row(parking) for parking in self.verdict.parking])

    def _row(self, parking: Parking) -> dict[str, Any]:
        item = parking.item
        return {
            "consumer": self.consumer,
            "stream": item.stream,
            "version": item.version,
            "topic": item.place.topic,
            "partition": item.place.partition,
            "offset": item.offset,
            "key": item.key,
            "value": item.value,
            "headers": json.dumps([[name.replace("\0", ""), _text(value)] for name, value in item.headers]),
            "status": parking.status,
            "error": parking.error,
            "attempts": parking.attempts,
        }


def _text(value: bytes | None) -> Any:
    """A header's value in JSON: text where it is text, else base64 in an object."""
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    return {"base64": base64.b64encode(value).decode()} if "\0" in text else text


def header_bytes(value: Any) -> bytes | None:
    """The value of a header as it was, from the JSON of a parked event."""
    if value is None:
        return None
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else str(value).encode()
