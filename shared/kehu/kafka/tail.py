"""Reading whole topics without a group, from offsets that somebody else keeps: for the lake, and for who asks how long a topic is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kehu.kafka.guard import Place
from kehu.kafka.topics import TopicMismatch


class Tail:
    """All partitions of some topics, read by this process alone. An async context manager.

    Args:
        topics: that exist.
        security: connection arguments of aiokafka (`security_protocol`, `ssl_context`, `sasl_...`).
        fetch_bytes: the most that one fetch brings of a partition.
    """

    def __init__(
        self,
        bootstrap: str,
        topics: Sequence[str],
        security: Mapping[str, Any] | None = None,
        fetch_bytes: int = 4 << 20,
    ) -> None:
        self.topics = tuple(topics)
        self.places: tuple[Place, ...] = ()
        self._kafka: Any = None
        self._arguments = {"bootstrap_servers": bootstrap, "max_partition_fetch_bytes": fetch_bytes, **(security or {})}

    async def __aenter__(self) -> Self:
        """Raises TopicMismatch when a topic is missing, KafkaError when no broker answers."""
        self._kafka = AIOKafkaConsumer(
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            client_id="kehu-tail",
            **self._arguments,
        )
        try:
            await self._kafka.start()
            present = await self._kafka.topics()
            for topic in self.topics:
                if topic not in present:
                    raise TopicMismatch(f"there is no topic {topic}: make it with ensure_topics before the first start")
            await self._kafka._client.set_topics(self.topics)
            self.places = tuple(
                sorted(Place(topic, p) for topic in self.topics for p in self._kafka.partitions_for_topic(topic) or ())
            )
        except BaseException:
            await self._kafka.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kafka.stop()

    async def begin(self, offsets: Mapping[Place, int]) -> dict[Place, int]:
        """Go to these offsets, or to the oldest record of a partition that has none; gives where each begins.

        Raises:
            TopicMismatch: a topic ends before its offset, or what comes next was deleted: this is not the log that was read.
        """
        starts, ends = await self.starts(), await self.ends()
        self._kafka.assign([TopicPartition(*place) for place in self.places])
        begun = {}
        for place in self.places:
            offset = offsets.get(place, starts[place])
            if not starts[place] <= offset <= ends[place]:
                raise TopicMismatch(
                    f"{place.topic}/{place.partition} has the records {starts[place]} to {ends[place]}, and the next to read is"
                    f" {offset}: this is another log, or its beginning was deleted"
                )
            self._kafka.seek(TopicPartition(*place), offset)
            begun[place] = offset
        return begun

    async def records(self, most: int, seconds: float) -> list[Any]:
        """Up to `most` records, in the order of each partition; fewer, or none, after `seconds`. Raises KafkaError."""
        fetched = await self._kafka.getmany(timeout_ms=int(seconds * 1000), max_records=most)
        return [record for records in fetched.values() for record in records]

    def known_end(self, place: Place) -> int | None:
        """The end of a partition as the last fetch saw it, without asking; None before the first."""
        end: int | None = self._kafka.highwater(TopicPartition(*place))
        return end

    async def starts(self) -> dict[Place, int]:
        """The oldest offset that is kept of each partition."""
        return _by_place(await self._kafka.beginning_offsets([TopicPartition(*place) for place in self.places]))

    async def ends(self) -> dict[Place, int]:
        """The offset after the newest record of each partition."""
        return _by_place(await self._kafka.end_offsets([TopicPartition(*place) for place in self.places]))


class Ends:
    """Asks where topics end, as often as one likes: the connection is kept, and made anew after an error."""

    def __init__(self, bootstrap: str, topics: Iterable[str], security: Mapping[str, Any] | None = None) -> None:
        self._bootstrap, self._topics, self._security = bootstrap, tuple(topics), security
        self._tail: Tail | None = None

    async def __call__(self) -> dict[Place, int]:
        """Raises KafkaError or OSError when Kafka does not answer, TopicMismatch when a topic is missing."""
        try:
            if self._tail is None:
                self._tail = await Tail(self._bootstrap, self._topics, self._security).__aenter__()
            return await self._tail.ends()
        except (KafkaError, OSError, TimeoutError):
            await self.close()
            raise

    async def close(self) -> None:
        tail, self._tail = self._tail, None
        if tail is not None:
            await tail.__aexit__()


def _by_place(offsets: Mapping[Any, int]) -> dict[Place, int]:
    return {Place(tp.topic, tp.partition): offset for tp, offset in offsets.items()}
