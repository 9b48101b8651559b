"""The HTTP server against connections that do not behave, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Annotated
from urllib.parse import urlsplit

import pytest

from kehu.auth import issue_token
from kehu.http import Body, Call, Router, commands, create_app, json_response, public, server
from kehu.settings import ServiceSettings
from kehu.testing.http import serving

SECRET = "a secret of a test that has forty letters"


class Item(Body):
    name: str


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    router = Router()

    @router.get("/open")
    async def door(_: Annotated[None, public()]) -> dict[str, bool]:
        return {"open": True}

    @router.post("/items")
    async def items(body: Item, call: Annotated[Call, commands()]) -> object:
        return json_response({"name": body.name})

    settings = ServiceSettings(
        environment="development", postgres_url="postgresql://h/x", kafka_bootstrap="h:1", jwt_secret=SECRET
    )
    with serving(create_app(settings, title="Test", routers=[router])) as url:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        yield parts.hostname, parts.port


def talk(address: tuple[str, int], *pieces: bytes, until_closed: bool = True) -> bytes:
    """Send pieces and give what came back, until the other side hangs up (or until an answer is whole)."""
    with socket.create_connection(address, timeout=30) as connection:
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while chunk := connection.recv(65536):
                received += chunk
                if not until_closed and received.endswith(b"}"):
                    break
        except ConnectionError:
            pass
        return received


GET = b"GET /open HTTP/1.1\r\nHost: x\r\n"


def test_an_ordinary_request(address: tuple[str, int]) -> None:
    assert talk(address, GET, b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "pieces",
    [
        (GET, b"X-Long: ", b"a" * 70_000, b"\r\n\r\n"),
        (GET, *(b"X-%d: 1\r\n" % n for n in range(150)), b"\r\n"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",),
        (b"GET /open HTTP/9.9\r\n\r\n",),
        (b"POST /items HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",),
        (b"POST /items HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",),
        (b"POST /items HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",),
    ],
    ids=["long header", "many headers", "long address", "tls", "version", "negative", "two lengths", "bad chunk"],
)
def test_what_is_not_http_is_cut_off(address: tuple[str, int], pieces: tuple[bytes, ...]) -> None:
    answer = talk(address, *pieces)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401"))
    assert talk(address, GET, b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("begun", [b"", b"GET /open HT", GET, b"POST /items HTTP/1.1\r\nHost: x\r\nX-Slow: a"])
def test_a_connection_that_says_nothing_more_is_closed(address: tuple[str, int], begun: bytes) -> None:
    assert talk(address, begun) == b""  # talk() fails when nobody hangs up


def test_many_requests_on_one_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        for _ in range(3):
            connection.sendall(GET + b"\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200 OK")
        time_without_request = 0.8  # longer than headers may take: an idle connection is not a slow one
        connection.settimeout(time_without_request)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(GET + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_a_body_that_is_too_large_is_answered_unread(address: tuple[str, int]) -> None:
    head = (
        b"POST /items HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer "
        + issue_token(SECRET, "x", ["sales"]).encode()
        + b"\r\nContent-Length: 999999999\r\n\r\n"
    )
    answer = talk(address, head)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer


def test_a_body_that_comes_in_pieces(address: tuple[str, int]) -> None:
    head = (
        b"POST /items HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nAuthorization: Bearer "
        + issue_token(SECRET, "x", ["sales"]).encode()
        + b"\r\n\r\n"
    )
    answer = talk(address, head, b'9\r\n{"name": \r\n', b'4\r\n"x"}\r\n', b"0\r\n\r\n")
    assert answer.endswith(b'{"name":"x"}')


def test_expect_continue(address: tuple[str, int]) -> None:
    head = (
        b"POST /items HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 13\r\n"
        b"Expect: 100-continue\r\nAuthorization: Bearer " + issue_token(SECRET, "x", ["sales"]).encode() + b"\r\n\r\n"
    )
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(b'{"name": "x"}')
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        assert received.endswith(b'{"name":"x"}')
