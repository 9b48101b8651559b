"""Records for tests: made by hand and put on a topic as a relay would, and whole topics read back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, UUID, uuid5

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from kehu.events import Envelope, Event
from kehu.events.envelope import CONTENT_TYPE, with_position
from kehu.events.lead_intake import ChannelDefined
from kehu.kafka.topics import partition_of

AT = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
HEADERS: tuple[tuple[str, bytes], ...] = (("content-type", CONTENT_TYPE.encode()), ("relay-epoch", b"1"))


class Message(NamedTuple):
    """A record to be put on a topic."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = HEADERS


def event_id(stream: str, version: int) -> UUID:
    """The id of the event that `envelope` makes."""
    return uuid5(NAMESPACE_OID, f"{stream}@{version}")


def envelope(stream: str, version: int, key: str | None = None, epoch: str = "test") -> Envelope:
    """The envelope of an event of lead-intake.

    Args:
        key: partition key; the stream when None.
    """
    return Envelope(
        id=event_id(stream, version),
        producer="lead-intake",
        stream=stream,
        version=version,
        time=AT,
        recorded=AT,
        partition_key=key or stream,
        customer_id=None,
        correlation_id="c-1",
        causation_id="r-1",
        actor="service:test",
        traceparent=None,
        store_epoch=epoch,
    )


def event_of(version: int) -> Event:
    """A small event whose title tells its version."""
    return ChannelDefined(channel="web", title=f"v{version}", kind="web")


def message(stream: str, version: int, key: str | None = None, event: Event | None = None) -> Message:
    """An event as the relay sends it."""
    made = envelope(stream, version, key)
    value = with_position(made.encode(event or event_of(version)), version)
    return Message(made.partition_key.encode(), value, (*HEADERS, ("cursor", b"1:%d" % version)))


async def publish(bootstrap: str, topic: str, messages: Sequence[Message], partitions: int) -> None:
    """Put messages on a topic in this order; one without a key goes to partition 0."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, enable_idempotence=True, max_request_size=8 << 20, max_batch_size=500_000
    )
    await producer.start()
    try:
        sent = [
            await producer.send(
                topic,
                m.value,
                m.key,
                partition=partition_of(m.key, partitions) if m.key else 0,
                headers=list(m.headers),
            )
            for m in messages
        ]
        await asyncio.gather(*sent)
    finally:
        await producer.stop()


async def read_topic(bootstrap: str, topic: str, deadline: float = 20.0) -> list[Any]:
    """Everything on a topic, each partition in its order. Raises TimeoutError after `deadline` seconds."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest", fetch_max_wait_ms=50
    )
    async with asyncio.timeout(deadline):
        await consumer.start()
        try:
            partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
            begin, end = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
            records: list[Any] = []
            reading = {tp for tp in partitions if end[tp] > begin[tp]}
            while reading:
                for some in (await consumer.getmany(timeout_ms=500)).values():
                    records += some
                reading = {tp for tp in reading if await consumer.position(tp) < end[tp]}
            return records
        finally:
            await consumer.stop()


async def until(condition: Callable[[], Any], what: str, deadline: float = 15.0, step: float = 0.02) -> Any:
    """Wait until the condition gives something true, and give that.

    Raises:
        AssertionError: not within `deadline` seconds.
    """
    end = time.monotonic() + deadline
    while not (result := await asyncio.to_thread(condition)):
        assert time.monotonic() < end, f"not in {deadline} s: {what}"
        await asyncio.sleep(step)
    return result
