"""The event base class, the registry of wire names, and upcasting of old versions."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from kehu.events.values import Personal

# The services that write events. The module of each is kehu.events.<snake>; its topic is crm.<kebab>.events.
PRODUCERS = ("lead-intake", "scoring")

_NAME = re.compile(r"^[a-z_]+\.[a-z_]+$")
_classes: dict[str, type[Event]] = {}
_upcasters: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
# Types whose data is read without any step in between.
_readers: dict[str, Callable[..., Any]] = {}


class UnknownEvent(LookupError):
    """A wire name that no class and no upcaster of this release knows."""


class Event(BaseModel):
    """A fact in the past tense. Frozen; strict when it is written, tolerant of unknown fields when it is read.

    Declare with the wire name and, when it is not the name's first part, the stream category::

        class LeadCaptured(Event, name="lead.captured"): ...
        class BehaviourRecorded(Event, name="behaviour.recorded", stream="activity"): ...
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_timedelta="iso8601")

    NAME: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    STREAM: ClassVar[str] = ""
    PRODUCER: ClassVar[str] = ""
    TYPE: ClassVar[str] = ""
    PERSONAL: ClassVar[Mapping[str, TypeAdapter[Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()  # the keywords are for the hook below, which runs when the fields are known

    @classmethod
    def __pydantic_init_subclass__(cls, *, name: str = "", version: int = 1, stream: str = "", **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not name:
            raise TypeError(f"{cls.__name__}: an event needs its wire name, e.g. name='lead.captured'")
        if not _NAME.match(name) or version < 1:
            raise TypeError(f"{cls.__name__}: {name!r} v{version} is not a wire name (aggregate.past_tense)")
        cls.NAME, cls.VERSION = name, version
        cls.STREAM = stream or name.split(".", 1)[0]
        cls.PRODUCER = cls.__module__.rsplit(".", 1)[-1].replace("_", "-")
        cls.TYPE = f"{name}.v{version}"
        cls.PERSONAL = dict(_personal_fields(cls))
        if cls.TYPE in _classes:
            raise TypeError(f"{cls.TYPE} is declared twice")
        _classes[cls.TYPE] = cls

    @property
    def happened(self) -> datetime | None:
        """Business time, where the rule that made the event works it out; None where it is that of the command."""
        return None

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The published schema is open: a reader must take fields that a newer release added."""
        published = handler(schema)
        handler.resolve_ref_schema(published).pop("additionalProperties", None)
        return published

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """Read an event from parsed JSON: ISO strings become times and ids, unknown fields are ignored."""
        return cls.model_validate(data, strict=False, extra="ignore")


def _personal_fields(cls: type[Event]) -> list[tuple[str, TypeAdapter[Any]]]:
    """The top-level fields that are Personal[T] (or Personal[T] | None), each with the adapter of T."""
    found: list[tuple[str, TypeAdapter[Any]]] = []
    for field, info in cls.model_fields.items():
        for candidate in (info.annotation, *get_args(info.annotation)):
            inner = Personal.inner_type(candidate)
            if inner is not None:
                found.append((field, TypeAdapter(inner)))
    return found


F = TypeVar("F", bound=Callable[[dict[str, Any]], dict[str, Any]])


def upcaster(old: str, new: str) -> Callable[[F], F]:
    """Register the function that turns the data of wire type `old` into that of `new`, e.g. `lead.captured.v1` → `.v2`."""

    def register(function: F) -> F:
        if old in _upcasters:
            raise TypeError(f"{old} already has an upcaster")
        _upcasters[old] = (new, function)
        _readers.pop(old, None)
        return function

    return register


def load_producers() -> None:
    """Import every producer's module, so that all events are registered."""
    for producer in PRODUCERS:
        importlib.import_module(f"kehu.events.{producer.replace('-', '_')}")


def registered() -> dict[str, type[Event]]:
    """All event classes by wire type, in order of the type."""
    load_producers()
    return dict(sorted(_classes.items()))


def event_types(producer: str | None = None) -> list[str]:
    """The wire types, of one producer when given."""
    return [wire for wire, cls in registered().items() if producer in (None, cls.PRODUCER)]


def event_class(wire: str) -> type[Event]:
    """The class of a current wire type.

    Raises:
        UnknownEvent: this release does not know the type.
    """
    cls = _classes.get(wire)
    if cls is None:
        load_producers()
        cls = _classes.get(wire)
    if cls is None:
        raise UnknownEvent(wire)
    return cls


def decode(wire: str, data: dict[str, Any]) -> Event:
    """Read the data of an event of any version that this release knows, upcasting old ones step by step.

    Unknown fields are ignored: an older release must be able to read what a newer one wrote.

    Raises:
        UnknownEvent: no class and no upcaster knows the type.
        pydantic.ValidationError: the data does not fit the type.
    """
    read = _readers.get(wire)
    if read is not None:
        event: Event = read(data, strict=False, extra="ignore")
        return event
    if wire not in _classes:
        load_producers()
    given = wire
    for _ in range(100):
        if wire not in _upcasters:
            break
        wire, function = _upcasters[wire]
        data = function(data)
    cls = event_class(wire)
    event = cls.from_data(data)
    if wire == given:  # current, and complete now that one was read: the next ones take the short way
        _readers[wire] = cls.__pydantic_validator__.validate_python
    return event
