"""What becomes of each record: applied once and in order, skipped, or parked; on made-up deliveries of every kind."""

from __future__ import annotations

import json
from collections.abc import Sequence

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from kehu.decider import Refused
from kehu.events.lead_intake import ChannelDefined, LeadRejected
from kehu.kafka.guard import Item, Open, Place, Reader, describe, header_bytes, judge, presume
from kehu.kafka.guard import _text as header_json
from kehu.testing.kafka import HEADERS, message

PLACE = Place("t", 0)
READER = Reader((ChannelDefined,))


def item(stream: str, version: int, offset: int = 0, poison: str | None = None) -> Item:
    made = message(stream, version)
    read = READER.item(PLACE, offset, made.key, made.value, made.headers)
    read.poison = poison
    return read


class Consumer:
    """Judges batches as a consumer does, and keeps what a database would."""

    def __init__(self, poison: set[tuple[str, int]]) -> None:
        self.poison = poison
        self.versions: dict[str, int] = {}
        self.parked: dict[str, dict[int, str]] = {}
        self.applied: list[tuple[str, int]] = []

    def take(self, batch: Sequence[tuple[str, int]]) -> None:
        items = [item(s, v, poison="broken" if (s, v) in self.poison else None) for s, v in batch]
        waiting = {s: Open(min(vs), max(vs), len(vs)) for s, vs in self.parked.items() if vs}
        known = {s: self.versions[s] for s, _ in batch if s in self.versions}
        presumed = presume(items, waiting)
        if presumed is not None and all(first == known.get(s, 0) + 1 for s, first in presumed[1].items()):
            verdict = presumed[0]
            judged = judge(items, dict(known), waiting, False)
            assert (verdict.events, verdict.versions, []) == (judged.events, judged.versions, judged.parking)
        else:
            verdict = judge(items, known, waiting, False)
        self.applied += [(e.stream, e.version) for e in verdict.events]
        self.versions.update(verdict.versions)
        for parking in verdict.parking:
            version = parking.item.version
            assert version is not None
            self.parked.setdefault(parking.item.stream, {}).setdefault(version, parking.status)

    def resume(self) -> None:
        """As `Replay`: streams go on whose first parked event is the next one and did not fail itself."""
        for stream, waiting in self.parked.items():
            versions = sorted(waiting)
            verdict = judge(
                [item(stream, v, poison="broken" if (stream, v) in self.poison else None) for v in versions],
                {stream: self.versions[stream]} if stream in self.versions else {},
                {},
                False,
            )
            self.applied += [(e.stream, e.version) for e in verdict.events]
            self.versions.update(verdict.versions)
            left = {p.item.version for p in verdict.parking}
            self.parked[stream] = {v: status for v, status in waiting.items() if v in left}


deliveries = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=60)
batches = st.lists(st.integers(1, 10), min_size=1, max_size=20)


def cut(records: Sequence[tuple[str, int]], sizes: Sequence[int]) -> list[Sequence[tuple[str, int]]]:
    found, begin = [], 0
    for size in [*sizes, len(records)]:
        found.append(records[begin : begin + size])
        begin += size
    return [part for part in found if part]


@settings(max_examples=300)
@given(deliveries, batches, st.sets(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=2))
def test_whatever_is_delivered_is_applied_once_and_in_order(
    records: list[tuple[str, int]], sizes: list[int], poison: set[tuple[str, int]]
) -> None:
    """Repeats, swaps, holes and poison in any mixture, in batches of any size."""
    consumer = Consumer(poison)
    for batch in cut(records, sizes):
        consumer.take(batch)
        consumer.resume()
    for stream in "abc":
        applied = [v for s, v in consumer.applied if s == stream]
        assert applied == list(range(1, len(applied) + 1)), "in order, without a hole, once"
        assert not {(stream, v) for v in applied} & poison
        came = {v for s, v in records if s == stream}
        assert set(applied) | set(consumer.parked.get(stream, {})) == came, "nothing that came is gone"
        reachable = 0
        while reachable + 1 in came and (stream, reachable + 1) not in poison:
            reachable += 1
        assert len(applied) == reachable, "all that can be applied is, whenever it came"


def test_a_batch_heals_its_own_hole() -> None:
    verdict = judge([item("s", 1), item("s", 3), item("s", 2), item("s", 3)], {}, {}, False)
    assert [e.version for e in verdict.events] == [1, 2]
    assert [(p.item.version, p.status) for p in verdict.parking] == [(3, "waiting"), (3, "behind")]
    assert verdict.holes == 1


def test_start_anywhere() -> None:
    assert [e.version for e in judge([item("s", 5), item("s", 6)], {}, {}, True).events] == [5, 6]
    assert judge([item("s", 5)], {}, {}, False).parking[0].error == "hole: expected version 1, got 5"
    assert judge([item("s", 7)], {"s": 5}, {}, True).parking[0].error == "hole: expected version 6, got 7"


def test_what_is_not_wanted_only_moves_the_version() -> None:
    reader = Reader((LeadRejected,))
    made = message("s", 1)
    read = reader.item(PLACE, 0, made.key, made.value, made.headers)
    verdict = judge([read], {}, {}, False)
    assert not verdict.events and verdict.passed == 1 and verdict.versions == {"s": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [("partitionkey", 5), ("streamversion", "1"), ("streamversion", 0), ("streamversion", True), ("type", {}), ("subject", None),
     ("subject", "a\0b"), ("subject", "s" * 3000), ("streamversion", 2**63)],
)  # fmt: skip
def test_envelopes_of_wrong_types_are_poison(field: str, value: object) -> None:
    made = message("s", 1)
    assert made.value is not None
    attributes = {**json.loads(made.value), field: value}
    read = READER.item(PLACE, 0, made.key, json.dumps(attributes).encode(), HEADERS)
    assert read.recorded is None and read.poison is not None
    assert judge([read], {}, {}, False).parking[0].status == "waiting"


class Data(BaseModel):
    phone: int


def test_errors_are_described_without_values() -> None:
    secret = "13800138000 张三"
    with pytest.raises(ValidationError) as caught:
        Data.model_validate({"phone": secret})
    assert describe(caught.value) == "the data does not fit the type: phone: int_parsing"
    with pytest.raises(KeyError) as missing:
        raise KeyError(secret)
    assert describe(missing.value).startswith("KeyError at test_errors_are_described_without_values:")
    violated = psycopg.errors.UniqueViolation(f"Key (phone)=({secret}) already exists")
    assert secret not in describe(violated)
    assert describe(Refused("lead-closed", "this lead is closed")) == "Refused: lead-closed: this lead is closed"


@given(st.none() | st.binary(max_size=50))
def test_headers_survive_the_table(value: bytes | None) -> None:
    kept = json.loads(json.dumps(header_json(value)))
    assert header_bytes(kept) == value
    assert "\0" not in str(kept), "jsonb takes no NUL"
