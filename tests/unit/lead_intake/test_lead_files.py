"""Files that stream in while their outcome streams out: neither side waits for the other, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import orjson
import psycopg
import pytest

from kehu.commands import Context, Done, Failed, Outcome, Request
from kehu.decider import Refused
from kehu.gate import Overloaded
from kehu.http import Problem
from lead_intake.api.bulk import BulkLane, Checked, Files, Intake, RefusedRow
from lead_intake.api.imports import cells
from lead_intake.api.rows import NdjsonRows, Row

Message = dict[str, Any]
CONTEXT = Context("user:u1", "c", "c")


class Job:
    """Takes each row as a command, refuses those that say `bad`."""

    def __init__(self) -> None:
        self.counts: Mapping[str, int] | None = None

    async def start(self) -> None:
        pass

    async def complete(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)

    def summary(self) -> dict[str, Any]:
        return {"import_id": "i"}

    def check(self, row: Row) -> Checked:
        if row.raw == b"bad":
            return RefusedRow(Problem(422, "bad", "bad"))
        return Request(row.raw, UUID(int=row.number), CONTEXT)


class Lane:
    """Carries out everything; `when` may object to a batch."""

    def __init__(self, when: Callable[[int], None] = lambda _: None) -> None:
        self.batches: list[int] = []
        self.tries = 0
        self._when = when

    async def handle(self, requests: Sequence[Request[Any]]) -> list[Outcome]:
        self.tries += 1
        self._when(self.tries)
        self.batches.append(len(requests))
        await asyncio.sleep(0)
        return [
            Failed(Refused("no", "no")) if r.command == b"no" else Done({"outcome": "captured"}, {}) for r in requests
        ]


def intake(lane: Lane, job: Job | None = None, files: Files | None = None) -> Intake:
    return Intake(job or Job(), NdjsonRows(), cast(BulkLane, lane), files or Files(1))


async def run(response: Intake, pieces: Sequence[bytes], send: Callable[[Message], Awaitable[None]]) -> None:
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    waiting = iter(messages)

    async def receive() -> Message:
        return next(waiting)

    async with asyncio.timeout(20):
        await response({"type": "http"}, cast(Any, receive), cast(Any, send))


async def answer(response: Intake, pieces: Sequence[bytes]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    body = b""

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    await run(response, pieces, send)
    *rows, last = [orjson.loads(line) for line in body.splitlines()]
    return rows, last["summary"]


async def test_rows_are_answered_in_order_and_counted() -> None:
    job, lane = Job(), Lane()
    rows, summary = await answer(intake(lane, job), [b"a\nbad\nno\n" * 400])
    assert [row["outcome"] for row in rows] == ["captured", "refused", "refused"] * 400
    assert [row["row"] for row in rows] == list(range(1, 1201))
    assert summary["captured"] == 400 and summary["refused"] == 800 and summary["complete"] is True
    assert job.counts == {"captured": 400, "merged": 0, "repeated": 0, "refused": 800}
    assert max(lane.batches) <= 500


async def test_a_sender_who_reads_nothing_until_everything_is_sent() -> None:
    count, rest = 20_000, asyncio.Event()
    received = 0
    body = b""

    async def receive() -> Message:
        nonlocal received
        received += 1
        if received == count // 100:
            rest.set()
            return {"type": "http.request", "body": b"a\n" * 100, "more_body": False}
        return {"type": "http.request", "body": b"a\n" * 100, "more_body": True}

    async def send(message: Message) -> None:
        nonlocal body
        if message["type"] == "http.response.body":
            await rest.wait()  # a full socket, until the sender begins to read
        body += message.get("body", b"")

    async with asyncio.timeout(30):
        await intake(Lane())({"type": "http"}, cast(Any, receive), cast(Any, send))
    assert body.count(b'"outcome":"captured"') == count and b'"complete":true' in body


async def test_a_lost_database_is_waited_for_and_then_told() -> None:
    def gone_twice(tries: int) -> None:
        if tries <= 2:
            raise psycopg.OperationalError

    _, summary = await answer(intake(Lane(gone_twice)), [b"a\n"])
    assert summary["complete"] is True and summary["captured"] == 1

    def gone(_: int) -> None:
        raise psycopg.OperationalError

    job, lane = Job(), Lane(gone)
    response = intake(lane, job)
    response.patience = 2
    rows, summary = await answer(response, [b"a\n" * 700])
    assert rows == [] and summary["complete"] is False and summary["problem"]["slug"] == "unavailable"
    assert lane.tries == 2 and job.counts is None


async def test_a_sender_who_goes_away_leaves_what_was_taken() -> None:
    job = Job()
    sent: list[Message] = [
        {"type": "http.request", "body": b"a\n" * 500, "more_body": True},
        {"type": "http.disconnect"},
    ]
    messages = iter(sent)

    async def receive() -> Message:
        return next(messages)

    body = b""

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    lane = Lane()
    await intake(lane, job)({"type": "http"}, cast(Any, receive), cast(Any, send))
    summary = orjson.loads(body.splitlines()[-1])["summary"]
    assert lane.batches == [500] and job.counts is None
    assert summary["complete"] is False and summary["problem"]["slug"] == "cut-short" and summary["captured"] == 500


async def test_places_for_files_are_bounded_and_given_back() -> None:
    files = Files(1)
    async with files.place():
        with pytest.raises(Problem) as busy:
            await answer(intake(Lane(), files=files), [b"a\n"])
    assert (busy.value.status_code, busy.value.slug) == (503, "imports-busy")
    assert (await answer(intake(Lane(), files=files), [b"a\n"]))[1]["complete"] is True


async def test_the_lane_is_bounded() -> None:
    class Handler:
        def handle(self, requests: Sequence[Request[Any]]) -> list[Outcome]:
            return [Done({}, {}) for _ in requests]

    lane = BulkLane(cast(Any, Handler()), at_once=1, waiting=0)
    with pytest.raises(Overloaded):
        await lane.handle([])
    lane = BulkLane(cast(Any, Handler()), at_once=1, waiting=5)
    outcomes = await asyncio.gather(*(lane.handle([Request(b"", UUID(int=n), CONTEXT)]) for n in range(5)))
    assert [len(each) for each in outcomes] == [1] * 5


def test_cells_become_what_they_are() -> None:
    content = {
        "facts.budget": "50000",
        "facts.ratio": "-0.5",
        "facts.code": "0755",
        "utm.source": "1",
        "channel": " expo ",
    }
    assert cells(content) == {
        "facts": {"budget": 50000, "ratio": -0.5, "code": "0755"},
        "utm": {"source": "1"},
        "channel": "expo",
    }
