"""Scoring over real HTTP: scores and why, as of any time, lists, and models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest

from kehu.auth import Role, issue_token
from kehu.clock import DevelopmentClock
from kehu.events import Event, Recorded
from kehu.events.lead_intake import BehaviourRecorded, Contact, LeadCaptured
from kehu.events.values import Personal
from kehu.kafka.effects import Policy
from kehu.postgres import Connection
from kehu.read_models import Projector
from kehu.testing.http import serving
from kehu.testing.kafka import envelope
from scoring.bootstrap import Parts, app_of, migrate, parts, timers
from scoring.policies import LEARN, REACTS_TO, learn
from scoring.processes.rescoring import Rescoring
from scoring.read_models.scores import Scores
from scoring.settings import ScoringSettings

SECRET = "a-secret-of-thirty-two-characters!"
NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)


class NoProgress:
    def write(self, connection: Connection) -> None:
        connection.execute("SELECT 1")


@dataclass
class Running:
    """A running scoring API, and what its other roles would do."""

    url: str
    parts: Parts
    clock: DevelopmentClock
    versions: dict[str, int] = field(default_factory=dict)

    def client(self, *roles: Role) -> httpx.Client:
        token = issue_token(SECRET, "u1", roles)
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    def hear(self, stream: str, event: Event, customer: UUID) -> Recorded:
        version = self.versions[stream] = self.versions.get(stream, 0) + 1
        made = envelope(stream, version, str(customer))
        recorded = Recorded(
            {**Recorded.from_bytes(made.encode(event)).attributes, "time": self.clock.now().isoformat()}
        )
        Policy(self.parts.handler, LEARN, "scoring", learn, REACTS_TO)([recorded], NoProgress())
        return recorded

    def capture(self, **more: Any) -> tuple[UUID, UUID]:
        lead, customer = uuid4(), uuid4()
        contact: Personal[Contact] = Personal.sealed("c2VhbGVk")
        given = {"source": "api", "channel": "referral", "contact": contact, "rating": "hot", "company": "示例", **more}
        self.hear(f"lead-{lead}", LeadCaptured(lead_id=lead, customer_id=customer, **given), customer)
        return lead, customer

    def demo(self, customer: UUID) -> Recorded:
        event = BehaviourRecorded(behaviour_id=uuid4(), customer_id=customer, kind="demo_attended")
        return self.hear(f"activity-{customer}-202603", event, customer)

    def project(self) -> None:
        projector = Projector(self.parts.store, Scores())
        while projector.step():
            pass


@pytest.fixture
def scoring(database: str, tmp_path: Path) -> Iterator[Running]:
    clock = DevelopmentClock(tmp_path / "clock.json")
    clock.set(NOW)
    settings = ScoringSettings(
        environment="development",
        postgres_url=database,
        database=urlsplit(database).path.removeprefix("/"),
        kafka_bootstrap="127.0.0.1:9092",
        jwt_secret=SECRET,
        clock_file=tmp_path / "clock.json",
    )
    migrate(settings)
    migrate(settings)  # once is enough, twice does no harm
    with parts(settings) as made, serving(app_of(made)) as url:
        assert isinstance(made.clock, DevelopmentClock)
        yield Running(url, made, made.clock)  # the same instance as the service's: another one may lag by its FRESH


@pytest.fixture
def sales(scoring: Running) -> Iterator[httpx.Client]:
    with scoring.client(Role.SALES) as client:
        yield client


@pytest.fixture
def admin(scoring: Running) -> Iterator[httpx.Client]:
    with scoring.client(Role.ADMIN) as client:
        yield client


def ok(response: httpx.Response, status: int = 200) -> dict[str, Any]:
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    problem: dict[str, Any] = response.json()
    assert problem["slug"] == slug, problem
    return problem


@pytest.mark.req("SC-04")
def test_a_score_says_why(scoring: Running, sales: httpx.Client) -> None:
    lead, customer = scoring.capture()
    demo = scoring.demo(customer)
    score = ok(sales.get(f"/leads/{lead}/score"))
    assert score["lead_id"] == score["asked_for"] == str(lead)
    assert (score["band"], score["qualified"], score["open"], score["model_version"]) == ("cold", False, True, 1)
    assert round(sum(part["points"] for part in score["parts"]), 2) == score["score"]
    parts_of = {part["rule"]: part for part in score["parts"]}
    assert set(parts_of) == {"interaction", "demo", "recommended", "hot-at-capture"}
    told = parts_of["demo"]
    assert (told["title"], told["dimension"], told["count"], told["half_life_days"]) == (
        "Attended a demo",
        "depth",
        1,
        45.0,
    )
    assert [(e["event_id"], e["kind"]) for e in told["events"]] == [(str(demo.id), "demo_attended")]
    assert parts_of["recommended"]["events"][0]["kind"] == "profile"
    assert score["next_change_at"] is None


@pytest.mark.req("SC-04")
def test_a_score_as_of_a_past_time_and_at_a_coming_one(scoring: Running, sales: httpx.Client) -> None:
    lead, customer = scoring.capture()
    before = scoring.clock.now()
    told_then = ok(sales.get(f"/leads/{lead}/score", params={"as_of": before.isoformat()}))
    scoring.clock.advance(timedelta(minutes=5))
    scoring.demo(customer)
    assert ok(sales.get(f"/leads/{lead}/score", params={"as_of": before.isoformat()})) == told_then
    now = ok(sales.get(f"/leads/{lead}/score"))
    assert now["score"] > told_then["score"]
    ahead = (scoring.clock.now() + timedelta(days=45)).isoformat()
    in_a_half_life = ok(sales.get(f"/leads/{lead}/score", params={"until": ahead}))
    assert next(p["points"] for p in in_a_half_life["parts"] if p["rule"] == "demo") == pytest.approx(10.0, abs=0.01)
    refused(
        sales.get(f"/leads/{lead}/score", params={"as_of": (NOW - timedelta(days=1)).isoformat()}), 404, "not-found"
    )
    refused(sales.get(f"/leads/{uuid4()}/score"), 404, "not-found")
    refused(sales.get(f"/leads/{lead}/score", params={"as_of": "2026-03-02T09:00:00"}), 422, "invalid")
    refused(sales.get(f"/leads/{lead}/score", params={"asof": "now"}), 422, "invalid")
    for name, time in (
        ("as_of", "1999-12-31T00:00:00Z"),
        ("as_of", "2027-01-01T00:00:00Z"),
        ("until", "9999-01-01T00:00:00Z"),
    ):
        problem = refused(sales.get(f"/leads/{lead}/score", params={name: time}), 422, "invalid")
        assert [error["field"] for error in problem["errors"]] == [name]


@pytest.mark.req("SC-04")
def test_the_history_of_a_score_comes_in_pages(scoring: Running, sales: httpx.Client) -> None:
    lead, customer = scoring.capture()
    for _ in range(3):
        scoring.demo(customer)
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        page = ok(
            sales.get(f"/leads/{lead}/score/history", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))
        )
        found += page["items"]
        cursor = page["next"]
        if cursor is None:
            break
    assert [change["version"] for change in found] == list(range(len(found), 0, -1))
    changes = [change for change in reversed(found) if change["type"] == "lead_score.changed.v1"]
    assert [change["cause"] for change in changes] == ["profile", "behaviour", "behaviour", "behaviour"]
    assert [later["previous"] for later in changes[1:]] == [earlier["score"] for earlier in changes[:-1]]
    for change in changes:
        assert round(sum(part["points"] for part in change["parts"]), 2) == change["score"]
    refused(sales.get(f"/leads/{uuid4()}/score/history"), 404, "not-found")


@pytest.mark.req("SC-03")
def test_leads_are_listed_by_score(scoring: Running, sales: httpx.Client) -> None:
    leads = [scoring.capture() for _ in range(5)]
    for number, (_, customer) in enumerate(leads):
        for _ in range(number % 3):
            scoring.demo(customer)
    scoring.project()
    everyone = ok(sales.get("/scores"))["items"]
    assert {row["lead_id"] for row in everyone} == {str(lead) for lead, _ in leads}
    assert [row["score"] for row in everyone] == sorted((row["score"] for row in everyone), reverse=True)
    pages: list[str] = []
    cursor: str | None = None
    while True:
        page = ok(sales.get("/scores", params={"limit": 2} | ({"cursor": cursor} if cursor else {})))
        pages += [row["lead_id"] for row in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert pages == [row["lead_id"] for row in everyone]
    warm = ok(sales.get("/scores", params={"band": "warm"}))["items"]
    assert [row["lead_id"] for row in warm] == [row["lead_id"] for row in everyone if row["band"] == "warm"]
    least = everyone[1]["score"]
    high = ok(sales.get("/scores", params={"min": least}))["items"]
    assert [row["lead_id"] for row in high] == [row["lead_id"] for row in everyone if row["score"] >= least]
    assert ok(sales.get("/scores", params={"qualified": "true"}))["items"] == []
    refused(sales.get("/scores", params={"band": "lukewarm"}), 422, "invalid")
    refused(sales.get("/scores", params={"min": 101}), 422, "invalid")


MODEL: dict[str, Any] = {
    "rules": [
        {
            "name": "demo",
            "title": "Demo",
            "dimension": "depth",
            "behaviours": ["demo_attended"],
            "points": 50,
            "half_life_days": 10,
        },
        {
            "name": "sent-by-a-friend",
            "title": "Sent by a friend",
            "dimension": "fit",
            "conditions": [{"attribute": "channel", "operator": "in", "value": ["referral"]}],
            "points": 35,
        },
    ],
    "caps": {"frequency": 20, "depth": 60, "fit": 40},
}


@pytest.mark.req("SC-05")
def test_a_model_is_published_once_and_all_leads_follow(
    scoring: Running, admin: httpx.Client, sales: httpx.Client
) -> None:
    leads = [scoring.capture() for _ in range(3)]
    scoring.demo(leads[0][1])
    current = admin.get("/models/current")
    assert ok(current)["leads_to_rescore"] == 0
    scoring.clock.advance(timedelta(minutes=1))
    headers = {"If-Match": current.headers["etag"], "Idempotency-Key": "publish-1"}
    answers = [admin.post("/models", json={"model": MODEL, "note": "sharper"}, headers=headers) for _ in range(2)]
    assert [ok(answer, 201) for answer in answers] == [{"published": True, "model_version": 2}] * 2
    assert answers[1].headers["idempotent-replayed"] == "true"
    assert ok(admin.get("/models/current"))["leads_to_rescore"] == 3

    lead = leads[0][0]
    assert ok(sales.get(f"/leads/{lead}/score"))["model_version"] == 2  # an explanation uses the model in force at once
    assert ok(sales.get(f"/leads/{lead}/score", params={"as_of": NOW.isoformat(), "until": NOW.isoformat()}), 404)
    rescoring = Rescoring(scoring.parts.handler, scoring.parts.books, scoring.clock, batch=2)
    assert [rescoring.step() for _ in range(3)] == [2, 1, 0]
    assert ok(admin.get("/models/current"))["leads_to_rescore"] == 0
    newest = ok(sales.get(f"/leads/{lead}/score/history"))["items"]
    assert {change["type"] for change in newest[:3]} == {
        "lead_score.changed.v1", "lead_score.band_changed.v1", "lead_score.lead_qualified.v1",
    }  # fmt: skip
    assert next(change["cause"] for change in newest if change["cause"]) == "model"
    versions = [item["model_version"] for item in ok(sales.get("/models"))["items"]]
    assert versions == [2, 1]
    assert ok(sales.get("/models/2"))["note"] == "sharper"
    refused(sales.get("/models/3"), 404, "not-found")
    stale = admin.post("/models", json={"model": {**MODEL, "base": 3}}, headers={"If-Match": '"1"'})
    refused(stale, 412, "version-conflict")
    same = ok(admin.post("/models", json={"model": MODEL}), 201)
    assert same == {"published": False, "model_version": None}


@pytest.mark.req("SC-05")
def test_a_wrong_model_is_refused_with_the_place(scoring: Running, admin: httpx.Client, sales: httpx.Client) -> None:
    def post(**changes: Any) -> httpx.Response:
        return admin.post("/models", json={"model": {**MODEL, **changes}})

    def fields(problem: dict[str, Any]) -> list[str]:
        return [error["field"] for error in problem["errors"]]

    rule = MODEL["rules"][0]
    twice = refused(post(rules=[rule, rule]), 422, "scoring-model-invalid")
    assert fields(twice) == ["model.rules.1.name"]
    assert fields(refused(post(rules=[]), 422, "invalid")) == ["model.rules"]
    assert fields(refused(post(rules=[{**rule, "point": 3}]), 422, "invalid"))[0] == "model.rules[0].point"
    assert fields(refused(post(rules=[{**rule, "points": 1e9}]), 422, "invalid"))[0] == "model.rules[0].points"
    assert fields(refused(post(rules=[{**rule, "points": "5"}]), 422, "invalid"))[0] == "model.rules[0].points"
    assert fields(refused(post(caps={"fit": 3}), 422, "scoring-model-invalid")) == ["model.caps"]
    many = [{**rule, "name": f"r{n}"} for n in range(201)]
    assert fields(refused(post(rules=many), 422, "invalid")) == ["model.rules"]
    refused(sales.post("/models", json={"model": MODEL}), 403, "not-allowed")
    refused(httpx.get(f"{scoring.url}/scores"), 401, "not-authenticated")
    assert ok(sales.get("/models/current"))["model_version"] == 1


@pytest.mark.req("SC-07")
def test_moving_the_clock_fades_scores(scoring: Running, admin: httpx.Client, sales: httpx.Client) -> None:
    ok(admin.post("/models", json={"model": MODEL}), 201)
    lead, customer = scoring.capture()
    scoring.demo(customer)
    hot = ok(sales.get(f"/leads/{lead}/score"))
    assert (hot["band"], hot["qualified"]) == ("hot", True)
    scoring.clock.set(datetime.fromisoformat(hot["next_change_at"]))
    while timers(scoring.parts, scoring.clock).step():
        pass
    faded = ok(sales.get(f"/leads/{lead}/score"))
    assert (faded["band"], faded["qualified"]) == ("warm", True)
    newest = ok(sales.get(f"/leads/{lead}/score/history"))["items"]
    band, changed = newest[:2]
    assert (band["band"], band["previous"], changed["cause"]) == ("warm", "hot", "decay")
    assert datetime.fromisoformat(band["time"]) == datetime.fromisoformat(hot["next_change_at"])


def test_the_documented_answers_are_the_ones_given(scoring: Running, sales: httpx.Client, admin: httpx.Client) -> None:
    document = ok(sales.get("/openapi.json"))
    assert set(document["paths"]) >= {
        "/leads/{lead_id}/score", "/leads/{lead_id}/score/history", "/scores", "/models", "/models/current", "/models/{version}",
    }  # fmt: skip
    schemas = document["components"]["schemas"]
    lead, customer = scoring.capture()
    scoring.demo(customer)
    scoring.project()
    answers = {
        "ScoreAnswer": ok(sales.get(f"/leads/{lead}/score")),
        "ChangeAnswer": ok(sales.get(f"/leads/{lead}/score/history"))["items"][0],
        "ListedScore": ok(sales.get("/scores"))["items"][0],
        "CurrentModelAnswer": ok(admin.get("/models/current")),
    }
    for name, answer in answers.items():
        assert set(answer) == set(schemas[name]["properties"]), name
