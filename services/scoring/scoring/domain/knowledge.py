"""What is known of customers and their leads, and which lead it scores.

All that is known of a customer (profile and behaviours) scores one lead: the customer's oldest open one. When a lead is
merged, what is known of its customer goes to the lead that survives; when it is rejected, the next lead of the customer
starts with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal
from uuid import UUID

from scoring.domain.evaluation import BehaviourInput, Inputs, ProfileInput

Closing = Literal["merged", "rejected", "erased"]
# Merges that are followed from a lead to the one that survives them all.
MOST_MERGES = 1_000


@dataclass(frozen=True, slots=True)
class LeadOpened:
    """A lead was captured, with what it told."""

    lead_id: UUID
    customer_id: UUID
    profile: ProfileInput


@dataclass(frozen=True, slots=True)
class ProfileTold:
    """More became known of who a customer is."""

    customer_id: UUID
    profile: ProfileInput


@dataclass(frozen=True, slots=True)
class BehaviourSeen:
    """A customer did something."""

    customer_id: UUID
    behaviour: BehaviourInput


@dataclass(frozen=True, slots=True)
class LeadClosed:
    """A lead ended, for another one (`survivor`) or for good."""

    lead_id: UUID
    customer_id: UUID
    closing: Closing
    survivor: UUID | None = None


@dataclass(frozen=True, slots=True)
class CustomerLeft:
    """A customer was erased: all open leads end."""

    customer_id: UUID


Fact = LeadOpened | ProfileTold | BehaviourSeen | LeadClosed | CustomerLeft


@dataclass(frozen=True, slots=True)
class Lead:
    """One lead as scoring knows it.

    Args:
        since: when scoring came to know it (recorded time).
        place: which lead of its customer it is, from 0 in the order in which they became known.
        closed_at: when scoring came to know that it ended.
        model_version: of its last score, 0 before the first.
    """

    lead_id: UUID
    customer_id: UUID
    since: datetime
    place: int = 0
    closed_at: datetime | None = None
    closing: Closing | None = None
    survivor: UUID | None = None
    model_version: int = 0


@dataclass(slots=True)
class Knowledge:
    """Leads and inputs of some customers, as far as a batch of decisions needs them. It grows as the batch goes on."""

    leads: dict[UUID, Lead] = field(default_factory=dict)
    profile: dict[UUID, dict[UUID, ProfileInput]] = field(default_factory=dict)
    behaviours: dict[UUID, dict[UUID, BehaviourInput]] = field(default_factory=dict)
    _of_customer: dict[UUID, dict[UUID, None]] = field(default_factory=dict)
    _merged_into: dict[UUID, dict[UUID, None]] = field(default_factory=dict)

    def put(self, lead: Lead) -> Lead:
        """Take a lead in, or a new state of it."""
        self.leads[lead.lead_id] = lead
        self._of_customer.setdefault(lead.customer_id, {})[lead.lead_id] = None
        if lead.survivor is not None:
            self._merged_into.setdefault(lead.survivor, {})[lead.lead_id] = None
        return lead

    def learn(self, fact: Fact, at: datetime) -> list[Lead]:
        """Take a fact in and give the leads that it opened or closed. The same fact again changes nothing.

        Args:
            at: when it became known (recorded time).
        """
        match fact:
            case LeadOpened(lead_id, customer_id, profile):
                self.tell(customer_id, profile)
                return [] if lead_id in self.leads else [self.put(self._new(lead_id, customer_id, at))]
            case ProfileTold(customer_id, profile):
                self.tell(customer_id, profile)
                return []
            case BehaviourSeen(customer_id, behaviour):
                self.see(customer_id, behaviour)
                return []
            case LeadClosed(lead_id, customer_id, closing, survivor):
                lead = self.leads.get(lead_id) or self._new(lead_id, customer_id, at)
                return self._close([lead], at, closing, survivor)
            case CustomerLeft(customer_id):
                return self._close(self._leads_of(customer_id), at, "erased", None)

    def tell(self, customer_id: UUID, profile: ProfileInput) -> None:
        """Take profile facts in."""
        self.profile.setdefault(customer_id, {})[profile.event_id] = profile

    def see(self, customer_id: UUID, behaviour: BehaviourInput) -> None:
        """Take a behaviour in."""
        self.behaviours.setdefault(customer_id, {})[behaviour.event_id] = behaviour

    def _new(self, lead_id: UUID, customer_id: UUID, at: datetime) -> Lead:
        return Lead(lead_id, customer_id, at, place=len(self._of_customer.get(customer_id, ())))

    def _close(self, leads: Iterable[Lead], at: datetime, closing: Closing, survivor: UUID | None) -> list[Lead]:
        return [
            self.put(replace(lead, closed_at=at, closing=closing, survivor=survivor))
            for lead in leads
            if lead.closed_at is None
        ]

    def _leads_of(self, customer_id: UUID) -> list[Lead]:
        """The customer's leads, the oldest first."""
        leads = (self.leads[lead_id] for lead_id in self._of_customer.get(customer_id, ()))
        return sorted(leads, key=lambda lead: lead.place)

    def scored(self, customer_id: UUID) -> Lead | None:
        """The lead that this customer's inputs score: the oldest open one, else the one that the last one was merged into."""
        leads = self._leads_of(customer_id)
        for lead in leads:
            if lead.closed_at is None:
                return lead
        survivor = self.survivor(leads[-1].lead_id) if leads else None
        return survivor if survivor is not None and survivor.closed_at is None else None

    def survivor(self, lead_id: UUID) -> Lead | None:
        """The lead itself, or the one in which its merges ended; None when that one is not known."""
        lead = self.leads.get(lead_id)
        for _ in range(MOST_MERGES):
            if lead is None or lead.survivor is None:
                break
            lead = self.leads.get(lead.survivor)
        return lead

    def inputs(self, lead_id: UUID) -> Inputs:
        """All that scores a lead: what is known of its customer and of the customers whose leads were merged into it."""
        feeding, found = [lead_id], {lead_id: None}
        while feeding and len(found) <= MOST_MERGES:
            for merged in self._merged_into.get(feeding.pop(), ()):
                if merged not in found:
                    found[merged] = None
                    feeding.append(merged)
        customers = {self.leads[each].customer_id for each in found if each in self.leads}
        return Inputs.of(
            (profile for customer in customers for profile in self.profile.get(customer, {}).values()),
            (behaviour for customer in customers for behaviour in self.behaviours.get(customer, {}).values()),
        )
