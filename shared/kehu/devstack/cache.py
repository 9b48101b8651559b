"""The cache outside the checkout: Apache Kafka's jars from a Maven repository, checked against a pinned list."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Event
from time import monotonic, sleep

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kehu.devstack.base import DevStackError

MAVEN_CENTRAL = "https://repo1.maven.org/maven2"
_PARALLEL = 6
_ATTEMPTS = 4
# Seconds: without a byte for one jar, and for another process that fills the same cache.
_READ_TIMEOUT = 30.0
_LOCK_TIMEOUT = 600.0


@dataclass(frozen=True)
class Jar:
    """One line of kafka_jars.txt."""

    sha256: str
    size: int
    path: str
    licence: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def kafka_jars() -> tuple[Jar, ...]:
    """The pinned list."""
    text = (resources.files("kehu.devstack") / "kafka_jars.txt").read_text("utf-8")
    rows = (line.split(maxsplit=3) for line in text.splitlines() if line and not line.startswith("#"))
    return tuple(Jar(sha256, int(size), path, licence) for sha256, size, path, licence in rows)


def kafka_version() -> str:
    """The version of Apache Kafka in the pinned list."""
    return next(jar.path.split("/")[-2] for jar in kafka_jars() if "/kafka-clients/" in jar.path)


def cache_directory() -> Path:
    """KEHU_CACHE, else $XDG_CACHE_HOME/kehu, else ~/.cache/kehu."""
    if given := os.environ.get("KEHU_CACHE"):
        return Path(given).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "kehu"
    return Path.home() / ".cache" / "kehu"


@contextlib.contextmanager
def locked(path: Path, timeout: float = _LOCK_TIMEOUT) -> Iterator[None]:
    """Hold an exclusive lock between processes on the file `path`; raises DevStackError after `timeout` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = monotonic() + timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() > end:
                    raise DevStackError(
                        f"Another process has held {path} for {timeout:g} s. End it, or set KEHU_CACHE."
                    ) from None
                sleep(0.1)
        yield
    finally:
        os.close(handle)


class KafkaCache:
    """The directory of one version of Kafka in the cache: jars/, format/ (see kafka.py), archives of loaded classes."""

    def __init__(self, root: Path | None = None, jars: tuple[Jar, ...] | None = None) -> None:
        self.jars = jars if jars is not None else kafka_jars()
        # Another list is another directory: an older checkout keeps its own.
        mark = hashlib.sha256("".join(jar.sha256 for jar in self.jars).encode()).hexdigest()[:12]
        self.directory = (root or cache_directory()) / f"kafka-{kafka_version()}-{mark}"

    @property
    def class_path(self) -> str:
        """The jars in the order of the list, so that an archive of loaded classes fits."""
        return ":".join(str(self._file(jar)) for jar in self.jars)

    def missing(self) -> list[Jar]:
        """Jars that are not there or are not what the list says (all bytes are read, some 0.1 s)."""
        with ThreadPoolExecutor(2) as threads:
            good = list(threads.map(lambda jar: self._is_good(self._file(jar), jar), self.jars))
        return [jar for jar, fine in zip(self.jars, good, strict=True) if not fine]

    def present(self) -> int:
        """How many jars are there, by name and size only."""
        return sum(1 for jar in self.jars if self._size(self._file(jar)) == jar.size)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Only one process changes the directory at a time."""
        return locked(self.directory / "lock")

    def fill(self, console: Console | None = None) -> bool:
        """Fetch what is missing; True when something was fetched.

        Each jar is written beside its place, checked and renamed, so a cut leaves whole jars and a rest that is
        continued the next time. Raises DevStackError with what to set.
        """
        if not self.missing():
            return False
        with self.lock():
            wanted = self.missing()
            if wanted:
                self._fetch(wanted, console or Console(stderr=True))
        return bool(wanted)

    def _fetch(self, wanted: list[Jar], console: Console) -> None:
        base = os.environ.get("KEHU_MAVEN_URL", MAVEN_CENTRAL).rstrip("/")
        (self.directory / "jars").mkdir(parents=True, exist_ok=True)
        total = sum(jar.size for jar in wanted)
        what = f"Apache Kafka {kafka_version()}, {len(wanted)} jars, {total / 1e6:.0f} MB"
        if not console.is_terminal:
            console.print(f"Fetching {what} from {base} into {self.directory}", highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        stop = Event()
        with (
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
            # trust_env: proxies and certificates of the machine (HTTPS_PROXY, SSL_CERT_FILE).
            httpx.Client(
                follow_redirects=True, timeout=httpx.Timeout(_READ_TIMEOUT, connect=10.0), trust_env=True
            ) as client,
            ThreadPoolExecutor(_PARALLEL) as threads,
        ):
            bar = progress.add_task(what, total=total)
            futures = [threads.submit(self._fetch_one, client, base, jar, progress, bar, stop) for jar in wanted]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                raise

    def _fetch_one(
        self, client: httpx.Client, base: str, jar: Jar, progress: Progress, bar: TaskID, stop: Event
    ) -> None:
        part = self.directory / "jars" / f"{jar.name}.part"
        reason = ""
        for attempt in range(_ATTEMPTS):
            if stop.wait(attempt and 2**attempt * (375 + secrets.randbelow(250)) / 1000):
                return
            try:
                self._download(client, f"{base}/{jar.path}", jar, part, stop)
            except (httpx.HTTPError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403, 404, 410):
                    break
                continue
            if stop.is_set():
                return
            if self._is_good(part, jar):
                part.replace(self._file(jar))
                progress.advance(bar, jar.size)
                return
            part.unlink(missing_ok=True)  # and once more from the first byte
            reason = "what came is not the pinned jar (size or SHA-256 differ)"
        raise DevStackError(
            f"Apache Kafka for the embedded broker cannot be fetched: {base}/{jar.path}: {reason}.\n"
            "Set KEHU_MAVEN_URL to a Maven repository that can be reached, or KEHU_KAFKA_BOOTSTRAP to a running broker, "
            "or start Docker with the image of Kafka; or bring a KEHU_CACHE that `kehu devstack fetch` filled elsewhere."
        )

    def _download(self, client: httpx.Client, url: str, jar: Jar, part: Path, stop: Event) -> None:
        have = self._size(part)
        if have >= jar.size:
            part.unlink(missing_ok=True)
            have = 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with client.stream("GET", url, headers=headers) as response:
            response.raise_for_status()
            with part.open("ab" if have and response.status_code == httpx.codes.PARTIAL_CONTENT else "wb") as file:
                for chunk in response.iter_raw(1 << 16):
                    if stop.is_set() or file.tell() + len(chunk) > jar.size:
                        return  # more than the list says: not our jar, the check will say so
                    file.write(chunk)

    def _file(self, jar: Jar) -> Path:
        return self.directory / "jars" / jar.name

    @staticmethod
    def _size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return 0

    @classmethod
    def _is_good(cls, path: Path, jar: Jar) -> bool:
        if cls._size(path) != jar.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == jar.sha256
