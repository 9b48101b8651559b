"""Rows out of bytes as they arrive: NDJSON and CSV, any size, in constant memory. A broken row is told and the next one read.

A record of CSV is cut at the bytes of line feed, quote and delimiter. In UTF-8 and in GB18030 alike none of these can be
part of another character, so records can be cut before the encoding is known.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

# A record longer than this is refused and skipped.
LONGEST_RECORD = 64 * 1024
# So is a quoted CSV field that goes over more lines.
MOST_LINES = 200
MOST_COLUMNS = 100

Encoding = Literal["utf-8", "gb18030"]


class BadFile(ValueError):
    """The whole file cannot be read. Nothing personal is in the reason."""

    def __init__(self, field: str, slug: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.slug, self.reason = field, slug, reason


@dataclass(frozen=True, slots=True)
class Row:
    """One record.

    Args:
        number: 1 for the first record; blank lines and the header of a CSV file do not count.
        line: where it begins in the file, from 1.
        content: the JSON text, or the cells that are not empty by field name; None for a broken record.
        raw: its bytes, for its fingerprint.
        problem: slug and reason of a broken record.
    """

    number: int
    line: int
    content: bytes | Mapping[str, str] | None
    raw: bytes
    problem: tuple[str, str] | None = None


class RowReader(Protocol):
    """Takes the bytes of a file in pieces of any size."""

    @property
    def begun(self) -> bool:
        """Whether enough was read to know that the file as a whole can be."""
        ...

    def feed(self, chunk: bytes) -> Iterator[Row]:
        """The records that are complete with this piece. Raises BadFile."""
        ...

    def finish(self) -> Iterator[Row]:
        """What is left when the file ends. Raises BadFile."""
        ...


@dataclass(slots=True)
class _Lines:
    """Cuts bytes into lines without their ends. A line that is too long is None."""

    number: int = 0
    _rest: bytes = b""
    _skipping: bool = False

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest
        for line in lines:
            self.number += 1
            if self._skipping:
                self._skipping = False
                yield self.number, None
            else:
                yield self.number, self._bounded(line)
        if len(self._rest) > LONGEST_RECORD + 1:  # the line's end is still to come: forget it meanwhile
            self._rest, self._skipping = b"", True
        elif self._skipping:
            self._rest = b""

    def finish(self) -> Iterator[tuple[int, bytes | None]]:
        if self._rest or self._skipping:
            self.number += 1
            yield self.number, None if self._skipping else self._bounded(self._rest)
        self._rest, self._skipping = b"", False

    @staticmethod
    def _bounded(line: bytes) -> bytes | None:
        line = line.removesuffix(b"\r")
        return line if len(line) <= LONGEST_RECORD else None


_TOO_LONG = ("row-too-long", f"is longer than {LONGEST_RECORD} bytes")


class NdjsonRows:
    """One JSON object a line, UTF-8."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._count = 0

    @property
    def begun(self) -> bool:
        return self._lines.number > 0

    def feed(self, chunk: bytes) -> Iterator[Row]:
        return self._rows(self._lines.feed(chunk))

    def finish(self) -> Iterator[Row]:
        return self._rows(self._lines.finish())

    def _rows(self, lines: Iterator[tuple[int, bytes | None]]) -> Iterator[Row]:
        for number, line in lines:
            if number == 1 and line is not None:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise _utf16()
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line is None:
                self._count += 1
                yield Row(self._count, number, None, b"", _TOO_LONG)
            elif line.strip():
                self._count += 1
                yield Row(self._count, number, line, line)


class CsvRows:
    """A header and records, in UTF-8 (with or without BOM) or GB18030, divided by comma, semicolon or tab.

    The encoding is that of the first record with a character outside ASCII. Lines that a quoted field swallowed without an
    end are given back: the record that began it is refused, the lines behind it are read again on their own.

    Args:
        columns: field name by column title, compared without letter case and white space.
        prefixes: column titles that begin so are taken as they are, e.g. `facts.`.
        ignore_unknown: skip columns that nothing is known of, else the file is refused.
        encoding: when it is known; None finds out.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        prefixes: tuple[str, ...] = (),
        ignore_unknown: bool = False,
        encoding: Encoding | None = None,
    ) -> None:
        self._columns = {_folded(title): field for title, field in columns.items()}
        self._prefixes, self._ignore_unknown, self._encoding = prefixes, ignore_unknown, encoding
        self._lines = _Lines()
        self._pending: list[tuple[int, bytes]] = []  # lines of a record whose quoted field has not ended
        self._size = 0
        self._header: list[str | None] | None = None
        self._delimiter = ","
        self._count = 0

    @property
    def begun(self) -> bool:
        return self._header is not None

    def feed(self, chunk: bytes) -> Iterator[Row]:
        for number, line in self._lines.feed(chunk):
            yield from self._take(number, line)

    def finish(self) -> Iterator[Row]:
        for number, line in self._lines.finish():
            yield from self._take(number, line)
        while self._pending:
            yield from self._give_back()
        if self._header is None:
            raise BadFile("header", "no-header", "the file is empty: its first line must name the columns")

    def _take(self, number: int, line: bytes | None) -> Iterator[Row]:
        waiting = deque([(number, line)])
        while waiting:
            number, line = waiting.popleft()
            if line is None:
                while self._pending:
                    yield from self._give_back()
                yield self._broken(number, b"", _TOO_LONG)
                continue
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise _utf16()
                if line.startswith(b"\xef\xbb\xbf"):
                    line, self._encoding = line.removeprefix(b"\xef\xbb\xbf"), "utf-8"
            if not self._pending and not line.strip():
                continue
            if not self._pending and b'"' not in line:
                yield from self._record(number, line, None)
                continue
            self._pending.append((number, line))
            self._size += len(line) + 1
            first, whole = self._pending[0][0], b"\n".join(text for _, text in self._pending)
            if len(self._pending) > 1 and (b'"' not in line or whole.count(b'"') % 2):
                cells: list[str] | Literal["open", "broken"] = "open"  # nothing in this line can end the field
            else:
                cells = self._cells(whole)
            if cells == "open" and self._size <= LONGEST_RECORD and len(self._pending) <= MOST_LINES:
                continue
            if isinstance(cells, list):
                self._pending, self._size = [], 0
                yield from self._record(first, whole, cells)
            else:
                again = self._pending[1:]
                yield from self._give_back_first()
                waiting.extendleft(reversed(again))

    def _give_back_first(self) -> Iterator[Row]:
        number, line = self._pending[0]
        self._pending, self._size = [], 0
        yield self._broken(number, line, ("broken-quotes", "a quoted field does not end, or goes on after its quote"))

    def _give_back(self) -> Iterator[Row]:
        """The file ends inside a quoted field."""
        again = self._pending[1:]
        yield from self._give_back_first()
        for number, line in again:
            yield from self._take(number, line)

    def _record(self, number: int, raw: bytes, cells: list[str] | None) -> Iterator[Row]:
        if cells is None:
            text = self._text(raw)
            if text is None:
                yield self._broken(number, raw, _encoding_problem(self._encoding))
                return
            if self._header is None:
                self._delimiter = max(",;\t", key=text.count)
            cells = text.split(self._delimiter)
        if self._header is None:
            self._header = self._titles(cells)
            return
        while len(cells) > len(self._header) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(self._header):
            reason = f"has {len(cells)} cells where the header has {len(self._header)}"
            yield self._broken(number, raw, ("ragged-row", reason))
            return
        self._count += 1
        content = {field: cell for field, cell in zip(self._header, cells, strict=True) if field is not None and cell}
        yield Row(self._count, number, content, raw)

    def _titles(self, cells: list[str]) -> list[str | None]:
        if len(cells) > MOST_COLUMNS:
            raise BadFile("header", "too-many-columns", f"the header has more than {MOST_COLUMNS} columns")
        fields: list[str | None] = []
        for index, cell in enumerate(cells, 1):
            title = _folded(cell)
            field = self._columns.get(title)
            if field is None and title.startswith(self._prefixes):
                field = title
            if field is None and not self._ignore_unknown:
                known = ", ".join(sorted(set(self._columns.values())))
                raise BadFile(
                    "header",
                    "unknown-column",
                    f"column {index} is not known; columns are {known}, and facts.<code>; ignore_unknown=true skips others",
                )
            if field is not None and field in fields:
                raise BadFile("header", "column-twice", f"column {index} says {field} a second time")
            fields.append(field)
        return fields

    def _cells(self, raw: bytes) -> list[str] | Literal["open", "broken"]:
        """The cells of a record with quotes; `open` when a quoted field has not ended."""
        text = self._text(raw)
        if text is None:
            return "broken"
        if self._header is None:
            self._delimiter = max(",;\t", key=text.count)
        try:
            (cells,) = csv.reader([text], delimiter=self._delimiter, strict=True)
        except csv.Error as error:
            return "open" if "unexpected end of data" in str(error) else "broken"
        except ValueError:
            return "broken"
        return cells

    def _text(self, raw: bytes) -> str | None:
        try:
            if self._encoding is not None:
                return raw.decode(self._encoding)
            if raw.isascii():
                return raw.decode("ascii")
            try:
                text, found = raw.decode("utf-8"), "utf-8"
            except UnicodeDecodeError:
                text, found = raw.decode("gb18030"), "gb18030"
        except UnicodeDecodeError:
            return None
        self._encoding = "utf-8" if found == "utf-8" else "gb18030"
        return text

    def _broken(self, number: int, raw: bytes, problem: tuple[str, str]) -> Row:
        if self._header is None:
            raise BadFile("header", problem[0], f"the header {problem[1]}")
        self._count += 1
        return Row(self._count, number, None, raw, problem)


def _folded(title: str) -> str:
    return title.strip().casefold().replace(" ", "_")


def _utf16() -> BadFile:
    return BadFile("file", "utf-16", "the file is UTF-16: save it as UTF-8")


def _encoding_problem(encoding: Encoding | None) -> tuple[str, str]:
    return "not-decodable", f"is not {encoding or 'UTF-8 or GB18030'} text"
