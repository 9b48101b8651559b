"""Building a read model anew from the first event, beside the live one, and switching over without a gap."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import psycopg

from analytics.read_models import generations
from analytics.read_models.base import GenerationalModel
from analytics.read_models.generations import Build, NotReady
from analytics.settings import Settings
from analytics.subscriptions import TOPICS, projection
from kehu.kafka.consumer import ConsumerRunner, SubscriptionStopped
from kehu.kafka.guard import Place
from kehu.kafka.tail import Ends
from kehu.kafka.topics import TopicMismatch
from kehu.postgres import Connection, Pool, connect, open_pool

log = logging.getLogger(__name__)

# Rebuilds of one read model exclude each other by an advisory lock of this class.
_LOCK = 0x7265_6275
_SWITCHES = 30


@dataclass(frozen=True, slots=True)
class Step:
    """How far a rebuild has come.

    Args:
        state: `building`, `switching`, `live`, `done` (the old generation is gone).
        done, total: events read, and events in the topics now.
        rate: events a second since the start of this process.
    """

    projection: str
    generation: int
    state: str
    done: int
    total: int
    rate: float


Report = Callable[[Step], None]
# What a person can do something about.
EXPECTED = (generations.UnknownProjection, NotReady, TopicMismatch, SubscriptionStopped)


def print_step(step: Step) -> None:
    """One JSON object a line on standard output, for `kehu replay` and for the logs of a job."""
    _print(step)


def print_failure(error: Exception) -> None:
    """The reason of a failed rebuild, in the same manner."""
    _print({"state": "failed", "reason": str(error)})


def _print(line: Any) -> None:
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()


class RebuildRunning(NotReady):
    """Somebody else rebuilds this read model."""


class Rebuild:
    """One rebuild.

    Args:
        report: told several times a second how far it is.
        fresh: begin anew even when an interrupted rebuild left something.
        topics: instead of all topics, for tests.
    """

    def __init__(
        self, settings: Settings, name: str, report: Report, *, fresh: bool = False, topics: tuple[str, ...] = TOPICS
    ) -> None:
        self.settings, self.name, self.report, self.fresh, self.topics = settings, name, report, fresh, topics
        self._started = time.monotonic()
        self._first = 0

    async def run(self) -> GenerationalModel:
        """Build, switch, remove the old generation; gives the one that is live now.

        Raises:
            RebuildRunning, NotReady, TopicMismatch, SubscriptionStopped: the live one was not touched.
        """
        generations.model_class(self.name)
        lock = await asyncio.to_thread(self._exclude_others)
        pool = open_pool(self.settings.database_url, "rebuild", 3)
        ends = Ends(self.settings.kafka_bootstrap, self.topics)
        try:
            await asyncio.to_thread(generations.remove_retired, lock, self.name, True)
            model = await asyncio.to_thread(generations.begin, lock, self.name, self.settings.zone, self.fresh)
            await self._build_and_switch(pool, lock, ends, model)
            removed = await asyncio.to_thread(generations.remove_retired, lock, self.name, False)
            log.info("old generations removed", extra={"projection": self.name, "generations": removed})
            total = sum((await ends()).values())
            self.report(Step(self.name, model.generation, "done", total, total, self._rate(total)))
            return model
        finally:
            await ends.close()
            pool.close()
            lock.close()

    def _exclude_others(self) -> Connection:
        connection = connect(self.settings.database_url, f"rebuild {self.name}")
        row = connection.execute("SELECT pg_try_advisory_lock(%s, hashtext(%s))", (_LOCK, self.name)).fetchone()
        if row is None or not row[0]:
            connection.close()
            raise RebuildRunning(f"{self.name} is being rebuilt by another process")
        connection.execute("SET statement_timeout = '10min'")
        return connection

    async def _build_and_switch(self, pool: Pool, lock: Connection, ends: Ends, model: GenerationalModel) -> None:
        subscription = projection(model, Build(pool, model), self.settings.rebuild_batch)
        runner = ConsumerRunner(
            pool, self.settings.kafka_bootstrap, generations.SERVICE, subscription, topics=self.topics
        )
        building = asyncio.create_task(runner.run(), name=f"rebuild-{self.name}")
        try:
            while not runner.positions and not building.done():
                await asyncio.wait({building}, timeout=0.01)
            self._first, self._started = sum(runner.positions.values()), time.monotonic()
            await self._catch_up(building, runner, ends, model)
            for left in range(_SWITCHES - 1, -1, -1):
                try:
                    await _beside(building, lambda: generations.switch(lock, model))
                    break
                except (NotReady, psycopg.errors.LockNotAvailable):
                    if not left or building.done():
                        raise
                    await self._catch_up(building, runner, ends, model)
            total = sum((await ends()).values())
            self.report(Step(self.name, model.generation, "live", total, total, self._rate(total)))
        finally:
            building.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await building

    async def _catch_up(
        self,
        building: asyncio.Task[None],
        runner: ConsumerRunner,
        ends: Callable[[], Awaitable[Mapping[Place, int]]],
        model: GenerationalModel,
    ) -> None:
        """Until less than a batch is missing."""
        while True:
            if building.done():
                await building  # raises what ended it
                raise RuntimeError("the consumer of a rebuild ended by itself")
            total, done = sum((await ends()).values()), sum(runner.positions.values())
            near = bool(runner.positions) and total - done < self.settings.rebuild_batch
            self.report(
                Step(self.name, model.generation, "switching" if near else "building", done, total, self._rate(done))
            )
            if near:
                return
            await asyncio.wait({building}, timeout=0.25)

    def _rate(self, done: int) -> float:
        return round(max(0, done - self._first) / max(time.monotonic() - self._started, 0.001), 1)


async def _beside(building: asyncio.Task[None], work: Callable[[], object]) -> None:
    """Do blocking work in a thread while the builder goes on."""
    await asyncio.to_thread(work)
    if building.done():
        await building
