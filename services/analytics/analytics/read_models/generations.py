"""Which generation of each read model is live, and how a rebuilt one takes its place without a gap.

A batch of the live consumer reads the registry's row FOR SHARE in its transaction; a switch takes the same row FOR UPDATE. So
while a switch looks, no batch is under way, and the first batch after it sees that another generation is live.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

import psycopg
from psycopg import sql

from analytics.read_models import READ_MODELS, GenerationalModel, consumer_of, table_of
from kehu.commands import Progress
from kehu.events import Event, Recorded
from kehu.kafka.consumer import SubscriptionStopped
from kehu.kafka.guard import Place
from kehu.kafka.topics import group_of
from kehu.postgres import Connection, Pool

log = logging.getLogger(__name__)

SERVICE = "analytics"
# How long readers and the live consumer may keep a switch or a removal waiting, in seconds; then it is tried again.
_LOCK_SECONDS = 3
_TRIES = 20
_ROWS_AT_ONCE = 50_000


class UnknownProjection(LookupError):
    """There is no read model of that name."""


class Superseded(SubscriptionStopped):
    """Another generation of the read model is live: the consumer goes on as that one."""


class NotReady(RuntimeError):
    """A generation cannot be made live."""


@dataclass(frozen=True, slots=True)
class Live:
    """The live generation of a read model."""

    name: str
    version: int
    generation: int
    switched_at: datetime


def progress_name(name: str, generation: int) -> str:
    """The consumer in the database and the group in Kafka of a generation, e.g. `crm.analytics.lead_journey_g2`."""
    return group_of(SERVICE, consumer_of(name, generation))


def model_class(name: str) -> type[GenerationalModel]:
    """The read model of a name. Raises UnknownProjection."""
    try:
        return READ_MODELS[name]
    except KeyError:
        raise UnknownProjection(f"{name!r} is not a read model; there are {', '.join(sorted(READ_MODELS))}") from None


def live(connection: Connection, name: str) -> Live:
    """The live generation of a read model."""
    row = connection.execute(
        "SELECT name, version, generation, switched_at FROM projections WHERE name = %s", (name,)
    ).fetchone()
    if row is None:
        raise UnknownProjection(f"{name!r} is not in the registry: run the migrations")
    return Live(*row)


def live_model(connection: Connection, name: str, timezone: ZoneInfo) -> GenerationalModel:
    """The live generation of a read model, to write into.

    Raises:
        NotReady: the live one is of another version than this release writes: rebuild it.
    """
    cls, current = model_class(name), live(connection, name)
    if current.version != cls.version:
        raise NotReady(
            f"{name} is live in version {current.version} and this release writes {cls.version}: run kehu replay --projection {name}"
        )
    return cls(current.generation, timezone)


class KeepLive:
    """The effect of a live consumer: writes its generation, as long as that is the live one."""

    def __init__(self, pool: Pool, model: GenerationalModel) -> None:
        self.pool, self.model = pool, model

    @property
    def types(self) -> tuple[type[Event], ...] | None:
        return self.model.types

    def __call__(self, events: Sequence[Recorded], progress: Progress) -> None:
        """Raises Superseded, and nothing was done, when another generation is live."""
        with self.pool.connection() as connection, connection.transaction():
            row = connection.execute(
                "SELECT version, generation FROM projections WHERE name = %s FOR SHARE", (self.model.name,)
            ).fetchone()
            if row != (self.model.version, self.model.generation):
                raise Superseded(f"{self.model.name}: generation {self.model.generation} is not live any more")
            if events:
                self.model.apply(connection, events)
            progress.write(connection)


class Build:
    """The effect of a rebuild: writes a generation that nobody reads yet."""

    def __init__(self, pool: Pool, model: GenerationalModel) -> None:
        self.pool, self.model = pool, model

    @property
    def types(self) -> tuple[type[Event], ...] | None:
        return self.model.types

    def __call__(self, events: Sequence[Recorded], progress: Progress) -> None:
        with self.pool.connection() as connection, connection.transaction():
            if events:
                self.model.apply(connection, events)
            progress.write(connection)


def begin(connection: Connection, name: str, timezone: ZoneInfo, fresh: bool = False) -> GenerationalModel:
    """The generation to build: the one that an interrupted rebuild left, else a new one with empty tables.

    Args:
        fresh: throw away what an interrupted rebuild left.
    """
    cls = model_class(name)
    with connection.transaction():
        live(connection, name)
        left = connection.execute(
            "SELECT version, generation FROM projection_builds WHERE name = %s AND state = 'building' FOR UPDATE",
            (name,),
        ).fetchall()
        for version, generation in left:
            if version == cls.version and not fresh:
                return cls(generation, timezone)
            connection.execute(
                "UPDATE projection_builds SET state = 'retired' WHERE name = %s AND generation = %s", (name, generation)
            )
        row = connection.execute("SELECT max(generation) FROM projection_builds WHERE name = %s", (name,)).fetchone()
        assert row is not None
        model = cls(row[0] + 1, timezone)
        for base in model.tables:
            shape = _newest_table(connection, base, model.version)
            connection.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(model.table(base), shape))
        connection.execute(
            "INSERT INTO projection_builds (name, version, generation, state) VALUES (%s, %s, %s, 'building')",
            (name, model.version, model.generation),
        )
    return model


def _newest_table(connection: Connection, base: str, version: int) -> sql.Identifier:
    """A table of that version to take the shape from: columns, keys and indexes are declared once, in the migration."""
    prefix = f"{base}_v{version}_g"
    names = connection.execute(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND starts_with(tablename, %s)", (prefix,)
    )
    generations = [int(table.removeprefix(prefix)) for (table,) in names if table.removeprefix(prefix).isdigit()]
    if not generations:
        raise NotReady(f"no migration has made {prefix}1")
    return table_of(base, version, max(generations))


def places(connection: Connection, consumer: str) -> dict[Place, int]:
    """The stored offsets of a consumer."""
    rows = connection.execute(
        "SELECT topic, partition, next_offset FROM consumer_offsets WHERE consumer = %s", (consumer,)
    )
    return {Place(topic, partition): offset for topic, partition, offset in rows}


def switch(
    connection: Connection, model: GenerationalModel, deadline: float = 10.0, accept_parked: bool = False
) -> Live:
    """Make a generation live, when it has everything that the live one has; its builder goes on meanwhile and catches up.

    Args:
        connection: of its own; the builder uses others.
        deadline: seconds for which the live consumer may be held while the builder catches up.
        accept_parked: also when more events are parked than in the live generation.

    Returns:
        The generation that was live before.

    Raises:
        NotReady: the builder did not catch up in time, or has parked events; nothing was changed.
        psycopg.errors.LockNotAvailable: readers or the live consumer took too long; try again.
    """
    consumer = progress_name(model.name, model.generation)
    with connection.transaction():
        connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{_LOCK_SECONDS}s")))
        connection.execute("SELECT FROM projections WHERE name = %s FOR UPDATE", (model.name,))
        before = live(connection, model.name)
        target = places(connection, progress_name(before.name, before.generation))
        until = time.monotonic() + deadline
        while behind := [
            place for place, offset in target.items() if places(connection, consumer).get(place, 0) < offset
        ]:
            if time.monotonic() > until:
                raise NotReady(
                    f"{model.name}: generation {model.generation} is still behind in {len(behind)} partitions"
                )
            time.sleep(0.01)
        if not accept_parked:
            _refuse_parked(connection, consumer, progress_name(before.name, before.generation))
        connection.execute(
            "UPDATE projections SET version = %s, generation = %s, switched_at = now() WHERE name = %s",
            (model.version, model.generation, model.name),
        )
        for base in model.tables:
            view = sql.Identifier(f"{base}_v{model.version}")
            connection.execute(sql.SQL("CREATE OR REPLACE VIEW {} AS SELECT * FROM {}").format(view, model.table(base)))
        connection.execute(
            "UPDATE projection_builds SET state = CASE WHEN generation = %(new)s THEN 'live' ELSE 'retired' END,"
            " finished_at = coalesce(finished_at, now()) WHERE name = %(name)s AND generation IN (%(new)s, %(old)s)",
            {"name": model.name, "new": model.generation, "old": before.generation},
        )
    log.info("switched", extra={"projection": model.name, "generation": model.generation, "before": before.generation})
    return before


def _refuse_parked(connection: Connection, new: str, old: str) -> None:
    counts: dict[str, int] = dict(
        connection.execute(
            "SELECT consumer, count(*) FROM parked_events WHERE consumer = ANY(%b) AND status IN ('waiting', 'behind') GROUP BY 1",
            ([new, old],),
        ).fetchall()
    )
    if counts.get(new, 0) > counts.get(old, 0):
        raise NotReady(
            f"{counts[new]} events are parked in the new generation: look at them (kehu parked ls --service analytics)"
        )


def remove_retired(connection: Connection, name: str, other_versions: bool) -> list[int]:
    """Drop the generations that are not live any more, with their progress, and give their numbers.

    Readers that still use an old table are waited for, within limits; what remains is dropped by the next call.

    Args:
        other_versions: also those of a version that is not live any more, with the views that processes of the release
            before may still read.
    """
    removed = []
    current = live(connection, name)
    for version, generation in connection.execute(
        "SELECT version, generation FROM projection_builds WHERE name = %s AND state = 'retired' ORDER BY generation",
        (name,),
    ).fetchall():
        if version != current.version and not other_versions:
            continue
        consumer = progress_name(name, generation)
        for base in model_class(name).tables:
            if version != current.version:
                view = sql.Identifier(f"{base}_v{version}")
                _patiently(connection, sql.SQL("DROP VIEW IF EXISTS {}").format(view))
            table = table_of(base, version, generation)
            _patiently(connection, sql.SQL("DROP TABLE IF EXISTS {}").format(table))
        for statement in (
            "DELETE FROM consumer_streams WHERE ctid = ANY(ARRAY(SELECT ctid FROM consumer_streams WHERE consumer = %s LIMIT %s))",
            "DELETE FROM parked_events WHERE ctid = ANY(ARRAY(SELECT ctid FROM parked_events WHERE consumer = %s LIMIT %s))",
            "DELETE FROM consumer_offsets WHERE ctid = ANY(ARRAY(SELECT ctid FROM consumer_offsets WHERE consumer = %s LIMIT %s))",
        ):
            while connection.execute(statement, (consumer, _ROWS_AT_ONCE)).rowcount == _ROWS_AT_ONCE:
                log.debug("removing the progress of a retired generation", extra={"consumer": consumer})
        connection.execute("DELETE FROM projection_builds WHERE name = %s AND generation = %s", (name, generation))
        removed.append(generation)
    return removed


def _patiently(connection: Connection, statement: sql.Composed) -> None:
    """Drop something when its last reader is gone, without keeping new readers of other things waiting for long."""
    for left in range(_TRIES - 1, -1, -1):
        try:
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{_LOCK_SECONDS}s")))
                connection.execute(statement)
            return
        except psycopg.errors.LockNotAvailable:
            if not left:
                raise
            log.info("readers still use a retired table")


def checksum(connection: Connection, model: GenerationalModel) -> dict[str, tuple[int, int]]:
    """For each table of a generation the number of rows, and a sum over them that does not depend on their order."""
    sums = {}
    for base in model.tables:
        row = connection.execute(
            sql.SQL("SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)), 0) FROM {} t").format(
                model.table(base)
            )
        ).fetchone()
        assert row is not None
        sums[base] = (row[0], int(row[1]))
    return sums
