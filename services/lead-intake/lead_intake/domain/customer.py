"""A customer: an identity with a number, made when the first lead of somebody unknown comes in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from kehu.decider import Decider, Refused
from kehu.events import Event
from kehu.events.lead_intake import CustomerErased, CustomerErasureRequested, CustomerKind, CustomerRegistered
from lead_intake.domain.times import CHINA

_NUMBER = re.compile(r"CRM(\d{6})(\d{3,9})")
LARGEST = 999_999_999


def month_of(at: datetime) -> str:
    """The month `yyyymm` that a customer number of this instant carries."""
    return f"{at.astimezone(CHINA):%Y%m}"


def customer_number(month: str, sequence: int) -> str:
    """The number of a customer, e.g. `CRM202405001`.

    Args:
        month: `yyyymm`.
        sequence: 1 to 999 999 999, at least three digits wide.
    """
    number = f"CRM{month}{sequence:03d}"
    if not 1 <= sequence <= LARGEST or _NUMBER.fullmatch(number) is None:
        raise ValueError(f"not a customer number: {number}")
    return number


@dataclass(frozen=True, slots=True)
class RegisterCustomer:
    """Somebody whom we did not know."""

    customer_id: UUID
    number: str
    kind: CustomerKind


@dataclass(frozen=True, slots=True)
class EraseCustomer:
    """The person asked to be forgotten. The key is destroyed in the transaction of the events."""

    customer_id: UUID
    reason: str


CustomerCommand = RegisterCustomer | EraseCustomer


@dataclass(frozen=True, slots=True)
class Customer:
    number: str | None = None
    kind: CustomerKind | None = None
    erased: bool = False


def decide(command: CustomerCommand, customer: Customer) -> Sequence[Event]:
    """The rules of a customer."""
    match command:
        case RegisterCustomer(customer_id, number, kind):
            if customer.number is not None:
                return ()
            return (CustomerRegistered(customer_id=customer_id, number=number, kind=kind),)
        case EraseCustomer(customer_id, reason):
            if customer.number is None:
                raise Refused("customer-not-found", "there is no customer with this id")
            if customer.erased:
                return ()
            return (
                CustomerErasureRequested(customer_id=customer_id, reason=reason),
                CustomerErased(customer_id=customer_id, key_destroyed=True),
            )


def evolve(customer: Customer, event: Event) -> Customer:
    """Fold one event."""
    match event:
        case CustomerRegistered():
            return Customer(number=event.number, kind=event.kind)
        case CustomerErased():
            return replace(customer, erased=True)
    return customer


CUSTOMER: Decider[Any, Customer] = Decider("customer", Customer(), decide, evolve)
