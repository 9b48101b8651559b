"""The demonstration: real contacts go through the suite over HTTP, and what comes out is checked against the file.

The development clock moves along with the data, so that scores fade and timers fire as they would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from typing import Any, Protocol

import httpx

from kehu.clock import DevelopmentClock
from kehu.demo import bank
from kehu.ids import derived

# The clock is moved this many times: often enough that scores fade between contacts, seldom enough to be quick.
STEPS = 150
_BATCH_SECONDS = 120.0


class DemoError(RuntimeError):
    """The suite did not take the data, or came to other counts than the file."""


class Where(Protocol):
    """The running suite: a Supervisor or a Stack."""

    def url(self, service: str) -> str:
        """Base URL of a service's API."""
        ...

    def token(self, *roles: str) -> str:
        """A bearer token."""
        ...


@dataclass(frozen=True)
class Difference:
    """A count that is not what the file says."""

    what: str
    expected: int
    found: int


@dataclass
class Demo:
    """One run.

    Args:
        where: the running suite.
        clock: its development clock.
        contacts: in order of date.
    """

    where: Where
    clock: DevelopmentClock
    contacts: Sequence[bank.BankContact]
    lead_ids: dict[int, str] = field(default_factory=dict)
    customer_ids: dict[int, str] = field(default_factory=dict)
    behaviours: int = 0

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.where.token()}"}
        self._clients = {
            name: httpx.Client(base_url=self.where.url(name), headers=headers, timeout=_BATCH_SECONDS)
            for name in ("lead-intake", "scoring", "analytics")
        }

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    # --- what goes in -------------------------------------------------------------------------------------------------

    def teach(self) -> None:
        """Move the clock to the beginning, define the channels, publish the scoring model."""
        self.clock.set(_morning(self.contacts[0]))
        for channel, (title, kind) in bank.CHANNELS.items():
            self._ask("lead-intake", "PUT", f"/channels/{channel}", json={"title": title, "kind": kind})
        self._ask("scoring", "POST", "/models", json=bank.model())

    def feed(self, progress: Callable[[int], None]) -> None:
        """Send every contact with its behaviours, in order of date.

        Args:
            progress: told how many contacts were taken, after each step.
        """
        for number, chunk in enumerate(self._chunks()):
            self.clock.set(datetime.combine(chunk[-1].day, time_of_day(16, 0, tzinfo=UTC)))
            self._capture(chunk, number)
            self._behave(chunk, number)
            progress(len(chunk))

    def _chunks(self) -> Iterator[list[bank.BankContact]]:
        """Whole days, joined until they are large enough."""
        least = max(1, len(self.contacts) // STEPS)
        chunk: list[bank.BankContact] = []
        for _, day in bank.by_day(self.contacts):
            chunk += day
            if len(chunk) >= least:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _capture(self, chunk: Sequence[bank.BankContact], number: int) -> None:
        for line in self._file("/imports", [bank.lead_row(contact) for contact in chunk], f"leads-{number}"):
            if "row" in line:
                contact = chunk[line["row"] - 1]
                if "lead_id" not in line:
                    raise DemoError(f"contact {contact.number} was not taken: {line}")
                self.lead_ids[contact.number] = line["lead_id"]
                self.customer_ids[contact.number] = line["customer_id"]

    def _behave(self, chunk: Sequence[bank.BankContact], number: int) -> None:
        rows = [row for contact in chunk for row in bank.behaviours(contact, self.lead_ids[contact.number])]
        for line in self._file("/behaviours/import", rows, f"behaviours-{number}"):
            if line.get("outcome") == "refused":
                raise DemoError(f"a behaviour was refused: {line}")
        self.behaviours += len(rows)

    def _file(self, path: str, rows: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
        """Send rows as NDJSON and give the outcome lines. Safe to send again: the key names the step."""
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        key = str(derived("demo", name, len(self.contacts), self.clock.path))
        headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": key}
        response = self._ask("lead-intake", "POST", path, content=content.encode(), headers=headers)
        lines = [json.loads(line) for line in response.text.splitlines()]
        if not lines or not lines[-1].get("summary", {}).get("complete"):
            raise DemoError(f"{path} broke off: {lines[-1:]}")
        return lines

    # --- what comes out -----------------------------------------------------------------------------------------------

    def settle(self, deadline: float, progress: Callable[[str], None]) -> None:
        """Wait until every reader has handled what was sent.

        Args:
            deadline: seconds.
            progress: told what is waited for.

        Raises:
            DemoError: it did not, with what is still behind.
        """
        end = time.monotonic() + deadline
        wanted = {
            "lead.captured.v1": len(self.contacts),
            "behaviour.recorded.v1": self.behaviours,
        }
        quiet, before = 0, -1
        while True:
            counts = self.counts_by_type()
            lag = {p["name"]: p["lag"] for p in self.projections() if p["state"] == "live"}
            total = sum(counts.values())
            behind = [f"{name}: {lag[name]} events" for name in lag if lag[name] != 0]
            behind += [f"{n - counts.get(t, 0)} {t}" for t, n in wanted.items() if counts.get(t, 0) < n]
            # Nothing more has come for a while: scores and timers have caught up too.
            quiet = quiet + 1 if not behind and total == before else 0
            if quiet >= 8:
                return
            before = total
            progress("; ".join(behind) if behind else "the last scores")
            if time.monotonic() > end:
                raise DemoError(f"not finished after {deadline:g} s: {'; '.join(behind) or 'events still come'}")
            time.sleep(0.25)

    def projections(self) -> list[dict[str, Any]]:
        """How far each reader of the topics is."""
        found: list[dict[str, Any]] = self._get("analytics", "/projections")["items"]
        return found

    def counts(self) -> list[dict[str, Any]]:
        """Events by day, service and type."""
        first = (self.contacts[0].day - timedelta(days=900)).isoformat()
        items: list[dict[str, Any]] = []
        for year in range(int(first[:4]), self.contacts[-1].day.year + 2):
            window = {"first": f"{year}-01-01", "last": f"{year}-12-31"}
            for service in ("lead-intake", "scoring"):
                answer = self._get("analytics", "/counts", **window, service=service)
                if not answer["complete"]:
                    raise DemoError(f"more counts of {year} than one answer takes")
                items += answer["items"]
        return items

    def counts_by_type(self) -> dict[str, int]:
        """Events by type."""
        found: dict[str, int] = {}
        for item in self.counts():
            found[item["type"]] = found.get(item["type"], 0) + item["events"]
        return found

    def funnel(self, *steps: str, by: str | None = None) -> dict[str, Any]:
        """A funnel over the lake. A contact's calls are all on the day of its capture, so a day is the natural window."""
        return self._get("analytics", "/funnel", step=list(steps), window="1d", **({"by": by} if by else {}))

    def conversion(self, by: str) -> list[dict[str, Any]]:
        """How the leads of each group fared."""
        found: list[dict[str, Any]] = self._get("analytics", f"/conversion/by-{by}")["items"]
        return found

    def interesting(self) -> bank.BankContact:
        """A contact whose story is worth showing: called before, with an offer taken, and the highest score then."""
        told = [c for c in self.contacts if c.accepted and c.days_since is not None] or list(self.contacts)
        return max(told, key=lambda c: (c.outcome_before == "success", c.calls <= 6, c.calls, -c.number))

    def timeline(self, contact: bank.BankContact) -> list[dict[str, Any]]:
        """What happened to the customer, the oldest first."""
        answer = self._get("analytics", f"/customers/{self.customer_ids[contact.number]}/timeline", limit=100)
        items: list[dict[str, Any]] = answer["items"]
        return items[::-1]

    def explanation(self, contact: bank.BankContact, at: datetime | None = None) -> dict[str, Any]:
        """Why its score is what it is, at an instant of business time."""
        return self._get(
            "scoring", f"/leads/{self.lead_ids[contact.number]}/score", **({"until": at.isoformat()} if at else {})
        )

    def differences(self) -> list[Difference]:
        """Every count that the suite and the file do not agree on."""
        wanted = bank.expected(self.contacts)
        types = self.counts_by_type()
        channels = {g["group"]: g for g in self.conversion("channel")}
        months = {str(g["group"])[:7]: g for g in self.conversion("month")}
        checks = [
            ("leads captured", wanted.leads, types.get("lead.captured.v1", 0)),
            ("customers registered", wanted.leads, types.get("customer.registered.v1", 0)),
            ("behaviours recorded", sum(wanted.behaviours.values()), types.get("behaviour.recorded.v1", 0)),
            *((f"leads by {c}", n, channels.get(c, {}).get("leads", 0)) for c, n in wanted.by_channel.items()),
            *((f"leads of {m}", n, months.get(m, {}).get("leads", 0)) for m, n in wanted.by_month.items()),
            *(
                (f"offers taken by {c}", n, channels.get(c, {}).get("converted", 0))
                for c, n in wanted.accepted_by_channel.items()
            ),
            *(
                (f"offers taken of {m}", n, months.get(m, {}).get("converted", 0))
                for m, n in wanted.accepted_by_month.items()
            ),
            ("offers taken, funnel", wanted.accepted, self.funnel("captured", "converted")["steps"][-1]["reached"]),
        ]
        return [Difference(what, expected, found) for what, expected, found in checks if expected != found]

    # --- calls --------------------------------------------------------------------------------------------------------

    def _get(self, of: str, path: str, /, **query: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(of, "GET", path, params=query).json()
        return found

    def _ask(self, service: str, method: str, path: str, **more: Any) -> httpx.Response:
        response = self._clients[service].request(method, path, **more)
        if response.is_error:
            raise DemoError(f"{service} {method} {path}: {response.status_code} {response.text[:500]}")
        return response


def _morning(contact: bank.BankContact) -> datetime:
    return datetime.combine(contact.day, time_of_day(0, 0, tzinfo=UTC))
