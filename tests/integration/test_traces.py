"""One trace from the HTTP request to the last projection, as an OpenTelemetry collector gets it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kehu.devstack import DevStack
from kehu.supervisor import Supervisor

Found = set[tuple[str, str]]


class Collector:
    """Takes OTLP over HTTP and remembers (service, span) by trace id."""

    def __init__(self) -> None:
        self.traces: dict[str, Found] = {}
        self.changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self.changed:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        trace = self.traces.setdefault(span.trace_id.hex(), set())
                        trace.add((names["service.name"], span.name))
            self.changed.notify_all()

    def wait_for(self, trace_id: str, wanted: Found, seconds: float = 60.0) -> Found:
        with self.changed:
            self.changed.wait_for(lambda: wanted <= self.traces.get(trace_id, set()), seconds)
            return self.traces.get(trace_id, set())


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()


@pytest.mark.req("PL-03")
@pytest.mark.req("DC-01")
def test_one_trace_through_all_services(collector: Collector, tmp_path: Path) -> None:
    with DevStack() as own:  # databases and topics of its own: other tests use the same names
        env = {"KEHU_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with Supervisor(own.address, tmp_path, env=env) as suite:
            headers = {"Authorization": f"Bearer {suite.token()}"}
            with httpx.Client(base_url=suite.url("lead-intake"), headers=headers, timeout=30) as client:
                client.put("/channels/web", json={"title": "Web", "kind": "website"}).raise_for_status()
                answer = client.post("/leads", json={"channel": "web", "name": "王小明", "phone": "13800138000"})
            assert answer.status_code == 201
            trace_id = answer.headers["traceparent"].split("-")[1]
            wanted = {
                ("lead-intake", "HTTP POST"),
                ("lead-intake", "append"),
                ("lead-intake", "publish"),
                ("scoring", "consume scores"),
                ("scoring", "append"),
                ("scoring", "publish"),
                ("analytics", "consume lead_journey_g1"),
            }
            found = collector.wait_for(trace_id, wanted)
    assert wanted <= found, f"missing: {wanted - found}"
