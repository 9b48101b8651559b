"""Faust on a short lead: the settings, the seek and the guard without which it loses or repeats events.

The database is the memory, Faust only carries: an agent takes records in batches, and one transaction holds the effect,
the offsets and the versions of the streams. What Faust believes to have committed is never asked: at every assignment the
consumer goes to the offsets in the database. So a kill, a rebalance, or one of Faust's own errors can make it read a record
again, which is then a repeat, but never count it twice or leave it out.

::

    app = create_app("crm.analytics.live_counters", bootstrap, guard.take_over)
    @app.agent(source(app, topics), concurrency=1)
    async def live_counters(stream):
        await guard.work(stream)
    await StreamWorker(app, guard, bootstrap, topics).run()

This module and the `streams` package of a service are the only importers of faust.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import faust
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from kehu.commands import StaleProgress
from kehu.kafka import metrics
from kehu.kafka.effects import Effect
from kehu.kafka.guard import Item, Moved, Open, Place, Reader, describe, judge, known_versions, open_streams
from kehu.kafka.replay import Replay
from kehu.kafka.topics import PARTITIONS, KafkaError, Topic, TopicMismatch, partition_count
from kehu.postgres import TRANSIENT, Pool

log = logging.getLogger(__name__)

# The process ends with this code when a batch can neither be applied nor parked: nothing of it was acknowledged.
EXIT_UNHANDLED = 70
# What goes away by itself.
_WAIT_FOR = (*TRANSIENT, ConnectionError, TimeoutError)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0

T = TypeVar("T")
TakeOver = Callable[[Iterable[Place]], Mapping[Place, int]]


# The application -------------------------------------------------------------------------------------------------------


class _Consumer(driver.Consumer):
    """Goes to the offsets of the database instead of those that Faust committed."""

    app: App

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Called at the end of every rebalance; what it gives is where Faust thinks that it stands."""
        await super().seek_to_committed()
        places = {Place(tp.topic, tp.partition): tp for tp in self.assignment()}
        stored = await asyncio.to_thread(self.app.take_over, list(places))
        positions = {places[place]: offset for place, offset in stored.items()}
        await self._thread.seek_wait(positions)
        log.info("partitions taken over", extra={"consumer": self.app.conf.id, "partitions": len(positions)})
        return positions

    async def wait_first(self, *coros: Any, timeout: Any = None) -> Any:  # noqa: ASYNC109 - Faust's signature
        """Faust makes four tasks for each record to notice, while it hands the record over, that the flow was suspended.

        When no queue is full the hand-over cannot block, so it is simply awaited: half of the CPU time of a record.
        """
        if len(coros) == 2 and timeout is None and not self.suspend_flow.is_set() and self.app.has_room():
            delivery, suspended = coros
            suspended.close()
            await delivery
            return None
        return await super().wait_first(*coros, timeout=timeout)


class _Transport(driver.Transport):
    Consumer = _Consumer


class App(faust.App):
    """A Faust application whose offsets are in the database. Made by `create_app`."""

    take_over: TakeOver

    def has_room(self) -> bool:
        """Whether every queue between Kafka and the agents has room."""
        return not any(channel.queue.full() for channel in self.topics)

    def _new_transport(self) -> _Transport:
        return _Transport(self.conf.broker_consumer, self)


def create_app(name: str, bootstrap: str, take_over: TakeOver, datadir: str | None = None) -> App:
    """A Faust application with the settings that its measured faults ask for. Call it inside the running loop.

    Args:
        name: id of the application: the Kafka group, and the prefix of changelogs.
        bootstrap: addresses of Kafka brokers, `host:port`, divided by commas.
        take_over: gives the next offset of each partition that was assigned; called in a thread. See `Guard.take_over`.
        datadir: where stores of tables would lie.
    """
    app = App(
        name,
        broker=[f"kafka://{address}" for address in bootstrap.split(",")],
        # exactly_once double-counts after a crash and dies without tables; concurrency above 1 commits past unfinished events.
        processing_guarantee="at_least_once",
        # A killed worker's partitions go to another after this time, not after the default minute.
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        broker_rebalance_timeout=20.0,
        broker_request_timeout=30.0,
        # A broker that has just come back may not know its topics yet; a group leader that asks then gives nobody anything
        # until it looks again, by default after five minutes.
        consumer_metadata_max_age_ms=5_000,
        broker_commit_interval=1.0,
        broker_commit_every=1000,
        consumer_auto_offset_reset="earliest",
        stream_wait_empty=False,  # what was under way at a rebalance is a repeat later; waiting for it can hang
        stream_buffer_maxsize=16_384,
        topic_disable_leader=True,
        topic_allow_declare=False,  # topics are made before the start, or we do not start
        producer_acks=-1,
        store="memory://",
        table_standby_replicas=0,
        web_enabled=False,  # Faust's own pages would show table data on all interfaces
        web_tables_enabled=False,
        key_serializer="raw",
        value_serializer="raw",
        datadir=datadir or str(Path(tempfile.gettempdir()) / "kehu-streams"),
    )
    app.take_over = take_over
    return app


def source(app: App, topics: Sequence[str]) -> Any:
    """The topics an agent reads: bytes in, our own decoding after that."""
    return app.topic(*topics, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


def changelogs(app_name: str, tables: Iterable[str]) -> list[Topic]:
    """The changelog topics of an application's tables, to be made together with its other topics before the first start.

    Faust would make them itself, and then skip every event until it notices that they are there.
    """
    return [Topic(f"{app_name}-{table}-changelog", PARTITIONS, compacted=True) for table in tables]


async def require_topics(bootstrap: str, topics: Iterable[Topic | str]) -> None:
    """Check that all topics are there, with their partitions.

    Raises:
        TopicMismatch: one is missing or has another number of partitions.
    """
    for topic in (Topic(t) if isinstance(t, str) else t for t in topics):
        count = await partition_count(bootstrap, topic.name)
        if count != topic.partitions:
            raise TopicMismatch(f"{topic.name} has {count} partitions and must have {topic.partitions}")


# The guard -------------------------------------------------------------------------------------------------------------


class Skipped(RuntimeError):
    """Faust left out records that are in the topic. The process ends and reads them at its next start."""


class Guard:
    """Stands between Faust and an effect, so that each record takes effect exactly once and no exception leaves the agent.

    Errors of the database are waited out. An event that fails is found by halving the batch, tried again, and parked with the
    later ones of its stream. When not even that is possible the process ends before anything is acknowledged.

    Args:
        pool: connections to the service's database; two are enough.
        consumer: name under which progress is kept; also the Kafka group.
        effect: what is done, together with the progress, in one transaction.
        reader: how records are parsed; None decodes the events that the effect wants.
        batch: the most records in one transaction, 1 to 10 000.
        within: seconds to wait for a batch to fill.
        retries: how often a failing event is tried again before it is parked.
        park_limit: the most events that may be parked: beyond it not the events are broken but the effect.
    """

    def __init__(
        self,
        pool: Pool,
        consumer: str,
        effect: Effect,
        reader: Reader | None = None,
        *,
        batch: int = 500,
        within: float = 0.2,
        retries: int = 3,
        park_limit: int = 10_000,
    ) -> None:
        if not 1 <= batch <= 10_000:
            raise ValueError("batch must be 1 to 10 000")
        self.pool, self.consumer, self.effect = pool, consumer, effect
        self.reader = reader or Reader(effect.types)
        self.batch, self.within, self.retries, self.park_limit = batch, within, retries, park_limit
        # Next offset of each partition that is ours, as stored.
        self.positions: dict[Place, int] = {}
        self._open: dict[str, Open] = {}
        # Partitions of which nothing was read since the seek: their first record may lie beyond a gap of the log itself.
        self._sought: set[Place] = set()
        self._turn = asyncio.Lock()
        # A rebalance takes over partitions between two attempts, never within one.
        self._lock = threading.Lock()
        # A batch failed and waits to be tried again.
        self.blocked = False

    def take_over(self, places: Iterable[Place]) -> dict[Place, int]:
        """The stored offsets of these partitions, 0 for new ones. Called in a thread at every assignment.

        Raises:
            psycopg.OperationalError: the database did not answer; the worker ends and is started again.
        """
        wanted = sorted(places)
        with self._lock:
            self.positions, self._sought = self._read_positions(wanted), set(wanted)
            return dict(self.positions)

    def stored(self) -> dict[Place, int]:
        """The stored offsets of all partitions, whoever owns them."""
        with self.pool.connection() as connection:
            rows = connection.execute(
                "SELECT topic, partition, next_offset FROM consumer_offsets WHERE consumer = %s", (self.consumer,)
            ).fetchall()
        return {Place(topic, partition): offset for topic, partition, offset in rows}

    def _read_positions(self, places: Sequence[Place]) -> dict[Place, int]:
        columns = [p.topic for p in places], [p.partition for p in places]
        with self.pool.connection() as connection, connection.transaction():
            connection.execute(
                "INSERT INTO consumer_offsets (consumer, topic, partition, next_offset)"
                " SELECT %s, topic, partition, 0 FROM unnest(%s::text[], %s::int[]) AS owned (topic, partition)"
                " ON CONFLICT DO NOTHING",
                (self.consumer, *columns),
            )
            rows = connection.execute(
                "SELECT topic, partition, next_offset FROM consumer_offsets"
                " JOIN unnest(%s::text[], %s::int[]) AS owned (topic, partition) USING (topic, partition) WHERE consumer = %s",
                (*columns, self.consumer),
            ).fetchall()
            self._open = open_streams(connection, self.consumer, places)
        return {Place(topic, partition): offset for topic, partition, offset in rows}

    async def work(self, stream: Any) -> None:
        """The body of an agent: takes batches until the stream ends. Nothing is acknowledged before it is committed.

        An acknowledgement makes Faust commit to Kafka, and only tools that show lag look at that.
        """
        async for events in stream.noack_take(self.batch, within=self.within):
            await self.handle([event.message for event in events])
            for event in events:
                await stream.ack(event)

    async def handle(self, records: Sequence[Any]) -> None:
        """Commit these records, however long it takes; ends the process when that is impossible.

        Args:
            records: in the order of their offsets; with topic, partition, offset, key, value, headers.
        """
        await self._patiently(lambda: self.attempt(records))

    async def serve(self) -> None:
        """Carry out what people asked for parked events of our partitions."""
        await self._patiently(self._serve)

    async def _patiently(self, work: Callable[[], None]) -> None:
        pause = _FIRST_PAUSE
        async with self._turn:
            while True:
                try:
                    await _in_thread(work)
                except StaleProgress as error:
                    log.warning(
                        "progress was moved by another process", extra={"consumer": self.consumer, "error": str(error)}
                    )
                except _WAIT_FOR as error:
                    log.warning(
                        "trying again", extra={"consumer": self.consumer, "error": describe(error), "pause": pause}
                    )
                    metrics.CONSUMER_RETRIES.labels(self.consumer, type(error).__name__).inc()
                except Exception as error:  # nothing may leave the agent: Faust would acknowledge and go on
                    log.critical(
                        "a batch can neither be applied nor parked", exc_info=error, extra={"consumer": self.consumer}
                    )
                    give_up(EXIT_UNHANDLED)
                else:
                    self.blocked = False
                    return
                self.blocked = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def attempt(self, records: Sequence[Any]) -> None:
        """In a thread: apply the records that are not committed yet.

        Raises:
            Skipped: records between the stored offset and these are missing.
            StaleProgress: another process moved on meanwhile; the next attempt sees its offsets.
        """
        with self._lock:
            items = self._fresh(records)
            if items:
                self._guarded(lambda: self._apply(items))
                self._sought.difference_update(item.place for item in items)

    def _fresh(self, records: Sequence[Any]) -> list[Item]:
        """Those that are not committed yet, parsed."""
        items = []
        expected = dict(self.positions)
        for record in records:
            place = Place(record.topic, record.partition)
            position = expected.get(place)
            if position is None or record.offset < position:
                continue  # committed before, or of a partition that was taken away: whoever has it now reads it
            if record.offset > position and not (place in self._sought and position == self.positions[place]):
                raise Skipped(f"{place.topic}/{place.partition}: expected offset {position}, got {record.offset}")
            expected[place] = record.offset + 1
            items.append(self.reader.item(place, record.offset, record.key, record.value, _headers(record.headers)))
        return items

    def _serve(self) -> None:
        with self._lock:
            if not self.positions:
                return
            replay = Replay(self.pool, self.consumer, self.effect, self.reader, anywhere=False)
            if self._guarded(lambda: replay.turn(self.positions)):
                with self.pool.connection() as connection:
                    self._open = open_streams(connection, self.consumer, sorted(self.positions))

    def _guarded(self, work: Callable[[], T]) -> T:
        """Read the stored offsets anew when another process has moved them."""
        try:
            return work()
        except StaleProgress:
            self.positions.update(self._read_positions(sorted(self.positions)))
            raise

    def _apply(self, items: Sequence[Item]) -> None:
        """Apply items in one transaction. When the effect fails, in halves, until the failing event is alone."""
        for left in range(self.retries, -1, -1):
            try:
                return self._commit(items, self.retries - left + 1)
            except (StaleProgress, TooManyParked, *_WAIT_FOR):
                raise
            except Exception as error:  # any error of an effect: it is found, tried again and parked, never passed over
                metrics.CONSUMER_RETRIES.labels(self.consumer, type(error).__name__).inc()
                if len(items) > 1:
                    middle = len(items) // 2
                    self._apply(items[:middle])
                    return self._apply(items[middle:])
                if not left:
                    items[0].poison = describe(error)
                time.sleep(0.05)
        return self._commit(items, self.retries + 1)

    def _commit(self, items: Sequence[Item], attempts: int) -> None:
        streams = sorted({item.stream for item in items if item.stream})
        with self.pool.connection() as connection:
            versions = known_versions(connection, self.consumer, streams)
        verdict = judge(items, versions, self._open, anywhere=False)
        if sum(o.count for o in self._open.values()) + len(verdict.parking) > self.park_limit:
            raise TooManyParked(f"{self.consumer}: more than {self.park_limit} events would be parked")
        for parking in verdict.parking:
            parking.attempts = attempts
        ends = {item.place: item.offset + 1 for item in items}
        progress = Moved(self.consumer, {place: (self.positions[place], end) for place, end in ends.items()}, verdict)
        self.effect(verdict.events, progress)
        self.positions.update(ends)
        for parking in verdict.parking:
            item, version = parking.item, parking.item.version or 0
            known = self._open.get(item.stream) or Open(version, version, 0)
            self._open[item.stream] = Open(min(known.first, version), max(known.last, version), known.count + 1)
            log.error(
                "parked",
                extra={
                    "consumer": self.consumer,
                    "stream": item.stream,
                    "version": item.version,
                    "topic": item.place.topic,
                    "partition": item.place.partition,
                    "offset": item.offset,
                    "error": parking.error,
                },
            )
        metrics.CONSUMER_BATCHES.labels(self.consumer).inc()
        metrics.CONSUMER_HOLES.labels(self.consumer).inc(verdict.holes)
        for outcome, count in (
            ("applied", len(verdict.events)),
            ("repeat", verdict.repeats),
            ("parked", len(verdict.parking)),
        ):
            if count:
                metrics.CONSUMER_EVENTS.labels(self.consumer, outcome).inc(count)


class TooManyParked(RuntimeError):
    """Not the events are broken but the effect: a person must look."""


async def _in_thread(work: Callable[[], None]) -> None:
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])  # a transaction under way is finished, and nothing else begins meanwhile
        raise


def give_up(code: int) -> NoReturn:
    """End the process at once, before Faust can acknowledge anything."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _headers(given: Any) -> list[tuple[str, bytes]]:
    if not given:
        return []
    return list(given.items()) if isinstance(given, Mapping) else list(given)


# The worker ------------------------------------------------------------------------------------------------------------


class Stalled(RuntimeError):
    """There are records to read and nothing was committed for too long."""


class Crashed(RuntimeError):
    """Faust stopped by itself."""


class StreamWorker:
    """Runs an application inside the running loop, and notices when it only looks alive.

    Args:
        ends: gives the end of each partition, independent of Faust's own connections.
        topics: that are read, and changelogs: without them the worker refuses to start.
        stall_seconds: with records to read and no commit for this long, the process ends and is started again.
    """

    def __init__(
        self,
        app: App,
        guard: Guard,
        bootstrap: str,
        topics: Sequence[Topic | str],
        ends: Callable[[], Awaitable[Mapping[Place, int]]],
        *,
        stall_seconds: float = 60.0,
        look_seconds: float = 5.0,
    ) -> None:
        self.app, self.guard, self.bootstrap, self.topics, self.ends = app, guard, bootstrap, tuple(topics), ends
        self.stall_seconds, self.look_seconds = stall_seconds, look_seconds
        self._stopping = asyncio.Event()
        self._positions: Mapping[Place, int] = {}
        self._still_since = time.monotonic()

    async def run(self) -> None:
        """Work until `stop` or cancellation.

        Raises:
            TopicMismatch: a topic is missing, or holds less than was read from it; nothing was started.
            Crashed, Stalled: start the process again.
        """
        await require_topics(self.bootstrap, self.topics)
        await self._refuse_other_log()
        self.app.finalize()
        try:
            await self.app.maybe_start()
            await self._watch()
        finally:
            await self._end()

    async def _refuse_other_log(self) -> None:
        """A topic that ends before our place is not the one that we read: it was made anew, or lost its end."""
        stored = await asyncio.to_thread(self.guard.stored)
        ends = await self.ends()
        for place, position in stored.items():
            if position > ends.get(place, 0):
                raise TopicMismatch(
                    f"{place.topic}/{place.partition} ends at {ends.get(place, 0)}, but {self.guard.consumer} has read up to"
                    f" {position}: this is another log. Restore the topic, or begin anew: delete this consumer's rows"
                )

    async def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()

    async def check(self) -> None:
        """For /readyz: raises when the worker is not consuming."""
        if self.app.crashed or not self.guard.positions:
            raise Crashed("no partitions")
        if self.guard.blocked:
            raise Stalled("a batch waits to be tried again")

    async def _watch(self) -> None:
        look_at = time.monotonic() + self.look_seconds
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1.0)
            if self.app.crashed:
                raise Crashed(f"Faust stopped: {self.app.crash_reason!r}")
            await self.guard.serve()
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + self.look_seconds
                await self._look()

    async def _look(self) -> None:
        """Whether there is something to read and nothing is read."""
        try:
            ends = await asyncio.wait_for(self.ends(), 10.0)
            positions = dict(self.guard.positions)
            if (
                not positions
            ):  # without a partition of our own we watch that somebody reads them, even if nobody ever did
                positions = dict.fromkeys(ends, 0) | await asyncio.to_thread(self.guard.stored)
        except (KafkaError, *_WAIT_FOR) as error:
            log.warning("the lag is not known", extra={"consumer": self.guard.consumer, "error": type(error).__name__})
            self._still_since = time.monotonic()  # Kafka or the database is away: that is not a stall of ours
            return
        lags = {place: max(0, ends.get(place, 0) - position) for place, position in positions.items()}
        for place, lag in lags.items():
            metrics.CONSUMER_LAG.labels(self.guard.consumer, place.topic, place.partition).set(lag)
        behind = sum(lags.values())
        if not behind or self.guard.blocked or positions != self._positions:
            self._positions, self._still_since = positions, time.monotonic()
        elif (still := time.monotonic() - self._still_since) > self.stall_seconds:
            raise Stalled(f"{self.guard.consumer}: {behind} records to read and nothing committed for {still:.0f} s")

    async def _end(self) -> None:
        try:
            await asyncio.wait_for(self.app.stop(), 15.0)
        except (TimeoutError, KafkaError, OSError) as error:
            log.warning("Faust did not stop in order", extra={"error": repr(error)})
