"""The table of contents: every command of scoring and how it is carried out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from kehu.clock import Clock
from kehu.commands import Handles, Plan, Request, Step
from kehu.decider import Decider
from kehu.events import Event
from kehu.eventstore import Pending
from kehu.postgres import Connection, Row
from scoring.domain.evaluation import Rulebook
from scoring.domain.knowledge import (
    BehaviourSeen,
    CustomerLeft,
    Fact,
    Knowledge,
    Lead,
    LeadClosed,
    LeadOpened,
    ProfileTold,
)
from scoring.domain.lead_score import LEAD_SCORE, Assessment, Cause, LeadScore, Rescore, assess, evolve
from scoring.domain.scoring_model import MODEL, MODELS, PublishModel
from scoring.processes import decay
from scoring.read_models import inputs
from scoring.read_models.published_models import Books, model_rows


@dataclass(frozen=True, slots=True)
class Learn:
    """Something became known: keep it, and score the lead that it is about.

    Args:
        event_id: the event that told it.
        at: when it happened.
    """

    fact: Fact
    event_id: UUID
    at: datetime


@dataclass(frozen=True, slots=True)
class Reconsider:
    """Nothing new is known of the lead, but time went by (`decay`), or another model is in force (`model`).

    Args:
        at: the instant to score; for `model` the last known one of the lead when it is later.
    """

    lead_id: UUID
    cause: Literal["decay", "model"]
    at: datetime


def handlers(books: Books, clock: Clock) -> Mapping[type[Any], Handles]:
    """How each command is handled."""
    scoring = Scoring(books, clock)
    return {
        Learn: Handles(scoring.plan, scoring.learn),
        Reconsider: Handles(scoring.plan, scoring.reconsider),
        PublishModel: Handles(publish),
    }


@dataclass(frozen=True, slots=True)
class Batch:
    """What the commands of a batch share.

    Args:
        known: what is known at the end of the batch.
        assessed: what became of each lead last, as far as it is decided: its timer follows from more than its events.
    """

    known: Knowledge
    assessed: dict[UUID, Assessment] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a command comes down to: a lead to score, or none, and rows to keep."""

    rescore: Rescore | None
    rows: Sequence[Row]
    batch: Batch


def _assess(prepared: Prepared, state: LeadScore) -> Sequence[Event]:
    assert prepared.rescore is not None
    assessment = assess(prepared.rescore, state)
    prepared.batch.assessed[prepared.rescore.lead_id] = assessment
    return assessment.events


_ASSESSING: Decider[Prepared, LeadScore] = Decider(LEAD_SCORE.stream, LEAD_SCORE.initial, _assess, evolve)


class Scoring:
    """Looks up what a batch of commands needs, with the same few queries for one command as for hundreds."""

    def __init__(self, books: Books, clock: Clock) -> None:
        self.books, self.clock = books, clock

    def learn(self, connection: Connection, requests: Sequence[Request[Learn]]) -> list[Prepared]:
        """Take the facts of a batch in, one after the other: each decision sees what came before it."""
        facts = [request.command.fact for request in requests]
        survivors = {fact.survivor for fact in facts if isinstance(fact, LeadClosed) and fact.survivor is not None}
        book = self.books.in_force(connection)
        known = inputs.load(connection, {fact.customer_id for fact in facts}, survivors)
        now = self.clock.now()
        batch = Batch(known)
        return [self._learn(request.command, book, batch, now) for request in requests]

    def _learn(self, command: Learn, book: Rulebook, batch: Batch, now: datetime) -> Prepared:
        known = batch.known
        fact = command.fact
        touched = {lead.lead_id: None for lead in known.learn(fact, now)}
        lead = known.scored(fact.customer_id)
        rescore = None
        if lead is not None and not isinstance(fact, CustomerLeft):
            rescore = _rescore(lead, known, book, _cause(fact), command.at, (command.event_id,))
            if lead.model_version != book.version:
                known.put(replace(lead, model_version=book.version))
                touched[lead.lead_id] = None
        rows = [*inputs.fact_rows(fact, now), *(inputs.lead_row(known.leads[lead_id]) for lead_id in touched)]
        rows += [decay.stop(lead_id) for lead_id in touched if known.leads[lead_id].closed_at is not None]
        return Prepared(rescore, rows, batch)

    def reconsider(self, connection: Connection, requests: Sequence[Request[Reconsider]]) -> list[Prepared]:
        """Score leads again from what is known of them. A lead that has ended meanwhile is left alone."""
        book = self.books.in_force(connection)
        known = inputs.load(connection, (), {request.command.lead_id for request in requests})
        prepared: list[Prepared] = []
        batch = Batch(known)
        for request in requests:
            command = request.command
            lead = known.leads.get(command.lead_id)
            if lead is None or lead.closed_at is not None:
                prepared.append(Prepared(None, (), batch))
            else:
                rescore = _rescore(lead, known, book, command.cause, command.at, ())
                rows = [inputs.scored_row(lead.lead_id, book.version)] if lead.model_version != book.version else ()
                prepared.append(Prepared(rescore, rows, batch))
        return prepared

    def plan(self, _: Request[Any], prepared: Prepared) -> Plan:
        """One step on the lead's stream; its newest event is enough to decide."""
        rescore = prepared.rescore
        if rescore is None:
            return Plan([], rows=lambda _: prepared.rows)
        step = Step(
            f"{_ASSESSING.stream}-{rescore.lead_id}", _ASSESSING, prepared, str(rescore.customer_id), history=False
        )

        def rows(_: Sequence[Pending]) -> Iterable[Row]:
            yield from prepared.rows
            # Asked for when all of the batch is decided: one timer for each lead, by what became of it last.
            last = prepared.batch.assessed.pop(rescore.lead_id, None)
            ended = prepared.batch.known.leads[rescore.lead_id].closed_at is not None
            if last is not None and not ended and (due := last.next_change) is not None:
                yield decay.start(rescore.lead_id, due)

        return Plan([step], rows=rows)


def publish(request: Request[PublishModel], _: None) -> Plan:
    """The next version of the model, and its row."""

    def result(new: Sequence[Pending]) -> Mapping[str, Any]:
        return {"published": bool(new), "model_version": new[0].envelope.version if new else None}

    return Plan([Step(f"{MODELS.stream}-{MODEL}", MODELS, request.command)], result, model_rows)


def _rescore(
    lead: Lead, known: Knowledge, book: Rulebook, cause: Cause, at: datetime, events: tuple[UUID, ...]
) -> Rescore:
    return Rescore(lead.lead_id, lead.customer_id, at, cause, events, book, known.inputs(lead.lead_id))


def _cause(fact: Fact) -> Cause:
    match fact:
        case BehaviourSeen():
            return "behaviour"
        case LeadClosed():
            return "merge"
        case LeadOpened() | ProfileTold() | CustomerLeft():
            return "profile"
