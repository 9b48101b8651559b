"""Trying parked events again, in order, by the consumer that owns their partition and with the same effect.

Nobody else changes a consumer's streams: people ask by a row (see `parked`), the owner carries it out. Every step carries
the progress of the partition unchanged, so that a process that lost the partition cannot interfere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kehu.commands import StaleProgress
from kehu.kafka.effects import Effect
from kehu.kafka.guard import Item, Moved, Place, Reader, Verdict, describe, header_bytes, judge, known_versions
from kehu.postgres import TRANSIENT, Connection, Pool

log = logging.getLogger(__name__)

_REQUESTS = """
SELECT id, stream, version, topic, partition, request FROM parked_events
WHERE consumer = %s AND request IS NOT NULL AND status IN ('waiting', 'behind') ORDER BY id LIMIT %s
"""
# Streams that can go on: their first parked event did not fail itself, and it is the next one.
_FILLED = """
SELECT h.stream, h.topic, h.partition FROM (
    SELECT DISTINCT ON (stream) stream, version, topic, partition, status, error FROM parked_events
    WHERE consumer = %(consumer)s AND stream <> '' AND status IN ('waiting', 'behind') ORDER BY stream, version, id
) h LEFT JOIN consumer_streams s ON s.consumer = %(consumer)s AND s.stream = h.stream
WHERE (h.status = 'behind' OR h.error LIKE 'hole:%%') AND h.version <= coalesce(s.version, 0) + 1 LIMIT %(most)s
"""
_FIRST = """
SELECT id FROM parked_events WHERE consumer = %s AND stream = %s AND status IN ('waiting', 'behind')
ORDER BY version, id LIMIT 1
"""
_RECORD = 'SELECT id, topic, partition, "offset", key, value, headers FROM parked_events WHERE id = %s'
_STREAM = """
SELECT id, topic, partition, "offset", key, value, headers FROM parked_events
WHERE consumer = %s AND stream = %s AND status IN ('waiting', 'behind') ORDER BY version, id LIMIT %s
"""
# What became of parked events is kept for a while, for people who ask.
_FORGET = """
DELETE FROM parked_events
WHERE consumer = %s AND status IN ('resolved', 'dropped') AND resolved_at < now() - interval '90 days'
"""
# Requests carried out in one turn, and parked events tried in one transaction.
_TURN, _BATCH = 50, 500


@dataclass(frozen=True, slots=True)
class Asked:
    """A parked event for which something was asked."""

    id: int
    stream: str
    version: int | None
    place: Place
    request: str


@dataclass(slots=True)
class _Resolved:
    """The progress of a replay: the partition's offset as it is, the versions, and the rows that are done."""

    moved: Moved
    ids: Sequence[int]

    def write(self, connection: Connection) -> None:
        self.moved.write(connection)
        connection.execute(
            "UPDATE parked_events SET status = 'resolved', resolved_at = now(), request = NULL WHERE id = ANY(%s)",
            (list(self.ids),),
        )


class Replay:
    """Carries out what was asked for the parked events of one consumer.

    Args:
        anywhere: a stream may begin with any version.
    """

    def __init__(self, pool: Pool, consumer: str, effect: Effect, reader: Reader, anywhere: bool) -> None:
        self.pool, self.consumer, self.effect, self.reader, self.anywhere = pool, consumer, effect, reader, anywhere
        self._forget_at = 0.0

    def turn(self, positions: Mapping[Place, int]) -> int:
        """Do what is due for the partitions that are ours, and give the number of things done: requests of people, and
        streams whose missing version came."""
        with self.pool.connection() as connection:
            rows = connection.execute(_REQUESTS, (self.consumer, _TURN)).fetchall()
            filled = connection.execute(_FILLED, {"consumer": self.consumer, "most": _TURN}).fetchall()
        asked = [Asked(i, s, v, Place(t, p), r) for i, s, v, t, p, r in rows if Place(t, p) in positions]
        for one in asked:
            self._carry_out(one, positions)
        healed = [
            (stream, Place(topic, partition))
            for stream, topic, partition in filled
            if Place(topic, partition) in positions
        ]
        for stream, place in healed:
            self._resume(stream, place, positions)
        if time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + 3600
            with self.pool.connection() as connection:
                connection.execute(_FORGET, (self.consumer,))
        return len(asked) + len(healed)

    def _carry_out(self, asked: Asked, positions: Mapping[Place, int]) -> None:
        log.info(
            "parked event %s: %s", asked.id, asked.request, extra={"consumer": self.consumer, "stream": asked.stream}
        )
        stream = asked.stream
        if asked.request == "replay" and not stream:
            stream = self._identify(asked)
        if asked.request == "drop":
            self._settle(asked, positions, asked.version)
        elif asked.request == "accept_hole" and asked.version is not None:
            self._settle(asked, positions, asked.version - 1)
        if stream:
            self._resume(stream, asked.place, positions)
        with self.pool.connection() as connection:
            connection.execute("UPDATE parked_events SET request = NULL WHERE id = %s", (asked.id,))

    def _identify(self, asked: Asked) -> str:
        """Read a record again that could not be read: a newer release may be able to. Gives its stream, else nothing."""
        with self.pool.connection() as connection:
            (item,) = self._items(connection.execute(_RECORD, (asked.id,)).fetchall())
            if item.recorded is None:
                connection.execute(
                    "UPDATE parked_events SET attempts = attempts + 1, error = %s WHERE id = %s",
                    (item.poison, asked.id),
                )
                return ""
            connection.execute(
                "UPDATE parked_events SET stream = %s, version = %s WHERE id = %s",
                (item.stream, item.version, asked.id),
            )
        return item.stream

    def _settle(self, asked: Asked, positions: Mapping[Place, int], version: int | None) -> None:
        """Move the stream's version without an effect, if the event is the first that waits in its stream."""
        versions = {asked.stream: version} if asked.stream and version is not None else {}
        with self.pool.connection() as connection, connection.transaction():
            first = connection.execute(_FIRST, (self.consumer, asked.stream)).fetchone()
            if asked.stream and (first is None or first[0] != asked.id):
                log.warning(
                    "parked event %s is not the first of its stream", asked.id, extra={"consumer": self.consumer}
                )
                return
            self._fence(asked.place, positions, versions).write(connection)
            if asked.request == "drop":
                connection.execute(
                    "UPDATE parked_events SET status = 'dropped', resolved_at = now() WHERE id = %s", (asked.id,)
                )

    def _resume(self, stream: str, place: Place, positions: Mapping[Place, int]) -> None:
        """Handle what is parked of a stream, in order, until it is empty or one fails; that one then waits."""
        limit = _BATCH
        while True:
            with self.pool.connection() as connection:
                rows = connection.execute(_STREAM, (self.consumer, stream, limit)).fetchall()
                versions = known_versions(connection, self.consumer, [stream])
            if not rows:
                return
            items = self._items(rows)
            verdict = judge(items, versions, {}, self.anywhere)
            left = {id(parking.item) for parking in verdict.parking}
            done = [row[0] for row, item in zip(rows, items, strict=True) if id(item) not in left]
            if not done:
                self._still_waits(rows[0][0], verdict.parking[0].error)
                return
            progress = _Resolved(self._fence(place, positions, verdict.versions), done)
            try:
                self.effect(verdict.events, progress)
            except (StaleProgress, ConnectionError, TimeoutError, *TRANSIENT):
                raise
            except Exception as error:  # of the effect: the one that fails is found and waits on, with its new error
                if limit > 1:
                    limit = 1
                    continue
                self._still_waits(rows[0][0], describe(error))
                return

    def _fence(self, place: Place, positions: Mapping[Place, int], versions: Mapping[str, int]) -> Moved:
        position = positions.get(place)
        if position is None:
            raise StaleProgress(f"{self.consumer}: {place} was taken away")
        return Moved(self.consumer, {place: (position, position)}, Verdict(versions=dict(versions)))

    def _still_waits(self, row: int, error: str) -> None:
        log.error("parked event %s failed again", row, extra={"consumer": self.consumer, "error": error})
        with self.pool.connection() as connection:
            connection.execute(
                "UPDATE parked_events SET status = 'waiting', attempts = attempts + 1, error = %s, request = NULL WHERE id = %s",
                (error, row),
            )

    def _items(self, rows: Sequence[tuple[Any, ...]]) -> list[Item]:
        return [
            self.reader.item(
                Place(topic, partition), offset, key, value, [(name, header_bytes(v) or b"") for name, v in headers]
            )
            for _, topic, partition, offset, key, value, headers in rows
        ]
