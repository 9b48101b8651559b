"""The CloudEvents 1.0 envelope, structured mode: what the store keeps and what Kafka carries are the same bytes.

The store assigns `position` when it commits, so the relay splices that one attribute into the stored bytes and nothing
else is encoded twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from pydantic_core import PydanticSerializationError, from_json, to_json

from kehu.events.base import Event, decode, event_class
from kehu.events.values import PlaintextLeak

CONTENT_TYPE = "application/cloudevents+json"
SOURCE_PREFIX = "/kehu/"
SCHEMA_PREFIX = "urn:kehu:schema:"


class MalformedEnvelope(ValueError):
    """Bytes that are not one of our envelopes."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who caused an event: `user:<id>`, `service:<name>` or `customer:<id>`; never a name or an address."""

    id: str

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, slots=True)
class Envelope:
    """What surrounds an event when it is appended.

    Args:
        id: unique id of the event, a UUID.
        stream: CloudEvents `subject`, e.g. `lead-<uuid>`.
        version: number of the event in its stream, from 1, without holes.
        time: when it happened (business time).
        recorded: when it was appended.
        partition_key: Kafka key, fixed for the life of the stream.
        customer_id: whose event it is, None for policies and models.
    """

    id: UUID
    producer: str
    stream: str
    version: int
    time: datetime
    recorded: datetime
    partition_key: str
    customer_id: str | None
    correlation_id: str
    causation_id: str
    actor: str
    traceparent: str | None
    store_epoch: str

    def encode(self, event: Event) -> bytes:
        """The envelope as JSON bytes. The event's personal data must be sealed (else PlaintextLeak)."""
        attributes: dict[str, Any] = {
            "specversion": "1.0",
            "id": str(self.id),
            "source": SOURCE_PREFIX + self.producer,
            "type": event.TYPE,
            "subject": self.stream,
            "time": _text(self.time),
            "recordedtime": _text(self.recorded),
            "datacontenttype": "application/json",
            "dataschema": SCHEMA_PREFIX + event.TYPE,
            "partitionkey": self.partition_key,
            "streamversion": self.version,
            "correlationid": self.correlation_id,
            "causationid": self.causation_id,
            "actor": self.actor,
            "storeepoch": self.store_epoch,
        }
        if self.customer_id is not None:
            attributes["customerid"] = self.customer_id
        if self.traceparent is not None:
            attributes["traceparent"] = self.traceparent
        try:
            data = event.__pydantic_serializer__.to_json(event, exclude_none=True)
        except PydanticSerializationError as error:
            raise PlaintextLeak(str(error)) from None
        return to_json(attributes)[:-1] + b',"data":' + data + b"}"


def _text(at: datetime) -> str:
    """RFC 3339 in UTC, so that the text sorts as the time does."""
    if at.tzinfo is not UTC:
        at = at.astimezone(UTC)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def with_position(state: bytes, position: int) -> bytes:
    """The stored envelope with the position that the store gave it."""
    return state[:-1] + b',"position":%d}' % position


class Recorded:
    """An event as it was read back: from the store, from Kafka or from a file. The event itself is decoded when asked for."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self._attributes = attributes
        try:
            self.id: UUID = UUID(attributes["id"])
            self.type: str = attributes["type"]
            self.stream: str = attributes["subject"]
            self.version: int = attributes["streamversion"]
            self.producer: str = attributes["source"].removeprefix(SOURCE_PREFIX)
            self.partition_key: str = attributes["partitionkey"]
            self.customer_id: str | None = attributes.get("customerid")
            self.correlation_id: str = attributes["correlationid"]
            self.causation_id: str = attributes["causationid"]
            self.actor: str = attributes["actor"]
            self.traceparent: str | None = attributes.get("traceparent")
            self.store_epoch: str = attributes["storeepoch"]
            self.position: int = attributes.get("position", 0)
            self.data: dict[str, Any] = attributes["data"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedEnvelope(f"not an envelope: {error!r}") from error
        if not isinstance(self.data, dict) or not isinstance(self.stream, str) or not isinstance(self.version, int):
            raise MalformedEnvelope("not an envelope: wrong types")

    @classmethod
    def from_bytes(cls, value: bytes | memoryview | None, position: int | None = None) -> Recorded:
        """Parse an envelope.

        Raises:
            MalformedEnvelope: not JSON, or not an envelope of ours.
        """
        if value is None:
            raise MalformedEnvelope("no value")
        try:
            attributes = from_json(bytes(value))
        except ValueError as error:
            raise MalformedEnvelope(f"not JSON: {error}") from error
        if not isinstance(attributes, dict):
            raise MalformedEnvelope("not a JSON object")
        if position is not None:
            attributes["position"] = position
        return cls(attributes)

    @cached_property
    def time(self) -> datetime:
        """Business time."""
        return datetime.fromisoformat(self._attributes["time"])

    @cached_property
    def recorded(self) -> datetime:
        """When the store took it."""
        return datetime.fromisoformat(self._attributes["recordedtime"])

    @cached_property
    def event(self) -> Event:
        """The event, upcast to the current version. Personal data is sealed until a keyring opens it.

        Raises:
            UnknownEvent: this release does not know the type.
            pydantic.ValidationError: the data does not fit the type.
        """
        return decode(self.type, self.data)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The whole envelope as parsed JSON."""
        return self._attributes

    def is_a(self, *classes: type[Event]) -> bool:
        """Whether the event is one of these, of any version, without decoding its data."""
        name = self.type.rpartition(".v")[0]
        return any(name == cls.NAME for cls in classes)

    def __repr__(self) -> str:
        return f"Recorded({self.type} {self.stream}@{self.version} #{self.position})"


def stream_of(event: type[Event] | Event, key: object) -> str:
    """The stream name of an event class and a key, e.g. `lead-<uuid>`."""
    return f"{event.STREAM}-{key}"


__all__ = [
    "CONTENT_TYPE",
    "Actor",
    "Envelope",
    "MalformedEnvelope",
    "Recorded",
    "event_class",
    "stream_of",
    "with_position",
]
