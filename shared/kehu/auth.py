"""Who calls: JSON Web Tokens, roles, and the token that a service shows to another.

In development everybody's token is signed with one shared secret (HS256). In production tokens come from an identity
provider (RS256 or ES256, keys from its JWKS), and the shared secret, when set, only serves services among themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import jwt

from kehu.ids import derived
from kehu.settings import ServiceSettings

if TYPE_CHECKING:
    import httpx


class Role(StrEnum):
    """What somebody may do. The names are those in tokens."""

    SALES = "sales"
    SERVICE = "service"
    MARKETING = "marketing"
    MANAGER = "manager"
    FINANCE = "finance"
    LEGAL = "legal"
    ANALYST = "analyst"
    ADMIN = "admin"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls.

    Args:
        actor: `user:<id>` or `service:<name>`; goes into events, so it is an id and never a name or an address.
        roles: the roles of this suite that the token carries.
    """

    actor: str
    roles: frozenset[Role]

    def may(self, *roles: Role) -> bool:
        """Whether one of these roles is held."""
        return not self.roles.isdisjoint(roles)


class InvalidToken(Exception):
    """The token proves nothing. The reason is for the caller and says nothing secret."""


class KeysNotReachable(ConnectionError):
    """The identity provider's keys could not be fetched, and none are known: try again later."""


# Limits of what is taken from outside.
MOST_TOKEN_BYTES = 8_192
MOST_KEY_BYTES = 256 * 1024
MOST_KEYS = 100
LEEWAY_SECONDS = 30
_SUBJECT = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_ROLES = frozenset(Role)


def issue_token(secret: str, subject: str, roles: Iterable[Role | str], ttl: float = 3600.0, **claims: Any) -> str:
    """A token signed with the shared secret (HS256).

    Args:
        subject: id of the user, or the name of a service.
        ttl: how long it holds, in seconds.
        claims: more claims, e.g. `aud`.

    Raises:
        ValueError: an unknown role.
    """
    now = int(time.time())
    names = [Role(role).value for role in roles]
    return jwt.encode({"sub": subject, "roles": names, "iat": now, "exp": now + int(ttl), **claims}, secret, "HS256")


class TokenVerifier:
    """Checks tokens. A token that was found good is remembered until it runs out, at most `remembered` of them.

    Args:
        secret: for HS256, None when such tokens are refused.
        keys: of the identity provider, None when there is none. Then the secret's tokens may carry any role, else only `system`.
        issuer, audience: what a provider's token must name; None is not checked.
        roles_claim: path of the claim with the roles.
    """

    def __init__(
        self,
        secret: str | None,
        keys: ProviderKeys | None = None,
        issuer: str | None = None,
        audience: str | None = None,
        roles_claim: str = "roles",
        remembered: int = 10_000,
    ) -> None:
        self._secret, self._keys, self._issuer, self._audience = secret, keys, issuer, audience
        self._path = roles_claim.split(".")
        self._remembered, self._most = dict[bytes, tuple[float, Principal]](), remembered

    @classmethod
    def of(cls, settings: ServiceSettings) -> TokenVerifier:
        """The verifier that settings ask for."""
        secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret is not None else None
        keys = ProviderKeys(settings.jwt_jwks_url) if settings.jwt_jwks_url is not None else None
        return cls(secret, keys, settings.jwt_issuer, settings.jwt_audience, settings.jwt_roles_claim)

    def recall(self, token: str) -> Principal | None:
        """Whose token this is, if it was found good before and still holds. Never blocks."""
        known = self._remembered.get(_digest(token))
        return known[1] if known is not None and known[0] > time.time() else None

    def verify(self, token: str) -> Principal:
        """Whose token this is. May fetch the provider's keys over the network, so call it in a thread.

        Raises:
            InvalidToken: it proves nothing, with the reason.
            KeysNotReachable: it cannot be checked now.
        """
        known = self.recall(token)
        if known is not None:
            return known
        if len(token) > MOST_TOKEN_BYTES:
            raise InvalidToken("the token is too long")
        claims, own = self._claims(token)
        principal = self._principal(claims, own)
        if len(self._remembered) >= self._most:
            self._remembered.clear()
        self._remembered[_digest(token)] = (float(claims["exp"]), principal)
        return principal

    def _claims(self, token: str) -> tuple[Mapping[str, Any], bool]:
        """The checked claims, and whether our own secret signed them."""
        try:
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            if algorithm == "HS256" and self._secret is not None:
                options: Any = {"require": ["exp", "sub"], "verify_aud": False, "verify_iss": False}
                return jwt.decode(token, self._secret, ["HS256"], options=options, leeway=LEEWAY_SECONDS), True
            if self._keys is None or algorithm not in ProviderKeys.ALGORITHMS:
                raise InvalidToken("the token is not signed in a way that is accepted here")
            key = self._keys.key(str(header.get("kid", "")), algorithm)
            required = ["exp", "sub", *(["iss"] if self._issuer else []), *(["aud"] if self._audience else [])]
            return jwt.decode(
                token,
                key,
                [algorithm],
                audience=self._audience,
                issuer=self._issuer,
                options={"require": required, "verify_aud": self._audience is not None},
                leeway=LEEWAY_SECONDS,
            ), False
        except jwt.ExpiredSignatureError:
            raise InvalidToken("the token has run out") from None
        except jwt.InvalidAudienceError:
            raise InvalidToken("the token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise InvalidToken("the token is from another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidToken(f"the token has no {error.claim}") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise InvalidToken("the token is malformed, or its signature is wrong") from None

    def _principal(self, claims: Mapping[str, Any], own: bool) -> Principal:
        found: Any = claims
        for part in self._path if not own else ("roles",):
            found = found.get(part) if isinstance(found, Mapping) else None
        names = found.split() if isinstance(found, str) else found if isinstance(found, Sequence) else ()
        roles = _ROLES.intersection(name for name in list(names)[:100] if isinstance(name, str))
        if own and self._keys is not None:
            roles &= {Role.SYSTEM}
        kind = "service" if Role.SYSTEM in roles else "user"
        subject = str(claims["sub"]).removeprefix("service:").removeprefix("user:")
        if not _SUBJECT.match(subject):  # an e-mail address, for example: it must not get into events
            subject = str(derived("subject", claims.get("iss", ""), subject))
        return Principal(f"{kind}:{subject}", frozenset(Role(role) for role in roles))


def _digest(token: str) -> bytes:
    return hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class ProviderKeys:
    """The public keys of an identity provider, fetched when they are needed and kept.

    Keys that stop being reachable are used on; a key id that is not known makes us look again, at most once in
    `least_seconds`, so that nobody can make us flood the provider with tokens of invented keys.
    """

    ALGORITHMS = ("RS256", "ES256")

    def __init__(
        self, url: str, fresh_seconds: float = 600.0, least_seconds: float = 15.0, timeout: float = 5.0
    ) -> None:
        self.url, self.fresh_seconds, self.least_seconds, self.timeout = url, fresh_seconds, least_seconds, timeout
        self._keys: dict[tuple[str, str], Any] = {}
        self._fetched_at = self._tried_at = float("-inf")
        self._lock = threading.Lock()

    def key(self, kid: str, algorithm: str) -> Any:
        """The key with this id.

        Raises:
            InvalidToken: the provider has no such key.
            KeysNotReachable: no keys are known, and none can be fetched.
        """
        found = self._keys.get((kid, algorithm))
        now = time.monotonic()
        if (found is None or now - self._fetched_at > self.fresh_seconds) and now - self._tried_at > self.least_seconds:
            with self._lock:
                if time.monotonic() - self._tried_at > self.least_seconds:
                    self._fetch()
            found = self._keys.get((kid, algorithm))
        if found is not None:
            return found
        if not self._keys:
            raise KeysNotReachable("the keys of the identity provider cannot be fetched")
        raise InvalidToken("the token is signed with a key that the identity provider does not publish")

    def _fetch(self) -> None:
        import httpx

        self._tried_at = time.monotonic()
        try:
            with httpx.stream("GET", self.url, timeout=self.timeout) as response:
                response.raise_for_status()
                body = b""
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MOST_KEY_BYTES:
                        raise ValueError("the key set is too large")
            self._keys = self._parsed(body)
            self._fetched_at = time.monotonic()
        except (httpx.HTTPError, jwt.PyJWTError, ValueError, LookupError, TypeError, AttributeError):
            return  # the old keys stay in use

    def _parsed(self, body: bytes) -> dict[tuple[str, str], Any]:
        entries = json.loads(body)["keys"] if body else []
        keys: dict[tuple[str, str], Any] = {}
        for entry in entries[:MOST_KEYS]:
            algorithm = {"RSA": "RS256", "EC": "ES256"}.get(entry.get("kty"))
            if algorithm is None or entry.get("use", "sig") != "sig" or entry.get("alg", algorithm) != algorithm:
                continue
            keys[str(entry.get("kid", "")), algorithm] = jwt.PyJWK(entry, algorithm).key
        if not keys:
            raise ValueError("the key set has no key that we accept")
        return keys


class ServiceToken:
    """The bearer token of a service for calls to another one: the one from the settings, or one of our own that is renewed in time."""

    LIFE_SECONDS = 600.0

    def __init__(self, settings: ServiceSettings) -> None:
        self._given = settings.system_token.get_secret_value() if settings.system_token is not None else None
        self._secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret is not None else None
        if self._given is None and self._secret is None:
            raise ValueError("calls to other services need KEHU_SYSTEM_TOKEN or KEHU_JWT_SECRET")
        self._service = settings.SERVICE
        self._made, self._made_at = "", float("-inf")

    def __call__(self) -> str:
        """A token that holds for some minutes at least."""
        if self._given is not None:
            return self._given
        if time.monotonic() - self._made_at > self.LIFE_SECONDS / 2:
            assert self._secret is not None
            self._made = issue_token(self._secret, self._service, [Role.SYSTEM], self.LIFE_SECONDS)
            self._made_at = time.monotonic()
        return self._made


def service_client(settings: ServiceSettings, base_url: str, timeout: float = 5.0) -> httpx.Client:
    """An HTTP client for calls to another service, with our token on each request.

    Args:
        timeout: seconds for connecting, and for each wait on the answer.
    """
    import httpx

    token = ServiceToken(settings)

    def sign(request: httpx.Request) -> None:
        request.headers["Authorization"] = f"Bearer {token()}"

    return httpx.Client(base_url=base_url, timeout=timeout, event_hooks={"request": [sign]})
