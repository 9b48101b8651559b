"""`kehu demo`: real leads through the whole suite, what came of them, and a report."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from kehu.demo.bank import BankContact
    from kehu.demo.run import Demo
    from kehu.lake import Lake
    from kehu.supervisor import Supervisor

# The score that counts is the one in force just before the last call ended: what came after it must not speak for it.
_BANDS = """
WITH calls AS (
    SELECT data ->> '$.lead_id' AS lead, max("time") AS at FROM events
    WHERE type LIKE 'behaviour.recorded.v%' AND data ->> '$.kind' = 'call_answered' GROUP BY ALL
), accepted AS (
    SELECT DISTINCT data ->> '$.lead_id' AS lead FROM events
    WHERE type LIKE 'behaviour.recorded.v%' AND data ->> '$.kind' = 'offer_accepted'
), scores AS (
    SELECT data ->> '$.lead_id' AS lead, "time" AS at, CAST(data ->> '$.score' AS DOUBLE) AS score FROM events
    WHERE type LIKE 'lead_score.changed.v%'
), judged AS (
    SELECT calls.lead, coalesce(arg_max(scores.score, scores.at), 0) AS score
    FROM calls LEFT JOIN scores ON scores.lead = calls.lead AND scores.at < calls.at GROUP BY calls.lead
)
SELECT least(floor(score / 20), 4)::INTEGER * 20 AS lowest, count(*) AS leads, count(accepted.lead) AS accepted
FROM judged LEFT JOIN accepted USING (lead) GROUP BY ALL ORDER BY lowest
"""


def command(
    leads: Annotated[
        str, typer.Option(help="How many of the 45 211 contacts, evenly over the time; or `all`.")
    ] = "4000",
    state_dir: Annotated[Path, typer.Option(help="Where logs, addresses and data are kept.")] = Path(".kehu/demo"),
    keep: Annotated[bool, typer.Option(help="Keep the databases and topics when it ends.")] = False,
    stay: Annotated[
        bool | None, typer.Option(help="Stay up until Ctrl-C when it is done. Default: on a terminal.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The report.")] = Path(".kehu/demo-report.html"),
) -> None:
    """Real leads through the whole suite: funnel, conversion by score, one customer's story, and an HTML report."""
    from kehu.demo.bank import CONTACTS, BadData, load
    from kehu.demo.run import DemoError
    from kehu.devstack import DevStackError
    from kehu.supervisor import NotReady

    console = Console()
    count = CONTACTS if leads == "all" else int(leads) if leads.isdigit() else 0
    if not 1 <= count <= CONTACTS:
        console.print(f"[red]--leads is a number from 1 to {CONTACTS:,}, or all[/]")
        raise typer.Exit(2)
    try:
        same = _run(console, load(limit=count), state_dir, keep, sys.stdout.isatty() if stay is None else stay, out)
    except (DevStackError, NotReady, DemoError, BadData) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        console.print(f"The logs are in {state_dir / 'logs'}.")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped.")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if same else 1)


def _run(console: Console, contacts: list[BankContact], state_dir: Path, keep: bool, stay: bool, out: Path) -> bool:
    import shutil

    from kehu.clock import DevelopmentClock
    from kehu.demo.run import Demo
    from kehu.devstack import DevStack
    from kehu.lake import Lake
    from kehu.supervisor import Supervisor

    shutil.rmtree(state_dir / "lake", ignore_errors=True)  # of an earlier run: its databases are gone
    (state_dir / "clock.json").unlink(missing_ok=True)
    began = time.monotonic()
    with ExitStack() as cleanup:
        with console.status("Starting PostgreSQL and Kafka …"):
            devstack = cleanup.enter_context(DevStack(keep=keep))
        address = devstack.address
        console.print(
            f"PostgreSQL ({address.origin_postgres}) and Kafka ({address.origin_kafka}) after {time.monotonic() - began:.1f} s"
        )
        supervisor = Supervisor(address, state_dir, env={"KEHU_LAKE_FLUSH_SECONDS": "2"})
        clock = DevelopmentClock(supervisor.clock_file)
        clock.set(datetime.combine(contacts[0].day, datetime.min.time()).astimezone())
        with console.status("Starting the services …"):
            cleanup.enter_context(supervisor)
        console.print(f"{len(supervisor.processes)} processes ready after {time.monotonic() - began:.1f} s")
        demo = Demo(supervisor, clock, contacts)
        cleanup.callback(demo.close)
        _feed(console, demo)
        console.print(f"Done after {time.monotonic() - began:.0f} s. What came of it:\n")
        lake = Lake(supervisor.state_dir / "lake")
        _show(console, demo, lake)
        report = _report(demo, lake, out)
        same = _check(console, demo)
        console.print(f"\nReport: [bold]{report.absolute()}[/]", soft_wrap=True)
        _addresses(console, supervisor)
        if stay:
            console.print("Everything stays up until Ctrl-C.")
            threading.Event().wait()
    return same


def _feed(console: Console, demo: Demo) -> None:
    demo.teach()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("contacts", total=len(demo.contacts))
        demo.feed(lambda taken: progress.advance(task, taken))
        waiting = progress.add_task("waiting for the readers", total=None)
        demo.settle(600.0, lambda what: progress.update(waiting, description=f"waiting: {what[:90]}"))
        progress.update(waiting, description="all readers have caught up", total=1, completed=1)


def _show(console: Console, demo: Demo, lake: Lake) -> None:
    table = Table("service", "event", "number", title="Events by service", title_justify="left")
    by_service: dict[tuple[str, str], int] = {}
    for item in demo.counts():
        key = (item["service"], item["type"])
        by_service[key] = by_service.get(key, 0) + item["events"]
    for (service, kind), number in sorted(by_service.items()):
        table.add_row(service, kind, f"{number:,}")
    table.add_section()
    table.add_row("all", "", f"{sum(by_service.values()):,}", style="bold")
    table.columns[2].justify = "right"
    console.print(table)
    for by in ("channel", "month"):
        console.print(_funnel_table(demo, by))
    bands = lake.sql(_BANDS).to_pylist()
    table = Table(
        "score",
        "leads",
        "took the offer",
        "rate",
        "95 %",
        title="Does a higher score convert better?",
        title_justify="left",
    )
    for band in bands:
        low, high = _interval(band["accepted"], band["leads"])
        rate = f"{band['accepted'] / band['leads']:.1%}"
        name = f"{band['lowest']} to {band['lowest'] + 20}"
        table.add_row(name, f"{band['leads']:,}", f"{band['accepted']:,}", rate, f"{low:.1%} – {high:.1%}")
    table.caption = "The score in force just before the last call ended; the call's length is not known to it."
    console.print(table)
    _story(console, demo)


def _interval(part: int, whole: int) -> tuple[float, float]:
    from kehu.lake.stats import wilson

    low, high = wilson(part, whole)
    return low or 0.0, high or 0.0


def _funnel_table(demo: Demo, by: str) -> Table:
    """Captured → converted by value of the breakdown, with those who were qualified beside it."""
    answer = demo.funnel("captured", "converted", by=by)
    qualified = {
        str(group["group"])[: 7 if by == "month" else None]: group["qualified"] for group in demo.conversion(by)
    }
    table = Table(title=f"Funnel by {by}, within a day of the capture", title_justify="left")
    table.add_column(by)
    for name in ("captured", "qualified", "took the offer", "rate", "95 %"):
        table.add_column(name, justify="right")
    values = answer["values"]
    if by == "month":
        values = sorted(values, key=lambda steps: str(steps[0]["value"]))
    for captured, converted in values:
        label = str(captured["value"])
        table.add_row(label, *_rates(captured, converted, qualified.get(label, 0)))
    table.add_section()
    captured, converted = answer["steps"]
    table.add_row("all", *_rates(captured, converted, sum(qualified.values())), style="bold")
    return table


def _rates(captured: dict[str, Any], converted: dict[str, Any], qualified: int) -> list[str]:
    shown = [f"{captured['reached']:,}", f"{qualified:,}", f"{converted['reached']:,}"]
    if converted["rate"] is None:
        return shown
    return [*shown, f"{converted['rate']:.1%}", f"{converted['rate_low']:.1%} – {converted['rate_high']:.1%}"]


def _story(console: Console, demo: Demo) -> None:
    contact = demo.interesting()
    table = Table("when", "what", "more", title=f"One customer: {contact.external_id}", title_justify="left")
    for item in demo.timeline(contact):
        told = {k: v for k, v in item["summary"].items() if k != "at" and not k.endswith("_id") and v is not None}
        summary = ", ".join(f"{k} {v}" for k, v in told.items() if not isinstance(v, dict | list))
        table.add_row(item["time"][:16].replace("T", " "), item["type"].rpartition(".v")[0], summary[:100])
    console.print(table)
    at = contact.last_call_at - timedelta(seconds=1)
    why = demo.explanation(contact, at)
    table = Table(
        "dimension",
        "rule",
        "points",
        "behaviours",
        title=f"Why {why['score']:g} at {at:%Y-%m-%d %H:%M}",
        title_justify="left",
    )
    for part in why["parts"]:
        table.add_row(
            part["dimension"], part.get("title") or part["rule"], f"{part['points']:+g}", str(part["count"] or "")
        )
    table.add_section()
    table.add_row("", "score", f"{why['score']:g}", "", style="bold")
    table.columns[2].justify = table.columns[3].justify = "right"
    console.print(table)


def _report(demo: Demo, lake: Lake, out: Path) -> Path:
    from kehu.cli.report import report

    made = report(lake, window="1d", tz="Asia/Shanghai")
    contact = demo.interesting()
    why = demo.explanation(contact, contact.last_call_at - timedelta(seconds=1))
    made.heading("One customer's story")
    made.table(
        [
            {
                "when": i["time"][:16].replace("T", " "),
                "what": i["type"],
                "more": json.dumps(i["summary"], ensure_ascii=False),
            }
            for i in demo.timeline(contact)
        ],
        {"when": "When", "what": "What", "more": "More"},
    )
    made.paragraph(f"Its score just before the last call ended was {why['score']:g}:")
    made.table(
        [
            {"dimension": p["dimension"], "rule": p.get("title") or p["rule"], "points": p["points"]}
            for p in why["parts"]
        ],
        {"dimension": "Dimension", "rule": "Rule", "points": "Points"},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(made.save(out))


def _check(console: Console, demo: Demo) -> bool:
    differences = demo.differences()
    if not differences:
        console.print("\n[green]Every count is as the file says.[/]")
        return True
    table = Table("count", "in the file", "in the suite", title="[red]These counts differ[/]", title_justify="left")
    for difference in differences:
        table.add_row(difference.what, str(difference.expected), str(difference.found))
    console.print(table)
    return False


def _addresses(console: Console, supervisor: Supervisor) -> None:
    for spec in supervisor.services:
        if "api" in spec.roles:
            console.print(f"  {spec.name:12} {supervisor.url(spec.name)}/docs")
