"""The stack: PostgreSQL and Kafka for tests, the demo and a laptop, from the first source that fits."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from kehu.devstack.base import DevStackError, Origin, Server
from kehu.devstack.containers import (
    KAFKA_IMAGE,
    POSTGRES_IMAGE,
    DockerUnavailableError,
    check_daemon,
    docker_kafka,
    docker_postgres,
    missing_images,
)
from kehu.devstack.external import external_kafka, external_postgres
from kehu.devstack.kafka import EmbeddedKafka
from kehu.devstack.postgres import EmbeddedPostgres
from kehu.devstack.process import EmbeddedServer

Mode = Literal["auto", "embedded", "docker"]
Piece = Literal["postgres", "kafka"]
VARIABLES: dict[Piece, str] = {"postgres": "KEHU_POSTGRES_URL", "kafka": "KEHU_KAFKA_BOOTSTRAP"}
_IMAGES: dict[Piece, str] = {"postgres": POSTGRES_IMAGE, "kafka": KAFKA_IMAGE}


@dataclass(frozen=True)
class Address:
    """Where the servers of a stack listen, and where each of them came from.

    A server that was not asked for has an empty address and no origin.
    """

    postgres_url: str
    kafka_bootstrap: str
    origin_postgres: Origin | None
    origin_kafka: Origin | None

    def environment(self) -> dict[str, str]:
        """The environment variables that hand this stack to another process."""
        values = {VARIABLES["postgres"]: self.postgres_url, VARIABLES["kafka"]: self.kafka_bootstrap}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Choice:
    """The source of one server and why it was chosen."""

    origin: Origin
    reason: str


def mode() -> Mode:
    """KEHU_DEVSTACK: auto (default), embedded or docker."""
    value = os.environ.get("KEHU_DEVSTACK", "auto").strip().lower()
    for known in ("auto", "embedded", "docker"):
        if value == known:
            return known
    raise DevStackError(f"KEHU_DEVSTACK={value!r} is not one of auto, embedded, docker.")


def choose(piece: Piece, *, kept: bool = False) -> Choice:
    """The first source that fits.

    Args:
        kept: the data is to be kept in a directory; only the embedded servers do that.
    """
    variable = VARIABLES[piece]
    if os.environ.get(variable):
        return Choice("env", f"{variable} is set")
    wanted = mode()
    if wanted == "embedded":
        return Choice("embedded", "KEHU_DEVSTACK=embedded")
    if wanted == "docker":
        if kept:
            raise DevStackError(
                "KEHU_DEVSTACK=docker keeps no data in a directory. Unset it, or give no data directory."
            )
        try:
            check_daemon()
        except DockerUnavailableError as error:
            raise DevStackError(
                f"KEHU_DEVSTACK=docker, but {error}. Start Docker, unset KEHU_DEVSTACK, or set {variable}."
            ) from error
        return Choice("docker", f"KEHU_DEVSTACK=docker, image {_IMAGES[piece]}")
    if kept:
        return Choice("embedded", "data kept in a directory")
    try:
        missing = missing_images(_IMAGES[piece])
    except DockerUnavailableError as error:
        return Choice("embedded", str(error))
    if missing:
        absent = ", ".join(missing)
        return Choice("embedded", f"Docker answers, but {absent} is not on this machine (KEHU_DEVSTACK=docker pulls)")
    return Choice("docker", f"Docker answers and has {_IMAGES[piece]}")


class DevStack:
    """PostgreSQL and Kafka, started together; a context manager.

    The first that fits, for each of them: the address in KEHU_POSTGRES_URL or KEHU_KAFKA_BOOTSTRAP; Docker, when a
    daemon answers and has the images (KEHU_DEVSTACK=docker: also pulls them); embedded.

    What it starts ends with it, also when this process is killed. One stack is used from one thread at a time.

    Args:
        data_dir: keep the data in this directory and go on with what is there. Without it the data lies in a temporary
            directory and is thrown away by stop().
        keep: do not throw the temporary directory away (to look at it); `data_dir` then tells where it is.
        postgres: whether PostgreSQL is wanted.
        kafka: whether Kafka is wanted.
    """

    def __init__(
        self, *, data_dir: Path | None = None, keep: bool = False, postgres: bool = True, kafka: bool = True
    ) -> None:
        self.data_dir = data_dir
        self._throw_away = data_dir is None and not keep
        self._given = data_dir is not None
        asked: dict[Piece, bool] = {"postgres": postgres, "kafka": kafka}
        self._wanted = [piece for piece, wanted in asked.items() if wanted]
        if not self._wanted:
            raise ValueError("a stack of neither PostgreSQL nor Kafka")
        self._servers: dict[Piece, Server] = {}
        self._choices: dict[Piece, Choice] = {}
        self._address: Address | None = None

    def start(self) -> Address:
        """Start what is wanted, both at the same time, and wait until both serve (some 2 s from a full cache).

        Raises DevStackError, with what to set instead, and leaves nothing running then.
        """
        if self._address is not None:
            return self._address
        try:
            for piece in self._wanted:
                self._choices[piece] = choose(piece, kept=self._given)
            for piece in self._wanted:
                self._servers[piece] = self._make(piece, self._choices[piece].origin)
            *others, last = self._servers.values()
            with ThreadPoolExecutor(1, "devstack") as threads:
                starts = [threads.submit(server.start) for server in others]
                last.start()  # in this thread: Kafka may have to be fetched, and Ctrl-C ends that
            for done in starts:
                done.result()
        except BaseException:
            self.stop()
            raise
        origins = {piece: choice.origin for piece, choice in self._choices.items()}
        urls = {piece: server.url for piece, server in self._servers.items()}
        self._address = Address(
            urls.get("postgres", ""), urls.get("kafka", ""), origins.get("postgres"), origins.get("kafka")
        )
        return self._address

    def stop(self) -> None:
        """End what was started. Data without a directory of its own is thrown away. May be called twice."""
        servers, self._servers, self._address = list(self._servers.values()), {}, None
        with ThreadPoolExecutor(2, "devstack") as threads:
            # A container is removed in any case: nothing would find it again.
            stops = [
                threads.submit(server.stop, discard=self._throw_away or not _embedded(server)) for server in servers
            ]
        if self._throw_away and self.data_dir is not None:
            for server in servers:
                if isinstance(server, EmbeddedServer):
                    server.remove()
            shutil.rmtree(self.data_dir, ignore_errors=True)
            self.data_dir = None
        for done in stops:
            done.result()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> Address:
        """Where the servers listen. Raises DevStackError before start()."""
        if self._address is None:
            raise DevStackError("The stack was not started.")
        return self._address

    @property
    def choices(self) -> dict[Piece, Choice]:
        """Where each server came from, and why."""
        return dict(self._choices)

    @property
    def postgres(self) -> Server:
        """The PostgreSQL server: pid, kill, pause, resume, stop, start."""
        return self._server("postgres")

    @property
    def kafka(self) -> Server:
        """The Kafka broker: pid, kill, pause, resume, stop, start."""
        return self._server("kafka")

    def _server(self, piece: Piece) -> Server:
        if piece not in self._servers:
            raise DevStackError(f"This stack has no {piece}, or was not started.")
        return self._servers[piece]

    def _make(self, piece: Piece, origin: Origin) -> Server:
        external: dict[Piece, Callable[[str], Server]] = {"postgres": external_postgres, "kafka": external_kafka}
        containers: dict[Piece, Callable[[], Server]] = {"postgres": docker_postgres, "kafka": docker_kafka}
        if origin == "env":
            return external[piece](os.environ[VARIABLES[piece]])
        if origin == "docker":
            return containers[piece]()
        if self.data_dir is None:
            self.data_dir = Path(tempfile.mkdtemp(prefix="kehu-"))
            self.data_dir.chmod(0o711)  # the account of PostgreSQL passes through
        home = self.data_dir.absolute() / piece
        server = EmbeddedPostgres if piece == "postgres" else EmbeddedKafka
        return server(home, throw_away=self._throw_away)


def remove_data(data_dir: Path) -> None:
    """Delete the data that a stack kept in this directory. Raises DevStackError while a stack runs on it."""
    for home, kind in ((data_dir / "postgres", EmbeddedPostgres), (data_dir / "kafka", EmbeddedKafka)):
        if home.is_dir():
            kind(home.absolute(), throw_away=False).remove()
    with contextlib.suppress(OSError):  # there may be other things in it
        data_dir.rmdir()


def _embedded(server: Server) -> bool:
    return isinstance(server, EmbeddedServer)
