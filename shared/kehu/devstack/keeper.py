"""The keeper: a small process between the stack and one server, so that nothing outlives the stack.

Run as `python -I -S keeper.py SPEC` with SPEC in JSON, standard library only (it starts in some 20 ms). It starts the
server, writes its pid on stdout, and ends when the server and every process under it is gone. When the process that
asked for the server is gone (kill -9 too), the keeper ends the server and removes the directories of a throw-away
stack. When the keeper itself is killed, the kernel kills the server (PR_SET_PDEATHSIG: reliable here because the
keeper has one thread; set from a program with threads it would fire when the thread ends).

SPEC: parent (pid), argv, env, cwd, user, group (ids or null), log (path, appended to), signals (list of
[signal, seconds]: how to end the server when the parent is gone), remove (directories), remove_if_empty (directory).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 0.5


def main() -> int:
    """Start the server, watch it and the parent, end everything. The exit code is the server's (128 + signal)."""
    spec = json.loads(sys.argv[1])
    linux = sys.platform == "linux"
    prctl = ctypes.CDLL(None, use_errno=True).prctl if linux else None
    if prctl is not None:
        # Processes whose parent (the postmaster) was killed become ours and are found by _children().
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake, poke = os.pipe()
    os.set_blocking(poke, False)
    signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)

    def die_with_keeper() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    with Path(spec["log"]).open("ab") as log:
        try:
            server = subprocess.Popen(
                spec["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=spec["cwd"],
                env=spec["env"],
                user=spec["user"],
                group=spec["group"],
                extra_groups=[] if spec["user"] is not None else None,
                preexec_fn=die_with_keeper,  # one thread: safe
            )
        except (OSError, subprocess.SubprocessError) as error:
            _tell(f"error {error}")
            return 1
    _tell(f"pid {server.pid}")

    code: int | None = None
    while code is None:
        ready, _, _ = select.select([0, wake], [], [], LOOK_SECONDS)
        if wake in ready:
            os.read(wake, 4096)
        code = _reap(server.pid)
        # End of file on stdin: the parent is gone, or has let go. The second test also holds when somebody forked
        # the parent and so keeps the pipe open.
        if code is None and (0 in ready or os.getppid() != spec["parent"]):
            code = _end(server.pid, spec["signals"])
            break
    _end_children()
    if os.getppid() != spec["parent"]:
        for directory in spec["remove"]:
            shutil.rmtree(directory, ignore_errors=True)
        if spec["remove_if_empty"]:
            with contextlib.suppress(OSError):  # the keeper of the other server may not be done yet: it does it
                Path(spec["remove_if_empty"]).rmdir()
    return code if code >= 0 else 128 - code


def _tell(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone already: main() sees it
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _reap(server: int) -> int | None:
    """Collect ended children; the server's exit code (negative: signal) once it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == server:
            code = os.waitstatus_to_exitcode(status)


def _end(server: int, signals: list[Any]) -> int:
    """Send one signal after the other, with its seconds to act on it, and SIGKILL at last."""
    for number, seconds in [*signals, (signal.SIGKILL, 10.0)]:
        os.kill(server, number)
        for paused in (server, *_children(server)):
            _signal(paused, signal.SIGCONT)  # a paused process would not act
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = _reap(server)
            if code is not None:
                return code
            time.sleep(0.01)
    return 1


def _end_children() -> None:
    """Kill what the server left behind (its orphans are our children now), at most for ten seconds."""
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        for pid in _children(os.getpid()):
            _signal(pid, signal.SIGKILL)
        time.sleep(0.005)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(parent: int) -> list[int]:
    """Direct children, from /proc/PID/stat: `pid (name) state ppid ...`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
