"""How far every reader of the topics has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from analytics.read_models.generations import progress_name
from kehu.kafka.guard import Place
from kehu.postgres import Connection


@dataclass(frozen=True, slots=True)
class Reader:
    """One reader.

    Args:
        lag: events before it; None when the ends of the topics are not known.
    """

    name: str
    version: int | None
    generation: int | None
    state: str
    consumer: str
    done: int
    lag: int | None
    parked: int
    moved_at: datetime | None
    switched_at: datetime | None


def readers(connection: Connection, ends: Mapping[Place, int] | None, others: Mapping[str, str]) -> list[Reader]:
    """The generations of all read models, then the `others`.

    Args:
        ends: end of each partition of the topics.
        others: consumers that have no generations, by name.
    """
    offsets: dict[str, dict[Place, int]] = {}
    moved: dict[str, datetime] = {}
    for consumer, topic, partition, offset, at in connection.execute(
        "SELECT consumer, topic, partition, next_offset, moved_at FROM consumer_offsets"
    ):
        offsets.setdefault(consumer, {})[Place(topic, partition)] = offset
        moved[consumer] = max(at, moved.get(consumer, at))
    parked: dict[str, int] = dict(
        connection.execute(
            "SELECT consumer, count(*) FROM parked_events WHERE status IN ('waiting', 'behind') GROUP BY consumer"
        ).fetchall()
    )
    builds = connection.execute(
        "SELECT b.name, b.version, b.generation, b.state, p.switched_at FROM projection_builds b"
        " LEFT JOIN projections p ON (p.name, p.generation) = (b.name, b.generation) ORDER BY b.name, b.generation"
    ).fetchall()
    rows = [
        (name, version, generation, state, progress_name(name, generation), at)
        for name, version, generation, state, at in builds
    ]
    rows += [(name, None, None, "live", consumer, None) for name, consumer in others.items()]
    return [
        Reader(
            name,
            version,
            generation,
            state,
            consumer,
            sum(offsets.get(consumer, {}).values()),
            lag(offsets.get(consumer, {}), ends),
            parked.get(consumer, 0),
            moved.get(consumer),
            switched_at,
        )
        for name, version, generation, state, consumer, switched_at in rows
    ]


def lag(offsets: Mapping[Place, int], ends: Mapping[Place, int] | None) -> int | None:
    """Events between these offsets and the ends."""
    return None if ends is None else sum(max(0, end - offsets.get(place, 0)) for place, end in ends.items())
