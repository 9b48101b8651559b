"""`kehu parked`: events that a consumer could not handle. They are looked at here; the consumer itself carries out what is asked."""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from kehu.cli.up import StateDir
from kehu.kafka import parked
from kehu.kafka.parked import NotFirst, NotParked, ParkedEvent, What
from kehu.postgres import Pool, open_pool
from kehu.supervisor import STATE, SUITE, NoStack, Stack

app = typer.Typer(
    help="Events that a consumer could not handle: look at them, have them handled again, or drop them.",
    add_completion=False,
    no_args_is_help=True,
)

Service = Annotated[str, typer.Option("--service", "-s", help="Whose consumer it is, e.g. scoring.")]
Id = Annotated[int, typer.Argument(help="Id of the parked event, from `kehu parked ls`.", min=1)]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the consumer; 0 only asks.", min=0, max=3600)]


@app.command(name="ls")
def list_(
    service: Annotated[
        str | None, typer.Option("--service", "-s", help="Only this service's; all when left out.")
    ] = None,
    consumer: Annotated[str | None, typer.Option(help="Only this consumer's, e.g. crm.scoring.scores.")] = None,
    stream: Annotated[str | None, typer.Option(help="Only this stream, e.g. lead-<id>.")] = None,
    closed: Annotated[bool, typer.Option("--all", help="Also what was resolved or dropped.")] = False,
    limit: Annotated[int, typer.Option(help="The most lines of each service.", min=1, max=1000)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line, for programs.")] = False,
    state_dir: StateDir = STATE,
) -> None:
    """List what is parked, in the order in which it was."""
    statuses: tuple[parked.Status, ...] = (
        ("waiting", "behind", "resolved", "dropped") if closed else ("waiting", "behind")
    )
    table = Table(title="Parked events", title_justify="left", show_edge=False)
    for column in ("service", "id", "status", "stream", "version", "tries", "parked", "error"):
        table.add_column(column, overflow="fold")
    for name in [service] if service else [spec.name for spec in SUITE]:
        with _pool(name, state_dir) as pool:
            for event in parked.list_parked(pool, consumer, stream, statuses, limit=limit):
                if as_json:
                    typer.echo(json.dumps({"service": name, **_described(event)}, ensure_ascii=False))
                    continue
                version = "" if event.version is None else str(event.version)
                status = event.status if event.request is None else f"{event.status}, {event.request} asked"
                cells = [
                    str(event.id),
                    status,
                    event.stream or "(unreadable)",
                    version,
                    str(event.attempts),
                    _at(event.parked_at),
                ]
                table.add_row(name, *cells, event.error)
    if as_json:
        return
    if table.row_count:
        Console().print(table)
    else:
        typer.echo("Nothing is parked.")


@app.command()
def show(id_: Id, service: Service, state_dir: StateDir = STATE) -> None:
    """Show one parked event with its record as it was on Kafka. Personal data in it is sealed."""
    with _pool(service, state_dir) as pool:
        try:
            event = parked.show(pool, id_)
        except NotParked as error:
            _fail(str(error))
    for name, value in _described(event).items():
        if value is not None:
            typer.echo(f"{name:<16} {value if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)}")
    typer.echo("")
    typer.echo(_pretty(event))


@app.command()
def replay(
    service: Service,
    id_: Annotated[int | None, typer.Argument(help="Id of a parked event; its stream is handled again.", min=1)] = None,
    consumer: Annotated[str | None, typer.Option(help="All waiting streams of this consumer, instead of one.")] = None,
    wait: Wait = 30.0,
    state_dir: StateDir = STATE,
) -> None:
    """Have the parked events of a stream handled again, in order, until one fails. Do it when the cause is repaired."""
    if (id_ is None) == (consumer is None):
        _fail("Give either the id of a parked event, or --consumer for all that wait there.")
    with _pool(service, state_dir) as pool:
        if id_ is not None:
            _ask(pool, id_, "replay", wait)
            return
        assert consumer is not None
        asked = parked.ask_all(pool, consumer, _who())
        typer.echo(f"Asked for {asked} streams.")
        deadline = time.monotonic() + wait
        while (left := _asked(pool, consumer)) and time.monotonic() < deadline:
            time.sleep(0.2)
        waiting = sum(n for (c, _), n in parked.counts(pool).items() if c == consumer)
    if wait and left:
        _fail(f"{left} were not tried in {wait:.0f} s: does the consumer run? They stay asked for.")
    if wait and waiting:
        _fail(f"{waiting} events are still parked: `kehu parked ls -s {service}` tells why.")
    if wait:
        typer.echo("Nothing is parked any more.")


@app.command()
def drop(id_: Id, service: Service, wait: Wait = 30.0, state_dir: StateDir = STATE) -> None:
    """Never handle this event; its stream goes on behind it. What it would have done stays undone."""
    with _pool(service, state_dir) as pool:
        _ask(pool, id_, "drop", wait)


@app.command(name="accept-hole")
def accept_hole(id_: Id, service: Service, wait: Wait = 30.0, state_dir: StateDir = STATE) -> None:
    """Handle this event although earlier versions of its stream are missing, and go on from there."""
    with _pool(service, state_dir) as pool:
        _ask(pool, id_, "accept_hole", wait)


def _ask(pool: Pool, id_: int, what: What, wait: float) -> None:
    try:
        before = parked.show(pool, id_)
        event = parked.ask(pool, id_, what, _who())
    except (NotParked, NotFirst) as error:
        _fail(str(error))
    deadline = time.monotonic() + wait
    while event.request is not None and time.monotonic() < deadline:
        time.sleep(0.1)
        event = parked.show(pool, id_)
    if event.request is not None:
        if wait:
            _fail(f"The consumer {event.consumer} did not get to it in {wait:.0f} s: does it run? It stays asked for.")
        typer.echo("Asked.")
    elif event.status in ("waiting", "behind"):
        again = "was tried again and failed" if event.attempts > before.attempts else "still waits"
        _fail(f"Parked event {id_} {again}: {event.error}")
    else:
        behind = len(parked.list_parked(pool, event.consumer, event.stream, limit=1000)) if event.stream else 0
        typer.echo(
            f"Parked event {id_} is {event.status}." + (f" {behind} of its stream are still parked." if behind else "")
        )


def _asked(pool: Pool, consumer: str) -> int:
    return sum(event.request is not None for event in parked.list_parked(pool, consumer, limit=1000))


def _who() -> str:
    return f"operator:{getpass.getuser()}"


def _at(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _described(event: ParkedEvent) -> dict[str, Any]:
    shown = {name: value for name, value in asdict(event).items() if name != "value"}
    shown["key"] = None if event.key is None else event.key.decode(errors="backslashreplace")
    shown["headers"] = {name: (raw or b"").decode(errors="backslashreplace") for name, raw in event.headers}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in shown.items()}


def _pretty(event: ParkedEvent) -> str:
    try:
        return json.dumps(json.loads(event.value or b""), ensure_ascii=False, indent=1)
    except ValueError:
        return event.text[:10_000]


@contextmanager
def _pool(service: str, state_dir: os.PathLike[str]) -> Iterator[Pool]:
    """The database of a service: of the stack that runs here, else by KEHU_POSTGRES_URL and KEHU_DATABASE."""
    try:
        server = str(Stack.load(state_dir).description["postgres_url"])  # type: ignore[arg-type]
        database = ""
    except NoStack as error:
        server, database = os.environ.get("KEHU_POSTGRES_URL", ""), os.environ.get("KEHU_DATABASE", "")
        if not server:
            _fail(f"{error}. Or set KEHU_POSTGRES_URL.")
    database = database or f"kehu_{service.replace('-', '_')}"
    url = urlunsplit(urlsplit(server)._replace(path=f"/{database}"))
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError as error:
        _fail(f"The database {database} of {service} cannot be reached: {str(error).strip().splitlines()[-1]}")
    pool = open_pool(url, "kehu-parked", 1)
    try:
        yield pool
    finally:
        pool.close()


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    raise typer.Exit(1)
