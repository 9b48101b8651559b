"""Bulk import over HTTP, NDJSON and CSV: ours, to the last outcome line, beside COPY of the same rows into one table."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import time
from collections.abc import Iterator

import httpx
import orjson
import psycopg

from bench.http_capture import lead_intake, token
from bench.kit import Contender, compare, console
from kehu.devstack import DevStack, create_database

_people = itertools.count(int(time.time()) % 100_000 * 1_000_000)
FIELDS = ("channel", "name", "phone", "email", "company", "industry", "title")


def people(rows: int) -> Iterator[dict[str, str]]:
    """So many people whom nobody has seen yet."""
    for n in itertools.islice(_people, rows):
        digits = n % 1_000_000_000
        yield {
            "channel": "bench",
            "name": "王小明",
            "phone": f"1{3 + n % 7}{digits:09d}",
            "email": f"wang{n}@example.com",
            "company": "深圳市星辰科技有限公司",
            "industry": "制造业",
            "title": "采购经理",
        }


def ndjson(rows: int) -> bytes:
    """A file of people, one JSON object a line."""
    return b"".join(orjson.dumps(person) + b"\n" for person in people(rows))


def csv_file(rows: int) -> bytes:
    """A file of people with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(people(rows))
    return text.getvalue().encode()


def send(url: str, content: bytes, media_type: str, rows: int) -> float:
    """Import a file and give rows per second, from the first byte sent to the last line read."""
    headers = {"Authorization": f"Bearer {token()}", "Content-Type": media_type}

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(content), 1 << 16):
            yield content[start : start + (1 << 16)]

    started = time.perf_counter()
    answer = httpx.post(f"{url}/imports", content=pieces(), headers=headers, timeout=600)
    elapsed = time.perf_counter() - started
    answer.raise_for_status()
    summary = json.loads(answer.text[answer.text.rindex('{"summary"') :])["summary"]
    if summary["captured"] != rows:
        raise RuntimeError(f"not every row was captured: {summary}")
    return rows / elapsed


def copy(connection: psycopg.Connection, content: bytes, batch: int) -> float:
    """COPY the lines, `batch` in a transaction."""
    lines = content.splitlines()
    started = time.perf_counter()
    for start in range(0, len(lines), batch):
        with connection.cursor() as cursor, cursor.copy("COPY leads (body) FROM STDIN") as copying:
            for line in lines[start : start + batch]:
                copying.write_row((line,))
    return len(lines) / (time.perf_counter() - started)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of one round")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    rows: int = options.rows
    with DevStack(kafka=False) as stack:
        url = stack.address.postgres_url
        with (
            psycopg.connect(create_database(url, "bench_import_copy"), autocommit=True) as connection,
            lead_intake(url, "bench_import_ours") as api,
        ):
            connection.execute(
                "CREATE TABLE IF NOT EXISTS leads (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text)"
            )
            compare(
                f"Import of {rows:,} leads",
                "leads/s",
                [
                    Contender("COPY, 500 a transaction", "limit", lambda: copy(connection, ndjson(rows), 500)),
                    Contender("NDJSON", "ours", lambda: send(api, ndjson(rows), "application/x-ndjson", rows)),
                    Contender("CSV", "ours", lambda: send(api, csv_file(rows), "text/csv", rows)),
                ],
                options.repeat,
            )
    console.print("Ours writes two events and five look-up rows a lead, validated, cleaned, compared and encrypted.")


if __name__ == "__main__":
    main()
