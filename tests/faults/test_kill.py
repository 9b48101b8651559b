"""kill -9 of every process, of the broker and of the database, in the middle of an import, and pauses that outlast a lease:
nothing is lost, nothing is done twice, order holds, every number is exact, and nobody has to help."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from analytics.read_models.generations import progress_name
from analytics.subscriptions import LIVE_COUNTERS
from kehu.devstack.base import free_port
from kehu.eventstore import LogRow
from kehu.supervisor import get
from support import checker
from support.checker import Acknowledged, Evidence, Report, judge
from support.people import FITTING, People
from support.suite import Offsets, Suite, key
from support.traffic import Traffic
from support.waiting import until

pytestmark = [pytest.mark.timeout(900), pytest.mark.req("DC-03")]

ROWS = 1_500
# People of one test are not those of another.
SEEDS = itertools.count()


@pytest.fixture(scope="module")
def acknowledged() -> Acknowledged:
    """What clients were told, by all tests of the module."""
    return Acknowledged()


class Scenario:
    """Traffic on the suite, and the judgement when it is over."""

    def __init__(self, suite: Suite, acknowledged: Acknowledged) -> None:
        self.suite, self._acknowledged = suite, acknowledged
        self.traffic = Traffic(suite, next(SEEDS), ROWS, acknowledged)
        self._positions = suite.positions()
        self._restarts = {process.name: process.restarts for process in suite.supervisor.processes}
        self._began = time.monotonic()

    def moves(self, progress: Callable[[], int], what: str) -> None:
        """Wait until something makes progress, while the import is under way."""
        before = progress()
        until(lambda: progress() > before, f"{what} makes progress", step=0.01)
        assert self.traffic.file.running, "the import was over too soon"

    def sound(self) -> Report:
        """Wait until all is at rest, without helping, and judge it."""
        self.suite.settle()
        settled = time.monotonic() - self._began
        report = judge(self.suite, self._acknowledged, self._positions)
        assert report.sound, f"{report}{self.suite.told()}"
        now = {process.name: process.restarts for process in self.suite.supervisor.processes}
        fell = {name: count - self._restarts[name] for name, count in now.items() if count > self._restarts[name]}
        print(f"at rest after {settled:.1f} s; restarted: {fell}; {report}")
        return report


@pytest.fixture
def scenario(suite: Suite, acknowledged: Acknowledged) -> Scenario:
    return Scenario(suite, acknowledged)


def progress_of(suite: Suite, service: str, role: str) -> Callable[[], int]:
    """How much a process has done, as a number that grows while it works."""

    def position(cursor: str) -> Callable[[], int]:
        return lambda: int(
            suite.value(service, "SELECT coalesce(max(position), 0) FROM cursors WHERE name = %s", (cursor,))
        )

    def handled(consumer: str) -> Callable[[], int]:
        return lambda: sum(suite.offsets(service, consumer).values())

    return {
        "lead-intake/api": lambda: int(suite.value(service, "SELECT count(*) FROM commands")),
        "lead-intake/relay": lambda: sum(suite.ends("lead-intake").values()),
        "lead-intake/projector": position("leads_v1"),
        "scoring/consumer": handled("crm.scoring.scores"),
        "scoring/relay": lambda: sum(suite.ends("scoring").values()),
        "scoring/projector": position("scores_v1"),
        "analytics/consumer": handled(progress_name("event_counts", 1)),
        "analytics/stream": handled(LIVE_COUNTERS),
        "analytics/lake": lambda: sum(suite.lake_offsets().values()),
    }[f"{service}/{role}"]


def test_the_judge_sees_what_is_wrong(suite: Suite) -> None:
    """Each invariant is violated when the log is not what the rest of the suite was made of."""
    crowd = {"leads": [People(96).lead(channel="expo", **FITTING) for _ in range(2)]}
    suite.client("lead-intake", "sales").post("/leads/batch", json=crowd, headers=key()).raise_for_status()
    suite.settle()
    evidence = Evidence.of(suite)
    whole = checker.invariants(suite, evidence, Acknowledged(), {})
    assert all(not list(check()) for check in whole.values())

    last = {"lead-intake": "lead.captured.v1", "scoring": "lead_score.changed.v1"}
    less = Evidence({name: without(rows, last[name]) for name, rows in evidence.log.items()}, evidence.topic)
    lost = Acknowledged(leads={"a capture": {"lead_id": "never stored"}})
    found = {name: list(check()) for name, check in checker.invariants(suite, less, lost, {}).items()}
    assert [name for name, violations in found.items() if not violations] == ["nothing is parked"]

    records = evidence.topic["lead-intake"]
    n = next(n for n, record in enumerate(records[1:], 1) if record.key == records[n - 1].key)
    for broken in (
        [*records[:n], *records[n + 1 :]],
        [*records[: n - 1], records[n], records[n - 1], *records[n + 1 :]],
        [*records[:n], replaced(records[n]), *records[n + 1 :]],
    ):
        assert list(checker.published(Evidence(evidence.log, {**evidence.topic, "lead-intake": broken})))
    repeated = Evidence(evidence.log, {**evidence.topic, "lead-intake": [*records, records[n]]})
    assert not list(checker.published(repeated))


@pytest.mark.parametrize(
    ("service", "role", "kills"),
    [
        ("lead-intake", "api", 3),
        ("lead-intake", "relay", 3),
        ("lead-intake", "projector", 2),
        ("scoring", "consumer", 1),
        ("scoring", "relay", 3),
        ("scoring", "projector", 2),
        ("analytics", "consumer", 1),
        ("analytics", "stream", 1),
        ("analytics", "lake", 2),
    ],
)
def test_a_process_is_killed(suite: Suite, scenario: Scenario, service: str, role: str, kills: int) -> None:
    victim, progress = suite.process(service, role), progress_of(suite, service, role)
    restarts = victim.restarts
    with scenario.traffic.flowing():
        for _ in range(kills):
            scenario.moves(progress, victim.name)
            victim.kill()
    report = scenario.sound()
    assert victim.restarts == restarts + kills, "it was killed as often, and it fell by nothing else"
    assert not any(report.repeats.values()), "a relay that is killed goes on behind what had landed"


def test_all_processes_are_killed_at_once(suite: Suite, scenario: Scenario) -> None:
    before = {process.name: process.restarts for process in suite.supervisor.processes}
    with scenario.traffic.flowing():
        scenario.moves(lambda: scenario.traffic.acknowledged, "the import")
        for process in suite.supervisor.processes:
            process.kill()
    scenario.sound()
    assert all(process.restarts > before[process.name] for process in suite.supervisor.processes)


@pytest.mark.req("SC-07")
def test_the_timers_are_killed_while_many_fire(suite: Suite, scenario: Scenario) -> None:
    """A thousand scores fade at once; those of a killed batch fire when its claim has run out."""
    ripen(suite, 1_000)
    suite.settle()
    clock, victim = suite.clock, suite.process("scoring", "timer")

    def due() -> int:
        return int(suite.value("scoring", "SELECT count(*) FROM timers WHERE due_at <= %s", (clock.now(),)))

    with scenario.traffic.flowing():
        clock.advance(timedelta(days=365))
        most = due()
        assert most >= 1_000
        until(lambda: due() < most, "timers fire", step=0.001)
        victim.kill()
        assert due() > 0, "all timers had fired before the process was killed"
    scenario.sound()


def test_the_broker_is_killed(suite: Suite, scenario: Scenario) -> None:
    """Meanwhile captures are taken as ever: the log is the outbox."""
    with scenario.traffic.flowing():
        for _ in range(2):
            scenario.moves(lambda: sum(suite.ends("lead-intake").values()), "the topic")
            suite.stack.kafka.kill()
            taken = scenario.traffic.acknowledged
            until(lambda: scenario.traffic.acknowledged >= taken + 50, "captures are taken")  # noqa: B023 - waited for here
            suite.stack.kafka.start()
    scenario.sound()


def test_the_database_is_killed(suite: Suite, scenario: Scenario) -> None:
    with scenario.traffic.flowing():
        for _ in range(2):
            scenario.moves(lambda: scenario.traffic.acknowledged, "the import")
            suite.stack.postgres.kill()
            suite.stack.postgres.start()
    scenario.sound()


def test_a_relay_is_paused_beyond_its_lease(suite: Suite, scenario: Scenario) -> None:
    """The standby takes over; the woken leader notices that it is none any more, ends, and comes back as the standby."""
    first, progress = suite.process("lead-intake", "relay"), progress_of(suite, "lead-intake", "relay")
    with another(suite, "lead-intake", "relay"):
        with scenario.traffic.flowing():
            scenario.moves(progress, first.name)
            epoch, restarts = _epoch(suite), first.restarts
            first.pause()
            until(lambda: _epoch(suite) > epoch, "the standby takes over")
            scenario.moves(progress, "the standby")
            first.resume()
            until(lambda: first.restarts == restarts + 1, "the woken leader ends")
        scenario.sound()
        epoch = _epoch(suite)
    until(lambda: _epoch(suite) > epoch, "the first one leads again")
    once_more(suite)


def test_a_consumer_is_paused_beyond_its_session(suite: Suite, scenario: Scenario) -> None:
    """Another process takes its partitions over; what the woken one still has in hand is refused."""
    first, progress = suite.process("scoring", "consumer"), progress_of(suite, "scoring", "consumer")
    with another(suite, "scoring", "consumer"):
        with scenario.traffic.flowing():
            scenario.moves(progress, first.name)
            first.pause()
            places = suite.offsets("scoring", "crm.scoring.scores")
            until(lambda: _moved(suite, places), "the other one handles every partition")
            first.resume()
        scenario.sound()
    once_more(suite)


def once_more(suite: Suite) -> None:
    """After the other process ended in order, the first one carries on alone."""
    person = People(97).lead(channel="expo", **FITTING)
    suite.client("lead-intake", "sales").post("/leads", json=person, headers=key()).raise_for_status()
    suite.settle()


def _moved(suite: Suite, places: Offsets) -> bool:
    """Whether a consumer came further on every partition."""
    now = suite.offsets("scoring", "crm.scoring.scores")
    return all(now[place] > offset for place, offset in places.items())


def _epoch(suite: Suite) -> int:
    """How often the relay's lease changed hands."""
    return int(suite.value("lead-intake", "SELECT epoch FROM leases WHERE name = 'relay:crm.lead-intake.events'"))


def test_after_all_that_everything_is_right(suite: Suite, acknowledged: Acknowledged) -> None:
    """Nothing that was right once was spoilt later: all scores are folded again, from the first event on."""
    suite.settle()
    report = judge(suite, acknowledged)
    assert report.sound, str(report)


@contextmanager
def another(suite: Suite, service: str, role: str) -> Iterator[None]:
    """A second process of a role, started by hand and ended in order."""
    spec, port = next(spec for spec in suite.services if spec.name == service), free_port()
    log = suite.home / "state" / "logs" / f"{service}-{role}-2.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", spec.package, role],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=suite.supervisor.environment(spec, port, api=False),
        )
    try:
        until(lambda: get(f"http://127.0.0.1:{port}/readyz"), "the second process is ready")
        yield
        process.terminate()
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ripen(suite: Suite, count: int) -> None:
    """Leads whose scores are warm and fade: each has a timer."""
    intake, people = suite.client("lead-intake", "admin"), People(98)
    for start in range(0, count, 1_000):
        body = {"leads": [people.lead(channel="expo", **FITTING) for _ in range(min(1_000, count - start))]}
        taken = intake.post("/leads/batch", json=body).raise_for_status().json()["items"]
        for _ in range(2):
            did = [{"kind": "demo_attended", "lead_id": item["result"]["lead_id"]} for item in taken]
            answer = intake.post("/behaviours", json={"behaviours": did}).raise_for_status().json()
            assert answer["summary"]["captured"] == len(taken)


def without(rows: list[LogRow], type_: str) -> list[LogRow]:
    """All but the last one of this type."""
    index = max(n for n, row in enumerate(rows) if row.type == type_)
    return rows[:index] + rows[index + 1 :]


def replaced(record: Any) -> Any:
    """A record with another event id."""
    event = json.loads(record.value)
    return dataclasses.replace(record, value=json.dumps({**event, "id": str(uuid4())}).encode())
