"""The outermost layer of an API: limits, trace context, metrics, and a problem document for whatever goes wrong.

Plain ASGI: it costs some 15 µs a request, where a stack of framework middlewares costs several times that.
"""

from __future__ import annotations

import asyncio
import logging
import re
from time import perf_counter
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from kehu.auth import TokenVerifier
from kehu.http.exchange import SCOPE_KEY, SINGLE, Exchange
from kehu.http.problems import Problem, later, problem_of
from kehu.observability import (
    HTTP_IN_FLIGHT,
    HTTP_REQUESTS,
    HTTP_SECONDS,
    PROBES,
    Health,
    continuing,
    current_traceparent,
    new_traceparent,
    probe,
    span,
    tracing,
    valid_traceparent,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# An unread body up to this size is left to the server to discard; beyond it the connection is closed.
_DISCARD = 64 * 1024


class Kit:
    """The layer.

    Args:
        body_limit: the largest body in bytes; a route can set another.
        most_in_flight: requests under way at once; the next one is answered 503 unread.
        read_seconds: how long a caller may take for each part of the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: str,
        verifier: TokenVerifier,
        health: Health,
        body_limit: int = 1 << 20,
        most_in_flight: int = 1024,
        read_seconds: float = 30.0,
    ) -> None:
        self.app, self.service, self.verifier, self.health = app, service, verifier, health
        self.body_limit, self.most_in_flight, self.read_seconds = body_limit, most_in_flight, read_seconds
        self.in_flight = 0
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] in PROBES:
            status, kind, body = await probe(scope["path"], self.health)
            headers = [
                (b"content-type", kind.encode()),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"),
            ]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        self.in_flight += 1
        HTTP_IN_FLIGHT.set(self.in_flight)
        started = perf_counter()
        exchange = scope[SCOPE_KEY] = Exchange(self.service, self.verifier, self.body_limit)
        try:
            await self._exchange(exchange, scope, receive, send)
        finally:
            self.in_flight -= 1
            HTTP_IN_FLIGHT.set(self.in_flight)
            self._count(scope, exchange.status, perf_counter() - started)

    async def _exchange(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = message["headers"] = list(message.get("headers", ()))
                headers.append((b"x-request-id", exchange.request_id.encode()))
                headers.append((b"traceparent", exchange.traceparent.encode()))
                if not exchange.complete and (exchange.declared > _DISCARD or b"transfer-encoding" in exchange.headers):
                    headers.append((b"connection", b"close"))
            await send(message)

        async def limited() -> Message:
            if exchange.complete:  # whoever asks now waits for the caller to go away, for as long as it takes
                return await receive()
            limit = exchange.body_limit
            if limit is not None and exchange.declared > limit:
                raise _too_large(limit)
            try:
                async with asyncio.timeout(self.read_seconds):
                    message = await receive()
            except TimeoutError:
                raise Problem(408, "The body came too slowly.", headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                exchange.read += len(message.get("body", b""))
                exchange.complete = not message.get("more_body", False)
                if limit is not None and exchange.read > limit:
                    exchange.complete = False
                    raise _too_large(limit)
            return message

        doubtful = _read_headers(exchange, scope)
        with continuing(exchange.traceparent or None), span(f"HTTP {scope['method']}") as recording:
            exchange.traceparent = current_traceparent() or ""
            exchange.request_id = exchange.request_id or exchange.traceparent[3:35]
            try:
                if self.in_flight > self.most_in_flight:
                    raise later(
                        "overloaded", "Too many requests are under way. Nothing was done; try again in a moment.", 1
                    )
                if doubtful is not None:
                    raise doubtful
                await self.app(scope, limited, respond)
            except Exception as error:  # the last place that can turn it into an answer
                problem = problem_of(error)
                if problem is None:
                    log.exception("a request failed", extra={"route": _route(scope), "method": scope["method"]})
                    problem = Problem(500, "Something is wrong on our side; the trace id finds it in our logs.")
                elif problem.status_code >= 500:
                    log.warning(
                        "a request waits",
                        extra={"route": _route(scope), "slug": problem.slug, "error": type(error).__name__},
                    )
                if exchange.status:
                    raise  # half an answer is out already: the server cuts the connection
                await problem.response()(scope, limited, respond)
            recording.set(**{"http.route": _route(scope), "http.response.status_code": exchange.status})

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        key = (method, _route(scope), status)
        series = self._series.get(key)
        if series is None:
            made = HTTP_REQUESTS.labels(method, key[1], str(status)), HTTP_SECONDS.labels(method, key[1])
            series = self._series[key] = made
        series[0].inc()
        series[1].observe(seconds)


def _too_large(limit: int) -> Problem:
    return Problem(413, f"The body is larger than {limit} bytes.", more={"limit_bytes": limit})


def _route(scope: Scope) -> str:
    """The template of the route, never the path: paths hold ids and would make endless series."""
    return str(getattr(scope.get("route"), "path_format", "none"))


def _read_headers(exchange: Exchange, scope: Scope) -> Problem | None:
    """Take in the headers that we read; gives the problem when they are not acceptable."""
    found = exchange.headers
    twice = None
    for name, value in scope["headers"]:
        if name in SINGLE:
            if name in found:
                twice = name
            found[name] = value
    given = found.get(b"traceparent")
    traceparent = valid_traceparent(given.decode("latin-1")) if given is not None else None
    exchange.traceparent = traceparent or ("" if tracing() else new_traceparent())
    wanted = found.get(b"x-request-id")
    if wanted is not None and _REQUEST_ID.match(text := wanted.decode("latin-1")):
        exchange.request_id = text
    if twice is not None:
        return Problem(400, f"The header {twice.decode()} was sent twice.")
    length = found.get(b"content-length")
    if length is not None:
        if not length.isdigit() or len(length) > 15:
            return Problem(400, "Content-Length is not a number.")
        exchange.declared = int(length)
    elif b"transfer-encoding" not in found:
        exchange.complete = True  # no body is announced
    if b"%00" in scope.get("raw_path", b"") or b"%00" in scope.get("query_string", b""):
        return Problem(400, "The address holds a NUL character.")
    return None
