"""Which lead is scored by what: merges carry inputs over, closed leads are left alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from scoring.domain.evaluation import BehaviourInput, ProfileInput
from scoring.domain.knowledge import BehaviourSeen, CustomerLeft, Knowledge, LeadClosed, LeadOpened, ProfileTold

AT = datetime(2026, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ANNA, BO = UUID(int=1), UUID(int=2)
FIRST, SECOND, THIRD = UUID(int=11), UUID(int=12), UUID(int=13)


def opened(lead: UUID, customer: UUID, event: int) -> LeadOpened:
    return LeadOpened(lead, customer, ProfileInput(UUID(int=event), AT, {"channel": f"c{event}"}))


def seen(customer: UUID, event: int) -> BehaviourSeen:
    return BehaviourSeen(customer, BehaviourInput(UUID(int=event), AT, "page_viewed", {}))


def known(*facts: LeadOpened | ProfileTold | BehaviourSeen | LeadClosed | CustomerLeft) -> Knowledge:
    knowledge = Knowledge()
    for number, fact in enumerate(facts):
        knowledge.learn(fact, AT + number * MINUTE)
    return knowledge


def scored(knowledge: Knowledge, customer: UUID) -> UUID | None:
    lead = knowledge.scored(customer)
    return lead.lead_id if lead else None


def events(knowledge: Knowledge, lead: UUID) -> set[int]:
    inputs = knowledge.inputs(lead)
    return {each.event_id.int for each in inputs.profile} | {each.event_id.int for each in inputs.behaviours}


def test_behaviour_before_the_lead_counts_once_the_lead_is_there() -> None:
    knowledge = known(seen(ANNA, 101))
    assert scored(knowledge, ANNA) is None
    knowledge.learn(opened(FIRST, ANNA, 102), AT)
    assert scored(knowledge, ANNA) == FIRST
    assert events(knowledge, FIRST) == {101, 102}


def test_the_same_fact_again_changes_nothing() -> None:
    knowledge = known(opened(FIRST, ANNA, 101), seen(ANNA, 102))
    assert knowledge.learn(opened(FIRST, ANNA, 101), AT + MINUTE) == []
    knowledge.learn(seen(ANNA, 102), AT + MINUTE)
    assert events(knowledge, FIRST) == {101, 102}
    assert len(knowledge.inputs(FIRST).behaviours) == 1


@pytest.mark.req("SC-01")
def test_a_merged_lead_of_the_same_customer_gives_its_profile_to_the_survivor() -> None:
    knowledge = known(opened(FIRST, ANNA, 101), opened(SECOND, ANNA, 102))
    assert scored(knowledge, ANNA) == FIRST
    (closed,) = knowledge.learn(LeadClosed(SECOND, ANNA, "merged", FIRST), AT + MINUTE)
    assert (closed.lead_id, closed.closing, closed.survivor) == (SECOND, "merged", FIRST)
    knowledge.learn(seen(ANNA, 103), AT)
    assert scored(knowledge, ANNA) == FIRST
    assert events(knowledge, FIRST) == {101, 102, 103}
    assert knowledge.survivor(SECOND) == knowledge.leads[FIRST]


@pytest.mark.req("SC-01")
def test_a_lead_of_another_customer_takes_its_inputs_along_through_a_chain_of_merges() -> None:
    knowledge = known(opened(FIRST, ANNA, 101), opened(SECOND, BO, 102), opened(THIRD, UUID(int=3), 103), seen(BO, 104))
    knowledge.learn(LeadClosed(SECOND, BO, "merged", THIRD), AT + 5 * MINUTE)
    knowledge.learn(LeadClosed(THIRD, UUID(int=3), "merged", FIRST), AT + 6 * MINUTE)
    assert events(knowledge, FIRST) == {101, 102, 103, 104}
    knowledge.learn(seen(BO, 105), AT)
    assert scored(knowledge, BO) == FIRST


def test_after_a_rejection_the_next_lead_of_the_customer_is_scored() -> None:
    knowledge = known(opened(FIRST, ANNA, 101), seen(ANNA, 102), LeadClosed(FIRST, ANNA, "rejected"))
    assert scored(knowledge, ANNA) is None
    knowledge.learn(opened(SECOND, ANNA, 103), AT + 9 * MINUTE)
    assert scored(knowledge, ANNA) == SECOND
    assert events(knowledge, SECOND) == {101, 102, 103}
    assert knowledge.learn(LeadClosed(FIRST, ANNA, "rejected"), AT) == []


def test_an_erased_customer_has_no_lead_to_score() -> None:
    knowledge = known(opened(FIRST, ANNA, 101), CustomerLeft(ANNA))
    assert scored(knowledge, ANNA) is None
    assert knowledge.leads[FIRST].closing == "erased"


def test_merges_in_a_circle_end() -> None:
    knowledge = known(opened(FIRST, ANNA, 101), opened(SECOND, BO, 102))
    knowledge.learn(LeadClosed(FIRST, ANNA, "merged", SECOND), AT)
    knowledge.learn(LeadClosed(SECOND, BO, "merged", FIRST), AT)
    assert scored(knowledge, ANNA) is None
    assert events(knowledge, FIRST) == {101, 102}
