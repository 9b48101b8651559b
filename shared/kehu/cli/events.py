"""`kehu events`: the catalogue, and the events of a development stack as they are recorded. Personal data stays sealed."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

import typer
from rich.console import Console
from rich.table import Table

from kehu.cli.up import StateDir
from kehu.events import Recorded, UnknownEvent, event_class, registered
from kehu.eventstore import Cursor, EventStore
from kehu.postgres import Pool, open_pool
from kehu.supervisor import STATE, SUITE, NoStack, Stack

app = typer.Typer(help="The event catalogue, and events as they are recorded.", add_completion=False)


@app.command(name="ls")
def list_(producer: Annotated[str | None, typer.Option(help="Only this service's.")] = None) -> None:
    """List every event type."""
    table = Table("event", "stream", "producer", "what", box=None)
    for wire, cls in registered().items():
        if producer in (None, cls.PRODUCER):
            table.add_row(wire, f"{cls.STREAM}-", cls.PRODUCER, (cls.__doc__ or "").strip().split("\n")[0])
    Console().print(table)


@app.command()
def show(wire: Annotated[str, typer.Argument(metavar="TYPE", help="E.g. lead.captured.v1.")]) -> None:
    """Print the JSON Schema of an event's data."""
    from kehu.cli.docs import event_schema

    try:
        print(json.dumps(event_schema(event_class(wire)), ensure_ascii=False, indent=1))
    except UnknownEvent:
        sys.stderr.write(f"There is no event {wire}: `kehu events ls` lists them.\n")
        raise typer.Exit(1) from None


@dataclass
class _Log:
    """How far the log of one service was shown."""

    store: EventStore
    after: Cursor

    @classmethod
    def ending(cls, pool: Pool, service: str, lines: int) -> _Log:
        """Begin so that the last `lines` events come first."""
        with pool.connection() as connection:
            row = connection.execute(
                "SELECT txid::text::bigint, notification_id FROM stored_events"
                " ORDER BY txid DESC, notification_id DESC OFFSET %s LIMIT 1",
                (lines,),
            ).fetchone()
        return cls(EventStore(pool, service), Cursor(*row) if row is not None else Cursor(0, 0))

    def new(self) -> Sequence[Recorded]:
        rows = self.store.read(self.after)
        if rows:
            self.after = rows[-1].cursor
        return [row.recorded() for row in rows]


@app.command()
def tail(
    service: Annotated[str | None, typer.Argument(help="Only this service's; all when left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="How many old events of each.")] = 20,
    stream: Annotated[str, typer.Option(help="Only streams that begin so, e.g. lead- or lead-<id>.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The whole envelope, one a line.")] = False,
    state_dir: StateDir = STATE,
) -> None:
    """Show the newest events of the stores of a development stack."""
    try:
        stack = Stack.load(state_dir)
    except NoStack as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(1) from None
    names = [spec.name for spec in SUITE if spec.topic and service in (None, spec.name)]
    if not names:
        raise typer.BadParameter(f"{service} writes no events")
    server = urlsplit(stack.description["postgres_url"])
    pools = {n: open_pool(urlunsplit(server._replace(path=f"/kehu_{n.replace('-', '_')}")), "events", 1) for n in names}
    pause = threading.Event()
    try:
        logs = [_Log.ending(pool, name, lines) for name, pool in pools.items()]
        while True:
            found = [event for log in logs for event in log.new()]
            for event in sorted(found, key=lambda event: event.recorded):
                if event.stream.startswith(stream):
                    _print(event, as_json)
            if found:
                continue
            if not follow:
                return
            pause.wait(0.2)
    finally:
        for pool in pools.values():
            pool.close()


def _print(event: Recorded, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(event.attributes, ensure_ascii=False))
        return
    at = event.time.isoformat(timespec="seconds").replace("+00:00", "Z")
    typer.echo(f"{at}  {event.type:<32} {event.stream}@{event.version}  {event.actor}")
