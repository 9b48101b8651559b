"""`kehu`: the table of contents of the command line. A command's module is imported when the command is used.

To add a command: one line in `COMMANDS`. Its module has either a typer app (`app`, for a group of commands) or a plain
function with typer's annotations. So `kehu --help` stays fast, and a command whose optional packages are not installed
says so without standing in the way of the others.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """Where a command is.

    Args:
        target: `module:attribute`; without attribute the module's `app`, or else its `command`.
        extra: optional packages of the distribution `kehu` that it needs.
    """

    target: str
    text: str
    extra: str = ""


COMMANDS = {
    "up": Command("kehu.cli.up:up", "Run the whole suite on this machine until Ctrl-C.", "devstack"),
    "down": Command("kehu.cli.up:down", "End the suite that runs here."),
    "status": Command("kehu.cli.up:status", "Show each process: memory, readiness, lag."),
    "logs": Command("kehu.cli.logs:command", "Show and follow the logs of the processes."),
    "demo": Command("kehu.cli.demo", "Real leads through the whole suite, with a report.", "devstack"),
    "token": Command("kehu.cli.token:command", "Make a token for calls to a development stack."),
    "clock": Command("kehu.cli.clock:app", "Show and move the clock of a development stack."),
    "events": Command("kehu.cli.events", "The event catalogue, and events as they are recorded."),
    "parked": Command("kehu.cli.parked", "Events that could not be handled: look, send again, drop."),
    "funnel": Command("kehu.cli.funnel", "Conversion from lead to MQL over any period.", "lake"),
    "replay": Command("kehu.cli.replay", "Rebuild a read model from the beginning, beside the live one.", "lake"),
    "report": Command("kehu.cli.report", "Write the report on the recorded history.", "lake"),
    "devstack": Command("kehu.cli.devstack:app", "PostgreSQL and Kafka for development, alone.", "devstack"),
    "docs": Command("kehu.cli.docs:app", "Generate the reference pages and golden files."),
    "new-service": Command("kehu.cli.new_service", "Lay out the files of a new service."),
}


def usage() -> str:
    """What `kehu --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.text}" for name, command in COMMANDS.items()]
    return "\n".join(["Usage: kehu COMMAND ...", "", *lines, "", "`kehu COMMAND --help` tells more."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0)
    name = given[0]
    if name == "--version":
        from importlib.metadata import version

        print(version("kehu"))
        raise SystemExit(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `kehu {close[0]}`?" if close else ""
        _fail(f"There is no command {name!r}.{hint}\n\n{usage()}")
    _run(name, COMMANDS[name], given[1:])


def _run(name: str, command: Command, arguments: Sequence[str]) -> None:
    module_name, _, attribute = command.target.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "kehu":
            raise
        need = f"the extra {command.extra!r}: pip install 'kehu[{command.extra}]'" if command.extra else "it"
        _fail(f"`kehu {name}` cannot run: the package {error.name!r} is not installed. It comes with {need}.")
    import typer

    attribute = attribute or ("app" if hasattr(module, "app") else "command")
    target = getattr(module, attribute)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(target)
        target = app
    target(args=list(arguments), prog_name=f"kehu {name}")


def _fail(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
