"""`kehu funnel`: how many of those who did the first step went on, counted exactly over the lake or by a running analytics."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import orjson
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kehu.cli.clock import instant
from kehu.cli.up import StateDir
from kehu.lake.questions import DEFAULT_STEPS, Entry, Order, Unit, funnel
from kehu.supervisor import STATE, NoStack, Stack

if TYPE_CHECKING:
    from kehu.lake import FunnelSpec, Lake

_DAY = 86_400.0

LakeOption = Annotated[
    Path | None,
    typer.Option(
        "--lake", envvar="KEHU_LAKE_PATH", help="Directory of the lake. Default: that of the stack that runs here."
    ),
]
AsOf = Annotated[str | None, typer.Option(help="Count what was recorded by then, e.g. 2026-03-01T00:00:00Z.")]
Until = Annotated[str | None, typer.Option(help="Count what happened by then.")]
Zone = Annotated[str, typer.Option("--tz", help="Time zone of the periods.")]


def command(
    steps: Annotated[
        str,
        typer.Option(
            help="Divided by commas: captured, qualified, converted, behaviour:demo_attended, or event types."
        ),
    ] = ",".join(DEFAULT_STEPS),
    window: Annotated[str, typer.Option(help="From the first step to the last, e.g. 48h or 30d.")] = "30d",
    by: Annotated[
        str | None,
        typer.Option(help="Split by channel, campaign, region, industry, a period (month), or data.<field>."),
    ] = None,
    order: Annotated[str, typer.Option(help="ordered, strict (nothing in between), or unordered.")] = "ordered",
    entry: Annotated[str, typer.Option(help="any, or first: only the first step 1 of a unit begins a chain.")] = "any",
    unit: Annotated[str, typer.Option(help="customer or lead.")] = "customer",
    as_of: AsOf = None,
    until: Until = None,
    tz: Zone = "Asia/Shanghai",
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole result, for a program; with it it can be counted again.")
    ] = False,
    lake: LakeOption = None,
    url: Annotated[str | None, typer.Option(help="Ask this analytics service instead (token in KEHU_TOKEN).")] = None,
    state_dir: StateDir = STATE,
) -> None:
    """Count a funnel, with rates, 95 % intervals, and who may still go on."""
    try:
        spec = funnel(
            [step.strip() for step in _split(steps)],
            window,
            by=by,
            order=_one_of(order, ("ordered", "strict", "unordered"), "--order"),
            entry=_one_of(entry, ("any", "first"), "--entry"),
            unit=_one_of(unit, ("customer", "lead"), "--unit"),
            as_of=instant(as_of) if as_of else None,
            until=instant(until) if until else None,
            tz=tz,
        )
    except ValueError as error:
        fail(_reason(error))
    answer = _ask(url, spec, state_dir) if url else count(find_lake(lake, state_dir), spec)
    if as_json:
        print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        return
    console = Console()
    console.print(_headline(answer, spec.window), highlight=False)
    console.print(table(answer["steps"], console.width))
    for counts in answer["values"]:
        console.print(table(counts, console.width, counts[0]["value"] or "(none)"))
    if any(row["young"] for row in answer["steps"]):
        console.print(
            "* Some are pending: their window is open, and the rate will rise. Settled rates are without them."
        )


def count(lake: Lake, spec: FunnelSpec) -> dict[str, Any]:
    """The answer to a funnel over a lake, in the shape of the API's."""
    from dataclasses import asdict

    try:
        result = lake.funnel(spec)
    except ValueError as error:
        fail(_reason(error))
    return {
        "snapshot": result.snapshot,
        "horizon": result.horizon,
        "spec": result.spec.model_dump(mode="json"),
        "steps": [asdict(step) for step in result.steps],
        "values": [[asdict(step) for step in steps] for steps in result.values],
    }


def find_lake(path: Path | None, state_dir: Path) -> Lake:
    """The lake that was named, or that of the stack that runs here. Ends the command when there is none."""
    from kehu.lake import Lake, LakeMissing

    if path is None:
        try:
            path = Path(Stack.load(state_dir).description["lake_path"])
        except NoStack as error:
            fail(f"{error}. Or name a lake: --lake DIRECTORY")
    try:
        return Lake(path)
    except LakeMissing:
        fail(f"There is no lake in {path} yet: it is made when the first events arrive.")


# Columns of the table, with the narrowest terminal that shows them.
_COLUMNS: tuple[tuple[str, int, Callable[[Mapping[str, Any]], str]], ...] = (
    ("Reached", 0, lambda row: f"{row['reached']:,}"),
    ("Rate", 0, lambda row: percent(row["rate"]) + ("*" if row["young"] else "")),
    ("95 %", 0, lambda row: "" if row["rate"] is None else f"{percent(row['rate_low'])}–{percent(row['rate_high'])}"),
    ("Settled", 110, lambda row: percent(row["settled_rate"])),
    ("From last", 120, lambda row: percent(row["step_rate"])),
    ("Pending", 0, lambda row: f"{row['pending']:,}"),
    ("Dropped", 0, lambda row: f"{row['dropped']:,}"),
    ("Excluded", 130, lambda row: f"{row['excluded']:,}"),
    ("Median", 100, lambda row: duration(row["seconds_median"])),
    ("90 %", 130, lambda row: duration(row["seconds_p90"])),
)


def table(rows: Sequence[Mapping[str, Any]], width: int, title: str | None = None) -> Table:
    """The steps of a funnel as a table that fits a terminal of this width."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("Step", overflow="fold", min_width=10)
    columns = [(head, cell) for head, least, cell in _COLUMNS if width >= least]
    for head, _ in columns:
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(row["name"], *(cell(row) for _, cell in columns))
    return shown


def percent(value: float | None) -> str:
    """`12.3 %`, or nothing."""
    return "" if value is None else f"{value * 100:.1f} %"


def duration(seconds: float | None) -> str:
    """A length of time for people: `3.2 d`, `5.0 h`, `40 s`."""
    if seconds is None:
        return ""
    for size, unit in ((_DAY, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def fail(message: str) -> NoReturn:
    """Say what is wrong and end the command."""
    sys.stderr.write(f"{message}\n")
    raise typer.Exit(1)


def _headline(answer: Mapping[str, Any], window: timedelta) -> str:
    spec = answer["spec"]
    parts = [
        f"{answer['steps'][0]['entered']:,} {spec['unit']}s entered",
        f"window {duration(window.total_seconds())}",
        str(spec["order"]),
        f"lake {answer['snapshot']}",
    ]
    if answer["horizon"] is not None:
        parts.append(f"as of {answer['horizon']}")
    return ", ".join(parts)


def _ask(url: str, spec: FunnelSpec, state_dir: Path) -> dict[str, Any]:
    import httpx

    token = os.environ.get("KEHU_TOKEN")
    if token is None:
        try:
            token = Stack.load(state_dir).token("analyst")
        except NoStack:
            fail("Set KEHU_TOKEN to a token of an analyst.")
    try:
        response = httpx.post(
            f"{url.rstrip('/')}/funnel",
            content=spec.model_dump_json(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            timeout=120.0,
        )
    except httpx.HTTPError as error:
        fail(f"{url} does not answer: {error}")
    if response.status_code != 200:
        fail(f"{url} answers {response.status_code}: {response.json().get('detail', response.text)}")
    answer: dict[str, Any] = response.json()
    return answer


def _split(steps: str) -> list[str]:
    """At commas, but not at those in the brackets of a condition."""
    parts, depth = [""], 0
    for character in steps:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _one_of(value: str, known: tuple[str, ...], option: str) -> Any:
    if value not in known:
        raise ValueError(f"{option} is one of {', '.join(known)}")
    return value


def _reason(error: ValueError) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(str(line["msg"]).removeprefix("Value error, ") for line in error.errors(include_url=False))
    return str(error)


__all__ = ["Entry", "Order", "Unit", "command", "count", "duration", "fail", "find_lake", "percent", "table"]
