"""What the pieces of the stack share: their error, their interface, free ports and the question "are you there?"."""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import Literal, Protocol
from urllib.parse import urlsplit

import psycopg

Origin = Literal["env", "docker", "embedded"]


class DevStackError(Exception):
    """A piece of the stack cannot be had or does not answer; the message says which, why and what to set instead."""


class Server(Protocol):
    """One server of the stack: an embedded process, a container, or one that somebody else runs."""

    @property
    def url(self) -> str:
        """Where it listens: a postgresql:// URL or a Kafka bootstrap address."""
        ...

    @property
    def pid(self) -> int:
        """Process id. Raises DevStackError when it does not run or is not ours."""
        ...

    def start(self) -> None:
        """Start it, again on the same port and data after stop() or kill(), and wait until it answers."""
        ...

    def stop(self, *, discard: bool = False) -> None:
        """End it in an orderly way; with discard at once and without saving, because its data is thrown away."""
        ...

    def kill(self) -> None:
        """SIGKILL, as in a crash; returns when the process and its children are gone."""
        ...

    def pause(self) -> None:
        """SIGSTOP: it keeps its port and connections and does nothing."""
        ...

    def resume(self) -> None:
        """SIGCONT after pause()."""
        ...

    def wait_ready(self, deadline: float = 30.0) -> None:
        """Wait until it answers; raises DevStackError after `deadline` seconds, or at once when it has ended."""
        ...

    def log_tail(self, lines: int = 50) -> str:
        """The last lines of its log."""
        ...


def free_port() -> int:
    """A TCP port on which nothing listens on loopback.

    It lies below the range from which the kernel takes the ports of outgoing connections: while a server is down for a
    test, a client that tries to reconnect could otherwise be given the very port as its own and talk to itself.
    """
    lowest, highest = 15_000, _first_ephemeral_port() - 1
    for _ in range(200):
        port = lowest + secrets.randbelow(highest - lowest + 1)
        if is_free(port):
            return port
    raise DevStackError(f"No free TCP port between {lowest} and {highest} on 127.0.0.1 in 200 tries.")


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As the servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32_768
    return first if first > 16_000 else 32_768


def poll(ready: Callable[[], bool], deadline: float, step: float = 0.02) -> bool:
    """Ask `ready` every `step` seconds until it says True (the result), at most `deadline` seconds (then False)."""
    end = monotonic() + deadline
    while not ready():
        if monotonic() >= end:
            return False
        sleep(step)
    return True


def postgres_answers(url: str, timeout: float = 3.0) -> str | None:
    """None when a query works, else the reason in one line. `timeout` in seconds."""
    try:
        with psycopg.connect(url, connect_timeout=max(2, int(timeout)), application_name="kehu-devstack") as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return None


def kafka_answers(bootstrap: str, timeout: float = 3.0) -> str | None:
    """None when one of the brokers answers an ApiVersions request in the clear, else the reason. `timeout` in seconds.

    A KRaft broker handles requests only when the controller has unfenced it, so an answer means that it serves.
    The bytes: ApiVersionsRequest v0 of https://kafka.apache.org/protocol (api key 18, no client id).
    """
    reason = "no host:port given"
    for address in filter(None, (part.strip() for part in bootstrap.split(","))):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            reason = f"{address!r} is not host:port"
            continue
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
                connection.settimeout(timeout)
                connection.sendall(struct.pack(">ihhih", 10, 18, 0, 1, -1))
                answer = connection.recv(8)
            if len(answer) == 8 and struct.unpack(">ii", answer)[1] == 1:
                return None
            reason = f"{address} accepts connections but does not answer as a Kafka broker without TLS"
        except OSError as error:
            reason = f"{address}: {error}"
    return reason


def without_password(url: str) -> str:
    """The URL for a message: no password, no query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


# Settings of the servers, the same embedded and in a container. -----------------------------------------------------


def postgres_settings() -> dict[str, str]:
    """Settings of the PostgreSQL server. Durability is PostgreSQL's own default, said aloud: tests kill the server."""
    return {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "200",
        "shared_buffers": "128MB",
        "timezone": "UTC",
        "log_timezone": "UTC",
        # A failed statement and its values (`Key (phone)=(...) already exists`) are told to the client, not to the log.
        "log_min_messages": "log",
        "log_error_verbosity": "terse",
    }


def broker_settings(listeners: Mapping[str, str], advertised: str, voters: str) -> dict[str, str]:
    """Settings of a single Kafka broker that is its own KRaft controller.

    Args:
        listeners: host:port of the listeners PLAINTEXT and CONTROLLER.
        advertised: host:port that clients are told to connect to.
        voters: controller.quorum.voters.
    """
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": voters,
        "listeners": ",".join(f"{name}://{address}" for name, address in listeners.items()),
        "advertised.listeners": f"PLAINTEXT://{advertised}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        # A misspelt topic is an error, not a new topic.
        "auto.create.topics.enable": "false",
        "default.replication.factor": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "group.initial.rebalance.delay.ms": "0",
        # After kill -9 the controller lets the broker back in when the session of its former life is over (9 s by default).
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        "message.max.bytes": "1048588",
        # Event topics are kept for ever; a topic that is not says so itself.
        "log.retention.ms": "-1",
        "log.retention.bytes": "-1",
        # Short segments: after kill -9 the broker reads the last one of each partition again.
        "log.segment.bytes": "134217728",
        "log.index.size.max.bytes": "1048576",
        "log.cleaner.dedupe.buffer.size": "8388608",
        # The development clock can be moved days ahead; a broker refuses records an hour ahead by default.
        "log.message.timestamp.after.max.ms": "9223372036854775807",
        "num.network.threads": "2",
        "num.io.threads": "4",
    }
