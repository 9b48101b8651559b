"""A lead: somebody showed interest. Captured once, then worked on, merged into an older lead of the same customer, or rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from kehu.decider import Decider, Refused
from kehu.events import Event, Personal
from kehu.events.lead_intake import (
    Contact,
    Correction,
    CustomerKind,
    Facts,
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
    LeadRejected,
    Rating,
    Source,
    Utm,
)
from lead_intake.domain.cleaning import Profile
from lead_intake.domain.times import refused_time

Status = Literal["new", "open", "merged", "rejected"]

# How much interest a way of coming shows by itself, 0 to 3. Kinds that are not here count as 1.
INTEREST: Mapping[str, int] = {
    "referral": 3,
    "demo_request": 3,
    "partner": 2,
    "website": 2,
    "phone": 2,
    "trade_fair": 2,
    "event": 2,
    "search_ads": 2,
    "social": 1,
    "display_ads": 1,
    "email_campaign": 1,
    "content": 1,
    "list": 0,
    "purchased_list": 0,
}
_HOT, _WARM = 6, 3


def first_rating(channel_kind: str, profile: Profile) -> Rating:
    """How warm a lead is before any behaviour is known: interest of the channel, plus a point for each thing we know.

    Points: 0 to 3 for the channel; one each for phone, email, company, and for knowing the person's title, the industry
    or the size. Hot from 6, warm from 3. Somebody who cannot be reached is cold, however they came.
    """
    contact = profile.contact
    if contact.phone is None and contact.email is None:
        return "cold"
    points = INTEREST.get(channel_kind, 1)
    points += (contact.phone is not None) + (contact.email is not None) + (profile.company is not None)
    points += profile.title is not None or profile.industry is not None or profile.size is not None
    return "hot" if points >= _HOT else "warm" if points >= _WARM else "cold"


@dataclass(frozen=True, slots=True)
class CaptureLead:
    """Somebody showed interest. The profile is cleaned already.

    Args:
        received_at: when we were told.
        captured_at: when they showed it, if it was not now.
    """

    lead_id: UUID
    source: Source
    channel: str
    profile: Profile
    received_at: datetime
    captured_at: datetime | None = None
    campaign: str | None = None
    utm: Utm | None = None
    import_id: UUID | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a capture belongs, looked up before it is decided.

    Args:
        customer_id: of the customer it is of, known or new.
        channel_kind: kind of the lead's channel.
        number: customer number of a new customer; None when the customer is known.
        kind: of a new customer.
        survivor: the open lead of a known customer that goes on instead of this one, if there is one.
        rule: by what a known customer was recognised: `exact_phone` or `exact_email`.
    """

    customer_id: UUID
    channel_kind: str
    number: str | None = None
    kind: CustomerKind = "person"
    survivor: UUID | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class PlaceLead:
    """A capture with its placement: what is decided."""

    capture: CaptureLead
    placement: Placement


@dataclass(frozen=True, slots=True)
class UpdateLead:
    """More, or something better, is known. None leaves a field as it is; `contact` holds only what changed."""

    lead_id: UUID
    profile: Profile


@dataclass(frozen=True, slots=True)
class RejectLead:
    """A person decided that there is nothing in it."""

    lead_id: UUID
    reason: str


LeadCommand = PlaceLead | UpdateLead | RejectLead


@dataclass(frozen=True, slots=True)
class Lead:
    """What later decisions need to know. No personal data."""

    status: Status = "new"
    customer_id: UUID | None = None
    survivor: UUID | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)


DETAILS = ("company", "industry", "region", "size", "title")


def decide(command: LeadCommand, lead: Lead) -> Sequence[Event]:
    """The rules of a lead."""
    match command:
        case PlaceLead(capture, placement):
            return _capture(capture, placement, lead)
        case UpdateLead():
            return _update(command, lead)
        case RejectLead(lead_id, reason):
            if lead.status == "rejected":
                return ()
            return (LeadRejected(lead_id=lead_id, customer_id=_workable(lead), reason=reason),)


def refused_capture(capture: CaptureLead) -> Refused | None:
    """Why a capture cannot be of anybody or of any time, whoever they are; None when it can."""
    contact = capture.profile.contact
    if contact.phone is None and contact.email is None and contact.name is None and capture.profile.company is None:
        return Refused("nobody", "give at least one of phone, email, name and company")
    return refused_time("captured_at", capture.captured_at, capture.received_at)


def _capture(capture: CaptureLead, placement: Placement, lead: Lead) -> Sequence[Event]:
    if lead.status != "new":
        return ()
    refused = refused_capture(capture)
    if refused is not None:
        raise refused
    profile = capture.profile
    captured = LeadCaptured(
        lead_id=capture.lead_id,
        customer_id=placement.customer_id,
        source=capture.source,
        channel=capture.channel,
        campaign=capture.campaign,
        utm=capture.utm,
        contact=Personal(profile.contact),
        raw_contact=None if profile.raw_contact is None else Personal(profile.raw_contact),
        company=profile.company,
        industry=profile.industry,
        region=profile.region,
        size=profile.size,
        title=profile.title,
        facts=profile.facts,
        rating=first_rating(placement.channel_kind, profile),
        corrections=profile.corrections,
        import_id=capture.import_id,
        external_id=capture.external_id,
    )
    if placement.survivor is None or placement.rule is None:
        return (captured,)
    merged = LeadMerged(
        lead_id=capture.lead_id,
        customer_id=placement.customer_id,
        survivor_lead_id=placement.survivor,
        confidence=1.0,
        rule=placement.rule,
    )
    return captured, merged


def _update(command: UpdateLead, lead: Lead) -> Sequence[Event]:
    customer = _workable(lead)
    profile = command.profile
    changed = {
        name: value
        for name in DETAILS
        if (value := getattr(profile, name)) is not None and value != lead.details.get(name)
    }
    facts = {code: value for code, value in profile.facts.items() if lead.facts.get(code) != value}
    contact = profile.contact if profile.contact != Contact() else None
    if not changed and not facts and contact is None:
        return ()
    return (
        LeadDetailsUpdated(
            lead_id=command.lead_id,
            customer_id=customer,
            contact=None if contact is None else Personal(contact),
            facts=facts,
            corrections=_of_changed(profile.corrections, changed, contact),
            **changed,
        ),
    )


def _of_changed(
    corrections: tuple[Correction, ...], changed: Mapping[str, Any], contact: Contact | None
) -> tuple[Correction, ...]:
    return tuple(
        c for c in corrections if c.field in changed or (contact is not None and c.field in Contact.model_fields)
    )


def _workable(lead: Lead) -> UUID:
    """The customer of a lead that can still be worked on, else a refusal."""
    if lead.status == "new" or lead.customer_id is None:
        raise Refused("lead-not-found", "there is no lead with this id")
    if lead.status == "merged":
        raise Refused("lead-merged", f"the lead was merged: work on lead {lead.survivor}")
    if lead.status == "rejected":
        raise Refused("lead-rejected", "the lead was rejected")
    return lead.customer_id


def evolve(lead: Lead, event: Event) -> Lead:
    """Fold one event."""
    match event:
        case LeadCaptured():
            known = {name: value for name in DETAILS if (value := getattr(event, name)) is not None}
            return Lead(status="open", customer_id=event.customer_id, details=known, facts=event.facts)
        case LeadMerged():
            return replace(lead, status="merged", survivor=event.survivor_lead_id)
        case LeadRejected():
            return replace(lead, status="rejected")
        case LeadDetailsUpdated():
            changed = {name: value for name in DETAILS if (value := getattr(event, name)) is not None}
            return replace(lead, details={**lead.details, **changed}, facts={**lead.facts, **event.facts})
    return lead


LEAD: Decider[Any, Lead] = Decider("lead", Lead(), decide, evolve)
