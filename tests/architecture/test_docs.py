"""The pages say what the code says: generated ones are up to date, and no link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kehu.cli import docs

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    p for p in ROOT.rglob("*.md") if not {".venv", ".uv", ".kehu", "node_modules"} & set(p.relative_to(ROOT).parts)
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
_NAMED = re.compile(r"`((?:tests|bench|shared|services|docs)/[\w./-]+)`")


@pytest.mark.req("DC-02")
def test_generated_pages_are_as_the_code_says(tmp_path: Path) -> None:
    """Run `make docs` when this fails."""
    docs.all_(tmp_path)
    written = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(written) > 10
    stale = [
        str(path.relative_to(tmp_path))
        for path in written
        if not (kept := ROOT / "docs" / "reference" / path.relative_to(tmp_path)).exists()
        or kept.read_text() != path.read_text()
    ]
    assert stale == [], "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_names_of_files_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in _LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    broken = [link for link in links if not (page.parent / link).exists()]
    broken += [name for name in _NAMED.findall(text) if not (ROOT / name).exists()]
    assert broken == []


def test_nothing_names_a_machine_or_a_private_host() -> None:
    """Public code: no path of the machine it was written on."""
    wrong = re.compile(r"/(?:home|Users)/\w+/|/root/")
    for path in PAGES:
        assert not wrong.search(path.read_text()), path
