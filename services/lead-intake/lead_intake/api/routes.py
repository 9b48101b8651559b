"""The HTTP API of lead-intake."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Path, Query, Request, Response

from kehu.clock import Clock
from kehu.commands import Done, Outcome
from kehu.commands import Request as CommandRequest
from kehu.events import Recorded
from kehu.events.lead_intake import CustomerErased, CustomerRegistered
from kehu.events.values import Code
from kehu.eventstore import EventStore
from kehu.gate import CommandGate
from kehu.http import (
    Call,
    Page,
    Principal,
    Problem,
    Role,
    Router,
    answer,
    body_limit,
    commands,
    etag,
    exchange_of,
    item,
    json_response,
    paging,
    requires,
)
from kehu.http.problems import invalid
from kehu.ids import derived, uuid7
from kehu.privacy import PostgresKeyring, opened
from lead_intake.api.bulk import BulkLane, Files, Intake
from lead_intake.api.imports import BehaviourFile, LeadFile, reader_of, record, unclean
from lead_intake.api.rows import NdjsonRows
from lead_intake.api.schemas import (
    BehaviourIn,
    BehavioursIn,
    CaptureOut,
    ChannelIn,
    ChannelOut,
    CustomerOut,
    ErasureIn,
    ItemsOut,
    KeysIn,
    KeysOut,
    LeadChange,
    LeadIn,
    LeadLine,
    LeadOut,
    LeadsIn,
    PageOut,
    Rejection,
    Wrong,
    shown_contact,
)
from lead_intake.domain.channel import DefineChannel
from lead_intake.domain.cleaning import UncleanInput
from lead_intake.domain.customer import EraseCustomer
from lead_intake.domain.lead import RejectLead, UpdateLead
from lead_intake.read_models import channels, leads
from lead_intake.read_models.lead_details import LeadDetails, lead_details

INTAKE = (Role.SALES, Role.SERVICE, Role.MARKETING, Role.MANAGER, Role.ADMIN, Role.SYSTEM)
WORK = (Role.SALES, Role.SERVICE, Role.MANAGER, Role.ADMIN)
BULK = (Role.MARKETING, Role.MANAGER, Role.ADMIN, Role.SYSTEM)
READ = (*INTAKE, Role.ANALYST)
# Who sees whose lead it is. Others see a masked contact.
CLEAR = (Role.SALES, Role.SERVICE, Role.MANAGER, Role.ADMIN)
MOST_LEADS_OF_CUSTOMER = 100


Captures = Annotated[Call, commands(*INTAKE)]
Works = Annotated[Call, commands(*WORK)]
Sends = Annotated[Call, commands(*BULK)]
Catalogues = Annotated[Call, commands(Role.MARKETING, Role.MANAGER, Role.ADMIN, Role.SYSTEM)]
Erases = Annotated[Call, commands(Role.ADMIN)]
Reader = Annotated[Principal, requires(*READ)]
Anybody = Annotated[Principal, requires()]
OfTheSuite = Annotated[Principal, requires(Role.SYSTEM)]
Paging = Annotated[Page, paging()]


@dataclass(frozen=True, slots=True)
class Desk:
    """What the routes work with."""

    store: EventStore
    keyring: PostgresKeyring
    clock: Clock
    gate: CommandGate
    lane: BulkLane
    files: Files


def desk(request: Request) -> Desk:
    """The desk of the application."""
    found: Desk = request.app.state.desk
    return found


router = Router()


# --- Capture ----------------------------------------------------------------------------------------------------------


@router.post("/leads", tags=["leads"], status_code=201, responses={201: {"model": CaptureOut}})
async def capture_lead(request: Request, lead: LeadIn, call: Captures) -> Response:
    """Capture a lead. A customer who is known by phone or email is recognised, and the capture merged into their open lead."""
    at = desk(request)
    outcome = await at.gate.submit(_capture(lead, call, at.clock))
    if isinstance(outcome, Done):
        lead_id = outcome.result["lead_id"]
        return answer(outcome, 201, location=f"/leads/{lead_id}", stream=f"lead-{lead_id}")
    return answer(outcome)


@router.post("/leads/batch", tags=["leads"], responses={200: {"model": ItemsOut}})
async def capture_leads(request: Request, body: LeadsIn, call: Captures) -> Response:
    """Capture up to 1 000 leads. Each is taken or refused by itself; the answer tells of each in order."""
    at = desk(request)

    def check(index: int, lead: LeadIn) -> CommandRequest[Any]:
        return _capture(lead, call, at.clock, index)

    return await _each(at, body.leads, check)


def _capture(lead: LeadIn, call: Call, clock: Clock, index: int | None = None) -> CommandRequest[Any]:
    now = clock.now()
    try:
        return call.request(lead.command(uuid7(now), now), lead.captured_at, index)
    except UncleanInput as error:
        raise invalid(unclean(error)) from None


async def _each(at: Desk, items: Sequence[Any], check: Any) -> Response:
    """Carry out each item of a list in one transaction, and tell of each."""
    checked: list[CommandRequest[Any] | Problem] = []
    for index, each in enumerate(items):
        try:
            checked.append(invalid(each.errors) if isinstance(each, Wrong) else check(index, each))
        except Problem as problem:
            checked.append(problem)
    requests = [each for each in checked if not isinstance(each, Problem)]
    outcomes = iter(await at.lane.handle(requests) if requests else ())
    told: list[dict[str, Any]] = []
    counts = {"captured": 0, "merged": 0, "repeated": 0, "refused": 0}
    for index, each in enumerate(checked):
        if isinstance(each, Problem):
            told.append({"index": index, "status": each.status_code, "problem": each.document()})
            counts["refused"] += 1
            continue
        outcome = next(outcomes)
        told.append({"index": index, **item(outcome)})
        counts[_word(outcome)] += 1
    return json_response({"items": told, "summary": counts})


def _word(outcome: Outcome) -> str:
    if not isinstance(outcome, Done):
        return "refused"
    return "repeated" if outcome.repeated else str(outcome.result.get("outcome", "captured"))


_FILE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-ndjson": {
                "schema": {"type": "string"},
                "example": '{"name":"张伟","phone":"13800138000"}\n',
            },
            "text/csv": {
                "schema": {"type": "string"},
                "example": "姓名,手机,公司\n张伟,13800138000,星辰科技有限公司\n",
            },
        },
    }
}
_EXAMPLE = """{"row":1,"line":2,"outcome":"captured","lead_id":"…","customer_id":"…","customer_number":"CRM202405001"}
{"row":2,"line":3,"outcome":"refused","slug":"invalid","errors":[{"field":"phone","reason":"is not a telephone number"}]}
{"summary":{"import_id":"…","complete":true,"rows":2,"captured":1,"merged":0,"repeated":0,"refused":1,"seconds":0.02}}
"""
_LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One line a row in the order of the file, as soon as it is known, and a summary at the end.",
        "content": {"application/x-ndjson": {"example": _EXAMPLE}},
    }
}


@router.post("/imports", tags=["imports"], openapi_extra=_FILE, responses=_LINES)
@body_limit(None)
async def import_leads(
    request: Request,
    call: Sends,
    channel: Annotated[Code | None, Query(description="Channel of rows that name none.")] = None,
    encoding: Annotated[
        Literal["utf-8", "gb18030"] | None, Query(description="Of a CSV file; found out when not given.")
    ] = None,
    ignore_unknown: Annotated[bool, Query(description="Skip CSV columns that are not known.")] = False,
) -> Response:
    """Take a file of leads of any size, NDJSON or CSV. Sent again with the same Idempotency-Key it goes on where it stopped:
    rows that were taken are answered again and nothing is done twice.
    """
    at = desk(request)
    form, reader = reader_of(exchange_of(request).header(b"content-type"), encoding, ignore_unknown)
    job = LeadFile(at.lane, at.clock, call.context, derived(call.command_id, "import"), form, channel)
    return Intake(job, reader, at.lane, at.files)


# --- Leads ------------------------------------------------------------------------------------------------------------


@router.get("/leads", tags=["leads"], responses={200: {"model": PageOut[LeadLine]}})
async def list_leads(
    request: Request,
    who: Reader,
    page: Paging,
    channel: Annotated[Code | None, Query()] = None,
    rating: Annotated[Literal["hot", "warm", "cold"] | None, Query()] = None,
    status: Annotated[Literal["open", "merged", "rejected"] | None, Query()] = None,
    customer_id: Annotated[UUID | None, Query()] = None,
) -> Response:
    """Leads, newest first. The list follows the events within a fraction of a second."""
    at = desk(request)
    key = page.after(datetime, UUID)
    after = None if key is None else leads.After(*key)

    def read() -> Any:
        with at.store.pool.connection() as connection:
            rows = leads.page(
                connection,
                page.limit + 1,
                after,
                channel=channel,
                rating=rating,
                status=status,
                customer_id=customer_id,
            )
        shown = {row.lead_id: line for row, line in zip(rows, _lines(at, rows, who), strict=True)}
        return page.answer(rows, lambda row: (row.captured_at, row.lead_id), lambda row: shown[row.lead_id])

    return json_response(await asyncio.to_thread(read))


@router.get("/leads/{lead_id}", tags=["leads"], responses={200: {"model": LeadOut}})
async def get_lead(request: Request, lead_id: UUID, who: Reader) -> Response:
    """A lead as it is now, with what cleaning changed beside the raw input."""
    at = desk(request)
    found = await asyncio.to_thread(_details, at, [lead_id])
    if lead_id not in found:
        raise Problem(404, "There is no lead with this id.", "lead-not-found")
    lead = found[lead_id]
    return json_response(LeadOut.of(lead, who.may(*CLEAR)), headers={"ETag": etag(lead.version)})


@router.patch("/leads/{lead_id}", tags=["leads"], responses={200: {"model": LeadOut}})
async def update_lead(request: Request, lead_id: UUID, change: LeadChange, call: Works) -> Response:
    """Say what is known now. Send If-Match with the ETag of the lead that was read."""
    at = desk(request)
    try:
        command = UpdateLead(lead_id, change.profile())
    except UncleanInput as error:
        raise invalid(unclean(error)) from None
    answer(await at.gate.submit(call.request(command)))
    return await get_lead(request, lead_id, call.principal)


@router.post("/leads/{lead_id}/rejection", tags=["leads"], responses={200: {"model": LeadOut}})
async def reject_lead(request: Request, lead_id: UUID, body: Rejection, call: Works) -> Response:
    """There is nothing in it. The next capture of the customer opens a new lead."""
    answer(await desk(request).gate.submit(call.request(RejectLead(lead_id, body.reason))))
    return await get_lead(request, lead_id, call.principal)


def _details(at: Desk, lead_ids: Sequence[UUID]) -> dict[UUID, LeadDetails]:
    """Leads folded from their events, as far as keys go."""
    with at.store.pool.connection() as connection:
        slices = at.store.load(connection, [f"lead-{lead_id}" for lead_id in lead_ids])
    keys = at.keyring.keys({part.customer_id for part in slices.values() if part.customer_id is not None})
    found: dict[UUID, LeadDetails] = {}
    for lead_id, part in zip(lead_ids, slices.values(), strict=True):
        lead = lead_details(
            [(recorded, opened(recorded, keys.get(recorded.customer_id or ""))) for recorded in part.events]
        )
        if lead is not None:
            found[lead_id] = lead
    return found


def _lines(at: Desk, rows: Sequence[leads.LeadRow], who: Principal) -> list[LeadLine]:
    """Rows of the list with names from the events."""
    found = _details(at, [row.lead_id for row in rows])
    lines: list[LeadLine] = []
    for row in rows:
        lead = found.get(row.lead_id)
        contact = shown_contact(lead.contact if lead is not None else None, who.may(*CLEAR))
        line: dict[str, Any] = {
            "lead_id": row.lead_id,
            "customer_id": UUID(row.customer_id),
            "status": row.status,
            "rating": row.rating,
            "source": row.source,
            "channel": row.channel,
            "name": contact.name if contact else None,
            "phone": contact.phone if contact else None,
            "email": contact.email if contact else None,
            "company": lead.details.get("company") if lead is not None else None,
            "survivor_lead_id": row.survivor,
            "captured_at": row.captured_at,
            "changed_at": row.changed_at,
        }
        lines.append(LeadLine.model_construct(**line))
    return lines


# --- Customers --------------------------------------------------------------------------------------------------------


@router.get("/customers/{customer_id}", tags=["customers"], responses={200: {"model": CustomerOut}})
async def get_customer(request: Request, customer_id: UUID, who: Reader) -> Response:
    """A customer with number and leads."""
    at = desk(request)

    def read() -> CustomerOut | None:
        events = at.store.stream(f"customer-{customer_id}").events
        with at.store.pool.connection() as connection:
            rows = leads.page(connection, MOST_LEADS_OF_CUSTOMER, customer_id=customer_id)
        return _customer(events, _lines(at, rows, who))

    customer = await asyncio.to_thread(read)
    if customer is None:
        raise Problem(404, "There is no customer with this id.", "customer-not-found")
    return json_response(customer, headers={"ETag": etag(customer.version)})


def _customer(events: Sequence[Recorded], lines: list[LeadLine]) -> CustomerOut | None:
    registered = next((r for r in events if r.is_a(CustomerRegistered)), None)
    if registered is None:
        return None
    event = registered.event
    assert isinstance(event, CustomerRegistered)
    return CustomerOut.model_construct(
        customer_id=event.customer_id,
        customer_number=event.number,
        kind=event.kind,
        erased=any(r.is_a(CustomerErased) for r in events),
        registered_at=registered.time,
        version=events[-1].version,
        leads=lines,
    )


@router.post("/customers/{customer_id}/erasure", tags=["customers"], status_code=200)
async def erase_customer(request: Request, customer_id: UUID, body: ErasureIn, call: Erases) -> Response:
    """Forget a customer for ever: their key is destroyed, and nothing personal of them can be read again, in no copy. Numbers stay."""
    at = desk(request)
    answer(await at.gate.submit(call.request(EraseCustomer(customer_id, body.reason))))
    at.keyring.forget(str(customer_id))
    return json_response({"customer_id": customer_id, "erased": True})


# --- Channels ---------------------------------------------------------------------------------------------------------


@router.put("/channels/{channel}", tags=["channels"], responses={200: {"model": ChannelOut}})
async def define_channel(
    request: Request,
    channel: Annotated[Code, Path(examples=["expo_shanghai"])],
    body: ChannelIn,
    call: Catalogues,
) -> Response:
    """Add a channel to the catalogue, or change it."""
    command = DefineChannel(channel, body.title, body.kind, body.active)
    done = answer(await desk(request).gate.submit(call.request(command)))
    version = {"ETag": done.headers["ETag"]} if "ETag" in done.headers else None
    return json_response({"channel": channel, **dict(body)}, headers=version)


@router.get("/channels", tags=["channels"], responses={200: {"model": PageOut[ChannelOut]}})
async def list_channels(request: Request, who: Anybody, page: Paging) -> Response:
    """The channel catalogue."""
    at = desk(request)
    key = page.after(str)

    def read() -> list[channels.ChannelRow]:
        with at.store.pool.connection() as connection:
            return channels.catalogue(connection, page.limit + 1, key[0] if key else None)

    rows = await asyncio.to_thread(read)
    return json_response(page.answer(rows, lambda row: (row.channel,), lambda row: row._asdict()))


# --- Behaviours -------------------------------------------------------------------------------------------------------


@router.post("/behaviours", tags=["behaviours"], responses={200: {"model": ItemsOut}})
async def record_behaviours(request: Request, body: BehavioursIn, call: Captures) -> Response:
    """Record up to 1 000 behaviours of leads and customers. Each is taken or refused by itself."""
    at = desk(request)
    now = at.clock.now()

    def check(index: int, behaviour: BehaviourIn) -> CommandRequest[Any]:
        return record(behaviour, derived(call.command_id, index), call.context, now, call.fingerprint)

    return await _each(at, body.behaviours, check)


@router.post("/behaviours/import", tags=["behaviours"], openapi_extra=_FILE, responses=_LINES)
@body_limit(None)
async def import_behaviours(request: Request, call: Sends) -> Response:
    """Take a file of behaviours of any size, NDJSON. Sent again with the same Idempotency-Key it goes on where it stopped."""
    at = desk(request)
    form, _ = reader_of(exchange_of(request).header(b"content-type"), None, False)
    if form != "ndjson":
        raise Problem(415, "Send Content-Type: application/x-ndjson.")
    job = BehaviourFile(at.lane, at.clock, call.context, derived(call.command_id, "import"))
    return Intake(job, NdjsonRows(), at.lane, at.files)


# --- Keys -------------------------------------------------------------------------------------------------------------


@router.post("/keys/lookup", tags=["keys"], responses={200: {"model": KeysOut}})
async def look_up_keys(request: Request, body: KeysIn, who: OfTheSuite) -> Response:
    """The keys of customers, for services of the suite only."""
    keys = await asyncio.to_thread(desk(request).keyring.keys, body.customer_ids)
    shown = {c: base64.b64encode(key).decode() if key is not None else None for c, key in keys.items()}
    return json_response({"keys": shown}, headers={"Cache-Control": "no-store"})
