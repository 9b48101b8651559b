"""One lead as it is now, folded from its own events when it is asked for: never behind, and no copy of personal data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

from kehu.events import Event, Personal, PersonalState, Recorded
from kehu.events.lead_intake import (
    Contact,
    Correction,
    Facts,
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
    LeadRejected,
    Utm,
)

_DETAILS = ("company", "industry", "region", "size", "title")


@dataclass(frozen=True, slots=True)
class LeadDetails:
    """A lead with its contact, as far as it can be read.

    Args:
        contact: None when the customer was erased.
        raw_contact: as it came in, when cleaning changed it.
        corrections: of the capture and of all changes, in order.
        version: of its stream.
    """

    lead_id: UUID
    customer_id: UUID
    status: str
    source: str
    channel: str
    campaign: str | None
    utm: Utm | None
    rating: str
    contact: Contact | None
    raw_contact: Contact | None
    details: Mapping[str, str]
    facts: Facts
    corrections: tuple[Correction, ...]
    captured_at: datetime
    changed_at: datetime
    version: int
    external_id: str | None = None
    import_id: UUID | None = None
    survivor: UUID | None = None
    reason: str | None = None
    erased: bool = field(default=False)


def lead_details(history: Sequence[tuple[Recorded, Event]]) -> LeadDetails | None:
    """Fold the events of one lead, opened as far as the reader's keys go; None when there are none."""
    lead: LeadDetails | None = None
    for recorded, event in history:
        if isinstance(event, LeadCaptured):
            lead = LeadDetails(
                lead_id=event.lead_id,
                customer_id=event.customer_id,
                status="open",
                source=event.source,
                channel=event.channel,
                campaign=event.campaign,
                utm=event.utm,
                rating=event.rating,
                contact=_readable(event.contact),
                raw_contact=None if event.raw_contact is None else _readable(event.raw_contact),
                details={name: value for name in _DETAILS if (value := getattr(event, name)) is not None},
                facts=event.facts,
                corrections=event.corrections,
                captured_at=recorded.time,
                changed_at=recorded.time,
                version=recorded.version,
                external_id=event.external_id,
                import_id=event.import_id,
                erased=event.contact.state is PersonalState.ERASED,
            )
            continue
        if lead is None:
            continue
        lead = replace(_changed(lead, event), changed_at=recorded.time, version=recorded.version)
    return lead


def _changed(lead: LeadDetails, event: Event) -> LeadDetails:
    match event:
        case LeadDetailsUpdated():
            changed = {name: value for name in _DETAILS if (value := getattr(event, name)) is not None}
            return replace(
                lead,
                contact=_with(lead.contact, event.contact),
                details={**lead.details, **changed},
                facts={**lead.facts, **event.facts},
                corrections=lead.corrections + event.corrections,
            )
        case LeadMerged():
            return replace(lead, status="merged", survivor=event.survivor_lead_id)
        case LeadRejected():
            return replace(lead, status="rejected", reason=event.reason)
    return lead


def _readable(contact: Personal[Contact]) -> Contact | None:
    return contact.plain if contact.state is PersonalState.PLAIN else None


def _with(contact: Contact | None, change: Personal[Contact] | None) -> Contact | None:
    """A contact change carries only what changed."""
    if change is None or change.state is not PersonalState.PLAIN or contact is None:
        return contact
    return contact.model_copy(update=change.plain.model_dump(exclude_none=True))
