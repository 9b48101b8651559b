"""What the API takes and answers."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from kehu.events.scoring import Condition, Part, Rule, ScoringModel
from kehu.events.values import Text
from kehu.http import Body


class ConditionBody(Condition):
    """A test on one attribute, e.g. `facts.budget >= 100000`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RuleBody(Rule):
    """One reason for points."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    conditions: tuple[ConditionBody, ...] = Field(default=(), max_length=10)


class ModelBody(ScoringModel):
    """A set of rules."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {
                    "rules": [
                        {
                            "name": "demo",
                            "title": "Attended a demo",
                            "dimension": "depth",
                            "behaviours": ["demo_attended"],
                            "points": 20,
                            "cap": 30,
                            "half_life_days": 45,
                        }
                    ],
                    "caps": {"frequency": 30, "depth": 40, "fit": 30},
                    "qualify_at": 80,
                }
            ]
        },
    )

    rules: tuple[RuleBody, ...] = Field(min_length=1, max_length=200)


class PublishBody(Body):
    """Score leads by these rules from now on."""

    model: ModelBody
    note: Text | None = Field(None, description="Why, for who reads the versions later.")


class PublishAnswer(BaseModel):
    """What became of it."""

    published: bool = Field(description="False when exactly these rules are in force already.")
    model_version: int | None = Field(description="The new version.")


class ModelAnswer(BaseModel):
    """A published version."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: int
    model: ScoringModel
    note: str | None
    effective: datetime
    recorded: datetime


class CurrentModelAnswer(ModelAnswer):
    """The model in force."""

    leads_to_rescore: int = Field(description="Open leads whose last score is still of an older model.")


class EventAnswer(BaseModel):
    """An event behind a part."""

    event_id: UUID
    kind: str = Field(examples=["demo_attended"])
    time: datetime


class PartAnswer(BaseModel):
    """What one rule gives, or what a cap takes away. The points of all parts add up to the score."""

    rule: str = Field(examples=["demo"])
    title: str = Field(examples=["Attended a demo"])
    dimension: Literal["frequency", "depth", "fit", "base", "cap"]
    points: float
    count: int = Field(description="How many events match; the newest ten are named.")
    points_each: float | None
    cap: float | None
    half_life_days: float | None
    events: list[EventAnswer]


class ScoreAnswer(BaseModel):
    """A score at an instant."""

    model_config = ConfigDict(protected_namespaces=())

    asked_for: UUID
    lead_id: UUID = Field(description="The lead that is scored: another one when the lead was merged.")
    customer_id: UUID
    open: bool = Field(description="False when the lead has ended; then this is its last score.")
    as_of: datetime
    at: datetime
    score: float = Field(ge=0, le=100)
    band: Literal["hot", "warm", "cold"]
    qualified: bool
    model_version: int
    parts: list[PartAnswer]
    next_change_at: datetime | None = Field(description="When time alone next changes the band.")


class ChangeAnswer(BaseModel):
    """One recorded change."""

    model_config = ConfigDict(protected_namespaces=())

    event_id: UUID
    version: int
    type: str = Field(examples=["lead_score.changed.v1"])
    time: datetime = Field(description="The instant that it is about.")
    recorded: datetime
    score: float
    band: Literal["hot", "warm", "cold"]
    previous: float | Literal["hot", "warm", "cold"] | None
    cause: Literal["profile", "behaviour", "decay", "model", "merge"] | None
    cause_events: list[UUID]
    parts: list[Part] | None
    model_version: int


class HistoryAnswer(BaseModel):
    """Changes, the newest first."""

    items: list[ChangeAnswer]
    next: str | None


class ListedScore(BaseModel):
    """A lead in a list: its score when it last changed, and its band."""

    model_config = ConfigDict(protected_namespaces=())

    lead_id: UUID
    customer_id: UUID
    score: float
    band: Literal["hot", "warm", "cold"]
    qualified_at: datetime | None
    model_version: int
    at: datetime


class ScoresAnswer(BaseModel):
    """Open leads, the highest score first."""

    items: list[ListedScore]
    next: str | None


class ModelsAnswer(BaseModel):
    """Published versions, the newest first."""

    items: list[ModelAnswer]
    next: str | None
