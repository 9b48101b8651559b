"""What the API takes and shows. Input is strict: unknown fields are refused, types are not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from kehu.events.lead_intake import Contact, Rating, Utm
from kehu.events.values import Code
from kehu.http import Body, FieldError
from kehu.http.problems import from_validation
from lead_intake.domain.cleaning import Profile, clean_profile
from lead_intake.domain.lead import CaptureLead
from lead_intake.domain.masking import masked
from lead_intake.read_models.lead_details import LeadDetails

MOST_ITEMS = 1000
MOST_FACTS = 50

Line = Annotated[str, StringConstraints(max_length=500)]
Phone = Annotated[str, StringConstraints(max_length=32)]
Email = Annotated[str, StringConstraints(max_length=254)]
Note = Annotated[str, StringConstraints(max_length=10_000)]
# Whole numbers beyond this are not exact in every reader of JSON.
LARGEST_WHOLE = 2**53


def _fact(value: str | int | float | bool) -> str | int | float | bool:
    if isinstance(value, str) and len(value) > 500:
        raise ValueError("must have at most 500 characters")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise ValueError("must be a whole number of at most 2^53, or text")
    return value


Fact = Annotated[str | int | float | bool, AfterValidator(_fact)]
Facts = Annotated[dict[Code, Fact], Field(max_length=MOST_FACTS)]


def _time(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            return value  # the validator behind says what is wrong
    return value


Time = Annotated[AwareDatetime, BeforeValidator(_time, json_schema_input_type=AwareDatetime)]


class UtmIn(Body):
    """The tags of the link that brought the lead."""

    source: Line | None = None
    medium: Line | None = None
    campaign: Line | None = None
    term: Line | None = None
    content: Line | None = None


class LeadIn(Body):
    """Somebody who showed interest. At least one of phone, email, name and company."""

    channel: Code = Field(description="Code of a channel in the catalogue.", examples=["expo_shanghai"])
    source: Literal["api", "form", "manual", "webhook"] = "api"
    name: Line | None = Field(None, examples=["张伟"])
    phone: Phone | None = Field(None, description="In any spelling; kept as E.164.", examples=["138 0013 8000"])
    email: Email | None = Field(None, examples=["zhang.wei@example.com"])
    note: Note | None = Field(None, description="Free text about the person; kept encrypted.")
    company: Line | None = Field(None, examples=["星辰科技有限公司"])
    industry: Line | None = Field(None, examples=["制造业"])
    region: Line | None = Field(None, examples=["上海"])
    size: Line | None = Field(None, examples=["50-200"])
    title: Line | None = Field(None, examples=["采购经理"])
    campaign: Line | None = Field(None, examples=["spring_2026"])
    utm: UtmIn | None = None
    facts: Facts = Field(
        default_factory=dict, description="Further facts by code; nothing personal.", examples=[{"budget": 50000}]
    )
    external_id: Line | None = Field(
        None, description="Id of the lead in the sender's system.", examples=["crm-old-4711"]
    )
    captured_at: Time | None = Field(None, description="When interest was shown; now when it is not given.")

    def command(self, lead_id: UUID, received_at: datetime, import_id: UUID | None = None) -> CaptureLead:
        """The command. Raises UncleanInput."""
        return CaptureLead(
            lead_id=lead_id,
            source="import" if import_id is not None else self.source,
            channel=self.channel,
            profile=self.profile(),
            received_at=received_at,
            captured_at=self.captured_at,
            campaign=self.campaign,
            utm=None if self.utm is None else Utm(**dict(self.utm)),
            import_id=import_id,
            external_id=self.external_id,
        )

    def profile(self) -> Profile:
        """The cleaned profile. Raises UncleanInput."""
        return clean_profile(
            name=self.name,
            phone=self.phone,
            email=self.email,
            note=self.note,
            company=self.company,
            industry=self.industry,
            region=self.region,
            size=self.size,
            title=self.title,
            facts=self.facts,
        )


class LeadRow(LeadIn):
    """A lead in a file, which can leave the channel to the whole file."""

    channel: Code = ""


class LeadChange(Body):
    """What is known now. A field that is not sent stays as it is; none can be emptied."""

    name: Line = Field("", min_length=1)
    phone: Phone = Field("", min_length=1)
    email: Email = Field("", min_length=1)
    note: Note = Field("", min_length=1)
    company: Line = Field("", min_length=1)
    industry: Line = Field("", min_length=1)
    region: Line = Field("", min_length=1)
    size: Line = Field("", min_length=1)
    title: Line = Field("", min_length=1)
    facts: Facts = Field(default_factory=dict)

    def profile(self) -> Profile:
        """The cleaned changes. Raises UncleanInput."""
        return clean_profile(**dict(self))


class Rejection(Body):
    """Why there is nothing in a lead."""

    reason: Code = Field(examples=["no_budget"])


class ErasureIn(Body):
    """Why somebody is erased."""

    reason: Code = Field("requested", examples=["pipl_request"])


class ChannelIn(Body):
    """A way by which leads come."""

    title: Annotated[str, StringConstraints(min_length=1, max_length=500)] = Field(examples=["上海工博会"])
    kind: Code = Field(
        description="Its tag, e.g. search_ads, social, trade_fair, referral, partner, website, list. It weighs in the first rating.",
        examples=["trade_fair"],
    )
    active: bool = Field(True, description="Whether it takes new leads.")


class BehaviourIn(Body):
    """Something that a customer did. Names the customer, a lead of theirs, or both."""

    kind: Code = Field(examples=["page_viewed"])
    occurred_at: Time | None = Field(None, description="Now when it is not given; at most five minutes ahead.")
    customer_id: UUID | None = None
    lead_id: UUID | None = None
    behaviour_id: UUID | None = Field(None, description="The sender's id: sent twice, it is recorded once.")
    object: Line | None = Field(
        None, description="What it was done to: a page, a document, a product.", examples=["/pricing"]
    )
    channel: Code | None = None
    duration_seconds: float | None = Field(None, ge=0, le=31_536_000)
    device: Line | None = None
    facts: Facts = Field(default_factory=dict)


class Wrong(BaseModel):
    """An item that cannot be read, with its fields."""

    errors: list[FieldError]


def _in_place(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Read an item, or say in its place what is wrong with it: one item must not fail the others."""
    try:
        return handler(value)
    except ValidationError as error:
        return Wrong(errors=from_validation(error))


I = TypeVar("I", bound=Body)  # noqa: E741
Item = Annotated[I, WrapValidator(_in_place)]


class LeadsIn(Body):
    """Many leads at once."""

    leads: list[Item[LeadIn]] = Field(min_length=1, max_length=MOST_ITEMS)


class BehavioursIn(Body):
    """Many behaviours at once."""

    behaviours: list[Item[BehaviourIn]] = Field(min_length=1, max_length=MOST_ITEMS)


class KeysIn(Body):
    """Customers whose keys are wanted."""

    customer_ids: list[Annotated[str, StringConstraints(max_length=64)]] = Field(max_length=500)


# --- What is shown ----------------------------------------------------------------------------------------------------


class CaptureOut(BaseModel):
    """What became of a capture."""

    outcome: Literal["captured", "merged"] = Field(
        description="`merged`: the customer has an open lead, which goes on."
    )
    lead_id: UUID
    customer_id: UUID
    customer_number: str = Field(examples=["CRM202405001"])
    rating: Rating = Field(description="From the channel and what is known, before any behaviour.")
    survivor_lead_id: UUID | None = Field(None, description="The lead that goes on, when merged.")
    rule: str | None = Field(None, description="By what the customer was recognised.", examples=["exact_phone"])
    corrections: list[CorrectionOut] | None = Field(None, description="What cleaning changed.")


class CorrectionOut(BaseModel):
    """What cleaning changed in a field. The raw contact stands beside it; values are shown of fields that are not personal."""

    field: str
    rule: str = Field(examples=["e164"])
    before: str | None = None
    after: str | None = None


class ContactOut(BaseModel):
    """Who a lead is, as far as the reader may see it."""

    name: str | None = None
    phone: str | None = None
    email: str | None = None
    note: str | None = None


class LeadOut(BaseModel):
    """A lead."""

    lead_id: UUID
    customer_id: UUID
    status: Literal["open", "merged", "rejected"]
    rating: Rating
    source: str
    channel: str
    campaign: str | None = None
    utm: Utm | None = None
    contact: ContactOut | None = Field(None, description="Not there when the customer was erased.")
    raw_contact: ContactOut | None = Field(None, description="As it came in, when cleaning changed it.")
    masked: bool = Field(description="Whether the contact is shown in part only, for want of rights.")
    erased: bool
    company: str | None = None
    industry: str | None = None
    region: str | None = None
    size: str | None = None
    title: str | None = None
    facts: Mapping[str, Any]
    corrections: list[CorrectionOut]
    survivor_lead_id: UUID | None = None
    rejection_reason: str | None = None
    external_id: str | None = None
    import_id: UUID | None = None
    captured_at: datetime
    changed_at: datetime
    version: int

    @classmethod
    def of(cls, lead: LeadDetails, clear: bool) -> LeadOut:
        """The lead as a reader sees it.

        Args:
            clear: whether the reader may see whose lead it is; else the contact is masked and nothing raw is shown.
        """
        fields: dict[str, Any] = {
            "lead_id": lead.lead_id,
            "customer_id": lead.customer_id,
            "status": lead.status,
            "rating": lead.rating,
            "source": lead.source,
            "channel": lead.channel,
            "campaign": lead.campaign,
            "utm": lead.utm,
            "contact": shown_contact(lead.contact, clear),
            "raw_contact": shown_contact(lead.raw_contact, clear) if clear else None,
            "masked": not clear,
            "erased": lead.erased,
            **lead.details,
            "facts": lead.facts,
            "corrections": [CorrectionOut.model_construct(**dict(c)) for c in lead.corrections],
            "survivor_lead_id": lead.survivor,
            "rejection_reason": lead.reason,
            "external_id": lead.external_id,
            "import_id": lead.import_id,
            "captured_at": lead.captured_at,
            "changed_at": lead.changed_at,
            "version": lead.version,
        }
        return cls.model_construct(**fields)


def shown_contact(contact: Contact | None, clear: bool) -> ContactOut | None:
    """A contact, masked for who may not see it; None when it was erased."""
    if contact is None:
        return None
    return ContactOut.model_construct(**dict(contact if clear else masked(contact)))


class LeadLine(BaseModel):
    """A lead in a list."""

    lead_id: UUID
    customer_id: UUID
    status: Literal["open", "merged", "rejected"]
    rating: Rating
    source: str
    channel: str
    name: str | None = None
    phone: str | None = None
    email: str | None = None
    company: str | None = None
    survivor_lead_id: UUID | None = None
    captured_at: datetime
    changed_at: datetime


class CustomerOut(BaseModel):
    """A customer with their leads, newest first, at most 100."""

    customer_id: UUID
    customer_number: str = Field(examples=["CRM202405001"])
    kind: Literal["company", "person"]
    erased: bool
    registered_at: datetime
    version: int
    leads: list[LeadLine]


class ChannelOut(BaseModel):
    """A channel of the catalogue."""

    channel: str
    title: str
    kind: str
    active: bool


P = TypeVar("P")


class PageOut(BaseModel, Generic[P]):
    """A page of a list."""

    items: list[P]
    next: str | None = Field(description="`cursor` of the next page; null on the last.")


class ItemOut(BaseModel):
    """What became of one item of a list."""

    index: int = Field(description="Place in the list, from 0.")
    status: int = Field(description="As if it had come alone.", examples=[201])
    repeated: bool = False
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None


class ItemsOut(BaseModel):
    """What became of each item, in order."""

    items: list[ItemOut]
    summary: dict[str, int] = Field(examples=[{"captured": 2, "merged": 1, "repeated": 0, "refused": 1}])


class KeysOut(BaseModel):
    """Keys in base64; null for a customer who was erased or never was."""

    keys: dict[str, str | None]
