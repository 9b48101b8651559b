"""A whole suite for a test: servers of its own, every role a real process. Spoken to by HTTP; its insides are read only to judge."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, LiteralString, TypeVar
from uuid import uuid4

import httpx
import psycopg
from aiokafka import AIOKafkaConsumer, TopicPartition

from analytics.read_models.generations import progress_name
from analytics.subscriptions import LIVE_COUNTERS
from kehu.clock import DevelopmentClock
from kehu.devstack import DevStack, database_url
from kehu.eventstore import LogRow
from kehu.kafka.topics import topic_of
from kehu.lake import Lake, LakeMissing
from kehu.supervisor import SUITE, Process, ServiceSpec, Supervisor
from kehu.testing.kafka import read_topic
from support.waiting import DEADLINE, until

# Those that write events; scoring follows lead-intake, and analytics follows both.
PRODUCERS = ("lead-intake", "scoring")
# Servers of somebody else cannot be killed, and the topics of a suite have fixed names: a test starts its own.
_ELSEWHERE = ("KEHU_POSTGRES_URL", "KEHU_KAFKA_BOOTSTRAP")
# The lake writes small files soon, so that a test need not wait a minute for each.
ENVIRONMENT = {"KEHU_LAKE_FLUSH_SECONDS": "0.5", "KEHU_LAKE_FLUSH_EVENTS": "1000"}

Offsets = dict[tuple[str, int], int]
T = TypeVar("T")


class Suite:
    """The processes of a suite on servers of their own.

    Args:
        home: directory for state, logs, lake and temporary files.
        services: which of them run.
        env: more environment variables for all processes.
    """

    def __init__(
        self, home: Path, services: Sequence[ServiceSpec] = SUITE, env: Mapping[str, str] | None = None
    ) -> None:
        self.home, self.services = home, tuple(services)
        self.names = tuple(spec.name for spec in services)
        self._env = {**ENVIRONMENT, "TMPDIR": str(home / "tmp"), **(env or {})}
        self.stack = DevStack()
        self.supervisor: Supervisor
        self._clients: list[httpx.Client] = []
        self._questions = asyncio.Runner()

    # --- its life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Suite:
        (self.home / "tmp").mkdir(parents=True, exist_ok=True)
        try:
            with _without(_ELSEWHERE):
                address = self.stack.start()
            self.supervisor = Supervisor(address, self.home / "state", self.services, env=self._env)
            self.supervisor.start(deadline=DEADLINE)
            self.supervisor.wait_ready(DEADLINE)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self._questions.close()
        if hasattr(self, "supervisor"):
            self.supervisor.stop()
        self.stack.stop()

    def process(self, service: str, role: str) -> Process:
        """The process that runs a role."""
        return self.supervisor.process(service, role)

    # --- from outside -------------------------------------------------------------------------------------------------

    def client(self, service: str, *roles: str, subject: str = "tester") -> httpx.Client:
        """A client of a service's API with a token of these roles, of all but `system` when none is named."""
        token = self.supervisor.token(*roles, subject=subject)
        made = httpx.Client(
            base_url=self.supervisor.url(service), headers={"Authorization": f"Bearer {token}"}, timeout=60
        )
        self._clients.append(made)
        return made

    def define_channel(self, code: str, kind: str = "referral") -> None:
        """Add a channel to the catalogue."""
        with httpx.Client(base_url=self.supervisor.url("lead-intake"), timeout=60) as client:
            headers = {"Authorization": f"Bearer {self.supervisor.token('admin')}"}
            body = {"title": f"渠道 {code}", "kind": kind}
            client.put(f"/channels/{code}", json=body, headers=headers).raise_for_status()

    def restart(self) -> None:
        """End every process in order (SIGTERM), all at the same time, and start them again."""
        with ThreadPoolExecutor(len(self.supervisor.processes)) as threads:
            list(threads.map(Process.restart, self.supervisor.processes))
        self.supervisor.wait_ready(DEADLINE)

    @property
    def clock(self) -> DevelopmentClock:
        """Business time of all processes."""
        return DevelopmentClock(self.supervisor.clock_file)

    # --- insides, to judge --------------------------------------------------------------------------------------------

    def rows(self, service: str, sql: LiteralString, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The answer of a service's database."""
        name = f"kehu_{service.replace('-', '_')}"
        url = database_url(self.stack.address.postgres_url, name)
        with psycopg.connect(url, autocommit=True, connect_timeout=10, options="-c timezone=UTC") as connection:
            return connection.execute(sql, parameters).fetchall()

    def value(self, service: str, sql: LiteralString, parameters: Sequence[Any] = ()) -> Any:
        """The first value of the answer."""
        return self.rows(service, sql, parameters)[0][0]

    def log(self, service: str) -> list[LogRow]:
        """All stored events of a service in the order of its log."""
        rows = self.rows(
            service,
            "SELECT txid::text::bigint, notification_id, originator_id, originator_version, topic, state"
            " FROM stored_events ORDER BY txid, notification_id",
        )
        return [LogRow(*row) for row in rows]

    def positions(self) -> dict[str, int]:
        """The highest position in each log."""
        question: LiteralString = "SELECT coalesce(max(notification_id), 0) FROM stored_events"
        return {service: int(self.value(service, question)) for service in PRODUCERS if service in self.names}

    def records(self, service: str) -> list[Any]:
        """Everything on a service's topic, each partition in its order."""
        return self._ask(lambda: read_topic(self.stack.address.kafka_bootstrap, topic_of(service), DEADLINE))

    def ends(self, service: str) -> Offsets:
        """The end of each partition of a service's topic that holds anything."""

        async def ask() -> Offsets:
            consumer = AIOKafkaConsumer(bootstrap_servers=self.stack.address.kafka_bootstrap)
            await consumer.start()
            try:
                partitions = [TopicPartition(topic_of(service), p) for p in range(12)]
                ends = await consumer.end_offsets(partitions)
                return {(tp.topic, tp.partition): end for tp, end in ends.items() if end}
            finally:
                await consumer.stop()

        return self._ask(ask)

    def offsets(self, service: str, consumer: str) -> Offsets:
        """How far a consumer has come on each partition."""
        rows = self.rows(
            service, "SELECT topic, partition, next_offset FROM consumer_offsets WHERE consumer = %s", (consumer,)
        )
        return {(topic, partition): offset for topic, partition, offset in rows}

    @property
    def lake_path(self) -> Path:
        """Where the lake lies."""
        return self.supervisor.state_dir / "lake"

    def lake(self) -> Lake:
        """The event lake."""
        return Lake(self.lake_path, threads=1)

    def lake_offsets(self) -> Offsets:
        """How far the lake has come; nothing before its first commit."""
        try:
            return self.lake().offsets()
        except LakeMissing:
            return {}

    def analytics_consumers(self) -> list[str]:
        """Everybody in analytics who keeps progress in its database."""
        live = self.rows("analytics", "SELECT name, generation FROM projections ORDER BY name")
        return [*(progress_name(name, generation) for name, generation in live), LIVE_COUNTERS]

    def behind(self) -> list[str]:
        """What is still on its way, from the store to the last reader. Empty when all is handled and nobody sends anything.

        Asked in the order in which events flow: who is done stays done, since nothing comes after that.
        """
        found: list[str] = []
        ends: Offsets = {}
        for service in PRODUCERS:
            if service not in self.names:
                continue
            if service == "scoring":
                found += _lag("crm.scoring.scores", self.offsets("scoring", "crm.scoring.scores"), ends)
                due = self.value("scoring", "SELECT count(*) FROM timers WHERE due_at <= %s", (self.clock.now(),))
                found += [f"{due} timers are due"] if due else []
                found += self._rescoring()
            found += self._followers(service)
            ends |= self.ends(service)
        if "analytics" in self.names:
            for consumer in self.analytics_consumers():
                found += _lag(consumer, self.offsets("analytics", consumer), ends)
            found += _lag("the lake", self.lake_offsets(), ends)
        return found

    def settle(self, deadline: float = DEADLINE) -> None:
        """Wait until all that was sent is handled by everybody."""
        last: list[str] = []

        def settled() -> bool:
            nonlocal last
            try:
                last = self.behind()
            except (psycopg.OperationalError, OSError) as error:
                last = [f"cannot be asked: {error}"]
            return not last

        until(settled, lambda: "; ".join(last) + self.told(), deadline, 0.1)

    def told(self) -> str:
        """What each process logged last above `info`, for the message of a failed test."""
        lines = []
        for process in self.supervisor.processes:
            loud = [line for line in process.log_tail(300).splitlines() if '"level": "info"' not in line]
            lines += [f"\n{process.name} (restarts {process.restarts}): {line[:500]}" for line in loud[-3:]]
        return "".join(lines)

    def _followers(self, service: str) -> list[str]:
        newest = self.rows(
            service,
            "SELECT txid::text::bigint, notification_id FROM stored_events ORDER BY txid DESC, notification_id DESC LIMIT 1",
        )
        places = {
            name: (txid, position)
            for name, txid, position in self.rows(service, "SELECT name, txid::text::bigint, position FROM cursors")
        }
        followers = (f"relay:{topic_of(service)}", {"lead-intake": "leads_v1", "scoring": "scores_v1"}[service])
        return [
            f"{name} is at {places.get(name)}, the log at {newest[0]}"
            for name in followers
            if newest and places.get(name) != newest[0]
        ]

    def _rescoring(self) -> list[str]:
        left = self.value(
            "scoring",
            "SELECT count(*) FROM leads WHERE closed_at IS NULL AND model_version > 0"
            " AND model_version < (SELECT max(version) FROM scoring_models)",
        )
        return [f"{left} leads have a score of an older model"] if left else []

    def _ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._questions.run(question())


def _lag(consumer: str, offsets: Offsets, ends: Offsets) -> list[str]:
    """How many records a reader has still to handle, when there are any."""
    lag = sum(max(0, end - offsets.get(place, 0)) for place, end in ends.items())
    return [f"{consumer} is {lag} records behind"] if lag else []


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def key() -> dict[str, str]:
    """A fresh Idempotency-Key, as a header."""
    return {"Idempotency-Key": str(uuid4())}
