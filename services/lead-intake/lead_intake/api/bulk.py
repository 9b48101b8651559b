"""Many commands at once: a lane of its own beside single captures, and files that stream in while their outcome streams out."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kehu.commands import CommandHandler, Done, Outcome, Request
from kehu.gate import Overloaded
from kehu.http.answers import problem_of_outcome
from kehu.http.problems import PASSING, FieldError, Problem, problem_of
from lead_intake.api.rows import BadFile, Row, RowReader

log = logging.getLogger(__name__)
T = TypeVar("T")


class BulkLane:
    """Carries out batches beside the gate of single commands, a bounded number at once.

    Args:
        at_once: batches that are written at once.
        waiting: batches that may wait; beyond that it is Overloaded.
    """

    def __init__(self, handler: CommandHandler, at_once: int = 2, waiting: int = 50) -> None:
        self.handler = handler
        self._places = asyncio.Semaphore(at_once)
        self._most, self._waiting = waiting, 0

    async def handle(self, requests: Sequence[Request[Any]]) -> list[Outcome]:
        """Carry out a batch in one transaction.

        Raises:
            Overloaded: too many batches wait; nothing was done.
            psycopg.OperationalError, KeysUnavailable: send it again.
        """
        if self._waiting >= self._most:
            raise Overloaded
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            return await asyncio.to_thread(self.handler.handle, requests)
        finally:
            self._places.release()


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that never became a command."""

    problem: Problem


Checked = Request[Any] | RefusedRow


class Job(Protocol):
    """What a file is taken for."""

    def check(self, row: Row) -> Checked:
        """The command of a row. Pure computation; called in a thread."""
        ...

    async def start(self) -> None:
        """Before the first row. Raises Problem when the file is not taken."""
        ...

    async def complete(self, counts: Mapping[str, int]) -> None:
        """After the last row."""
        ...

    def summary(self) -> dict[str, Any]:
        """What the closing line says besides the counts."""
        ...


class Files:
    """The places for files that one process takes at once."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place. Raises Problem (503) when there is none."""
        if self._free == 0:
            raise Problem(503, "Other files are being taken. Come again.", "imports-busy", headers={"Retry-After": "5"})
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class _Outcomes:
    """Lines on their way to the sender. They wait in a file that has no name: many clients read nothing before they have
    sent everything, and whoever waits for the other then would wait for ever."""

    IN_MEMORY = 1 << 20
    PIECE = 1 << 16

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=self.IN_MEMORY)  # noqa: SIM115 closed by pieces()
        self._read = self._written = 0
        self._more = asyncio.Event()
        self._closed = False

    def write(self, lines: bytes) -> None:
        self._file.seek(self._written)
        self._file.write(lines)
        self._written += len(lines)
        self._more.set()

    def close(self) -> None:
        self._closed = True
        self._more.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._read < self._written:
                self._file.seek(self._read)
                piece = self._file.read(self.PIECE)
                self._read += len(piece)
                if self._read == self._written:  # all of it is on its way: begin the file again
                    self._file.seek(0)
                    self._file.truncate()
                    self._read = self._written = 0
                yield piece
            if self._closed:
                self._file.close()
                return


@dataclass
class Intake(Response):
    """The answer to a file: one line a row as soon as it is known, and a summary at the end.

    Args:
        batch: rows in one transaction.
        patience: how often a batch is tried while the database cannot be reached, with growing pauses of 0.2 to 5 s.
    """

    job: Job
    reader: RowReader
    lane: BulkLane
    files: Files
    batch: int = 500
    patience: int = 8
    counts: dict[str, int] = field(default_factory=lambda: {"captured": 0, "merged": 0, "repeated": 0, "refused": 0})

    status_code = 200
    background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.files.place():
            source = _Source(receive, self.reader)
            rows = await source.begin()
            await self.job.start()
            headers = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            outcomes = _Outcomes()
            sending = asyncio.create_task(self._send(outcomes, send))
            try:
                await self._take(rows, source, outcomes)
            finally:
                outcomes.close()
                await sending

    async def _send(self, outcomes: _Outcomes, send: Send) -> None:
        async for piece in outcomes.pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _take(self, rows: list[Row], source: _Source, outcomes: _Outcomes) -> None:
        started = perf_counter()
        problem: Problem | None = None
        writing: asyncio.Task[None] | None = None
        try:
            async for batch in self._batches(rows, source):
                checked = await asyncio.to_thread(self._check, batch)  # while the batch before is being written
                if writing is not None:
                    await writing
                writing = asyncio.create_task(self._write(checked, outcomes))
            if writing is not None:
                await writing
            await self._patiently(lambda: self.job.complete(self.counts))
        except Exception as error:
            if writing is not None:
                await asyncio.gather(writing, return_exceptions=True)
            problem = problem_of(error)
            if problem is None:
                log.exception("a file was not taken to its end")
                problem = Problem(
                    500, "Something is wrong on our side; send the file again with the same Idempotency-Key."
                )
        summary: dict[str, Any] = {
            **self.job.summary(),
            "complete": problem is None,
            "rows": sum(self.counts.values()),
            **self.counts,
            "seconds": round(perf_counter() - started, 3),
        }
        if problem is not None:
            summary["problem"] = problem.document()
        outcomes.write(orjson.dumps({"summary": summary}) + b"\n")

    async def _batches(self, rows: list[Row], source: _Source) -> AsyncIterator[list[Row]]:
        more: list[Row] | None = rows
        waiting: list[Row] = []
        while more is not None:
            waiting.extend(more)
            while len(waiting) >= self.batch:
                yield waiting[: self.batch]
                del waiting[: self.batch]
            more = await source.more()
        if waiting:
            yield waiting

    def _check(self, rows: Sequence[Row]) -> list[tuple[Row, Checked]]:
        return [(row, self.job.check(row)) for row in rows]

    async def _write(self, rows: Sequence[tuple[Row, Checked]], outcomes: _Outcomes) -> None:
        requests = [checked for _, checked in rows if isinstance(checked, Request)]
        answers = iter(await self._patiently(lambda: self.lane.handle(requests)) if requests else ())
        lines: list[bytes] = []
        for row, checked in rows:
            if isinstance(checked, RefusedRow):
                line = self._refused(row, checked.problem)
            else:
                outcome = next(answers)
                refused = problem_of_outcome(outcome)
                line = self._refused(row, refused) if refused is not None else self._taken(row, outcome)
            lines.append(orjson.dumps(line))
        lines.append(b"")
        outcomes.write(b"\n".join(lines))

    def _taken(self, row: Row, outcome: Outcome) -> dict[str, Any]:
        assert isinstance(outcome, Done)
        what = "repeated" if outcome.repeated else outcome.result.get("outcome", "captured")
        self.counts[what] += 1
        return {"row": row.number, "line": row.line, **outcome.result, "outcome": what}

    def _refused(self, row: Row, problem: Problem) -> dict[str, Any]:
        self.counts["refused"] += 1
        errors = [{"field": error.field, "reason": error.reason} for error in problem.errors]
        return {
            "row": row.number,
            "line": row.line,
            "outcome": "refused",
            "slug": problem.slug,
            "errors": errors or [{"field": "", "reason": problem.detail}],
        }

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, and again while a server behind us cannot be reached. Every part of a file can be repeated without harm."""
        for attempt in range(self.patience):
            try:
                return await work()
            except (*PASSING, Overloaded):
                if attempt == self.patience - 1:
                    raise
            await asyncio.sleep(min(5.0, 0.2 * 2**attempt))
        raise AssertionError("unreachable")


class Gone(Problem):
    """The sender went away before the file ended. What was read is taken; sending it again goes on from there."""

    def __init__(self) -> None:
        super().__init__(400, "The connection ended before the file.", "cut-short")


class _Source:
    """The rows of a request's body, piece by piece."""

    def __init__(self, receive: Receive, reader: RowReader) -> None:
        self._receive, self._reader = receive, reader
        self._ended = False

    async def begin(self) -> list[Row]:
        """Read until it is clear that the file can be read at all, while it can still be refused as a whole."""
        rows: list[Row] = []
        while not self._reader.begun and (more := await self.more()) is not None:
            rows.extend(more)
        return rows

    async def more(self) -> list[Row] | None:
        """The rows of the next piece, which can be none; None when the file has ended.

        Raises:
            Problem: the file cannot be read, or its sender is gone.
        """
        if self._ended:
            return None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Gone
        try:
            rows = list(self._reader.feed(message.get("body", b"")))
            if not message.get("more_body", False):
                self._ended = True
                rows.extend(self._reader.finish())
        except BadFile as error:
            wrong = [FieldError(at="body", field=error.field, reason=error.reason)]
            raise Problem(422, error.reason, error.slug, errors=wrong) from None
        return rows
