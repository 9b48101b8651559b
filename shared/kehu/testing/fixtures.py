"""Fixtures of pytest for tests that need PostgreSQL and Kafka: one stack a run, a fresh database a test.

pytest loads this module by `-p kehu.testing.fixtures` (pyproject.toml). Servers start when the first test asks for one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from kehu.devstack import DevStack, create_database, drop_database


def unique_name(prefix: str = "t") -> str:
    """A name that no other test has: lower-case letters, digits and underscores, fit for databases, topics and groups."""
    return f"{prefix}_{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def stack() -> Iterator[DevStack]:
    """PostgreSQL and Kafka, started once. A test that stops or pauses one of them starts it again."""
    with DevStack() as running:
        yield running


@pytest.fixture(scope="session")
def postgres_url(stack: DevStack) -> str:
    """URL of the server's database `postgres`; tests write into `database`, not here."""
    return stack.address.postgres_url


@pytest.fixture(scope="session")
def kafka_bootstrap(stack: DevStack) -> str:
    """host:port of the broker."""
    return stack.address.kafka_bootstrap


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """URL of a fresh, empty database, dropped after the test."""
    name = unique_name()
    yield create_database(postgres_url, name)
    drop_database(postgres_url, name)


@pytest.fixture
def topic_prefix() -> str:
    """A prefix for the topics and consumer groups of one test."""
    return unique_name("test")
