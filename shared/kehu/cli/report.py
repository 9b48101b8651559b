"""`kehu report`: the recorded history on one page, an HTML file that needs no network and can be mailed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kehu.cli.clock import instant
from kehu.cli.funnel import AsOf, LakeOption, Until, Zone, duration, fail, find_lake, percent
from kehu.cli.up import StateDir
from kehu.lake.questions import DEFAULT_STEPS, funnel
from kehu.supervisor import STATE

if TYPE_CHECKING:
    from kehu.lake import FunnelResult, Lake, Report, Snapshot

MOST_CHANNELS = 20

_TOTALS = """
SELECT count(*) AS events, count(DISTINCT customer) AS customers, count(DISTINCT "subject") AS streams,
       min("time") AS first, max("time") AS last, max(recordedtime) AS recorded
FROM events
"""
_BY_DAY = """
SELECT strftime(timezone($tz, "time"), '%Y-%m-%d') AS day, regexp_replace(type, '\\.v\\d+$', '') AS type, count(*) AS events
FROM events GROUP BY ALL ORDER BY ALL
"""
# The score of a customer is the last one before the conversion, or the newest of one that has not converted: the score
# that the conversion itself makes says nothing. What time alone made of a score does not count: those who never convert
# fade for longer.
_BANDS = """
WITH converted AS (
    SELECT customer, min("time") AS converted_at FROM events
    WHERE regexp_matches(type, '^behaviour\\.recorded\\.v\\d+$') AND data ->> '$.kind' = 'offer_accepted' GROUP BY customer
), scored AS (
    SELECT customer, arg_max(CAST(data ->> '$.score' AS DOUBLE), ("time", streamversion)) AS score
    FROM events LEFT JOIN converted USING (customer)
    WHERE regexp_matches(type, '^lead_score\\.changed\\.v\\d+$') AND (converted_at IS NULL OR "time" < converted_at)
    AND data ->> '$.cause' NOT IN ('decay', 'model') GROUP BY customer
), captured AS (
    SELECT DISTINCT customer FROM events WHERE regexp_matches(type, '^lead\\.captured\\.v\\d+$')
)
SELECT coalesce(CAST(floor(least(score, 99.99) / 20) AS INTEGER) * 20, -1) AS lowest, count(*) AS total, count(converted_at) AS converted
FROM captured LEFT JOIN scored USING (customer) LEFT JOIN converted USING (customer)
GROUP BY ALL ORDER BY ALL
"""


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("kehu-report.html"),
    window: Annotated[str, typer.Option(help="Of the funnels, e.g. 30d.")] = "30d",
    as_of: AsOf = None,
    until: Until = None,
    tz: Zone = "Asia/Shanghai",
    lake: LakeOption = None,
    state_dir: StateDir = STATE,
) -> None:
    """Write the report on the recorded history: funnel, channels, months, score bands, events by day."""
    opened = find_lake(lake, state_dir)
    recorded, happened = instant(as_of) if as_of else None, instant(until) if until else None
    try:
        made = report(opened, window=window, as_of=recorded, until=happened, tz=tz)
    except ValueError as error:
        fail(str(error))
    print(made.save(out))


def report(
    lake: Lake, *, window: str = "30d", as_of: datetime | None = None, until: datetime | None = None, tz: str = "UTC"
) -> Report:
    """The report on a lake, all of it from one version.

    Args:
        window: of the funnels.
        as_of: what was recorded by then.
        until: what happened by then.
        tz: of days and months.

    Raises:
        ValueError: the window or the zone is none, or there is nothing to report.
    """
    from kehu.lake import Report

    snapshot = lake.snapshot()
    totals = lake.sql(_TOTALS, as_of=as_of, until=until, snapshot=snapshot).to_pylist()[0]
    if not totals["events"]:
        raise ValueError("There is no event to report on.")

    def counted(*steps: str, by: str | None = None) -> FunnelResult:
        return lake.funnel(funnel(steps, window, by=by, as_of=as_of, until=until, tz=tz), snapshot=snapshot)

    # By channel and month the question is who converted; whether they were qualified on the way is the first part's.
    ends = (DEFAULT_STEPS[0], DEFAULT_STEPS[-1])
    made = Report("Kehu: from lead to customer")
    made.paragraph(
        f"{totals['events']:,} events of {totals['customers']:,} customers, from {totals['first']:%Y-%m-%d} to"
        f" {totals['last']:%Y-%m-%d}, recorded until {totals['recorded']:%Y-%m-%d %H:%M} UTC. Version {snapshot.id} of the lake."
    )
    _funnel_part(made, counted(*DEFAULT_STEPS), window)
    _channel_part(made, counted(*ends, by="channel"))
    _month_part(made, counted(*ends, by="month"))
    _band_part(made, lake, snapshot, as_of, until)
    _day_part(made, lake, snapshot, as_of, until, tz)
    return made


_STEP_COLUMNS = {
    "name": "Step",
    "reached": "Reached",
    "rate": "Rate",
    "interval": "95 %",
    "settled_rate": "Settled",
    "pending": "Pending",
    "dropped": "Dropped",
    "median": "Median time",
}


def _shown(step: Any) -> dict[str, Any]:
    return {
        "value": step.value or "(none)",
        "name": step.name,
        "entered": step.entered,
        "reached": step.reached,
        "rate": percent(step.rate),
        "interval": f"{percent(step.rate_low)}–{percent(step.rate_high)}" if step.rate is not None else "",
        "settled_rate": percent(step.settled_rate),
        "pending": step.pending,
        "dropped": step.dropped,
        "median": duration(step.seconds_median),
    }


def _funnel_part(made: Report, result: FunnelResult, window: str) -> None:
    made.heading("Funnel")
    made.paragraph(
        f"Customers who were captured, then qualified, then converted, each within {window} of the capture. Pending ones may"
        " still go on; settled rates are without them. Intervals are Wilson's, 95 %."
    )
    last = result.steps[-1]
    made.figure(
        result.chart(), f"{result.entered:,} captured, {last.reached:,} of them converted ({percent(last.rate)})"
    )
    made.table([_shown(step) for step in result.steps], _STEP_COLUMNS)


def _channel_part(made: Report, result: FunnelResult) -> None:
    from kehu.lake.charts import band_chart

    made.heading("Channels")
    goals = [steps[-1] for steps in result.values][:MOST_CHANNELS]
    rows = [{"band": goal.value or "(none)", "total": goal.entered, "converted": goal.reached} for goal in goals]
    made.figure(band_chart(rows), "Conversion by the channel of the first capture")
    made.table(
        [_shown(goal) for goal in goals],
        {
            "value": "Channel",
            "entered": "Captured",
            "reached": "Converted",
            "rate": "Rate",
            "interval": "95 %",
            "median": "Median time",
        },
        caption=f"The largest {MOST_CHANNELS} of {len(result.values)}" if len(result.values) > MOST_CHANNELS else None,
    )


def _month_part(made: Report, result: FunnelResult) -> None:
    from kehu.lake.charts import conversion_chart

    made.heading("Months of capture")
    made.figure(conversion_chart(result), "Settled conversion by month of capture; hollow months have open windows")
    goals = sorted((steps[-1] for steps in result.values), key=lambda goal: goal.value or "")
    made.table(
        [_shown(goal) for goal in goals],
        {
            "value": "Month",
            "entered": "Captured",
            "reached": "Converted",
            "settled_rate": "Settled rate",
            "pending": "Pending",
        },
    )


def _band_part(made: Report, lake: Lake, snapshot: Snapshot, as_of: datetime | None, until: datetime | None) -> None:
    from kehu.lake.charts import band_chart

    bands = lake.sql(_BANDS, as_of=as_of, until=until, snapshot=snapshot).to_pylist()
    rows = [
        {**band, "band": f"{band['lowest']}–{band['lowest'] + 20}" if band["lowest"] >= 0 else "no score"}
        for band in bands
    ]
    made.heading("Does the score tell?")
    made.paragraph(
        "Conversion, at any time, by the last score before it; of customers who have not converted by their newest score."
    )
    made.figure(band_chart(rows), "Conversion by score band")


def _day_part(
    made: Report, lake: Lake, snapshot: Snapshot, as_of: datetime | None, until: datetime | None, tz: str
) -> None:
    import altair as alt

    from kehu.lake.charts import MAX_ROWS, WIDTH

    rows = lake.sql(_BY_DAY, parameters={"tz": tz}, as_of=as_of, until=until, snapshot=snapshot).to_pylist()
    made.heading("Events by day")
    if len(rows) <= MAX_ROWS:
        chart = (
            alt.Chart(alt.InlineData(values=rows))
            .mark_bar()
            .encode(
                x=alt.X("day:T", title=None),
                y=alt.Y("sum(events):Q", title="events"),
                color=alt.Color("type:N", title=None, legend=alt.Legend(labelLimit=260)),
            )
            .properties(width=WIDTH, height=240)
        )
        made.figure(chart, "Events of each type by day of their business time")
    by_type: dict[str, int] = {}
    for row in rows:
        by_type[row["type"]] = by_type.get(row["type"], 0) + row["events"]
    made.table(
        [{"type": name, "events": count} for name, count in sorted(by_type.items(), key=lambda item: -item[1])],
        {"type": "Type", "events": "Events"},
    )
