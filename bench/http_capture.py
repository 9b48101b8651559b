"""POST /leads, one worker, 1, 16 and 64 connections: ours, naive FastAPI with stock `eventsourcing`, Starlette with a raw INSERT."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import orjson
import uvloop
from pydantic import BaseModel
from rich.table import Table

from bench.kit import Contender, compare, console
from kehu.auth import Role, issue_token
from kehu.devstack import DevStack, create_database
from kehu.devstack.base import free_port

SECRET = "only-for-the-benchmark-0123456789"
WARM_UP = 0.5


# --- Contenders -------------------------------------------------------------------------------------------------------


class PlainLead(BaseModel):
    """What the naive peer takes."""

    channel: str
    name: str | None = None
    phone: str | None = None
    email: str | None = None
    company: str | None = None
    title: str | None = None


def naive_app(url: str) -> Any:
    """What somebody writes in an afternoon: pydantic, an aggregate, the library's own PostgreSQL recorder."""
    from uuid import UUID

    from eventsourcing.application import Application
    from eventsourcing.domain import Aggregate, event
    from fastapi import FastAPI
    from psycopg.conninfo import conninfo_to_dict

    class Lead(Aggregate):
        @event("Captured")
        def __init__(self, channel: str, name: str, phone: str, email: str, company: str, title: str) -> None:
            self.channel, self.name, self.phone, self.email = channel, name, phone, email
            self.company, self.title = company, title

    class Leads(Application[UUID]):
        def capture(self, **values: Any) -> str:
            lead = Lead(**values)
            self.save(lead)
            return str(lead.id)

    parts = conninfo_to_dict(url)
    leads = Leads(
        env={
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": str(parts["dbname"]),
            "POSTGRES_HOST": str(parts["host"]),
            "POSTGRES_PORT": str(parts["port"]),
            "POSTGRES_USER": str(parts["user"]),
            "POSTGRES_PASSWORD": str(parts.get("password", "x")),
            "POSTGRES_POOL_SIZE": "8",
        }
    )
    app = FastAPI()

    @app.post("/leads", status_code=201)
    def capture(lead: PlainLead) -> dict[str, str]:
        return {"lead_id": leads.capture(**lead.model_dump())}

    return app


def raw_app(url: str) -> Any:
    """The least that stores something: the body as it came, one row, one commit."""
    from contextlib import asynccontextmanager
    from uuid import uuid4

    from psycopg_pool import AsyncConnectionPool
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    pool = AsyncConnectionPool(url, min_size=8, max_size=8, kwargs={"autocommit": True}, open=False)

    @asynccontextmanager
    async def life(_: Any) -> Any:
        await pool.open()
        async with pool.connection() as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS leads (id uuid PRIMARY KEY, body bytea)")
        yield
        await pool.close()

    async def capture(request: Request) -> JSONResponse:
        body, lead_id = await request.body(), uuid4()
        async with pool.connection() as connection:
            await connection.execute("INSERT INTO leads VALUES (%b, %b)", (lead_id, body))
        return JSONResponse({"lead_id": str(lead_id)}, 201)

    return Starlette(routes=[Route("/leads", capture, methods=["POST"])], lifespan=life)


def serve(which: str, url: str, port: int) -> None:
    """One worker of a contender, in a process of its own."""
    import uvicorn

    app = {"naive": naive_app, "raw": raw_app}[which](url)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False, http="httptools", loop="uvloop")


# --- Processes --------------------------------------------------------------------------------------------------------


@contextmanager
def process(command: list[str], port: int, env: dict[str, str] | None = None) -> Iterator[str]:
    """A server in a process of its own; gives its address when it takes connections, and ends it at the end."""
    started = subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, **(env or {})})
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if started.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start") from None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        started.terminate()
        try:
            started.wait(timeout=20)
        except subprocess.TimeoutExpired:
            started.kill()


@contextmanager
def lead_intake(postgres_url: str, database: str) -> Iterator[str]:
    """Our API as it runs in production, with a channel `bench`; `token()` may call it."""
    port = free_port()
    key = base64.b64encode(b"k" * 32).decode()
    env = {
        "KEHU_ENVIRONMENT": "development",
        "KEHU_POSTGRES_URL": postgres_url,
        "KEHU_DATABASE": database,
        "KEHU_KAFKA_BOOTSTRAP": "127.0.0.1:9",
        "KEHU_JWT_SECRET": SECRET,
        "KEHU_MASTER_KEY": key,
        "KEHU_HASH_KEY": key,
        "KEHU_HTTP_PORT": str(port),
        "KEHU_LOG_LEVEL": "error",
    }
    subprocess.run([sys.executable, "-m", "lead_intake", "migrate"], check=True, env={**os.environ, **env})
    with process(["lead_intake", "api"], port, env) as url:
        answer = httpx.put(
            f"{url}/channels/bench",
            json={"title": "Benchmark", "kind": "trade_fair"},
            headers={"Authorization": f"Bearer {token()}"},
        )
        answer.raise_for_status()
        yield url


def token() -> str:
    """Of somebody who may do everything."""
    return issue_token(SECRET, "bench", [Role.ADMIN], ttl=86_400)


# --- Load -------------------------------------------------------------------------------------------------------------

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the answer to the last is in."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.buffer = b""
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has no such base
        self.send()

    def send(self) -> None:
        self.sent_at = time.perf_counter()
        self.transport.write(self.load.request())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        match = _LENGTH.search(self.buffer, 0, head + 2)
        if match is None or len(self.buffer) < head + 4 + int(match[1]):
            return
        self.load.answered(self.buffer[9:12], time.perf_counter() - self.sent_at)
        self.buffer = b""
        if self.load.running:
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.load.running:
            self.load.errors += 1


class Load:
    """Requests by so many connections, every lead another person."""

    def __init__(self, url: str, authorization: str) -> None:
        address = urlsplit(url)
        self.host, self.port = address.hostname or "", address.port or 80
        self.head = f"POST /leads HTTP/1.1\r\nHost: bench\r\nAuthorization: {authorization}\r\nContent-Type: application/json\r\n"
        self.number = int.from_bytes(os.urandom(4), "big") % 900_000_000
        self.running = True
        self.counting = False
        self.errors = 0
        self.seconds: list[float] = []

    def request(self) -> bytes:
        self.number += 1
        n = self.number % 1_000_000_000
        body = orjson.dumps(
            {
                "channel": "bench",
                "name": "王小明",
                "phone": f"1{3 + n % 7}{n:09d}",
                "email": f"wang{n}@example.com",
                "company": "深圳市星辰科技有限公司",
                "title": "采购经理",
            }
        )
        return f"{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def answered(self, status: bytes, seconds: float) -> None:
        if status != b"201":
            self.errors += 1
        elif self.counting:
            self.seconds.append(seconds)

    async def run(self, connections: int, seconds: float) -> dict[str, float]:
        """Figures after a warm-up: requests per second, latencies in milliseconds, errors."""
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            await loop.create_connection(lambda: Connection(self), self.host, self.port)
        await asyncio.sleep(WARM_UP)
        self.counting, started = True, time.perf_counter()
        await asyncio.sleep(seconds)
        elapsed, self.running = time.perf_counter() - started, False
        ordered = sorted(self.seconds) or [0.0]
        return {
            "per_second": len(self.seconds) / elapsed,
            "p50": ordered[len(ordered) // 2] * 1000,
            "p99": ordered[len(ordered) * 99 // 100] * 1000,
            "errors": float(self.errors),
        }


def load(url: str, connections: int, seconds: float) -> dict[str, float]:
    """Load from a process of its own, so that it does not take turns with anything."""
    command = [sys.executable, "-m", "bench.http_capture", "--load", url]
    done = subprocess.run(
        [*command, "--connections", str(connections), "--seconds", str(seconds)], check=True, capture_output=True
    )
    figures: dict[str, float] = json.loads(done.stdout)
    if figures["errors"] or not figures["per_second"]:
        raise RuntimeError(
            f"{figures['errors']:.0f} requests to {url} were not answered with 201, {figures['per_second']:.0f}/s were"
        )
    return figures


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one round")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        which, url, port = options.serve
        serve(which, url, int(port))
        return
    if options.load:
        work = Load(options.load, f"Bearer {token()}").run(options.connections[0], options.seconds)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            print(json.dumps(runner.run(work)))
        return
    with DevStack(kafka=False) as stack, ExitStack() as processes:
        url = stack.address.postgres_url
        addresses: dict[str, str] = {}
        for which in ("raw", "naive"):
            port = free_port()
            command = ["bench.http_capture", "--serve", which, create_database(url, f"bench_http_{which}"), str(port)]
            addresses[which] = processes.enter_context(process(command, port))
        addresses["ours"] = processes.enter_context(lead_intake(url, "bench_http_ours"))
        for connections in options.connections:
            latencies: dict[str, dict[str, float]] = {}

            def contender(
                name: str, role: str, which: str, connections: int = connections, kept: dict[str, Any] = latencies
            ) -> Contender:
                def run() -> float:
                    kept[name] = load(addresses[which], connections, options.seconds)
                    return float(kept[name]["per_second"])

                return Contender(name, role, run)

            compare(
                f"POST /leads, one worker, {connections} connection(s)",
                "requests/s",
                [
                    contender("Starlette, one raw INSERT", "limit", "raw"),
                    contender("FastAPI + eventsourcing", "peer", "naive"),
                    contender("kehu lead-intake", "ours", "ours"),
                ],
                options.repeat,
            )
            table = Table(title="latency of the last round", title_justify="left")
            for column in ("contender", "p50 ms", "p99 ms"):
                table.add_column(column, justify="left" if column == "contender" else "right")
            for name, figures in latencies.items():
                table.add_row(name, f"{figures['p50']:.2f}", f"{figures['p99']:.2f}")
            console.print(table)
    console.print("Ours validates, cleans, looks for duplicates, encrypts, numbers and records the command id.")


if __name__ == "__main__":
    main()
