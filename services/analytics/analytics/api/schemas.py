"""What the API of analytics answers with."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field


class FunnelStep(BaseModel):
    """One step, of all units or of those with one value of the breakdown."""

    value: str | None = Field(description="Of the breakdown; null in `steps`, and for units that have none.")
    step: int
    name: str
    entered: int = Field(description="Units that did the first step, without excluded ones.")
    reached: int
    converted: int = Field(description="Went on to a later step, or reached the last.")
    pending: int = Field(description="May still go on: their window is open.")
    dropped: int = Field(description="Their window is closed.")
    excluded: int
    rate: float | None = Field(description="reached / entered.")
    rate_low: float | None = Field(description="Lower end of the 95 % Wilson interval.")
    rate_high: float | None
    settled: int = Field(description="Entered, without those that may still reach this step.")
    settled_rate: float | None
    settled_low: float | None
    settled_high: float | None
    step_rate: float | None = Field(description="Of those that reached the step before.")
    seconds_median: float | None = Field(description="From the first step to this one.")
    seconds_p90: float | None
    gap_median: float | None = Field(description="From the step before, in seconds.")
    gap_p90: float | None
    young: bool = Field(description="Some are pending, so the rate will rise.")


class FunnelAnswer(BaseModel):
    """A funnel. With `snapshot` and `spec` the same numbers can be counted again."""

    snapshot: str = Field(description="Version of the lake that was counted.")
    horizon: datetime | None = Field(description="The instant at which windows were open or closed.")
    spec: dict[str, Any] = Field(description="What was counted; POST it to count it again.")
    steps: list[FunnelStep]
    values: list[list[FunnelStep]] = Field(description="The same by value of the breakdown, the largest first.")


class CounterItem(BaseModel):
    """Events of one kind in one minute or on one day."""

    bucket: datetime = Field(description="Its beginning.")
    service: str
    type: str
    channel: str | None
    events: int


class CountersAnswer(BaseModel):
    """Live counts, oldest first."""

    span: str
    since: datetime
    until: datetime
    items: list[CounterItem]
    complete: bool = Field(description="False when there are more: ask for a shorter time.")


class CountItem(BaseModel):
    """Events of one type on one day."""

    day: date
    service: str
    type: str
    events: int


class CountsAnswer(BaseModel):
    """Counts by day, oldest first."""

    timezone: str
    items: list[CountItem]
    complete: bool = Field(description="False when there are more: ask for fewer days.")


class TimelineItem(BaseModel):
    """One event of a customer. The summary has no personal data."""

    time: datetime
    recorded: datetime
    type: str
    stream: str
    version: int
    service: str
    event_id: UUID
    summary: dict[str, Any]


class TimelineAnswer(BaseModel):
    """A page of a timeline, newest first."""

    items: list[TimelineItem]
    next: str | None = Field(description="`cursor` of the next page; null on the last.")


class ConversionItem(BaseModel):
    """How the leads of one group fared. A merged lead counts as the lead that it became part of."""

    group: str
    leads: int
    qualified: int
    qualified_rate: float | None
    converted: int
    rate: float | None = Field(description="converted / leads.")
    rate_low: float | None = Field(description="Lower end of the 95 % Wilson interval.")
    rate_high: float | None
    rejected: int


class ConversionAnswer(BaseModel):
    """Conversion by group, without a window."""

    by: str
    items: list[ConversionItem]


class ProjectionItem(BaseModel):
    """How far something that reads the topics has come."""

    name: str
    version: int | None = Field(description="Of its tables; null for what has no generations.")
    generation: int | None
    state: str = Field(description="`live`, or `building` beside the live one, or `retired` and about to be removed.")
    consumer: str
    done: int = Field(description="Events behind it.")
    lag: int | None = Field(description="Events before it; null when Kafka does not answer.")
    parked: int
    moved_at: datetime | None
    switched_at: datetime | None


class ProjectionsAnswer(BaseModel):
    """Every reader of the topics."""

    items: list[ProjectionItem]
    lake_version: int | None
