"""A bulk file: begun once, however often it is sent, and completed with the outcome that the sender was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from kehu.decider import Decider, Refused
from kehu.events import Event
from kehu.events.lead_intake import ImportCompleted, ImportStarted

Format = Literal["ndjson", "csv"]


@dataclass(frozen=True, slots=True)
class StartImport:
    """A file begins to come in, or comes in again.

    Args:
        channel: of rows that name none.
    """

    import_id: UUID
    format: Format
    channel: str | None = None


@dataclass(frozen=True, slots=True)
class CompleteImport:
    """The last row was read. Counts are rows of this sending; `repeated` ones had been taken by an earlier one."""

    import_id: UUID
    captured: int
    merged: int
    refused: int
    repeated: int


ImportCommand = StartImport | CompleteImport


@dataclass(frozen=True, slots=True)
class Import:
    started: bool = False
    completed: bool = False


def decide(command: ImportCommand, current: Import) -> Sequence[Event]:
    """A whole file sent again says nothing new; one that was mended or cut short completes with what it added."""
    match command:
        case StartImport(import_id, form, channel):
            if current.started:
                return ()
            return (ImportStarted(import_id=import_id, format=form, channel=channel),)
        case CompleteImport(import_id, captured, merged, refused, repeated):
            if not current.started:
                raise Refused("import-not-started", "there is no import with this id")
            if current.completed and captured + merged == 0:
                return ()
            return (
                ImportCompleted(
                    import_id=import_id, captured=captured, merged=merged, refused=refused, repeated=repeated
                ),
            )


def evolve(current: Import, event: Event) -> Import:
    """Fold one event."""
    match event:
        case ImportStarted():
            return Import(started=True, completed=current.completed)
        case ImportCompleted():
            return Import(started=True, completed=True)
    return current


IMPORT: Decider[Any, Import] = Decider("import", Import(), decide, evolve)
