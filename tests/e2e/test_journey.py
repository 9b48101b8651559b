"""The way of leads through the whole suite, as its clients see it: captured, cleaned, recognised, scored, qualified, faded,
counted, and all of it still there after a restart."""

from __future__ import annotations

import csv
import io
import json
import re
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from kehu.kafka.topics import partition_of
from support.checker import Acknowledged, judge
from support.people import EAGER, FITTING, People
from support.suite import Suite, key
from support.traffic import Traffic
from support.waiting import until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def intake(suite: Suite) -> httpx.Client:
    return suite.client("lead-intake")


@pytest.fixture(scope="module")
def scoring(suite: Suite) -> httpx.Client:
    return suite.client("scoring", "sales")


@pytest.fixture(scope="module")
def analytics(suite: Suite) -> httpx.Client:
    return suite.client("analytics", "analyst")


def ok(response: httpx.Response) -> Any:
    """The JSON of a good answer."""
    assert response.is_success, f"{response.status_code}: {response.text}"
    return response.json()


def pages(client: httpx.Client, path: str, **query: Any) -> list[dict[str, Any]]:
    """All items of a paged list."""
    items: list[dict[str, Any]] = []
    page = ok(client.get(path, params=query))
    while True:
        items += page["items"]
        if page["next"] is None:
            return items
        page = ok(client.get(path, params={**query, "cursor": page["next"]}))


def do(intake: httpx.Client, lead_id: str, behaviours: Sequence[dict[str, Any]], start: datetime) -> None:
    """Record what somebody did, one a second."""
    did = [
        {**each, "lead_id": lead_id, "occurred_at": (start + timedelta(seconds=n)).isoformat()}
        for n, each in enumerate(behaviours)
    ]
    summary = ok(intake.post("/behaviours", json={"behaviours": did}))["summary"]
    assert summary["captured"] == len(behaviours), summary


@pytest.mark.req("LI-01")
@pytest.mark.req("DC-01")
@pytest.mark.req("SC-01")
@pytest.mark.req("PL-03")
def test_a_capture_goes_all_the_way(
    suite: Suite, intake: httpx.Client, scoring: httpx.Client, analytics: httpx.Client
) -> None:
    """From the request over the store and Kafka to score, timeline, live counters and lake, under one trace."""
    trace, person = secrets.token_hex(16), People(1).lead(channel="expo", **FITTING)
    headers = {**key(), "traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}
    answer = intake.post("/leads", json=person, headers=headers)
    assert answer.status_code == 201
    told = ok(answer)
    lead, customer = told["lead_id"], told["customer_id"]
    assert answer.headers["location"] == f"/leads/{lead}"

    again = intake.post("/leads", json=person, headers=headers)
    assert (again.status_code, again.json()) == (201, told)
    assert again.headers["idempotent-replayed"] == "true"
    another = intake.post("/leads", json={**person, "company": "另一家公司"}, headers=headers)
    assert (another.status_code, another.json()["slug"]) == (422, "idempotency-key-reused")

    suite.settle()
    stored = [row.recorded() for row in suite.log("lead-intake")]
    mine = [event for event in stored if event.customer_id == customer]
    assert [event.type for event in mine] == ["customer.registered.v1", "lead.captured.v1"]

    scores = [row.recorded() for row in suite.log("scoring") if row.recorded().customer_id == customer]
    assert [event.type for event in scores] == ["lead_score.changed.v1"]
    assert scores[0].causation_id == str(mine[1].id)
    assert {event.correlation_id for event in (*mine, *scores)} == {mine[0].correlation_id}
    assert {(event.traceparent or "")[3:35] for event in (*mine, *scores)} == {trace}

    records = [r for r in suite.records("lead-intake") if r.key == customer.encode()]
    assert [json.loads(r.value)["id"] for r in records] == [str(event.id) for event in mine]
    assert {r.partition for r in records} == {partition_of(customer.encode())}
    envelope, sent = json.loads(records[1].value), dict(records[1].headers)
    assert sent["content-type"] == b"application/cloudevents+json"
    assert {name: envelope[name] for name in ("specversion", "source", "type", "subject", "datacontenttype")} == {
        "specversion": "1.0",
        "source": "/kehu/lead-intake",
        "type": "lead.captured.v1",
        "subject": f"lead-{lead}",
        "datacontenttype": "application/json",
    }
    assert (envelope["partitionkey"], envelope["customerid"], envelope["streamversion"]) == (customer, customer, 1)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", envelope[t]) for t in ("time", "recordedtime"))
    assert list(envelope["data"]["contact"]) == ["sealed"]
    extensions = set(envelope) - {"data", "datacontenttype", "dataschema"}
    assert all(re.fullmatch(r"[a-z0-9]+", name) for name in extensions), "names that CloudEvents allows"

    score = ok(scoring.get(f"/leads/{lead}/score"))
    assert score["score"] == pytest.approx(sum(part["points"] for part in score["parts"]), abs=1e-9)
    assert score["score"] == scores[0].data["score"] > 0

    entries = pages(analytics, f"/customers/{customer}/timeline", limit=1)
    ids = [str(event.id) for event in (*mine, *scores)]
    assert sorted(entry["event_id"] for entry in entries) == sorted(ids)
    assert sorted(suite.lake().timeline(customer)["id"].to_pylist()) == sorted(ids)
    minute = mine[1].time.replace(second=0, microsecond=0)
    counted = ok(analytics.get("/counters", params={"type": "lead.captured.v1", "since": minute.isoformat()}))["items"]
    day = [row.recorded() for row in suite.log("lead-intake") if row.type == "lead.captured.v1"]
    expected = Counter(event.time.replace(second=0, microsecond=0) for event in day)
    assert {datetime.fromisoformat(item["bucket"]): item["events"] for item in counted} == {
        at: events for at, events in expected.items() if at >= minute
    }


@pytest.mark.req("LI-01")
@pytest.mark.req("LI-04")
@pytest.mark.req("LI-05")
@pytest.mark.req("LI-06")
@pytest.mark.req("LI-08")
def test_a_batch_with_people_who_are_known(suite: Suite, intake: httpx.Client, scoring: httpx.Client) -> None:
    """By phone in another spelling or by email, within the batch and from before; each is told by itself."""
    crowd = People(2)
    known, fresh, broken = (crowd.lead(channel="expo") for _ in range(3))
    phone = "+86 " + known["phone"].replace(" ", "")
    first = ok(intake.post("/leads", json={**known, "phone": phone, "company": "星辰科技有限責任公司"}, headers=key()))
    batch = [
        {**known, "name": "ＷＡＮＧ", "email": None},
        fresh,
        {"channel": "expo", "email": fresh["email"].upper(), "company": "别的公司"},
        {**broken, "phone": "not a number"},
        {**broken, "channel": "nowhere"},
    ]
    headers = key()
    answer = ok(intake.post("/leads/batch", json={"leads": batch}, headers=headers))
    assert answer["summary"] == {"captured": 1, "merged": 2, "repeated": 0, "refused": 2}
    results = [item.get("result") for item in answer["items"]]
    assert results[0]["survivor_lead_id"] == first["lead_id"]
    assert (results[0]["rule"], results[2]["rule"]) == ("exact_phone", "exact_email")
    assert results[2]["survivor_lead_id"] == results[1]["lead_id"]
    assert answer["items"][3]["problem"]["errors"][0]["field"] == "phone"
    assert answer["items"][4]["problem"]["slug"] == "unknown-channel"
    resent = ok(intake.post("/leads/batch", json={"leads": batch}, headers=headers))
    assert resent["summary"] == {"captured": 0, "merged": 0, "repeated": 3, "refused": 2}
    assert [item.get("result") for item in resent["items"]] == results

    suite.settle()
    number = first["customer_number"]
    assert re.fullmatch(rf"CRM{suite.clock.now() + timedelta(hours=8):%Y%m}\d{{3,9}}", number)
    assert results[0]["customer_number"] == number != results[1]["customer_number"]
    customer = ok(intake.get(f"/customers/{first['customer_id']}"))
    assert sorted(lead["status"] for lead in customer["leads"]) == ["merged", "open"]
    shown = ok(intake.get(f"/leads/{first['lead_id']}"))
    assert shown["contact"]["phone"] == phone.replace(" ", "")
    assert shown["raw_contact"]["phone"] == phone, "the raw input stands beside the correction"
    assert {"field": "company", "before": "星辰科技有限責任公司"}.items() <= next(
        c for c in shown["corrections"] if c["field"] == "company"
    ).items()
    assert shown["rating"] == "hot", "a referral of whom we know phone, email and company"
    merged = ok(scoring.get(f"/leads/{results[0]['lead_id']}/score"))
    assert merged["lead_id"] == first["lead_id"], "the score of a merged lead is that of the one that goes on"


@pytest.mark.req("LI-01")
@pytest.mark.req("LI-05")
@pytest.mark.parametrize("form", ["csv", "ndjson"])
def test_a_file_with_a_broken_row_17(
    suite: Suite, intake: httpx.Client, scoring: httpx.Client, analytics: httpx.Client, form: str
) -> None:
    channel, crowd = f"file_{form}", People(3 if form == "csv" else 4)
    suite.define_channel(channel, "trade_fair")
    people = [crowd.lead() for _ in range(40)]
    people[16]["phone"] = "not a number"
    people[29] |= {"phone": people[4]["phone"], "email": people[4]["email"]}  # the same person once more
    headers = {**key(), "Content-Type": "text/csv" if form == "csv" else "application/x-ndjson"}
    lines = ok_lines(intake, f"/imports?channel={channel}", _file(people, form), headers)
    *rows, closing = lines
    assert [row["outcome"] for row in rows] == ["captured"] * 16 + ["refused"] + ["captured"] * 12 + ["merged"] + [
        "captured"
    ] * 10
    assert rows[16] | {"slug": ""} == {
        "row": 17,
        "line": 18 if form == "csv" else 17,
        "outcome": "refused",
        "slug": "",
        "errors": [{"field": "phone", "reason": "is not a telephone number"}],
    }
    assert rows[29]["survivor_lead_id"] == rows[4]["lead_id"]
    told = {"complete": True, "rows": 40, "captured": 38, "merged": 1, "repeated": 0, "refused": 1}
    assert told.items() <= closing["summary"].items()

    people[16]["phone"] = "13912345678" if form == "csv" else "13912345679"  # mended, and the whole file sent again
    *again, closing = ok_lines(intake, f"/imports?channel={channel}", _file(people, form), headers)
    assert Counter(row["outcome"] for row in again) == {"repeated": 39, "captured": 1}
    assert all(
        row["lead_id"] == before["lead_id"] for row, before in zip(again, rows, strict=True) if "lead_id" in before
    )

    suite.settle()
    listed = pages(intake, "/leads", channel=channel, limit=15)
    assert {lead["lead_id"] for lead in listed} == {row["lead_id"] for row in again}
    assert Counter(lead["status"] for lead in listed) == {"open": 39, "merged": 1}
    assert all(ok(scoring.get(f"/leads/{lead['lead_id']}/score"))["score"] >= 0 for lead in listed)
    groups = {g["group"]: g for g in ok(analytics.get("/conversion/by-channel"))["items"]}
    assert groups[channel]["leads"] == 39, "a merged lead counts as the one that it became part of"


def ok_lines(client: httpx.Client, path: str, content: bytes, headers: dict[str, str]) -> list[dict[str, Any]]:
    """The lines of a good answer."""
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def _file(people: Sequence[dict[str, Any]], form: str) -> bytes:
    if form == "ndjson":
        return b"".join(json.dumps(person, ensure_ascii=False).encode() + b"\n" for person in people)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["姓名", "手机", "邮箱", "公司", "行业", "职位", "facts.budget", "facts.employees"])
    for p in people:
        fields = (p[name] for name in ("name", "phone", "email", "company", "industry", "title"))
        writer.writerow([*fields, p["facts"]["budget"], p["facts"]["employees"]])
    return out.getvalue().encode()


@pytest.mark.req("SC-01")
@pytest.mark.req("SC-02")
@pytest.mark.req("SC-03")
@pytest.mark.req("SC-04")
@pytest.mark.req("SC-07")
def test_a_score_rises_qualifies_once_and_fades_to_the_second(
    suite: Suite, intake: httpx.Client, scoring: httpx.Client
) -> None:
    clock = suite.clock
    person = People(5).lead(channel="expo", captured_at=(clock.now() - timedelta(hours=1)).isoformat(), **FITTING)
    lead = ok(intake.post("/leads", json=person, headers=key()))["lead_id"]
    path = f"/leads/{lead}/score"
    do(intake, lead, EAGER, clock.now() - timedelta(minutes=1))
    suite.settle()
    hot = ok(scoring.get(path))
    assert hot["score"] >= 80
    assert (hot["band"], hot["qualified"]) == ("hot", True)
    assert {part["dimension"] for part in hot["parts"]} >= {"frequency", "depth", "fit"}

    due = datetime.fromisoformat(hot["next_change_at"])
    second = timedelta(seconds=1)
    assert due.microsecond == 0
    foreseen = [ok(scoring.get(path, params={"until": at.isoformat()}))["band"] for at in (due - second, due)]
    assert foreseen == ["hot", "warm"]

    clock.set(due - timedelta(hours=1))
    suite.settle()
    assert _fadings(scoring, path) == [], "an hour early nothing happens"
    clock.set(due + second)
    changes = until(lambda: _fadings(scoring, path), "the score fades")
    assert {(c["type"], datetime.fromisoformat(c["time"]), c["band"]) for c in changes} == {
        ("lead_score.changed.v1", due, "warm"),
        ("lead_score.band_changed.v1", due, "warm"),
    }
    assert ok(scoring.get(path))["band"] == "warm"
    assert ok(scoring.get(path, params={"until": (due - second).isoformat()}))["band"] == "hot"

    clock.advance(timedelta(hours=1))
    do(intake, lead, EAGER, clock.now() - timedelta(minutes=1))  # and up again
    suite.settle()
    assert ok(scoring.get(path))["band"] == "hot"
    history = pages(scoring, f"{path}/history")
    assert [c["band"] for c in history if c["type"] == "lead_score.band_changed.v1"] == ["hot", "warm", "hot", "warm"]
    assert sum(c["type"] == "lead_score.lead_qualified.v1" for c in history) == 1

    for change in (c for c in history if c["parts"] is not None):  # every past score can be explained as it was then
        then = ok(scoring.get(path, params={"as_of": change["recorded"], "until": change["time"]}))
        assert then["score"] == change["score"]
        shown = [(p["rule"], p["points"], p["count"], [e["event_id"] for e in p["events"]]) for p in then["parts"]]
        assert shown == [(p["rule"], p["points"], p["count"], p["events"]) for p in change["parts"]]
        assert round(sum(part["points"] for part in then["parts"]) * 100) == round(then["score"] * 100)


def _fadings(scoring: httpx.Client, path: str) -> list[dict[str, Any]]:
    """Changes by time alone, when all of them are there, and the band changes that go with them."""
    history = pages(scoring, f"{path}/history")
    times = {change["time"] for change in history if change["cause"] == "decay"}
    return [change for change in history if change["time"] in times]


@pytest.mark.req("AN-01")
def test_analysts_see_the_same_numbers_everywhere(suite: Suite, intake: httpx.Client, analytics: httpx.Client) -> None:
    """Of 20 captured 8 are qualified and 3 convert: by funnel, on the command line, by conversion, counts and counters."""
    channel, crowd = "fair_21", People(6)
    suite.define_channel(channel)
    body = {"leads": [crowd.lead(channel=channel, **FITTING) for _ in range(20)]}
    leads = [item["result"]["lead_id"] for item in ok(intake.post("/leads/batch", json=body, headers=key()))["items"]]
    start = suite.clock.now()
    for lead in leads[:8]:
        do(intake, lead, EAGER, start - timedelta(minutes=1))
    suite.settle()
    before = suite.clock.now()
    for lead in leads[:3]:
        do(intake, lead, [{"kind": "offer_accepted"}], suite.clock.now())
    suite.settle()

    question: dict[str, Any] = {
        "step": [f"lead.captured[data.channel={channel}]", "qualified", "converted"],
        "window": "30d",
    }
    assert _reached(ok(analytics.get("/funnel", params=question))) == [20, 8, 3]
    assert _reached(ok(analytics.get("/funnel", params={**question, "as_of": before.isoformat()}))) == [20, 8, 0]
    split = ok(analytics.get("/funnel", params={**question, "by": "channel"}))
    assert {steps[0]["value"]: [step["reached"] for step in steps] for steps in split["values"]} == {
        channel: [20, 8, 3]
    }
    arguments = ["--steps", ",".join(question["step"]), "--window", "30d", "--json", "--lake", str(suite.lake_path)]
    command = [sys.executable, "-m", "kehu.cli.main", "funnel", *arguments]
    printed = subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert _reached(json.loads(printed.stdout)) == [20, 8, 3]

    group = next(g for g in ok(analytics.get("/conversion/by-channel"))["items"] if g["group"] == channel)
    assert (group["leads"], group["qualified"], group["converted"]) == (20, 8, 3)
    live = ok(analytics.get("/counters", params={"span": "day", "channel": channel}))["items"]
    assert {item["type"]: item["events"] for item in live} == {"lead.captured.v1": 20, "channel.defined.v1": 1}
    counted: Counter[str] = Counter()
    first = (suite.clock.now() - timedelta(days=365)).date()
    for item in ok(analytics.get("/counts", params={"first": first.isoformat()}))["items"]:
        counted[item["type"]] += item["events"]
    stored = Counter(row.type for service in ("lead-intake", "scoring") for row in suite.log(service))
    assert counted == stored
    readers = {reader["name"]: reader for reader in ok(analytics.get("/projections"))["items"]}
    assert {"customer_timeline", "event_counts", "lead_journey", "live_counters"} <= set(readers)
    assert all((reader["lag"], reader["parked"]) == (0, 0) for reader in readers.values())


def _reached(answer: dict[str, Any]) -> list[int]:
    return [step["reached"] for step in answer["steps"]]


@pytest.mark.req("PL-04")
@pytest.mark.req("DC-03")
def test_a_restart_in_the_middle_of_an_import_loses_nothing(
    suite: Suite, intake: httpx.Client, scoring: httpx.Client, analytics: httpx.Client
) -> None:
    """All roles are ended in order and started again: what was there is there, what was under way goes on."""
    headers, person = key(), People(7).lead(channel="expo", **FITTING)
    lead = ok(intake.post("/leads", json=person, headers=headers))
    suite.settle()
    at = {"as_of": suite.clock.now().isoformat()}
    asked = {
        (scoring, f"/leads/{lead['lead_id']}/score"): at,
        (scoring, f"/leads/{lead['lead_id']}/score/history"): {},
        (intake, f"/leads/{lead['lead_id']}"): {},
        (analytics, f"/customers/{lead['customer_id']}/timeline"): {},
    }
    before = {path: ok(client.get(path, params=query)) for (client, path), query in asked.items()}

    acknowledged = Acknowledged()
    traffic = Traffic(suite, 8, 1_000, acknowledged)
    with traffic.flowing():
        until(lambda: traffic.acknowledged > 100, "the traffic flows")
        suite.restart()
    assert all(process.restarts == 0 for process in suite.supervisor.processes), "all ended when they were asked to"
    for process in suite.supervisor.processes:
        said = process.log_file.read_text()
        assert said.count('"stopped"') == 1, f"{process.name} was not ended in order:\n{process.log_tail(20)}"
    assert {path: ok(client.get(path, params=query)) for (client, path), query in asked.items()} == before
    again = intake.post("/leads", json=person, headers=headers)
    assert (again.json(), again.headers["idempotent-replayed"]) == (lead, "true")
    suite.settle()
    report = judge(suite, acknowledged)
    assert report.sound, f"{report}{suite.told()}"
    assert not any(report.repeats.values()), "a relay that ends in order repeats nothing"
