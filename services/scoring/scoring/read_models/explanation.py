"""Why is it 83, and why did it change: a score with its parts and the events behind them, now or as of any past time.

Nothing is kept for this but the inputs. A score is worked out again from what was known then, by the model that was in
force then, in the same way as the live one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from kehu.events import Recorded
from kehu.events.scoring import Part
from kehu.eventstore import EventStore
from kehu.postgres import Connection
from scoring.domain.evaluation import Evaluation, Inputs, band_of, evaluate, quiet
from scoring.domain.lead_score import LEAD_SCORE, LeadScore
from scoring.read_models import inputs
from scoring.read_models.published_models import Books, NoModel

_BEFORE = """
SELECT state, notification_id FROM stored_events
CROSS JOIN LATERAL (SELECT convert_from(state, 'UTF8')::jsonb AS envelope) AS parsed
WHERE originator_id = %s AND (envelope ->> 'recordedtime')::timestamptz <= %s AND (envelope ->> 'time')::timestamptz <= %s
ORDER BY originator_version DESC LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A score at an instant.

    Args:
        asked_for: the lead that was asked for; another one than `lead_id` when it was merged.
        open: False when the lead had ended: then this is its last score, as it was recorded.
        qualified: whether the lead was, or had been, qualified.
        next_change_at: when time alone next changes the band.
    """

    asked_for: UUID
    lead_id: UUID
    customer_id: UUID
    open: bool
    as_of: datetime
    at: datetime
    score: float
    band: str
    qualified: bool
    model_version: int
    parts: list[dict[str, Any]]
    next_change_at: datetime | None


def explain(
    connection: Connection, books: Books, lead_id: UUID, until: datetime, as_of: datetime | None = None
) -> Explanation | None:
    """The score of a lead, None when it was not known then.

    Args:
        until: business time: the instant that is scored, and what happened later does not count.
        as_of: recorded time: what scoring came to know later does not count. None is all that is known.
    """
    shown_as_of, as_of = as_of or until, as_of or inputs.FOREVER
    known = inputs.load(connection, (), [lead_id], as_of, until)
    asked = known.leads.get(lead_id)
    if asked is None:
        return None
    lead = known.survivor(lead_id) or asked
    if lead.closed_at is None:
        lead = known.scored(lead.customer_id) or lead
    if lead.closed_at is not None:  # it fades no more, and what its customer did later is not about it
        as_of = min(as_of, lead.closed_at)
        known = inputs.load(connection, (), [lead.lead_id], as_of, until)
    recorded = _newest(connection, lead.lead_id, as_of, until)
    state = LEAD_SCORE.fold([recorded.event] if recorded else [])
    if lead.closed_at is not None:
        until = state.at or until
    known_inputs = known.inputs(lead.lead_id)
    try:
        book = books.in_force(connection, as_of)
    except NoModel:
        return None
    evaluation = evaluate(book, known_inputs, until)
    return Explanation(
        asked_for=lead_id,
        lead_id=lead.lead_id,
        customer_id=lead.customer_id,
        open=lead.closed_at is None,
        as_of=shown_as_of,
        at=until,
        score=evaluation.score,
        band=band_of(book.model, evaluation.units, state.band),
        qualified=state.qualified,
        model_version=book.version,
        parts=[_shown(part, evaluation, known_inputs) for part in evaluation.parts],
        next_change_at=_next_change(evaluation, state) if lead.closed_at is None else None,
    )


def _next_change(evaluation: Evaluation, state: LeadScore) -> datetime | None:
    model = evaluation.book.model
    band = band_of(model, evaluation.units, state.band)
    return evaluation.next_outside(*quiet(model, band, state.qualified))


def _newest(connection: Connection, lead_id: UUID, as_of: datetime, until: datetime) -> Recorded | None:
    """The newest event of the lead's score that was recorded by `as_of` and happened by `until`."""
    stream = f"{LEAD_SCORE.stream}-{lead_id}"
    row = connection.execute(_BEFORE, (stream, as_of, until)).fetchone()
    return Recorded.from_bytes(row[0], row[1]) if row else None


def _shown(part: Part, evaluation: Evaluation, known: Inputs) -> dict[str, Any]:
    """A part with the rule in words and what happened."""
    rule = next((rule for rule in evaluation.book.model.rules if rule.name == part.rule), None)
    happened: dict[UUID, tuple[str, datetime]] = {}
    for told in known.profile:
        happened[told.event_id] = ("profile", told.time)
    for did in known.behaviours:
        happened[did.event_id] = (did.kind, did.time)
    return {
        "rule": part.rule,
        "title": rule.title if rule else _CAPS.get(part.rule, part.rule),
        "dimension": part.dimension,
        "points": part.points,
        "count": part.count,
        "points_each": rule.points if rule else None,
        "cap": rule.cap if rule else None,
        "half_life_days": rule.half_life_days if rule else None,
        "events": [
            {"event_id": event, "kind": happened[event][0], "time": happened[event][1]} for event in part.events
        ],
    }


_CAPS = {
    "base": "Everybody starts with this",
    "cap.frequency": "More than interaction frequency can give",
    "cap.depth": "More than behaviour depth can give",
    "cap.fit": "More than profile fit can give",
    "cap.score": "Beyond the ends of the scale",
}


def history(store: EventStore, lead_id: UUID, before: int, limit: int) -> list[Recorded]:
    """The events of a lead's score with versions below `before`, the newest first: each with cause, parts and model version."""
    stored = store.recorder.select_events(f"{LEAD_SCORE.stream}-{lead_id}", lte=before - 1, desc=True, limit=limit)
    return [Recorded.from_bytes(event.state) for event in stored]
