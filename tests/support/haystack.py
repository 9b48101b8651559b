"""Searching everything that a suite keeps for something that must not be there, in whatever way it could be written."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from urllib.parse import quote

import psycopg
from psycopg import sql

from kehu.devstack import database_url
from support.suite import Suite


def spellings(text: str) -> set[bytes]:
    """How a text can lie in bytes: in the encodings of people and of programs."""
    raw = text.encode()
    found = {raw, text.encode("gb18030"), text.encode("utf-16-le"), text.encode("utf-16-be"), raw.hex().encode()}
    found |= {json.dumps(text)[1:-1].encode(), quote(text).encode(), quote(text).lower().encode()}
    for shift, first in (
        (0, 0),
        (1, 2),
        (2, 3),
    ):  # base64 of more with the text in it: the characters that it alone decides
        inner = base64.b64encode(b"\0" * shift + raw)[first : 8 * (shift + len(raw)) // 6]
        found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return found


class Search:
    """Looks for any spelling of some texts in everything that a suite keeps. What was searched before is not searched again.

    Args:
        texts: that must not be there.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._spellings = sorted({spelling for text in texts for spelling in spellings(text)})
        self._clean: set[bytes] = set()

    def found_in(self, content: bytes) -> bytes | None:
        """A spelling that lies in these bytes."""
        digest = blake2b(content).digest()
        if digest in self._clean:
            return None
        content = content.replace(bytes(512), b"")  # files are made large beforehand: most of them is nothing yet
        found = next((spelling for spelling in self._spellings if spelling in content), None)
        if found is None:
            self._clean.add(digest)
        return found

    def everywhere(self, suite: Suite) -> int:
        """Check that none of the texts is anywhere, and give how many places there were."""
        count = 0
        for place, content in places(suite):
            found = self.found_in(content)
            assert found is None, f"{found!r} lies in {place}"
            count += 1
        return count


def places(suite: Suite) -> Iterator[tuple[str, bytes]]:
    """Everything that the suite keeps, with where it is: tables, records, lake, and every file on disk byte for byte."""
    yield from _tables(suite.stack.address.postgres_url)
    for service in ("lead-intake", "scoring"):
        for record in suite.records(service):
            headers = b"\n".join(name.encode() + b"=" + (value or b"") for name, value in record.headers)
            place = f"{record.topic}/{record.partition}@{record.offset}"
            yield place, b"\n".join((record.key or b"", record.value or b"", headers))
    rows = suite.lake().sql("SELECT * FROM events").to_pylist()
    yield from ((f"lake row {number}", repr(row).encode()) for number, row in enumerate(rows))
    yield from _files(suite)


def _tables(postgres_url: str) -> Iterator[tuple[str, bytes]]:
    """Every column of every table of every database, text as text and bytea as its bytes."""
    with psycopg.connect(postgres_url) as server:
        names = [name for (name,) in server.execute("SELECT datname FROM pg_database WHERE NOT datistemplate")]
    for name in names:
        with psycopg.connect(database_url(postgres_url, name)) as connection:
            tables = connection.execute(
                "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
            ).fetchall()
            for schema, table in tables:
                rows = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(schema, table)))
                for number, row in enumerate(rows):
                    cells = (cell if isinstance(cell, bytes) else _text(cell).encode() for cell in row)
                    yield f"{name}.{table} row {number}", b"\n".join(cells)


def _text(cell: object) -> str:
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else str(cell)


def _files(suite: Suite) -> Iterator[tuple[str, bytes]]:
    """Data and write-ahead log of PostgreSQL, segments of Kafka, lake, logs, state of consumers, temporary files."""
    assert suite.stack.data_dir is not None
    with psycopg.connect(suite.stack.address.postgres_url, autocommit=True) as server:
        server.execute("CHECKPOINT")  # what is in its memory only goes to its files
    roots = [suite.home, suite.stack.data_dir, (suite.stack.data_dir / "postgres" / "elsewhere").resolve()]
    for path in (path for root in roots if root.is_dir() for path in root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            try:
                yield str(path), path.read_bytes()
            except FileNotFoundError:
                continue  # a file that was replaced meanwhile: its successor is read
