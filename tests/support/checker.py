"""The judge of a suite at rest: whether what was promised holds, from the store over the topics to read models and the lake.

Each invariant is a function that yields what violates it, in words, from evidence that was read before; so any fault test
can use it. Their numbers are those of the fault matrix:

I1 every acknowledged command's events are in the store, once · I2 every stored event is on its topic · I3 first deliveries
are in order, by stream without a hole and by key as in the log · I4 read models, scores and the lake are a pure fold of the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from analytics.read_models.lead_journey import BY_ITSELF
from kehu.events import Recorded
from kehu.events.envelope import CONTENT_TYPE
from kehu.eventstore import Cursor, LogRow
from kehu.kafka.topics import partition_of, topic_of
from support.scores import judge_scores
from support.suite import PRODUCERS, Suite

# The time zone of days and months.
CHINA = ZoneInfo("Asia/Shanghai")
# Violations of one invariant that are told; one fault can cause thousands.
MOST_TOLD = 8


@dataclass
class Acknowledged:
    """What clients were told that it is done.

    Args:
        leads: by the client's own name of the capture, the answer.
        behaviours: ids.
        imports: how many leads each import was told to have.
    """

    leads: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    behaviours: set[str] = field(default_factory=set)
    imports: dict[str, int] = field(default_factory=dict)


@dataclass
class Evidence:
    """What lies where, read when the suite was at rest."""

    log: dict[str, list[LogRow]]
    topic: dict[str, list[Any]]
    # The log, parsed.
    recorded: dict[str, list[Recorded]] = field(init=False)

    def __post_init__(self) -> None:
        self.recorded = {service: [row.recorded() for row in rows] for service, rows in self.log.items()}

    @classmethod
    def of(cls, suite: Suite) -> Evidence:
        services = [service for service in PRODUCERS if service in suite.names]
        return cls({s: suite.log(s) for s in services}, {s: suite.records(s) for s in services})

    @cached_property
    def events(self) -> list[Recorded]:
        """All stored events, service by service, each in the order of its log."""
        return [event for events in self.recorded.values() for event in events]


@dataclass
class Report:
    """What was found.

    Args:
        violations: by invariant.
        repeats: how many records are on a topic more than once.
        events: stored events, by type.
    """

    violations: dict[str, list[str]]
    repeats: dict[str, int]
    events: Counter[str]

    @property
    def sound(self) -> bool:
        return not any(self.violations.values())

    def __str__(self) -> str:
        lines = [f"{self.events.total()} events; repeats on topics: {self.repeats}"]
        lines += [f"{name}: {what}" for name, found in self.violations.items() for what in found]
        return "\n".join(lines)


def judge(
    suite: Suite, acknowledged: Acknowledged | None = None, scores_since: Mapping[str, int] | None = None
) -> Report:
    """Judge all that can be judged of this suite. It must be at rest (`Suite.settle`).

    Args:
        acknowledged: what clients were told; None when nobody kept it.
        scores_since: fold only the scores of customers who have events beyond these positions, by service; None folds all.
    """
    evidence = Evidence.of(suite)
    checks = invariants(suite, evidence, acknowledged or Acknowledged(), scores_since or {})
    violations = {name: list(islice(check(), MOST_TOLD)) for name, check in checks.items()}
    repeats = {topic_of(s): len(records) - len(evidence.log[s]) for s, records in evidence.topic.items()}
    return Report(violations, repeats, Counter(event.type for event in evidence.events))


def invariants(
    suite: Suite, evidence: Evidence, acknowledged: Acknowledged, scores_since: Mapping[str, int]
) -> dict[str, Callable[[], Iterator[str]]]:
    """What must hold, by name: each yields its violations when it is called."""
    checks: dict[str, Callable[[], Iterator[str]]] = {
        "I1 stored once": lambda: stored_once(evidence, acknowledged),
        "I2 I3 published in order": lambda: published(evidence),
        "I4 leads and customers": lambda: leads_and_customers(suite, evidence),
        "nothing is parked": lambda: nothing_parked(suite),
    }
    if "scoring" in suite.names:
        touched = {
            event.customer_id
            for service, events in evidence.recorded.items()
            for event in events
            if event.position > scores_since.get(service, 0)
        } | {None}  # models are nobody's
        intake, scoring = (
            [event for event in evidence.recorded[service] if event.customer_id in touched] for service in PRODUCERS
        )
        checks |= {
            "I4 scores": lambda: judge_scores(suite, intake, scoring),
            "I4 list of scores": lambda: score_list(suite, evidence),
        }
    if "analytics" in suite.names:
        checks |= {
            "I4 event counts": lambda: event_counts(suite, evidence),
            "I4 live counters": lambda: live_counters(suite, evidence),
            "I4 timeline": lambda: timeline(suite, evidence),
            "I4 journey": lambda: journey(suite, evidence),
            "I4 lake": lambda: lake(suite, evidence),
        }
    return checks


# I1 -------------------------------------------------------------------------------------------------------------------


def stored_once(evidence: Evidence, acknowledged: Acknowledged) -> Iterator[str]:
    """Each acknowledged capture and behaviour is one event, each import has the leads that its sender was told of, and
    nothing has a twin: no event, no customer number, no version of a stream."""
    captured = Counter(e.data["lead_id"] for e in evidence.events if e.type == "lead.captured.v1")
    merged = {e.data["lead_id"]: e.data["survivor_lead_id"] for e in evidence.events if e.type == "lead.merged.v1"}
    for name, answer in acknowledged.leads.items():
        lead = answer["lead_id"]
        if captured[lead] != 1:
            yield f"{name} was acknowledged as {lead}, which is stored {captured[lead]} times"
        if answer.get("survivor_lead_id") != merged.get(lead):
            yield f"{name} was told survivor {answer.get('survivor_lead_id')}, stored is {merged.get(lead)}"
    told = Counter(answer["lead_id"] for answer in acknowledged.leads.values())
    yield from (f"{count} captures were told the same lead {lead}" for lead, count in told.items() if count > 1)
    recorded = Counter(e.data["behaviour_id"] for e in evidence.events if e.type == "behaviour.recorded.v1")
    for behaviour in acknowledged.behaviours:
        if recorded[behaviour] != 1:
            yield f"behaviour {behaviour} was acknowledged and is stored {recorded[behaviour]} times"
    imported = Counter(e.data.get("import_id") for e in evidence.events if e.type == "lead.captured.v1")
    for name, count in acknowledged.imports.items():
        if imported[name] != count:
            yield f"import {name} was told to have {count} leads, and {imported[name]} are stored"
    ids = Counter(event.id for event in evidence.events)
    yield from (f"event {event} is stored {count} times" for event, count in ids.items() if count > 1)
    numbers = Counter(e.data["number"] for e in evidence.events if e.type == "customer.registered.v1")
    yield from (f"number {number} was given {count} times" for number, count in numbers.items() if count > 1)
    for service, rows in evidence.log.items():
        versions: dict[str, int] = {}
        for row in rows:
            if row.version != versions.get(row.stream, 0) + 1:
                yield f"{service}: {row.stream}@{row.version} follows version {versions.get(row.stream, 0)} in the log"
            versions[row.stream] = row.version


# I2, I3 ---------------------------------------------------------------------------------------------------------------


def published(evidence: Evidence) -> Iterator[str]:
    """Every stored event is on its topic byte for byte, under its key, and nothing else is; first deliveries are in order."""
    for service, records in evidence.topic.items():
        stored = {(row.stream, row.version): row for row in evidence.log[service]}
        versions: dict[str, int] = {}
        places: dict[bytes, Cursor] = {}
        for record in records:
            found = Recorded.from_bytes(record.value)
            row = stored.get((found.stream, found.version))
            if row is None or record.value != row.value():
                yield f"{topic_of(service)}/{record.partition}@{record.offset}: {found} is not what is stored"
                continue
            headers = dict(record.headers)
            if (
                headers.get("content-type") != CONTENT_TYPE.encode()
                or headers.get("cursor") != str(row.cursor).encode()
            ):
                yield f"{found} has the headers {headers}"
            if record.key != found.partition_key.encode() or record.partition != partition_of(record.key):
                yield f"{found} is in partition {record.partition} under key {record.key!r}"
            known = versions.get(found.stream, 0)
            if found.version <= known:
                continue  # a repeat; they are counted
            if found.version != known + 1:
                yield f"{found} comes after version {known}"
            versions[found.stream] = found.version
            if row.cursor < places.get(record.key, Cursor()):
                yield f"{found} comes after an event of its key that is later in the log"
            places[record.key] = row.cursor
        for (stream, version), row in stored.items():
            if versions.get(stream, 0) < version:
                yield f"{row.type} {stream}@{version} is not on {topic_of(service)}"


# I4: lead-intake and scoring -----------------------------------------------------------------------------------------


def leads_and_customers(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """The list of leads, and what captures look up, are folds of the log."""
    leads: dict[str, dict[str, Any]] = {}
    customers: dict[str, dict[str, Any]] = {}
    for event in evidence.recorded["lead-intake"]:
        data = event.data
        customer, lead = customers.get(data.get("customer_id", "")), leads.get(data.get("lead_id", ""))
        match event.type:
            case "customer.registered.v1":
                customers[data["customer_id"]] = {"number": data["number"], "open_lead": None}
            case "lead.captured.v1" if customer is not None:
                same = ("customer_id", "rating", "channel")
                leads[data["lead_id"]] = {"status": "open", "survivor": None, **{name: data[name] for name in same}}
                leads[data["lead_id"]]["version"] = event.version
                customer["open_lead"] = customer["open_lead"] or data["lead_id"]
            case "lead.merged.v1" if lead is not None:
                lead |= {"status": "merged", "survivor": data["survivor_lead_id"], "version": event.version}
            case "lead.rejected.v1" if lead is not None and customer is not None:
                lead |= {"status": "rejected", "version": event.version}
                customer["open_lead"] = None
            case "lead.details_updated.v1" if lead is not None:
                lead["version"] = event.version
    columns = ("customer_id", "status", "survivor", "rating", "channel", "version")
    listed = suite.rows(
        "lead-intake",
        "SELECT lead_id::text, customer_id, status, survivor::text, rating, channel, version FROM leads_v1",
    )
    found = {lead_id: dict(zip(columns, rest, strict=True)) for lead_id, *rest in listed}
    yield from differences("leads_v1", leads, found)
    known = suite.rows("lead-intake", "SELECT customer_id, number, open_lead::text FROM customers")
    found = {customer_id: {"number": number, "open_lead": lead_id} for customer_id, number, lead_id in known}
    yield from differences("customers", customers, found)


def score_list(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """The list of scores is the newest event of each lead."""
    expected: dict[str, tuple[Any, ...]] = {}
    qualified: dict[str, datetime] = {}
    for event in evidence.recorded["scoring"]:
        if event.type.startswith("lead_score."):
            data = event.data
            if event.type == "lead_score.lead_qualified.v1":
                qualified.setdefault(data["lead_id"], event.time)
            expected[data["lead_id"]] = (data["score"], data["band"], event.version, qualified.get(data["lead_id"]))
    listed = suite.rows("scoring", "SELECT lead_id::text, score::float8, band, version, qualified_at FROM scores_v1")
    yield from differences("scores_v1", expected, {lead: tuple(rest) for lead, *rest in listed})


# I4: analytics --------------------------------------------------------------------------------------------------------


def event_counts(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """Events by service, type and day."""
    expected = Counter((e.producer, e.type, _day(e.time)) for e in evidence.events)
    rows = suite.rows("analytics", "SELECT service, type, day, events FROM event_counts_v1")
    yield from differences("event_counts_v1", expected, {(s, t, day): events for s, t, day, events in rows})


def live_counters(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """Events by service, type, channel and day, as the stream worker counted them."""
    expected = Counter((e.producer, e.type, e.data.get("channel") or "", _day(e.time)) for e in evidence.events)
    rows = suite.rows(
        "analytics", "SELECT service, type, channel, bucket, events FROM live_counters WHERE span = 'day'"
    )
    yield from differences("live_counters", expected, {(s, t, c, _day(at)): events for s, t, c, at, events in rows})


def timeline(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """One entry for each event that names a customer."""
    expected = {
        (e.stream, e.version): (e.customer_id, e.type, str(e.id), e.time) for e in evidence.events if e.customer_id
    }
    rows = suite.rows(
        "analytics",
        "SELECT stream, version, customer_id::text, type, event_id::text, time FROM customer_timeline_v1",
    )
    yield from differences("customer_timeline_v1", expected, {(s, v): tuple(rest) for s, v, *rest in rows})


def journey(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """The way of each lead: captured, qualified, merged, rejected, and the newest score that it earned."""
    expected: dict[str, dict[str, Any]] = {}
    for event in evidence.events:
        data = event.data
        if event.type not in _OF_JOURNEY:
            continue
        lead = expected.setdefault(data["lead_id"], {})
        match event.type:
            case "lead.captured.v1":
                lead |= {
                    "captured_at": event.time,
                    "channel": data["channel"],
                    "month": _day(event.time).replace(day=1),
                }
            case "lead.merged.v1":
                lead |= {"merged_into": data["survivor_lead_id"]}
            case "lead.rejected.v1":
                lead |= {"rejected_at": event.time}
            case "lead_score.lead_qualified.v1":
                lead |= {"qualified_at": event.time}
            case "lead_score.changed.v1" if data["cause"] not in BY_ITSELF:
                lead |= {"score": data["score"], "scored_version": event.version}
    columns = (
        "captured_at",
        "channel",
        "month",
        "merged_into",
        "rejected_at",
        "qualified_at",
        "score",
        "scored_version",
    )
    rows = suite.rows(
        "analytics",
        "SELECT lead_id::text, captured_at, channel, month, merged_into::text, rejected_at, qualified_at, score,"
        " scored_version FROM lead_journey_v1",
    )
    yield from differences(
        "lead_journey_v1",
        {lead: tuple(values.get(column) for column in columns) for lead, values in expected.items()},
        {lead: tuple(rest) for lead, *rest in rows},
    )


_OF_JOURNEY = frozenset(
    ("lead.captured.v1", "lead.merged.v1", "lead.rejected.v1", "lead_score.lead_qualified.v1", "lead_score.changed.v1")
)


def lake(suite: Suite, evidence: Evidence) -> Iterator[str]:
    """Every event is one row of the lake, with its data."""
    expected = {str(e.id): (e.type, e.stream, e.version, _micros(e.time), e.data) for e in evidence.events}
    table = suite.lake().sql('SELECT id, type, subject, streamversion, epoch_us("time"), data FROM events')
    found: dict[str, tuple[Any, ...]] = {}
    for event_id, type_, stream, version, at, data in zip(*(c.to_pylist() for c in table.columns), strict=True):
        if event_id in found:
            yield f"event {event_id} is in the lake twice"
        found[event_id] = (type_, stream, version, at, orjson.loads(data))
    yield from differences("lake", expected, found)


def nothing_parked(suite: Suite) -> Iterator[str]:
    """No event waits for a person."""
    for service in suite.names:
        for consumer, stream, version, error in suite.rows(
            service, "SELECT consumer, stream, version, error FROM parked_events WHERE status IN ('waiting', 'behind')"
        ):
            yield f"{consumer} parked {stream}@{version}: {error}"


def differences(name: str, expected: Mapping[Any, Any], found: Mapping[Any, Any]) -> Iterator[str]:
    """Where two tables differ, by key."""
    for key, value in expected.items():
        if key not in found:
            yield f"{name}: {key} is missing, expected {value}"
        elif found[key] != value:
            yield f"{name}: {key} is {found[key]}, expected {value}"
    yield from (
        f"{name}: {key} is {value}, and nobody expects it" for key, value in found.items() if key not in expected
    )


def _day(at: datetime) -> date:
    return at.astimezone(CHINA).date()


def _micros(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
