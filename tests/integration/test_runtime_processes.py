"""Processes of a tiny service under a supervisor: start, ready, stop in order, crash, pause, and the end of the supervisor."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest

from kehu.supervisor import NoStack, NotReady, ServiceSpec, Stack, Supervisor, runs

TINY = '''
"""A service without database, whose roles say what happens to them by making files."""

import asyncio, os
from pathlib import Path
from typing import ClassVar

from kehu.runtime import Service, current_role, main
from kehu.settings import ServiceSettings

HERE = Path(os.environ["TINY_DIR"])


class Settings(ServiceSettings):
    SERVICE: ClassVar[str] = "tiny"


def migrate(settings):
    (HERE / "migrated").write_text(settings.database)
    if (HERE / "break-migrate").exists():
        raise RuntimeError("this migration cannot work")


async def api(settings):
    from tiny.web import run

    await run(settings)


async def orderly(settings):
    over = asyncio.Event()
    current_role().on_stop(over.set)
    await over.wait()
    await asyncio.sleep(0.05)  # something to finish
    (HERE / "orderly-left").touch()


async def awkward(settings):
    def refuse():
        raise LookupError("13800138000")
    current_role().on_stop(refuse)
    try:
        await asyncio.Event().wait()
    finally:
        (HERE / "awkward-left").touch()


async def endless(settings):
    try:
        await asyncio.Event().wait()
    finally:
        (HERE / "endless-left").touch()


async def stubborn(settings):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            (HERE / "stubborn-asked").touch()


async def unready(settings):
    async def check():
        if not (HERE / "there").exists():
            raise ConnectionError("13800138000")
    current_role().health.add("thing", check)
    await asyncio.Event().wait()


async def broken(settings):
    raise RuntimeError("broken by design")


async def ending(settings):
    await asyncio.sleep(0)


roles = dict(migrate=migrate, api=api, orderly=orderly, awkward=awkward, endless=endless, stubborn=stubborn, unready=unready,
             broken=broken, ending=ending)
if __name__ == "__main__":
    main(Service("tiny", Settings, roles))
'''


WEB = """
import asyncio, os
from pathlib import Path
from typing import Annotated

from kehu.http import Principal, Router, create_app, json_response, requires, serve
from kehu.runtime import current_role

HERE = Path(os.environ["TINY_DIR"])
router = Router()


@router.get("/hello")
async def hello(who: Annotated[Principal, requires("sales")]):
    return json_response({"actor": who.actor, "pid": os.getpid()})


@router.get("/slow")
async def slow(who: Annotated[Principal, requires()]):
    (HERE / "slow-began").touch()
    while not (HERE / "slow-may-end").exists():
        await asyncio.sleep(0.01)
    return json_response({"slow": True})


async def run(settings):
    app = create_app(settings, title="Tiny", routers=[router], health=current_role().health)
    await serve(app, settings)
    (HERE / "api-left").touch()
"""


@dataclass(frozen=True)
class Nowhere:
    """Addresses that nothing listens on: the tiny service asks for neither."""

    postgres_url: str = "postgresql://kehu@127.0.0.1:1/postgres"
    kafka_bootstrap: str = "127.0.0.1:1"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "__init__.py").touch()
    (tmp_path / "tiny" / "__main__.py").write_text(TINY)
    (tmp_path / "tiny" / "web.py").write_text(WEB)
    return tmp_path


Make = Callable[..., Supervisor]


@pytest.fixture
def make(here: Path) -> Iterator[Make]:
    made: list[Supervisor] = []

    def supervisor(*roles: str, **changes: object) -> Supervisor:
        env = {"TINY_DIR": str(here), "PYTHONPATH": str(here), **changes.pop("env", {})}  # type: ignore[dict-item]
        spec = replace(ServiceSpec("tiny", roles, topic=False, env=env), **changes)  # type: ignore[arg-type]
        supervisor = Supervisor(Nowhere(), here / "state", [spec])
        made.append(supervisor)
        return supervisor

    yield supervisor
    for one in made:
        one.stop()


def eventually(question: Callable[[], object], what: str, deadline: float = 20.0) -> None:
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not question():
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        pause.wait(0.02)


def get(url: str, token: str) -> httpx.Response:
    return httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=20)


@pytest.mark.req("PL-01")
def test_a_service_starts_and_says_where_it_is(make: Make, here: Path) -> None:
    supervisor = make("api", "orderly", "endless")
    with supervisor:
        assert (here / "migrated").read_text() == "kehu_tiny"
        url = supervisor.url("tiny")
        answer = get(f"{url}/hello", supervisor.token("sales", subject="wang.wei"))
        assert answer.json() == {"actor": "user:wang.wei", "pid": supervisor.process("tiny", "api").pid}
        assert get(f"{url}/hello", supervisor.token("legal")).status_code == 403
        stack = Stack.load(here / "state")
        assert stack.url("tiny") == url
        assert get(f"{url}/hello", stack.token()).status_code == 200
        entries = stack.status()
        assert [(e["roles"], e["ready"]) for e in entries] == [
            (["api"], True),
            (["orderly"], True),
            (["endless"], True),
        ]
        assert len({e["pid"] for e in entries}) == 3
        assert all(e["rss"] > 1_000_000 for e in entries)
        for name in ("stack.json", "secrets.json"):
            assert stat.S_IMODE((here / "state" / name).stat().st_mode) == 0o600
        log = supervisor.process("tiny", "orderly").log_tail().splitlines()
        assert {json.loads(line)["service"] for line in log} == {"tiny"}
        with pytest.raises(LookupError):
            supervisor.process("tiny", "relay")
    assert (here / "orderly-left").exists()
    assert (here / "endless-left").exists()
    assert (here / "api-left").exists()
    assert not runs(here / "state")
    with pytest.raises(NoStack, match="kehu up"):
        Stack.load(here / "state")


@pytest.mark.req("PL-04")
def test_a_request_under_way_is_finished_before_the_end(make: Make, here: Path) -> None:
    supervisor = make("api")
    with supervisor, ThreadPoolExecutor(2) as threads:
        api = supervisor.process("tiny", "api")
        answer = threads.submit(get, f"{api.url}/slow", supervisor.token())
        eventually((here / "slow-began").exists, "the request is under way")
        stopping = threads.submit(api.stop)

        def refused() -> bool:
            try:
                httpx.get(f"{api.url}/healthz", timeout=5)
            except httpx.TransportError:
                return True
            return False

        eventually(refused, "no new connection is accepted")
        assert not answer.done()
        assert api.pid is not None
        (here / "slow-may-end").touch()
        assert answer.result(20).json() == {"slow": True}
        stopping.result(20)
        assert (here / "api-left").exists()


@pytest.mark.req("PL-04")
def test_balancers_can_notice_before_the_api_closes(make: Make) -> None:
    supervisor = make("api", env={"KEHU_DRAIN_SECONDS": "1.5"})
    with supervisor, ThreadPoolExecutor(1) as threads:
        api = supervisor.process("tiny", "api")
        stopping = threads.submit(api.stop)
        eventually(lambda: httpx.get(f"{api.url}/readyz").status_code == 503, "it is no longer ready")
        assert get(f"{api.url}/hello", supervisor.token("sales")).status_code == 200
        stopping.result(20)


def test_the_end_of_each_role(make: Make, here: Path) -> None:
    supervisor = make(
        "orderly", "endless", "stubborn", together=(("orderly", "endless", "stubborn"),), env={"KEHU_STOP_SECONDS": "2"}
    )
    supervisor.start()
    supervisor.wait_ready()
    process = supervisor.process("tiny", "orderly")
    assert process is supervisor.process("tiny", "stubborn")
    popen = psutil.Process(process.pid)
    os.kill(popen.pid, signal.SIGTERM)
    eventually((here / "stubborn-asked").exists, "the role was cancelled")
    eventually((here / "orderly-left").exists, "the role had time")
    eventually((here / "endless-left").exists, "the role was cancelled")
    supervisor.stop()
    assert not popen.is_running()


def test_a_role_that_will_not_end_is_ended(make: Make, here: Path) -> None:
    supervisor = make("stubborn", env={"KEHU_STOP_SECONDS": "1"})
    with supervisor:
        process = supervisor.process("tiny", "stubborn")
        process.stop(20)
        assert process.pid is None
        assert "did not stop in time" in process.log_tail()


def test_a_role_that_cannot_be_told_to_stop_is_cancelled(make: Make, here: Path) -> None:
    with make("awkward") as supervisor:
        process = supervisor.process("tiny", "awkward")
        process.stop()
        assert (here / "awkward-left").exists()
        assert "could not be told to stop" in process.log_tail()
        assert "13800138000" not in process.log_tail()


@pytest.mark.req("DC-03")
def test_what_dies_is_started_again(make: Make) -> None:
    supervisor = make("api", "endless")
    with supervisor:
        other = supervisor.process("tiny", "endless").pid
        api = supervisor.process("tiny", "api")
        before = api.pid
        for restarts in (1, 2):
            api.kill()
            api.wait_ready()
            assert (api.pid != before, api.restarts) == (True, restarts)
            before = api.pid
            assert get(f"{api.url}/hello", supervisor.token("sales")).json()["pid"] == api.pid
        assert supervisor.process("tiny", "endless").pid == other
        eventually(lambda: Stack.load(supervisor.state_dir).status()[0]["pid"] == api.pid, "stack.json has the new pid")
        api.restart()
        api.wait_ready()
        assert (api.pid != before, api.restarts) == (True, 2)
        api.kill(restart=False)
        assert api.pid is None
        assert not api.ready()
        api.start()
        api.wait_ready()


def test_pause_and_resume(make: Make) -> None:
    supervisor = make("api", "endless")
    with supervisor:
        for role in ("api", "endless"):
            process = supervisor.process("tiny", role)
            process.pause()
            eventually(lambda process=process: not process.ready(), "paused")  # type: ignore[misc]
            assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        supervisor.process("tiny", "api").resume()
        supervisor.process("tiny", "api").wait_ready()
        supervisor.process("tiny", "endless").stop()  # a paused one ends in order as well
        assert supervisor.process("tiny", "endless").pid is None


@pytest.mark.req("PL-07")
def test_refused_settings_are_not_tried_again(make: Make) -> None:
    supervisor = make("api", migrates=False, env={"KEHU_POOL_SIZE": "0"})
    supervisor.start()
    with pytest.raises(NotReady, match=r"KEHU_POOL_SIZE\s+Input should be greater than or equal to 1"):
        supervisor.wait_ready(30)
    api = supervisor.process("tiny", "api")
    assert (api.refused, api.restarts, api.pid) == (True, 0, None)


@pytest.mark.parametrize(("role", "words"), [("broken", "broken by design"), ("ending", "a role ended by itself")])
def test_a_role_that_fails_is_tried_again_ever_more_slowly(make: Make, role: str, words: str) -> None:
    supervisor = make(role, migrates=False)
    supervisor.start()
    process = supervisor.process("tiny", role)
    eventually(lambda: process.restarts >= 2, "it was tried again")
    assert 0.2 < process._delay <= 10.0
    with pytest.raises(NotReady, match="is not ready"):
        process.wait_ready(0.2)
    assert words in process.log_tail(200)


def test_a_migration_that_fails_starts_nothing(make: Make, here: Path) -> None:
    (here / "break-migrate").touch()
    supervisor = make("api")
    with pytest.raises(NotReady, match=r"(?s)tiny/migrate failed \(exit code 1\).*this migration cannot work"):
        supervisor.start()
    assert supervisor.process("tiny", "api").pid is None
    assert not runs(here / "state")


def test_readiness_is_what_the_checks_say(make: Make, here: Path) -> None:
    supervisor = make("unready")
    supervisor.start()
    process = supervisor.process("tiny", "unready")
    eventually(lambda: psutil.Process(process.pid).is_running() and _status(f"{process.url}/healthz") == 200, "alive")
    answer = httpx.get(f"{process.url}/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "unready", "failing": {"thing": "ConnectionError"}})
    (here / "there").touch()
    process.wait_ready()
    assert "python_info" in httpx.get(f"{process.url}/metrics").text


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return None


def test_the_admin_port_against_strangers(make: Make) -> None:
    import socket

    supervisor = make("endless")
    with supervisor:
        process = supervisor.process("tiny", "endless")
        assert _status(f"{process.url}/secret") == 404
        assert httpx.post(f"{process.url}/readyz").status_code == 404
        for words in (b"\r\n\r\n", b"GET\r\n\r\n", b"\xff" * 100_000, b"GET /readyz HTTP/1.1\r\n" + b"a: b\r\n" * 5000):
            with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connection:
                try:
                    connection.sendall(words)
                    while connection.recv(4096):
                        pass
                except ConnectionError:
                    pass  # it hung up: as well
        assert process.ready()


def test_one_supervisor_for_a_directory(make: Make) -> None:
    with make("endless"), pytest.raises(NotReady, match="kehu down"):
        make("endless").start()


def test_logs_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kehu.supervisor.LOG_BYTES", 1000)
    supervisor = make("endless")
    with supervisor:
        log = supervisor.process("tiny", "endless").log_file
        with log.open("ab") as file:
            file.write(b"x" * 5000 + b"\n")
        eventually(lambda: log.stat().st_size < 1000, "the log was cut")
        assert b"x" * 5000 in log.with_name(log.name + ".1").read_bytes()


OWNER = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_runtime_processes import Nowhere
from kehu.supervisor import ServiceSpec, Supervisor
here = Path(sys.argv[1])
env = {"TINY_DIR": str(here), "PYTHONPATH": str(here)}
supervisor = Supervisor(Nowhere(), here / "state", [ServiceSpec("tiny", ("api", "orderly", "endless"), topic=False, env=env)])
supervisor.start()
supervisor.wait_ready()
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.mark.req("PL-01")
def test_a_killed_supervisor_leaves_nothing(here: Path) -> None:
    folder = str(Path(__file__).parent)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(here), folder], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        stack = Stack.load(here / "state")
        assert stack.pid == owner.pid
        children = [psutil.Process(entry["pid"]) for entry in stack.status()]
        assert len(children) == 3
        children[1].suspend()  # a paused process must not stay behind either
    finally:
        owner.kill()
        owner.wait(10)
    eventually(lambda: not any(child.is_running() for child in children), "all children are gone", 10)
    assert not runs(here / "state")


def test_wrong_command_lines(here: Path) -> None:
    env = {**os.environ, "TINY_DIR": str(here), "PYTHONPATH": str(here)}
    for arguments, code in (([], 2), (["nonsense"], 2), (["api", "api"], 2), (["--help"], 0)):
        done = subprocess.run(
            [sys.executable, "-m", "tiny", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, "Roles: migrate api orderly" in done.stderr) == (code, True)
