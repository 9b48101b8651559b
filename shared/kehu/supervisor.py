"""All processes of the suite on one machine: started, watched, started again when they die, ended together.

For laptops, tests and the demo. One control thread starts and watches the processes, because the kernel ends a child
with the thread that started it (PR_SET_PDEATHSIG): so a killed supervisor leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import json
import logging
import os
import secrets as random_secrets
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

log = logging.getLogger(__name__)

STATE = Path(".kehu")
EXIT_REFUSED = 2  # settings refused: starting again cannot help
STOP_SECONDS = 25.0
LOG_BYTES = 10 << 20


class Address(Protocol):
    """Where PostgreSQL and Kafka listen, e.g. `kehu.devstack.Address`."""

    @property
    def postgres_url(self) -> str: ...

    @property
    def kafka_bootstrap(self) -> str: ...


@dataclass(frozen=True)
class ServiceSpec:
    """A service that a supervisor runs.

    Args:
        name: e.g. `lead-intake`.
        roles: each becomes a process.
        module: started as `python -m <module> ROLE`; the name in snake case when empty.
        together: roles that share one process, to save memory.
        secrets: which of the stack's secrets it gets.
        migrates: whether it has the role `migrate`, which runs before the others.
        topic: whether it writes events, so that its Kafka topic is needed.
        env: more environment variables.
    """

    name: str
    roles: tuple[str, ...]
    module: str = ""
    together: tuple[tuple[str, ...], ...] = ()
    secrets: tuple[str, ...] = ("jwt_secret",)
    migrates: bool = True
    topic: bool = True
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def package(self) -> str:
        """The module that is started."""
        return self.module or self.name.replace("-", "_")

    def processes(self) -> list[tuple[str, ...]]:
        """The roles of each process."""
        shared = {role for group in self.together for role in group}
        return [*((role,) for role in self.roles if role not in shared), *self.together]


SUITE = (
    ServiceSpec("lead-intake", ("api", "relay", "projector"), secrets=("jwt_secret", "hash_key", "master_key")),
    ServiceSpec("scoring", ("api", "relay", "projector", "consumer", "timer"), secrets=("jwt_secret",)),
    ServiceSpec("analytics", ("api", "consumer", "stream", "lake"), secrets=("jwt_secret",), topic=False),
)


class NotReady(RuntimeError):
    """Something did not become ready in time, or cannot; the message has the ends of the logs."""


class NoStack(RuntimeError):
    """No stack runs here."""


class Process:
    """One process of a service under a supervisor. The methods return when what they ask for has happened."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec, roles: tuple[str, ...], port: int) -> None:
        self.spec, self.roles, self.port = spec, roles, port
        self.name = f"{spec.name}/{'+'.join(roles)}"
        self.log_file = supervisor.state_dir / "logs" / f"{spec.name}-{'+'.join(roles)}.log"
        self.restarts = 0
        self.wanted = False
        self.refused = False
        self._supervisor = supervisor
        self._popen: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_after = 0.0
        self._delay = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id, None when it does not run."""
        popen = self._popen
        return popen.pid if popen is not None and popen.returncode is None else None

    @property
    def url(self) -> str:
        """Where its API, or its health and metrics, are."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, now and whenever it dies."""
        self._start_after = self._delay = 0.0
        self.refused = False
        self.wanted = True
        self._supervisor._change.wait_for(lambda: self.pid is not None or self.refused)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End it in order; by SIGKILL when that takes longer than `seconds`."""
        self.wanted = False
        popen = self._popen
        if popen is None:
            return
        self._send(signal.SIGTERM)
        self._send(signal.SIGCONT)  # a paused process would not act
        try:
            popen.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("a process was killed: it did not stop in time", extra={"role": self.name})
            self._send(signal.SIGKILL)
            popen.wait(10)
        self._collected(popen)

    def restart(self) -> None:
        """Stop it in order and start it again."""
        self.stop()
        self.start()

    def kill(self, *, restart: bool = True) -> None:
        """SIGKILL, as in a crash. It is started again unless `restart` is False."""
        self.wanted = self.wanted and restart
        popen = self._popen
        if popen is not None:
            self._send(signal.SIGKILL)
            popen.wait(10)
            self._collected(popen)

    def pause(self) -> None:
        """SIGSTOP: it keeps its port and its connections and does nothing."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after pause()."""
        self._send(signal.SIGCONT)

    def ready(self) -> bool:
        """Whether it says that it is ready."""
        return self.pid is not None and probe_ready(self.url)

    def wait_ready(self, deadline: float = 30.0) -> None:
        """Wait until it is ready.

        Raises:
            NotReady: after `deadline` seconds, or at once when it cannot become ready.
        """
        end = time.monotonic() + deadline
        pause = threading.Event()
        while not self.ready():
            if self.refused:
                raise NotReady(f"{self.name} cannot start:\n{self.log_tail(15)}")
            if time.monotonic() > end:
                raise NotReady(f"{self.name} is not ready after {deadline:g} s:\n{self.log_tail(15)}")
            pause.wait(0.1)

    def log_tail(self, lines: int = 50) -> str:
        """The end of its log."""
        return tail(self.log_file, lines)

    def _collected(self, popen: subprocess.Popen[bytes]) -> None:
        """Wait until the control thread has seen the end, so that a start that follows is not taken for a crash."""
        self._supervisor._change.wait_for(lambda: self._popen is not popen)

    def _send(self, number: int) -> None:
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # Called by the control thread only.

    def _look(self, now: float) -> bool:
        """Start it when it is due; True when something changed."""
        popen = self._popen
        if popen is not None:
            code = popen.poll()
            if code is None:
                return False
            self._popen = None
            if self.wanted:
                self._ended(code, now)
            return True
        if not self.wanted or self.refused or now < self._start_after:
            return False
        self._started_at = now
        self._popen = self._supervisor._spawn(self.spec, self.roles, self.port, self.log_file)
        return True

    def _ended(self, code: int, now: float) -> None:
        if code == EXIT_REFUSED:
            self.refused = True
            log.error("a process refused to start", extra={"role": self.name, "exit_code": code})
            return
        lived = now - self._started_at
        self._delay = 0.2 if lived > 20.0 else min(10.0, max(0.2, self._delay * 2))
        self._start_after = now + self._delay
        self.restarts += 1
        log.warning(
            "a process ended and is started again",
            extra={"role": self.name, "exit_code": code, "delay_seconds": self._delay},
        )


class _Change:
    """Rings when something changed; waiters ask their own question again."""

    def __init__(self) -> None:
        self._condition = threading.Condition()

    def ring(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def wait_for(self, question: Callable[[], bool], seconds: float = 30.0) -> None:
        with self._condition:
            if not self._condition.wait_for(question, seconds):
                raise NotReady(f"nothing happened within {seconds:g} s")


class Supervisor:
    """Runs the processes of services.

    Args:
        address: of PostgreSQL and Kafka.
        state_dir: where logs, secrets and `stack.json` go.
        clock_file: of the development clock; in `state_dir` when None.
        env: more environment variables for all processes.
        first_port: the first API listens here and the others follow, where the ports are free; any free ports when None.
    """

    def __init__(
        self,
        address: Address,
        state_dir: Path = STATE,
        services: Sequence[ServiceSpec] = SUITE,
        *,
        clock_file: Path | None = None,
        env: Mapping[str, str] | None = None,
        first_port: int | None = None,
    ) -> None:
        self.address, self.services = address, tuple(services)
        self.state_dir = state_dir.absolute()
        self.clock_file = (clock_file or self.state_dir / "clock.json").absolute()
        self.env = dict(env or {})
        self.state_dir.mkdir(parents=True, exist_ok=True)
        (self.state_dir / "logs").mkdir(exist_ok=True)
        self.secrets = secrets_of(self.state_dir)
        ports = _Ports(first_port)
        self.processes = [
            Process(self, spec, roles, ports.take(api="api" in roles))
            for spec in self.services
            for roles in spec.processes()
        ]
        self._change = _Change()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock_file: int | None = None

    # --- its life -----------------------------------------------------------------------------------------------------

    def start(self, deadline: float = 60.0) -> None:
        """Migrate the databases, make the topics, start every process. Returns before they are ready: see `wait_ready`.

        Args:
            deadline: for migrations and topics, seconds.

        Raises:
            NotReady: a migration failed, or the topics could not be made. Nothing is left running.
        """
        self._lock()
        try:
            with ThreadPoolExecutor(max(1, len(self.services)) + 1, "prepare") as threads:
                work = [threads.submit(self._migrate, spec, deadline) for spec in self.services if spec.migrates]
                work.append(threads.submit(self._make_topics))
                for done in work:
                    done.result()
            self._thread = threading.Thread(target=self._control, name="supervisor", daemon=True)
            self._thread.start()
            for process in self.processes:
                process.wanted = True
            self._change.wait_for(lambda: all(p.pid is not None or p.refused for p in self.processes))
            self._write_stack()
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, deadline: float = 60.0) -> None:
        """Wait until every process is ready.

        Raises:
            NotReady: with the name and the end of the log of the first that is not.
        """
        with ThreadPoolExecutor(len(self.processes) or 1, "ready") as threads:
            for done in [threads.submit(process.wait_ready, deadline) for process in self.processes]:
                done.result()

    def stop(self) -> None:
        """End every process in order, all at the same time, and forget the stack. May be called twice."""
        for process in self.processes:
            process.wanted = False
        with ThreadPoolExecutor(len(self.processes) or 1, "stop") as threads:
            list(threads.map(Process.stop, self.processes))
        self._over.set()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None
        if self._lock_file is not None:
            (self.state_dir / "stack.json").unlink(missing_ok=True)
            os.close(self._lock_file)
            self._lock_file = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- its processes ------------------------------------------------------------------------------------------------

    def process(self, service: str, role: str) -> Process:
        """The process that runs a role. Raises LookupError when there is none."""
        for process in self.processes:
            if process.spec.name == service and role in process.roles:
                return process
        raise LookupError(f"{service}/{role} is not run here")

    def url(self, service: str) -> str:
        """Base URL of a service's API."""
        return self.process(service, "api").url

    def token(self, *roles: str, subject: str = "developer", ttl: float = 86_400.0) -> str:
        """A token for calls, of all roles when none is named.

        Args:
            ttl: how long it holds, in seconds.
        """
        return _token(self.secrets["jwt_secret"], subject, roles, ttl)

    # --- how ----------------------------------------------------------------------------------------------------------

    def environment(self, spec: ServiceSpec, port: int, *, api: bool) -> dict[str, str]:
        """The environment of a process: ours, the stack's addresses, and the secrets of its service."""
        own = {"KEHU_DATABASE", "KEHU_HTTP_PORT", "KEHU_ADMIN_PORT", "KEHU_MASTER_KEY", "KEHU_HASH_KEY"}
        env = {name: value for name, value in os.environ.items() if name not in own}
        env |= {
            "PYTHONUNBUFFERED": "1",
            "MALLOC_ARENA_MAX": "2",  # many threads that wait: two arenas hold less memory than sixteen
            "KEHU_PARENT": str(os.getpid()),
            "KEHU_ENVIRONMENT": "development",
            "KEHU_POSTGRES_URL": self.address.postgres_url,
            "KEHU_KAFKA_BOOTSTRAP": self.address.kafka_bootstrap,
            "KEHU_HTTP_HOST": "127.0.0.1",
            "KEHU_CLOCK_FILE": str(self.clock_file),
            "KEHU_LAKE_PATH": str(self.state_dir / "lake"),
            "KEHU_LOG_FORMAT": "json",
            ("KEHU_HTTP_PORT" if api else "KEHU_ADMIN_PORT"): str(port),
        }
        env |= {f"KEHU_{name.upper()}": self.secrets[name] for name in spec.secrets}
        for other in self.services:
            if "api" in other.roles:
                env[f"KEHU_{other.name.replace('-', '_').upper()}_URL"] = self.url(other.name)
        return env | self.env | dict(spec.env)

    def _spawn(self, spec: ServiceSpec, roles: Iterable[str], port: int, log_file: Path) -> subprocess.Popen[bytes]:
        roles = list(roles)
        with log_file.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", spec.package, *roles],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment(spec, port, api="api" in roles),
                process_group=0,  # Ctrl-C in the terminal is for us: we end them in order
            )

    def _migrate(self, spec: ServiceSpec, deadline: float) -> None:
        log_file = self.state_dir / "logs" / f"{spec.name}-migrate.log"
        popen = self._spawn(spec, ["migrate"], 0, log_file)
        try:
            code = popen.wait(deadline)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
            raise NotReady(f"{spec.name}/migrate took longer than {deadline:g} s:\n{tail(log_file, 15)}") from None
        if code != 0:
            raise NotReady(f"{spec.name}/migrate failed (exit code {code}):\n{tail(log_file, 15)}")

    def _make_topics(self) -> None:
        names = [spec.name for spec in self.services if spec.topic]
        if names:
            from kehu.kafka.topics import ensure_topics, topic_of

            asyncio.run(ensure_topics(self.address.kafka_bootstrap, [topic_of(name) for name in names]))

    def _control(self) -> None:
        looked_at_logs = 0.0
        while True:
            over = self._over.wait(0.05)
            now = time.monotonic()
            changed = [process for process in self.processes if process._look(now)]
            if changed:
                self._change.ring()
                if not over:
                    self._write_stack()
            if now - looked_at_logs > 5.0:
                looked_at_logs = now
                for process in self.processes:
                    cut(process.log_file, LOG_BYTES)
            if over:
                return

    def _write_stack(self) -> None:
        entries = [
            {
                "service": process.spec.name,
                "roles": list(process.roles),
                "pid": process.pid,
                "url": process.url,
                "log": str(process.log_file),
                "restarts": process.restarts,
            }
            for process in self.processes
        ]
        stack = {
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "postgres_url": self.address.postgres_url,
            "kafka_bootstrap": self.address.kafka_bootstrap,
            "clock_file": str(self.clock_file),
            "lake_path": str(self.state_dir / "lake"),
            "tokens": {"admin": self.token()},
            "processes": entries,
        }
        write_privately(self.state_dir / "stack.json", json.dumps(stack, indent=1))

    def _lock(self) -> None:
        self._lock_file = lock(self.state_dir)
        if self._lock_file is None:
            raise NotReady(f"a stack runs in {self.state_dir} already: `kehu down` ends it")


class _Ports:
    """Gives each process a port: APIs one after the other from the first, when those are free; the rest any free one."""

    def __init__(self, first: int | None) -> None:
        self._next, self._given = first, set[int]()

    def take(self, *, api: bool) -> int:
        from kehu.devstack.base import free_port, is_free

        port = self._next if api and self._next is not None else None
        if port is not None:
            self._next = port + 1
        if port is None or not is_free(port):
            port = free_port()
            while port in self._given:
                port = free_port()
        self._given.add(port)
        return port


@dataclass(frozen=True)
class Stack:
    """A stack that runs, as `stack.json` describes it: for the CLI, the demo, and whoever wants to call it."""

    state_dir: Path
    description: Mapping[str, Any]

    @classmethod
    def load(cls, state_dir: Path = STATE) -> Stack:
        """The stack that runs with this state directory. Raises NoStack."""
        if runs(state_dir):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return cls(state_dir, json.loads((state_dir / "stack.json").read_text()))
            raise NoStack(f"the stack in {state_dir.absolute()} is starting or stopping")
        raise NoStack(f"no stack runs in {state_dir.absolute()}: `kehu up` starts one")

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return int(self.description["pid"])

    @property
    def clock_file(self) -> Path:
        """The file of the development clock."""
        return Path(self.description["clock_file"])

    def url(self, service: str) -> str:
        """Base URL of a service's API. Raises LookupError when there is none."""
        for entry in self.description["processes"]:
            if entry["service"] == service and "api" in entry["roles"]:
                return str(entry["url"])
        raise LookupError(f"{service} has no API here")

    def token(self, *roles: str, subject: str = "developer", ttl: float = 86_400.0) -> str:
        """A token for calls, of all roles when none is named; it holds `ttl` seconds."""
        return _token(secrets_of(self.state_dir)["jwt_secret"], subject, roles, ttl)

    def status(self) -> list[dict[str, Any]]:
        """What each process does now: service, roles, pid, memory in bytes, whether it is ready, lag in events, restarts."""
        with ThreadPoolExecutor(16, "status") as threads:
            return list(threads.map(_status, self.description["processes"]))


def _status(entry: Mapping[str, Any]) -> dict[str, Any]:
    import psutil

    found = {**entry, "rss": None, "ready": False, "lag": None}
    with contextlib.suppress(psutil.Error, TypeError):
        found["rss"] = psutil.Process(entry["pid"]).memory_info().rss
        found["ready"] = probe_ready(entry["url"])
        found["lag"] = lag_of(get(entry["url"] + "/metrics") or "")
    return found


def lag_of(metrics: str) -> int | None:
    """How many events a process has still to handle, from its metrics page; None when it handles none."""
    total, found = 0.0, False
    for line in metrics.splitlines():
        if line.startswith(("kehu_consumer_lag_events", "kehu_relay_outbox_events")):
            total, found = total + float(line.rpartition(" ")[2]), True
    return int(total) if found else None


def get(url: str, timeout: float = 1.0) -> str | None:
    """The body of an answer with status 200, else None. `timeout` in seconds."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=timeout)
    try:
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        body = response.read(4 << 20)
        return body.decode("utf-8", "replace") if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def probe_ready(url: str) -> bool:
    """Whether the process behind this address says that it is ready."""
    return get(f"{url}/readyz") is not None


def _token(secret: str, subject: str, roles: Sequence[str], ttl: float) -> str:
    from kehu.auth import Role, issue_token

    return issue_token(secret, subject, roles or [role for role in Role if role is not Role.SYSTEM], ttl)


def secrets_of(state_dir: Path) -> dict[str, str]:
    """The secrets of a development stack, made once and kept in `secrets.json`, readable by its owner alone."""
    path = state_dir / "secrets.json"
    wanted = ("jwt_secret", "master_key", "hash_key")
    kept: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if any(name not in kept for name in wanted):
        made = {name: b64encode(random_secrets.token_bytes(32)).decode() for name in wanted}
        kept = {**made, **kept}
        state_dir.mkdir(parents=True, exist_ok=True)
        write_privately(path, json.dumps(kept))
    return kept


def lock(state_dir: Path) -> int | None:
    """Lock a state directory for a supervisor: an open file to be kept, or None when another one has it.

    The kernel lets go of it when the process ends, however it ends.
    """
    handle = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def runs(state_dir: Path) -> bool:
    """Whether a supervisor works with this state directory."""
    if not (state_dir / "lock").exists():
        return False
    handle = lock(state_dir)
    if handle is not None:
        os.close(handle)
    return handle is None


def write_privately(path: Path, text: str) -> None:
    """Write a file in one step, readable by its owner alone."""
    new = path.with_name(f".{path.name}.{random_secrets.token_hex(4)}")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def tail(path: Path, lines: int) -> str:
    """The last lines of a file, at most 400 bytes a line on average."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 400 * lines))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def cut(path: Path, most: int) -> None:
    """Keep a log that grew past `most` bytes as `<name>.1` and go on with an empty one. Its writer appends, so it need not know."""
    try:
        if path.stat().st_size <= most:
            return
        older = path.with_name(path.name + ".1")
        with path.open("rb") as source, older.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
        os.truncate(path, 0)
    except FileNotFoundError:
        return
