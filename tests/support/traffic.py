"""Clients as they should be: each sends what it has with an id, and again with the same id until it is answered."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx

from support.checker import Acknowledged
from support.people import EAGER, People
from support.suite import Suite
from support.waiting import DEADLINE

# Answers after which a client comes again with the same key.
AGAIN = (500, 502, 503)


class Unanswered(AssertionError):
    """A client did not get a final answer in time."""


def insist(call: Callable[[], httpx.Response], deadline: float = DEADLINE) -> httpx.Response:
    """Send a request again and again while there is no answer, or one that says to come again."""
    end, pause, last = time.monotonic() + deadline, threading.Event(), ""
    while time.monotonic() < end:
        try:
            response = call()
            if response.status_code not in AGAIN:
                return response
            last = response.text
        except httpx.TransportError as error:
            last = repr(error)
        pause.wait(0.1)
    raise Unanswered(f"no answer in {deadline:g} s: {last[:500]}")


class Import:
    """A file of leads on its way, from a thread: sent slowly, and again with the same key until the summary says complete.

    Args:
        rows: JSON lines.
        pause: seconds between two pieces of 50 rows: a file that takes long enough for something to happen meanwhile.
        hold_at: the row before which the first sending stops until `go_on`; so what happens before is in the middle of it.
    """

    PIECE = 50

    def __init__(self, suite: Suite, rows: Sequence[bytes], *, pause: float = 0.03, hold_at: int | None = None) -> None:
        self._address = urlsplit(suite.supervisor.url("lead-intake"))
        self._token = suite.supervisor.token("marketing")
        self._rows, self._pause = rows, pause
        self._hold_at = hold_at
        self._released = threading.Event()
        self.key = str(uuid4())
        self.sendings = 0
        # The answer to each row that was taken, by its number from 1, whichever sending brought it.
        self.answers: dict[int, Mapping[str, Any]] = {}
        self.summary: Mapping[str, Any] | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="import", daemon=True)

    def start(self) -> Import:
        self._thread.start()
        return self

    def go_on(self) -> None:
        """Send what was held back."""
        self._released.set()

    def join(self, deadline: float = DEADLINE) -> None:
        """Wait until it is complete. Raises what went wrong."""
        self.go_on()
        self._thread.join(deadline)
        if self.error is not None:
            raise self.error
        if self._thread.is_alive() or self.summary is None:
            raise Unanswered(f"the import is not complete after {deadline:g} s and {self.sendings} sendings")

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        end = time.monotonic() + DEADLINE
        pause = threading.Event()
        try:
            while self.summary is None and time.monotonic() < end:
                self.sendings += 1
                try:
                    self._send()
                except (OSError, http.client.HTTPException):
                    pause.wait(0.2)
        except BaseException as error:
            self.error = error

    def _send(self) -> None:
        """One sending. Outcomes are read while rows are still being sent, as the server tells them."""
        address = (self._address.hostname or "", self._address.port or 80)
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(
                f"POST /imports?channel=expo HTTP/1.1\r\nHost: {address[0]}\r\nAuthorization: Bearer {self._token}\r\n"
                f"Idempotency-Key: {self.key}\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            )
            broken = threading.Event()
            reader = threading.Thread(target=self._read, args=(connection, broken), name="outcomes", daemon=True)
            reader.start()
            try:
                self._write(connection, broken)
            finally:
                if broken.is_set():
                    connection.shutdown(socket.SHUT_RDWR)
                reader.join(60)

    def _write(self, connection: socket.socket, broken: threading.Event) -> None:
        for start in range(0, len(self._rows), self.PIECE):
            if self.sendings == 1 and self._hold_at is not None and start >= self._hold_at:
                while not self._released.wait(0.05) and not broken.is_set():
                    pass
            if broken.wait(self._pause):
                return
            piece = b"".join(row + b"\n" for row in self._rows[start : start + self.PIECE])
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\n\r\n")

    def _read(self, connection: socket.socket, broken: threading.Event) -> None:
        response = http.client.HTTPResponse(connection, method="POST")
        try:
            response.begin()
            if response.status not in (200, *AGAIN):
                self.error = AssertionError(f"{response.status}: {response.read(2000)!r}")
            while response.status == 200 and (line := response.readline()):
                self._take(json.loads(line))
        except (OSError, http.client.HTTPException, ValueError):
            pass  # cut off: what was read so far is acknowledged, the rest is sent again
        finally:
            broken.set()

    def _take(self, line: Mapping[str, Any]) -> None:
        if "summary" in line:
            if line["summary"]["complete"]:
                self.summary = line["summary"]
            return
        if line["outcome"] == "refused":
            self.error = AssertionError(f"a good row was refused: {line}")
            return
        known = self.answers.setdefault(line["row"], line)
        if known["lead_id"] != line["lead_id"]:
            self.error = AssertionError(f"row {line['row']} was answered {known}, and then {line}")


class Clerk:
    """Captures leads one by one and tells what they do, until it is told to stop, from a thread."""

    def __init__(self, suite: Suite, people: People) -> None:
        self._people = people
        self._client = suite.client("lead-intake", "sales", subject=f"clerk-{uuid4().hex[:8]}")
        self._over = threading.Event()
        self.leads: dict[str, Mapping[str, Any]] = {}
        self.behaviours: set[str] = set()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="clerk", daemon=True)

    def start(self) -> Clerk:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Finish what is under way. Raises what went wrong."""
        self._over.set()
        self._thread.join(DEADLINE)
        if self.error is not None:
            raise self.error
        assert not self._thread.is_alive(), "the clerk waits for an answer"

    def _run(self) -> None:
        try:
            while not self._over.wait(0.1):
                self._one()
        except BaseException as error:
            self.error = error

    def _one(self) -> None:
        key, body = str(uuid4()), self._people.lead(channel="expo")
        answer = insist(lambda: self._client.post("/leads", json=body, headers={"Idempotency-Key": key}))
        assert answer.status_code == 201, answer.text
        self.leads[key] = answer.json()
        some = EAGER if len(self.leads) % 4 == 0 else EAGER[::4]  # every fourth is qualified
        ids = [str(uuid4()) for _ in some]
        lead = answer.json()["lead_id"]
        did = [{**each, "behaviour_id": name, "lead_id": lead} for each, name in zip(some, ids, strict=True)]
        told = insist(lambda: self._client.post("/behaviours", json={"behaviours": did}))
        assert told.status_code == 200, told.text
        assert told.json()["summary"]["refused"] == 0, told.text
        self.behaviours.update(ids)


class Traffic:
    """A file and two clerks at the same time, and all that they were told.

    Args:
        seed: of the people; other than that of any other traffic on the same suite.
        rows: of the file. One in ten is of somebody who is in it already.
    """

    def __init__(self, suite: Suite, seed: int, rows: int, acknowledged: Acknowledged) -> None:
        self._acknowledged = acknowledged
        people = People(seed)
        crowd = [people.lead() for _ in range(rows - rows // 10)]
        crowd += [{**person, "email": None, "title": "总监"} for person in crowd[::9][: rows - len(crowd)]]
        lines = [json.dumps(person, ensure_ascii=False).encode() for person in crowd]
        self.file = Import(suite, lines, hold_at=rows * 6 // 10)
        self.clerks = [Clerk(suite, People(seed + offset)) for offset in (30, 60)]

    @contextmanager
    def flowing(self) -> Iterator[Traffic]:
        """Start all; at the end wait until everything was answered, and add it to what was acknowledged."""
        self.file.start()
        for clerk in self.clerks:
            clerk.start()
        yield self
        self.file.join()
        for clerk in self.clerks:
            clerk.stop()
        assert self.file.summary is not None
        taken = self.file.summary
        self._acknowledged.leads |= {f"{self.file.key} row {n}": answer for n, answer in self.file.answers.items()}
        self._acknowledged.imports[taken["import_id"]] = taken["captured"] + taken["merged"] + taken["repeated"]
        for clerk in self.clerks:
            self._acknowledged.leads |= clerk.leads
            self._acknowledged.behaviours |= clerk.behaviours

    @property
    def acknowledged(self) -> int:
        """How many captures and behaviours were acknowledged so far."""
        return len(self.file.answers) + sum(len(clerk.leads) + len(clerk.behaviours) for clerk in self.clerks)
