"""The lake is loaded from Kafka without loss or repeats, through kill -9, and answers the same funnel as the read models."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from analytics.read_models.lake import LakeLoader
from analytics.settings import Settings
from kehu.kafka.topics import TopicMismatch, ensure_topics
from kehu.lake import Lake, LakeMissing
from kehu.migrations import migrate, of_service
from kehu.testing.histories import SEALED, History, history
from kehu.testing.kafka import Message, publish, until

LOADER = """
import asyncio, sys
from analytics.read_models.lake import LakeLoader
from analytics.settings import Settings
from kehu.runtime import end_with_parent

end_with_parent()
asyncio.run(LakeLoader(Settings(), sys.argv[1:]).run())
"""


@pytest.fixture
def settings(database: str, kafka_bootstrap: str, tmp_path: Path) -> Settings:
    migrate(database, of_service("analytics"))
    server, _, name = database.rpartition("/")
    return Settings(
        environment="development",
        jwt_secret="x" * 32,
        postgres_url=f"{server}/postgres",
        database=name,
        kafka_bootstrap=kafka_bootstrap,
        lake_path=tmp_path / "lake",
        lake_flush_seconds=0.2,
        lake_flush_events=300,
    )


def spawn(settings: Settings, *topics: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "KEHU_ENVIRONMENT": "development",
        "KEHU_JWT_SECRET": "x" * 32,
        "KEHU_POSTGRES_URL": settings.postgres_url,
        "KEHU_DATABASE": settings.database,
        "KEHU_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "KEHU_LAKE_PATH": str(settings.lake_path),
        "KEHU_LAKE_FLUSH_SECONDS": "0.1",
        "KEHU_LAKE_FLUSH_EVENTS": "100",
        "KEHU_LAKE_COMPACT_EVENTS": "2000",
        "KEHU_PARENT": str(os.getpid()),
    }
    return subprocess.Popen([sys.executable, "-c", LOADER, *topics], env=environment)


def in_lake(settings: Settings) -> int:
    """How many records are behind the lake."""
    assert settings.lake_path is not None
    try:
        return sum(Lake(settings.lake_path).offsets().values())
    except LakeMissing:
        return 0


@asynccontextmanager
async def loading(settings: Settings, topics: tuple[str, ...]) -> AsyncIterator[LakeLoader]:
    loader = LakeLoader(settings, topics)
    task = asyncio.create_task(loader.run())
    try:
        yield loader
        if task.done():
            task.result()
    finally:
        await loader.stop()
        await asyncio.gather(task, return_exceptions=True)


def ids(made: History) -> Counter[str]:
    return Counter(str(r.id) for recorded in made.recorded().values() for r in recorded)


@pytest.mark.req("AN-09")
async def test_nothing_is_lost_or_repeated_through_kills(
    settings: Settings, kafka_bootstrap: str, topic_prefix: str
) -> None:
    """Killed again and again while it appends and compacts; some events come twice, as after the crash of a relay."""
    made, rng = history(51, 600), random.Random(9)
    topics = tuple(f"{topic_prefix}.{topic}" for topic in made.topics)
    await ensure_topics(kafka_bootstrap, topics)
    process = spawn(settings, *topics)
    sent = 0
    try:
        for part in range(6):
            for topic, values in zip(topics, made.topics.values(), strict=True):
                size = -(-len(values) // 6)
                some = [Message(k.encode(), v) for k, v in values[part * size : (part + 1) * size]]
                again = some[-15:] if rng.random() < 0.5 else []
                await publish(kafka_bootstrap, topic, some + again, 12)
                sent += len(some) + len(again)
            if part in (0, 1, 3, 4):
                before = in_lake(settings)
                await until(lambda: in_lake(settings) > before, "the lake grows", 90)  # noqa: B023 - waited for in the loop
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = spawn(settings, *topics)
        await until(lambda: in_lake(settings) == sent, "all records are in the lake", 120)
        assert sent > len(made)
    finally:
        process.kill()
        process.wait()
    assert settings.lake_path is not None
    stored = Lake(settings.lake_path).events(columns=["id", "data"]).to_pylist()
    assert Counter(row["id"] for row in stored) == ids(made)
    assert any(SEALED in row["data"] for row in stored)  # personal data is there, sealed as it came
    assert Lake(settings.lake_path).rejected().num_rows == 0


async def test_it_waits_for_its_size_or_its_age(settings: Settings, kafka_bootstrap: str, topic_prefix: str) -> None:
    """Few events are in the lake soon; a flush at the stop leaves nothing behind."""
    assert settings.lake_path is not None
    made = history(52, 20)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    async with loading(settings, topics):
        await until(lambda: in_lake(settings) == len(made), "all is in the lake", 60)
    patient = settings.model_copy(update={"lake_flush_seconds": 3600.0})
    more = history(53, 20)
    async with loading(patient, topics) as loader:
        await until(lambda: loader._loading, "it loads", 60)
        for topic, values in zip(topics, more.topics.values(), strict=True):
            await publish(kafka_bootstrap, topic, [Message(k.encode(), v) for k, v in values], 12)
        await until(lambda: in_lake(settings) >= len(made) + 300, "a full batch is written", 60)
    assert in_lake(settings) <= len(made) + len(more)
    async with loading(settings, topics):
        await until(lambda: in_lake(settings) == len(made) + len(more), "the rest is written", 60)
    events = Lake(settings.lake_path).events(columns=["id"])
    assert events.num_rows == len(made) + len(more)


async def test_records_that_are_no_events_are_kept_apart(
    settings: Settings, kafka_bootstrap: str, topic_prefix: str
) -> None:
    assert settings.lake_path is not None
    made = history(54, 5)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    await publish(kafka_bootstrap, topics[0], [Message(b"k", b"broken"), Message(b"k", None)], 12)
    async with loading(settings, topics):
        await until(lambda: in_lake(settings) == len(made) + 2, "all is read", 60)
    lake = Lake(settings.lake_path)
    assert lake.events(columns=["id"]).num_rows == len(made)
    assert Counter(row["value"] for row in lake.rejected().to_pylist()) == Counter([b"broken", None])


async def test_a_second_loader_waits_and_takes_over(
    settings: Settings, kafka_bootstrap: str, topic_prefix: str
) -> None:
    made = history(55, 40)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    async with loading(settings, topics) as first, loading(settings, topics) as second:
        await until(lambda: first._loading != second._loading, "one of them loads", 60)
        leader, standby = (first, second) if first._loading else (second, first)
        await standby.check()
        await leader.stop()
        await until(lambda: standby._loading, "the other takes over", 60)
        await until(lambda: in_lake(settings) == len(made), "all is in the lake", 60)


async def test_a_topic_that_was_made_anew_is_refused(
    settings: Settings, kafka_bootstrap: str, topic_prefix: str
) -> None:
    assert settings.lake_path is not None
    made = history(56, 5)
    topics = await made.publish(kafka_bootstrap, topic_prefix)
    async with loading(settings, topics):
        await until(lambda: in_lake(settings) == len(made), "all is in the lake", 60)
    from kehu.lake import LakeWriter, Record

    place, offset = max(Lake(settings.lake_path).offsets().items(), key=lambda item: item[1])
    value = made.lead_intake[0][1]
    LakeWriter(settings.lake_path).append([Record(*place, offset, value)])  # the lake is further than the topic
    with pytest.raises(TopicMismatch, match="another log"):
        await asyncio.wait_for(LakeLoader(settings, topics).run(), 60)


async def test_a_full_tail_is_sorted_in(settings: Settings, kafka_bootstrap: str, topic_prefix: str) -> None:
    assert settings.lake_path is not None
    eager = settings.model_copy(update={"lake_compact_events": 200})
    made = history(57, 60)
    topics = await made.publish(kafka_bootstrap, topic_prefix)

    def sorted_in() -> int:
        return sum(file.rows for file in Lake(eager.lake_path or Path()).snapshot().of("events"))

    async with loading(eager, topics):
        await until(lambda: in_lake(eager) == len(made), "all is in the lake", 60)
        await until(lambda: sorted_in() > 0, "the tail is sorted in", 60)
    lake = Lake(settings.lake_path)
    assert Counter(row["id"] for row in lake.events(columns=["id"]).to_pylist()) == ids(made)
