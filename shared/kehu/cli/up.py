"""`kehu up`, `kehu down`, `kehu status`: the whole suite on this machine."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from kehu.supervisor import STATE, SUITE, NoStack, NotReady, Stack, Supervisor, runs

StateDir = Annotated[
    Path, typer.Option("--state-dir", envvar="KEHU_STATE_DIR", help="Where logs, secrets and addresses are kept.")
]
_console = Console()


def up(
    state_dir: StateDir = STATE,
    service: Annotated[list[str] | None, typer.Option(help="Only this service; may be given several times.")] = None,
    first_port: Annotated[int, typer.Option(help="Port of the first API; the others follow.")] = 8100,
    throw_away: Annotated[bool, typer.Option(help="Keep no data when it ends.")] = False,
    deadline: Annotated[float, typer.Option(help="Seconds until every process must be ready.")] = 90.0,
) -> None:
    """Run PostgreSQL, Kafka and every role of every service until Ctrl-C."""
    from kehu.devstack import DevStack, DevStackError
    from kehu.observability import configure_logging

    unknown = set(service or ()) - {spec.name for spec in SUITE}
    if unknown:
        _fail(f"There is no service {', '.join(sorted(unknown))}; there are {', '.join(spec.name for spec in SUITE)}.")
    services = [spec for spec in SUITE if not service or spec.name in service]
    configure_logging("kehu", "up", "warning", "console")
    logging.getLogger("kehu").setLevel(logging.INFO)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: over.set())
    if runs(state_dir):
        _fail(f"A stack runs in {state_dir} already: `kehu status` shows it, `kehu down` ends it.")
    began = time.monotonic()
    devstack = DevStack(data_dir=None if throw_away else state_dir / "data")
    supervisor: Supervisor | None = None
    try:
        address = devstack.start()
        supervisor = Supervisor(address, state_dir, services, first_port=first_port)
        supervisor.start(deadline)
        _wait(supervisor, deadline, over)
        if not over.is_set():
            _console.print(_table(Stack.load(state_dir).status()))
            _console.print(
                f"Ready after {time.monotonic() - began:.1f} s. PostgreSQL: {address.origin_postgres}, ", end=""
            )
            _console.print(f"Kafka: {address.origin_kafka} at {address.kafka_bootstrap}. Ctrl-C ends it.")
        while not over.wait(1.0):
            pass  # wait() without a limit would not see a signal on every platform
        _console.print("Stopping …")
    except (DevStackError, NotReady) as error:
        _fail(str(error))
    finally:
        if supervisor is not None:
            supervisor.stop()
        devstack.stop()


def _wait(supervisor: Supervisor, deadline: float, over: threading.Event) -> None:
    """Wait until all is ready, or until somebody wants it to end."""
    outcome: list[NotReady | None] = []

    def wait() -> None:
        try:
            supervisor.wait_ready(deadline)
        except NotReady as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while thread.is_alive() and not over.is_set():
        thread.join(0.1)
    if outcome and outcome[0] is not None:
        raise outcome[0]


def down(
    state_dir: StateDir = STATE,
    remove_data: Annotated[bool, typer.Option(help="Throw the data, secrets and logs away as well.")] = False,
) -> None:
    """End the suite that runs here, in order."""
    try:
        stack = Stack.load(state_dir)
    except NoStack as error:
        if not remove_data:
            _fail(str(error))
    else:
        os.kill(stack.pid, signal.SIGTERM)
        end, pause = time.monotonic() + 60.0, threading.Event()
        while runs(state_dir) or _alive(stack.pid):
            if time.monotonic() > end:
                _fail(f"It does not end (process {stack.pid}).")
            pause.wait(0.1)
        _console.print("Stopped.")
    if remove_data:
        from kehu.devstack import remove_data as remove

        remove(state_dir / "data")
        for name in ("secrets.json", "clock.json", "stack.json"):
            (state_dir / name).unlink(missing_ok=True)
        for log in (state_dir / "logs").glob("*"):
            log.unlink()


def status(
    state_dir: StateDir = STATE,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Show each process. Exit code 1 when one is not ready."""
    try:
        stack = Stack.load(state_dir)
    except NoStack as error:
        _fail(str(error))
    entries = stack.status()
    if as_json:
        print(json.dumps(entries))
    else:
        _console.print(_table(entries))
    raise typer.Exit(0 if all(entry["ready"] for entry in entries) else 1)


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("Service", "Role", "Pid", "Memory", "State", "Lag", "Restarts", "Address"):
        right = title in ("Pid", "Memory", "Lag", "Restarts")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for entry in entries:
        down = entry["pid"] is None
        state = "[green]ready[/]" if entry["ready"] else "[red]down[/]" if down else "[yellow]not ready[/]"
        table.add_row(
            entry["service"],
            "+".join(entry["roles"]),
            str(entry["pid"] or ""),
            f"{entry['rss'] / 1e6:.0f} MB" if entry["rss"] else "",
            state,
            "" if entry["lag"] is None else str(entry["lag"]),
            str(entry["restarts"] or ""),
            entry["url"].removeprefix("http://"),
        )
    total = sum(entry["rss"] or 0 for entry in entries)
    table.caption = f"{len(entries)} processes, {total / 1e6:.0f} MB"
    return table


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    raise typer.Exit(1)
