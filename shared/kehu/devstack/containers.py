"""PostgreSQL and Kafka in containers of a Docker daemon on this machine, through testcontainers.

Their ports are published on loopback under fixed numbers, so that a container that was killed comes back at the same
address. testcontainers' reaper (Ryuk) removes the containers when this process dies.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kehu.devstack.base import (
    DevStackError,
    broker_settings,
    free_port,
    kafka_answers,
    poll,
    postgres_answers,
    postgres_settings,
)
from kehu.devstack.postgres import SUPERUSER

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

POSTGRES_IMAGE = "postgres:18"
KAFKA_IMAGE = "apache/kafka:4.4.0"

# Two containers may not make the reaper at the same time.
_creating = threading.Lock()


class DockerUnavailableError(Exception):
    """No daemon, or not one that can be used; the message says why."""


def check_daemon() -> None:
    """Raise DockerUnavailableError unless a daemon on this machine answers within 5 s."""
    host = os.environ.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        raise DockerUnavailableError(f"DOCKER_HOST={host} is a daemon on another machine")
    # Before the import, which takes longer than a start of PostgreSQL.
    usual = ("/var/run/docker.sock", "~/.docker/run/docker.sock")
    if not any(Path(path).expanduser().exists() for path in ([host.removeprefix("unix://")] if host else usual)):
        raise DockerUnavailableError("no Docker daemon runs")
    try:
        from docker.errors import DockerException  # type: ignore[import-untyped]
        from testcontainers.core.docker_client import DockerClient
    except ImportError as error:
        raise DockerUnavailableError(f"the package testcontainers is not installed ({error})") from error
    try:
        client = DockerClient(timeout=5).client
        client.ping()
        client.close()
    except (DockerException, OSError) as error:
        raise DockerUnavailableError(f"the Docker daemon does not answer ({error})") from error


def missing_images(image: str) -> list[str]:
    """Of the image and testcontainers' reaper, those that are not on this machine. Raises DockerUnavailableError."""
    if Path("/.dockerenv").exists():
        raise DockerUnavailableError("this is a container itself, and published ports may not be on its loopback")
    check_daemon()
    from docker.errors import DockerException, ImageNotFound
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.docker_client import DockerClient

    wanted = [image] if testcontainers_config.ryuk_disabled else [image, testcontainers_config.ryuk_image]
    client = DockerClient(timeout=10).client
    missing = []
    try:
        for name in wanted:
            try:
                client.images.get(name)
            except ImageNotFound:
                missing.append(name)
    except (DockerException, OSError) as error:
        raise DockerUnavailableError(f"the Docker daemon does not answer ({error})") from error
    finally:
        client.close()
    return missing


class ContainerServer:
    """A server in a container. It is pulled when it is missing: whoever makes one has decided that it may be."""

    def __init__(
        self,
        name: str,
        image: str,
        port: int,
        published: int,
        url: str,
        answers: Callable[[str], str | None],
        environment: Mapping[str, str],
        command: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.image = image
        self.url = url
        self._port = port
        self._published = published
        self._answers = answers
        self._environment = dict(environment)
        self._command = list(command)
        self._container: DockerContainer | None = None

    @property
    def pid(self) -> int:
        wrapped = self._wrapped()
        wrapped.reload()
        pid = int(wrapped.attrs["State"]["Pid"])
        if pid == 0:
            raise DevStackError(f"{self.name} (container {wrapped.short_id}) does not run.")
        return pid

    def start(self) -> None:
        if self._container is not None:
            self._wrapped().start()  # the same container: its data and its port
        else:
            from docker.errors import DockerException
            from testcontainers.core.container import DockerContainer

            container = DockerContainer(self.image).with_envs(**self._environment)
            if self._command:
                container.with_command(self._command)
            # docker-py takes (address, port); testcontainers' annotation knows only the port.
            container.ports[f"{self._port}/tcp"] = cast(Any, ("127.0.0.1", self._published))
            try:
                with _creating:
                    container.start()
            except BaseException as error:
                container.stop()  # one that was made and could not be started
                if not isinstance(error, DockerException | OSError):
                    raise
                raise DevStackError(
                    f"{self.name} cannot be started from the image {self.image}: {error}\n"
                    "Set KEHU_DEVSTACK=embedded to do without Docker."
                ) from error
            self._container = container
        self.wait_ready(60.0)

    def stop(self, *, discard: bool = False) -> None:
        """Remove the container with its data; without `discard` only stop it, so that start() finds its data."""
        if self._container is None:
            return
        if discard:
            self._container.stop(force=True, delete_volume=True)
            self._container = None
        else:
            self._wrapped().stop(timeout=20)

    def kill(self) -> None:
        wrapped = self._wrapped()
        wrapped.kill(signal="SIGKILL")
        wrapped.wait(timeout=20)

    def pause(self) -> None:
        self._wrapped().pause()

    def resume(self) -> None:
        self._wrapped().unpause()

    def wait_ready(self, deadline: float = 30.0) -> None:
        reason: str | None = None

        def ready() -> bool:
            nonlocal reason
            reason = self._answers(self.url)
            return reason is None

        if not poll(ready, deadline, step=0.1):
            raise DevStackError(
                f"{self.name} did not answer within {deadline:g} s ({reason}). Its log:\n{self.log_tail(20)}"
            )

    def log_tail(self, lines: int = 50) -> str:
        return str(self._wrapped().logs(tail=lines).decode("utf-8", "replace"))

    def _wrapped(self) -> Any:
        if self._container is None:
            raise DevStackError(f"{self.name} was not started.")
        return self._container.get_wrapped_container()


def docker_postgres() -> ContainerServer:
    """The official image of PostgreSQL with the settings of the embedded one."""
    password, port = secrets.token_urlsafe(18), free_port()
    return ContainerServer(
        "PostgreSQL in Docker",
        POSTGRES_IMAGE,
        5432,
        port,
        f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{port}/postgres",
        postgres_answers,
        {
            "POSTGRES_USER": SUPERUSER,
            "POSTGRES_PASSWORD": password,
            "POSTGRES_DB": "postgres",
            "POSTGRES_INITDB_ARGS": "--encoding=UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8",
        },
        ["postgres", *(word for key, value in postgres_settings().items() for word in ("-c", f"{key}={value}"))],
    )


def docker_kafka() -> ContainerServer:
    """The Apache image of Kafka, one KRaft node, with the settings of the embedded one."""
    port, controller = free_port(), 9093
    settings = broker_settings(
        {"PLAINTEXT": f"0.0.0.0:{port}", "CONTROLLER": f"127.0.0.1:{controller}"},
        f"127.0.0.1:{port}",
        f"1@127.0.0.1:{controller}",
    )
    # The image turns KAFKA_A_B=c into the setting a.b=c.
    environment = {"KAFKA_" + key.upper().replace(".", "_"): value for key, value in settings.items()}
    environment |= {"KAFKA_HEAP_OPTS": "-Xms64m -Xmx512m", "KAFKA_LOG_DIRS": "/var/lib/kafka/data"}
    return ContainerServer("Kafka in Docker", KAFKA_IMAGE, port, port, f"127.0.0.1:{port}", kafka_answers, environment)
