"""Topics: their names, how they are made, and which partition a key belongs to."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

# Fixed for ever: another number would move keys to other partitions and break the order of their events.
PARTITIONS = 12
# The largest event that the relay sends and a topic takes, in bytes, headers and batch included.
MAX_MESSAGE_BYTES = 1_000_000


class TopicMismatch(RuntimeError):
    """A topic exists with another number of partitions or is missing and may not be made."""


def topic_of(service: str) -> str:
    """The topic of a service's events: `lead-intake` → `crm.lead-intake.events`."""
    return f"crm.{service}.events"


def group_of(service: str, subscription: str) -> str:
    """Kafka group, and name of the consumer in the database, of a service's subscription."""
    return f"crm.{service}.{subscription}"


@dataclass(frozen=True, slots=True)
class Topic:
    """What a topic must be like.

    Args:
        compacted: keep the last value of each key only; for changelogs, never for events.
        configs: further topic settings of Kafka.
    """

    name: str
    partitions: int = PARTITIONS
    compacted: bool = False
    configs: Mapping[str, str] = field(default_factory=dict)

    def settings(self, replication: int) -> dict[str, str]:
        """Kafka's settings of the topic. Events are kept for ever, and an acknowledged one is on more than one broker."""
        return {
            "cleanup.policy": "compact" if self.compacted else "delete",
            "retention.ms": "-1",
            "retention.bytes": "-1",
            "message.timestamp.type": "CreateTime",
            "min.insync.replicas": str(max(1, replication - 1)),
            **self.configs,
        }


async def ensure_topics(
    bootstrap: str,
    topics: Iterable[Topic | str],
    replication: int = 1,
    security: Mapping[str, Any] | None = None,
    deadline: float = 30.0,
) -> list[str]:
    """Make the topics that are missing, check the others, and return when every partition has a leader.

    Args:
        replication: copies of each partition.
        security: connection arguments of aiokafka (`security_protocol`, `ssl_context`, `sasl_...`).
        deadline: seconds for all of it.

    Returns:
        The names of those that were made.

    Raises:
        TopicMismatch: a topic has another number of partitions.
        KafkaError, TimeoutError: the cluster did not do it.
    """
    wanted = [Topic(topic) if isinstance(topic, str) else topic for topic in topics]
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, client_id="kehu-topics", **(security or {}))
    async with asyncio.timeout(deadline):
        try:
            await admin.start()
            present = set(await admin.list_topics())
            missing = [topic for topic in wanted if topic.name not in present]
            made = await _create(admin, missing, replication) if missing else []
            await _check(admin, wanted)
        finally:
            await admin.close()
    return made


async def _create(admin: Any, missing: list[Topic], replication: int) -> list[str]:
    response = await admin.create_topics(
        [
            NewTopic(
                name=topic.name,
                num_partitions=topic.partitions,
                replication_factor=replication,
                topic_configs=topic.settings(replication),
            )
            for topic in missing
        ]
    )
    made = []
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        if code == 0:
            made.append(name)
        elif error is not TopicAlreadyExistsError:  # another process was quicker
            raise error(f"{name}: {rest[0] if rest else error.__name__}")
    return made


async def _check(admin: Any, wanted: list[Topic]) -> None:
    """Wait until each topic is known with a leader for each partition; a topic is made in the background."""
    pause = 0.05
    while True:
        described = {topic["topic"]: topic for topic in await admin.describe_topics([topic.name for topic in wanted])}
        waiting = False
        for topic in wanted:
            partitions = described.get(topic.name, {}).get("partitions", [])
            if partitions and len(partitions) != topic.partitions:
                raise TopicMismatch(
                    f"{topic.name} has {len(partitions)} partitions and must have {topic.partitions}: the number decides where"
                    " a key's events are, so it cannot be changed while they are kept; make the topic anew"
                )
            waiting |= not partitions or any(partition["leader"] < 0 for partition in partitions)
        if not waiting:
            return
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.5)


async def partition_count(
    bootstrap: str, topic: str, security: Mapping[str, Any] | None = None, patience: float = 5.0
) -> int:
    """How many partitions the topic has.

    Args:
        patience: seconds for which a missing topic is asked for again: a broker that has just started may not know its topics.

    Raises:
        TopicMismatch: there is no such topic.
        KafkaError: no broker answers.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, client_id="kehu-topics", **(security or {}))
    deadline = time.monotonic() + patience
    try:
        await admin.start()
        while True:
            (described,) = await admin.describe_topics([topic])
            if described["partitions"]:
                return len(described["partitions"])
            if time.monotonic() >= deadline:
                raise TopicMismatch(f"there is no topic {topic}: make it with ensure_topics before the first start")
            await asyncio.sleep(0.5)
    finally:
        await admin.close()


@lru_cache(maxsize=100_000)
def partition_of(key: bytes, partitions: int = PARTITIONS) -> int:
    """The partition of a key, as every Kafka client computes it by default (murmur2, seed 0x9747b28c).

    The same function as `aiokafka.partitioner`, over whole words at a time and remembered.
    """
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    length = len(key)
    words = length // 4
    h = 0x9747B28C ^ length
    for k in struct.unpack_from(f"<{words}I", key):
        k = k * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if tail := key[words * 4 :]:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return ((h ^ h >> 15) & 0x7FFFFFFF) % partitions


__all__ = [
    "MAX_MESSAGE_BYTES",
    "PARTITIONS",
    "KafkaError",
    "Topic",
    "TopicMismatch",
    "ensure_topics",
    "group_of",
    "partition_count",
    "partition_of",
    "topic_of",
]
