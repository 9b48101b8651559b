"""The HTTP server: uvicorn on httptools, with limits on what a connection may take, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from asyncio import TimerHandle, Transport
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from kehu.settings import ServiceSettings

log = logging.getLogger(__name__)
MOST_HEADER_BYTES = 64 * 1024
MOST_HEADERS = 100
HEADER_SECONDS = 15.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Address and headers are bounded in size and number, and must come in time."""

    _taken = 0
    _waiting: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._taken = 0
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._take(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._take(len(name) + len(value))
        if len(self.headers) >= MOST_HEADERS:
            raise HttpParserError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def _take(self, count: int) -> None:
        self._taken += count
        if self._taken > MOST_HEADER_BYTES:
            raise HttpParserError("the headers are too large")

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the runtime has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("listening", extra={"port": self.servers[0].sockets[0].getsockname()[1]})


async def serve(app: ASGIApp, settings: ServiceSettings) -> None:
    """Serve an app until the process is told to stop: then accept no more, finish what is under way, and leave its lifespan.

    Inside a role it takes part in the runtime's orderly stop; elsewhere it ends when it is cancelled.
    """
    from kehu.runtime import current_role

    config: Any = uvicorn.Config(
        app,
        host=settings.http_host,
        port=settings.http_port,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=max(1, int(settings.stop_seconds - settings.drain_seconds - 2)),
    )
    server = Server(config)
    role = current_role()

    async def stop() -> None:
        await asyncio.sleep(settings.drain_seconds)  # not ready any more: balancers stop sending
        server.should_exit = True

    if role is not None:
        role.on_stop(stop)
    await server.serve()
    if not server.started:
        raise RuntimeError("the HTTP server did not start")
