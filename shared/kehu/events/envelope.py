"""The CloudEvents 1.0 envelope, structured mode: what the store keeps and what Kafka carries are the same bytes.

The store assigns `position` when it commits, so the relay splices that one attribute into the stored bytes and nothing
else is encoded twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any
from uuid import UUID

from pydantic_core import PydanticSerializationError, from_json, to_json

from kehu.events.base import Event, decode, event_class
from kehu.events.values import PlaintextLeak

CONTENT_TYPE = "application/cloudevents+json"
SOURCE_PREFIX = "/kehu/"
SCHEMA_PREFIX = "urn:kehu:schema:"


_REQUIRED = itemgetter(
    *("type", "subject", "streamversion", "partitionkey", "data"),
    *("id", "source", "correlationid", "causationid", "actor", "storeepoch", "time", "recordedtime"),
)
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch


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

    __slots__ = ("_attributes", "_event", "_id", "data", "partition_key", "position", "stream", "type", "version")

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        # A consumer makes one of these for every event of a topic, so what few ask for is looked up when it is asked for.
        self._attributes = attributes
        self._event: Event | None = None
        self._id: UUID | None = None
        self.type: str
        self.stream: str
        self.version: int
        self.partition_key: str
        self.data: dict[str, Any]
        try:
            self.type, self.stream, self.version, self.partition_key, self.data, *texts = _REQUIRED(attributes)
            self.position: int = attributes.get("position", 0)
            right = (
                type(self.type) is type(self.stream) is type(self.partition_key) is str
                and type(self.version) is int
                and self.version > 0
                and type(self.data) is dict
                and _UUID(texts[0]) is not None
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise MalformedEnvelope(f"not an envelope: {error!r}") from error
        if not right:
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

    @property
    def id(self) -> UUID:
        """Unique id of the event."""
        if self._id is None:
            self._id = UUID(self._attributes["id"])
        return self._id

    @property
    def producer(self) -> str:
        """The service that recorded it."""
        return str(self._attributes["source"]).removeprefix(SOURCE_PREFIX)

    @property
    def customer_id(self) -> str | None:
        """Whose event it is; None for policies and models."""
        customer: str | None = self._attributes.get("customerid")
        return customer

    @property
    def correlation_id(self) -> str:
        """The same along a whole chain of commands and events."""
        return str(self._attributes["correlationid"])

    @property
    def causation_id(self) -> str:
        """The request or event behind it."""
        return str(self._attributes["causationid"])

    @property
    def actor(self) -> str:
        """Who caused it."""
        return str(self._attributes["actor"])

    @property
    def traceparent(self) -> str | None:
        """W3C trace context."""
        trace: str | None = self._attributes.get("traceparent")
        return trace

    @property
    def store_epoch(self) -> str:
        """Which life of the producer's store recorded it."""
        return str(self._attributes["storeepoch"])

    @property
    def time(self) -> datetime:
        """Business time."""
        return datetime.fromisoformat(self._attributes["time"])

    @property
    def recorded(self) -> datetime:
        """When the store took it."""
        return datetime.fromisoformat(self._attributes["recordedtime"])

    @property
    def event(self) -> Event:
        """The event, upcast to the current version. Personal data is sealed until a keyring opens it.

        Raises:
            UnknownEvent: this release does not know the type.
            pydantic.ValidationError: the data does not fit the type.
        """
        if self._event is None:
            self._event = decode(self.type, self.data)
        return self._event

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
