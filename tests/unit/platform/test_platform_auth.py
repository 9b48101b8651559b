"""Tokens of an identity provider, of ourselves, and of people who made their own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from kehu.auth import (
    InvalidToken,
    KeysNotReachable,
    ProviderKeys,
    Role,
    ServiceToken,
    TokenVerifier,
    issue_token,
    service_client,
)
from kehu.settings import ServiceSettings

SECRET = "a secret of a test that has forty letters"
ISSUER, AUDIENCE = "https://id.example.com", "kehu"
RSA, OTHER, EC = (
    rsa.generate_private_key(65537, 2048),
    rsa.generate_private_key(65537, 2048),
    ec.generate_private_key(ec.SECP256R1()),
)


class Provider:
    """An identity provider that publishes what it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.status = 200
        self.body = self.key_set("rsa-1")
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                self.send_response(provider.status)
                self.end_headers()
                self.wfile.write(provider.body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks.json"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @staticmethod
    def key_set(kid: str) -> bytes:
        keys = [
            {**json.loads(RSAAlgorithm.to_jwk(RSA.public_key())), "kid": kid, "use": "sig"},
            {**json.loads(ECAlgorithm.to_jwk(EC.public_key())), "kid": "ec-1"},
            {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"},
        ]
        return json.dumps({"keys": keys}).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()


def verifier(provider: Provider, **options: Any) -> TokenVerifier:
    return TokenVerifier(SECRET, ProviderKeys(provider.url), ISSUER, AUDIENCE, **options)


def signed(key: Any = RSA, algorithm: str = "RS256", kid: str = "rsa-1", **claims: Any) -> str:
    content = {"sub": "u-1", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "roles": ["sales", "x"], **claims}
    content = {name: value for name, value in content.items() if value is not None}
    return jwt.encode(content, key, algorithm, headers={"kid": kid})


@pytest.mark.req("PL-05")
def test_tokens_of_the_provider(provider: Provider) -> None:
    checks = verifier(provider)
    for token in (signed(), signed(EC, "ES256", "ec-1")):
        principal = checks.verify(token)
        assert (principal.actor, principal.roles) == ("user:u-1", frozenset({Role.SALES}))
        assert principal.may(Role.SALES, Role.ADMIN)
        assert not principal.may(Role.ADMIN)
    assert provider.asked == 1


@pytest.mark.req("PL-05")
@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"exp": time.time() - 3600}, "run out"),
        ({"exp": None}, "no exp"),
        ({"sub": None}, "no sub"),
        ({"aud": "others"}, "another audience"),
        ({"aud": None}, "no aud"),
        ({"iss": "https://evil.example.com"}, "another issuer"),
        ({"iss": None}, "no iss"),
        ({"nbf": time.time() + 3600}, "malformed"),
    ],
)
def test_claims_that_are_not_good_enough(provider: Provider, claims: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidToken, match=words):
        verifier(provider).verify(signed(**claims))


@pytest.mark.req("PL-05")
def test_signatures_that_are_not_the_providers(provider: Provider) -> None:
    checks = verifier(provider)
    public = json.loads(RSAAlgorithm.to_jwk(RSA.public_key()))["n"]
    forged = [
        signed(OTHER),
        signed(kid="unknown"),
        signed("c2VjcmV0" * 8, "HS256", "shared"),
        jwt.encode(
            {"sub": "x", "exp": time.time() + 60, "roles": ["admin"]}, public, "HS256", headers={"kid": "rsa-1"}
        ),
        signed(rsa.generate_private_key(65537, 2048), "RS512"),
    ]
    for token in forged:
        with pytest.raises(InvalidToken):
            checks.verify(token)


def test_our_own_secret_is_only_for_services_when_there_is_a_provider(provider: Provider) -> None:
    checks = verifier(provider)
    assert checks.verify(issue_token(SECRET, "x", ["admin", "sales"])).roles == frozenset()
    principal = checks.verify(issue_token(SECRET, "scoring", ["system"]))
    assert (principal.actor, principal.roles) == ("service:scoring", frozenset({Role.SYSTEM}))


def test_a_new_key_of_the_provider_is_found_and_unknown_ones_do_not_flood_it(provider: Provider) -> None:
    keys = ProviderKeys(provider.url, least_seconds=0.0)
    checks = TokenVerifier(None, keys, ISSUER, AUDIENCE)
    checks.verify(signed())
    provider.body = provider.key_set("rsa-2")
    checks.verify(signed(kid="rsa-2"))
    assert provider.asked == 2
    keys.least_seconds = 60.0
    for n in range(50):
        with pytest.raises(InvalidToken, match="does not publish"):
            checks.verify(signed(kid=f"invented-{n}"))
    assert provider.asked == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"keys": {}}', b'{"keys": [1]}', b'{"keys": []}', b" " * (1 << 20)]
)
def test_a_provider_that_talks_nonsense(provider: Provider, body: bytes) -> None:
    provider.body = body
    with pytest.raises(KeysNotReachable):
        verifier(provider).verify(signed())


def test_a_provider_that_goes_away_is_remembered(provider: Provider) -> None:
    keys = ProviderKeys(provider.url, fresh_seconds=0.0, least_seconds=0.0)
    checks = TokenVerifier(None, keys, ISSUER, AUDIENCE, remembered=1)
    checks.verify(signed())
    provider.status = 500
    assert checks.verify(signed(sub="u-2")).actor == "user:u-2"


def test_roles_at_another_place(provider: Provider) -> None:
    checks = verifier(provider, roles_claim="realm_access.roles")
    assert checks.verify(signed(realm_access={"roles": ["legal"]})).roles == {Role.LEGAL}
    assert checks.verify(signed(realm_access="x", sub="u-3")).roles == frozenset()
    assert verifier(provider, roles_claim="scope").verify(signed(scope="sales finance")).roles == {
        Role.SALES,
        Role.FINANCE,
    }


@pytest.mark.req("LI-11")
def test_an_address_as_subject_does_not_become_an_actor() -> None:
    checks = TokenVerifier(SECRET)
    first = checks.verify(issue_token(SECRET, "wang.wei@example.com", ["sales"])).actor
    again = checks.verify(issue_token(SECRET, "wang.wei@example.com", ["sales"], ttl=99)).actor
    assert first == again
    assert "wang" not in first
    assert "@" not in first
    assert checks.verify(issue_token(SECRET, "service:scoring", ["sales"])).actor == "user:scoring"


def test_remembered_tokens_are_bounded() -> None:
    checks = TokenVerifier(SECRET, remembered=10)
    for n in range(35):
        checks.verify(issue_token(SECRET, f"u{n}", ["sales"]))
    assert len(checks._remembered) <= 10


def test_unknown_roles_cannot_be_issued() -> None:
    with pytest.raises(ValueError, match="king"):
        issue_token(SECRET, "x", ["king"])


def _settings(**more: Any) -> ServiceSettings:
    return ServiceSettings(
        environment="development", postgres_url="postgresql://h/x", kafka_bootstrap="h:1", jwt_secret=SECRET, **more
    )


def test_the_token_of_a_service_is_renewed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    token = ServiceToken(_settings())
    first = token()
    assert token() is first
    assert TokenVerifier(SECRET).verify(first).actor == "service:kehu"
    later = time.monotonic() + ServiceToken.LIFE_SECONDS * 0.6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    renewed = token()
    assert token() is renewed
    assert renewed is not first
    assert ServiceToken(_settings(system_token="given"))() == "given"


def test_calls_to_other_services_carry_the_token(provider: Provider) -> None:
    with service_client(_settings(), provider.url) as client:
        sent = client.get("").request.headers["authorization"]
    assert TokenVerifier(SECRET).verify(sent.removeprefix("Bearer ")).roles == {Role.SYSTEM}
