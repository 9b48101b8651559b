"""`kehu logs`: what the processes of a development stack say, as text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kehu.cli.up import StateDir
from kehu.supervisor import STATE, tail

_LEVELS = ("debug", "info", "warning", "error", "critical")
_HEAD = ("time", "level", "service", "role", "logger", "message", "frames")
_COLOURS = {"warning": typer.colors.YELLOW, "error": typer.colors.RED, "critical": typer.colors.RED}


def command(
    which: Annotated[str | None, typer.Argument(help="Only this service, or service/role; all when left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="How many old lines of each.")] = 50,
    level: Annotated[str, typer.Option(help="The least level: debug, info, warning, error.")] = "info",
    raw: Annotated[bool, typer.Option(help="As they are, one JSON object a line.")] = False,
    state_dir: StateDir = STATE,
) -> None:
    """Show the logs of the processes, in order of time."""
    if level not in _LEVELS:
        raise typer.BadParameter(f"{level!r} is none of {', '.join(_LEVELS)}")
    least = _LEVELS.index(level)
    files = _files(state_dir / "logs", which)
    if not files:
        typer.echo(f"There are no logs{f' of {which}' if which else ''} in {state_dir / 'logs'}.", err=True)
        raise typer.Exit(1)
    places = {path: path.stat().st_size for path in files}
    old = [_parsed(line) for path in files for line in tail(path, lines).splitlines()]
    for entry in sorted(old, key=lambda entry: str(entry.get("time", ""))):
        _show(entry, least, raw)
    pause = threading.Event()
    while follow:
        for path in files:
            for line in _new(path, places):
                _show(_parsed(line), least, raw)
        pause.wait(0.3)


def _files(folder: Path, which: str | None) -> list[Path]:
    service, _, role = (which or "").partition("/")
    pattern = f"{service or '*'}-{role or '*'}.log"
    return sorted(folder.glob(pattern))


def _new(path: Path, places: dict[Path, int]) -> Iterator[str]:
    """Whole lines that were added since the last look. A log that was cut begins again."""
    size = path.stat().st_size
    if size < places[path]:
        places[path] = 0
    with path.open("rb") as file:
        file.seek(places[path])
        for line in file:
            if not line.endswith(b"\n"):
                return
            places[path] += len(line)
            yield line.decode("utf-8", "replace").rstrip("\n")


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {"message": line, "level": "info", "plain": True}
    return entry if isinstance(entry, dict) else {"message": line, "level": "info", "plain": True}


def _show(entry: dict[str, Any], least: int, raw: bool) -> None:
    name = str(entry.get("level", "info"))
    if name in _LEVELS and _LEVELS.index(name) < least:
        return
    if raw or entry.get("plain"):
        typer.echo(entry["message"] if entry.get("plain") else json.dumps(entry, ensure_ascii=False))
        return
    head = f"{str(entry.get('time', ''))[11:23]} {entry.get('service')}/{entry.get('role')} {entry.get('message')}"
    rest = "".join(f" {key}={value}" for key, value in entry.items() if key not in _HEAD)
    frames = "".join(f"\n    {frame}" for frame in entry.get("frames", ()))
    typer.secho(head + rest + frames, fg=_COLOURS.get(name))
