"""What is known of one request while it is handled: shared by the middleware, the routes and the dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection

from kehu.auth import Principal, TokenVerifier

if TYPE_CHECKING:
    from collections.abc import MutableMapping

SCOPE_KEY = "kehu"
# Headers that we read ourselves. Each may come once: two of them could be understood in two ways.
SINGLE = frozenset(
    (
        b"authorization",
        b"content-length",
        b"content-type",
        b"idempotency-key",
        b"if-match",
        b"traceparent",
        b"transfer-encoding",
        b"x-request-id",
    )
)


class Exchange:
    """One request and its answer."""

    __slots__ = (
        "body",
        "body_limit",
        "complete",
        "declared",
        "headers",
        "principal",
        "read",
        "request_id",
        "service",
        "status",
        "traceparent",
        "verifier",
    )

    def __init__(self, service: str, verifier: TokenVerifier, body_limit: int | None) -> None:
        self.service, self.verifier, self.body_limit = service, verifier, body_limit
        self.headers: dict[bytes, bytes] = {}
        self.principal: Principal | None = None
        self.traceparent = self.request_id = ""
        self.body: bytes | None = None
        self.declared = self.read = self.status = 0
        self.complete = False

    def header(self, name: bytes) -> str | None:
        """A header as text, None when it was not sent."""
        value = self.headers.get(name)
        return value.decode("latin-1") if value is not None else None


def exchange_of(request: HTTPConnection | MutableMapping[str, Any]) -> Exchange:
    """The exchange of a request (or of its ASGI scope)."""
    scope = request.scope if isinstance(request, HTTPConnection) else request
    exchange: Exchange = scope[SCOPE_KEY]
    return exchange
