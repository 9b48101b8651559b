"""All topics → the lake. The lake's own log says how far it has come, so nothing is lost or repeated wherever this is killed."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence

import psycopg

from analytics.settings import Settings
from analytics.subscriptions import TOPICS
from kehu.eventstore import Cursor
from kehu.kafka import metrics
from kehu.kafka.guard import Place
from kehu.kafka.lease import Lease, LeaseLost
from kehu.kafka.tail import Tail
from kehu.kafka.topics import KafkaError
from kehu.lake import AppendResult, Lake, LakeConflict, LakeWriter, Record, compact, vacuum

log = logging.getLogger(__name__)

CONSUMER = "crm.analytics.lake"
_WAIT_FOR = (KafkaError, psycopg.OperationalError, LeaseLost, LakeConflict, ConnectionError, TimeoutError)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
# How long after the death of a loader another one takes over.
_LEASE_SECONDS = 15.0
# Files in the tail after which it is sorted in, however few events they hold: a reader opens each of them.
_MOST_FILES = 500


class LakeLoader:
    """Reads the topics from where the lake ends, and appends by size or age.

    One process at a time: a lease keeps others waiting, and the lake itself refuses a second writer.

    Args:
        topics: instead of all topics, for tests.
    """

    def __init__(self, settings: Settings, topics: Sequence[str] = TOPICS) -> None:
        assert settings.lake_path is not None
        self.settings, self.topics, self.path = settings, tuple(topics), settings.lake_path
        self._stopping = asyncio.Event()
        self._healthy = self._loading = False
        self._compacting: asyncio.Task[None] | None = None
        self._compacted_at = time.monotonic()
        self._tail_events = self._tail_files = 0

    async def run(self) -> None:
        """Load until `stop`; what was read is then still written. Broker and database may go away for any time.

        Raises:
            LakeGap, TopicMismatch: the topics are not those that the lake was made of; a person must look.
        """
        pause = _FIRST_PAUSE
        try:
            while not self._stopping.is_set():
                try:
                    await self._lead_or_stop()
                    pause = _FIRST_PAUSE
                except _WAIT_FOR as error:
                    log.warning(
                        "the lake is loaded again after a pause", extra={"error": type(error).__name__, "pause": pause}
                    )
                    await _until(self._stopping, pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
        finally:
            if self._compacting is not None:
                await asyncio.gather(self._compacting, return_exceptions=True)

    async def stop(self) -> None:
        """Let `run` write what it has and return."""
        self._stopping.set()

    async def check(self) -> None:
        """For /readyz: raises when nothing is read, except while another process does."""
        if not self._healthy:
            raise ConnectionError("not loading")

    async def _lead_or_stop(self) -> None:
        leading = asyncio.create_task(self._lead(), name="lake")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait({leading, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._loading:
                await leading  # it sees the stop itself, and writes what it has
        finally:
            for task in (leading, stop):
                task.cancel()
            await asyncio.gather(leading, stop, return_exceptions=True)
        if leading.done() and not leading.cancelled():
            leading.result()

    async def _lead(self) -> None:
        self._healthy = True  # a standby is ready as well
        try:
            holder = f"lake {os.getpid()} {socket.gethostname()}"
            async with Lease(self.settings.database_url, CONSUMER, holder, _LEASE_SECONDS) as lease:
                self._loading = True
                loading = asyncio.create_task(self._load(), name="load")
                keeping = asyncio.create_task(_keep(lease), name="lease")
                try:
                    await asyncio.wait({loading, keeping}, return_when=asyncio.FIRST_COMPLETED)
                    await (loading if loading.done() else keeping)
                finally:
                    for task in (loading, keeping):
                        task.cancel()
                    await asyncio.gather(loading, keeping, return_exceptions=True)
        finally:
            self._loading = self._healthy = False

    async def _load(self) -> None:
        writer = await asyncio.to_thread(LakeWriter, self.path)
        offsets = await asyncio.to_thread(writer.offsets)
        tail_files = (await asyncio.to_thread(lambda: Lake(self.path).snapshot())).of("tail")
        self._tail_events, self._tail_files = sum(file.rows for file in tail_files), len(tail_files)
        async with Tail(self.settings.kafka_bootstrap, self.topics) as tail:
            known = {Place(*place): offset for place, offset in offsets.items()}
            await tail.begin({place: offset for place, offset in known.items() if place in tail.places})
            waiting: list[Record] = []
            oldest = time.monotonic()
            while True:
                stopping = self._stopping.is_set()
                room = self.settings.lake_flush_events - len(waiting)
                patience = min(0.25, self.settings.lake_flush_seconds)
                fetched = [] if stopping or not room else await tail.records(room, patience)
                if fetched and not waiting:
                    oldest = time.monotonic()
                waiting += [Record(r.topic, r.partition, r.offset, r.value) for r in fetched]
                old = time.monotonic() - oldest >= self.settings.lake_flush_seconds
                if waiting and (old or stopping or len(waiting) >= self.settings.lake_flush_events):
                    offsets = (await self._append(writer, waiting)).offsets
                    waiting = []
                _show(tail, offsets)
                if stopping:
                    return
                self._compact_when_due()

    async def _append(self, writer: LakeWriter, records: Sequence[Record]) -> AppendResult:
        started = time.perf_counter()
        writing = asyncio.get_running_loop().run_in_executor(None, writer.append, records)
        try:
            result = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])  # a commit under way is finished, not cut off
            raise
        metrics.CONSUMER_SECONDS.labels(CONSUMER).observe(time.perf_counter() - started)
        counts = {"applied": result.events, "repeat": result.known + result.repeated, "parked": result.rejected}
        for outcome, count in counts.items():
            metrics.CONSUMER_EVENTS.labels(CONSUMER, outcome).inc(count)
        if result.rejected:
            log.error("records that are no events are kept apart in the lake", extra={"count": result.rejected})
        self._tail_events += result.events
        self._tail_files += 1
        return result

    def _compact_when_due(self) -> None:
        if self._compacting is not None:
            if not self._compacting.done():
                return
            compacting, self._compacting = self._compacting, None
            compacting.result()  # raises what went wrong
        old = time.monotonic() - self._compacted_at >= self.settings.lake_compact_seconds
        many = self._tail_events >= self.settings.lake_compact_events or self._tail_files >= _MOST_FILES
        if many or (old and self._tail_events):
            self._tail_events, self._tail_files, self._compacted_at = 0, 0, time.monotonic()
            self._compacting = asyncio.create_task(self._compact(), name="compact")

    async def _compact(self) -> None:
        """Beside the loading: a commit of the one does not disturb the other."""
        try:
            done = await asyncio.to_thread(compact, self.path)
            gone = await asyncio.to_thread(lambda: vacuum(self.path, keep=self.settings.lake_keep_versions))
        except LakeConflict as error:
            log.info("another compaction was first", extra={"error": str(error)})
        else:
            log.info(
                "the lake was sorted", extra={"rows": done.rows, "written": done.written, "removed": len(gone.removed)}
            )


def _show(tail: Tail, offsets: Mapping[tuple[str, int], int]) -> None:
    for place in tail.places:
        end = tail.known_end(place)
        if end is not None:
            lag = max(0, end - offsets.get(place, 0))
            metrics.CONSUMER_LAG.labels(CONSUMER, place.topic, place.partition).set(lag)


async def _keep(lease: Lease) -> None:
    """Renew the lease until it is lost, which raises LeaseLost."""
    while True:
        await lease.renew(Cursor())
        await asyncio.sleep(lease.seconds / 5)


async def _until(stopping: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), seconds)
    except TimeoutError:
        return
