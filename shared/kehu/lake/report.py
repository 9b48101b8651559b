"""Builds a report: one HTML file that needs no network, can be mailed and printed, and reads the same everywhere.

Figures are SVG within the page: text stays text, so Chinese needs no font here and can be searched and read aloud.
Everything that is put in is escaped, and the page forbids scripts and network access for itself.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import Any, Self

import altair as alt
import pyarrow as pa
import vl_convert

MAX_TABLE_ROWS = 2_000  # of one table; more belongs into a file of its own
MAX_SECTIONS = 500

Chart = alt.Chart | alt.LayerChart | alt.HConcatChart | alt.VConcatChart | alt.ConcatChart | alt.FacetChart

_ID = re.compile(r'(\bid="|url\(#|xlink:href="#|\bhref="#)([^")]+)')

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--paper:#fff;--shade:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b1;--line:#3d444d;--paper:#0d1117;--shade:#161b22}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:52rem;padding:2rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.6 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
h1{font-size:1.7rem;line-height:1.3;margin:0 0 1rem}h2{font-size:1.3rem;margin:2.5rem 0 .5rem}h3{font-size:1.1rem;margin:2rem 0 .5rem}
p{margin:.5rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{caption-side:top;text-align:left;color:var(--soft);padding:0 0 .4rem}
th,td{border-bottom:1px solid var(--line);padding:.35rem .6rem;text-align:left;vertical-align:top;overflow-wrap:anywhere}
thead th{background:var(--shade)}td.n,th.n{text-align:right}
figure{margin:1rem 0;padding:1rem;background:#fff;color:#1b1f24;border:1px solid var(--line);border-radius:6px;overflow-x:auto}
figure svg{max-width:100%;height:auto;display:block}figcaption{color:#57606a;font-size:.9rem;margin-top:.5rem}
@media print{body{max-width:none;padding:0;color:#000;background:#fff}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}
thead{display:table-header-group}.scroll{overflow:visible}}
"""


class Report:
    """A report that is built from top to bottom; every method gives the report, so that calls can be chained.

    Args:
        title: of the page, shown as its first heading.
        language: of the text, as in HTML (`en`, `zh-CN`).
    """

    def __init__(self, title: str, *, language: str = "en") -> None:
        self.title = title
        self.language = language
        self._parts: list[str] = []
        self._figures = 0

    def heading(self, text: str, level: int = 2) -> Self:
        """A heading.

        Raises:
            ValueError: the level is not 2 or 3.
        """
        if level not in (2, 3):
            raise ValueError(f"a heading of level {level}; the title is 1, sections are 2 and 3")
        return self._add(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str) -> Self:
        """A paragraph of plain text."""
        return self._add(f"<p>{escape(text)}</p>")

    def table(
        self,
        rows: Iterable[Mapping[str, Any]] | pa.Table,
        columns: Mapping[str, str] | Sequence[str] | None = None,
        *,
        caption: str | None = None,
    ) -> Self:
        """A table.

        Args:
            rows: by name, at most 2 000.
            columns: which, in order, and their headings; None for those of the first row.
            caption: what the table shows.

        Raises:
            ValueError: too many rows.
        """
        content = rows.to_pylist() if isinstance(rows, pa.Table) else list(rows)
        if len(content) > MAX_TABLE_ROWS:
            raise ValueError(f"{len(content)} rows in a table, the limit is {MAX_TABLE_ROWS}")
        if columns is None:
            columns = rows.column_names if isinstance(rows, pa.Table) else list(content[0]) if content else []
        heads = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
        numeric = {name for name in heads if any(_is_number(row.get(name)) for row in content)}
        parts = ['<div class="scroll"><table>']
        if caption is not None:
            parts.append(f"<caption>{escape(caption)}</caption>")
        parts.append("<thead><tr>")
        parts += [f'<th scope="col"{_class(name, numeric)}>{escape(str(head))}</th>' for name, head in heads.items()]
        parts.append("</tr></thead><tbody>")
        for row in content:
            cells = "".join(f"<td{_class(name, numeric)}>{escape(_text(row.get(name)))}</td>" for name in heads)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</tbody></table></div>")
        return self._add("".join(parts))

    def figure(self, chart: Chart, alt: str, *, caption: str | None = None) -> Self:
        """A chart.

        Args:
            chart: with its data in it; nothing is fetched.
            alt: what the chart says, for who cannot see it.
            caption: shown below; None for the text of `alt`.

        Raises:
            ValueError: no alternative text, or the chart cannot be drawn.
        """
        if not alt.strip():
            raise ValueError("a figure needs an alternative text")
        self._figures += 1
        name = f"figure-{self._figures}"
        svg = vl_convert.vegalite_to_svg(chart.to_dict(), allowed_base_urls=[])
        # Ids are of the whole page: keep those of the figures apart.
        svg = _ID.sub(lambda match: f"{match[1]}{name}-{match[2]}", svg)
        head = f'<svg role="img" aria-labelledby="{name}-alt" '
        svg = svg.replace("<svg ", head, 1).replace(">", f'><title id="{name}-alt">{escape(alt)}</title>', 1)
        return self._add(f"<figure>{svg}<figcaption>{escape(caption or alt)}</figcaption></figure>")

    def html(self) -> str:
        """The page."""
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="{escape(self.language)}">\n<head>\n<meta charset="utf-8">\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>{escape(self.title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: Path | str) -> Path:
        """Write the page; who reads the path sees the old page or the new one, never a part."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.html())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    def _add(self, part: str) -> Self:
        if len(self._parts) >= MAX_SECTIONS:
            raise ValueError(f"a report of more than {MAX_SECTIONS} parts")
        self._parts.append(part)
        return self


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _class(name: str, numeric: set[str]) -> str:
    return ' class="n"' if name in numeric else ""


def _text(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    return str(value)
