"""lead-intake over real HTTP and real PostgreSQL: captures, lists, files, behaviours, keys, erasure, hostile input."""

from __future__ import annotations

import base64
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import psycopg
import pytest

from kehu.auth import Role, issue_token
from kehu.clock import DevelopmentClock
from kehu.commands import CommandHandler
from kehu.events import Recorded, event_class
from kehu.events.lead_intake import (
    BehaviourRecorded,
    ChannelDefined,
    CustomerErased,
    CustomerErasureRequested,
    CustomerRegistered,
    ImportCompleted,
    ImportStarted,
    LeadCaptured,
    LeadMerged,
    LeadRejected,
)
from kehu.eventstore import Cursor
from kehu.migrations import migrate, of_service
from kehu.privacy import HttpKeyring, open_events
from kehu.read_models import Projector
from kehu.testing.http import serving
from lead_intake.bootstrap import Parts, app_of, parts
from lead_intake.handlers import handlers
from lead_intake.read_models.leads import Leads
from lead_intake.settings import LeadIntakeSettings

SECRET = "a-secret-of-thirty-two-characters!"
NOW = datetime(2024, 5, 17, 8, 0, tzinfo=UTC)
ZHANG = {
    "channel": "expo",
    "name": "张伟",
    "phone": "138 0013 8000",
    "email": "Zhang.Wei@EXAMPLE.com",
    "company": "星辰科技有限責任公司",
    "title": "采购经理",
}


@dataclass
class Service:
    """A running lead-intake with a client of every role."""

    url: str
    parts: Parts

    def client(self, *roles: Role, subject: str = "u1") -> httpx.Client:
        token = issue_token(SECRET, subject, roles)
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    def events(self) -> list[Recorded]:
        found: list[Recorded] = []
        cursor = Cursor()
        while rows := self.parts.store.read(cursor, 1000):
            found.extend(row.recorded() for row in rows)
            cursor = rows[-1].cursor
        return found

    def types(self) -> list[str]:
        return [recorded.type.removesuffix(".v1") for recorded in self.events()]

    def of(self, *kinds: type[Any]) -> list[Any]:
        return [recorded.event for recorded in self.events() if recorded.is_a(*kinds)]

    def project(self) -> None:
        projector = Projector(self.parts.store, Leads())
        while projector.step():
            pass

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        with self.parts.pool.connection() as connection:
            return connection.execute(sql.encode()).fetchall()


@pytest.fixture
def settings(database: str, tmp_path: Path) -> LeadIntakeSettings:
    url = urlsplit(database)
    key = base64.b64encode(b"k" * 32).decode()
    clock = DevelopmentClock(tmp_path / "clock.json")
    clock.set(NOW)
    made = LeadIntakeSettings(
        environment="development",
        postgres_url=database,
        database=url.path.removeprefix("/"),
        kafka_bootstrap="127.0.0.1:9092",
        jwt_secret=SECRET,
        master_key=key,
        hash_key=key,
        clock_file=tmp_path / "clock.json",
    )
    migrate(database, of_service("lead_intake"))
    return made


@contextmanager
def running(settings: LeadIntakeSettings) -> Iterator[str]:
    """Another process of the API, as far as its memory goes."""
    with parts(settings) as made, serving(app_of(made)) as url:
        yield url


@pytest.fixture
def service(settings: LeadIntakeSettings) -> Iterator[Service]:
    with parts(settings) as made, serving(app_of(made)) as url:
        yield Service(url, made)


@pytest.fixture
def sales(service: Service) -> Iterator[httpx.Client]:
    with service.client(Role.SALES) as client:
        yield client


@pytest.fixture
def admin(service: Service) -> Iterator[httpx.Client]:
    with service.client(Role.ADMIN) as client:
        for code, kind in (("expo", "trade_fair"), ("friends", "referral")):
            made = client.put(f"/channels/{code}", json={"title": code, "kind": kind})
            assert made.status_code == 200, made.text
        yield client


def ok(response: httpx.Response, status: int = 200) -> dict[str, Any]:
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["slug"] == slug, problem
    return problem


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.02)


@pytest.mark.req("LI-01")
class TestCapture:
    def test_a_lead_is_captured_cleaned_rated_and_numbered(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        response = sales.post("/leads", json=ZHANG)
        captured = ok(response, 201)
        assert captured["outcome"] == "captured"
        assert captured["customer_number"] == "CRM202405001"
        assert captured["rating"] == "hot"
        assert response.headers["location"] == f"/leads/{captured['lead_id']}"
        assert response.headers["etag"] == '"1"'
        assert service.types()[-2:] == ["customer.registered", "lead.captured"]
        lead = ok(sales.get(response.headers["location"]))
        assert lead["contact"] == {"name": "张伟", "phone": "+8613800138000", "email": "Zhang.Wei@example.com"}
        assert lead["raw_contact"] == {"name": "张伟", "phone": "138 0013 8000", "email": "Zhang.Wei@EXAMPLE.com"}
        assert lead["company"] == "星辰科技有限责任公司"
        assert {"field": "company", "rule": "legal_form", "before": ZHANG["company"], "after": lead["company"]} in lead[
            "corrections"
        ]
        assert {"field": "phone", "rule": "e164"} in lead["corrections"]
        assert (lead["status"], lead["version"], lead["masked"], lead["erased"]) == ("open", 1, False, False)

    def test_resent_with_the_same_key_it_is_captured_once(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        key = {"Idempotency-Key": "k-1"}
        first = sales.post("/leads", json=ZHANG, headers=key)
        again = sales.post("/leads", json=ZHANG, headers=key)
        assert ok(first, 201) == ok(again, 201)
        assert again.headers["idempotent-replayed"] == "true"
        assert service.types().count("lead.captured") == 1
        refused(sales.post("/leads", json={**ZHANG, "name": "李娜"}, headers=key), 422, "idempotency-key-reused")
        with service.client(Role.SALES, subject="u2") as somebody_else:
            other = ok(somebody_else.post("/leads", json=ZHANG, headers=key), 201)
        assert other["outcome"] == "merged", "the key of another caller is another key"

    def test_an_unknown_and_a_closed_channel_are_refused(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        problem = refused(sales.post("/leads", json={**ZHANG, "channel": "nowhere"}), 409, "unknown-channel")
        assert "PUT /channels/nowhere" in problem["detail"]
        ok(admin.put("/channels/nowhere", json={"title": "now there", "kind": "list"}))
        ok(sales.post("/leads", json={**ZHANG, "channel": "nowhere"}), 201)
        ok(admin.put("/channels/old", json={"title": "old", "kind": "list", "active": False}))
        refused(sales.post("/leads", json={**ZHANG, "channel": "old"}), 409, "channel-closed")

    def test_a_batch_takes_and_refuses_each_item_by_itself(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        leads = [
            ZHANG,
            {"channel": "expo", "phone": "not a number"},
            {"channel": "expo", "shoe_size": 42},
            "text",
            {"channel": "expo", "email": "zhang.wei@example.com"},
            {"channel": "nowhere", "phone": "13900139000"},
            {"channel": "expo"},
            {"channel": "expo", "phone": "13900139000", "captured_at": "2030-01-01T00:00:00Z"},
        ]
        headers = {"Idempotency-Key": "batch-1"}
        body = ok(sales.post("/leads/batch", json={"leads": leads}, headers=headers))
        assert [each["status"] for each in body["items"]] == [201, 422, 422, 422, 201, 409, 409, 409]
        assert body["summary"] == {"captured": 1, "merged": 1, "repeated": 0, "refused": 6}
        fields = [[e["field"] for e in each["problem"]["errors"]] for each in body["items"][1:4]]
        assert fields == [["phone"], ["shoe_size"], [""]]
        assert [each["problem"]["slug"] for each in body["items"][5:]] == ["unknown-channel", "nobody", "in-the-future"]
        assert body["items"][4]["result"]["rule"] == "exact_email"
        again = ok(sales.post("/leads/batch", json={"leads": leads}, headers=headers))
        assert again["summary"] == {"captured": 0, "merged": 0, "repeated": 2, "refused": 6}
        assert again["items"][0]["result"] == body["items"][0]["result"]
        assert service.types().count("lead.captured") == 2

    def test_a_batch_is_bounded(self, admin: httpx.Client, sales: httpx.Client) -> None:
        refused(sales.post("/leads/batch", json={"leads": [{}] * 1001}), 422, "invalid")
        refused(sales.post("/leads/batch", json={"leads": []}), 422, "invalid")

    def test_business_time_is_the_callers(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        ok(sales.post("/leads", json={**ZHANG, "captured_at": "2024-05-01T08:00:00+08:00"}), 201)
        assert service.events()[-1].time == datetime(2024, 5, 1, tzinfo=UTC)
        assert service.events()[-1].recorded >= NOW


@pytest.mark.req("LI-05")
class TestDuplicates:
    def test_the_same_phone_in_another_spelling_is_the_same_customer(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        first = ok(sales.post("/leads", json=ZHANG), 201)
        second = ok(sales.post("/leads", json={"channel": "friends", "phone": "0086-13800138000"}), 201)
        assert second["outcome"] == "merged" and second["rule"] == "exact_phone"
        assert second["customer_id"] == first["customer_id"]
        assert second["customer_number"] == first["customer_number"]
        assert second["survivor_lead_id"] == first["lead_id"]
        merged = ok(sales.get(f"/leads/{second['lead_id']}"))
        assert merged["status"] == "merged" and merged["survivor_lead_id"] == first["lead_id"]
        service.project()
        customer = ok(sales.get(f"/customers/{first['customer_id']}"))
        assert customer["customer_number"] == "CRM202405001" and customer["kind"] == "company"
        assert {lead["lead_id"]: lead["status"] for lead in customer["leads"]} == {
            first["lead_id"]: "open",
            second["lead_id"]: "merged",
        }

    def test_a_merge_teaches_what_else_the_customer_is_known_by(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        first = ok(sales.post("/leads", json={"channel": "expo", "phone": "13800138000"}), 201)
        both = ok(sales.post("/leads", json={"channel": "expo", "phone": "13800138000", "email": "z@example.com"}), 201)
        by_email = ok(sales.post("/leads", json={"channel": "expo", "email": "Z@example.com"}), 201)
        assert {both["customer_id"], by_email["customer_id"]} == {first["customer_id"]}
        assert by_email["rule"] == "exact_email"

    def test_phone_and_email_of_two_customers_go_to_the_phones(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        by_phone = ok(sales.post("/leads", json={"channel": "expo", "phone": "13800138000"}), 201)
        by_email = ok(sales.post("/leads", json={"channel": "expo", "email": "z@example.com"}), 201)
        both = ok(sales.post("/leads", json={"channel": "expo", "phone": "13800138000", "email": "z@example.com"}), 201)
        assert both["customer_id"] == by_phone["customer_id"] and both["rule"] == "exact_phone"
        again = ok(sales.post("/leads", json={"channel": "expo", "email": "z@example.com"}), 201)
        assert again["customer_id"] == by_email["customer_id"]

    def test_after_a_rejection_the_next_capture_opens_a_lead(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        first = ok(sales.post("/leads", json=ZHANG), 201)
        rejected = ok(sales.post(f"/leads/{first['lead_id']}/rejection", json={"reason": "no_budget"}))
        assert rejected["status"] == "rejected" and rejected["rejection_reason"] == "no_budget"
        second = ok(sales.post("/leads", json=ZHANG), 201)
        assert second["outcome"] == "captured" and second["customer_id"] == first["customer_id"]
        third = ok(sales.post("/leads", json=ZHANG), 201)
        assert third["outcome"] == "merged" and third["survivor_lead_id"] == second["lead_id"]

    def test_captures_of_one_person_at_the_same_time_end_as_one_customer(
        self, service: Service, settings: LeadIntakeSettings, admin: httpx.Client
    ) -> None:
        """Two processes of the API, so that the batches of one gate cannot put them in order."""
        with running(settings) as url:
            token = issue_token(SECRET, "u1", [Role.SALES])
            headers = {"Authorization": f"Bearer {token}"}

            def capture(number: int) -> dict[str, Any]:
                base = (service.url, url)[number % 2]
                person = {
                    "channel": "expo",
                    "phone": f"1380013{number // 8:04d}",
                    "email": f"p{number // 8}@example.com",
                }
                with httpx.Client(base_url=base, headers=headers, timeout=30) as client:
                    return ok(client.post("/leads", json=person), 201)

            with ThreadPoolExecutor(8) as pool:
                captured = list(pool.map(capture, range(80)))
        for person in range(10):
            same = captured[person * 8 : person * 8 + 8]
            assert len({each["customer_id"] for each in same}) == 1
            assert [each["outcome"] for each in same].count("captured") == 1
            survivor = next(each["lead_id"] for each in same if each["outcome"] == "captured")
            assert {each.get("survivor_lead_id", survivor) for each in same} == {survivor}
        numbers = [event.number for event in service.of(CustomerRegistered)]
        assert len(numbers) == len(set(numbers)) == 10
        assert len(service.of(LeadCaptured)) == 80 and len(service.of(LeadMerged)) == 70
        assert service.rows("SELECT count(*) FROM contact_index") == [(20,)]


@pytest.mark.req("LI-05")
@pytest.mark.parametrize("seed", range(4))
def test_in_whatever_order_and_batches_captures_come_everybody_is_one_customer(
    service: Service, admin: httpx.Client, seed: int
) -> None:
    """Six people with a phone each, and an email in half of their captures."""
    chance = random.Random(seed)
    captures = [
        {"channel": "expo", "phone": f"1380013800{person}", "name": str(person)}
        | ({"email": f"p{person}@example.com"} if n % 2 else {})
        for person in range(6)
        for n in range(6)
    ]
    chance.shuffle(captures)
    told: list[tuple[str, dict[str, Any]]] = []
    while captures:
        some, captures = captures[: (size := chance.randint(1, 12))], captures[size:]
        items = ok(admin.post("/leads/batch", json={"leads": some}))["items"]
        told += [(lead["name"], item["result"]) for lead, item in zip(some, items, strict=True)]
    for person in map(str, range(6)):
        own = [result for name, result in told if name == person]
        assert len({result["customer_id"] for result in own}) == 1
        assert [result["outcome"] for result in own] == ["captured"] + ["merged"] * 5
        assert {result["survivor_lead_id"] for result in own[1:]} == {own[0]["lead_id"]}
    assert len(service.of(CustomerRegistered)) == 6


@pytest.mark.req("LI-06")
def test_numbers_are_unique_over_restarts_and_begin_anew_each_month(
    service: Service, settings: LeadIntakeSettings, admin: httpx.Client, sales: httpx.Client
) -> None:
    def capture(client: httpx.Client) -> str:
        return str(ok(client.post("/leads", json={"channel": "expo", "name": "somebody"}), 201)["customer_number"])

    first = [capture(sales) for _ in range(12)]
    assert first[:3] == ["CRM202405001", "CRM202405002", "CRM202405003"]
    with running(settings) as url, httpx.Client(base_url=url, headers=sales.headers) as client:
        second = [capture(client) for _ in range(3)]
        DevelopmentClock(settings.clock_file or Path()).set(datetime(2024, 5, 31, 16, 0, 1, tzinfo=UTC))
        until(lambda: capture(client) == "CRM202406001")
    assert len({*first, *second}) == 15
    assert all(number.startswith("CRM202405") for number in second)


class TestReading:
    def test_who_sees_what(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        lead_id = ok(sales.post("/leads", json={**ZHANG, "note": "private"}), 201)["lead_id"]
        service.project()
        with service.client(Role.ANALYST) as analyst, service.client(Role.FINANCE) as finance:
            lead = ok(analyst.get(f"/leads/{lead_id}"))
            assert lead["masked"] is True and "raw_contact" not in lead
            assert lead["contact"] == {"name": "张**", "phone": "+86138****8000", "email": "Z***@example.com"}
            (line,) = ok(analyst.get("/leads"))["items"]
            assert line["name"] == "张**" and line["phone"] == "+86138****8000"
            refused(analyst.post("/leads", json=ZHANG), 403, "not-allowed")
            refused(finance.get(f"/leads/{lead_id}"), 403, "not-allowed")
        (line,) = ok(sales.get("/leads"))["items"]
        assert line["name"] == "张伟" and line["phone"] == "+8613800138000"
        refused(httpx.get(f"{service.url}/leads/{lead_id}"), 401, "not-authenticated")

    def test_lists_page_and_filter(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        for n in range(7):
            channel = "expo" if n % 2 else "friends"
            ok(sales.post("/leads", json={"channel": channel, "phone": f"1380013800{n}"}), 201)
        merged = ok(sales.post("/leads", json={"channel": "expo", "phone": "13800138000"}), 201)
        service.project()
        seen: list[str] = []
        page: dict[str, Any] = {"next": ""}
        while page["next"] is not None:
            query = {"limit": 3, **({"cursor": page["next"]} if page["next"] else {})}
            page = ok(sales.get("/leads", params=query))
            seen += [item["lead_id"] for item in page["items"]]
        assert len(seen) == len(set(seen)) == 8
        assert len(ok(sales.get("/leads", params={"channel": "expo"}))["items"]) == 4
        assert [i["lead_id"] for i in ok(sales.get("/leads", params={"status": "merged"}))["items"]] == [
            merged["lead_id"]
        ]
        assert len(ok(sales.get("/leads", params={"rating": "warm", "channel": "friends"}))["items"]) == 4
        assert len(ok(sales.get("/leads", params={"customer_id": merged["customer_id"]}))["items"]) == 2
        refused(sales.get("/leads", params={"cursor": "x"}), 400, "bad-cursor")
        refused(sales.get("/leads", params={"colour": "red"}), 422, "invalid")

    def test_a_rebuilt_list_is_the_same(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        first = ok(sales.post("/leads", json=ZHANG), 201)
        ok(sales.post("/leads", json=ZHANG), 201)
        ok(sales.post(f"/leads/{first['lead_id']}/rejection", json={"reason": "no_budget"}))
        service.project()
        before = service.rows("SELECT * FROM leads_v1 ORDER BY lead_id")
        Projector(service.parts.store, Leads()).rebuild()
        assert service.rows("SELECT * FROM leads_v1 ORDER BY lead_id") == before
        assert len(before) == 2

    def test_what_is_not_there(self, sales: httpx.Client) -> None:
        refused(sales.get(f"/leads/{uuid4()}"), 404, "lead-not-found")
        refused(sales.get(f"/customers/{uuid4()}"), 404, "customer-not-found")
        refused(sales.get("/leads/1"), 422, "invalid")
        refused(sales.post(f"/leads/{uuid4()}/rejection", json={"reason": "x"}), 404, "lead-not-found")

    def test_the_channel_catalogue(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        assert [c["channel"] for c in ok(sales.get("/channels"))["items"]] == ["expo", "friends"]
        ok(admin.put("/channels/expo", json={"title": "expo", "kind": "trade_fair"}))
        assert len(service.of(ChannelDefined)) == 2, "the same again is nothing new"
        refused(sales.put("/channels/mine", json={"title": "x", "kind": "list"}), 403, "not-allowed")
        refused(admin.put("/channels/No Code", json={"title": "x", "kind": "list"}), 422, "invalid")


class TestUpdate:
    def test_if_match_decides_between_two_writers(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        lead_id = ok(sales.post("/leads", json=ZHANG), 201)["lead_id"]
        etag = sales.get(f"/leads/{lead_id}").headers["etag"]
        changed = sales.patch(f"/leads/{lead_id}", json={"title": "总经理"}, headers={"If-Match": etag})
        assert ok(changed)["title"] == "总经理"
        assert changed.headers["etag"] == '"2"'
        lost = sales.patch(f"/leads/{lead_id}", json={"title": "董事"}, headers={"If-Match": etag})
        refused(lost, 412, "version-conflict")
        assert ok(sales.get(f"/leads/{lead_id}"))["title"] == "总经理"

    def test_a_new_contact_is_cleaned_sealed_and_recognised(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        first = ok(sales.post("/leads", json=ZHANG), 201)
        changed = ok(sales.patch(f"/leads/{first['lead_id']}", json={"phone": "139 0013 9000"}))
        assert changed["contact"]["phone"] == "+8613900139000" and changed["contact"]["name"] == "张伟"
        for phone in ("13900139000", "13800138000"):
            assert (
                ok(sales.post("/leads", json={"channel": "expo", "phone": phone}), 201)["customer_id"]
                == first["customer_id"]
            )
        refused(sales.patch(f"/leads/{first['lead_id']}", json={"phone": "x"}), 422, "invalid")
        refused(sales.patch(f"/leads/{first['lead_id']}", json={"phone": None}), 422, "invalid")

    def test_a_merged_lead_is_not_worked_on(self, admin: httpx.Client, sales: httpx.Client) -> None:
        ok(sales.post("/leads", json=ZHANG), 201)
        merged = ok(sales.post("/leads", json=ZHANG), 201)["lead_id"]
        refused(sales.patch(f"/leads/{merged}", json={"title": "x"}), 409, "lead-merged")
        refused(sales.post(f"/leads/{merged}/rejection", json={"reason": "x"}), 409, "lead-merged")

    def test_a_rejection_resent_is_one(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)["lead_id"]
        for _ in range(2):
            ok(sales.post(f"/leads/{lead}/rejection", json={"reason": "no_budget"}))
        assert len(service.of(LeadRejected)) == 1


@pytest.mark.req("LI-02")
class TestBehaviours:
    def test_each_is_taken_or_refused_by_itself(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)
        other = ok(sales.post("/leads", json={"channel": "expo", "name": "other"}), 201)
        behaviours = [
            {"kind": "page_viewed", "lead_id": lead["lead_id"], "object": "/pricing", "duration_seconds": 12.5},
            {"kind": "demo_attended", "customer_id": lead["customer_id"], "occurred_at": "2024-04-30T23:59:00Z"},
            {"kind": "page_viewed", "lead_id": str(uuid4())},
            {"kind": "page_viewed", "customer_id": str(uuid4())},
            {"kind": "page_viewed"},
            {"kind": "page_viewed", "lead_id": lead["lead_id"], "customer_id": other["customer_id"]},
            {"kind": "page_viewed", "lead_id": lead["lead_id"], "occurred_at": (NOW + timedelta(hours=1)).isoformat()},
            {"kind": "page_viewed", "lead_id": 5},
        ]
        headers = {"Idempotency-Key": "b-1"}
        body = ok(sales.post("/behaviours", json={"behaviours": behaviours}, headers=headers))
        slugs = [each.get("problem", {}).get("slug") for each in body["items"]]
        assert slugs == [
            *[None, None, "lead-not-found", "customer-not-found", "customer-not-found"],
            *["another-customer", "in-the-future", "invalid"],
        ]
        assert body["summary"] == {"captured": 2, "merged": 0, "repeated": 0, "refused": 6}
        again = ok(sales.post("/behaviours", json={"behaviours": behaviours}, headers=headers))
        assert again["summary"]["repeated"] == 2
        recorded = [r for r in service.events() if r.is_a(BehaviourRecorded)]
        assert {r.stream for r in recorded} == {
            f"activity-{lead['customer_id']}-202405",
            f"activity-{lead['customer_id']}-202404",
        }
        assert {r.partition_key for r in recorded} == {lead["customer_id"]}
        assert min(r.time for r in recorded) == datetime(2024, 4, 30, 23, 59, tzinfo=UTC)

    def test_the_senders_id_makes_it_one(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)["lead_id"]
        behaviour = {"kind": "page_viewed", "lead_id": lead, "behaviour_id": str(uuid4())}
        both = ok(sales.post("/behaviours", json={"behaviours": [behaviour, behaviour]}))
        assert both["summary"] == {"captured": 1, "merged": 0, "repeated": 1, "refused": 0}
        assert ok(sales.post("/behaviours", json={"behaviours": [behaviour]}))["summary"]["repeated"] == 1
        assert len(service.of(BehaviourRecorded)) == 1

    def test_a_file_of_behaviours(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)["lead_id"]
        lines = [json.dumps({"kind": "page_viewed", "lead_id": lead, "object": f"/{n}"}) for n in range(1200)]
        lines[16] = "{broken"
        headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": "bf-1"}
        for counts in ((1199, 0), (0, 1199)):
            response = admin.post("/behaviours/import", content="\n".join(lines).encode(), headers=headers)
            *rows, last = [json.loads(line) for line in response.text.splitlines()]
            assert (last["summary"]["captured"], last["summary"]["repeated"]) == counts
            assert [row["row"] for row in rows if row["outcome"] == "refused"] == [17]
        assert len(service.of(BehaviourRecorded)) == 1199


@pytest.mark.req("LI-11")
class TestErasure:
    def test_nothing_personal_can_be_read_again_and_numbers_stay(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)
        ok(sales.post("/leads", json=ZHANG), 201)
        url = f"/customers/{lead['customer_id']}/erasure"
        refused(sales.post(url, json={"reason": "pipl"}), 403, "not-allowed")
        refused(admin.post(f"/customers/{uuid4()}/erasure", json={"reason": "pipl"}), 404, "customer-not-found")
        for _ in range(2):
            assert ok(admin.post(url, json={"reason": "pipl"}))["erased"] is True
        assert len(service.of(CustomerErasureRequested)) == len(service.of(CustomerErased)) == 1
        gone = ok(sales.get(f"/leads/{lead['lead_id']}"))
        assert gone["erased"] is True and "contact" not in gone and gone["company"] == "星辰科技有限责任公司"
        service.project()
        assert ok(sales.get(f"/customers/{lead['customer_id']}"))["erased"] is True
        assert len(ok(sales.get("/leads"))["items"]) == 2, "counts stay"
        assert service.rows("SELECT count(*) FROM contact_index") == [(0,)]
        assert service.rows("SELECT wrapped, destroyed_at IS NULL FROM customer_keys") == [(None, False)]
        anew = ok(sales.post("/leads", json=ZHANG), 201)
        assert anew["outcome"] == "captured" and anew["customer_id"] != lead["customer_id"]
        assert anew["customer_number"] == "CRM202405002"
        behaviour = {"kind": "page_viewed", "customer_id": lead["customer_id"]}
        (item,) = ok(sales.post("/behaviours", json={"behaviours": [behaviour]}))["items"]
        assert item["problem"]["slug"] == "customer-erased"
        refused(sales.patch(f"/leads/{lead['lead_id']}", json={"name": "again"}), 409, "conflict")

    def test_a_process_that_remembers_the_key_does_not_write_with_it(
        self, service: Service, settings: LeadIntakeSettings, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)
        with running(settings) as url, httpx.Client(base_url=url, headers=admin.headers) as elsewhere:
            ok(elsewhere.get(f"/leads/{lead['lead_id']}"))  # now the other process holds the key
            ok(admin.post(f"/customers/{lead['customer_id']}/erasure", json={"reason": "pipl"}))
            refused(elsewhere.patch(f"/leads/{lead['lead_id']}", json={"name": "again"}), 409, "conflict")
            anew = ok(elsewhere.post("/leads", json=ZHANG), 201)
        assert anew["customer_id"] != lead["customer_id"]

    def test_no_personal_data_lies_anywhere_in_the_clear(
        self, service: Service, admin: httpx.Client, sales: httpx.Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        ok(sales.post("/leads", json={**ZHANG, "note": "geheim-note"}, headers={"Idempotency-Key": "k"}), 201)
        refused(sales.post("/leads", json={**ZHANG, "phone": "geheim-phone"}), 422, "invalid")
        body = "手机,渠道\n13800138000,expo\ngeheim-csv,expo\n".encode()
        admin.post("/imports", content=body, headers={"Content-Type": "text/csv"})
        service.project()
        tables = service.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        everything = "".join(str(service.rows(f'SELECT t::text FROM "{table}" t')) for (table,) in tables)
        stored = "".join(str(dict(r.attributes)) for r in service.events())
        metrics = httpx.get(f"{service.url}/metrics").text
        for secret in ("张伟", "13800138000", "Zhang.Wei", "geheim"):
            for place in (everything, stored, metrics, caplog.text):
                assert secret not in place, secret
                assert secret.encode().hex() not in place, secret


class TestKeys:
    def test_only_the_suites_services_get_keys(
        self, service: Service, admin: httpx.Client, sales: httpx.Client
    ) -> None:
        lead = ok(sales.post("/leads", json=ZHANG), 201)
        body = {"customer_ids": [lead["customer_id"], str(uuid4())]}
        refused(sales.post("/keys/lookup", json=body), 403, "not-allowed")
        refused(admin.post("/keys/lookup", json=body), 403, "not-allowed")
        with service.client(Role.SYSTEM, subject="scoring") as system:
            keys = ok(system.post("/keys/lookup", json=body))["keys"]
            assert [k is None for k in keys.values()] == [False, True]
            refused(system.post("/keys/lookup", json={"customer_ids": ["x"] * 501}), 422, "invalid")
            captured = [r for r in service.events() if r.is_a(LeadCaptured)]
            (event,) = open_events(captured, HttpKeyring(system))
        assert isinstance(event, LeadCaptured) and event.contact.plain.name == "张伟"


def lines_of(response: httpx.Response) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    assert response.status_code == 200, response.text
    *rows, last = [json.loads(line) for line in response.text.splitlines()]
    summary: dict[str, Any] = last["summary"]
    return rows, summary


def unchunked(raw: bytes) -> bytes:
    """The body of an answer with Transfer-Encoding: chunked."""
    rest, body = raw.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


NDJSON = {"Content-Type": "application/x-ndjson"}
CSV = {"Content-Type": "text/csv"}


@pytest.mark.req("LI-01")
class TestImport:
    def test_a_broken_row_17_stops_nobody(self, service: Service, admin: httpx.Client) -> None:
        people = [json.dumps({"name": f"p{n}", "phone": f"1380013{n:04d}", "channel": "expo"}) for n in range(40)]
        people[16] = '{"name": "p16", "phone": "13'
        people[20] = json.dumps({"phone": "13800130000", "channel": "expo"})
        people[21] = json.dumps({"phone": "12", "email": "nobody", "channel": "expo"})
        people[22] = json.dumps({"phone": 13800138000, "channel": "expo"})
        rows, summary = lines_of(admin.post("/imports", content="\n".join(people).encode(), headers=NDJSON))
        assert [row["row"] for row in rows] == list(range(1, 41))
        assert summary["complete"] is True and summary["rows"] == 40
        assert [summary[word] for word in ("captured", "merged", "repeated", "refused")] == [36, 1, 0, 3]
        assert rows[16]["outcome"] == "refused" and rows[16]["slug"] == "not-json"
        assert rows[20]["outcome"] == "merged" and rows[20]["survivor_lead_id"] == rows[0]["lead_id"]
        assert [e["field"] for e in rows[21]["errors"]] == ["phone", "email"]
        assert rows[22]["errors"] == [{"field": "phone", "reason": "must be text"}]
        (started,), (completed,) = service.of(ImportStarted), service.of(ImportCompleted)
        assert started.format == "ndjson"
        assert (completed.captured, completed.merged, completed.refused, completed.repeated) == (36, 1, 3, 0)
        captured = service.of(LeadCaptured)
        assert {event.import_id for event in captured} == {started.import_id}
        assert {event.source for event in captured} == {"import"}

    def test_sent_twice_mended_and_with_a_row_changed(self, service: Service, admin: httpx.Client) -> None:
        people = [f"p{n},1380013{n:04d}" for n in range(700)]
        people[16] = "p16,12"
        key = {**CSV, "Idempotency-Key": "file-1"}

        def send() -> tuple[list[dict[str, Any]], dict[str, Any]]:
            body = "\n".join(["name,phone", *people]).encode()
            return lines_of(admin.post("/imports", params={"channel": "expo"}, content=body, headers=key))

        first, summary = send()
        assert (summary["captured"], summary["refused"]) == (699, 1)
        again, summary = send()
        assert (summary["captured"], summary["repeated"], summary["refused"]) == (0, 699, 1)
        assert [row.get("lead_id") for row in again] == [row.get("lead_id") for row in first]
        people[16], people[3] = "p16,13800130016", "somebody else,13900139000"
        mended, summary = send()
        assert (summary["captured"], summary["repeated"], summary["refused"]) == (1, 698, 1)
        assert mended[3]["slug"] == "idempotency-key-reused"
        assert len(service.of(LeadCaptured)) == 700
        assert [event.captured for event in service.of(ImportCompleted)] == [699, 1]
        assert len(service.of(ImportStarted)) == 1

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
    def test_csv_as_spreadsheets_save_it(self, service: Service, admin: httpx.Client, encoding: str) -> None:
        text = (
            "姓名,手机号,邮箱,公司名称,职位,渠道,日期,facts.budget,utm_source\r\n"
            '张伟,138 0013 8000,z@example.com,"星辰(深圳)科技有限公司",采购经理,friends,2024/5/1,50000,baidu\r\n'
            '"李\n娜",13900139000,,=cmd|calc,,expo,,12.5,\r\n'
        )
        rows, summary = lines_of(admin.post("/imports", content=text.encode(encoding), headers=CSV))
        assert summary["captured"] == 2, rows
        first, second = (ok(admin.get(f"/leads/{row['lead_id']}")) for row in rows)
        assert first["contact"]["name"] == "张伟" and first["contact"]["phone"] == "+8613800138000"
        assert first["company"] == "星辰\uff08深圳\uff09科技有限公司"
        assert (first["facts"], first["utm"]) == ({"budget": 50000}, {"source": "baidu"})
        assert first["captured_at"] == "2024-04-30T16:00:00Z"
        assert second["contact"]["name"] == "李 娜" and second["company"] == "=cmd|calc"
        assert second["facts"] == {"budget": 12.5}
        assert [row["line"] for row in rows] == [2, 3]

    def test_a_hostile_csv_file(self, service: Service, admin: httpx.Client) -> None:
        body = (
            b"name,phone\n"
            b"fine,13800138000\n"
            b'"never closed,13800138001\n'
            b"nul\x00byte,13800138002\n"
            b"too,many,cells\n"
            b"one cell\n"
            b"\xff\xfe\xfd,13800138003\n" + b"x" * 100_000 + b",13800138004\n" + b"=1+1,13800138005\n"
            b"\xe2\x80\xaeevil,13800138006\n" + "👩\u200d💻,13800138007\n".encode() + b"last,13800138008"
        )
        rows, summary = lines_of(admin.post("/imports", params={"channel": "expo"}, content=body, headers=CSV))
        assert [row.get("slug", row["outcome"]) for row in rows] == [
            *["captured", "broken-quotes", "control-character", "ragged-row", "ragged-row", "not-decodable"],
            *["row-too-long", "captured", "captured", "captured", "captured"],
        ]
        assert summary["complete"] is True
        names = [ok(admin.get(f"/leads/{row['lead_id']}"))["contact"]["name"] for row in rows if "lead_id" in row]
        assert names == ["fine", "=1+1", "evil", "👩\u200d💻", "last"]

    @pytest.mark.parametrize(
        ("query", "headers", "body", "status", "slug"),
        [
            ({}, CSV, b"shoe size\n42\n", 422, "unknown-column"),
            ({}, CSV, b"", 422, "no-header"),
            ({}, CSV, "name\nA\n".encode("utf-16"), 422, "utf-16"),
            ({}, {"Content-Type": "application/pdf"}, b"x", 415, "unsupported-media-type"),
            ({"channel": "nowhere"}, NDJSON, b"{}", 409, "unknown-channel"),
            ({"encoding": "ebcdic"}, CSV, b"name\n", 422, "invalid"),
        ],
    )
    def test_a_file_that_cannot_be_taken_is_refused_as_a_whole(
        self,
        service: Service,
        admin: httpx.Client,
        query: dict[str, str],
        headers: dict[str, str],
        body: bytes,
        status: int,
        slug: str,
    ) -> None:
        refused(admin.post("/imports", params=query, content=body, headers=headers), status, slug)
        assert service.of(ImportStarted) == []

    def test_an_empty_file_and_rights(self, service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
        rows, summary = lines_of(admin.post("/imports", content=b"", headers=NDJSON))
        assert rows == [] and summary["complete"] is True and summary["rows"] == 0
        refused(sales.post("/imports", content=b"{}", headers=NDJSON), 403, "not-allowed")

    def test_outcomes_come_while_the_file_is_still_being_sent(self, service: Service, admin: httpx.Client) -> None:
        answered = threading.Event()
        row = b'{"name":"somebody","channel":"expo"}\n'

        def body() -> Iterator[bytes]:
            yield row * 600
            assert answered.wait(20), "no outcome came before the file ended"
            yield row * 10

        host = urlsplit(service.url)
        with socket.create_connection((host.hostname or "", host.port or 0), timeout=60) as connection:
            head = (
                f"POST /imports HTTP/1.1\r\nHost: x\r\nAuthorization: {admin.headers['Authorization']}\r\n"
                "Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            connection.sendall(head.encode())

            def send() -> None:
                for piece in body():
                    connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                connection.sendall(b"0\r\n\r\n")

            sender = threading.Thread(target=send)
            sender.start()
            received = b""
            while piece := connection.recv(1 << 16):
                received += piece
                if b'"outcome":"captured"' in received:
                    answered.set()
                if received.endswith(b"0\r\n\r\n"):
                    break
            sender.join(timeout=10)
        assert unchunked(received).count(b'"outcome":"captured"') == 610

    def test_cut_off_in_the_middle_it_goes_on_where_it_stopped(self, service: Service, admin: httpx.Client) -> None:
        rows = [b'{"name":"p%d","phone":"1380%07d","channel":"expo"}\n' % (n, n) for n in range(3000)]
        headers = {**NDJSON, "Idempotency-Key": "cut"}

        class Cut(Exception):
            pass

        def body() -> Iterator[bytes]:
            yield b"".join(rows[:1700])
            until(lambda: len(service.of(LeadCaptured)) >= 1500)
            raise Cut

        with pytest.raises(Cut):
            admin.post("/imports", content=body(), headers=headers)
        taken = len(service.of(LeadCaptured))
        assert 1500 <= taken < 3000 and service.of(ImportCompleted) == []
        told, summary = lines_of(admin.post("/imports", content=b"".join(rows), headers=headers))
        assert summary["complete"] is True and summary["captured"] + summary["repeated"] == 3000
        assert summary["repeated"] >= taken
        assert len({row["lead_id"] for row in told}) == 3000 == len(service.of(LeadCaptured))
        assert len({event.number for event in service.of(CustomerRegistered)}) == 3000

    def test_two_files_with_the_same_people_at_once(self, service: Service, admin: httpx.Client) -> None:
        forwards = [b'{"phone":"1380%07d","email":"p%d@example.com","channel":"expo"}\n' % (n, n) for n in range(2000)]

        def send(rows: list[bytes]) -> dict[str, Any]:
            with service.client(Role.ADMIN) as client:
                return lines_of(client.post("/imports", content=b"".join(rows), headers=NDJSON))[1]

        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(send, (forwards, forwards[::-1]))
        assert one["captured"] + two["captured"] == 2000 == one["merged"] + two["merged"]
        assert len({event.customer_id for event in service.of(CustomerRegistered)}) == 2000

    def test_the_database_going_away_for_a_moment_costs_no_row(
        self, service: Service, admin: httpx.Client, database: str
    ) -> None:
        rows = [b'{"name":"p%d","channel":"expo"}\n' % n for n in range(4000)]

        def body() -> Iterator[bytes]:
            yield b"".join(rows[:2000])
            until(lambda: len(service.of(LeadCaptured)) >= 500)
            with psycopg.connect(database, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            yield b"".join(rows[2000:])

        told, summary = lines_of(admin.post("/imports", content=body(), headers=NDJSON))
        assert summary["complete"] is True, summary
        assert summary["captured"] + summary["repeated"] == 4000
        assert len(service.of(LeadCaptured)) == 4000 == len({row["lead_id"] for row in told})


HOSTILE: list[tuple[bytes, int, str]] = [
    (b"{", 400, "not-json"),
    (b"[]", 422, "invalid"),
    (b"null", 422, "invalid"),
    (b'{"channel":"expo","phone":13800138000}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","colour":"red"}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","name":"B"}', 400, "not-json"),
    (b'{"channel":"expo","name":"A\\u0000B"}', 400, "not-json"),
    (b'{"channel":"expo","name":"A\\u0007B"}', 422, "invalid"),
    (b'{"channel":"expo","name":"\\ud800"}', 400, "not-json"),
    (b'{"channel":"expo","name":"A","facts":{"x":NaN}}', 400, "not-json"),
    (b'{"channel":"expo","name":"A","facts":{"x":1e999}}', 400, "not-json"),
    (b'{"channel":"expo","name":"A","facts":{"x":{"y":1}}}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","facts":{"Not A Code":1}}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","facts":{"x":99999999999999999}}', 422, "invalid"),
    (b'{"channel":"expo","name":"' + b"x" * 501 + b'"}', 422, "invalid"),
    (b'{"channel":"EXPO","name":"A"}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","captured_at":"yesterday"}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","captured_at":"2024-05-01T00:00:00"}', 422, "invalid"),
    (b'{"channel":"expo","name":"A","captured_at":1714521600}', 422, "invalid"),
    (b'{"channel":"expo"}', 409, "nobody"),
    (b'{"channel":"expo","name":" "}', 409, "nobody"),
    (b"[" * 100_000, 400, "not-json"),
    (b'{"channel":"expo","name":"' + b"x" * 2_000_000 + b'"}', 413, "too-large"),
    (b"", 422, "invalid"),
]


def test_hostile_input_is_refused_clearly(service: Service, admin: httpx.Client, sales: httpx.Client) -> None:
    for body, status, slug in HOSTILE:
        sent = sales.post("/leads", content=body, headers={"Content-Type": "application/json"})
        problem = refused(sent, status, slug)
        assert slug != "invalid" or all(error["reason"] for error in problem["errors"]), body[:80]
    assert service.of(LeadCaptured) == []


def test_unusual_names_are_stored_as_they_are(admin: httpx.Client, sales: httpx.Client) -> None:
    for name in (
        "👩\u200d💻",
        "مريم العربية",
        "=HYPERLINK(1)",
        "'; DROP TABLE leads_v1; --",
        "<script>alert(1)</script>",
        "𠮷",
    ):
        lead_id = ok(sales.post("/leads", json={"channel": "expo", "name": name}), 201)["lead_id"]
        assert ok(sales.get(f"/leads/{lead_id}"))["contact"]["name"] == name


def test_every_command_is_in_the_table_of_contents(service: Service) -> None:
    made = service.parts
    table = handlers(made.store, made.keyring, b"k" * 32, made.clock)
    assert {kind.__name__ for kind in table} == {
        *{"CaptureLead", "UpdateLead", "RejectLead", "EraseCustomer", "RecordBehaviour", "DefineChannel"},
        *{"StartImport", "CompleteImport"},
    }
    assert isinstance(made.handler, CommandHandler)


def test_the_events_on_disk_are_those_of_the_catalogue(
    service: Service, admin: httpx.Client, sales: httpx.Client
) -> None:
    ok(sales.post("/leads", json=ZHANG), 201)
    for recorded in service.events():
        assert event_class(recorded.type).PRODUCER == "lead-intake"


def test_the_api_document_is_complete(service: Service) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()
    paths = document["paths"]
    assert {"/leads", "/leads/batch", "/imports", "/behaviours", "/keys/lookup", "/channels/{channel}"} <= set(paths)
    assert set(paths["/leads"]["post"]["responses"]) >= {"201", "400", "401", "403", "409", "413", "422", "503"}
