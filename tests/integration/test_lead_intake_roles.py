"""lead-intake as it runs: its processes, from the request over HTTP to the record on Kafka and the line in the list."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from kehu.auth import Role, issue_token
from kehu.devstack.base import free_port
from kehu.events import Recorded
from kehu.events.lead_intake import ChannelDefined, CustomerRegistered, LeadCaptured
from kehu.kafka.topics import ensure_topics, topic_of
from kehu.privacy import HttpKeyring, opened
from kehu.testing.kafka import read_topic, until

SECRET = "a-secret-of-thirty-two-characters!"
TOPIC = topic_of("lead-intake")


async def topics(bootstrap: str, unwanted: str | None = None) -> list[str]:
    """The topics there are, after asking for one of them to go."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        found: list[str] = await admin.list_topics()
        if unwanted in found:
            await admin.delete_topics([unwanted])
        return found
    finally:
        await admin.close()


async def fresh_topic(bootstrap: str) -> None:
    """The topic without what other tests may have left: a relay refuses a topic of another store."""
    await until(lambda: TOPIC not in asyncio.run(topics(bootstrap, TOPIC)), "the old topic is gone")
    await ensure_topics(bootstrap, [TOPIC])


def records(bootstrap: str) -> list[tuple[Any, Recorded]]:
    """Everything on the topic."""
    return [(record, Recorded.from_bytes(record.value)) for record in asyncio.run(read_topic(bootstrap, TOPIC))]


@pytest.fixture
def environment(database: str, kafka_bootstrap: str) -> dict[str, str]:
    key = base64.b64encode(b"k" * 32).decode()
    return {
        **os.environ,
        "KEHU_ENVIRONMENT": "development",
        "KEHU_POSTGRES_URL": database,
        "KEHU_DATABASE": urlsplit(database).path.removeprefix("/"),
        "KEHU_KAFKA_BOOTSTRAP": kafka_bootstrap,
        "KEHU_JWT_SECRET": SECRET,
        "KEHU_MASTER_KEY": key,
        "KEHU_HASH_KEY": key,
        "KEHU_HTTP_PORT": str(free_port()),
    }


@contextmanager
def process(environment: dict[str, str], *roles: str) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-m", "lead_intake", *roles], env=environment)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(timeout=20)


def client(environment: dict[str, str], *roles: Role) -> httpx.Client:
    headers = {"Authorization": f"Bearer {issue_token(SECRET, 'u1', roles)}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{environment['KEHU_HTTP_PORT']}", headers=headers, timeout=30)


def answers(http: httpx.Client, path: str) -> Any:
    try:
        response = http.get(path)
    except httpx.TransportError:
        return None
    return response if response.status_code == 200 else None


@pytest.mark.req("LI-01")
async def test_from_the_request_to_kafka_and_the_list(environment: dict[str, str], kafka_bootstrap: str) -> None:
    await fresh_topic(kafka_bootstrap)
    with process(environment, "migrate", "api", "relay", "projector") as running:
        with client(environment, Role.ADMIN, Role.SYSTEM) as http:
            await until(lambda: answers(http, "/readyz"), "the process is ready", 60)
            http.put("/channels/expo", json={"title": "上海工博会", "kind": "trade_fair"}).raise_for_status()
            lead = {"channel": "expo", "name": "张伟", "phone": "13800138000"}
            captured = http.post("/leads", json=lead).raise_for_status().json()
            lines = await until(lambda: answers(http, "/leads").json()["items"], "the list has the lead")
            assert [(line["lead_id"], line["name"]) for line in lines] == [(captured["lead_id"], "张伟")]
            found = await until(lambda: len(all_ := records(kafka_bootstrap)) >= 3 and all_, "Kafka has the events", 30)
            assert {recorded.type.removesuffix(".v1") for _, recorded in found} == {
                ChannelDefined.NAME,
                CustomerRegistered.NAME,
                LeadCaptured.NAME,
            }
            of_customer = [(r, recorded) for r, recorded in found if recorded.customer_id == captured["customer_id"]]
            assert {r.key.decode() for r, _ in of_customer} == {captured["customer_id"]}
            assert [recorded.type for _, recorded in of_customer] == ["customer.registered.v1", "lead.captured.v1"]
            assert all("张伟".encode() not in r.value and b"13800138000" not in r.value for r, _ in found)
            event = of_customer[-1][1]
            key = HttpKeyring(http).keys([captured["customer_id"]])[captured["customer_id"]]
            shown = opened(event, key)
            assert isinstance(shown, LeadCaptured) and shown.contact.plain.phone == "+8613800138000"
            metrics = http.get("/metrics").text
            assert "kehu_http_requests_total" in metrics and "/leads" in metrics
        running.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.wait, 30) == 0, "an orderly end"


def test_settings_that_are_missing_are_named(environment: dict[str, str]) -> None:
    del environment["KEHU_MASTER_KEY"]
    done = subprocess.run(
        [sys.executable, "-m", "lead_intake", "api"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "KEHU_MASTER_KEY" in done.stderr and "KEHU_HASH_KEY" not in done.stderr


def test_rebuild_is_done_once_and_ends(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lead_intake", "migrate", "rebuild"], env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
