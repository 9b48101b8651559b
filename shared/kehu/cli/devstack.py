"""`kehu devstack`: PostgreSQL and Kafka on this machine, without the services."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kehu.devstack import DevStack, DevStackError
from kehu.devstack.doctor import examine
from kehu.devstack.kafka import fetch as fetch_kafka

app = typer.Typer(help="PostgreSQL and Kafka for development: start them, fetch what they need, look what is missing.")

_console = Console(stderr=True)


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="Keep the data in this directory and go on with it.")] = None,
    keep: Annotated[bool, typer.Option(help="Do not throw the temporary data away at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Start both, print where they listen, and stay until Ctrl-C or SIGTERM."""
    over = threading.Event()
    stack = DevStack(data_dir=data, keep=keep)
    try:
        address = stack.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: over.set())
        if as_json:
            origins = {"origin_postgres": address.origin_postgres, "origin_kafka": address.origin_kafka}
            print(json.dumps(address.environment() | origins), flush=True)
        else:
            for name, value in address.environment().items():
                print(f"export {name}={value}", flush=True)
            for piece, choice in stack.choices.items():
                _console.print(
                    f"{piece}: {choice.origin} ({choice.reason})", style="dim", highlight=False, soft_wrap=True
                )
            if stack.data_dir is not None:
                _console.print(f"data: {stack.data_dir}", style="dim", highlight=False, soft_wrap=True)
            _console.print("Ctrl-C ends both.", style="dim")
        while not over.wait(1.0):
            pass  # wait() without a limit would not see a signal on every platform
    except DevStackError as error:
        _fail(error)
    finally:
        kept = stack.data_dir
        stack.stop()
        if keep and kept is not None:
            _console.print(f"The data is in {kept}.", highlight=False, soft_wrap=True)


@app.command()
def fetch() -> None:
    """Fill the cache with all that the embedded Kafka needs, so that later starts need no network."""
    try:
        print(fetch_kafka(_console))
    except DevStackError as error:
        _fail(error)


@app.command()
def doctor() -> None:
    """Show what would be used for each piece, and how to mend what is missing. Exit code 1 when a piece cannot be had."""
    findings = examine()
    table = Table(show_lines=True)
    for title in ("Piece", "State", "What", "How to mend it"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        state = {True: "[green]fine[/]", False: "[red]missing[/]", None: "[yellow]not needed[/]"}[finding.fine]
        table.add_row(finding.piece, state, finding.what, finding.remedy)
    Console().print(table)
    if any(finding.fine is False for finding in findings):
        raise typer.Exit(1)


def _fail(error: DevStackError) -> None:
    _console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from error
