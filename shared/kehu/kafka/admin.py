"""Routes for parked events, for administrators. The application's state must have `pool`."""

from __future__ import annotations

import base64
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, Field

from kehu.http import Body, Page, Principal, Problem, Role, Router, json_response, paging, requires
from kehu.kafka import parked
from kehu.kafka.parked import NotFirst, NotParked, ParkedEvent, Status, What
from kehu.postgres import Pool

router = Router(prefix="/admin/parked", tags=["parked events"])

ParkedId = Annotated[int, Path(ge=1, le=2**63 - 1, description="Id of the parked event.")]


class ParkedAnswer(BaseModel):
    """One parked event: where it came from, why it could not be handled, and what was asked for it."""

    id: int
    consumer: str = Field(examples=["crm.scoring.scores"])
    stream: str = Field(description="Empty when the record could not be read.")
    version: int | None
    topic: str
    partition: int
    offset: int
    status: Status = Field(description="`waiting`: it failed. `behind`: an earlier event of its stream waits.")
    error: str
    attempts: int
    first_failed_at: datetime
    parked_at: datetime
    resolved_at: datetime | None
    request: What | None = Field(description="What was asked for and is not done yet.")
    requested_by: str | None
    requested_at: datetime | None


class ParkedsAnswer(BaseModel):
    """A page of parked events."""

    items: list[ParkedAnswer]
    next: str | None


class HeaderAnswer(BaseModel):
    """A header of the record."""

    name: str
    text: str | None
    base64: str | None = Field(description="Instead of `text` when it is none.")


class ParkedRecordAnswer(ParkedAnswer):
    """A parked event with its record as it was on Kafka."""

    key: str | None
    value: str | None = Field(description="Personal data in it is sealed.")
    headers: list[HeaderAnswer]


class RequestBody(Body):
    """What to do with a parked event."""

    what: What = Field(
        description="`replay`: handle the stream's parked events again, in order. `drop`: never handle this one and go on behind"
        " it. `accept_hole`: take this version although earlier ones are missing.",
        examples=["replay"],
    )


def _row(event: ParkedEvent) -> dict[str, Any]:
    return {name: value for name, value in asdict(event).items() if name not in ("key", "value", "headers")}


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="backslashreplace")


def _header(name: str, raw: bytes | None) -> dict[str, str | None]:
    try:
        return {"name": name, "text": None if raw is None else raw.decode(), "base64": None}
    except UnicodeDecodeError:
        return {"name": name, "text": None, "base64": base64.b64encode(raw or b"").decode()}


@router.get("", response_model=ParkedsAnswer, dependencies=[requires(Role.ADMIN)])
def list_parked(
    request: Request,
    page: Annotated[Page, paging(100, 500)],
    consumer: Annotated[str | None, Query(max_length=200, description="Only of this consumer.")] = None,
    stream: Annotated[str | None, Query(max_length=500, description="Only of this stream.")] = None,
    closed: Annotated[bool, Query(description="Also those that were resolved or dropped.")] = False,
) -> Response:
    """Events that a consumer could not handle, and those that wait behind them, in the order in which they were parked."""
    after = page.after(int)
    statuses: tuple[Status, ...] = ("waiting", "behind", "resolved", "dropped") if closed else ("waiting", "behind")
    pool: Pool = request.app.state.pool
    found = parked.list_parked(pool, consumer, stream, statuses, after[0] if after else 0, page.limit + 1)
    return json_response(page.answer(found, lambda event: (event.id,), _row))


@router.get("/{parked_id}", response_model=ParkedRecordAnswer, dependencies=[requires(Role.ADMIN)])
def show_parked(request: Request, parked_id: ParkedId) -> Response:
    """One parked event with its record: key, value and headers as they were on Kafka."""
    try:
        event = parked.show(request.app.state.pool, parked_id)
    except NotParked as error:
        raise Problem(404, str(error)) from None
    headers = [_header(name, raw) for name, raw in event.headers]
    return json_response({**_row(event), "key": _text(event.key), "value": _text(event.value), "headers": headers})


@router.post("/{parked_id}/requests", response_model=ParkedAnswer, status_code=202)
def ask_for_parked(
    request: Request, parked_id: ParkedId, body: RequestBody, who: Annotated[Principal, requires(Role.ADMIN)]
) -> Response:
    """Ask the consumer to do something about it. It does within seconds; look at `request` and `status` again."""
    try:
        event = parked.ask(request.app.state.pool, parked_id, body.what, str(who.actor))
    except NotParked as error:
        raise Problem(404, str(error)) from None
    except NotFirst as error:
        raise Problem(409, str(error), "not-the-first-parked") from None
    return json_response(_row(event), 202)
