"""Routes: scores and why they are what they are, lists, and the models."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import Path, Query, Request, Response
from pydantic import AwareDatetime

from kehu.clock import Clock
from kehu.decider import Refused
from kehu.events import Recorded
from kehu.events.scoring import Band, LeadQualified, LeadScoreBandChanged, LeadScoreChanged, ScoringModel
from kehu.eventstore import EventStore
from kehu.gate import CommandGate
from kehu.http import (
    Call,
    FieldError,
    Page,
    Problem,
    Role,
    Router,
    answer,
    commands,
    etag,
    json_response,
    paging,
    requires,
)
from kehu.kafka.admin import router as parked_events
from kehu.postgres import Pool
from scoring.api.schemas import (
    CurrentModelAnswer,
    HistoryAnswer,
    ModelAnswer,
    ModelsAnswer,
    PublishAnswer,
    PublishBody,
    ScoreAnswer,
    ScoresAnswer,
)
from scoring.domain.scoring_model import PublishModel, check
from scoring.read_models import explanation, inputs, scores
from scoring.read_models.published_models import published

__all__ = ["parked_events", "router"]

READERS = (Role.SALES, Role.SERVICE, Role.MARKETING, Role.MANAGER, Role.ANALYST, Role.ADMIN, Role.SYSTEM)
_MOST_VERSIONS = 2**31 - 1
# The times that can be asked about: how far a score can be foreseen, and since when anything was recorded.
AHEAD = timedelta(days=3650)
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)

router = Router(tags=["scoring"])
LeadId = Annotated[UUID, Path(description="Id of the lead.")]


@router.get("/leads/{lead_id}/score", response_model=ScoreAnswer, dependencies=[requires(*READERS)])
def get_score(
    request: Request,
    lead_id: LeadId,
    as_of: Annotated[
        AwareDatetime | None, Query(description="Recorded time: what became known later does not count. Default: now.")
    ] = None,
    until: Annotated[
        AwareDatetime | None,
        Query(description="Business time: the instant that is scored, in the future too. Default: `as_of`."),
    ] = None,
) -> Response:
    """The score of a lead with its parts and the events behind them, now or as of any past time."""
    clock: Clock = request.app.state.clock
    now = clock.now()
    _check_time("as_of", as_of, now)
    _check_time("until", until, now + AHEAD)
    pool: Pool = request.app.state.pool
    with pool.connection() as connection, connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        found = explanation.explain(connection, request.app.state.books, lead_id, until or as_of or now, as_of)
    if found is None:
        raise Problem(404, "Scoring knows no such lead, or did not know it then.")
    return json_response(asdict(found))


def _check_time(name: str, at: datetime | None, latest: datetime) -> None:
    if at is not None and not EARLIEST <= at <= latest:
        reason = f"must be from {EARLIEST:%Y} on and not after {latest:%Y-%m-%dT%H:%M:%SZ}"
        raise Problem(
            422, "The time is out of bounds.", "invalid", errors=[FieldError(at="query", field=name, reason=reason)]
        )


@router.get("/leads/{lead_id}/score/history", response_model=HistoryAnswer, dependencies=[requires(*READERS)])
def get_history(request: Request, lead_id: LeadId, page: Annotated[Page, paging()]) -> Response:
    """Every change of a lead's score, with its cause, the newest first."""
    store: EventStore = request.app.state.store
    after = page.after(int)
    before = after[0] if after else _MOST_VERSIONS
    found = explanation.history(store, lead_id, before, page.limit + 1)
    if not found and after is None:
        raise Problem(404, "This lead has no score.")
    return json_response(page.answer(found, lambda recorded: (recorded.version,), _change))


def _change(recorded: Recorded) -> dict[str, Any]:
    event = recorded.event
    assert isinstance(event, LeadScoreChanged | LeadScoreBandChanged | LeadQualified)
    changed = event if isinstance(event, LeadScoreChanged) else None
    return {
        "event_id": recorded.id,
        "version": recorded.version,
        "type": recorded.type,
        "time": event.at,
        "recorded": recorded.recorded,
        "score": event.score,
        "band": event.band,
        "previous": None if isinstance(event, LeadQualified) else event.previous,
        "cause": changed.cause if changed else None,
        "cause_events": changed.cause_events if changed else (),
        "parts": [part.model_dump(mode="json") for part in changed.parts] if changed else None,
        "model_version": event.model_version,
    }


@router.get("/scores", response_model=ScoresAnswer, dependencies=[requires(*READERS)])
def list_scores(
    request: Request,
    page: Annotated[Page, paging()],
    band: Annotated[Band | None, Query(description="Only leads of this band.")] = None,
    least: Annotated[float, Query(alias="min", ge=0, le=100, description="The lowest score that is listed.")] = 0.0,
    qualified: Annotated[bool, Query(description="Only leads that are, or have been, qualified.")] = False,
) -> Response:
    """Open leads, the highest score first. A score is that of its last change (`at`); it fades until the next one."""
    after = page.after(float, UUID)
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = scores.page(connection, page.limit + 1, band, least, qualified, after and (after[0], after[1]))
    return json_response(page.answer(rows, lambda row: (row["score"], row["lead_id"])))


@router.get("/models", response_model=ModelsAnswer, dependencies=[requires(*READERS)])
def list_models(request: Request, page: Annotated[Page, paging(20, 50)]) -> Response:
    """Published versions, the newest first."""
    after = page.after(int)
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = published(connection, after[0] if after else _MOST_VERSIONS, page.limit + 1)
    return json_response(page.answer(rows, lambda row: (row["model_version"],)))


@router.get("/models/current", response_model=CurrentModelAnswer, dependencies=[requires(*READERS)])
def current_model(request: Request) -> Response:
    """The model in force, and how many leads still have a score of an older one. The ETag is for publishing the next."""
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = published(connection, _MOST_VERSIONS, 1)
        if not rows:
            raise Problem(404, "No model was published yet.")
        version = rows[0]["model_version"]
        left = inputs.count_behind(connection, version)
    return json_response({**rows[0], "leads_to_rescore": left}, headers={"ETag": etag(version)})


@router.get("/models/{version}", response_model=ModelAnswer, dependencies=[requires(*READERS)])
def get_model(request: Request, version: Annotated[int, Path(ge=1, lt=_MOST_VERSIONS)]) -> Response:
    """One published version. It never changes."""
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = published(connection, version + 1, 1)
    if not rows or rows[0]["model_version"] != version:
        raise Problem(404, "There is no such version.")
    return json_response(rows[0], headers={"ETag": etag(version)})


@router.post("/models", status_code=201, response_model=PublishAnswer)
async def publish_model(
    request: Request, body: PublishBody, call: Annotated[Call, commands(Role.ADMIN, Role.MARKETING, Role.MANAGER)]
) -> Response:
    """Score leads by these rules from now on. All leads are scored again in the background."""
    model = ScoringModel.model_validate(body.model.model_dump())
    try:
        check(model)
    except Refused as refused:
        wrong = FieldError(at="body", field=refused.field or "", reason=refused.detail)
        raise Problem(422, "The model cannot be published.", refused.slug, errors=[wrong]) from None
    gate: CommandGate = request.app.state.gate
    clock: Clock = request.app.state.clock
    outcome = await gate.submit(call.request(PublishModel(model, body.note, clock.now())))
    return answer(outcome, 201)
