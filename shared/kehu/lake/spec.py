"""What a funnel counts, as a value that can be stored, sent and run again."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from kehu.lake.format import COLUMNS

MAX_STEPS = 16
MAX_EXCLUSIONS = 8
MAX_WINDOW = timedelta(days=36_500)

_ATTRIBUTE = re.compile(r"^data(\.[A-Za-z_][A-Za-z0-9_]*)+$")
_STEP_ATTRIBUTION = re.compile(r"^step:([1-9][0-9]?)$")
PERIODS = ("day", "week", "month", "quarter", "year")
# A unit other than the customer is named by a field of the data or by the stream of the event.
UNITS: dict[str, tuple[str, str]] = {"lead": ("lead_id", "lead-")}

Scalar = bool | int | str


def _many(value: object) -> object:
    return (value,) if isinstance(value, str | int) else value


def attribute(name: str) -> str:
    """The name of an attribute: a column of the lake, or `data.<field>` of the event, nested with dots.

    Raises:
        ValueError: neither.
    """
    if name not in COLUMNS and not _ATTRIBUTE.match(name):
        raise ValueError(f"{name!r} is neither a column of the lake nor data.<field>")
    return name


Attribute = Annotated[str, Field(max_length=200)]
Types = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], BeforeValidator(_many)]
AnyOf = Annotated[tuple[Scalar, ...], BeforeValidator(_many)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _EventMatch(_Value):
    """Which events are meant: of one of these types, with these attributes.

    Args:
        types: event types; `lead.captured` is every version of it, `lead.captured.v1` that version.
        where: attribute → the value, or values, that it must have. Numbers and booleans are compared as JSON text.
    """

    types: Types = Field(min_length=1, max_length=100)
    where: dict[Attribute, AnyOf] = Field(default_factory=dict, max_length=20)

    @field_validator("where")
    @classmethod
    def _known_attributes(cls, where: dict[str, tuple[Scalar, ...]]) -> dict[str, tuple[Scalar, ...]]:
        for name, values in where.items():
            attribute(name)
            if not values:
                raise ValueError(f"{name}: no value can be one of none")
        return where


class Step(_EventMatch):
    """A step of a funnel: its name in results, and the events that are it."""

    name: str = Field(min_length=1, max_length=100)


class Exclusion(_EventMatch):
    """Events that must not happen between two steps (1-based): after a chain came to `after` and before `before`."""

    after: int = Field(ge=1)
    before: int = Field(ge=2)


class FunnelSpec(_Value):
    """A funnel: of the units that did the first step, how many went on to each of the next, and how far the rest came.

    A chain is one event for each step; a unit reached a step when some chain of it did. The defaults count what
    ClickHouse's windowFunnel and PostHog's ordered funnel count.

    Args:
        steps: 1 to 16.
        window: time from the chain's first step within which all others must be, inclusive; microseconds count.
        order: `ordered`: other events may happen in between. `strict`: any event that is not of the step where the
            chain stands ends it. `unordered`: distinct events for the steps in any order, all inside one window; then
            step k of the result means "some k of the steps".
        entry: `any`: every event of step 1 begins a chain. `first`: only the unit's first (Mixpanel's way).
        count: `unique`: each unit once.
        hold: attributes that must have one and the same value along a chain; events without a value take no part.
            A unit counts with the value that got furthest, of those the earliest.
        exclude: events that break a chain between two steps. A unit whose furthest chains were all broken is excluded.
        optional: steps (1-based) that a chain may leave out; neither the first nor the last.
        ties: `step_order`: events of the same microsecond count in the order of the steps, and one event may be several
            steps. `strictly_later`: each step must come strictly later than the one before.
        breakdown: attribute, or `day`, `week`, `month`, `quarter`, `year` of the event's time in `tz`, to split by.
        attribution: whose value of the breakdown a unit has: the `first` or `last` step of its furthest chain,
            `step:k` (units that did not do step k are left out of the split), or `all` of them (a unit may count in
            several values).
        as_of: what was recorded by then; None: all of the snapshot.
        until: what happened by then; None: everything.
        tz: time zone of the periods of `breakdown`.
        unit: `customer`, or `lead` (`data.lead_id`, or the stream `lead-…`).
    """

    steps: tuple[Step, ...] = Field(min_length=1, max_length=MAX_STEPS)
    window: timedelta
    order: Literal["ordered", "strict", "unordered"] = "ordered"
    entry: Literal["any", "first"] = "any"
    count: Literal["unique"] = "unique"
    hold: tuple[Attribute, ...] = Field(default=(), max_length=5)
    exclude: tuple[Exclusion, ...] = Field(default=(), max_length=MAX_EXCLUSIONS)
    optional: frozenset[int] = frozenset()
    ties: Literal["step_order", "strictly_later"] = "step_order"
    breakdown: Attribute | None = None
    attribution: str = "first"
    as_of: AwareDatetime | None = None
    until: AwareDatetime | None = None
    tz: str = "UTC"
    unit: Literal["customer", "lead"] = "customer"

    @field_validator("count", mode="before")
    @classmethod
    def _unique_only(cls, count: Any) -> Any:
        if count in ("attempts", "value"):
            raise ValueError(f"count={count!r} is not built: count='unique' counts each unit once")
        return count

    @field_validator("window")
    @classmethod
    def _window_limits(cls, window: timedelta) -> timedelta:
        if not timedelta() <= window <= MAX_WINDOW:
            raise ValueError(f"a window of {window}; it must be between 0 and {MAX_WINDOW.days} days")
        return window

    @field_validator("hold")
    @classmethod
    def _held_attributes(cls, hold: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(attribute(name) for name in hold)

    @field_validator("breakdown")
    @classmethod
    def _breakdown_attribute(cls, breakdown: str | None) -> str | None:
        return breakdown if breakdown is None or breakdown in PERIODS else attribute(breakdown)

    @field_validator("tz")
    @classmethod
    def _known_zone(cls, tz: str) -> str:
        try:
            ZoneInfo(tz)
        except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError; a directory name is an OSError
            raise ValueError(f"no time zone {tz!r}") from None
        return tz

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.steps)
        for exclusion in self.exclude:
            if not exclusion.after < exclusion.before <= count:
                raise ValueError(f"exclude between steps {exclusion.after} and {exclusion.before} of {count}")
        if any(not 1 < k < count for k in self.optional):
            raise ValueError("only steps between the first and the last can be optional")
        if self.order != "ordered" and self.exclude:
            raise ValueError(f"exclude means nothing in a {self.order} funnel")
        if self.order == "unordered" and self.optional:
            raise ValueError("optional steps mean nothing in an unordered funnel: look at k-1 of its k steps")
        if self.order == "unordered" and self.ties != "step_order":
            raise ValueError("ties mean nothing in an unordered funnel")
        if len({step.name for step in self.steps}) != count:
            raise ValueError("two steps have the same name")
        self.attributed_step()
        return self

    def attributed_step(self) -> int | None:
        """k of the attribution `step:k`, else None.

        Raises:
            ValueError: not an attribution, or no such step.
        """
        if self.attribution in ("first", "last", "all"):
            return None
        match = _STEP_ATTRIBUTION.match(self.attribution)
        if match is None:
            raise ValueError("attribution is first, last, step:k or all")
        if int(match[1]) > len(self.steps):
            raise ValueError(f"attribution {self.attribution} in a funnel of {len(self.steps)} steps")
        return int(match[1])


def matches_type(declared: str, actual: str) -> bool:
    """Whether a type of a spec means this event type: itself, or any version of it."""
    return actual == declared or (
        actual.startswith(f"{declared}.v") and actual[len(declared) + 2 :].isdigit() and actual.isascii()
    )
