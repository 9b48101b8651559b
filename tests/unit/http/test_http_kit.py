"""The HTTP kit against callers who mean no good, or no harm: over ASGI, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import httpx
import psycopg
import pytest
from fastapi import APIRouter, FastAPI, Query, Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, EmailStr, Field, field_validator
from starlette.responses import Response

from kehu.auth import issue_token
from kehu.commands import Done, Failed, Outcome
from kehu.decider import Refused
from kehu.gate import Overloaded
from kehu.http import (
    Body,
    Call,
    Page,
    Principal,
    Problem,
    Role,
    Router,
    answer,
    body_limit,
    commands,
    create_app,
    item,
    json_response,
    paging,
    public,
    requires,
)
from kehu.observability import Health
from kehu.privacy import KeysUnavailable
from kehu.settings import ServiceSettings

SECRET = "a secret of a test that has forty letters"
PHONE = "13800138000"


class Contact(Body):
    phone: str = Field(max_length=20)
    email: EmailStr | None = None

    @field_validator("phone")
    @classmethod
    def digits(cls, value: str) -> str:
        if value == "rule":
            raise ValueError("the number is not one of this country")
        int(value.removeprefix("+"))  # a careless validator: its own message would repeat the value
        return value


class NewLead(Body):
    name: str = Field(max_length=50, examples=["王小明"])
    contact: Contact | None = None
    at: datetime | None = None
    customer_id: UUID | None = None
    facts: dict[str, str | int | float | bool] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()


FIELD_NAMES = st.sampled_from(["name", "contact", "phone", "email", "at", "customer_id", "facts", "tags"])


class Probe:
    """What the routes of the test app did and shall do."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.bodies: list[NewLead] = []
        self.outcome: Outcome = Done({"id": "x"}, {"lead-1": 1})
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.entered = 0
        self.both = asyncio.Event()


def make_app(probe: Probe, **changes: Any) -> FastAPI:
    router = Router(prefix="/leads")

    @router.post("", status_code=201)
    async def capture(body: NewLead, call: Annotated[Call, commands(Role.SALES, Role.MARKETING)]) -> Response:
        """Take in a lead."""
        probe.calls.append(call)
        probe.bodies.append(body)
        if probe.error is not None:
            raise probe.error
        return answer(probe.outcome, 201, location="/leads/x")

    @router.get("")
    async def leads(
        page: Annotated[Page, paging(default=2)],
        who: Annotated[Principal, requires()],
        since: Annotated[datetime | None, Query()] = None,
    ) -> dict[str, Any]:
        after = page.after(int)
        start = after[0] + 1 if after else 0
        return page.answer(list(range(start, min(5, start + page.limit + 1))), key=lambda n: (n,))

    @router.get("/wait")
    async def wait(who: Annotated[Principal, requires()]) -> Response:
        probe.entered += 1
        if probe.entered == 2:
            probe.both.set()
        await probe.gate.wait()
        return json_response({})

    @router.get("/{lead_id}")
    async def lead(lead_id: UUID, who: Annotated[Principal, requires(Role.MANAGER)]) -> dict[str, Any]:
        return {"lead": lead_id, "actor": who.actor}

    @router.post("/stream")
    @body_limit(None)
    async def stream(request: Request, who: Annotated[Principal, requires(Role.SYSTEM)]) -> dict[str, int]:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
        return {"bytes": total}

    @router.get("/open/door")
    def door(_: Annotated[None, public()]) -> dict[str, bool]:
        return {"open": True}

    made = ServiceSettings(
        environment="development",
        postgres_url="postgresql://kehu@127.0.0.1/postgres",
        kafka_bootstrap="127.0.0.1:9092",
        jwt_secret=SECRET,
        max_body_bytes=changes.pop("max_body_bytes", 1 << 20),
        max_in_flight=changes.pop("max_in_flight", 1000),
    )
    return create_app(made, title="Test", routers=[router], **changes)


APP = make_app(Probe())


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
async def client(probe: Probe) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(probe)) as made:
        yield made


def client_of(app: FastAPI, *roles: str) -> httpx.AsyncClient:
    token = issue_token(SECRET, "wang.wei", roles or ["sales"])
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers={"Authorization": f"Bearer {token}"}
    )


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert document["slug"] == slug, document
    assert document["type"] == f"urn:kehu:problem:{slug}"
    assert document["trace_id"] in response.headers["traceparent"]
    return document


async def send(client: httpx.AsyncClient, body: bytes | str, **headers: str) -> httpx.Response:
    content = body.encode() if isinstance(body, str) else body
    return await client.post("/leads", content=content, headers={"Content-Type": "application/json", **headers})


# --- bodies -----------------------------------------------------------------------------------------------------------


async def test_a_good_body_reaches_the_endpoint_as_a_model(client: httpx.AsyncClient, probe: Probe) -> None:
    body = {"name": "王小明", "at": "2026-01-31T09:30:00+08:00", "customer_id": str(UUID(int=7)), "tags": ["a"]}
    response = await client.post("/leads", json=body)
    assert response.status_code == 201
    assert response.json() == {"id": "x"}
    assert response.headers["etag"] == '"1"'
    assert response.headers["location"] == "/leads/x"
    assert probe.bodies == [
        NewLead(name="王小明", at=datetime(2026, 1, 31, 1, 30, tzinfo=UTC), customer_id=UUID(int=7), tags=("a",))
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", None),
        ("{", "line 1, column 1"),
        ('{"name": "x",}', "line 1, column 14"),
        (b'{"name": "\xff\xfe"}', "unicode"),
        ('{"name": "\\ud800"}', "escape"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ('{"name": ' * 5000 + "1" + "}" * 5000, "recursion"),
        ('{"name": "x", "facts": {"a": NaN}}', "NaN"),
        ('{"name": "x", "facts": {"a": -Infinity}}', "NaN"),
        ('{"name": "x", "facts": {"a": 1e999}}', "too large"),
        ('{"name": "x", "facts": {"a": 99999999999999999999}}', "64 bits"),
        ('{"name": "x", "facts": {"a": ' + "9" * 5000 + "}}", "number"),
        ('{"name": "x", "name": "y"}', "twice"),
        ('{"name": "x", "facts": {"a": 1, "a": 2}}', "twice"),
        ('{"name": "a\\u0000b"}', "NUL"),
        (b'{"name": "a\x00b"}', "control character"),
        (b"\xef\xbb\xbf{}", "expected value"),
    ],
)
async def test_what_two_readers_could_read_differently_is_refused(
    client: httpx.AsyncClient, probe: Probe, body: bytes | str, words: str | None
) -> None:
    response = await send(client, body)
    if words is None:
        problem(response, 422, "invalid")
    elif response.status_code == 422:  # a number that fits no type is found by the type before it is found by us
        assert "facts" in problem(response, 422, "invalid")["errors"][0]["field"]
    else:
        assert words.lower() in problem(response, 400, "not-json")["detail"].lower()
    assert probe.bodies == []


async def test_bad_json_says_where(client: httpx.AsyncClient) -> None:
    document = problem(await send(client, '{\n  "name": oops\n}'), 400, "not-json")
    assert document["position"] == {"line": 2, "column": 11}
    assert "oops" not in json.dumps(document)


async def test_a_backslash_before_a_u_is_text(client: httpx.AsyncClient, probe: Probe) -> None:
    assert (await send(client, '{"name": "C:\\\\u0000"}')).status_code == 201
    assert probe.bodies[0].name == "C:\\u0000"


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        ({}, "name", "is required"),
        ({"name": 5}, "name", "must be text"),
        ({"name": None}, "name", "must be text"),
        ({"name": "x", "nmae": "y"}, "nmae", "is not a field of this request"),
        ({"name": "x", "contact": {"phone": PHONE, "fax": "1"}}, "contact.fax", "is not a field of this request"),
        ({"name": "x", "contact": []}, "contact", "must be an object"),
        ({"name": "x", "customer_id": "x"}, "customer_id", "must be a UUID"),
        ({"name": "x", "at": "2026-01-31T09:30:00"}, None, None),
        ({"name": "x", "at": "tomorrow"}, "at", "must be an RFC 3339 time, e.g. 2026-01-31T09:30:00+08:00"),
        ({"name": "x", "at": 1700000000}, "at", "must be an RFC 3339 time, e.g. 2026-01-31T09:30:00+08:00"),
        ({"name": "x" * 51}, "name", "must have at most 50 characters"),
        ({"name": "x", "tags": ["a", 1]}, "tags[1]", "must be text"),
        ({"name": "x", "contact": {"phone": "rule"}}, "contact.phone", "the number is not one of this country"),
        ([], "", "must be an object"),
    ],
)
async def test_each_wrong_field_is_named(
    client: httpx.AsyncClient, body: Any, field: str | None, reason: str | None
) -> None:
    response = await client.post("/leads", json=body)
    if field is None:
        assert response.status_code == 201
        return
    errors = problem(response, 422, "invalid")["errors"]
    assert {"at": "body", "field": field, "reason": reason} in errors


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "contact": {"phone": f"{PHONE}x"}},
        {"name": "x", "contact": {"phone": PHONE, "email": "李雷@公 司.中国"}},
        {"name": "x", "contact": {"phone": PHONE + "0" * 20}},
        {"name": 13800138000},
        {"name": "x", "at": PHONE + "x"},
        {"name": "x", "customer_id": "李雷"},
    ],
)
async def test_a_refusal_never_repeats_what_was_sent(client: httpx.AsyncClient, body: Any) -> None:
    text = (await client.post("/leads", json=body)).text
    for value in (PHONE, "13800138000", "李雷", "公 司", "中国"):
        assert value not in text
    assert '"status":422' in text


async def test_many_errors_are_cut(client: httpx.AsyncClient) -> None:
    document = problem(await client.post("/leads", json={f"f{n}": n for n in range(5000)}), 422, "invalid")
    assert len(document["errors"]) == 100


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/json; charset=gbk"]
)
async def test_another_media_type_is_refused(client: httpx.AsyncClient, kind: str) -> None:
    problem(await send(client, "{}", **{"Content-Type": kind}), 415, "unsupported-media-type")


async def test_media_types_that_are_json(client: httpx.AsyncClient) -> None:
    for kind in ("application/json; charset=UTF-8", "application/cloudevents+json", "Application/JSON"):
        assert (await send(client, '{"name": "x"}', **{"Content-Type": kind})).status_code == 201


async def test_a_large_body_is_refused_by_its_length_and_by_its_bytes(client: httpx.AsyncClient, probe: Probe) -> None:
    document = problem(await send(client, b" " * (2 << 20)), 413, "too-large")
    assert document["limit_bytes"] == 1 << 20
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    headers = {"Content-Type": "application/json"}
    response = await client.post("/leads", content=endless(), headers=headers)
    problem(response, 413, "too-large")
    assert response.headers["connection"] == "close"
    assert sent <= (1 << 20) + (1 << 17)
    assert probe.bodies == []


async def test_a_stream_may_be_long_where_the_route_says_so(probe: Probe) -> None:
    async def three() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * (1 << 20)

    async with client_of(make_app(probe), "system") as client:
        response = await client.post("/leads/stream", content=three())
    assert response.json() == {"bytes": 3 << 20}


def _answer(app: FastAPI, body: bytes) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client_of(app) as client:
            return await send(client, body)

    return asyncio.run(ask())


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELD_NAMES | st.text(max_size=8), inner, max_size=6),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_no_body_whatever_is_a_mistake_of_ours(body: bytes) -> None:
    response = _answer(APP, body)
    assert response.status_code in (201, 400, 422), response.text
    if response.status_code != 201:
        problem(response, response.status_code, "invalid" if response.status_code == 422 else "not-json")


# --- callers ----------------------------------------------------------------------------------------------------------


def _unsigned() -> str:
    import base64

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none'})}.{part({'sub': 'x', 'exp': 2**40, 'roles': ['admin']})}."


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "A bearer token is needed."),
        ("", "A bearer token is needed."),
        ("Basic d2FuZzp3ZWk=", "A bearer token is needed."),
        ("Bearer ", "A bearer token is needed."),
        ("Bearer x.y.z", "malformed"),
        ("Bearer \udcff", "malformed"),
        (f"Bearer {_unsigned()}", "not signed in a way"),
        (f"Bearer {issue_token('another secret that is quite long', 'x', ['sales'])}", "signature is wrong"),
        (f"Bearer {issue_token(SECRET, 'x', ['sales'], ttl=-3600)}", "run out"),
        (f"Bearer {'x' * 9000}", "too long"),
    ],
)
async def test_a_token_that_proves_nothing(client: httpx.AsyncClient, header: str | None, words: str) -> None:
    headers = {} if header is None else {b"Authorization": header.encode("utf-8", "surrogateescape")}
    del client.headers["Authorization"]
    response = await client.post("/leads", json={"name": "x"}, headers=headers)
    assert words in problem(response, 401, "not-authenticated")["detail"]
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_the_caller_is_asked_before_the_body_is_read(client: httpx.AsyncClient) -> None:
    problem(await client.post("/leads", content=b"{", headers={"Authorization": "Bearer x"}), 401, "not-authenticated")


async def test_a_missing_role_is_named(client: httpx.AsyncClient) -> None:
    document = problem(await client.get(f"/leads/{UUID(int=1)}"), 403, "not-allowed")
    assert document["roles"] == ["manager"]


async def test_who_calls(probe: Probe) -> None:
    async with client_of(make_app(probe), "manager") as client:
        response = await client.get(f"/leads/{UUID(int=1)}")
    assert response.json() == {"lead": str(UUID(int=1)), "actor": "user:wang.wei"}


async def test_a_public_route_asks_nobody(client: httpx.AsyncClient) -> None:
    del client.headers["Authorization"]
    assert (await client.get("/leads/open/door")).json() == {"open": True}


def test_a_route_must_say_who_may_call_it() -> None:
    router = Router()

    @router.get("/x")
    async def x() -> None: ...

    with pytest.raises(TypeError, match="who may call it"):
        create_app(APP.state.settings, title="x", routers=[router])


def test_a_router_of_another_kind_is_refused() -> None:
    router = APIRouter()

    @router.get("/x")
    async def x(_: Annotated[Principal, requires()]) -> None: ...

    with pytest.raises(TypeError, match=r"kehu\.http\.Router"):
        create_app(APP.state.settings, title="x", routers=[router])


class Loose(BaseModel):
    x: int


class Outer(Body):
    inner: list[Loose | None]


def test_a_model_that_lets_unknown_fields_pass_is_refused() -> None:
    router = Router()
    with pytest.raises(TypeError, match="Loose lets unknown fields pass"):

        @router.post("/x")
        async def x(body: Outer, _: Annotated[Principal, requires()]) -> None: ...


# --- commands ---------------------------------------------------------------------------------------------------------


async def test_the_same_key_gives_the_same_command(client: httpx.AsyncClient, probe: Probe) -> None:
    for body in ('{"name": "x"}', '{"name": "x"}', '{"name": "y"}'):
        await send(client, body, **{"Idempotency-Key": "key-1"})
    await send(client, '{"name": "x"}', **{"Idempotency-Key": "key-2"})
    await send(client, '{"name": "x"}')
    await send(client, '{"name": "x"}')
    first, again, other_body, other_key, without, without_again = probe.calls
    assert first.command_id == again.command_id == other_body.command_id
    assert first.fingerprint == again.fingerprint != other_body.fingerprint
    assert other_key.command_id != first.command_id
    assert without.command_id != without_again.command_id
    assert without.fingerprint is None
    assert first.context.actor == "user:wang.wei"
    requests = [first.request("c", index=n) for n in (0, 1)] + [first.request("c")]
    assert len({r.command_id for r in requests}) == 3


async def test_another_caller_with_the_same_key_has_another_command(probe: Probe) -> None:
    app = make_app(probe)
    for subject in ("li.lei", "han.meimei"):
        token = issue_token(SECRET, subject, ["sales"])
        async with client_of(app) as client:
            await send(client, '{"name": "x"}', **{"Authorization": f"Bearer {token}", "Idempotency-Key": "k"})
    assert len({call.command_id for call in probe.calls}) == 2


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 129, "钥匙"])
async def test_a_bad_idempotency_key(client: httpx.AsyncClient, key: str) -> None:
    response = await client.post("/leads", json={"name": "x"}, headers={b"Idempotency-Key": key.encode()})
    problem(response, 400, "bad-idempotency-key")


@pytest.mark.parametrize(("given", "version"), [('"3"', 3), ("*", None), (None, None), (' "0" ', 0)])
async def test_if_match(client: httpx.AsyncClient, probe: Probe, given: str | None, version: int | None) -> None:
    await send(client, '{"name": "x"}', **({"If-Match": given} if given else {}))
    assert probe.calls[0].expected_version == version
    assert probe.calls[0].request("c").expected_version == version


@pytest.mark.parametrize("given", ["3", 'W/"3"', '"3", "4"', '"x"', '"-1"', '"' + "9" * 30 + '"'])
async def test_a_bad_if_match(client: httpx.AsyncClient, given: str) -> None:
    problem(await send(client, '{"name": "x"}', **{"If-Match": given}), 400, "bad-if-match")


OUTCOMES: list[tuple[Outcome, int, str]] = [
    (Failed(Refused("lead-already-rejected", "It was rejected.", "lead_id")), 409, "lead-already-rejected"),
    (Failed(Refused("lead-not-found", "There is no such lead.")), 404, "lead-not-found"),
    (Failed(Refused("version-conflict", "The version is 4, not 3."), "conflict"), 412, "version-conflict"),
    (Failed(Refused("conflict", "Others change it."), "conflict"), 409, "conflict"),
    (Failed(Refused("idempotency-key-reused", "Use a new key."), "reused"), 422, "idempotency-key-reused"),
]


@pytest.mark.parametrize(("outcome", "status", "slug"), OUTCOMES)
async def test_outcomes_that_are_problems(
    client: httpx.AsyncClient, probe: Probe, outcome: Outcome, status: int, slug: str
) -> None:
    probe.outcome = outcome
    document = problem(await send(client, '{"name": "x"}'), status, slug)
    if slug == "lead-already-rejected":
        assert document["errors"] == [{"at": "body", "field": "lead_id", "reason": "It was rejected."}]
    shown = item(outcome)
    assert (shown["status"], shown["problem"]["slug"]) == (status, slug)


async def test_an_answer_that_is_given_again_says_so(client: httpx.AsyncClient, probe: Probe) -> None:
    probe.outcome = Done({"id": "x"}, {"lead-1": 1, "customer-1": 1}, repeated=True)
    response = await send(client, '{"name": "x"}')
    assert (response.status_code, response.headers["idempotent-replayed"]) == (201, "true")
    assert "etag" not in response.headers  # two streams: which version would it be?
    assert item(probe.outcome) == {"status": 201, "repeated": True, "result": {"id": "x"}}


ERRORS: Sequence[tuple[Exception, int, str]] = [
    (Overloaded(), 503, "overloaded"),
    (psycopg.OperationalError("connection to server failed"), 503, "unavailable"),
    (psycopg.errors.SerializationFailure("x"), 503, "unavailable"),
    (psycopg.errors.ReadOnlySqlTransaction("x"), 503, "unavailable"),
    (KeysUnavailable("x"), 503, "unavailable"),
    (Refused("no", "No."), 409, "no"),
    (Problem(418, "I am a teapot.", "teapot"), 418, "teapot"),
    (RuntimeError(f"secret {PHONE}"), 500, "internal-error"),
    (psycopg.errors.UniqueViolation(f"Key (phone)=({PHONE}) exists"), 500, "internal-error"),
]


@pytest.mark.parametrize(("error", "status", "slug"), ERRORS)
async def test_errors_of_an_endpoint(
    client: httpx.AsyncClient, probe: Probe, error: Exception, status: int, slug: str
) -> None:
    probe.error = error
    response = await send(client, '{"name": "x"}')
    problem(response, status, slug)
    assert PHONE not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


# --- the rest of a request --------------------------------------------------------------------------------------------


async def test_pages_follow_each_other_without_gap(client: httpx.AsyncClient) -> None:
    seen: list[int] = []
    cursor = None
    for _ in range(10):
        page = (await client.get("/leads", params={"limit": 2, **({"cursor": cursor} if cursor else {})})).json()
        seen += page["items"]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cursor", ["x", "WyJhIl0", "WzEsMl0", "W3RydWVd", "WzFlOTk5XQ", "!" * 100, "WzEuNV0", "e30"])
async def test_a_cursor_of_somebody_elses_making(client: httpx.AsyncClient, cursor: str) -> None:
    problem(await client.get("/leads", params={"cursor": cursor}), 400, "bad-cursor")


@pytest.mark.parametrize(
    ("query", "field", "reason"),
    [
        ("limit=0", "limit", "must be greater than or equal to 1"),
        ("limit=201", "limit", "must be less than or equal to 200"),
        ("limit=x", "limit", "must be a whole number"),
        ("limt=5", "limt", "is not a parameter of this route"),
        ("since=yesterday", "since", "must be an RFC 3339 time, e.g. 2026-01-31T09:30:00+08:00"),
        ("cursor=" + "x" * 1025, "cursor", "must have at most 1024 characters"),
    ],
)
async def test_wrong_queries(client: httpx.AsyncClient, query: str, field: str, reason: str) -> None:
    errors = problem(await client.get(f"/leads?{query}"), 422, "invalid")["errors"]
    assert errors == [{"at": "query", "field": field, "reason": reason}]


@pytest.mark.parametrize(
    ("path", "status", "slug"),
    [
        ("/nowhere", 404, "not-found"),
        ("/leads/", 404, "not-found"),
        ("/leads/a%00b", 400, "bad-request"),
        ("/leads?cursor=%00", 400, "bad-request"),
        ("/leads?" + "&".join(f"a{n}=1" for n in range(200)), 400, "bad-request"),
    ],
)
async def test_wrong_addresses(client: httpx.AsyncClient, path: str, status: int, slug: str) -> None:
    problem(await client.get(path), status, slug)


async def test_a_wrong_path_parameter_and_a_wrong_method(probe: Probe) -> None:
    async with client_of(make_app(probe), "manager") as client:
        errors = problem(await client.get("/leads/not-a-uuid"), 422, "invalid")["errors"]
        assert errors == [{"at": "path", "field": "lead_id", "reason": "must be a UUID"}]
        response = await client.delete("/leads")
        problem(response, 405, "method-not-allowed")
        assert response.headers["allow"]


async def test_a_header_that_comes_twice_is_refused(client: httpx.AsyncClient) -> None:
    headers = [("Idempotency-Key", "a1"), ("Idempotency-Key", "a2"), *client.headers.items()]
    request = httpx.Request("POST", "http://test/leads", json={"name": "x"}, headers=headers)
    problem(await client.send(request), 400, "bad-request")


async def test_the_trace_goes_on(client: httpx.AsyncClient, probe: Probe) -> None:
    given = f"00-{'ab' * 16}-{'cd' * 8}-01"
    response = await send(client, '{"name": "x"}', traceparent=given, **{"X-Request-Id": "req-7"})
    assert response.headers["traceparent"] == given
    assert response.headers["x-request-id"] == "req-7"
    assert probe.calls[0].context.traceparent == given
    for bad in ("00-x", f"00-{'0' * 32}-{'cd' * 8}-01", f"ff-{'ab' * 16}-{'cd' * 8}-01"):
        response = await send(client, '{"name": "x"}', traceparent=bad, **{"X-Request-Id": "a b\u0001"})
        assert response.headers["traceparent"] not in (bad, given)
        assert response.headers["x-request-id"] == response.headers["traceparent"][3:35]


async def test_too_many_requests_at_once(probe: Probe) -> None:
    async with client_of(make_app(probe, max_in_flight=2)) as client:
        waiting = [asyncio.create_task(client.get("/leads/wait")) for _ in range(2)]
        await asyncio.wait_for(probe.both.wait(), 5)
        response = await client.get("/leads")
        problem(response, 503, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert (await client.get("/healthz")).status_code == 200  # probes are answered all the same
        probe.gate.set()
        assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
        assert (await client.get("/leads")).status_code == 200


async def test_health_readiness_and_metrics(probe: Probe) -> None:
    health = Health()
    broken: list[Exception] = [ConnectionError(PHONE)]

    async def check() -> None:
        if broken:
            raise broken[0]

    health.add("postgres", check)
    health.FRESH_SECONDS = 0.0
    async with client_of(make_app(probe, health=health)) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        response = await client.get("/readyz")
        assert (response.status_code, response.json()["failing"]) == (503, {"postgres": "ConnectionError"})
        broken.clear()
        assert (await client.get("/readyz")).status_code == 200
        health.stopping = True
        assert (await client.get("/readyz")).json()["failing"] == {"process": "stopping"}
        await client.get(f"/leads/{UUID(int=9)}")
        page = (await client.get("/metrics")).text
    assert 'route="/leads/{lead_id}"' in page
    assert str(UUID(int=9)) not in page


async def test_a_check_that_hangs_is_not_ready() -> None:
    health = Health()
    health.TIMEOUT_SECONDS = 0.01

    async def hang() -> None:
        await asyncio.Event().wait()

    health.add("kafka", hang)
    assert await health.failing() == {"kafka": "no answer in time"}


async def test_probes_that_come_together_ask_once() -> None:
    health, asked = Health(), 0

    async def check() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)

    health.add("postgres", check)
    assert await asyncio.gather(*(health.failing() for _ in range(20))) == [{}] * 20
    assert asked == 1


async def test_the_gate_is_started_and_drained(probe: Probe) -> None:
    happened: list[str] = []

    class Gate:
        def start(self) -> None:
            happened.append("start")

        async def stop(self) -> None:
            happened.append("stop")

    app = make_app(probe, gate=Gate())
    async with app.router.lifespan_context(app):
        assert happened == ["start"]
    assert happened == ["start", "stop"]


def test_openapi_says_who_may_call_and_what_can_go_wrong() -> None:
    document = APP.openapi()
    post = document["paths"]["/leads"]["post"]
    assert post["x-roles"] == ["sales", "marketing"]
    assert set(post["responses"]) == {"201", "400", "401", "403", "409", "412", "413", "415", "422", "503"}
    assert {p["name"] for p in post["parameters"]} == {"Idempotency-Key", "If-Match"}
    reference = post["responses"]["409"]["content"]["application/problem+json"]["schema"]["$ref"]
    assert document["components"]["schemas"][reference.rpartition("/")[2]]["title"] == "ProblemDetails"
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["paths"]["/leads/open/door"]["get"].get("security") is None
    assert document["paths"]["/leads"]["get"]["security"] == [{"bearer": []}]


def test_expired_tokens_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from kehu.auth import InvalidToken, TokenVerifier

    verifier = TokenVerifier(SECRET)
    token = issue_token(SECRET, "x", ["sales"], ttl=60)
    assert verifier.verify(token).roles == {Role.SALES}
    assert verifier.recall(token) is not None
    later = time.time() + timedelta(minutes=3).total_seconds()
    monkeypatch.setattr(time, "time", lambda: later)
    assert verifier.recall(token) is None
    real = datetime.now

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real(tz) + timedelta(minutes=3)

    monkeypatch.setattr("jwt.api_jwt.datetime", Later)
    with pytest.raises(InvalidToken, match="run out"):
        verifier.verify(token)
