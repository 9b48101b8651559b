"""From the store to Kafka: the event log is the outbox, and one relay per service publishes it in order.

What holds: every event reaches the topic, the events of a key in order and without a hole. A crash repeats nothing that
had landed, because a new leader reads the end of every partition and goes on behind it. Only records that a dead or
paused leader's socket delivers later still can be repeats; they have the same id and version, and consumers drop them.

The producer is idempotent and not transactional: aiokafka speaks the transaction protocol of 2017, and transaction
markers break the commits of Faust.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.codec import has_lz4
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    ProducerClosed,
    RecordListTooLargeError,
    UnsupportedForMessageFormatError,
)

from kehu.clock import Clock, SystemClock
from kehu.events import MalformedEnvelope, Recorded
from kehu.events.envelope import CONTENT_TYPE
from kehu.eventstore import Cursor, EventStore, LogRow
from kehu.follower import Listener
from kehu.kafka import metrics
from kehu.kafka.lease import Lease, LeaseLost
from kehu.kafka.parts import together
from kehu.kafka.topics import MAX_MESSAGE_BYTES, partition_count, partition_of
from kehu.observability import spans, tracing
from kehu.postgres import TRANSIENT, Pool

log = logging.getLogger(__name__)

# Bytes that a batch may hold before compression; Kafka takes 1 MiB by default.
BATCH_BYTES = 900_000
# What a record costs in a batch beyond key, value and header values, in bytes.
RECORD_OVERHEAD = 200
_KEY = b'"partitionkey":"'
# The broker's answers that mean the records themselves: sending them again cannot help.
_REFUSALS = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    InvalidTimestampError,
    PolicyViolationError,
    UnsupportedForMessageFormatError,
)


class Unsendable(Exception):
    """An event that Kafka will never take. The relay stops in front of it: skipping it would leave a hole for ever."""


class ForkDetected(Exception):
    """Kafka holds events that the store does not know: the store was set back. The report says which."""


@dataclass(slots=True)
class Round:
    """What is sent together: for each partition its batches in order, and where the log was read to."""

    last: Cursor
    batches: dict[int, list[Any]] = field(default_factory=dict)
    events: int = 0
    skipped: int = 0
    rows: int = 0
    size: int = 0
    unsendable: Unsendable | None = None
    traces: list[str | None] = field(default_factory=list)


def key_of(state: bytes) -> bytes:
    """The Kafka key of a stored envelope, without parsing all of it.

    A quoted name followed by a colon cannot be inside a JSON string, where its quotes are escaped, and attributes
    come before the data, so that the first find is the attribute.
    """
    start = state.find(_KEY)
    if start >= 0:
        start += len(_KEY)
        key = state[start : state.index(b'"', start)]
        if b"\\" not in key:
            return key
    return Recorded.from_bytes(state).partition_key.encode()


def default_holder() -> str:
    """A name for this process: host, process id and a random part."""
    return f"{socket.gethostname()[:40]}:{os.getpid()}:{os.urandom(3).hex()}"


class Relay:
    """Publishes the events of one store to one topic while it holds the lease; else it stands by.

    Args:
        pool: connections to the service's database; two are enough. Must not go through a pooler that shares sessions by
            transaction, because the lease is tied to a session.
        holder: name of this process, unique; see `default_holder`.
        poll: seconds between looks at the log without a wake-up.
        round_events: the most events in one round, up to 10 000. Half of the rounds of a bulk load have less, because
            rounds are cut to about 8 MB.
        lease_seconds: how long a paused leader is waited for.
        send_seconds: after this time without an acknowledgement the producer is discarded.
        compression: `lz4`, `zstd`, `snappy`, `gzip` or None; by default lz4 when its library is installed.
        security: connection arguments of aiokafka (`security_protocol`, `ssl_context`, `sasl_...`).
        clock: only to tell the age of unsent events.
    """

    def __init__(
        self,
        pool: Pool,
        store: EventStore,
        bootstrap: str,
        topic: str,
        holder: str | None = None,
        *,
        poll: float = 0.05,
        round_events: int = 4000,
        lease_seconds: float = 5.0,
        send_seconds: float = 30.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        compression: str | None = "auto",
        security: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not 1 <= round_events <= 10_000:
            raise ValueError("round_events must be 1 to 10 000")
        self.pool, self.store, self.bootstrap, self.topic = pool, store, bootstrap, topic
        self.holder = holder or default_holder()
        self.poll, self.round_events, self.lease_seconds, self.send_seconds = (
            poll,
            round_events,
            lease_seconds,
            send_seconds,
        )
        self.max_message_bytes = max_message_bytes
        self.compression = ("lz4" if has_lz4() else None) if compression == "auto" else compression
        self.security = dict(security or {})
        self.clock = clock or SystemClock()
        self.name = f"relay:{topic}"
        self._url = str(pool.conninfo)
        # Where Kafka has acknowledged everything to; None while standing by.
        self.acknowledged: Cursor | None = None
        self._partitions = 0
        # Per partition, what Kafka already has: events up to there are not sent again.
        self._landed: dict[int, Cursor] = {}
        self._headers: tuple[tuple[str, bytes], ...] = ()
        self._limit = 500
        self._wait = 0.1

    async def run(self) -> None:
        """Publish, or stand by, until cancelled. Broker and database may go away for any time.

        Raises:
            LeaseLost: this process was paused past its lease; end it and start a new one.
            Unsendable: the next event cannot be published; a person must act.
            ForkDetected: Kafka has events that the store lost; a person must act.
            TopicMismatch: the topic does not exist.
        """
        while True:
            try:
                lease = Lease(self._url, self.name, self.holder, self.lease_seconds)
                async with lease:
                    await self._lead(lease)
            except (LeaseLost, Unsendable, ForkDetected) as error:
                log.critical("the relay stops", extra={"topic": self.topic, "reason": str(error)})
                raise
            except (*TRANSIENT, KafkaError, TimeoutError, OSError) as error:
                metrics.RELAY_RESTARTS.labels(self.topic, type(error).__name__).inc()
                log.warning(
                    "the relay begins anew",
                    extra={"topic": self.topic, "error": f"{type(error).__name__}: {error}"[:300]},
                )
            await asyncio.sleep(self._wait * random.uniform(0.5, 1.0))  # noqa: S311 jitter
            self._wait = min(self._wait * 2, 2.0)

    async def _lead(self, lease: Lease) -> None:
        """Publish while the lease holds. Ends only by an error or by being cancelled."""
        self._partitions = await partition_count(self.bootstrap, self.topic, self.security)
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap,
            client_id=f"kehu-relay-{self.topic}",
            enable_idempotence=True,
            compression_type=self.compression,
            max_batch_size=BATCH_BYTES,
            max_request_size=16 * BATCH_BYTES,
            linger_ms=0,  # batches are built whole; nothing would join them
            request_timeout_ms=int(self.send_seconds * 500),
            **self.security,
        )
        try:
            await producer.start()
            start = await self._resume(lease)
            self._headers = (("content-type", CONTENT_TYPE.encode()), ("relay-epoch", b"%d" % lease.epoch))
            self.acknowledged = start
            metrics.RELAY_LEADER.labels(self.topic).set(1)
            log.info("publishing", extra={"topic": self.topic, "cursor": str(start), "epoch": lease.epoch})
            async with Listener(self._url, self.poll) as listener:
                await together(self._publish(producer, lease, listener, start), self._renew(lease), self._measure())
        finally:
            metrics.RELAY_LEADER.labels(self.topic).set(0)
            await asyncio.shield(_discard(producer))
            with contextlib.suppress(LeaseLost, *TRANSIENT, TimeoutError):
                if self.acknowledged is not None:  # a last time, so that the next leader has less to read again
                    async with asyncio.timeout(2.0):
                        await lease.renew(self.acknowledged)
            self.acknowledged = None

    # Publishing ------------------------------------------------------------------------------------------------------

    async def _publish(self, producer: Any, lease: Lease, listener: Listener, start: Cursor) -> None:
        """Send round after round. The next one is read and built while the last is under way; one is in flight."""
        cursor, idle = start, 0
        ahead = asyncio.create_task(asyncio.to_thread(self._read, producer, cursor))
        try:
            while True:
                round_ = await ahead
                if round_.rows == 0:
                    await self._rest(listener, idle)
                    idle += 1
                    ahead = asyncio.create_task(asyncio.to_thread(self._read, producer, cursor))
                    continue
                cursor, idle = round_.last, 0
                ahead = asyncio.create_task(asyncio.to_thread(self._read, producer, cursor))
                await self._send(producer, lease, round_)
                self.acknowledged = cursor
                self._wait = 0.1
                metrics.RELAY_SENT.labels(self.topic).inc(round_.events)
                metrics.RELAY_SKIPPED.labels(self.topic).inc(round_.skipped)
                if round_.unsendable is not None:
                    raise round_.unsendable
        finally:
            # The thread cannot be cancelled; its round is thrown away. A failed read shows again in the next life.
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def _rest(self, listener: Listener, idle: int) -> None:
        """Wait for a ring or the poll interval. Right after activity look again sooner: what was just rung for can be held
        back by an older transaction that has no events and rings for nothing."""
        if idle >= 5:
            await listener.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.002 * 2**idle):
                await listener.wait()

    def _read(self, producer: Any, after: Cursor) -> Round:
        """Read the next rows and build their batches; runs in a thread beside the sending of the round before."""
        limit = self._limit
        rows = self.store.read(after, limit)
        round_ = Round(last=after, rows=len(rows))
        if rows:
            self._build(producer, rows, round_)
            if tracing():
                round_.traces = [row.recorded().traceparent for row in rows[: round_.events + round_.skipped]]
            if len(rows) == limit and round_.size < 4_000_000:
                self._limit = min(limit * 2, self.round_events)
            elif round_.size > 8_000_000:
                self._limit = max(limit // 2, 1)
        return round_

    def _build(self, producer: Any, rows: list[LogRow], round_: Round) -> None:
        partitions, landed, content_type_and_epoch = self._partitions, self._landed, self._headers
        room = self.max_message_bytes - RECORD_OVERHEAD
        now = time.time_ns() // 1_000_000  # the broker refuses times far ahead, so never the domain's clock
        batches = round_.batches
        newest_landed = max(landed.values(), default=Cursor())
        for row in rows:
            txid, position, stream, version, type_, state = row
            value = row.value()
            size = len(value)
            if size > room:
                round_.unsendable = Unsendable(
                    f"{type_} {stream}@{version} (position {position}) has {size} bytes, a message may have {room}: raise the"
                    " topic's max.message.bytes and the relay's max_message_bytes, or find out what makes the event so large"
                )
                return
            key = key_of(state)
            partition = partition_of(key, partitions)
            cursor = Cursor(txid, position)
            if cursor <= newest_landed and cursor <= landed.get(partition, _ZERO):
                round_.skipped += 1
                round_.last = cursor
                continue
            headers = [*content_type_and_epoch, ("cursor", b"%d:%d" % (txid, position))]
            queue = batches.get(partition)
            if queue is None:
                queue = batches[partition] = [producer.create_batch()]
            if queue[-1].append(key=key, value=value, timestamp=now, headers=headers) is None:
                queue.append(producer.create_batch())
                if queue[-1].append(key=key, value=value, timestamp=now, headers=headers) is None:
                    raise RuntimeError("an empty batch refused a record of allowed size")
            round_.size += size
            round_.events += 1
            round_.last = cursor

    async def _send(self, producer: Any, lease: Lease, round_: Round) -> None:
        """Send a round and wait for all acknowledgements. After any error the producer must be discarded.

        Of a partition a second batch is enqueued only when the first has landed: else it could land without it.
        """

        async def in_order(partition: int, batches: list[Any]) -> None:
            for batch in batches:
                lease.check()
                batch.close()
                await (await producer.send_batch(batch, self.topic, partition=partition))

        if not round_.batches:
            return
        try:
            with spans("publish", round_.traces, events=round_.events):
                async with asyncio.timeout(self.send_seconds):
                    if len(round_.batches) == 1:
                        ((partition, batches),) = round_.batches.items()
                        await in_order(partition, batches)
                    else:
                        await asyncio.gather(*(in_order(p, batches) for p, batches in round_.batches.items()))
        except _REFUSALS as error:
            raise Unsendable(
                f"{self.topic}: the broker refuses events up to {round_.last} with {type(error).__name__}; compare the topic's"
                f" max.message.bytes with the relay's {self.max_message_bytes}"
            ) from error

    async def _renew(self, lease: Lease) -> None:
        """Renew the lease and save the acknowledged cursor, five times in the length of a lease."""
        while True:
            assert self.acknowledged is not None
            await lease.renew(self.acknowledged)
            await asyncio.sleep(lease.seconds / 5)

    async def _measure(self) -> None:
        """Tell how much waits, every two seconds. Apart from the lease, which must not wait for it."""
        while True:
            assert self.acknowledged is not None
            try:
                waiting, age = await asyncio.to_thread(self._outbox, self.acknowledged)
            except TRANSIENT as error:
                log.info("the outbox was not measured", extra={"topic": self.topic, "error": type(error).__name__})
            else:
                metrics.RELAY_OUTBOX.labels(self.topic).set(waiting)
                metrics.RELAY_OLDEST.labels(self.topic).set(age)
            await asyncio.sleep(2.0)

    def _outbox(self, cursor: Cursor) -> tuple[int, float]:
        """How many events Kafka has not acknowledged, and how old the oldest of them is, in seconds."""
        after = (str(cursor.txid), cursor.position)
        with self.pool.connection() as connection:
            row = connection.execute(
                "SELECT count(*) FROM (SELECT FROM stored_events WHERE (txid, notification_id) > (%s::text::xid8, %s)"
                " LIMIT 10000) unsent",
                after,
            ).fetchone()
            waiting = int(row[0]) if row else 0
            if waiting >= 10_000:  # counting on would cost too much: positions have holes, but few
                waiting = max(waiting, self.store.newest(connection).position - cursor.position)
            first = connection.execute(
                "SELECT state FROM stored_events WHERE (txid, notification_id) > (%s::text::xid8, %s)"
                " ORDER BY txid, notification_id LIMIT 1",
                after,
            ).fetchone()
        age = (self.clock.now() - Recorded.from_bytes(first[0]).recorded).total_seconds() if first else 0.0
        return waiting, max(0.0, age)

    # Resuming --------------------------------------------------------------------------------------------------------

    async def _resume(self, lease: Lease) -> Cursor:
        """Where to begin: behind the saved cursor, knowing for each partition what landed after it."""
        saved = await lease.cursor()
        tails, empty = await self._tails()
        if empty and saved > _ZERO:
            log.warning(
                "the topic is empty: all events are published again", extra={"topic": self.topic, "cursor": str(saved)}
            )
            await lease.reset()
            saved = _ZERO
        self._landed = await asyncio.to_thread(self._verified, tails)
        self._limit = 500
        return saved

    async def _tails(self) -> tuple[list[Tail], bool]:
        """Our last records of each partition, and whether the topic holds nothing at all."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap,
            client_id=f"kehu-relay-{self.topic}-tail",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            **self.security,
        )
        async with asyncio.timeout(60.0):
            await consumer.start()
            try:
                partitions = [TopicPartition(self.topic, p) for p in range(self._partitions)]
                consumer.assign(partitions)
                begin = await consumer.beginning_offsets(partitions)
                end = await consumer.end_offsets(partitions)
                found: list[Tail] = []
                todo = {tp: TAIL for tp in partitions if end[tp] > begin[tp]}
                while todo:
                    tails = await self._last_records(consumer, begin, end, todo)
                    found.extend(tails)
                    have = {tail.partition for tail in tails}
                    # Records of somebody else at the end: look further back for one of ours.
                    todo = {
                        tp: depth * 10
                        for tp, depth in todo.items()
                        if tp.partition not in have and end[tp] - depth > begin[tp] and depth * 10 <= TAIL_MOST
                    }
                return found, all(end[tp] == 0 for tp in partitions)
            finally:
                await consumer.stop()

    async def _last_records(
        self, consumer: Any, begin: Mapping[Any, int], end: Mapping[Any, int], depths: Mapping[Any, int]
    ) -> list[Tail]:
        for tp in consumer.assignment():
            consumer.seek(tp, max(begin[tp], end[tp] - depths[tp]) if tp in depths else end[tp])
        tails: list[Tail] = []
        reading = set(depths)
        while reading:
            for records in (await consumer.getmany(*reading, timeout_ms=1000)).values():
                tails.extend(tail for record in records if (tail := Tail.of(record)) is not None)
            reading = {tp for tp in reading if await consumer.position(tp) < end[tp]}
        return tails

    def _verified(self, tails: list[Tail]) -> dict[int, Cursor]:
        """For each partition the newest of the tail's events, at the place where the store has it now.

        Raises:
            ForkDetected: the store does not have one of the events.
        """
        if not tails:
            return {}
        with self.pool.connection() as connection:
            rows = connection.execute(
                "SELECT e.originator_id, e.originator_version, e.txid::text::bigint, e.notification_id, e.state"
                " FROM stored_events e JOIN (SELECT DISTINCT * FROM unnest(%s::text[], %s::bigint[])) AS t (stream, version)"
                " ON e.originator_id = t.stream AND e.originator_version = t.version",
                ([t.stream for t in tails], [t.version for t in tails]),
                binary=True,
            ).fetchall()
            newest = self.store.newest(connection)
        known = {(stream, version): (Cursor(txid, position), state) for stream, version, txid, position, state in rows}
        landed: dict[int, Cursor] = {}
        lost: list[Tail] = []
        for tail in tails:
            found = known.get((tail.stream, tail.version))
            if found is None or Recorded.from_bytes(found[1]).id != tail.id:
                lost.append(tail)
            else:
                landed[tail.partition] = max(landed.get(tail.partition, _ZERO), found[0])
        if lost:
            raise ForkDetected(self._report(lost, newest))
        return landed

    def _report(self, lost: list[Tail], newest: Cursor) -> str:
        shown = "; ".join(
            f"partition {t.partition} offset {t.offset}: {t.stream}@{t.version} id {t.id} cursor {t.cursor} epoch {t.epoch}"
            for t in lost[:10]
        )
        return (
            f"{self.topic} holds {len(lost)} events at its end that the store does not have (or has otherwise): {shown}. The"
            f" store's epoch is {self.store.epoch}, its newest cursor {newest}. The database was set back, by a restore or by a"
            " failover that lost commits. Nothing was published. Either bring the lost events back into the store, or make the"
            " topic anew (all events are published again) and rebuild every consumer."
        )


_ZERO = Cursor()
# Records looked at from the end of each partition, and how far back at most when they are not ours.
TAIL = 50
TAIL_MOST = 50_000


@dataclass(frozen=True, slots=True)
class Tail:
    """One of the last records of a partition, as far as it is one of ours."""

    partition: int
    offset: int
    stream: str
    version: int
    id: UUID
    cursor: str
    epoch: str

    @classmethod
    def of(cls, record: Any) -> Tail | None:
        """None when no relay sent it."""
        cursor = next((value for name, value in record.headers if name == "cursor"), None)
        if cursor is None:
            return None
        try:
            recorded = Recorded.from_bytes(record.value)
        except MalformedEnvelope:
            return None
        return cls(
            record.partition,
            record.offset,
            recorded.stream,
            recorded.version,
            recorded.id,
            cursor.decode(errors="replace"),
            recorded.store_epoch,
        )


async def _discard(producer: Any) -> None:
    """End a producer at once. What it still holds is dropped; what is on its way may land, and the next life finds it.

    `stop()` alone would wait until everything was sent, for ever when the broker is gone, so its sender is ended first.
    """
    sender = producer._sender.sender_task
    try:
        async with asyncio.timeout(5.0):
            if sender is not None:
                sender.cancel()
                await producer.client.close()  # the requests in flight fail now
                await asyncio.wait([sender])
                producer._message_accumulator.fail_all(ProducerClosed())
            await producer.stop()
    except (KafkaError, TimeoutError, OSError) as error:
        log.info("the producer did not end in order", extra={"error": type(error).__name__})
