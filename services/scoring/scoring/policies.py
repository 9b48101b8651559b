"""Stateless reactions: events of lead-intake → commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kehu.events import Event, Recorded
from kehu.events.lead_intake import (
    BehaviourRecorded,
    CustomerErased,
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
    LeadRejected,
)
from scoring.domain.evaluation import BehaviourInput, ProfileInput
from scoring.domain.knowledge import BehaviourSeen, CustomerLeft, Fact, LeadClosed, LeadOpened, ProfileTold
from scoring.handlers import Learn

# Part of the ids of commands: never rename it.
LEARN = "scores"
REACTS_TO: tuple[type[Event], ...] = (
    LeadCaptured,
    LeadDetailsUpdated,
    LeadMerged,
    LeadRejected,
    BehaviourRecorded,
    CustomerErased,
)


def learn(recorded: Recorded) -> Iterable[Learn]:
    """Every event that tells something of a lead, its customer, or what the customer does, is decided on its own."""
    fact = _fact(recorded)
    return () if fact is None else (Learn(fact, recorded.id, recorded.time),)


def _fact(recorded: Recorded) -> Fact | None:
    event = recorded.event
    match event:
        case BehaviourRecorded():
            did = BehaviourInput(recorded.id, recorded.time, event.kind, behaviour_attributes(event))
            return BehaviourSeen(event.customer_id, did)
        case LeadCaptured():
            profile = ProfileInput(recorded.id, recorded.time, profile_attributes(event))
            return LeadOpened(event.lead_id, event.customer_id, profile)
        case LeadDetailsUpdated():
            profile = ProfileInput(recorded.id, recorded.time, profile_attributes(event))
            return ProfileTold(event.customer_id, profile)
        case LeadMerged():
            return LeadClosed(event.lead_id, event.customer_id, "merged", event.survivor_lead_id)
        case LeadRejected():
            return LeadClosed(event.lead_id, event.customer_id, "rejected")
        case CustomerErased():
            return CustomerLeft(event.customer_id)
        case _:
            return None


def profile_attributes(event: LeadCaptured | LeadDetailsUpdated) -> dict[str, Any]:
    """What rules may look at; what is not known is absent."""
    names = ("source", "channel", "campaign", "company", "industry", "region", "size", "title", "rating")
    attributes = {name: value for name in names if (value := getattr(event, name, None)) is not None}
    if isinstance(event, LeadCaptured) and event.utm is not None:
        attributes |= {f"utm.{name}": value for name, value in event.utm if value is not None}
    return attributes | _facts(event.facts)


def behaviour_attributes(event: BehaviourRecorded) -> dict[str, Any]:
    """What rules may look at; what is not known is absent."""
    names = ("object", "channel", "duration_seconds", "device")
    attributes = {name: value for name in names if (value := getattr(event, name)) is not None}
    return attributes | _facts(event.facts)


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {f"facts.{name}": value for name, value in facts.items()}
