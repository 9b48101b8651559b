"""The table of contents: every command of lead-intake and how it is carried out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from kehu.clock import Clock
from kehu.commands import Handles, Plan, Request, Step, on
from kehu.decider import Refused
from kehu.events.lead_intake import (
    ChannelDefined,
    CustomerKind,
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
)
from kehu.eventstore import EventStore, Pending
from kehu.ids import uuid7
from kehu.postgres import Connection, Row
from kehu.privacy import PostgresKeyring, new_key
from lead_intake.domain.activity import ACTIVITY, RecordBehaviour, month_key
from lead_intake.domain.channel import CHANNEL, DefineChannel
from lead_intake.domain.customer import CUSTOMER, EraseCustomer, RegisterCustomer, month_of
from lead_intake.domain.importing import IMPORT, CompleteImport, StartImport
from lead_intake.domain.lead import LEAD, CaptureLead, PlaceLead, Placement, RejectLead, UpdateLead, refused_capture
from lead_intake.read_models import channels, customers
from lead_intake.read_models.channels import Channels
from lead_intake.read_models.customers import CustomerNumbers, KnownCustomer, contact_hashes


def handlers(store: EventStore, keyring: PostgresKeyring, hash_key: bytes, clock: Clock) -> Mapping[type[Any], Handles]:
    """How each command is handled.

    Args:
        hash_key: of the keyed hashes by which a phone number or email address is recognised.
    """
    catalogue = Channels()
    captures = Captures(keyring, hash_key, clock, catalogue)

    def learn_contacts(_: UpdateLead, new: Sequence[Pending]) -> Iterable[Row]:
        for pending in new:
            event = pending.event
            if isinstance(event, LeadDetailsUpdated) and event.contact is not None:
                customer = str(event.customer_id)
                hashes = [h for _, h in contact_hashes(hash_key, event.contact.plain)]
                yield from customers.recognised_if_free(customer, hashes)
                yield customers.held(customer, None)

    def destroy_key(command: EraseCustomer, new: Sequence[Pending]) -> Iterable[Row]:
        if new:
            yield customers.forgotten(str(command.customer_id))
            yield keyring.destroy_row(str(command.customer_id))

    def known_channel(connection: Connection, requests: Sequence[Request[StartImport]]) -> list[Refused | None]:
        wanted = {r.command.channel for r in requests if r.command.channel is not None}
        found = catalogue.look_up(connection, wanted)
        return [channels.refusal(code, found.get(code)) if (code := r.command.channel) else None for r in requests]

    return {
        CaptureLead: Handles(captures.plan, captures.prepare),
        UpdateLead: on(LEAD, lambda c: c.lead_id, rows=learn_contacts),
        RejectLead: on(LEAD, lambda c: c.lead_id, rows=close_lead),
        EraseCustomer: on(CUSTOMER, lambda c: c.customer_id, rows=destroy_key),
        RecordBehaviour: Handles(
            plan_behaviour, lambda connection, requests: customers_of(store, connection, requests)
        ),
        DefineChannel: on(CHANNEL, lambda c: c.channel, rows=catalogue_row),
        StartImport: Handles(plan_import, known_channel),
        CompleteImport: on(IMPORT, lambda c: c.import_id),
    }


@dataclass(frozen=True, slots=True)
class Placed:
    """A capture's placement with all that its plan writes.

    Args:
        new_hashes: contact hashes that nobody has yet.
        fresh: see KnownCustomer.
    """

    placement: Placement
    number: str
    new_hashes: tuple[bytes, ...]
    fresh: bool = False


class Captures:
    """Where captures belong: a known customer, recognised by phone or email, or a new one. One query for a whole batch."""

    def __init__(self, keyring: PostgresKeyring, hash_key: bytes, clock: Clock, catalogue: Channels) -> None:
        self._keyring, self._hash_key, self._clock, self._catalogue = keyring, hash_key, clock, catalogue
        self._numbers = CustomerNumbers()

    def prepare(
        self, connection: Connection, requests: Sequence[Request[CaptureLead]]
    ) -> list[Placed | Refused | None]:
        """The placement of each capture, seen in order. None for one that was carried out already, which has its answer."""
        hashes = [contact_hashes(self._hash_key, request.command.profile.contact) for request in requests]
        known, done = customers.look_up(
            connection, [h for own in hashes for _, h in own], [request.command_id for request in requests]
        )
        found = self._catalogue.look_up(connection, {request.command.channel for request in requests})
        at = self._clock.now()
        placed: list[Placed | Refused | None] = []
        for request, own in zip(requests, hashes, strict=True):
            channel = found.get(request.command.channel)
            if request.command_id in done:
                placed.append(None)
            elif refused := refused_capture(request.command) or channels.refusal(request.command.channel, channel):
                placed.append(refused)
            else:
                assert channel is not None
                placed.append(self._place(connection, request.command, own, known, channel.kind, at))
        return placed

    def _place(
        self,
        connection: Connection,
        command: CaptureLead,
        own: Sequence[tuple[str, bytes]],
        known: dict[bytes, KnownCustomer],
        channel_kind: str,
        at: datetime,
    ) -> Placed:
        """The placement of one capture, which later ones of the batch then know of."""
        rule, customer = next(((rule, known[h]) for rule, h in own if h in known), ("", None))
        fresh = customer is not None and customer.fresh
        if customer is None:
            number = self._numbers.take(connection, month_of(at))
            customer = KnownCustomer(uuid7(at), number, command.lead_id, fresh=True)
            kind: CustomerKind = "company" if command.profile.company is not None else "person"
            placement = Placement(customer.customer_id, channel_kind, number, kind)
        else:
            placement = Placement(customer.customer_id, channel_kind, survivor=customer.open_lead, rule=rule)
            if customer.open_lead is None:
                customer.open_lead, customer.fresh = command.lead_id, True
        new = tuple(h for _, h in own if h not in known)
        known.update(dict.fromkeys(new, customer))
        return Placed(placement, customer.number, new, fresh)

    def plan(self, request: Request[CaptureLead], placed: Placed | Refused | None) -> Plan:
        """A lead, and when nobody knows them a customer with a key and a number."""
        if placed is None:
            raise Refused("already-captured", "this capture was carried out already")
        if isinstance(placed, Refused):
            raise placed
        command, placement = request.command, placed.placement
        customer = str(placement.customer_id)
        steps = [Step(f"lead-{command.lead_id}", LEAD, PlaceLead(command, placement), customer, new=True)]
        keys: dict[str, bytes] = {}
        if placement.number is not None:
            register = RegisterCustomer(placement.customer_id, placement.number, placement.kind)
            steps.insert(0, Step(f"customer-{customer}", CUSTOMER, register, customer, new=True))
            keys[customer] = key = new_key()
            wrapped = self._keyring.wrap(customer, key)
            rows = [customers.registered(customer, wrapped, placement.number, command.lead_id, placed.new_hashes)]
        else:
            rows = [
                customers.held(customer, placement.survivor, placed.fresh)
                if placement.survivor is not None
                else customers.opened(customer, command.lead_id),
                *customers.recognised_by(customer, placed.new_hashes),
            ]
        return Plan(steps, lambda new: told(new, placed.number), lambda new: rows if new else (), keys)


def told(new: Sequence[Pending], number: str) -> dict[str, Any]:
    """What the sender of a capture is told. Nothing personal: it is kept with the command id."""
    answer: dict[str, Any] = {"outcome": "captured"}
    for pending in new:
        match pending.event:
            case LeadCaptured() as captured:
                answer["lead_id"] = str(captured.lead_id)
                answer["customer_id"] = str(captured.customer_id)
                answer["customer_number"] = number
                answer["rating"] = captured.rating
                if captured.corrections:
                    answer["corrections"] = [{"field": c.field, "rule": c.rule} for c in captured.corrections]
            case LeadMerged() as merged:
                answer["outcome"] = "merged"
                answer["survivor_lead_id"] = str(merged.survivor_lead_id)
                answer["rule"] = merged.rule
    return answer


def close_lead(command: RejectLead, new: Sequence[Pending]) -> Iterable[Row]:
    """The customer has no open lead any more."""
    for pending in new:
        assert pending.envelope.customer_id is not None
        yield customers.closed(pending.envelope.customer_id, command.lead_id)


def catalogue_row(_: DefineChannel, new: Sequence[Pending]) -> Iterable[Row]:
    """The channel as captures look it up."""
    for pending in new:
        if isinstance(pending.event, ChannelDefined):
            yield channels.defined(pending.event, pending.envelope.version)


def plan_import(request: Request[StartImport], refused: Refused | None) -> Plan:
    """Begins only when the channel of its rows takes leads."""
    if refused is not None:
        raise refused
    return Plan([Step(f"import-{request.command.import_id}", IMPORT, request.command)])


def customers_of(
    store: EventStore, connection: Connection, requests: Sequence[Request[RecordBehaviour]]
) -> list[UUID | Refused]:
    """The customer of each behaviour, by its lead when none is named; a refusal when there is none, or none any more."""
    leads = {r.command.lead_id for r in requests if r.command.lead_id is not None}
    of_lead = {
        lead: UUID(found.customer_id)
        for lead, found in zip(
            leads, store.load_newest(connection, [f"lead-{lead}" for lead in leads]).values(), strict=True
        )
        if found.customer_id is not None
    }
    named = [r.command.customer_id or of_lead.get(r.command.lead_id or UUID(int=0)) for r in requests]
    rows = connection.execute(
        "SELECT customer_id, wrapped IS NOT NULL FROM customer_keys WHERE customer_id = ANY(%s)",
        ([str(customer) for customer in set(named) if customer is not None],),
    ).fetchall()
    alive = {UUID(customer): kept for customer, kept in rows}
    customers: list[UUID | Refused] = []
    for request, customer in zip(requests, named, strict=True):
        lead = request.command.lead_id
        if lead is not None and lead not in of_lead:
            customers.append(Refused("lead-not-found", "there is no lead with this id", "lead_id"))
        elif customer is None or customer not in alive:
            customers.append(Refused("customer-not-found", "there is no customer with this id", "customer_id"))
        elif lead is not None and of_lead[lead] != customer:
            customers.append(Refused("another-customer", "the lead is of another customer", "lead_id"))
        elif not alive[customer]:
            customers.append(Refused("customer-erased", "the customer was erased", "customer_id"))
        else:
            customers.append(customer)
    return customers


def plan_behaviour(request: Request[RecordBehaviour], customer: UUID | Refused) -> Plan:
    """One event in the stream of the customer's month."""
    if isinstance(customer, Refused):
        raise customer
    command = replace(request.command, customer_id=customer)
    stream = f"activity-{month_key(customer, command.occurred_at)}"
    result = {"behaviour_id": str(command.behaviour_id), "customer_id": str(customer)}
    return Plan([Step(stream, ACTIVITY, command, str(customer), history=False)], result)
