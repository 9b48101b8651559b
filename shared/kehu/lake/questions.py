"""A funnel in the words of a command line or of a URL: `captured,qualified,converted`, `30d`, `channel`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from kehu.lake.spec import PERIODS, FunnelSpec, Step

Order = Literal["ordered", "strict", "unordered"]
Entry = Literal["any", "first"]
Unit = Literal["customer", "lead"]

# The steps that everybody asks for.
STEPS = {
    "captured": Step(name="captured", types=("lead.captured",)),
    "qualified": Step(name="qualified", types=("lead_score.lead_qualified",)),
    "converted": Step(name="converted", types=("behaviour.recorded",), where={"data.kind": ("offer_accepted",)}),
    "rejected": Step(name="rejected", types=("lead.rejected",)),
    "merged": Step(name="merged", types=("lead.merged",)),
}
DEFAULT_STEPS = ("captured", "qualified", "converted")
# What results are split by, in short; else an attribute (`data.region`) or a period.
SPLITS = {"channel": "data.channel", "campaign": "data.campaign", "region": "data.region", "industry": "data.industry"}

_TYPE = re.compile(r"^([a-z_]+\.[a-z_]+(?:\.v\d+)?)(?:\[([^\]]+)\])?$")
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def step(text: str) -> Step:
    """A step: a name of STEPS, `behaviour:demo_attended`, or an event type, `lead.captured[data.channel=baidu]`.

    Raises:
        ValueError: none of these.
    """
    if text in STEPS:
        return STEPS[text]
    if text.startswith("behaviour:"):
        kind = text.removeprefix("behaviour:")
        return Step(name=text, types=("behaviour.recorded",), where={"data.kind": (kind,)})
    match = _TYPE.match(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a step: {', '.join(STEPS)}, behaviour:KIND, or an event type such as lead.captured"
        )
    where: dict[str, tuple[str, ...]] = {}
    for condition in (match[2] or "").split(",") if match[2] else ():
        name, equals, value = condition.partition("=")
        if not equals or not value:
            raise ValueError(f"{condition!r} is not a condition such as data.channel=baidu")
        where[name.strip()] = (*where.get(name.strip(), ()), value.strip())
    return Step(name=text, types=(match[1],), where=where)


def window(text: str) -> timedelta:
    """A length of time: `90s`, `15m`, `48h`, `30d`, `1w`, `1d12h`.

    Raises:
        ValueError: something else.
    """
    found = _PART.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise ValueError(f"{text!r} is not a length of time such as 48h, 30d or 1d12h")
    try:
        return sum((timedelta(**{_UNITS[unit]: float(number)}) for number, unit in found), timedelta())
    except OverflowError:
        raise ValueError(f"{text!r} is too long") from None


def funnel(
    steps: Sequence[str] = DEFAULT_STEPS,
    window_: str = "30d",
    *,
    by: str | None = None,
    order: Order = "ordered",
    entry: Entry = "any",
    unit: Unit = "customer",
    as_of: datetime | None = None,
    until: datetime | None = None,
    tz: str = "UTC",
) -> FunnelSpec:
    """The funnel of these words.

    Raises:
        ValueError: words that are none; `pydantic.ValidationError` is one.
    """
    breakdown = by if by is None or by in PERIODS else SPLITS.get(by, by)
    return FunnelSpec(
        steps=tuple(step(text) for text in steps),
        window=window(window_),
        order=order,
        entry=entry,
        breakdown=breakdown,
        as_of=as_of,
        until=until,
        tz=tz,
        unit=unit,
    )
