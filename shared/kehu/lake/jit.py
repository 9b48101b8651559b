"""Compiles the kernels with numba and keeps the machine code in a directory that can be written.

numba keeps it beside the module, or in the user's cache directory. In an image with a read-only root and no home neither
can be written and numba refuses; then a private directory under the system's temporary one is used, and when that fails
as well the kernel is compiled anew in each process. NUMBA_CACHE_DIR goes before all of it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numba
from numba.core import config

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function for the types of its first call, without the interpreter lock."""
    try:
        return _njit(function, cache=True)
    except RuntimeError:  # numba: "cannot cache function …: no locator available"
        pass
    directory = _private_directory()
    if directory is None:
        return _njit(function, cache=False)
    before = config.CACHE_DIR  # type: ignore[attr-defined]  # numba sets its settings from the environment
    config.CACHE_DIR = str(directory)  # type: ignore[attr-defined]
    try:
        return _njit(function, cache=True)
    except RuntimeError:
        return _njit(function, cache=False)
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]


def _njit(function: F, *, cache: bool) -> F:
    return cast(F, numba.njit(cache=cache, nogil=True)(function))


def _private_directory() -> Path | None:
    """A directory of this user alone: what is in it gets executed. None when there is none to be had."""
    directory = Path(tempfile.gettempdir()) / f"kehu-numba-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return directory if ours else None
