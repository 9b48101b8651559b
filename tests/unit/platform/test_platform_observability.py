"""What a process tells of itself must not tell of its customers."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel, ValidationError

from kehu import observability
from kehu.decider import Refused
from kehu.observability import (
    ConsoleFormatter,
    Health,
    JsonFormatter,
    configure_tracing,
    continuing,
    counter,
    current_traceparent,
    exception_summary,
    flush_traces,
    gauge,
    new_traceparent,
    probe,
    redacted,
    span,
    valid_traceparent,
)
from kehu.settings import ServiceSettings

PHONE, EMAIL = "13800138000", "wang.wei@example.com"


def logged(message: str, *args: object, error: BaseException | None = None, **extra: Any) -> dict[str, Any]:
    record = logging.getLogger("t").makeRecord("t", logging.INFO, __file__, 1, message, args, None, extra=extra)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    text = JsonFormatter("scoring", "consumer").format(record)
    assert "\n" not in text
    assert ConsoleFormatter("scoring", "consumer").format(record)
    line: dict[str, Any] = json.loads(text)
    return line


@pytest.mark.req("PL-03")
def test_a_log_line_is_json_with_ids() -> None:
    traceparent = new_traceparent()
    with continuing(traceparent):
        line = logged("applied %d events", 5, consumer="crm.scoring.inputs", position=7, duration_ms=1.5)
    assert line["message"] == "applied 5 events"
    assert (line["service"], line["role"], line["level"]) == ("scoring", "consumer", "info")
    assert (line["consumer"], line["position"], line["duration_ms"]) == ("crm.scoring.inputs", 7, 1.5)
    assert line["trace_id"] == traceparent[3:35]
    assert line["time"].endswith("Z")


@pytest.mark.req("LI-11")
def test_fields_that_are_not_on_the_list_are_dropped() -> None:
    line = logged("a lead", phone=PHONE, name_of_customer="王伟", payload={"x": 1}, stream="lead-1")
    assert line["stream"] == "lead-1"
    assert not {"phone", "name_of_customer", "payload"} & line.keys()
    assert PHONE not in json.dumps(line)


@pytest.mark.req("LI-11")
@pytest.mark.parametrize(
    "text",
    [
        f"call {PHONE}!",
        "call +86 138 0013 8000",
        "call 86-13800138000",
        "138-0013-8000",
        f"mail to {EMAIL}, please",
        f"<{EMAIL}>",
        "postgresql://kehu:s3cret@127.0.0.1/x",
    ],
)
def test_messages_are_redacted(text: str) -> None:
    shown = redacted(text)
    assert "8000" not in shown
    assert "wang" not in shown
    assert "s3cret" not in shown


def test_ids_and_numbers_are_left_as_they_are() -> None:
    for text in (
        "lead-13800138-0013-8000-8000-138001380001",
        "position 138001380001",
        "stream activity-6b656875-0000-5000-8000-13800138000a-202601",
    ):
        assert redacted(text) == text


class _Model(BaseModel):
    phone: int


@pytest.mark.req("LI-11")
def test_exceptions_are_told_without_their_data() -> None:
    with pytest.raises(ValidationError) as caught:
        _Model.model_validate({"phone": EMAIL})
    errors: list[BaseException] = [
        caught.value,
        ValueError(f"bad {EMAIL} 王伟"),
        KeyError("王伟"),
        psycopg.errors.UniqueViolation("Key (name)=(王伟) already exists"),
        psycopg.errors.InvalidTextRepresentation("invalid input: 王伟"),
        LookupError("王伟"),
    ]
    for error in errors:
        text = json.dumps(logged("failed", error=error), ensure_ascii=False)
        assert "王伟" not in text
        assert EMAIL not in text
        assert type(error).__name__ in text
    assert exception_summary(caught.value)["fields"] == [{"at": "phone", "type": "int_parsing"}]
    assert exception_summary(psycopg.errors.UniqueViolation("x"))["sqlstate"] == "23505"


def test_exceptions_of_ours_and_of_connections_say_why() -> None:
    assert exception_summary(Refused("lead-rejected", "x"))["slug"] == "lead-rejected"
    assert exception_summary(ConnectionRefusedError("no"))["reason"] == "no"
    assert exception_summary(psycopg.OperationalError("connection failed"))["reason"] == "connection failed"
    try:
        try:
            raise TimeoutError
        except TimeoutError as cause:
            raise RuntimeError("the server did not start") from cause
    except RuntimeError as error:
        summary = exception_summary(error)
    assert (summary["reason"], summary["cause"]) == ("the server did not start", "TimeoutError")
    assert summary["frames"][0].endswith("test_exceptions_of_ours_and_of_connections_say_why")


def test_a_metric_is_declared_once() -> None:
    first = counter("kehu_test_things_total", "Things.", "kind")
    assert counter("kehu_test_things_total", "Things.", "kind") is first
    with pytest.raises(TypeError, match="declared twice"):
        gauge("kehu_test_things_total", "Things.")


@pytest.mark.req("DC-01")
def test_trace_contexts() -> None:
    assert valid_traceparent(new_traceparent())
    for bad in (None, "", "x" * 55, new_traceparent().upper(), "01" + new_traceparent()[2:], new_traceparent() + "-x"):
        assert valid_traceparent(bad) is None
    assert current_traceparent() is None
    outer, inner = new_traceparent(), new_traceparent()
    with continuing(outer):
        with continuing(inner):
            assert current_traceparent() == inner
        assert current_traceparent() == outer
        with span("work", count=1) as recording:
            recording.set(count=2)
            assert current_traceparent() == outer
    assert current_traceparent() is None


class _Collector:
    """Takes OTLP over HTTP and keeps what came."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.bodies.append(_plain(body, self.headers.get("Content-Encoding")))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()


def _plain(body: bytes, encoding: str | None) -> bytes:
    import gzip

    return gzip.decompress(body) if encoding == "gzip" else body


@pytest.fixture
def collector() -> Iterator[_Collector]:
    made = _Collector()
    yield made
    flush_traces()
    made.server.shutdown()
    made.server.server_close()
    made.thread.join(5)


@pytest.mark.req("PL-03")
def test_spans_reach_the_collector_as_one_trace(collector: _Collector) -> None:
    settings = ServiceSettings(
        environment="development",
        postgres_url="postgresql://h/x",
        kafka_bootstrap="h:1",
        jwt_secret="s" * 32,
        otlp_endpoint=f"http://127.0.0.1:{collector.server.server_port}",
    )
    configure_tracing(settings, "api")
    given = new_traceparent()
    with span("POST /leads", parent=given):
        within = current_traceparent() or ""
        with pytest.raises(ValueError, match="wrong"), span("append", count=3):
            raise ValueError(f"wrong {EMAIL}")
    assert within[3:35] == given[3:35]
    assert within != given
    flush_traces()
    assert observability.tracing() is False
    sent = b"".join(collector.bodies)
    assert b"POST /leads" in sent
    assert b"append" in sent
    assert b"kehu" in sent
    assert bytes.fromhex(given[3:35]) in sent
    assert EMAIL.encode() not in sent


async def test_starting_and_stopping_are_not_ready() -> None:
    health = Health()
    health.starting.add("relay")
    status, _, body = await probe("/readyz", health)
    assert (status, json.loads(body)["failing"]) == (503, {"relay": "starting"})
    assert (await probe("/healthz", health))[0] == 200
    health.starting.clear()
    assert (await probe("/readyz", health))[0] == 200

    async def broken() -> None:
        await asyncio.sleep(0)
        raise LookupError(PHONE)

    health.add("kafka", broken)
    health.FRESH_SECONDS = 0.0
    assert await health.failing() == {"kafka": "LookupError"}
    health.remove("kafka")
    assert await health.failing() == {}
