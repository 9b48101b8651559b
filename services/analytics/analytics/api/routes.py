"""Routes: funnels over the lake, counts, timelines, conversion, and how far everything is."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Path as InPath
from fastapi import Query, Request, Response
from pydantic import AwareDatetime, ValidationError

from analytics.api.schemas import (
    ConversionAnswer,
    CountersAnswer,
    CountsAnswer,
    FunnelAnswer,
    ProjectionsAnswer,
    TimelineAnswer,
)
from analytics.read_models import customer_timeline, event_counts, lead_journey, live_counters, status
from analytics.settings import Settings
from analytics.subscriptions import LIVE_COUNTERS
from kehu.clock import Clock
from kehu.http import FieldError, Page, Problem, Role, Router, json_response, paging, requires
from kehu.http.problems import invalid
from kehu.kafka.admin import router as parked_events
from kehu.kafka.guard import Place
from kehu.kafka.topics import KafkaError, TopicMismatch
from kehu.lake import FunnelSpec, Lake, LakeMissing
from kehu.lake.questions import DEFAULT_STEPS, Entry, Order, Unit, funnel
from kehu.lake.stats import wilson
from kehu.postgres import Pool

__all__ = ["Funnels", "parked_events", "router"]

log = logging.getLogger(__name__)

READERS = (Role.ANALYST, Role.MANAGER, Role.ADMIN)
_ALLOWED = [requires(*READERS)]
_MOST_ROWS = 10_000
_MOST_DAYS = 3660

router = Router(tags=["analytics"])


class Funnels:
    """Counts funnels over the lake, a few at once, and keeps the last answers: a version of the lake does not change.

    Args:
        at_once: funnels that are computed together; others wait.
        kept: answers that are remembered.
    """

    def __init__(self, path: Path, at_once: int, kept: int = 64) -> None:
        self._path, self._kept = path, kept
        self._places = asyncio.Semaphore(at_once)
        self._answers: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()

    async def count(self, spec: FunnelSpec) -> dict[str, Any]:
        """The numbers of a funnel over the newest version of the lake.

        Raises:
            Problem: 409 when there is no lake yet, 422 when the breakdown has too many values.
        """
        async with self._places:
            return await asyncio.to_thread(self._count, spec)

    def version(self) -> int | None:
        """The newest version of the lake; None when there is none yet."""
        try:
            return Lake(self._path).snapshot().version
        except LakeMissing:
            return None

    def _count(self, spec: FunnelSpec) -> dict[str, Any]:
        try:
            lake = Lake(self._path)
        except LakeMissing:
            raise Problem(409, "There is no event in the lake yet.", "lake-empty") from None
        snapshot = lake.snapshot()
        key = (snapshot.id, spec.model_dump_json())
        answer = self._answers.get(key)
        if answer is None:
            try:
                result = lake.funnel(spec, snapshot=snapshot)
            except ValueError as error:
                raise Problem(422, str(error), "funnel-refused") from None
            answer = {
                "snapshot": result.snapshot,
                "horizon": result.horizon,
                "spec": result.spec.model_dump(mode="json"),
                "steps": [asdict(step) for step in result.steps],
                "values": [[asdict(step) for step in steps] for steps in result.values],
            }
            self._answers[key] = answer
            while len(self._answers) > self._kept:
                self._answers.popitem(last=False)
        return answer


@router.get("/funnel", response_model=FunnelAnswer, dependencies=_ALLOWED)
async def get_funnel(
    request: Request,
    step: Annotated[
        list[Annotated[str, Query(max_length=300)]] | None,
        Query(
            max_length=16,
            description="Repeat for each step: captured, qualified, converted, behaviour:demo_attended, or an event type with"
            " conditions, lead.captured[data.channel=baidu]. Default: captured, qualified, converted.",
        ),
    ] = None,
    window: Annotated[
        str, Query(max_length=20, description="From the first step to the last, e.g. 48h or 30d.")
    ] = "30d",
    by: Annotated[
        str | None,
        Query(
            max_length=200,
            description="channel, campaign, region, industry, day, week, month, quarter, year, or data.<field>.",
        ),
    ] = None,
    order: Annotated[Order, Query(description="strict: any other event in between ends a chain.")] = "ordered",
    entry: Annotated[Entry, Query(description="first: only a unit's first step 1 begins a chain.")] = "any",
    unit: Annotated[Unit, Query(description="Who goes through the funnel.")] = "customer",
    as_of: Annotated[AwareDatetime | None, Query(description="Recorded time: what we knew then. Default: now.")] = None,
    until: Annotated[AwareDatetime | None, Query(description="Business time: what happened by then.")] = None,
) -> Response:
    """How many of those who did the first step went on to each of the next, counted exactly over the lake."""
    settings: Settings = request.app.state.settings
    try:
        spec = funnel(
            step or DEFAULT_STEPS,
            window,
            by=by,
            order=order,
            entry=entry,
            unit=unit,
            as_of=as_of,
            until=until,
            tz=settings.timezone,
        )
    except ValidationError as error:
        raise invalid([_spec_error(line) for line in error.errors(include_url=False)]) from None
    except ValueError as error:
        field = "window" if "length of time" in str(error) or "too long" in str(error) else "step"
        raise _wrong(field, str(error)) from None
    return json_response(await request.app.state.funnels.count(spec))


@router.post("/funnel", response_model=FunnelAnswer, dependencies=_ALLOWED)
async def post_funnel(request: Request, spec: FunnelSpec) -> Response:
    """The same for a whole spec: exclusions, held attributes, optional steps, attribution. See the analysts' library."""
    return json_response(await request.app.state.funnels.count(spec))


@router.get("/counters", response_model=CountersAnswer, dependencies=_ALLOWED)
def get_counters(
    request: Request,
    span: Annotated[
        Literal["minute", "day"], Query(description="Length of a bucket. Minutes are kept for three days.")
    ] = "minute",
    since: Annotated[AwareDatetime | None, Query(description="Default: the last hour, or the last 30 days.")] = None,
    until: Annotated[AwareDatetime | None, Query(description="Not included. Default: now.")] = None,
    service: Annotated[str | None, Query(max_length=100)] = None,
    type_: Annotated[
        str | None, Query(alias="type", max_length=200, description="Wire type, e.g. lead.captured.v1.")
    ] = None,
    channel: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """Events by minute or day of their business time, within a second of their happening."""
    clock: Clock = request.app.state.clock
    end = until or clock.now() + timedelta(minutes=10)  # business time of a client may be a little ahead
    begin = since or end - (timedelta(hours=1, minutes=10) if span == "minute" else timedelta(days=30))
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = live_counters.counters(connection, span, begin, end, service, type_, channel, _MOST_ROWS + 1)
    items = [asdict(row) for row in rows[:_MOST_ROWS]]
    return json_response(
        {"span": span, "since": begin, "until": end, "items": items, "complete": len(rows) <= _MOST_ROWS}
    )


@router.get("/counts", response_model=CountsAnswer, dependencies=_ALLOWED)
def get_counts(
    request: Request,
    first: Annotated[date | None, Query(description="Default: 30 days before `last`.")] = None,
    last: Annotated[date | None, Query(description="Included. Default: today.")] = None,
    service: Annotated[str | None, Query(max_length=100)] = None,
    type_: Annotated[
        str | None, Query(alias="type", max_length=200, description="Wire type, e.g. lead.captured.v1.")
    ] = None,
) -> Response:
    """Events by day of their business time, kept for ever and rebuilt exactly by a replay."""
    settings: Settings = request.app.state.settings
    clock: Clock = request.app.state.clock
    end = last or clock.now().astimezone(settings.zone).date()
    begin = first or end - timedelta(days=30)
    if not begin <= end <= begin + timedelta(days=_MOST_DAYS):
        raise _wrong("first", f"must not be after last, nor more than {_MOST_DAYS} days before it")
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = event_counts.counts(connection, begin, end, service, type_, _MOST_ROWS + 1)
    items = [asdict(row) for row in rows[:_MOST_ROWS]]
    return json_response({"timezone": settings.timezone, "items": items, "complete": len(rows) <= _MOST_ROWS})


@router.get("/customers/{customer_id}/timeline", response_model=TimelineAnswer, dependencies=_ALLOWED)
def get_timeline(
    request: Request,
    customer_id: Annotated[UUID, InPath(description="Id of the customer.")],
    page: Annotated[Page, paging()],
) -> Response:
    """What happened to a customer, newest first. No personal data: that is read from the service that keeps it."""
    before = page.after(datetime, UUID)
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        rows = customer_timeline.timeline(
            connection, customer_id, (before[0], before[1]) if before else None, page.limit + 1
        )
    if not rows and before is None:
        raise Problem(404, "Nothing is known of such a customer.")
    return json_response(page.answer(rows, lambda row: (row.time, row.event_id), asdict))


@router.get("/conversion/by-score-band", response_model=ConversionAnswer, dependencies=_ALLOWED)
def get_conversion_by_score_band(
    request: Request,
    first: Annotated[date | None, Query(description="Month of the capture, any day of it.")] = None,
    last: Annotated[date | None, Query(description="Month of the capture, included.")] = None,
    channel: Annotated[str | None, Query(max_length=100)] = None,
    hot: Annotated[float, Query(ge=0, le=100, description="Lower edge of the band hot.")] = 80.0,
    warm: Annotated[float, Query(ge=0, le=100, description="Lower edge of the band warm.")] = 40.0,
) -> Response:
    """Whether a higher score means more conversion, by the last score before it, or the newest of a lead without one."""
    if warm > hot:
        raise _wrong("warm", "must not be above hot")
    return _conversion(request, "score-band", first, last, channel, hot, warm)


@router.get("/conversion/by-channel", response_model=ConversionAnswer, dependencies=_ALLOWED)
def get_conversion_by_channel(
    request: Request,
    first: Annotated[date | None, Query(description="Month of the capture, any day of it.")] = None,
    last: Annotated[date | None, Query(description="Month of the capture, included.")] = None,
) -> Response:
    """How the leads of each channel fared."""
    return _conversion(request, "channel", first, last, None)


@router.get("/conversion/by-month", response_model=ConversionAnswer, dependencies=_ALLOWED)
def get_conversion_by_month(
    request: Request,
    first: Annotated[date | None, Query(description="Month of the capture, any day of it.")] = None,
    last: Annotated[date | None, Query(description="Month of the capture, included.")] = None,
    channel: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """How the leads that were captured in each month fared."""
    return _conversion(request, "month", first, last, channel)


def _conversion(
    request: Request,
    by: str,
    first: date | None,
    last: date | None,
    channel: str | None,
    hot: float = 80.0,
    warm: float = 40.0,
) -> Response:
    pool: Pool = request.app.state.pool
    begin, end = (day.replace(day=1) if day else None for day in (first, last))
    with pool.connection() as connection:
        groups = lead_journey.conversion(connection, by, begin, end, channel, hot, warm)
    return json_response({"by": by, "items": [_rates(group) for group in groups]})


def _rates(group: lead_journey.Group) -> dict[str, Any]:
    low, high = wilson(group.converted, group.leads)
    return {
        **asdict(group),
        "qualified_rate": group.qualified / group.leads,
        "rate": group.converted / group.leads,
        "rate_low": low,
        "rate_high": high,
    }


@router.get("/projections", response_model=ProjectionsAnswer, dependencies=_ALLOWED)
async def get_projections(request: Request) -> Response:
    """How far each read model, the live counters and the lake have come, and rebuilds under way."""
    ends: dict[Place, int] | None
    try:
        async with asyncio.timeout(2.0):
            ends = await request.app.state.ends()
    except (KafkaError, TopicMismatch, OSError, TimeoutError) as error:
        log.info("the ends of the topics are not known", extra={"error": type(error).__name__})
        ends = None
    return json_response(await asyncio.to_thread(_projections, request, ends))


def _projections(request: Request, ends: dict[Place, int] | None) -> dict[str, Any]:
    pool: Pool = request.app.state.pool
    with pool.connection() as connection:
        items: Sequence[Any] = [asdict(r) for r in status.readers(connection, ends, {"live_counters": LIVE_COUNTERS})]
    return {"items": items, "lake_version": request.app.state.funnels.version()}


# Fields of the spec, as the query calls them; what concerns several of them is said of the steps.
_QUERY = {"breakdown": "by", "window": "window", "as_of": "as_of", "until": "until", "tz": "tz"}


def _spec_error(line: Mapping[str, Any]) -> FieldError:
    field = _QUERY.get(str(line["loc"][0]) if line["loc"] else "", "step")
    return FieldError(at="query", field=field, reason=str(line["msg"]).removeprefix("Value error, "))


def _wrong(field: str, reason: str) -> Problem:
    return invalid([FieldError(at="query", field=field, reason=reason)])
