"""A service's API behind a real port, for tests and benchmarks that speak HTTP to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from kehu.http.server import BoundedProtocol, Server


@contextmanager
def serving(app: ASGIApp, start_seconds: float = 20.0) -> Iterator[str]:
    """Serve an app on a free port of the loopback from a thread, and give its base URL. Ends in order: the app's lifespan is left.

    Raises:
        RuntimeError: it did not start in time.
    """
    config: Any = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    started = threading.Event()
    startup = server.startup

    async def announced(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="test-server", daemon=True)
    thread.start()
    if not started.wait(start_seconds) or not server.started:
        raise RuntimeError("the server did not start")
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=15)
