"""Up to which instant a service has heard what others recorded.

A process that acts when nothing happened (no follow-up for 48 hours, a score that fades) must not act on a silence that is
only its own deafness: after a downtime its timers are due at once, while the events that happened meanwhile still wait in
Kafka. Its timers go by this clock instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kehu.clock import Clock
from kehu.kafka.topics import TopicMismatch, partition_count
from kehu.postgres import TRANSIENT, Pool

log = logging.getLogger(__name__)


class HeardClock:
    """A clock that is never ahead of what a subscription has handled.

    It takes the time, gives the relays of the others a moment, asks Kafka for the ends of the topics, and is at that time
    when the stored offsets of the subscription have come there. While Kafka or the consumer stands still, so does it.

    Args:
        clock: business time.
        pool: connections to the service's database.
        consumer: name of the subscription in the database (`kehu.kafka.topics.group_of`).
        topics: what it consumes.
        relay_seconds: how long an event may take from its commit to its topic.
        poll: seconds between looks at the stored offsets.
        security: connection arguments of aiokafka (`security_protocol`, `ssl_context`, `sasl_...`).
    """

    REQUEST_SECONDS = 10.0

    def __init__(
        self,
        clock: Clock,
        pool: Pool,
        bootstrap: str,
        consumer: str,
        topics: Sequence[str],
        relay_seconds: float = 0.5,
        poll: float = 0.1,
        security: Mapping[str, Any] | None = None,
    ) -> None:
        self._clock, self._pool, self._bootstrap, self._consumer = clock, pool, bootstrap, consumer
        self._topics, self._relay_seconds, self._poll, self._security = (
            topics,
            relay_seconds,
            poll,
            dict(security or {}),
        )
        self._heard = datetime.min.replace(tzinfo=UTC)

    def now(self) -> datetime:
        """The instant up to which everything was heard; never later than the business time."""
        return min(self._heard, self._clock.now())

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._follow()
            except (KafkaError, TopicMismatch, OSError, TimeoutError, *TRANSIENT) as error:
                log.warning(
                    "not known what is unheard", extra={"consumer": self._consumer, "error": type(error).__name__}
                )
            await asyncio.sleep(1.0)

    async def _follow(self) -> None:
        partitions = [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in range(await partition_count(self._bootstrap, topic, self._security))
        ]
        kafka = AIOKafkaConsumer(bootstrap_servers=self._bootstrap, enable_auto_commit=False, **self._security)
        try:
            async with asyncio.timeout(self.REQUEST_SECONDS):
                await kafka.start()
            while True:
                now = self._clock.now()
                await asyncio.sleep(self._relay_seconds)
                async with asyncio.timeout(self.REQUEST_SECONDS):
                    ends = await kafka.end_offsets(partitions)
                while not await asyncio.to_thread(self._handled, ends):  # noqa: ASYNC110 another process moves them
                    await asyncio.sleep(self._poll)
                self._heard = now
        finally:
            with contextlib.suppress(KafkaError, OSError, TimeoutError):
                async with asyncio.timeout(self.REQUEST_SECONDS):
                    await kafka.stop()

    def _handled(self, ends: Mapping[Any, int]) -> bool:
        with self._pool.connection() as connection:
            rows = connection.execute(
                "SELECT topic, partition, next_offset FROM consumer_offsets WHERE consumer = %s", (self._consumer,)
            ).fetchall()
        stored = {TopicPartition(topic, partition): offset for topic, partition, offset in rows}
        return all(stored.get(partition, 0) >= end for partition, end in ends.items())
