"""One suite a module: its tests hurt the servers and processes, each another one, and the suite must live on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# `support` is what the tests of the whole suite share.
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.suite import Suite  # noqa: E402


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with Suite(tmp_path_factory.mktemp("suite")) as running:
        admin = running.client("lead-intake", "admin")
        admin.put("/channels/expo", json={"title": "上海工博会", "kind": "referral"}).raise_for_status()
        yield running
