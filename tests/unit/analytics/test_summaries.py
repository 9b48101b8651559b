"""What a timeline shows of an event, and how counts fall into buckets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from analytics.read_models.customer_timeline import MAX_FIELDS, MAX_TEXT, summary
from analytics.read_models.live_counters import MINUTES_KEPT, buckets
from kehu.events import Recorded
from kehu.testing.histories import SEALED, history

SHANGHAI = ZoneInfo("Asia/Shanghai")


def recorded(wire: str, data: dict[str, Any], time: str = "2026-03-01T15:59:59Z") -> Recorded:
    return Recorded(
        {
            "id": "0195f000-0000-7000-8000-000000000001",
            "type": wire,
            "subject": "lead-1",
            "streamversion": 1,
            "source": "/kehu/lead-intake",
            "partitionkey": "k",
            "correlationid": "c",
            "causationid": "c",
            "actor": "service:test",
            "storeepoch": "e",
            "time": time,
            "recordedtime": time,
            "data": data,
        }
    )


def test_a_summary_has_the_plain_facts() -> None:
    shown = summary(
        recorded(
            "lead.captured.v1",
            {
                "customer_id": "c1",
                "channel": "baidu",
                "rating": "hot",
                "facts": {"size": 3, "list": [1]},
                "note": None,
                "tags": [1, 2],
            },
        )
    )
    assert shown == {"channel": "baidu", "rating": "hot", "facts": {"size": 3}}


def test_personal_data_is_left_out_sealed_or_plain_or_of_an_unknown_type() -> None:
    data = {"contact": {"sealed": "token"}, "raw_contact": {"erased": True}, "channel": "baidu"}
    assert summary(recorded("lead.captured.v1", data)) == {"channel": "baidu"}
    assert summary(recorded("lead.captured.v1", {"contact": {"phone": "13800138000"}})) == {}
    assert summary(recorded("lead.unheard_of.v1", {"secret": {"sealed": "token"}, "channel": "x"})) == {"channel": "x"}
    for events in history(1, 20).recorded().values():
        assert all(SEALED not in str(summary(event)) for event in events)


def test_a_summary_is_bounded() -> None:
    shown = summary(recorded("x.happened.v1", {f"f{i:02d}": "长" * 1000 for i in range(100)}))
    assert len(shown) == MAX_FIELDS
    assert all(len(value) == MAX_TEXT for value in shown.values())


def test_days_are_those_of_the_zone_and_minutes_those_of_utc() -> None:
    now = datetime(2026, 3, 1, 16, 5, tzinfo=UTC)
    late, later = (
        recorded("lead.captured.v1", {"channel": "baidu"}),
        recorded("lead.captured.v1", {}, "2026-03-01T16:00:00Z"),
    )
    counts = buckets([late, late, later], SHANGHAI, now)
    assert counts == {
        ("day", datetime(2026, 2, 28, 16, tzinfo=UTC), "lead-intake", "lead.captured.v1", "baidu"): 2,
        ("day", datetime(2026, 3, 1, 16, tzinfo=UTC), "lead-intake", "lead.captured.v1", ""): 1,
        ("minute", datetime(2026, 3, 1, 15, 59, tzinfo=UTC), "lead-intake", "lead.captured.v1", "baidu"): 2,
        ("minute", datetime(2026, 3, 1, 16, 0, tzinfo=UTC), "lead-intake", "lead.captured.v1", ""): 1,
    }


def test_history_makes_no_minutes() -> None:
    counts = buckets(
        [recorded("lead.captured.v1", {"channel": 7})], SHANGHAI, datetime(2026, 3, 1, 16, tzinfo=UTC) + MINUTES_KEPT
    )
    assert [key[0] for key in counts] == ["day"]
    counts = buckets(
        [recorded("lead.captured.v1", {})], SHANGHAI, datetime(2026, 3, 1, tzinfo=UTC) + timedelta(hours=1)
    )
    assert {key[0] for key in counts} == {"day", "minute"}
