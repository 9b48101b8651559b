"""What nobody should send: broken and oversized requests, forged tokens, damaged files, poison on a topic. Each is refused or set
aside with its reason, and what is sound goes on as ever."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import jwt
import pytest

from kehu.auth import issue_token
from kehu.events.lead_intake import LeadCaptured
from kehu.kafka.topics import partition_of, topic_of
from kehu.testing.kafka import Message, message, publish
from support.people import FITTING, People
from support.suite import Suite, key
from support.waiting import until

pytestmark = pytest.mark.timeout(600)

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def intake(suite: Suite) -> httpx.Client:
    return suite.client("lead-intake")


def is_problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem of an answer, which has the form of all problems."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    problem: dict[str, Any] = answer.json()
    assert (problem["status"], problem["slug"]) == (status, slug), problem
    assert problem["type"] == f"urn:kehu:problem:{slug}"
    assert problem["detail"]
    assert len(problem["trace_id"]) == 32
    return problem


def flows(suite: Suite, people: People) -> None:
    """A normal capture still gets its score."""
    intake, scoring = suite.client("lead-intake", "sales"), suite.client("scoring", "sales")
    lead = intake.post("/leads", json=people.lead(channel="expo", **FITTING), headers=key()).raise_for_status().json()
    until(lambda: scoring.get(f"/leads/{lead['lead_id']}/score").status_code == 200, "the capture is scored")


SECRET = "13800138000"
BODIES: Sequence[tuple[str, str, bytes, int, str, dict[str, str]]] = (
    # path, what is wrong, body, status, slug, fields with their reasons
    ("/leads", "not JSON", b'{"channel": "expo"', 400, "not-json", {}),
    ("/leads", "not UTF-8", b'{"channel": "expo", "name": "\xff"}', 400, "not-json", {}),
    ("/leads", "a field twice", b'{"channel": "expo", "name": "a", "name": "b"}', 400, "not-json", {}),
    ("/leads", "a NUL", b'{"channel": "expo", "name": "a\\u0000b"}', 400, "not-json", {}),
    ("/leads", "nested too deep", b"[" * 100_000, 400, "not-json", {}),
    ("/leads", "not an object", b"[]", 422, "invalid", {"": "must be an object"}),
    ("/leads", "nothing", b"", 422, "invalid", {"": "is required: a JSON body"}),
    ("/leads", "no channel", b'{"name": "a"}', 422, "invalid", {"channel": "is required"}),
    ("/leads", "a wrong type", b'{"channel": "expo", "phone": 13800138000}', 422, "invalid", {"phone": "must be text"}),
    (
        "/leads",
        "an unknown field",
        b'{"channel": "expo", "name": "a", "is_admin": true}',
        422,
        "invalid",
        {"is_admin": "is not a field of this request"},
    ),
    (
        "/leads",
        "no phone",
        b'{"channel": "expo", "phone": "abc"}',
        422,
        "invalid",
        {"phone": "is not a telephone number"},
    ),
    ("/leads", "nobody", b'{"channel": "expo"}', 409, "nobody", {}),
    ("/leads", "no such channel", b'{"channel": "moon", "name": "a"}', 409, "unknown-channel", {}),
    (
        "/behaviours",
        "too many",
        json.dumps({"behaviours": [{}] * 1001}).encode(),
        422,
        "invalid",
        {"behaviours": "must have at most 1000 items after validation, not 1001"},
    ),
)


@pytest.mark.req("LI-01")
@pytest.mark.parametrize(
    ("path", "wrong", "body", "status", "slug", "fields"), BODIES, ids=[case[1] for case in BODIES]
)
def test_a_wrong_body_is_refused_with_its_field_and_reason(
    intake: httpx.Client, path: str, wrong: str, body: bytes, status: int, slug: str, fields: dict[str, str]
) -> None:
    answer = intake.post(path, content=body, headers={"Content-Type": "application/json"})
    problem = is_problem(answer, status, slug)
    found = {error["field"]: error["reason"] for error in problem.get("errors", []) if fields}
    assert found == fields
    assert SECRET not in answer.text, "a problem never shows the value that was sent"


@pytest.mark.req("LI-01")
def test_limits_of_a_request(suite: Suite, intake: httpx.Client) -> None:
    large = b'{"channel": "expo", "name": "a", "note": "' + b"x" * (2 << 20) + b'"}'
    as_json = {"Content-Type": "application/json"}
    assert is_problem(intake.post("/leads", content=large, headers=as_json), 413, "too-large")["limit_bytes"] == 1 << 20

    def in_pieces() -> Any:  # nobody says beforehand how much it will be
        yield from (large[start : start + 65_536] for start in range(0, len(large), 65_536))

    is_problem(suite.client("lead-intake").post("/leads", content=in_pieces(), headers=as_json), 413, "too-large")
    is_problem(intake.post("/leads", content=b"channel=expo"), 415, "unsupported-media-type")
    nobody = {"channel": "expo", "name": "a"}
    is_problem(intake.post("/leads", json=nobody, headers={"Idempotency-Key": "a b"}), 400, "bad-idempotency-key")
    is_problem(intake.get("/leads?colour=red"), 422, "invalid")
    is_problem(intake.get("/leads?cursor=%00"), 400, "bad-request")
    is_problem(intake.get("/leads/1"), 422, "invalid")
    is_problem(intake.get("/nowhere"), 404, "not-found")
    is_problem(intake.delete("/leads"), 405, "method-not-allowed")
    flows(suite, People(10))


@pytest.mark.req("PL-05")
def test_who_may_not_is_refused(suite: Suite) -> None:
    secret = suite.supervisor.secrets["jwt_secret"]
    now = int(time.time())
    claims = {"sub": "mallory", "roles": ["admin"], "iat": now, "exp": now + 3600}
    head, _, signature = issue_token(secret, "mallory", ["analyst"]).split(".")
    raised = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    tokens = {
        "none at all": "",
        "run out": issue_token(secret, "mallory", ["admin"], ttl=-3600),
        "unsigned (alg none)": jwt.encode(claims, "", "none"),
        "of another secret": issue_token("x" * 44, "mallory", ["admin"]),
        "with another body": f"{head}.{raised}.{signature}",
        "without an end": jwt.encode({"sub": "mallory", "roles": ["admin"]}, secret, "HS256"),
        "no token": "Bearer Bearer",
        "too long": "a" * 10_000,
    }
    for service in suite.names:
        with httpx.Client(base_url=suite.supervisor.url(service), timeout=60) as client:
            path = {"lead-intake": "/leads", "scoring": "/scores", "analytics": "/counts"}[service]
            for what, token in tokens.items():
                answer = client.get(path, headers={"Authorization": f"Bearer {token}"} if token else {})
                assert is_problem(answer, 401, "not-authenticated"), f"{service}: a token {what}"
                assert answer.headers["www-authenticate"].startswith("Bearer")
    person = People(11).lead(channel="expo")
    analyst = suite.client("lead-intake", "analyst")
    refused = is_problem(analyst.post("/leads", json=person), 403, "not-allowed")
    assert "sales" in refused["roles"]
    is_problem(suite.client("lead-intake", "admin").post("/keys/lookup", json={"customer_ids": []}), 403, "not-allowed")
    is_problem(suite.client("analytics", "sales").get("/counts"), 403, "not-allowed")
    is_problem(suite.client("scoring", "sales").post("/models", json={}), 403, "not-allowed")


@pytest.mark.req("LI-01")
def test_a_damaged_csv_file_costs_its_broken_rows_only(suite: Suite, intake: httpx.Client) -> None:
    crowd = People(12)
    rows = [",".join((p["name"], p["phone"], p["company"])).encode() for p in (crowd.lead() for _ in range(40))]
    rows[16] = b"\xff\xfe\x00broken,row,17"
    rows[20] = rows[20] + b",one,too,many"
    rows[24] = b"x" * 70_000
    rows[28] = '李四,12,"星辰"公司'.encode()
    content = "姓名,手机,公司\r\n".encode() + b"\r\n".join(rows) + b"\r\n"
    headers = {**key(), "Content-Type": "text/csv"}
    answer = intake.post("/imports?channel=expo", content=content, headers=headers)
    *lines, closing = [json.loads(line) for line in answer.text.splitlines()]
    refused = {line["row"]: line["errors"] for line in lines if line["outcome"] == "refused"}
    assert sorted(refused) == [17, 21, 25, 29]
    assert all(error["reason"] for errors in refused.values() for error in errors)
    assert {"complete": True, "captured": 36, "refused": 4}.items() <= closing["summary"].items()
    is_problem(
        intake.post(
            "/imports?channel=expo", content="姓名,颜色\n".encode(), headers={**key(), "Content-Type": "text/csv"}
        ),
        422,
        "unknown-column",
    )
    flows(suite, crowd)


@pytest.mark.req("DC-04")
def test_poison_on_a_topic_is_parked_and_all_others_go_on(suite: Suite, intake: httpx.Client) -> None:
    """Records that nobody of us sent, in the partition of a customer who goes on meanwhile."""
    scoring, crowd = suite.client("scoring", "sales"), People(13)
    person = crowd.lead(channel="expo", **FITTING)
    mine = intake.post("/leads", json=person, headers=key()).raise_for_status().json()
    path = f"/leads/{mine['lead_id']}/score"
    until(lambda: scoring.get(path).status_code == 200, "the lead is scored")
    before = scoring.get(path).json()["score"]

    beside = mine["customer_id"].encode()

    def forged(stream: str, type_: str = "channel.defined.v1") -> bytes:
        """An envelope as it should be, of an event that is none."""
        value = message(stream, 1, key=beside.decode()).value or b""
        return value.replace(b"channel.defined.v1", type_.encode())

    poison = [
        Message(beside, b'{"specversion": "1.0", '),
        Message(beside, b"\xfe" * 900_000),
        Message(beside, None),
        Message(beside, forged("lead-newer", "lead.captured.v9")),
        Message(beside, forged("lead-unfit", LeadCaptured.TYPE)),
        Message(None, forged("lead-keyless")),
        Message(b"somebody-else", forged("lead-elsewhere")),
    ]
    asyncio.run(publish(suite.stack.address.kafka_bootstrap, topic_of("lead-intake"), poison, 12))
    did = {"behaviours": [{"kind": "demo_attended", "lead_id": mine["lead_id"]}]}
    intake.post("/behaviours", json=did).raise_for_status()
    until(lambda: scoring.get(path).json()["score"] > before, "the customer in the same partition goes on")
    flows(suite, crowd)
    suite.settle()

    listed = _parked(suite, "ls", "--service", "scoring", "--json")
    events = [json.loads(line) for line in listed.splitlines()]
    place = partition_of(beside)
    other = "the record's key is not its partitionkey"
    assert sorted((e["partition"], e["stream"], e["error"].partition(":")[0]) for e in events) == sorted(
        [
            *[(place, "", "MalformedEnvelope")] * 3,
            (place, "lead-newer", "UnknownEvent"),
            (place, "lead-unfit", "the data does not fit the type"),
            (0, "lead-keyless", other),
            (partition_of(b"somebody-else"), "lead-elsewhere", other),
        ]
    )
    shown = _parked(suite, "show", str(events[0]["id"]), "--service", "scoring")
    assert "specversion" in shown
    assert "relay-epoch" in shown, "with the headers that it had"
    live = suite.rows("analytics", "SELECT count(*) FROM parked_events WHERE consumer = 'crm.analytics.live_counters'")
    assert live == [(5,)], "the counters need the envelope only"
    assert suite.lake().sql("SELECT count(*) FROM rejected").to_pydict() == {"count_star()": [3]}

    for event in events:
        _parked(suite, "drop", str(event["id"]), "--service", "scoring")
    assert _parked(suite, "ls", "--service", "scoring") == "Nothing is parked.\n"
    for role in ("relay", "projector"):  # the end of the topic holds what no relay sent: it goes on behind its own
        suite.process("lead-intake", role).restart()
    flows(suite, crowd)
    assert all(process.restarts == 0 for process in suite.supervisor.processes), "nothing fell over"


def _parked(suite: Suite, *arguments: str) -> str:
    """What `kehu parked` prints."""
    command = [
        sys.executable,
        "-m",
        "kehu.cli.main",
        "parked",
        *arguments,
        "--state-dir",
        str(suite.supervisor.state_dir),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout
