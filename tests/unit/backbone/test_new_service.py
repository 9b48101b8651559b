"""A service that was just laid out runs its own specs, and names nothing wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kehu.cli.new_service import lay_out


def test_its_specs_pass_and_it_can_be_composed(tmp_path: Path) -> None:
    lay_out("field-sales", "site_visit", tmp_path)
    check = (
        "import sys, pytest, kehu.events;"
        f"kehu.events.__path__.append({str(tmp_path / 'shared/kehu/events')!r});"
        "from field_sales.bootstrap import SERVICE, migrate;"
        "assert set(SERVICE.roles) == {'migrate', 'api', 'relay'};"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-c', '/dev/null', {str(tmp_path / 'tests')!r}]))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "services/field-sales")}
    done = subprocess.run(
        [sys.executable, "-c", check], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "aggregate"), [("Field Sales", "visit"), ("../x", "visit"), ("field-sales", "Site-Visit")]
)
def test_wrong_names_are_refused_and_nothing_is_written(name: str, aggregate: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        lay_out(name, aggregate, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_service_is_not_overwritten(tmp_path: Path) -> None:
    lay_out("field-sales", "visit", tmp_path)
    with pytest.raises(ValueError, match="there already"):
        lay_out("field-sales", "visit", tmp_path)
