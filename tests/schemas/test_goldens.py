"""Published event versions never change in a way that breaks a reader, and are never forgotten."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kehu.cli.goldens import golden
from kehu.events import Event, registered
from kehu.events.base import decode
from kehu.events.compatibility import breaks

FOLDER = Path(__file__).parent / "golden"
GOLDENS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@pytest.mark.req("DC-02")
@pytest.mark.parametrize("wire", registered())
def test_every_event_has_a_golden_file_that_is_up_to_date(wire: str) -> None:
    assert wire in GOLDENS, "run `make schemas`"
    now = golden(registered()[wire])
    assert breaks(GOLDENS[wire]["schema"], now["schema"]) == []
    assert GOLDENS[wire] == now, "a compatible change: run `make schemas` and add a line to CHANGELOG's Events"


@pytest.mark.req("DC-02")
@pytest.mark.parametrize("wire", GOLDENS)
def test_every_version_ever_published_can_be_read(wire: str) -> None:
    event = decode(wire, GOLDENS[wire]["example"])
    assert wire.rpartition(".v")[0] == event.NAME
    if wire == event.TYPE:
        assert event.model_dump(mode="json", exclude_none=True) == GOLDENS[wire]["example"]


@pytest.mark.parametrize("wire", registered())
def test_fields_of_a_newer_release_are_ignored_when_read(wire: str) -> None:
    data = {**GOLDENS[wire]["example"], "a_field_of_tomorrow": 1}
    assert decode(wire, data) == decode(wire, GOLDENS[wire]["example"])


def _without(schema: dict[str, Any], name: str) -> None:
    del schema["properties"][name]


def _require(schema: dict[str, Any], name: str) -> None:
    schema["required"] = [*schema["required"], name]


def _retype(schema: dict[str, Any], name: str) -> None:
    schema["properties"][name] = {"type": "integer"}


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [(_without, "source", "gone"), (_require, "company", "required now"), (_retype, "source", "is gone")],
)
def test_the_checker_sees_a_break(change: Any, name: str, reason: str) -> None:
    old = GOLDENS["lead.captured.v1"]["schema"]
    new = copy.deepcopy(old)
    change(new, name)
    assert any(name in b and reason in b for b in breaks(old, new))


def test_the_checker_allows_an_optional_field_and_prose() -> None:
    old = GOLDENS["lead.captured.v1"]["schema"]
    new = copy.deepcopy(old)
    new["properties"]["hobby"] = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    new["description"] = "other words"
    assert breaks(old, new) == []


def test_events_are_declared_in_the_manner_of_the_suite() -> None:
    for wire, cls in registered().items():
        assert issubclass(cls, Event)
        verb = wire.split(".")[1]
        past = (verb.endswith("ed"), verb.split("_")[0].endswith("ed"), verb.split("_")[-1].endswith("ed"))
        assert any(past) or verb in PAST_TENSE, f"{wire}: events are named in the past tense"
        assert cls.__doc__, f"{wire}: say what happened"
        for field, info in cls.model_fields.items():
            optional = not info.is_required()
            nullable = type(None) in getattr(info.annotation, "__args__", ())
            assert optional or not nullable, (
                f"{wire}.{field}: None is left out when written, so it needs the default None"
            )


# Irregular verbs.
PAST_TENSE = {"won", "lost", "sent", "held_back"}
