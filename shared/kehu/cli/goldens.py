"""Golden files: the published schema and an example of every event version, kept for ever beside the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from kehu.events import Event, registered
from kehu.events.compatibility import breaks


def golden(cls: type[Event]) -> dict[str, Any]:
    """What is kept of an event version."""
    from kehu.testing.examples import example

    return {
        "type": cls.TYPE,
        "producer": cls.PRODUCER,
        "stream": cls.STREAM,
        "schema": cls.model_json_schema(mode="serialization"),
        "example": example(cls).model_dump(mode="json", exclude_none=True),
    }


def write(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Write the files of new versions and of compatible changes.

    Returns:
        The names of written files, and for every incompatible event why: those files are left as they are.
    """
    written: list[str] = []
    refused: dict[str, list[str]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for wire, cls in registered().items():
        path, now = folder / f"{wire}.json", golden(cls)
        if path.exists():
            before = json.loads(path.read_text())
            if before == now:
                continue
            if reasons := breaks(before["schema"], now["schema"]):
                refused[wire] = reasons
                continue
        path.write_text(json.dumps(now, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
        written.append(path.name)
    return written, refused


def command(folder: Path = typer.Argument(Path("tests/schemas/golden"), help="Where the golden files are.")) -> None:
    """Write the golden files of new event versions; refuse changes that would break a reader."""
    console = Console()
    written, refused = write(folder)
    for name in written:
        console.print(f"[green]wrote[/] {name}")
    for wire, reasons in refused.items():
        console.print(f"[red]{wire} changed in a way that breaks readers[/]: declare the next version and an upcaster")
        for reason in reasons:
            console.print(f"  · {reason}")
    if not written and not refused:
        console.print("all golden files are as the code says")
    raise typer.Exit(1 if refused else 0)
