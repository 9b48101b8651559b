"""From Kafka to an effect, exactly once: offsets and stream versions are written in the effect's transaction.

Kafka's own committed offsets are only for tools that show lag. What cannot be handled is parked by stream: later events of
the stream wait behind it, in order, and all other streams go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from kehu.commands import StaleProgress
from kehu.kafka import metrics
from kehu.kafka.effects import Effect
from kehu.kafka.guard import (
    Item,
    Moved,
    Open,
    Parking,
    Place,
    Reader,
    Verdict,
    describe,
    judge,
    known_versions,
    open_streams,
    presume,
)
from kehu.kafka.parts import together
from kehu.kafka.replay import Replay
from kehu.kafka.topics import group_of, partition_count, topic_of
from kehu.observability import spans
from kehu.postgres import TRANSIENT, Connection, Pool

log = logging.getLogger(__name__)
T = TypeVar("T")

# What goes away by itself: the database restarts, the key service (a ConnectionError) does not answer.
_WAIT_FOR = (*TRANSIENT, ConnectionError, TimeoutError)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_REGULAR = 10


class SubscriptionStopped(RuntimeError):
    """An event could not be handled and the subscription stops instead of parking, or too much is parked already."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """What is consumed, by whom, and what happens on failure.

    Args:
        name: stable name; with the service's it is the Kafka group and the name of the consumer in the database.
        services: whose events are consumed.
        effect: what is done with them.
        retries: how often an event that fails is tried again before it is parked. Errors of the database, of the network
            and of the key service do not count: they are waited out, for as long as they last.
        on_failure: `park` the stream, or `stop` the process, for effects in which no event may ever be missing.
        start: where a new subscription begins. `beginning`: at the first event, and the first version of each stream must
            be 1. `anywhere`: at the oldest event that is kept, and a stream may begin with any version. `end`: at the
            newest event, else like `anywhere`.
        batch: the most events in one transaction, 1 to 10 000.
        park_limit: the most events that may be parked at once; beyond that the subscription stops, because then not the
            events are broken but the effect.
        reader: how records are parsed; None decodes the events that the effect wants.
    """

    name: str
    services: tuple[str, ...]
    effect: Effect
    retries: int = 3
    on_failure: Literal["park", "stop"] = "park"
    start: Literal["beginning", "anywhere", "end"] = "beginning"
    batch: int = 500
    park_limit: int = 10_000
    reader: Reader | None = None

    def __post_init__(self) -> None:
        if not self.services or not 1 <= self.batch <= 10_000 or self.retries < 0 or self.park_limit < 1:
            raise ValueError(
                f"subscription {self.name}: services, batch 1 to 10 000, retries from 0, park_limit from 1"
            )


@dataclass(frozen=True, slots=True)
class _Suspect:
    """The event that failed last; on the next attempt it is tried alone."""

    place: Place
    offset: int
    attempts: int


class _TryAgain(Exception):
    """An event failed and has attempts left."""


@dataclass(slots=True)
class _Batch:
    """What was fetched and parsed, on its way to be applied.

    Args:
        assignment: number of the assignment under which it was fetched; under another one it is thrown away.
        oldest: when the oldest of its records was written, in seconds.
        fetched: when it was fetched, on the monotonic clock.
    """

    assignment: int
    items: list[Item]
    oldest: float
    fetched: float


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells the runner of rebalances. aiokafka swallows errors of these calls, so nothing here can fail."""

    def __init__(self, runner: ConsumerRunner) -> None:
        self._runner = runner

    async def on_partitions_revoked(self, revoked: Any) -> None:
        await self._runner.give_up()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._runner.was_assigned({Place(tp.topic, tp.partition) for tp in assigned})


class ConsumerRunner:
    """Runs one subscription. Several processes may run the same one: Kafka divides the partitions among them.

    Args:
        pool: connections to the service's database; two are enough.
        service: whose subscription it is.
        member: name of this process for Kafka (static membership), when it is stable over restarts.
        session_seconds: after this time without a sign of life Kafka gives the partitions to others; also the longest time
            that a batch may take, waiting for transient errors not counted.
        topics: instead of the topics of `subscription.services`.
        security: connection arguments of aiokafka (`security_protocol`, `ssl_context`, `sasl_...`).
    """

    def __init__(
        self,
        pool: Pool,
        bootstrap: str,
        service: str,
        subscription: Subscription,
        *,
        member: str | None = None,
        session_seconds: float = 12.0,
        topics: Sequence[str] | None = None,
        security: Mapping[str, Any] | None = None,
    ) -> None:
        self.pool, self.bootstrap, self.subscription = pool, bootstrap, subscription
        self.consumer = group_of(service, subscription.name)
        self.topics = tuple(topics) if topics is not None else tuple(map(topic_of, subscription.services))
        self.member, self.session_seconds, self.security = member, session_seconds, dict(security or {})
        self._reader = subscription.reader or Reader(subscription.effect.types)
        self._anywhere = subscription.start != "beginning"
        self._replay = Replay(pool, self.consumer, subscription.effect, self._reader, self._anywhere)
        # One thread parses the next batch while the other waits for the database.
        self._executor = ThreadPoolExecutor(2, thread_name_prefix=f"consumer-{subscription.name}")
        self._kafka: Any = None
        # Next offset of each partition that is ours, as stored. Empty while a rebalance goes on.
        self.positions: dict[Place, int] = {}
        self._open: dict[str, Open] = {}
        self._parked = 0
        self._assigned: set[Place] = set()
        self._assignment = 0
        self._take_over = False
        self._leaving = asyncio.Event()
        self._fetched: asyncio.Queue[_Batch] = asyncio.Queue(maxsize=1)
        self._running = asyncio.Lock()
        self._suspect: _Suspect | None = None
        # Batches since one had repeats, holes or failures; after enough of them the next is presumed to have none.
        self._regular = _REGULAR
        self._serve_at = 0.0
        self._oldest: float | None = None
        metrics.CONSUMER_OLDEST.labels(self.consumer).set_function(self._oldest_age)

    async def run(self) -> None:
        """Consume until cancelled; a batch under way is finished first. Broker and database may go away for any time.

        Raises:
            SubscriptionStopped: by its own rule; a person must act.
            TopicMismatch: a topic does not exist.
        """
        pause = _FIRST_PAUSE
        try:
            while True:
                started = time.monotonic()
                try:
                    await self._consume()
                except (KafkaError, OSError) as error:
                    log.warning(
                        "the consumer begins anew", extra={"consumer": self.consumer, "error": repr(error)[:300]}
                    )
                    metrics.CONSUMER_RETRIES.labels(self.consumer, type(error).__name__).inc()
                pause = _FIRST_PAUSE if time.monotonic() - started > 30 else min(pause * 2, _LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 jitter
        finally:
            self._executor.shutdown(wait=False)

    async def _consume(self) -> None:
        for topic in self.topics:
            await partition_count(self.bootstrap, topic, self.security)
        session = int(self.session_seconds * 1000)
        self._kafka = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap,
            group_id=self.consumer,
            group_instance_id=self.member,
            client_id=self.consumer,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=session,
            heartbeat_interval_ms=session // 4,
            max_poll_interval_ms=session,
            rebalance_timeout_ms=session,
            max_partition_fetch_bytes=4 << 20,
            # A broker that has just come back may not know its topics yet; a group leader that asks then gives nobody
            # anything until it looks again, by default after five minutes.
            metadata_max_age_ms=5_000,
            **self.security,
        )
        try:
            await self._kafka.start()
            self._kafka.subscribe(list(self.topics), listener=_Listener(self))
            await together(self._fetch(), self._handle(), self._commit_for_tools())
        finally:
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                async with asyncio.timeout(5.0):
                    await self._commit()
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                async with asyncio.timeout(10.0):
                    await self._kafka.stop()
            self._forget()

    async def _fetch(self) -> None:
        """Fetch and parse batches, one ahead of the one that is being applied."""
        while True:
            if self._take_over:
                await self._begin()
                continue
            fetched = await self._kafka.getmany(timeout_ms=250, max_records=self.subscription.batch)
            assignment = self._assignment
            if self._take_over or not self.positions or not fetched:
                continue  # nothing, or fetched before we went to the stored offsets
            parsing = asyncio.get_running_loop().run_in_executor(self._executor, self._parse, fetched)
            oldest = min(records[0].timestamp for records in fetched.values()) / 1000
            await self._fetched.put(_Batch(assignment, await parsing, oldest, time.perf_counter()))

    def _parse(self, fetched: Mapping[Any, Sequence[Any]]) -> list[Item]:
        read = self._reader.item
        items: list[Item] = []
        for tp, records in fetched.items():
            place = Place(tp.topic, tp.partition)
            items += [read(place, r.offset, r.key, r.value, r.headers) for r in records]
        return items

    async def _handle(self) -> None:
        """Apply what was fetched, and serve what people asked for."""
        while True:
            batch: _Batch | None = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._serve_at - time.monotonic())):
                    batch = await self._fetched.get()
            async with self._running:
                if batch is not None and batch.assignment == self._assignment and self.positions:
                    await self._work_off(batch)
                if time.monotonic() >= self._serve_at:
                    self._serve_at = time.monotonic() + 1.0
                    if self.positions and not self._leaving.is_set():
                        await self._patiently(self._serve)

    # Partitions come and go ------------------------------------------------------------------------------------------

    def was_assigned(self, places: set[Place]) -> None:
        """These partitions are ours now; their offsets are read before the next fetch."""
        self._assigned = places
        self._leaving.clear()
        self._take_over = True

    async def give_up(self) -> None:
        """The partitions are being taken away: finish the running batch (an attempt that waits to be repeated is dropped)
        and forget everything about them."""
        self._leaving.set()
        async with self._running:
            self._forget()

    def _forget(self) -> None:
        for place in self.positions:
            with contextlib.suppress(KeyError):  # who has the partition now tells its lag
                metrics.CONSUMER_LAG.remove(self.consumer, *place)
        self._assignment += 1  # what was fetched before is thrown away
        self.positions = {}
        self._open = {}
        self._suspect = None
        self._oldest = None
        self._take_over = False

    async def _begin(self) -> None:
        """Go to the stored offsets of the partitions that were assigned."""
        places = set(self._assigned)
        try:
            edges = await self._edges(places)
            stored = await self._patiently(lambda: self._stored(edges))
            if stored is None or places != self._assigned or self._leaving.is_set():
                return
            for place, offset in stored.items():
                self._kafka.seek(TopicPartition(*place), offset)
        except IllegalStateError:
            return  # they were taken away while we looked; a new assignment follows
        self.positions = stored
        self._take_over = False
        log.info("partitions taken over", extra={"consumer": self.consumer, "partitions": len(stored)})

    async def _edges(self, places: set[Place]) -> dict[Place, tuple[int, int]]:
        """For each partition where a subscription without a stored offset begins, and where the partition ends."""
        partitions = [TopicPartition(*place) for place in places]
        if not partitions:
            return {}
        end = await self._kafka.end_offsets(partitions)
        begin = end if self.subscription.start == "end" else await self._kafka.beginning_offsets(partitions)
        return {Place(tp.topic, tp.partition): (begin[tp], end[tp]) for tp in partitions}

    def _stored(self, edges: Mapping[Place, tuple[int, int]]) -> dict[Place, int]:
        """The stored offsets. A new partition's is stored now, so that it begins in the same place after a crash."""
        places = sorted(edges)
        with self.pool.connection() as connection:
            arrays = [p.topic for p in places], [p.partition for p in places]
            connection.execute(
                "INSERT INTO consumer_offsets (consumer, topic, partition, next_offset)"
                " SELECT %s, * FROM unnest(%s::text[], %s::int[], %s::bigint[]) ON CONFLICT DO NOTHING",
                (self.consumer, *arrays, [edges[p][0] for p in places]),
            )
            rows = connection.execute(
                "SELECT topic, partition, next_offset FROM consumer_offsets"
                " JOIN unnest(%s::text[], %s::int[]) AS owned (topic, partition) USING (topic, partition) WHERE consumer = %s",
                (*arrays, self.consumer),
            ).fetchall()
            self._look_at_parked(connection, places)
        for topic, partition, offset in rows:
            if offset > edges[Place(topic, partition)][1]:
                raise SubscriptionStopped(
                    f"{self.consumer} has handled {topic}/{partition} up to offset {offset}, and the partition ends at"
                    f" {edges[Place(topic, partition)][1]}: the topic was made anew, or Kafka lost events. Rebuild what this"
                    " consumer keeps: empty it, and delete its rows in consumer_offsets and consumer_streams"
                )
        return {Place(topic, partition): offset for topic, partition, offset in rows}

    # A batch ---------------------------------------------------------------------------------------------------------

    async def _work_off(self, batch: _Batch) -> None:
        """Apply a batch, however often it takes, until all of it is committed or the partitions are taken away."""
        self._oldest = batch.oldest
        await self._patiently(lambda: self._attempt(batch.items))
        if batch.assignment == self._assignment:
            self._oldest = None
        metrics.CONSUMER_SECONDS.labels(self.consumer).observe(time.perf_counter() - batch.fetched)

    async def _patiently(self, work: Callable[[], T]) -> T | None:
        """Do `work` in the thread until it succeeds, waiting longer after each failure. None when the partitions were taken
        away meanwhile, or another process has moved on: then they are read anew."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._in_thread(work)
            except StaleProgress as error:
                log.warning(
                    "progress was moved by another process", extra={"consumer": self.consumer, "error": str(error)}
                )
                self._forget()
                self._take_over = not self._leaving.is_set()
                return None
            except (_TryAgain, *_WAIT_FOR) as error:
                cause = error.__cause__ if isinstance(error, _TryAgain) else error
                metrics.CONSUMER_RETRIES.labels(self.consumer, type(cause).__name__).inc()
                log.warning(
                    "trying again", extra={"consumer": self.consumer, "error": describe(cause or error), "pause": pause}
                )
            if not await self._pause(pause):
                return None
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])  # a transaction under way is finished, not cut off
            raise

    async def _pause(self, seconds: float) -> bool:
        """Wait with jitter, and poll with all partitions paused, so that Kafka sees us alive. False when partitions go."""
        metrics.CONSUMER_BLOCKED.labels(self.consumer).set(1)
        try:
            end = time.monotonic() + seconds * random.uniform(0.5, 1.0)  # noqa: S311 jitter
            while (left := end - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(min(left, self.session_seconds / 4)):
                        await self._leaving.wait()
                    return False
                except TimeoutError:
                    await self._sign_of_life()
            return not self._leaving.is_set()
        finally:
            metrics.CONSUMER_BLOCKED.labels(self.consumer).set(0)

    async def _sign_of_life(self) -> None:
        assigned = self._kafka.assignment()
        with contextlib.suppress(TimeoutError, IllegalStateError):
            self._kafka.pause(*assigned)
            try:
                # In a rebalance this waits for its end, and the rebalance waits for us: hence the limit.
                async with asyncio.timeout(0.05):
                    await self._kafka.getmany(timeout_ms=0)
            finally:
                self._kafka.resume(*(self._kafka.assignment() & assigned))

    def _attempt(self, items: Sequence[Item]) -> None:
        """In a thread: apply what is not committed yet, the event that failed last on its own first."""
        positions = self.positions
        items = [item for item in items if item.offset >= positions.get(item.place, item.offset + 1)]
        if not items:
            return
        suspect = self._suspect
        if suspect is not None and (items[0].place, items[0].offset) == (suspect.place, suspect.offset):
            self._apply(items[:1])
            items = items[1:]
        self._suspect = None
        if items:
            self._apply(items)

    def _apply(self, items: Sequence[Item]) -> None:
        """Apply items in one transaction. When the effect fails, in halves, until the failing event is alone."""
        try:
            self._commit_batch(items)
        except (StaleProgress, SubscriptionStopped, *_WAIT_FOR):
            raise
        except Exception as error:  # any error of an effect: it is found, tried again and parked, never passed over
            self._regular = 0
            if len(items) > 1:
                middle = len(items) // 2
                self._apply(items[:middle])
                self._apply(items[middle:])
                return
            self._failed(items[0], error)

    def _failed(self, item: Item, error: Exception) -> None:
        suspect = self._suspect
        attempts = (
            suspect.attempts + 1 if suspect and (suspect.place, suspect.offset) == (item.place, item.offset) else 1
        )
        if attempts <= self.subscription.retries:
            self._suspect = _Suspect(item.place, item.offset, attempts)
            raise _TryAgain from error
        self._suspect = None
        item.poison = describe(error)
        log.error(
            "an event could not be handled",
            extra={"consumer": self.consumer, "stream": item.stream, "version": item.version, "error": item.poison},
        )
        self._commit_batch([item], attempts)

    def _commit_batch(self, items: Sequence[Item], attempts: int = 1) -> None:
        ends = {item.place: item.offset + 1 for item in items}
        offsets = {place: (self.positions[place], end) for place, end in ends.items()}
        verdict = self._presumed(items, offsets) if self._regular >= _REGULAR and not self._anywhere else None
        if verdict is None:
            verdict = self._judged(items, offsets, attempts)
            self._regular = 0 if verdict.parking or verdict.repeats else self._regular + 1
        self.positions.update(ends)
        for parking in verdict.parking:
            self._now_parked(parking)
        self._count(verdict)

    def _presumed(self, items: Sequence[Item], offsets: Mapping[Place, tuple[int, int]]) -> Verdict | None:
        """The short way, when the last batches were regular: the versions are compared while they are written. None when it is
        not the way for this batch; nothing was done then."""
        presumed = presume(items, self._open)
        if presumed is None:
            return None
        verdict, firsts = presumed
        try:
            self._effect(verdict, Moved(self.consumer, offsets, verdict, firsts))
        except (StaleProgress, SubscriptionStopped, *_WAIT_FOR):
            raise
        except Exception as error:  # a repeat, a hole, or an error of the effect, which comes again on the long way
            log.debug("not a regular batch", extra={"consumer": self.consumer, "error": type(error).__name__})
            return None
        return verdict

    def _judged(self, items: Sequence[Item], offsets: Mapping[Place, tuple[int, int]], attempts: int) -> Verdict:
        """The long way: each event is compared with the stored version of its stream before anything is done."""
        streams = sorted({item.recorded.stream for item in items if item.recorded is not None})
        with self.pool.connection() as connection:
            versions = known_versions(connection, self.consumer, streams)
        verdict = judge(items, versions, self._open, self._anywhere)
        for parking in verdict.parking:
            parking.attempts = attempts
        self._may_park(verdict.parking)
        self._effect(verdict, Moved(self.consumer, offsets, verdict))
        return verdict

    def _effect(self, verdict: Verdict, progress: Moved) -> None:
        traces = (event.traceparent for event in verdict.events)
        with spans(f"consume {self.subscription.name}", traces, events=len(verdict.events)):
            self.subscription.effect(verdict.events, progress)

    def _count(self, verdict: Verdict) -> None:
        metrics.CONSUMER_BATCHES.labels(self.consumer).inc()
        metrics.CONSUMER_HOLES.labels(self.consumer).inc(verdict.holes)
        counts = {
            "applied": len(verdict.events),
            "passed over": verdict.passed,
            "repeat": verdict.repeats,
            "parked": sum(p.status == "waiting" for p in verdict.parking),
            "behind": sum(p.status == "behind" for p in verdict.parking),
        }
        for outcome, count in counts.items():
            if count:
                metrics.CONSUMER_EVENTS.labels(self.consumer, outcome).inc(count)

    def _may_park(self, parking: Sequence[Parking]) -> None:
        """Raises SubscriptionStopped when these records may not be parked."""
        if not parking:
            return
        if self.subscription.on_failure == "stop":
            first = parking[0]
            raise SubscriptionStopped(
                f"{self.consumer} stops at {first.item.place.topic}/{first.item.place.partition} offset {first.item.offset},"
                f" {first.item.stream or 'unreadable'}@{first.item.version}: {first.error}"
            )
        if self._parked + len(parking) > self.subscription.park_limit:
            raise SubscriptionStopped(
                f"{self.consumer} stops: {self._parked} events are parked and the limit is {self.subscription.park_limit}. The newest"
                f" error: {parking[0].error}. Repair the effect, then replay (kehu parked replay)"
            )

    def _now_parked(self, parking: Parking) -> None:
        item, version = parking.item, parking.item.version or 0
        self._parked += 1
        metrics.CONSUMER_PARKED.labels(self.consumer, parking.status).inc()
        if parking.status == "waiting":
            log.error(
                "parked",
                extra={
                    "consumer": self.consumer,
                    "stream": item.stream,
                    "version": item.version,
                    "partition": item.place.partition,
                    "offset": item.offset,
                    "error": parking.error,
                },
            )
        if item.stream:
            known = self._open.get(item.stream) or Open(version, version, 0)
            self._open[item.stream] = Open(min(known.first, version), max(known.last, version), known.count + 1)

    # Parked events ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Do what is due for parked events of our partitions, and count what is parked."""
        self._replay.turn(self.positions)
        with self.pool.connection() as connection:
            self._look_at_parked(connection, sorted(self.positions))

    def _look_at_parked(self, connection: Connection, places: Sequence[Place]) -> None:
        self._open = open_streams(connection, self.consumer, places)
        counts: dict[str, int] = dict(
            connection.execute(
                "SELECT status, count(*) FROM parked_events WHERE consumer = %s AND status IN ('waiting', 'behind')"
                " GROUP BY status",
                (self.consumer,),
            ).fetchall()
        )
        self._parked = sum(counts.values())
        for status in ("waiting", "behind"):
            metrics.CONSUMER_PARKED.labels(self.consumer, status).set(counts.get(status, 0))

    # For people and tools --------------------------------------------------------------------------------------------

    def _oldest_age(self) -> float:
        return max(0.0, time.time() - self._oldest) if self._oldest is not None else 0.0

    async def _commit_for_tools(self) -> None:
        """Tell Kafka our offsets once a second, and Prometheus how far behind they are, also while a batch waits to be tried
        again. Failing does no harm, since nobody acts on either but people and tools."""
        told: dict[Place, int] = {}
        while True:
            await asyncio.sleep(1.0)
            positions = dict(self.positions)
            try:
                async with asyncio.timeout(10.0):
                    if positions:
                        await self._show(positions)
                    if positions != told:
                        told = positions
                        await self._commit()
            except (KafkaError, OSError) as error:
                log.debug("offsets were not told", extra={"consumer": self.consumer, "error": repr(error)})

    async def _show(self, positions: Mapping[Place, int]) -> None:
        ends = await self._kafka.end_offsets([TopicPartition(*place) for place in positions])
        for place, position in self.positions.items():
            end = ends.get(TopicPartition(*place), position)
            metrics.CONSUMER_LAG.labels(self.consumer, *place).set(max(0, end - position))

    async def _commit(self) -> None:
        assigned = self._kafka.assignment()
        offsets = {TopicPartition(*place): offset for place, offset in self.positions.items()}
        offsets = {tp: offset for tp, offset in offsets.items() if tp in assigned}
        if offsets:
            await self._kafka.commit(offsets)
