"""Envelopes and Kafka records for the tests of the lake."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pyarrow as pa

from kehu.lake import Record

TOPIC = "crm.lead-intake.events"
BEGIN = datetime(2026, 1, 15, tzinfo=UTC)


def envelope(
    number: int,
    wire: str = "lead.captured.v1",
    customer: str | None = "kunde-1",
    at: timedelta = timedelta(),
    *,
    recorded: timedelta | None = None,
    data: dict[str, Any] | None = None,
    **more: Any,
) -> bytes:
    """A structured CloudEvent as the store writes it; `number` makes its id, version and position.

    Args:
        at: business time after BEGIN.
        recorded: recorded time after BEGIN; a second after the business time when not given.
        more: attributes to set or, with None, to leave out.
    """
    time = BEGIN + at
    known = BEGIN + (at + timedelta(seconds=1) if recorded is None else recorded)
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": str(UUID(int=number)),
        "source": "/kehu/lead-intake",
        "type": wire,
        "subject": f"lead-{customer}",
        "time": time.isoformat().replace("+00:00", "Z"),
        "recordedtime": known.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "dataschema": f"urn:kehu:schema:{wire}",
        "partitionkey": customer or "policy",
        "customerid": customer,
        "streamversion": number + 1,
        "correlationid": "c-1",
        "causationid": "c-0",
        "actor": "user:7",
        "storeepoch": "e-1",
        "position": number + 1,
        "data": {"channel": "form"} if data is None else data,
    }
    attributes.update(more)
    return json.dumps({k: v for k, v in attributes.items() if v is not None}, ensure_ascii=False).encode()


def records(values: Iterable[bytes], first: int = 0, topic: str = TOPIC, partition: int = 0) -> list[Record]:
    """The values as records of one topic-partition, from an offset on."""
    return [Record(topic, partition, offset, value) for offset, value in enumerate(values, first)]


def history(table: pa.Table) -> list[tuple[Any, ...]]:
    """What happened, apart from where it is kept: all columns but `unit`, sorted."""
    names = [name for name in table.column_names if name != "unit"]
    return sorted(
        (tuple(row[name] for name in names) for row in table.to_pylist()),
        key=lambda row: (row[names.index("topic")], row[names.index("partition")], row[names.index("offset")]),
    )
