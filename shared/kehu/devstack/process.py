"""A server that is a process of ours: start, stop, kill, pause and resume it, always under a keeper (keeper.py)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

from kehu.devstack.base import DevStackError, is_free, poll

_KEEPER = Path(__file__).with_name("keeper.py")
# A server's directory is in use until the keeper of its last run has ended everything: wait so long for it, in seconds.
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Launch:
    """How a server is started: argv, its environment and, when the stack runs as root, the account it runs under."""

    argv: Sequence[str]
    env: dict[str, str]
    cwd: Path
    user: int | None = None
    group: int | None = None


class EmbeddedServer(ABC):
    """One server process with a directory of its own: `home` holds its state (ports, password), its log and its data.

    Args:
        home: its directory, made when it is missing.
        throw_away: the data is of no use after the stack: no flush when it is made, no orderly end by DevStack.stop(),
            and the keeper removes `home` when this process dies without stopping the server.
    """

    name: str
    # How to end it: (signal, seconds to act on it), one after the other, SIGKILL at last.
    orderly: Sequence[tuple[int, float]]
    at_once: Sequence[tuple[int, float]]

    def __init__(self, home: Path, *, throw_away: bool) -> None:
        self.home = home
        self.throw_away = throw_away
        self._lock_file: int | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._change = threading.RLock()

    # What a server says of itself. -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def _prepare(self) -> Launch:
        """Make the data directory when it is missing, and say how to start the server on it."""

    @abstractmethod
    def _answers(self) -> str | None:
        """None when it serves, else the reason why not."""

    def _places(self) -> list[Path]:
        """The directories that hold its data."""
        return [self.home]

    # Its life. ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the process exists (a paused one does)."""
        return self._keeper is not None and self._keeper.poll() is None

    @property
    def pid(self) -> int:
        if not self.running:
            raise DevStackError(f"{self.name} does not run.")
        return self._pid

    @property
    def console_file(self) -> Path:
        """What the server writes on stdout and stderr."""
        return self.home / "console.log"

    @property
    def log_file(self) -> Path:
        """Its log."""
        return self.console_file

    def start(self) -> None:
        with self._change:
            if self.running:
                return
            self._lock()
            self._launch(self._prepare())
        self.wait_ready()

    def stop(self, *, discard: bool = False) -> None:
        with self._change:
            try:
                for number, seconds in [*(self.at_once if discard else self.orderly), (signal.SIGKILL, 10.0)]:
                    if self._pid and self.running:
                        self._signal(number)
                        self._signal_all(signal.SIGCONT)  # a paused process would not act
                        self._wait_ended(seconds)
            finally:
                self._close()
                self._unlock()
            if self.running:
                raise DevStackError(f"{self.name} (pid {self._pid}) does not end, not even by SIGKILL.")

    def kill(self) -> None:
        with self._change:
            pid = self.pid
            self._signal(signal.SIGKILL)
            if not self._wait_ended(20.0):
                raise DevStackError(f"{self.name} (pid {pid}) is still there 20 s after SIGKILL.")
            self._close()

    def pause(self) -> None:
        with self._change:
            _ = self.pid  # raises when it does not run
            self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        with self._change:
            _ = self.pid
            self._signal_all(signal.SIGCONT)

    def wait_ready(self, deadline: float = 30.0) -> None:
        reason: str | None = "not started"

        def ready() -> bool:
            nonlocal reason
            reason = self._answers()
            if reason is not None and not self.running:
                raise DevStackError(
                    f"{self.name} ended while it was starting. Its log ({self.log_file}):\n{self.log_tail(20)}"
                )
            return reason is None

        if not poll(ready, deadline):
            raise DevStackError(
                f"{self.name} did not answer within {deadline:g} s ({reason}). "
                f"Its log ({self.log_file}):\n{self.log_tail(20)}"
            )

    def log_tail(self, lines: int = 50) -> str:
        return tail(self.log_file, lines)

    def remove(self) -> None:
        """Delete its directories. Raises DevStackError while it runs."""
        self._lock(0.0)
        try:
            for place in self._places():
                shutil.rmtree(place, ignore_errors=True)
        finally:
            self._unlock()

    # How. --------------------------------------------------------------------------------------------------------

    def _launch(self, launch: Launch) -> None:
        _limit(self.console_file)
        spec = {
            "parent": os.getpid(),
            "argv": list(launch.argv),
            "env": launch.env,
            "cwd": str(launch.cwd),
            "user": launch.user,
            "group": launch.group,
            "log": str(self.console_file),
            "signals": list(self.at_once if self.throw_away else self.orderly),
            "remove": [str(place) for place in self._places()] if self.throw_away else [],
            "remove_if_empty": str(self.home.parent) if self.throw_away else "",
        }
        assert self._lock_file is not None
        self._pid = 0
        # A session of its own: Ctrl-C in the terminal is for us, and we end the servers in order.
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_KEEPER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(self._lock_file,),
            cwd="/",
        )
        assert self._keeper.stdout is not None
        word, _, rest = self._keeper.stdout.readline().decode().strip().partition(" ")
        if word != "pid":
            self._close()
            raise DevStackError(
                f"{self.name} cannot be started: {rest or 'its keeper ended'}. Command: {launch.argv[0]}"
            )
        self._pid = int(rest)

    def _signal(self, number: int) -> None:
        if self._pid and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _signal_all(self, number: int) -> None:
        """To the server and the processes under it, the server first."""
        self._signal(number)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._pid).children(recursive=True) if self.running else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)

    def _wait_ended(self, seconds: float) -> bool:
        assert self._keeper is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(seconds)
        return not self.running

    def _close(self) -> None:
        """Let go of the keeper: at the end of its stdin it ends what still runs."""
        if self._keeper is not None:
            for pipe in (self._keeper.stdin, self._keeper.stdout):
                if pipe is not None:
                    pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(15.0)
            if self._keeper.poll() is not None:
                self._keeper = None

    def _lock(self, seconds: float = _LOCK_SECONDS) -> None:
        if self._lock_file is not None:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = monotonic() + seconds
        while True:
            try:
                # The keeper inherits it: the directory is free only when the server is gone as well.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if monotonic() < end:
                    sleep(0.05)
                    continue
                os.close(handle)
                raise DevStackError(
                    f"{self.home} is in use: another stack runs {self.name} on it. "
                    "Stop that one, or give another data directory."
                ) from None
            self._lock_file = handle
            return

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _remembered(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the server keeps between its runs (ports, password): made once, readable by us alone.

        Its ports (the numbers in it) are replaced when somebody else has taken one of them meanwhile.
        """
        path = self.home / "state.json"
        new = make()
        state: dict[str, Any] = new
        if path.exists():
            state = json.loads(path.read_text("utf-8"))
            if any(isinstance(value, int) and not is_free(value) for value in state.values()):
                state |= {key: value for key, value in new.items() if isinstance(value, int)}
        write_privately(path, json.dumps(state))
        return state


def write_privately(path: Path, text: str) -> None:
    """Write the file in one step, mode 600."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def tail(file: Path, lines: int) -> str:
    """The last lines of a file, at most some 400 bytes each; nothing when it is not there."""
    try:
        with file.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 400 * lines))
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _limit(log: Path, size: int = 16 << 20) -> None:
    """Keep one older log of at most some `size` bytes."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > size:
            log.replace(log.with_suffix(".old.log"))
