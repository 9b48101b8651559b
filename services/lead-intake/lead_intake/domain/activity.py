"""What a customer did: one stream for each customer and month, so that no stream grows without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from kehu.decider import Decider, Refused
from kehu.events import Event
from kehu.events.lead_intake import BehaviourRecorded, Facts
from lead_intake.domain.times import refused_time


@dataclass(frozen=True, slots=True)
class RecordBehaviour:
    """A customer did something.

    Args:
        customer_id, lead_id: at least one. The customer of a lead is looked up before this is decided.
        occurred_at: when it happened.
        received_at: when we were told.
    """

    behaviour_id: UUID
    kind: str
    occurred_at: datetime
    received_at: datetime
    customer_id: UUID | None = None
    lead_id: UUID | None = None
    object: str | None = None
    channel: str | None = None
    duration_seconds: float | None = None
    device: str | None = None
    facts: Facts = field(default_factory=dict)


def month_key(customer_id: UUID, at: datetime) -> str:
    """The key of the stream that a behaviour goes to: customer and month (UTC) of when it happened."""
    return f"{customer_id}-{at.astimezone(UTC):%Y%m}"


def decide(command: RecordBehaviour, _: None) -> Sequence[Event]:
    """A behaviour is a fact: it is refused only when its time cannot be. Its id makes a resend safe, outside of the stream."""
    if command.customer_id is None:
        raise Refused("customer-not-found", "give customer_id or lead_id", "customer_id")
    refused = refused_time("occurred_at", command.occurred_at, command.received_at)
    if refused is not None:
        raise refused
    return (
        BehaviourRecorded(
            behaviour_id=command.behaviour_id,
            customer_id=command.customer_id,
            lead_id=command.lead_id,
            kind=command.kind,
            object=command.object,
            channel=command.channel,
            duration_seconds=command.duration_seconds,
            device=command.device,
            facts=command.facts,
        ),
    )


def evolve(_: None, event: Event) -> None:
    """Behaviours do not depend on each other."""
    return


ACTIVITY: Decider[RecordBehaviour, None] = Decider("activity", None, decide, evolve)
