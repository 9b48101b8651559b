"""Who may call a route, and what a command takes from the request: dependencies for routes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

from fastapi import Depends, Request

from kehu.auth import InvalidToken, Principal, Role
from kehu.commands import Context
from kehu.commands import Request as CommandRequest
from kehu.http.exchange import Exchange, exchange_of
from kehu.http.problems import Problem
from kehu.ids import derived, uuid7

C = TypeVar("C")
NOBODY = Principal("user:anonymous", frozenset())
_KEY = re.compile(r"^[\x21-\x7e]{1,128}$")
_ETAG = re.compile(r'^"(\d{1,18})"$')


class Requires:
    """The dependency behind `requires`: who calls, when they hold one of the roles (any role when none is named)."""

    def __init__(self, roles: Sequence[Role] = ()) -> None:
        self.roles = tuple(roles)

    async def __call__(self, request: Request) -> Any:
        return await self.principal(exchange_of(request))

    async def principal(self, exchange: Exchange) -> Principal:
        """Who calls.

        Raises:
            Problem: 401 without a good token, 403 without the role.
        """
        if exchange.principal is None:
            exchange.principal = await _authenticated(exchange)
        if self.roles and not exchange.principal.may(*self.roles):
            names = [role.value for role in self.roles]
            detail = f"This needs one of the roles: {', '.join(names)}."
            raise Problem(403, detail, more={"roles": names})
        return exchange.principal


class RequiresCommand(Requires):
    """The dependency behind `commands`."""

    async def __call__(self, request: Request) -> Any:
        exchange = exchange_of(request)
        return Call.of(exchange, await self.principal(exchange), f"{request.scope['method']} {request.scope['path']}")


class Public(Requires):
    """The dependency behind `public`: nobody is asked who they are."""

    async def __call__(self, request: Request) -> Any:
        return None

    async def principal(self, exchange: Exchange) -> Principal:
        return NOBODY


async def _authenticated(exchange: Exchange) -> Principal:
    header = exchange.header(b"authorization")
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _unauthenticated("A bearer token is needed.")
    known = exchange.verifier.recall(token)
    if known is not None:
        return known
    try:
        return await asyncio.to_thread(exchange.verifier.verify, token.strip())
    except InvalidToken as error:
        raise _unauthenticated(f"{str(error)[:1].upper()}{str(error)[1:]}.", 'Bearer error="invalid_token"') from None


def _unauthenticated(detail: str, challenge: str = "Bearer") -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": challenge})


def requires(*roles: Role | str) -> Any:
    """A dependency that gives the `Principal` who calls, when they hold one of these roles; anybody with a token when none is named.

    As a parameter (`who: Annotated[Principal, requires(Role.SALES)]`) or in `dependencies=[...]`.
    """
    return Depends(Requires([Role(role) for role in roles]))


def commands(*roles: Role | str) -> Any:
    """As `requires`, but gives a `Call`: what a command takes from the request (id, context, If-Match)."""
    return Depends(RequiresCommand([Role(role) for role in roles]))


def public() -> Any:
    """For a route that anybody may call. Routes without one of these three are refused when the app is made."""
    return Depends(Public())


@dataclass(frozen=True, slots=True)
class Call:
    """What a command takes from the request that brought it.

    Args:
        command_id: from Idempotency-Key, the service and the caller; a fresh one without that header.
        expected_version: from If-Match.
        fingerprint: of method, path and body, when there is an Idempotency-Key.
    """

    principal: Principal
    command_id: UUID
    context: Context
    expected_version: int | None = None
    fingerprint: bytes | None = None

    @classmethod
    def of(cls, exchange: Exchange, principal: Principal, target: str) -> Call:
        """The call of a request.

        Raises:
            Problem: 400 for an Idempotency-Key or If-Match that cannot be understood.
        """
        key = exchange.header(b"idempotency-key")
        fingerprint = None
        if key is None:
            command_id = uuid7(datetime.now(UTC))
        else:
            if not _KEY.match(key):
                raise Problem(400, "Idempotency-Key must be 1 to 128 visible ASCII characters.", "bad-idempotency-key")
            command_id = derived(exchange.service, principal.actor, key)
            digest = hashlib.blake2b(target.encode("utf-8", "surrogatepass"), digest_size=16)
            digest.update(b"\0" + (exchange.body or b""))
            fingerprint = digest.digest()
        context = Context(principal.actor, str(command_id), str(command_id), exchange.traceparent)
        return cls(principal, command_id, context, parse_if_match(exchange.header(b"if-match")), fingerprint)

    def request(self, command: C, at: datetime | None = None, index: int | None = None) -> CommandRequest[C]:
        """The command with its surroundings.

        Args:
            at: business time of the events; the clock's time when None.
            index: number of the command when one request brings several; each gets an id of its own.
        """
        command_id = self.command_id if index is None else derived(self.command_id, index)
        version = self.expected_version if index is None else None
        return CommandRequest(command, command_id, self.context, version, self.fingerprint, at)


def parse_if_match(value: str | None) -> int | None:
    """The version that an If-Match header names; None without one, and for `*`.

    Raises:
        Problem: 400 when it is anything but one ETag as we give them.
    """
    if value is None or value.strip() == "*":
        return None
    match = _ETAG.match(value.strip())
    if match is None:
        raise Problem(400, 'If-Match must be one ETag as it was given, e.g. "3".', "bad-if-match")
    return int(match[1])


def etag(version: int) -> str:
    """The ETag of a version."""
    return f'"{version}"'
