"""Events of scoring: the score of a lead with its parts, and the versioned models that give it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from kehu.events.base import Event
from kehu.events.values import Code, Instant, Text, Value

Band = Literal["hot", "warm", "cold"]
Dimension = Literal["frequency", "depth", "fit"]
Score = Annotated[float, Field(ge=0, le=100)]


class Condition(Value):
    """A test on one attribute of a behaviour or a profile, e.g. `facts.balance >= 1000`."""

    attribute: Code
    operator: Literal["eq", "ne", "in", "ge", "gt", "le", "lt", "present"]
    value: str | int | float | bool | tuple[str | int | float | bool, ...] | None = None


class Rule(Value):
    """One reason for points.

    Args:
        dimension: frequency and depth rules look at behaviours, fit rules at the profile.
        points: for each match; negative takes away.
        cap: the most that this rule can give in absolute points; None is no limit of its own.
        half_life_days: how fast the points of one behaviour fade; None keeps them.
    """

    name: Code
    title: Text
    dimension: Dimension
    behaviours: tuple[Code, ...] = ()
    conditions: tuple[Condition, ...] = ()
    points: float = Field(ge=-100, le=100)
    cap: float | None = Field(default=None, ge=0, le=100)
    half_life_days: float | None = Field(default=None, gt=0, le=3650)


class ScoringModel(Value):
    """A published set of rules.

    Args:
        caps: the most that each dimension can give.
        base: points everybody starts with.
        qualify_at: the score at which a lead is qualified.
        hot_at, warm_at: lower edges of the bands.
        hysteresis: a band is left only when the score is this many points below its edge.
    """

    rules: tuple[Rule, ...] = Field(min_length=1, max_length=200)
    caps: dict[Dimension, Annotated[float, Field(ge=0, le=100)]] = {"frequency": 30.0, "depth": 40.0, "fit": 30.0}
    base: float = Field(default=0.0, ge=0, le=100)
    qualify_at: Score = 80.0
    hot_at: Score = 80.0
    warm_at: Score = 40.0
    hysteresis: float = Field(default=5.0, ge=0, le=50)


class Part(Value):
    """What one rule gives at the moment of a score. The points of all parts add up to the score.

    Args:
        events: ids of the newest events behind it, at most ten; `count` says how many there are.
    """

    rule: Code
    dimension: Literal["frequency", "depth", "fit", "base", "cap"]
    points: float
    count: int = Field(default=0, ge=0)
    events: tuple[UUID, ...] = ()


class LeadScoreChanged(Event, name="lead_score.changed"):
    """The score of a lead is another, by a behaviour, a profile change, a new model, or time. The first one says what it is.

    Each event of a lead's score tells score, band, qualification and instant, so that the newest one alone is the state.

    Args:
        band: the temperature with this score; when it is another one, lead_score.band_changed follows.
        qualified: whether the lead is an MQL or has been one, this score included.
        at: the instant that the score is of: that of its cause, or of the last thing known of the lead when that is later.
    """

    lead_id: UUID
    customer_id: UUID
    score: Score
    previous: Score
    band: Band
    qualified: bool
    parts: tuple[Part, ...]
    cause: Literal["profile", "behaviour", "decay", "model", "merge"]
    cause_events: tuple[UUID, ...] = ()
    model_version: int = Field(ge=1)
    at: Instant

    @property
    def happened(self) -> datetime:
        return self.at


class LeadScoreBandChanged(Event, name="lead_score.band_changed"):
    """The lead is another temperature."""

    lead_id: UUID
    customer_id: UUID
    band: Band
    previous: Band
    score: Score
    qualified: bool
    model_version: int = Field(ge=1)
    at: Instant

    @property
    def happened(self) -> datetime:
        return self.at


class LeadQualified(Event, name="lead_score.lead_qualified"):
    """The lead became an MQL. Once in its life, however often the score crosses the line."""

    lead_id: UUID
    customer_id: UUID
    score: Score
    band: Band
    threshold: Score
    model_version: int = Field(ge=1)
    at: Instant

    @property
    def happened(self) -> datetime:
        return self.at


class ScoringModelPublished(Event, name="scoring_model.published"):
    """From now on leads are scored by this model."""

    model_version: int = Field(ge=1)
    model: ScoringModel
    note: Text | None = None
    effective: Instant
