"""The command line: quick, lazy, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from kehu.auth import Role, TokenVerifier
from kehu.cli import clock, logs, main, token
from kehu.supervisor import NoStack, Stack, _status, cut, lag_of, lock, runs, secrets_of, tail


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.req("PL-01")
def test_help_names_every_command_and_imports_none() -> None:
    code = "import sys; from kehu.cli.main import main\ntry: main(['--help'])\nfinally: print(len(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    for name in main.COMMANDS:
        assert f"  {name} " in done.stdout
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.modules))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert int(done.stderr) < int(bare.stdout) + 60  # dataclasses, difflib and what they need; typer alone is 150 more


def test_an_unknown_command_is_answered_with_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("clok", capsys=capsys)
    assert code == 2
    assert "Did you mean `kehu clock`?" in err


def test_a_missing_package_is_named_with_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "needs_lake.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(main.COMMANDS, "funnel", main.Command("needs_lake", "x", "lake"))
    code, _, err = run("funnel", capsys=capsys)
    assert code == 2
    assert "a_package_that_is_not_there" in err
    assert "pip install 'kehu[lake]'" in err


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_can_be_asked_for_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(name, "--help", capsys=capsys)
    assert code == 0
    assert f"kehu {name}" in out


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("48h", timedelta(hours=48)),
        ("3d", timedelta(days=3)),
        ("1w", timedelta(weeks=1)),
        ("1d12h", timedelta(hours=36)),
        ("0.5h", timedelta(minutes=30)),
    ],
)
def test_lengths_of_time(text: str, length: timedelta) -> None:
    assert clock.duration(text) == length


@pytest.mark.parametrize("text", ["", "3", "3x", "h", "-3h", "3 h", "3h!", "1e9h", "9" * 30 + "d"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        clock.duration(text)


def test_instants() -> None:
    assert clock.instant("2026-01-01T08:00:00+08:00") == datetime(2026, 1, 1, tzinfo=UTC)
    for text in ("2026-01-01", "2026-01-01T00:00:00", "tomorrow"):
        with pytest.raises(typer.BadParameter):
            clock.instant(text)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """A state directory that looks as if a stack runs in it."""
    handle = lock(tmp_path)
    assert handle is not None
    entry = {"service": "lead-intake", "roles": ["api"], "pid": None, "url": "http://127.0.0.1:1", "restarts": 0}
    description = {"pid": os.getpid(), "clock_file": str(tmp_path / "clock.json"), "processes": [entry]}
    (tmp_path / "stack.json").write_text(json.dumps(description))
    return tmp_path


def test_the_clock_is_moved(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ("--state-dir", str(stack))
    assert run("clock", "show", *state, capsys=capsys)[1].endswith("(as the machine)\n")
    assert "2 days, 0:00:00" in run("clock", "advance", "48h", *state, capsys=capsys)[1]
    code, _, err = run("clock", "set", "2020-01-01T00:00:00Z", *state, capsys=capsys)
    assert (code, "--back" in err) == (1, True)
    assert run("clock", "set", "2020-01-01T00:00:00Z", "--back", *state, capsys=capsys)[1].startswith("2020-01-01")
    assert run("clock", "set", "2040-01-01T00:00:00Z", *state, capsys=capsys)[1].startswith("2040-01-01")


def test_status_of_what_is_down(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("status", "--state-dir", str(stack), capsys=capsys)
    assert code == 1
    assert "lead-intake" in out
    assert "down" in out
    code, out, _ = run("status", "--json", "--state-dir", str(stack), capsys=capsys)
    assert json.loads(out)[0]["ready"] is False


def test_no_stack_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("status",), ("down",), ("clock", "show"), ("events", "tail")):
        code, _, err = run(*command, "--state-dir", str(tmp_path), capsys=capsys)
        assert (code, "kehu up" in err) == (1, True)
    with pytest.raises(NoStack):
        Stack.load(tmp_path)


def test_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEHU_JWT_SECRET", raising=False)
    state = ("--state-dir", str(tmp_path))
    assert run("token", *state, capsys=capsys)[0] == 1
    secret = secrets_of(tmp_path)["jwt_secret"]
    out = run("token", "--role", "sales", "--role", "legal", "--subject", "wang.wei", *state, capsys=capsys)[1]
    principal = TokenVerifier(secret).verify(out.strip())
    assert (principal.actor, principal.roles) == ("user:wang.wei", frozenset({Role.SALES, Role.LEGAL}))
    everything = TokenVerifier(secret).verify(run("token", *state, capsys=capsys)[1].strip())
    assert everything.roles == frozenset(Role) - {Role.SYSTEM}
    monkeypatch.setenv("KEHU_JWT_SECRET", "another secret of thirty-two letters")
    out = run("token", *state, capsys=capsys)[1].strip()
    assert TokenVerifier("another secret of thirty-two letters").verify(out)
    assert run("token", "--role", "king", *state, capsys=capsys)[0] == 2
    _ = token


def test_logs_are_shown_in_order_and_by_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    lines = {
        "scoring-api": [("2026-01-01T00:00:02.000Z", "info", "second"), ("2026-01-01T00:00:03.000Z", "error", "third")],
        "lead-intake-relay": [("2026-01-01T00:00:01.000Z", "debug", "first")],
    }
    for name, entries in lines.items():
        text = [
            json.dumps({"time": at, "level": level, "service": "s", "role": "r", "message": message, "position": 7})
            for at, level, message in entries
        ]
        (folder / f"{name}.log").write_text("\n".join([*text, "Traceback: not JSON"]) + "\n")
    state = ("--state-dir", str(tmp_path))
    out = run("logs", "--level", "debug", *state, capsys=capsys)[1]
    assert out.index("first") < out.index("second") < out.index("third")
    assert "position=7" in out
    out = run("logs", "scoring", *state, capsys=capsys)[1]
    assert "second" in out
    assert "first" not in out
    out = run("logs", "scoring/api", "--level", "error", "--raw", *state, capsys=capsys)[1]
    assert json.loads(out.splitlines()[-1])["message"] == "third"
    assert run("logs", "billing", *state, capsys=capsys)[0] == 1


def test_new_lines_are_read_whole_also_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("one\ntw")
    places = {path: 0}
    assert list(logs._new(path, places)) == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    assert list(logs._new(path, places)) == ["two"]
    cut(path, 3)
    with path.open("a") as file:
        file.write("x\n")
    assert list(logs._new(path, places)) == ["x"]
    assert path.with_name("x.log.1").read_text() == "one\ntwo\n"
    assert tail(path, 5) == "x"
    assert tail(tmp_path / "nothing", 5) == ""


def test_secrets_are_made_once_and_kept_privately(tmp_path: Path) -> None:
    first = secrets_of(tmp_path / "state")
    assert secrets_of(tmp_path / "state") == first
    assert set(first) == {"jwt_secret", "master_key", "hash_key"}
    assert len(set(first.values())) == 3
    assert stat.S_IMODE((tmp_path / "state" / "secrets.json").stat().st_mode) == 0o600
    assert list((tmp_path / "state").iterdir()) == [tmp_path / "state" / "secrets.json"]


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    assert not runs(tmp_path)
    handle = lock(tmp_path)
    assert handle is not None
    assert lock(tmp_path) is None
    assert runs(tmp_path)
    os.close(handle)
    assert not runs(tmp_path)


def test_lag_is_the_sum_of_what_waits() -> None:
    page = (
        "# HELP kehu_consumer_lag_events x\n"
        'kehu_consumer_lag_events{consumer="a",partition="0",topic="t"} 3.0\n'
        'kehu_consumer_lag_events{consumer="a",partition="1",topic="t"} 4.0\n'
        'kehu_relay_outbox_events{topic="t"} 5.0\n'
    )
    assert lag_of(page) == 12
    assert lag_of("python_info 1.0\n") is None


def test_the_status_of_a_process_that_is_gone() -> None:
    gone = _status({"service": "x", "roles": ["api"], "pid": 2**22 + 1, "url": "http://127.0.0.1:1", "restarts": 0})
    assert (gone["ready"], gone["rss"], gone["lag"]) == (False, None, None)
