"""The fixture of the tests of the whole suite: one suite a module, since a start takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.suite import Suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """All processes of the suite, ready, with one channel: `expo`."""
    with Suite(tmp_path_factory.mktemp("suite")) as running:
        running.define_channel("expo")
        yield running
