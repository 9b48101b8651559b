"""`kehu clock`: business time of a development stack, which can be moved."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from kehu.cli.up import StateDir
from kehu.clock import DevelopmentClock
from kehu.supervisor import STATE, NoStack, Stack

app = typer.Typer(help="Show and move the clock of a development stack. Every process sees the move at once.")

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def duration(text: str) -> timedelta:
    """A length of time such as `90s`, `15m`, `48h`, `3d`, `1w`, `1d12h`.

    Raises:
        typer.BadParameter: it is something else.
    """
    found = _PART.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise typer.BadParameter(f"{text!r} is not a length of time such as 90s, 15m, 48h, 3d or 1d12h")
    try:
        return sum((timedelta(**{_UNITS[unit]: float(number)}) for number, unit in found), timedelta())
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is too long") from None


def instant(text: str) -> datetime:
    """An instant such as `2026-01-01T00:00:00Z`. Raises typer.BadParameter when it is none, or has no time zone."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time such as 2026-01-01T00:00:00Z") from None
    if at.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no time zone: add Z or +08:00")
    return at.astimezone(UTC)


def _clock(state_dir: Path) -> DevelopmentClock:
    try:
        return DevelopmentClock(Stack.load(state_dir).clock_file)
    except NoStack as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(1) from None


def _print(clock: DevelopmentClock) -> None:
    offset = clock.offset()
    ahead = f"{offset} ahead" if offset >= timedelta() else f"{-offset} behind"
    print(f"{clock.now().isoformat(timespec='seconds')}  ({ahead if offset else 'as the machine'})")


@app.command()
def show(state_dir: StateDir = STATE) -> None:
    """Print the present business time, and how far it is from the machine's."""
    _print(_clock(state_dir))


@app.command()
def advance(by: Annotated[str, typer.Argument(help="E.g. 90s, 15m, 48h, 3d.")], state_dir: StateDir = STATE) -> None:
    """Move the clock forward."""
    clock = _clock(state_dir)
    clock.advance(duration(by))
    _print(clock)


@app.command(name="set")
def set_(
    at: Annotated[str, typer.Argument(help="E.g. 2026-01-01T00:00:00Z.")],
    state_dir: StateDir = STATE,
    back: Annotated[
        bool, typer.Option(help="Allow moving backwards: what was due then does not fall due again.")
    ] = False,
) -> None:
    """Move the clock to an instant."""
    clock, wanted = _clock(state_dir), instant(at)
    if wanted < clock.now() and not back:
        sys.stderr.write(
            "That is in the past of this clock. `--back` allows it; timers that fired do not fire again.\n"
        )
        raise typer.Exit(1)
    clock.set(wanted)
    _print(clock)
