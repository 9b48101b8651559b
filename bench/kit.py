"""What all benchmarks share: contenders that take turns, medians, ratios, one kind of table, and the figures as JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console()


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Args:
        name: as shown.
        role: `limit` of the machine, `peer`, or `ours`.
        run: does one round and gives its figure.
    """

    name: str
    role: str
    run: Callable[[], float]


@dataclass
class Figures:
    """The rounds of one contender."""

    name: str
    role: str
    unit: str
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def compare(
    title: str, unit: str, contenders: Sequence[Contender], repeat: int = 3, more_is_better: bool = True
) -> list[Figures]:
    """Run all contenders in turn, `repeat` rounds after one that is not counted, and print the table.

    The machine's speed drifts from minute to minute, so only figures of one run are compared: by their ratios.

    Args:
        unit: of the figures, e.g. `events/s` or `ms`.
        more_is_better: False for times.
    """
    figures = [Figures(c.name, c.role, unit) for c in contenders]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=(repeat + 1) * len(contenders))
        for number in range(repeat + 1):
            for contender, figure in zip(contenders, figures, strict=True):
                progress.update(task, description=f"{title}: {contender.name}")
                value = contender.run()
                if number > 0:
                    figure.rounds.append(value)
                progress.advance(task)
    _print(title, unit, figures, more_is_better)
    _keep(title, figures)
    return figures


def _print(title: str, unit: str, figures: Sequence[Figures], more_is_better: bool) -> None:
    ours = [f for f in figures if f.role == "ours"]
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    table.add_column("role")
    table.add_column(f"median {unit}", justify="right")
    table.add_column("min – max", justify="right")
    for one in ours:
        table.add_column(f"{one.name} ÷ this" if len(ours) > 1 else "ours ÷ this", justify="right")
    for figure in figures:
        ratios = [_ratio(one, figure, more_is_better) for one in ours]
        spread = f"{min(figure.rounds):,.6g} – {max(figure.rounds):,.6g}"
        style = "bold" if figure.role == "ours" else ""
        table.add_row(figure.name, figure.role, f"{figure.median:,.6g}", spread, *ratios, style=style)
    console.print(table)


def _ratio(ours: Figures, other: Figures, more_is_better: bool) -> str:
    if other.median == 0 or ours.median == 0:
        return "–"
    ratio = ours.median / other.median
    return f"{ratio if more_is_better else 1 / ratio:.2f}"


def _keep(title: str, figures: Sequence[Figures]) -> None:
    """Append the figures to the file named by KEHU_BENCH_JSON, one JSON object a line, for a report."""
    path = os.environ.get("KEHU_BENCH_JSON")
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps({"title": title, "figures": [asdict(f) for f in figures]}) + "\n")
