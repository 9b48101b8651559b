"""Events, values and envelopes: strict when written, tolerant when read, and never personal data in the clear."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kehu.events import (
    Envelope,
    Event,
    MalformedEnvelope,
    Money,
    Personal,
    PlaintextLeak,
    Recorded,
    UnknownEvent,
    event_class,
)
from kehu.events.base import decode
from kehu.events.envelope import with_position
from kehu.events.lead_intake import ChannelDefined, Contact, LeadCaptured, LeadRejected
from kehu.ids import derived, uuid7
from kehu.privacy import TamperedToken, keyed_hash, needs_key, new_key, opened, seal

NOW = datetime(2026, 3, 1, 8, 0, 0, 123456, tzinfo=UTC)


def envelope(**changes: Any) -> Envelope:
    values: dict[str, Any] = {
        "id": uuid4(), "producer": "lead-intake", "stream": "lead-1", "version": 1, "time": NOW, "recorded": NOW,
        "partition_key": "c-1", "customer_id": "c-1", "correlation_id": "co", "causation_id": "ca", "actor": "user:1",
        "traceparent": None, "store_epoch": "e",
    }  # fmt: skip
    return Envelope(**{**values, **changes})


def captured(**changes: Any) -> LeadCaptured:
    values: dict[str, Any] = {
        "lead_id": uuid4(), "customer_id": uuid4(), "source": "api", "channel": "web", "rating": "hot",
        "contact": Personal(Contact(name="王小明", phone="+8613800138000")),
    }  # fmt: skip
    return LeadCaptured(**{**values, **changes})


def test_written_strictly() -> None:
    with pytest.raises(ValidationError):
        ChannelDefined(channel="web", title="Web", kind="web", active="yes")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        ChannelDefined(channel="web", title="Web", kind="web", surprise=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        ChannelDefined(channel="Not A Code", title="Web", kind="web")


def test_read_tolerantly_but_not_blindly() -> None:
    data = {"channel": "web", "title": "Web", "kind": "web", "tomorrow": 1}
    assert decode("channel.defined.v1", data) == ChannelDefined(channel="web", title="Web", kind="web")
    with pytest.raises(ValidationError):
        decode("channel.defined.v1", {"channel": "web"})
    with pytest.raises(UnknownEvent):
        decode("channel.painted.v1", data)
    with pytest.raises(UnknownEvent):
        event_class("channel.defined.v99")


@pytest.mark.req("DC-02")
def test_old_versions_are_upcast(monkeypatch: pytest.MonkeyPatch) -> None:
    import kehu.events.base as base

    chain = {
        "channel.made.v1": ("channel.made.v2", lambda d: {**d, "title": d.pop("label")}),
        "channel.made.v2": ("channel.defined.v1", lambda d: {**d, "kind": "other"}),
    }
    monkeypatch.setattr(base, "_upcasters", chain)
    event = decode("channel.made.v1", {"channel": "web", "label": "Web"})
    assert event == ChannelDefined(channel="web", title="Web", kind="other")


def test_an_event_needs_a_name_and_only_one_class() -> None:
    with pytest.raises(TypeError, match="wire name"):

        class Nameless(Event):
            pass

    with pytest.raises(TypeError, match="declared twice"):

        class Again(Event, name="lead.captured"):
            pass


@pytest.mark.req("DC-01")
def test_envelope_round_trip() -> None:
    event = LeadRejected(lead_id=uuid4(), customer_id=uuid4(), reason="spam")
    sent = envelope(traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    read = Recorded.from_bytes(with_position(sent.encode(event), 42))
    assert read.event == event
    assert (read.id, read.stream, read.version, read.position) == (sent.id, "lead-1", 1, 42)
    assert (read.time, read.recorded) == (NOW, NOW)
    assert read.attributes["specversion"] == "1.0"
    assert read.attributes["type"] == "lead.rejected.v1"
    assert read.attributes["source"] == "/kehu/lead-intake"
    assert read.is_a(LeadRejected)
    assert not read.is_a(LeadCaptured)


@pytest.mark.parametrize(
    "value",
    [None, b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"id": 1}', b"\xff\xfe", b'{"id":"not-a-uuid","type":"x"}'],
)
def test_what_is_not_an_envelope_is_named_so(value: bytes | None) -> None:
    with pytest.raises(MalformedEnvelope):
        Recorded.from_bytes(value)


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: repr(v).encode())
)
def test_no_bytes_break_the_parser(value: bytes) -> None:
    with pytest.raises(MalformedEnvelope):
        Recorded.from_bytes(value)


@pytest.mark.req("LI-11")
def test_personal_data_cannot_be_written_in_the_clear() -> None:
    event = captured()
    with pytest.raises(PlaintextLeak):
        envelope().encode(event)
    assert "王小明" not in repr(event)
    assert "王小明" not in str(event)


@pytest.mark.req("LI-11")
def test_sealed_and_opened_only_with_its_key_in_its_place() -> None:
    key, event, around = new_key(), captured(), envelope()
    sealed = seal(event, around.id, "c-1", key)
    assert needs_key(event)
    assert not needs_key(sealed)
    read = Recorded.from_bytes(around.encode(sealed))
    assert opened(read, key) == event
    with pytest.raises(TamperedToken):
        opened(read, new_key())
    moved = Recorded.from_bytes(envelope(customer_id="c-2").encode(sealed))
    with pytest.raises(TamperedToken):
        opened(moved, key)
    assert isinstance(gone := opened(read, None), LeadCaptured)
    assert gone.contact.plain_or(Contact()) == Contact()


def test_the_same_personal_data_never_gives_the_same_token() -> None:
    key, event, around = new_key(), captured(), envelope()
    one, two = (seal(event, around.id, "c-1", key) for _ in range(2))
    assert isinstance(one, LeadCaptured) and isinstance(two, LeadCaptured)
    assert one.contact.token != two.contact.token


def test_keyed_hash_depends_on_key_and_kind() -> None:
    key = new_key()
    assert keyed_hash(key, "phone", "1") == keyed_hash(key, "phone", "1")
    assert len({keyed_hash(key, "phone", "1"), keyed_hash(key, "email", "1"), keyed_hash(new_key(), "phone", "1")}) == 3


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**12), max_value=10**12))
def test_money_is_exact_and_text_in_json(amount: Decimal) -> None:
    money = Money(amount=amount, currency="CNY")
    assert Money.model_validate_json(money.model_dump_json()) == money
    assert isinstance(money.model_dump(mode="json")["amount"], str)


def test_money_refuses_floats_and_odd_currencies() -> None:
    with pytest.raises(ValidationError):
        Money(amount=0.1, currency="CNY")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Money(amount=Decimal(1), currency="yuan")


@given(st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2100, 1, 1)))
def test_uuid7_is_ordered_by_time(at: datetime) -> None:
    at = at.replace(tzinfo=UTC)
    one, later = uuid7(at), uuid7(at + timedelta(milliseconds=2))
    assert one.version == 7 and one.variant == "specified in RFC 4122"
    assert one < later
    assert one.int >> 80 == int(at.timestamp() * 1000)


def test_derived_ids_are_stable() -> None:
    event = UUID("01890000-0000-7000-8000-000000000001")
    assert derived(event, "handler", 0) == derived(str(event), "handler", "0")
    assert derived(event, "handler", 0) != derived(event, "handler", 1)
    assert derived("ab", "c") != derived("a", "bc")


def test_times_of_any_zone_are_written_in_utc() -> None:
    shanghai = datetime(2026, 3, 1, 16, 0, tzinfo=timezone(timedelta(hours=8)))
    read = Recorded.from_bytes(envelope(time=shanghai).encode(ChannelDefined(channel="a", title="A", kind="b")))
    assert read.time == shanghai
    assert str(read.attributes["time"]).endswith("Z")
