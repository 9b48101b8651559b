"""Somebody is forgotten: nothing personal lies anywhere in the clear, before or after; their key is gone, so no copy can be read
again; numbers stay, and everybody else stays readable."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from kehu.events import PersonalState, Recorded
from kehu.events.lead_intake import Contact, LeadCaptured
from kehu.privacy import HttpKeyring, opened
from support.checker import judge
from support.haystack import Search, spellings
from support.people import EAGER, FITTING, People
from support.suite import Suite, key
from support.waiting import until

pytestmark = [pytest.mark.timeout(600), pytest.mark.req("LI-11")]

# Words that occur nowhere by chance.
ERASED: dict[str, Any] = {
    "name": "欧阳翠屏墨",
    "phone": "17391827364",
    "email": "cuiping.ouyangmo@xunzhaobudao.example.com",
    "note": "喜欢喝凤凰单丛茶",
}
KEPT: dict[str, Any] = {
    "name": "司马鹤鸣霄",
    "phone": "17491827365",
    "email": "heming.simaxiao@baoliuxialai.example.com",
    "note": "每周三下午打羽毛球",
}


@pytest.fixture(scope="module")
def intake(suite: Suite) -> httpx.Client:
    return suite.client("lead-intake")


def live(intake: httpx.Client, person: dict[str, Any], channel: str) -> dict[str, Any]:
    """A whole life: captured in a file and alone, merged, changed, active. Gives the first answer."""
    headers = {**key(), "Content-Type": "text/csv"}
    row = f"{person['name']},{person['phone'][:3]} {person['phone'][3:]},{_shouted(person['email'])},{person['note']}"
    content = f"姓名,手机,邮箱,备注\n{row}\n".encode("gb18030")
    intake.post(f"/imports?channel={channel}", content=content, headers=headers).raise_for_status()
    body = {**person, "channel": channel, **FITTING}
    answer: dict[str, Any] = intake.post("/leads", json=body, headers=key()).raise_for_status().json()
    lead = answer["survivor_lead_id"]
    did = [{**each, "lead_id": lead} for each in EAGER]
    intake.post("/behaviours", json={"behaviours": did}).raise_for_status()
    intake.patch(f"/leads/{lead}", json={"name": person["name"]}, headers=key()).raise_for_status()
    # What is refused must not leave traces either.
    intake.post("/leads", json={**body, "email": f"{person['email']}@@", "surprise": person["phone"]})
    intake.post("/leads/batch", json={"leads": [{**body, "phone": person["name"]}]}).raise_for_status()
    intake.get("/leads", params={"customer_id": answer["customer_id"]}).raise_for_status()
    return {**answer, "lead_id": lead}


def personal(*people: dict[str, Any]) -> list[str]:
    """Every text of these people that must not be found, with the forms that cleaning makes of it."""
    texts = [text for person in people for text in person.values()]
    texts += ["+86" + person["phone"] for person in people]
    texts += [_shouted(person["email"]) for person in people]
    return [*texts, *(f"{person['phone'][:3]} {person['phone'][3:]}" for person in people)]


def _shouted(email: str) -> str:
    """With the domain in capitals, as it comes in; cleaning mends that."""
    name, _, domain = email.partition("@")
    return f"{name}@{domain.upper()}"


def test_the_search_would_find_what_it_looks_for() -> None:
    """In each encoding, and inside of base64 wherever it begins."""
    for text in personal(ERASED):
        search = Search([text])
        assert all(search.found_in(b"before " + spelling + b" after") for spelling in spellings(text))
        assert search.found_in(b"nothing of that kind") is None
        for before in ("", "a", "ab", "abc"):
            assert search.found_in(base64.b64encode(f'{before}{{"name":"{text}"}}'.encode()))


def test_an_erased_customer_is_forgotten_everywhere(suite: Suite, intake: httpx.Client) -> None:
    scoring, analytics = suite.client("scoring", "sales"), suite.client("analytics", "analyst")
    system = suite.client("lead-intake", "system")
    crowd = People(20)
    others = {"leads": [crowd.lead(channel="expo") for _ in range(50)]}
    intake.post("/leads/batch", json=others, headers=key()).raise_for_status()
    gone, kept = live(intake, ERASED, "expo"), live(intake, KEPT, "expo")
    customers = [gone["customer_id"], kept["customer_id"]]
    suite.settle()

    shown = intake.get(f"/leads/{gone['lead_id']}").raise_for_status().json()
    assert shown["contact"] == {**ERASED, "phone": "+86" + ERASED["phone"]}
    search = Search(personal(ERASED, KEPT))
    assert search.everywhere(suite) > 1_000, "in the clear nobody is anywhere, at any time"

    seconds = 2.0
    elsewhere = HttpKeyring(system, cache_seconds=seconds)
    keys = elsewhere.keys(customers)
    assert all(len(each or b"") == 32 for each in keys.values())
    numbers = _numbers(analytics)
    records = {Recorded.from_bytes(r.value).id: r.value for r in suite.records("lead-intake")}

    reason = {"reason": "pipl_request"}
    refused = suite.client("lead-intake", "sales").post(f"/customers/{customers[0]}/erasure", json=reason)
    assert refused.status_code == 403, "that is for administrators"
    headers = key()
    for _ in range(2):  # the second time it is done already
        answer = intake.post(f"/customers/{customers[0]}/erasure", json=reason, headers=headers)
        assert answer.raise_for_status().json() == {"customer_id": customers[0], "erased": True}
    asked = system.post("/keys/lookup", json={"customer_ids": customers}).raise_for_status().json()["keys"]
    assert asked[customers[0]] is None, "the key is gone at once"
    assert base64.b64decode(asked[customers[1]]) == keys[customers[1]]
    until(lambda: elsewhere.keys([customers[0]])[customers[0]] is None, "another process forgets it", seconds + 30)
    suite.settle()

    shown = intake.get(f"/leads/{gone['lead_id']}").raise_for_status().json()
    assert shown["erased"] is True
    assert not {"contact", "raw_contact"} & set(shown)
    customer = intake.get(f"/customers/{customers[0]}").raise_for_status().json()
    assert customer["erased"] is True
    assert all(not {"name", "phone", "email"} & set(lead) for lead in customer["leads"])
    other = intake.get(f"/leads/{kept['lead_id']}").raise_for_status().json()
    assert other["contact"] == {**KEPT, "phone": "+86" + KEPT["phone"]}
    assert scoring.get(f"/leads/{gone['lead_id']}/score").json()["open"] is False
    timeline = analytics.get(f"/customers/{customers[0]}/timeline").raise_for_status().json()["items"]
    assert {"customer.erased.v1", "lead.captured.v1", "behaviour.recorded.v1"} <= {entry["type"] for entry in timeline}

    after = _numbers(analytics)
    for wire in ("customer.erasure_requested.v1", "customer.erased.v1"):
        assert after.pop(wire) == 1
    assert after == numbers, "what was counted stays counted"
    captured = [Recorded.from_bytes(value) for value in records.values()]
    captured = [r for r in captured if r.is_a(LeadCaptured) and r.customer_id == customers[0]]
    now = elsewhere.keys(customers)
    states = {opened(r, now[customers[0]]).contact.state for r in captured}  # type: ignore[attr-defined]
    assert states == {PersonalState.ERASED}, "a copy that somebody kept cannot be read any more"
    readable = next(r for r in map(Recorded.from_bytes, records.values()) if r.stream == f"lead-{kept['lead_id']}")
    contact: Contact = opened(readable, now[customers[1]]).contact.plain  # type: ignore[attr-defined]
    assert contact.name == KEPT["name"]

    again = intake.post("/leads", json={**ERASED, "channel": "expo"}, headers=key()).raise_for_status().json()
    assert again["outcome"] == "captured", "who comes back is somebody new: nobody remembers"
    assert again["customer_id"] != customers[0]
    refusal = intake.post("/behaviours", json={"behaviours": [{"kind": "page_viewed", "lead_id": gone["lead_id"]}]})
    assert refusal.json()["items"][0]["problem"]["slug"] == "customer-erased"
    suite.settle()
    search.everywhere(suite)
    suite.restart()
    suite.settle()
    report = judge(suite)
    assert report.sound, f"{report}{suite.told()}"
    search.everywhere(suite)


def _numbers(analytics: httpx.Client) -> dict[str, int]:
    """How many events of each type, and how many leads."""
    numbers: dict[str, int] = {}
    for item in analytics.get("/counts").raise_for_status().json()["items"]:
        numbers[item["type"]] = numbers.get(item["type"], 0) + item["events"]
    funnel = analytics.get("/funnel", params={"step": ["captured", "qualified"]}).raise_for_status().json()
    return numbers | {f"funnel {step['name']}": step["reached"] for step in funnel["steps"]}
