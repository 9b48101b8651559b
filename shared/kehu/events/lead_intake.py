"""Events of lead-intake: leads, customers, their behaviours, channels and imports."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, StringConstraints

from kehu.events.base import Event
from kehu.events.values import Code, Instant, LongText, Personal, Text, Value

Source = Literal["api", "form", "manual", "webhook", "import"]
Rating = Literal["hot", "warm", "cold"]
CustomerKind = Literal["company", "person"]
# Profile facts that are not about identity: numbers, choices and yes/no. Bounded in the API.
Facts = dict[Code, str | int | float | bool]


class Contact(Value):
    """Who a lead is: everything in it is personal data."""

    name: Text | None = None
    phone: Annotated[str, StringConstraints(max_length=32)] | None = None  # E.164
    email: Annotated[str, StringConstraints(max_length=254)] | None = None
    note: LongText | None = None


class Utm(Value):
    """The tags of the link that brought the lead."""

    source: Text | None = None
    medium: Text | None = None
    campaign: Text | None = None
    term: Text | None = None
    content: Text | None = None


class Correction(Value):
    """What cleaning changed in one field. Values of personal fields are not repeated here; see LeadCaptured.raw_contact."""

    field: Code
    rule: Code
    before: Text | None = None
    after: Text | None = None


class LeadCaptured(Event, name="lead.captured"):
    """Somebody showed interest."""

    lead_id: UUID
    customer_id: UUID
    source: Source
    channel: Code
    campaign: Text | None = None
    utm: Utm | None = None
    contact: Personal[Contact]
    raw_contact: Personal[Contact] | None = None  # as it came in, when cleaning changed it
    company: Text | None = None
    industry: Text | None = None
    region: Text | None = None
    size: Text | None = None
    title: Text | None = None
    facts: Facts = Field(default_factory=dict)
    rating: Rating
    corrections: tuple[Correction, ...] = ()
    import_id: UUID | None = None
    external_id: Text | None = None


class LeadMerged(Event, name="lead.merged"):
    """A lead turned out to be of a customer who has one already: the survivor goes on, this one ends."""

    lead_id: UUID
    customer_id: UUID
    survivor_lead_id: UUID
    confidence: float = Field(ge=0, le=1)
    rule: Code


class LeadRejected(Event, name="lead.rejected"):
    """A person decided that there is nothing in it."""

    lead_id: UUID
    customer_id: UUID
    reason: Code


class LeadDetailsUpdated(Event, name="lead.details_updated"):
    """What is known of a lead changed. Only changed fields are present."""

    lead_id: UUID
    customer_id: UUID
    contact: Personal[Contact] | None = None
    company: Text | None = None
    industry: Text | None = None
    region: Text | None = None
    size: Text | None = None
    title: Text | None = None
    facts: Facts = Field(default_factory=dict)
    corrections: tuple[Correction, ...] = ()


class CustomerRegistered(Event, name="customer.registered"):
    """A new identity, with its number."""

    customer_id: UUID
    number: Annotated[str, StringConstraints(pattern=r"^CRM\d{6}\d{3,9}$")]
    kind: CustomerKind


class CustomerErasureRequested(Event, name="customer.erasure_requested"):
    """The person, or somebody for them, asked to be forgotten."""

    customer_id: UUID
    reason: Code


class CustomerErased(Event, name="customer.erased"):
    """The customer's key was destroyed: nothing personal of them can be read any more."""

    customer_id: UUID
    key_destroyed: bool


class BehaviourRecorded(Event, name="behaviour.recorded", stream="activity"):
    """A customer did something. The event's business time is when."""

    behaviour_id: UUID
    customer_id: UUID
    lead_id: UUID | None = None
    kind: Code
    object: Text | None = None
    channel: Code | None = None
    duration_seconds: float | None = Field(default=None, ge=0)
    device: Text | None = None
    facts: Facts = Field(default_factory=dict)


class ChannelDefined(Event, name="channel.defined"):
    """A way by which leads come, with its tag."""

    channel: Code
    title: Text
    kind: Code
    active: bool = True


class ImportStarted(Event, name="import.started"):
    """A bulk file began to come in."""

    import_id: UUID
    format: Literal["ndjson", "csv"]
    channel: Code | None = None


class ImportCompleted(Event, name="import.completed"):
    """A bulk file ended. The counts are the outcome that the sender was told."""

    import_id: UUID
    captured: int = Field(ge=0)
    merged: int = Field(ge=0)
    refused: int = Field(ge=0)
    repeated: int = Field(ge=0)


# When an event happened is envelope `time`; this alias documents commands that carry it.
OccurredAt = Instant
