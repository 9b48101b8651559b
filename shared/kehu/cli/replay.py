"""`kehu replay`: builds a read model of analytics anew from the first event, beside the live one, and switches over."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kehu.cli.funnel import fail
from kehu.cli.up import StateDir
from kehu.supervisor import STATE, NoStack, Stack, secrets_of

_STATES = ("building", "switching", "live", "done", "failed")


def command(
    projection: Annotated[str, typer.Option(help="Read model: lead_journey, customer_timeline, event_counts.")],
    fresh: Annotated[bool, typer.Option(help="Begin anew even if an interrupted rebuild could go on.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line instead of a bar, for a program.")
    ] = False,
    state_dir: StateDir = STATE,
) -> None:
    """Rebuild a read model from the beginning while the live one goes on answering, then switch without a gap.

    Settings come from the stack that runs here, or else from the KEHU_* variables as for any process of analytics.
    """
    environment = environment_of(state_dir) | {"KEHU_PROJECTION": projection, "KEHU_REBUILD_FRESH": str(fresh).lower()}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "analytics", "rebuild"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            last = _show(process, as_json)
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            fail("Interrupted. The same command goes on where this one stopped; the live read model was not touched.")
        log.seek(0)
        complaints = log.read()
    if code != 0:
        told = last is not None and last["state"] == "failed"
        fail(
            (last["reason"] if told and last is not None else "")
            or reason(complaints)
            or f"The rebuild failed (exit code {code}); the live read model was not touched."
        )
    if last is not None and not as_json:
        Console().print(
            f"{last['projection']}: generation {last['generation']} is live, {last['done']:,} events,"
            f" {last['rate']:,.0f} a second.",
            highlight=False,
        )


def environment_of(state_dir: Path) -> dict[str, str]:
    """The environment of a process of analytics: of the stack that runs here, else our own."""
    environment = dict(os.environ)
    try:
        stack = Stack.load(state_dir)
    except NoStack as error:
        if "KEHU_POSTGRES_URL" not in environment:
            fail(f"{error}. Or set the KEHU_* variables of analytics")
        return environment
    described = stack.description
    return environment | {
        "KEHU_ENVIRONMENT": "development",
        "KEHU_POSTGRES_URL": described["postgres_url"],
        "KEHU_KAFKA_BOOTSTRAP": described["kafka_bootstrap"],
        "KEHU_LAKE_PATH": described["lake_path"],
        "KEHU_CLOCK_FILE": described["clock_file"],
        "KEHU_JWT_SECRET": secrets_of(state_dir)["jwt_secret"],
    }


def reason(complaints: str) -> str:
    """What the log of a failed rebuild says: the last error, as the logs of processes are written."""
    for line in reversed(complaints.splitlines()):
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(entry, dict) and entry.get("error"):
            return f"{entry['error']}: {entry.get('reason') or entry.get('message')}"
    return complaints.strip().splitlines()[-1].strip() if complaints.strip() else ""


def _steps(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            step = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(step, dict) and step.get("state") in _STATES:
            yield step


def _show(process: subprocess.Popen[str], as_json: bool) -> dict[str, Any] | None:
    last: dict[str, Any] | None = None
    if as_json:
        for last in _steps(process):
            print(orjson.dumps(last).decode(), flush=True)
        return last
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task: TaskID | None = None
        for last in _steps(process):
            if last["state"] == "failed":
                continue
            if task is None:
                task = progress.add_task("", total=max(1, last["total"]), rate=0.0)
            progress.update(
                task,
                description=f"{last['projection']} generation {last['generation']}: {last['state']}",
                total=max(1, last["total"]),
                completed=last["done"],
                rate=last["rate"],
            )
    return last
