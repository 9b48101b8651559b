"""Each requirement with the tests that cite it, and the rows that have none."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

_ROW = re.compile(r"^\| ([A-Z]{2}-\d{2}) \| (.+?) \|")


def rows(page: Path) -> dict[str, str]:
    """The rows of the requirements page: id → text."""
    return {m[1]: m[2] for line in page.read_text().splitlines() if (m := _ROW.match(line))}


def cited(tests: Path) -> dict[str, list[str]]:
    """Which tests carry which id, read from their `@pytest.mark.req(...)` without running them."""
    found: dict[str, list[str]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("mark.req"):
                    for argument in decorator.args:
                        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                            found.setdefault(argument.value, []).append(f"{path.relative_to(tests)}::{node.name}")
    return found


def command(
    page: Path = typer.Option(Path("docs/reference/requirements.md"), help="The page with the rows."),
    tests: Path = typer.Option(Path("tests"), help="Where the tests are."),
    as_json: bool = typer.Option(False, "--json", help="For a program."),
) -> None:
    """Print each requirement with the tests that cite it. An id that a test cites and the page does not have is an error."""
    wanted, proofs = rows(page), cited(tests)
    unknown = sorted(proofs.keys() - wanted.keys())
    if as_json:
        typer.echo(json.dumps({row: proofs.get(row, []) for row in wanted}, ensure_ascii=False, indent=1))
    else:
        table = Table("id", "what", "tests", title="Requirements and their proofs", show_lines=False)
        for row, text in wanted.items():
            tests_of = proofs.get(row, [])
            shown = f"[green]{len(tests_of)}[/]  {tests_of[0]}" if tests_of else "[yellow]none yet[/]"
            table.add_row(row, text if len(text) <= 90 else text[:89] + "…", shown)
        console = Console()
        console.print(table)
        console.print(f"{sum(1 for row in wanted if row in proofs)} of {len(wanted)} rows have a test")
    if unknown:
        typer.echo(f"tests cite unknown rows: {', '.join(unknown)}", err=True)
        raise typer.Exit(1)
