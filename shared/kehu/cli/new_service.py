"""`kehu new-service`: the usual files of a service, which runs at once: one aggregate, one command, one event, one route."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.console import Console

_KEBAB = re.compile(r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")
_SNAKE = re.compile(r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")

_FILES = {
    "services/$kebab/pyproject.toml": """\
[project]
name = "kehu-$kebab"
version = "0.1.0"
requires-python = ">=3.11"
license = "Apache-2.0"
dependencies = ["kehu"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["$snake"]

[tool.hatch.build.targets.wheel.force-include]
"migrations" = "$snake/_migrations"
""",
    "services/$kebab/README.md": """\
# $kebab

One sentence: which stage of a customer's life this is, and what nobody else decides.

| | |
|---|---|
| owns | streams `$aggregate-` |
| writes | `$aggregate.opened` → `crm.$kebab.events` |
| consumes | nothing yet |
| roles | `migrate api relay` |

| command | route | refused when |
|---|---|---|
| open | `POST /$plural` | the title is empty |
""",
    "services/$kebab/migrations/0001_$snake.sql": """\
-- Tables of $kebab beside the backbone's. Read models get theirs here, with their version in the name.
COMMENT ON TABLE stored_events IS 'The events of $kebab';
""",
    "services/$kebab/$snake/__init__.py": '"""Kehu service $kebab."""\n',
    "services/$kebab/$snake/py.typed": "",
    "services/$kebab/$snake/__main__.py": '''\
"""`python -m $snake ROLE [ROLE...]`."""

from kehu.runtime import main
from $snake.bootstrap import SERVICE

if __name__ == "__main__":
    main(SERVICE)
''',
    "services/$kebab/$snake/settings.py": '''\
"""What $kebab reads from its environment: what every service reads."""

from __future__ import annotations

from typing import ClassVar

from kehu.settings import ServiceSettings


class ${camel}Settings(ServiceSettings):
    """Nothing of its own."""

    SERVICE: ClassVar[str] = "$kebab"
''',
    "services/$kebab/$snake/domain/__init__.py": '"""The rules of $kebab. Pure: no clock, no ids, no I/O."""\n',
    "services/$kebab/$snake/domain/$aggregate.py": '''\
"""$Aggregate: what may be done with it, and when not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from kehu.decider import Decider, Refused
from kehu.events import Event
from kehu.events.$snake import ${Aggregate}Opened


@dataclass(frozen=True, slots=True)
class Open$Aggregate:
    """Begin one."""

    ${aggregate}_id: UUID
    customer_id: UUID
    title: str


@dataclass(frozen=True, slots=True)
class $Aggregate:
    title: str


def decide(command: Open$Aggregate, state: $Aggregate | None) -> Sequence[Event]:
    """Opening it again does nothing."""
    if state is not None:
        return ()
    if not command.title.strip():
        raise Refused("empty-title", "a $aggregate needs a title", "title")
    return (
        ${Aggregate}Opened(
            ${aggregate}_id=command.${aggregate}_id, customer_id=command.customer_id, title=command.title
        ),
    )


def evolve(state: $Aggregate | None, event: Event) -> $Aggregate | None:
    """Fold one event."""
    if isinstance(event, ${Aggregate}Opened):
        return $Aggregate(event.title)
    return state


$AGGREGATE: Decider[Open$Aggregate, $Aggregate | None] = Decider("$aggregate", None, decide, evolve)
''',
    "services/$kebab/$snake/handlers.py": '''\
"""The table of contents: every command of $kebab and how it is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kehu.commands import Handles, on
from $snake.domain.$aggregate import $AGGREGATE, Open$Aggregate

HANDLERS: Mapping[type[Any], Handles] = {
    Open$Aggregate: on($AGGREGATE, lambda c: c.${aggregate}_id, lambda c: c.customer_id),
}
''',
    "services/$kebab/$snake/api/__init__.py": '"""The HTTP API of $kebab."""\n',
    "services/$kebab/$snake/api/schemas.py": '''\
"""What the API takes and shows."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, Field, StringConstraints

from kehu.http import Body


class ${Aggregate}In(Body):
    """What is needed to open one."""

    customer_id: UUID
    title: Annotated[str, StringConstraints(max_length=500)] = Field(examples=["Call back about the offer"])


class ${Aggregate}Out(BaseModel):
    """As it is now."""

    ${aggregate}_id: UUID
    title: str
''',
    "services/$kebab/$snake/api/routes.py": '''\
"""Routes of $kebab."""

from __future__ import annotations

import asyncio
from typing import Annotated
from uuid import UUID

from fastapi import Request, Response

from $snake.api.schemas import ${Aggregate}In, ${Aggregate}Out
from $snake.domain.$aggregate import $AGGREGATE, Open$Aggregate
from kehu.http import Call, Problem, Role, Router, answer, commands, etag, json_response, requires
from kehu.ids import derived

WORK = (Role.SALES, Role.SERVICE, Role.MANAGER, Role.ADMIN)

router = Router(tags=["$kebab"])


@router.post("/$plural", status_code=201)
async def open_$aggregate(request: Request, body: ${Aggregate}In, call: Annotated[Call, commands(*WORK)]) -> Response:
    """Open one. The same Idempotency-Key gives the same one again."""
    ${aggregate}_id = derived(call.command_id, "$aggregate")
    command = Open$Aggregate(${aggregate}_id, body.customer_id, body.title)
    outcome = await request.app.state.gate.submit(call.request(command))
    return answer(outcome, 201, location=f"/$plural/{${aggregate}_id}", stream=f"$aggregate-{${aggregate}_id}")


@router.get("/$plural/{${aggregate}_id}", response_model=${Aggregate}Out, dependencies=[requires(*WORK)])
async def get_$aggregate(request: Request, ${aggregate}_id: UUID) -> Response:
    """One as it is now, from its events."""
    found = await asyncio.to_thread(request.app.state.store.stream, f"$aggregate-{${aggregate}_id}")
    state = $AGGREGATE.fold(r.event for r in found.events)
    if state is None:
        raise Problem(404, "There is no $aggregate with this id.", "$aggregate-not-found")
    return json_response({"${aggregate}_id": ${aggregate}_id, "title": state.title}, headers={"ETag": etag(found.version)})
''',
    "services/$kebab/$snake/bootstrap.py": '''\
"""How $kebab is put together: its parts for each role, no logic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from $snake.handlers import HANDLERS
from $snake.settings import ${camel}Settings
from kehu.clock import Clock
from kehu.commands import CommandHandler
from kehu.eventstore import EventStore
from kehu.follower import Notifier
from kehu.kafka.topics import topic_of
from kehu.migrations import create_database, of_service
from kehu.migrations import migrate as apply_migrations
from kehu.postgres import Pool, open_pool
from kehu.privacy import NoKeys
from kehu.runtime import Service, current_role


@dataclass(frozen=True)
class Parts:
    """What roles are made of."""

    clock: Clock
    pool: Pool
    store: EventStore
    handler: CommandHandler


@contextlib.contextmanager
def parts(settings: ${camel}Settings) -> Iterator[Parts]:
    """The parts of one process, closed at its end."""
    clock = settings.clock()
    pool = open_pool(settings.database_url, "$kebab", settings.pool_size)
    notifier = Notifier(pool)
    try:
        store = EventStore(pool, "$kebab")
        yield Parts(clock, pool, store, CommandHandler(store, HANDLERS, clock, NoKeys(), notifier.ring))
    finally:
        notifier.stop()
        pool.close()


def migrate(settings: ${camel}Settings) -> None:
    """Make the database and bring its tables up to date."""
    apply_migrations(create_database(settings.postgres_url, settings.database), of_service("$snake"))


async def api(settings: ${camel}Settings) -> None:
    """The HTTP API."""
    from $snake.api.routes import router
    from kehu.gate import CommandGate
    from kehu.http import create_app, serve

    with parts(settings) as made:
        role = current_role()
        app = create_app(
            settings,
            title="Kehu $kebab",
            description="What this service is for.",
            routers=[router],
            gate=CommandGate(made.handler),
            health=role.health if role else None,
            state={"store": made.store},
        )
        await serve(app, settings)


async def relay(settings: ${camel}Settings) -> None:
    """The log → Kafka."""
    from kehu.kafka.relay import Relay

    with parts(settings) as made:
        await Relay(made.pool, made.store, settings.kafka_bootstrap, topic_of("$kebab"), clock=made.clock).run()


SERVICE = Service("$kebab", ${camel}Settings, {"migrate": migrate, "api": api, "relay": relay})
''',
    "shared/kehu/events/$snake.py": '''\
"""Events of $kebab."""

from __future__ import annotations

from uuid import UUID

from kehu.events.base import Event
from kehu.events.values import Text


class ${Aggregate}Opened(Event, name="$aggregate.opened"):
    """One began."""

    ${aggregate}_id: UUID
    customer_id: UUID
    title: Text
''',
    "tests/unit/$snake/test_$aggregate.py": '''\
"""The rules of a $aggregate."""

from __future__ import annotations

from uuid import uuid4

from $snake.domain.$aggregate import $AGGREGATE, Open$Aggregate
from kehu.events.$snake import ${Aggregate}Opened
from kehu.testing.specs import Spec

ID, CUSTOMER = uuid4(), uuid4()
OPENED = ${Aggregate}Opened(${aggregate}_id=ID, customer_id=CUSTOMER, title="Call back")


def test_opened() -> None:
    Spec($AGGREGATE).when(Open$Aggregate(ID, CUSTOMER, "Call back")).then(OPENED)


def test_refused_without_a_title() -> None:
    Spec($AGGREGATE).when(Open$Aggregate(ID, CUSTOMER, " ")).then_refused("empty-title")


def test_sent_twice() -> None:
    Spec($AGGREGATE).given(OPENED).when(Open$Aggregate(ID, CUSTOMER, "Call back")).then_nothing()
''',
}


def lay_out(name: str, aggregate: str, root: Path) -> list[Path]:
    """Write the files and give their paths.

    Raises:
        ValueError: a name is not one, or the service is there already.
    """
    if not _KEBAB.match(name):
        raise ValueError(f"{name!r} is not a service name: write it like field-sales")
    if not _SNAKE.match(aggregate):
        raise ValueError(f"{aggregate!r} is not an aggregate name: write it like visit or site_visit")
    if (root / "services" / name).exists():
        raise ValueError(f"services/{name} is there already")
    camel = "".join(part.title() for part in aggregate.split("_"))
    words = {
        "kebab": name,
        "snake": name.replace("-", "_"),
        "camel": "".join(part.title() for part in name.split("-")),
        "aggregate": aggregate,
        "Aggregate": camel,
        "AGGREGATE": aggregate.upper(),
        "plural": f"{aggregate.replace('_', '-')}s",
    }
    written: list[Path] = []
    for path, text in _FILES.items():
        target = root / Template(path).substitute(words)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(words))
        written.append(target)
    return written


def command(
    name: Annotated[str, typer.Argument(help="Its name, like field-sales.")],
    aggregate: Annotated[str, typer.Option(help="Its first aggregate, like visit.")] = "item",
    root: Annotated[Path, typer.Option(help="The checkout.")] = Path(),
) -> None:
    """Lay out a new service with the usual file names."""
    console = Console()
    try:
        written = lay_out(name, aggregate, root)
    except ValueError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(2) from None
    for path in written:
        console.print(f"[green]wrote[/] {path}")
    snake = name.replace("-", "_")
    console.print("\nThree places list services; add it to each, then run `make setup schemas test`:")
    console.print(
        f"  1. pyproject.toml: dependencies and tool.uv.sources (kehu-{name}), mypy_path, importlinter ({snake})"
    )
    console.print(f'  2. shared/kehu/events/base.py: PRODUCERS += "{name}"')
    console.print(f'  3. shared/kehu/supervisor.py: SUITE += ServiceSpec("{name}", ("api", "relay"))')
