"""A process of a service: `python -m lead_intake api`. One or several roles, one event loop, an orderly end.

A service's `__main__.py` is `main(service)` with a `Service` that its bootstrap module builds. A role is an async
function of the settings that works until it is cancelled. One that has to end in order says so::

    async def relay(settings):
        relay = Relay(...)
        role = current_role()
        role.on_stop(relay.stop)               # called on SIGTERM; then the role has time to return
        role.health.add("kafka", relay.check)  # asked by /readyz
        await relay.run()

`migrate` and `rebuild` are done once: they run first, and the process ends after them when it has no other role. They may
be plain functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kehu.observability import PROBES, Health, configure_logging, configure_tracing, flush_traces, probe
from kehu.settings import EXIT_REFUSED, ServiceSettings, SettingsError, read, refuse

log = logging.getLogger(__name__)

ONCE = ("migrate", "rebuild")
# Set by the supervisor: its process id. When it is gone, however it went, this process ends too.
PARENT = "KEHU_PARENT"
_PR_SET_PDEATHSIG = 1

RoleFunction = Callable[[Any], Awaitable[None] | None]


@dataclass(frozen=True)
class Service:
    """A service as its processes see it.

    Args:
        name: e.g. `lead-intake`.
        settings: its settings; `SERVICE` in them is the same name.
        roles: what `python -m <service> ROLE` can run.
    """

    name: str
    settings: type[ServiceSettings]
    roles: Mapping[str, RoleFunction]

    def __post_init__(self) -> None:
        if self.name != self.settings.SERVICE:
            raise TypeError(f"{self.settings.__name__}.SERVICE must be {self.name!r}")


@dataclass
class RoleContext:
    """A role that runs in this process.

    Args:
        health: of the whole process.
        stopping: set when the process was told to stop.
    """

    service: str
    name: str
    health: Health
    stopping: asyncio.Event
    callbacks: list[Callable[[], Awaitable[None] | None]] = field(default_factory=list)

    def on_stop(self, callback: Callable[[], Awaitable[None] | None]) -> None:
        """Call this when the process is told to stop, and give the role time to return. A role without one is cancelled at once."""
        self.callbacks.append(callback)


_role: ContextVar[RoleContext | None] = ContextVar("role", default=None)


def current_role() -> RoleContext | None:
    """The role whose code this is; None outside a process of a service, e.g. in a test."""
    return _role.get()


class RoleFailed(RuntimeError):
    """A role raised, or returned without being asked to."""


async def run(service: Service, settings: ServiceSettings, names: Sequence[str]) -> None:
    """Run roles until SIGTERM or SIGINT, or until one of them fails.

    Raises:
        RoleFailed: the reason was logged.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(settings.pool_size + 4, thread_name_prefix="worker"))
    health, stopping = Health(), asyncio.Event()
    roles = [RoleContext(service.name, name, health, stopping) for name in names]
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _asked_to_stop, stopping, number)
    health.starting.update(names)
    admin = await _admin_server(settings, health)
    try:
        for role in (role for role in roles if role.name in ONCE):
            await _once(service, settings, role)
        lasting = [role for role in roles if role.name not in ONCE]
        if lasting:
            await _until_stopped(service, settings, lasting)
    finally:
        health.stopping = True
        if admin is not None:
            admin.close()


async def _once(service: Service, settings: ServiceSettings, role: RoleContext) -> None:
    token = _role.set(role)
    try:
        function = service.roles[role.name]
        result = (
            function(settings) if inspect.iscoroutinefunction(function) else await asyncio.to_thread(function, settings)
        )
        if inspect.isawaitable(result):
            await result
    except Exception as error:
        log.exception("a role failed", extra={"role": role.name})
        raise RoleFailed(role.name) from error
    finally:
        _role.reset(token)
    role.health.starting.discard(role.name)
    log.info("done", extra={"role": role.name})


async def _until_stopped(service: Service, settings: ServiceSettings, roles: Sequence[RoleContext]) -> None:
    tasks = {asyncio.create_task(_work(service, settings, role), name=role.name): role for role in roles}
    stopped = asyncio.create_task(roles[0].stopping.wait(), name="stop")
    # Objects of the imports live as long as the process: the collector need not look at them again and again.
    asyncio.get_running_loop().call_later(5.0, _settle)
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    asked = roles[0].stopping.is_set()
    roles[0].health.stopping = True
    roles[0].stopping.set()
    log.info("stopping", extra={"reason": "asked" if asked else "a role ended"})
    deadline = asyncio.get_running_loop().time() + settings.stop_seconds
    _watchdog(settings.stop_seconds + 1.5)
    orderly = await asyncio.gather(*(_stop(task, role, deadline) for task, role in tasks.items()))
    stopped.cancel()
    failed = not all(orderly)
    for task, role in tasks.items():
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a role failed", exc_info=error, extra={"role": role.name})
            failed = True
        elif not asked and not task.cancelled():
            log.error("a role ended by itself", extra={"role": role.name})
            failed = True
    if failed:
        raise RoleFailed(", ".join(role.name for role in roles))
    log.info("stopped")


async def _work(service: Service, settings: ServiceSettings, role: RoleContext) -> None:
    _role.set(role)
    asyncio.get_running_loop().call_soon(role.health.starting.discard, role.name)
    log.info("started", extra={"role": role.name, "pid": os.getpid()})
    result = service.roles[role.name](settings)
    if result is not None:
        await result


async def _stop(task: asyncio.Task[None], role: RoleContext, deadline: float) -> bool:
    """End a role; False when it did not end in order."""
    if task.done():
        return True
    orderly = True
    try:
        async with asyncio.timeout_at(deadline):
            for callback in role.callbacks:
                result = callback()
                if result is not None:
                    await result
            if role.callbacks:
                await asyncio.wait([task])
    except TimeoutError:
        log.warning("a role did not stop in time", extra={"role": role.name})
        orderly = False
    except Exception:
        log.exception("a role could not be told to stop", extra={"role": role.name})
        orderly = False
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    return orderly


def _asked_to_stop(stopping: asyncio.Event, number: int) -> None:
    if stopping.is_set() and number == signal.SIGINT:
        os._exit(128 + number)  # Ctrl-C again: at once
    stopping.set()


def _watchdog(seconds: float) -> None:
    """End the process when its orderly end takes too long, e.g. because a thread waits for a server that does not answer."""

    def end() -> None:
        log.error("the process did not stop in time", extra={"deadline_seconds": seconds})
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _settle() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _admin_server(settings: ServiceSettings, health: Health) -> asyncio.Server | None:
    """Health and metrics of a process without API: one small answer a connection."""
    if not settings.admin_port:
        return None

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(10):
                request = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
                path = request[1].partition(b"?")[0].decode("latin-1") if len(request) == 3 else ""
                if request[0] in (b"GET", b"HEAD") and path in PROBES:
                    status, kind, body = await probe(path, health)
                else:
                    status, kind, body = 404, "text/plain", b"not found\n"
                head = f"HTTP/1.1 {status} .\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode() + (b"" if request[0] == b"HEAD" else body))
                await writer.drain()
        writer.close()

    return await asyncio.start_server(handle, settings.http_host, settings.admin_port, limit=8192)


def end_with_parent() -> None:
    """End when the supervisor that started us ends, even by kill -9: asked of the kernel on Linux, watched for elsewhere."""
    text = os.environ.get(PARENT, "")
    if not text.isdigit():
        return
    parent = int(text)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)


def _watch_parent(parent: int) -> None:
    wait = threading.Event()
    while os.getppid() == parent:
        wait.wait(0.5)
    os._exit(1)


def main(service: Service, arguments: Sequence[str] | None = None) -> None:
    """Run the roles that the command line names, and end the process: 0 in order, 1 a role failed, 2 wrong settings or roles."""
    end_with_parent()
    names = list(sys.argv[1:] if arguments is None else arguments)
    unknown = [name for name in names if name not in service.roles]
    if not names or unknown or len(set(names)) < len(names):
        what = f"unknown role {unknown[0]!r}. " if unknown and not unknown[0].startswith("-") else ""
        module = service.name.replace("-", "_")
        sys.stderr.write(f"{what}Usage: python -m {module} ROLE [ROLE...]\nRoles: {' '.join(service.roles)}\n")
        raise SystemExit(0 if names and names[0] in ("-h", "--help") else EXIT_REFUSED)
    try:
        settings = read(service.settings)
    except SettingsError as error:
        refuse(error)
    label = "+".join(names)
    configure_logging(service.name, label, settings.log_level, settings.log_format)
    configure_tracing(settings, label)
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(service, settings, names))
    except RoleFailed:
        raise SystemExit(1) from None
    except Exception:
        log.exception("the process failed")
        raise SystemExit(1) from None
    finally:
        flush_traces()
