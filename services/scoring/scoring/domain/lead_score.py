"""The score of one lead: when it changes, which band it is in, and the one moment at which the lead is qualified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from kehu.decider import Decider
from kehu.events import Event
from kehu.events.scoring import Band, LeadQualified, LeadScoreBandChanged, LeadScoreChanged
from scoring.domain.evaluation import SECOND, UNIT, Evaluation, Inputs, Rulebook, band_of, evaluate, quiet

Cause = Literal["profile", "behaviour", "decay", "model", "merge"]
# Changes by time alone that one decision catches up with; a lead that was left alone for long has passed two or three.
MOST_CAUGHT_UP = 8
MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Rescore:
    """Something that can change the score became known.

    Args:
        lead_id: the lead that is scored.
        customer_id: whose lead it is.
        at: when it happened. The score is of this instant, or of the last known one when that is later.
        cause: what it was; `decay` is time alone, and is only recorded when it changes the band.
        cause_events: the events behind it.
        book: the model in force.
        inputs: all that is known of the lead, this included.
    """

    lead_id: UUID
    customer_id: UUID
    at: datetime
    cause: Cause
    cause_events: tuple[UUID, ...]
    book: Rulebook
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class LeadScore:
    """What was last recorded.

    Args:
        at: the instant of the score, None before the first one.
        model_version: by which it was scored.
    """

    units: int = 0
    band: Band = "cold"
    qualified: bool = False
    at: datetime | None = None
    model_version: int = 0


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a command comes to: events to record, the state after them, and the evaluation behind it."""

    events: Sequence[Event]
    state: LeadScore
    evaluation: Evaluation

    @property
    def next_change(self) -> datetime | None:
        """The whole second at which time alone next changes the band or qualifies the lead, None when it never does."""
        return self.evaluation.next_outside(*quiet(self.evaluation.book.model, self.state.band, self.state.qualified))


def assess(command: Rescore, state: LeadScore) -> Assessment:
    """Score the lead. The first score is always recorded; later ones when they differ by a hundredth of a point.

    Changes by time alone since the last score are recorded first, at their own instants, when their timer was slower than
    this command: so the history of a lead is the same whichever comes first, its timer or the next event.
    """
    evaluation = evaluate(command.book, command.inputs, instant(command, state))
    events: list[Event] = []
    if command.cause != "decay" and (evaluation.fades_up or (evaluation.fades_down and state.band != "cold")):
        for passed in _passed(command, state, evaluation.at):
            events += (news := _record(command, state, passed, "decay"))
            state = LEAD_SCORE.fold(news, state)
    events += (news := _record(command, state, evaluation, command.cause))
    return Assessment(events, LEAD_SCORE.fold(news, state), evaluation)


def decide(command: Rescore, state: LeadScore) -> Sequence[Event]:
    """The events of the assessment; none when nothing changed."""
    return assess(command, state).events


def evolve(state: LeadScore, event: Event) -> LeadScore:
    """The state after an event. Every event tells all of it, so a long history need not be read: the newest event is enough."""
    if isinstance(event, LeadScoreChanged | LeadScoreBandChanged):
        return LeadScore(round(event.score * UNIT), event.band, event.qualified, event.at, event.model_version)
    if isinstance(event, LeadQualified):
        return LeadScore(round(event.score * UNIT), event.band, True, event.at, event.model_version)
    return state


LEAD_SCORE: Decider[Rescore, LeadScore] = Decider("lead_score", LeadScore(), decide, evolve)


def instant(command: Rescore, state: LeadScore) -> datetime:
    """The instant that is scored: time never runs back for a lead, so a late fact counts from the last known instant on."""
    return max(each for each in (command.at, state.at, command.inputs.newest) if each is not None)


def _passed(command: Rescore, state: LeadScore, until: datetime) -> Iterator[Evaluation]:
    """What time alone changed after the last score and before `until`."""
    book, inputs = command.book, command.inputs
    if state.at is None:
        return
    since = state.at if state.model_version == book.version else max(state.at, book.since)
    if until - since <= SECOND:
        return
    before = evaluate(book, inputs, since)
    low, high = quiet(book.model, state.band, state.qualified)
    if not low <= before.units < high:
        return  # another model or a late fact did that, not time
    for _ in range(MOST_CAUGHT_UP):
        due = before.next_outside(*quiet(book.model, state.band, state.qualified), until - MICROSECOND)
        if due is None:
            return
        before = evaluate(book, inputs, due)
        yield before
        state = LEAD_SCORE.fold(_record(command, state, before, "decay"), state)


def _record(command: Rescore, state: LeadScore, evaluation: Evaluation, cause: Cause) -> list[Event]:
    """The events that this evaluation is worth."""
    model, version, units = command.book.model, command.book.version, evaluation.units
    band = band_of(model, units, state.band)
    qualifies = not state.qualified and units >= round(model.qualify_at * UNIT)
    if cause == "decay" and band == state.band and not qualifies:
        return []
    events: list[Event] = []
    if state.at is None or units != state.units:
        events.append(
            LeadScoreChanged(
                lead_id=command.lead_id,
                customer_id=command.customer_id,
                score=units / UNIT,
                previous=state.units / UNIT,
                band=band,
                qualified=state.qualified or qualifies,
                parts=evaluation.parts,
                cause=cause,
                cause_events=() if cause == "decay" else command.cause_events,
                model_version=version,
                at=evaluation.at,
            )
        )
    if band != state.band:
        events.append(
            LeadScoreBandChanged(
                lead_id=command.lead_id,
                customer_id=command.customer_id,
                band=band,
                previous=state.band,
                score=units / UNIT,
                qualified=state.qualified or qualifies,
                model_version=version,
                at=evaluation.at,
            )
        )
    if qualifies:
        events.append(
            LeadQualified(
                lead_id=command.lead_id,
                customer_id=command.customer_id,
                score=units / UNIT,
                band=band,
                threshold=model.qualify_at,
                model_version=version,
                at=evaluation.at,
            )
        )
    return events
