"""The API of analytics over real HTTP: funnels that equal a count by hand, pages, groups, and who may ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from analytics.bootstrap import app_of
from analytics.read_models import READ_MODELS, generations, live_counters
from analytics.settings import Settings
from analytics.subscriptions import LIVE_COUNTERS, TOPICS
from kehu.auth import Role, issue_token
from kehu.events import Recorded
from kehu.events.lead_intake import BehaviourRecorded, LeadCaptured
from kehu.events.scoring import LeadQualified
from kehu.kafka.guard import Place
from kehu.lake import LakeWriter, Record
from kehu.lake.stats import wilson
from kehu.migrations import migrate, of_service
from kehu.postgres import Pool, open_pool
from kehu.read_models import of_interest
from kehu.testing.histories import SEALED, History, history
from kehu.testing.http import serving

SECRET = "a-secret-of-thirty-two-characters!"
PARTITIONS = 12


@dataclass
class Running:
    """A running API over a history that was read to the end."""

    url: str
    settings: Settings
    made: History
    events: list[Recorded]
    ends: dict[Place, int]

    def client(self, *roles: Role) -> httpx.Client:
        token = issue_token(SECRET, "u1", roles or (Role.ANALYST,))
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def get(self, path: str, **query: Any) -> Any:
        with self.client() as client:
            response = client.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Settings:
    migrate(database, of_service("analytics"))
    server, _, name = database.rpartition("/")
    return Settings(
        environment="development",
        jwt_secret=SECRET,
        postgres_url=f"{server}/postgres",
        database=name,
        kafka_bootstrap="127.0.0.1:9",
        lake_path=tmp_path / "lake",
    )


@pytest.fixture
def pool(settings: Settings) -> Iterator[Pool]:
    opened = open_pool(settings.database_url, "test", 6)
    yield opened
    opened.close()


@pytest.fixture
def running(settings: Settings, pool: Pool) -> Iterator[Running]:
    made = history(61, 150)
    topics = list(made.recorded().values())
    with pool.connection() as connection, connection.transaction():
        for name, model in READ_MODELS.items():
            for events in topics:
                model(1).apply(connection, of_interest(model(1), events))
            connection.execute(
                "INSERT INTO consumer_offsets VALUES (%s, %s, 0, %s)",
                (generations.progress_name(name, 1), TOPICS[0], len(topics[0]) - 5),
            )
        everything = [r for events in topics for r in events]
        live_counters.add(connection, live_counters.buckets(everything, settings.zone, datetime.now(UTC)))
    assert settings.lake_path is not None
    LakeWriter(settings.lake_path).append(
        [
            Record(t, 0, i, v)
            for t, values in zip(TOPICS, made.topics.values(), strict=True)
            for i, (_, v) in enumerate(values)
        ]
    )
    known = {Place(topic, 0): len(events) for topic, events in zip(TOPICS, topics, strict=True)}

    async def ends() -> dict[Place, int]:
        if not known:
            raise ConnectionError("no broker")
        return known

    with serving(app_of(settings, pool, ends)) as url:
        yield Running(url, settings, made, everything, known)


def by_hand(events: list[Recorded], window: timedelta) -> tuple[int, int, int]:
    """Customers that were captured, then qualified, then converted within the window of a capture."""
    histories: dict[str, list[tuple[datetime, int, int]]] = {}
    for r in events:
        step = 0 if r.is_a(LeadCaptured) else 1 if r.is_a(LeadQualified) else 2 if r.is_a(BehaviourRecorded) else None
        if step is None or (step == 2 and r.data["kind"] != "offer_accepted"):
            continue
        histories.setdefault(str(r.customer_id), []).append((r.time, step, r.position))
    reached = [0, 0, 0]
    for happened in histories.values():
        starts = [t for t, s, _ in happened if s == 0]
        reached[0] += bool(starts)
        qualified = [(a, q) for a in starts for q, s, _ in happened if s == 1 and a <= q <= a + window]
        reached[1] += bool(qualified)
        reached[2] += any(q <= c <= a + window for a, q in qualified for c, s, _ in happened if s == 2)
    return reached[0], reached[1], reached[2]


@pytest.mark.req("AN-01")
@pytest.mark.parametrize("days", [1, 5, 30])
def test_a_funnel_equals_a_count_by_hand(running: Running, days: int) -> None:
    answer = running.get("/funnel", window=f"{days}d")
    assert tuple(step["reached"] for step in answer["steps"]) == by_hand(running.events, timedelta(days=days))
    first, *_, last = answer["steps"]
    assert first["entered"] == first["reached"] > last["reached"] or days == 1
    low, high = wilson(last["reached"], first["entered"])
    assert (last["rate_low"], last["rate_high"]) == (low, high)
    assert answer["snapshot"]


@pytest.mark.req("AN-07")
def test_a_funnel_can_be_counted_again_from_its_answer(running: Running) -> None:
    answer = running.get("/funnel", by="channel", window="10d")
    with running.client() as client:
        again = client.post("/funnel", json=answer["spec"]).json()
    assert {key: again[key] for key in ("snapshot", "steps", "values")} == {
        key: answer[key] for key in ("snapshot", "steps", "values")
    }
    assert sum(steps[0]["entered"] for steps in answer["values"]) == answer["steps"][0]["entered"]
    assert {steps[0]["value"] for steps in answer["values"]} == {"baidu", "trade-fair", "referral", "wechat"}


@pytest.mark.req("AN-07")
def test_a_funnel_as_of_the_past_knows_only_what_was_recorded_then(running: Running) -> None:
    middle = sorted(r.recorded for r in running.events)[len(running.events) // 2]
    answer = running.get("/funnel", as_of=middle.isoformat(), window="30d")
    known = [r for r in running.events if r.recorded <= middle]
    assert tuple(step["reached"] for step in answer["steps"]) == by_hand(known, timedelta(days=30))
    assert datetime.fromisoformat(answer["horizon"]) == middle
    monthly = running.get("/funnel", by="month")
    assert len(monthly["values"]) > 2


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"step": "no such"}, "step"),
        ({"window": "soon"}, "window"),
        ({"window": "999999999999d"}, "window"),
        ({"step": ["captured", "captured"]}, "step"),
        ({"step": "lead.captured[channel]"}, "step"),
        ({"by": "'; DROP TABLE"}, "by"),
        ({"order": "random"}, "order"),
        ({"as_of": "2026-01-01T00:00:00"}, "as_of"),
        ({"unknown": "1"}, "unknown"),
    ],
)
def test_a_funnel_that_means_nothing_is_refused_with_the_reason(
    running: Running, query: dict[str, Any], field: str
) -> None:
    with running.client() as client:
        response = client.get("/funnel", params=query)
    assert response.status_code == 422, response.text
    assert [error["field"] for error in response.json()["errors"]] == [field]


def test_without_a_lake_there_is_no_funnel_yet(settings: Settings, pool: Pool) -> None:
    async def ends() -> dict[Place, int]:
        return {}

    with serving(app_of(settings, pool, ends)) as url, httpx.Client(base_url=url) as client:
        client.headers["Authorization"] = f"Bearer {issue_token(SECRET, 'u1', [Role.ADMIN])}"
        response = client.get("/funnel")
        assert (response.status_code, response.json()["slug"]) == (409, "lake-empty")
        assert client.get("/projections").json()["lake_version"] is None


@pytest.mark.req("PL-05")
@pytest.mark.parametrize(
    "path", ["/funnel", "/counters", "/counts", "/conversion/by-channel", "/projections", "/customers/x/timeline"]
)
def test_only_who_may_ask_is_answered(running: Running, path: str) -> None:
    assert httpx.get(running.url + path).status_code == 401
    with running.client(Role.SALES) as client:
        assert client.get(path).status_code == 403


def test_live_counters_by_day_and_type(running: Running) -> None:
    first, last = min(r.time for r in running.events), max(r.time for r in running.events)
    window = {"since": (first - timedelta(days=1)).isoformat(), "until": (last + timedelta(days=1)).isoformat()}
    answer = running.get("/counters", span="day", **window)
    assert answer["complete"]
    counted = Counter[str]()
    for item in answer["items"]:
        counted[item["type"]] += item["events"]
    assert counted == Counter(r.type for r in running.events)
    baidu = running.get("/counters", span="day", type="lead.captured.v1", channel="baidu", **window)
    captured = [r for r in running.events if r.is_a(LeadCaptured) and r.data["channel"] == "baidu"]
    assert sum(item["events"] for item in baidu["items"]) == len(captured)
    assert running.get("/counters")["items"] == []  # nothing in the last hour


def test_counts_by_day(running: Running) -> None:
    days = sorted({r.time.astimezone(running.settings.zone).date() for r in running.events})
    answer = running.get("/counts", first=days[0].isoformat(), last=days[-1].isoformat())
    assert sum(item["events"] for item in answer["items"]) == len(running.events)
    one = running.get("/counts", first=days[0].isoformat(), last=days[0].isoformat(), service="lead-intake")
    assert {item["day"] for item in one["items"]} == {days[0].isoformat()}
    with running.client() as client:
        assert client.get("/counts", params={"first": "2026-03-01", "last": "2026-02-01"}).status_code == 422


def test_a_timeline_in_pages(running: Running) -> None:
    customer, count = Counter(r.customer_id for r in running.events).most_common(1)[0]
    seen: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = running.get(f"/customers/{customer}/timeline", limit=7, **cursor)
        seen += page["items"]
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}
    assert len(seen) == len({item["event_id"] for item in seen}) == count > 7
    assert [item["time"] for item in seen] == sorted((item["time"] for item in seen), reverse=True)
    assert SEALED not in str(seen)
    with running.client() as client:
        assert client.get("/customers/00000000-0000-4000-8000-000000000000/timeline").status_code == 404
        assert client.get(f"/customers/{customer}/timeline", params={"cursor": "x"}).status_code == 400


@pytest.mark.req("AN-02")
def test_conversion_by_channel_month_and_score_band(running: Running) -> None:
    channels = running.get("/conversion/by-channel")["items"]
    months = running.get("/conversion/by-month")["items"]
    bands = running.get("/conversion/by-score-band")["items"]
    for items in (channels, months, bands):
        assert sum(item["leads"] for item in items) == sum(item["leads"] for item in channels) > 0
        assert sum(item["converted"] for item in items) == sum(item["converted"] for item in channels) > 0
        for item in items:
            assert item["rate"] == item["converted"] / item["leads"]
            assert item["rate_low"] <= item["rate"] <= item["rate_high"]
    assert {item["group"] for item in bands} <= {"hot", "warm", "cold", "none"}
    one = running.get("/conversion/by-month", channel="baidu", first="2026-02-11", last="2026-02-28")["items"]
    assert [item["group"] for item in one] == ["2026-02"]
    with running.client() as client:
        assert client.get("/conversion/by-score-band", params={"hot": 10, "warm": 50}).status_code == 422


@pytest.mark.req("AN-08")
def test_how_far_everything_is(running: Running, pool: Pool) -> None:
    with pool.connection() as connection:
        building = generations.begin(connection, "lead_journey", running.settings.zone)
    items = {(item["name"], item["generation"]): item for item in running.get("/projections")["items"]}
    total = sum(running.ends.values())
    for name in READ_MODELS:
        live = items[name, 1]
        assert (live["state"], live["done"], live["lag"]) == (
            "live",
            total - live["lag"],
            len(running.made.scoring) + 5,
        )
    new = items["lead_journey", building.generation]
    assert (new["state"], new["done"], new["lag"]) == ("building", 0, total)
    assert items["live_counters", None]["consumer"] == LIVE_COUNTERS
    running.ends.clear()  # the broker is away
    assert {item["lag"] for item in running.get("/projections")["items"]} == {None}
