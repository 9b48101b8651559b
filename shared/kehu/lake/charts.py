"""The charts of reports: plain Vega-Altair charts, to be shown in a notebook, changed, or put into a `Report`.

Colours are from the palette of Okabe and Ito (2008), which people with colour blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import altair as alt
import pyarrow as pa

from kehu.lake.stats import wilson

if TYPE_CHECKING:
    from kehu.lake.funnel import FunnelResult

BLUE, SKY, ORANGE, LIGHT, INK = "#0072B2", "#56B4E9", "#D55E00", "#C9CDD2", "#222222"
WIDTH = 560  # pixels, of every chart
MAX_ROWS = 20_000  # marks in one chart

Row = Mapping[str, Any]


def funnel_chart(result: FunnelResult) -> alt.LayerChart:
    """A bar for each step: the units that reached it, split into those that went on, that may still, and that did not."""
    states = {"went on": BLUE, "may still go on": SKY, "dropped": LIGHT}
    parts = [
        {"step": step.name, "state": state, "units": units, "order": order}
        for step in result.steps
        for order, (state, units) in enumerate(zip(states, (step.converted, step.pending, step.dropped), strict=True))
        if units
    ]
    totals = [
        {
            "step": step.name,
            "reached": step.reached,
            "label": f"{step.reached:,}" + ("" if step.rate is None else f"  ({step.rate:.1%})"),
        }
        for step in result.steps
    ]
    y = alt.Y("step:N", sort=[step.name for step in result.steps], title=None, axis=alt.Axis(labelLimit=220))
    color = alt.Color(
        "state:N",
        title=None,
        scale=alt.Scale(domain=list(states), range=list(states.values())),
        legend=alt.Legend(orient="bottom"),
    )
    axis = alt.Axis(format=",d", tickMinStep=1)
    bars = alt.Chart(_data(parts)).mark_bar().encode(
        y=y, x=alt.X("units:Q", title="units", axis=axis), color=color, order="order:Q"
    )  # fmt: skip
    labels = (
        alt.Chart(_data(totals)).mark_text(align="left", dx=4, color=INK).encode(y=y, x="reached:Q", text="label:N")
    )
    return _layers([bars, labels], 34 * len(totals))


def conversion_chart(result: FunnelResult, step: int | None = None) -> alt.LayerChart:
    """The settled conversion to a step by period of entry, with its 95 % Wilson band; young periods are hollow.

    Args:
        result: of a funnel whose breakdown is a period (`month`, …).
        step: 1-based; None for the last.

    Raises:
        ValueError: the funnel has no breakdown, or no such step.
    """
    number = len(result.spec.steps) if step is None else step
    if result.spec.breakdown is None or not 1 <= number <= len(result.spec.steps):
        raise ValueError(f"step {number} of a funnel with breakdown {result.spec.breakdown}")
    counts = sorted((steps[number - 1] for steps in result.values), key=lambda c: c.value or "")
    rows = [
        {
            "period": c.value or "",
            "rate": c.settled_rate,
            "low": c.settled_low,
            "high": c.settled_high,
            "state": "some windows still open" if c.young else "complete",
        }
        for c in counts
        if c.settled_rate is not None
    ]
    x = alt.X("period:O", title=result.spec.breakdown)
    percent = alt.Axis(format="%")
    band = alt.Chart(_data(rows)).mark_area(color=SKY, opacity=0.35).encode(
        x=x, y=alt.Y("low:Q", title="conversion", axis=percent), y2="high:Q"
    )  # fmt: skip
    line = alt.Chart(_data(rows)).mark_line(color=BLUE).encode(x=x, y=alt.Y("rate:Q", axis=percent))
    fill = alt.Fill(
        "state:N",
        title=None,
        scale=alt.Scale(domain=["complete", "some windows still open"], range=[BLUE, "#FFFFFF"]),
        legend=alt.Legend(orient="bottom"),
    )
    points = alt.Chart(_data(rows)).mark_point(size=60, stroke=BLUE, opacity=1).encode(x=x, y="rate:Q", fill=fill)
    return _layers([band, line, points], 240)


def band_chart(rows: Iterable[Row]) -> alt.LayerChart:
    """The conversion of each score band (or of any other group), with its 95 % Wilson interval.

    Args:
        rows: `band`, `total`, `converted`, in the order to be shown.
    """
    shown = []
    for row in rows:
        low, high = wilson(int(row["converted"]), int(row["total"]))
        rate = int(row["converted"]) / int(row["total"]) if row["total"] else None
        label = f"{row['converted']:,} of {row['total']:,}"
        shown.append({"band": str(row["band"]), "rate": rate, "low": low, "high": high, "label": label})
    order = [str(row["band"]) for row in shown]
    x = alt.X("band:N", sort=order, title=None, axis=alt.Axis(labelAngle=0))
    base = alt.Chart(_data(shown)).encode(x=x)
    bars = base.mark_bar(color=BLUE).encode(y=alt.Y("rate:Q", title="conversion", axis=alt.Axis(format="%")))
    spread = base.mark_rule(color=INK).encode(y="low:Q", y2="high:Q")
    labels = base.mark_text(dy=-6, color=INK, baseline="bottom").encode(y="high:Q", text="label:N")
    return _layers([bars, spread, labels], 240)


def score_chart(rows: Iterable[Row], thresholds: Mapping[str, float] | None = None) -> alt.LayerChart:
    """A score over time, which holds its value until the next change.

    Args:
        rows: `time` (aware) and `score` (0 to 100).
        thresholds: name → score, drawn as lines.
    """
    shown = [{"time": _iso(row["time"]), "score": float(row["score"])} for row in rows]
    line = alt.Chart(_data(shown)).mark_line(interpolate="step-after", color=BLUE, point=True).encode(
        x=_time_axis(), y=alt.Y("score:Q", scale=alt.Scale(domain=[0, 100]))
    )  # fmt: skip
    limits = [{"name": name, "score": value} for name, value in (thresholds or {}).items()]
    rules = alt.Chart(_data(limits)).mark_rule(color=ORANGE, strokeDash=[4, 4]).encode(y="score:Q")
    names = (
        alt.Chart(_data(limits))
        .mark_text(align="left", dx=4, dy=-6, color=ORANGE, baseline="bottom")
        .encode(y="score:Q", x=alt.value(0), text="name:N")
    )
    return _layers([line, rules, names], 240)


def timeline_chart(events: pa.Table | Sequence[Row]) -> alt.LayerChart:
    """Events over time, a line for each type.

    Args:
        events: `time` and `type`, as `Lake.timeline` gives them.
    """
    rows = events.select(["time", "type"]).to_pylist() if isinstance(events, pa.Table) else events
    shown = [{"time": _iso(row["time"]), "type": str(row["type"])} for row in rows]
    order = list(dict.fromkeys(row["type"] for row in sorted(shown, key=lambda row: row["time"])))
    y = alt.Y("type:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, grid=True))
    ticks = (
        alt.Chart(_data(shown)).mark_point(filled=True, size=50, color=BLUE, opacity=0.7).encode(x=_time_axis(), y=y)
    )
    return _layers([ticks], max(60, 22 * len(order)))


def _layers(charts: list[alt.Chart], height: int) -> alt.LayerChart:
    chart = alt.layer(*charts).properties(width=WIDTH, height=height)
    assert isinstance(chart, alt.LayerChart)  # a facet comes only of facets
    return chart


def _time_axis() -> alt.X:
    return alt.X("time:T", title=None, scale=alt.Scale(type="utc"))


def _iso(at: datetime) -> str:
    if at.tzinfo is None:
        raise ValueError(f"{at.isoformat()} has no time zone")
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


def _data(rows: Sequence[Row]) -> alt.InlineData:
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{len(rows)} rows in a chart, the limit is {MAX_ROWS}: group them first")
    return alt.InlineData(values=[dict(row) for row in rows])
