"""`kehu funnel`, `kehu report` and `kehu replay`, as a person calls them."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from kehu.cli.funnel import command as funnel_command
from kehu.cli.funnel import duration, percent
from kehu.cli.main import main
from kehu.cli.replay import environment_of, reason
from kehu.lake import LakeWriter, Record
from kehu.testing.histories import history


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lake") / "lake"
    made = history(71, 200)
    LakeWriter(path).append(
        [Record(t, 0, i, v) for t, values in made.topics.items() for i, (_, v) in enumerate(values)]
    )
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.req("AN-01")
def test_a_funnel_as_a_table_and_as_json(
    lake: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run("funnel", "--lake", str(lake), "--window", "60d", "--by", "channel") == 0
    shown = capsys.readouterr().out
    assert "200 customers entered, window 60.0 d, ordered" in shown
    for word in ("captured", "qualified", "converted", "baidu", "trade-fair", "Pending", "Dropped", "95 %"):
        assert word in shown
    assert run("funnel", "--lake", str(lake), "--window", "60d", "--by", "channel", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    reached = [row["reached"] for row in answer["steps"]]
    assert reached[0] == 200 > reached[1] > reached[2] > 0
    assert answer["spec"]["breakdown"] == "data.channel"
    for count in reached:
        assert re.search(rf"\b{count}\b", shown)


def test_any_steps_and_times(lake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = "lead.captured[data.channel=baidu,data.channel=wechat],behaviour:demo_attended"
    assert run("funnel", "--lake", str(lake), "--steps", steps, "--order", "unordered", "--json") == 0
    some = json.loads(capsys.readouterr().out)
    assert some["steps"][0]["reached"] > 0
    assert run("funnel", "--lake", str(lake), "--as-of", "2026-02-01T00:00:00Z", "--json") == 0
    early = json.loads(capsys.readouterr().out)
    assert 0 < early["steps"][0]["reached"] < 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "captured,nonsense"], "'nonsense' is not a step"),
        (["--window", "soon"], "not a length of time"),
        (["--order", "random"], "--order is one of"),
        (["--by", "nonsense"], "neither a column"),
    ],
)
def test_what_means_nothing_is_refused(
    lake: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("funnel", "--lake", str(lake), *arguments) == 1
    assert says in capsys.readouterr().err


def test_without_a_lake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("funnel", "--lake", str(tmp_path / "none")) == 1
    assert "no lake" in capsys.readouterr().err
    assert run("funnel", "--state-dir", str(tmp_path)) == 1
    assert "--lake" in capsys.readouterr().err


@pytest.mark.req("AN-09")
def test_the_report_is_one_file_that_needs_no_network(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reports" / "board.html"
    assert run("report", "--lake", str(lake), "--out", str(out), "--window", "60d") == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    for part in ("Funnel", "Channels", "Months of capture", "Does the score tell?", "Events by day", "200 captured"):
        assert part in page
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


def test_a_report_on_nothing_is_refused(lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--lake", str(lake), "--as-of", "2001-01-01T00:00:00Z", "--out", str(tmp_path / "r.html")) == 1
    assert "no event" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_replay_says_why_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEHU_POSTGRES_URL", raising=False)
    assert run("replay", "--projection", "lead_journey", "--state-dir", str(tmp_path)) == 1
    assert "no stack runs" in capsys.readouterr().err
    monkeypatch.setenv("KEHU_POSTGRES_URL", "postgresql://nobody@127.0.0.1:1/postgres")
    assert environment_of(tmp_path)["KEHU_POSTGRES_URL"].endswith(":1/postgres")
    monkeypatch.setenv("KEHU_ENVIRONMENT", "development")
    monkeypatch.delenv("KEHU_JWT_SECRET", raising=False)
    assert run("replay", "--projection", "lead_journey", "--state-dir", str(tmp_path)) == 1
    assert "KEHU_" in capsys.readouterr().err


STEP = {"projection": "lead_journey", "generation": 2, "state": "building", "done": 10, "total": 40, "rate": 0.0}


@pytest.fixture
def rebuilding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a process in the place of `python -m analytics rebuild` that says these lines and ends with this code."""

    def put(lines: list[dict[str, object]], code: int, log: str = "") -> None:
        package = tmp_path / "path" / "analytics"
        package.mkdir(parents=True)
        text = "\n".join(json.dumps(line) for line in lines)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            "import os, sys\n"
            "assert sys.argv[1:] == ['rebuild'] and os.environ['KEHU_PROJECTION'] == 'lead_journey'\n"
            f"print({text!r})\nprint('not a step')\nprint({log!r}, file=sys.stderr)\nsys.exit({code})\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
        monkeypatch.setenv("KEHU_POSTGRES_URL", "postgresql://nobody@127.0.0.1:1/postgres")

    return put


@pytest.mark.req("AN-08")
def test_replay_shows_how_far_it_is(
    rebuilding: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rebuilding([STEP, {**STEP, "state": "done", "done": 40, "rate": 20000.0}], 0)
    arguments = ("replay", "--projection", "lead_journey", "--state-dir", str(tmp_path))
    assert run(*arguments) == 0
    assert "lead_journey: generation 2 is live, 40 events, 20,000 a second." in capsys.readouterr().out
    assert run(*arguments, "--json") == 0
    assert [json.loads(line)["done"] for line in capsys.readouterr().out.splitlines()] == [10, 40]


def test_replay_tells_the_reason_of_a_failure(
    rebuilding: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rebuilding([STEP, {"state": "failed", "reason": "3 events are parked"}], 1, '{"error": "analytics.NotReady"}')
    assert run("replay", "--projection", "lead_journey", "--state-dir", str(tmp_path)) == 1
    assert capsys.readouterr().err.strip().endswith("3 events are parked")


def test_the_reason_of_a_failed_rebuild() -> None:
    log = '{"level": "info", "message": "started"}\n{"level": "error", "error": "psycopg.OperationalError", "reason": "no server"}\n'
    assert reason(log) == "psycopg.OperationalError: no server"
    assert reason("analytics cannot start:\n  KEHU_LAKE_PATH  is missing\n") == "KEHU_LAKE_PATH  is missing"
    assert reason("") == ""


def test_numbers_for_people() -> None:
    assert [percent(None), percent(0.1234)] == ["", "12.3 %"]
    assert [duration(s) for s in (None, 40, 90, 7200, 259200)] == ["", "40 s", "1.5 min", "2.0 h", "3.0 d"]


def test_it_is_a_plain_function() -> None:
    with pytest.raises(typer.Exit):
        funnel_command(order="random")
    assert sys.modules["kehu.cli.funnel"].command is funnel_command
