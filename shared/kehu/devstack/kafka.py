"""The embedded Apache Kafka: one process, broker and KRaft controller, on loopback."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from pathlib import Path

from rich.console import Console

from kehu.devstack.base import DevStackError, broker_settings, free_port, kafka_answers
from kehu.devstack.cache import KafkaCache, kafka_version
from kehu.devstack.java import Java, find_java
from kehu.devstack.process import EmbeddedServer, Launch, tail

# C1 only and the serial collector: a quicker start and less memory than the defaults, for a broker of one laptop.
_JVM = (
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Xms64m",
    "-Xmx512m",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)
# Java 25 would also keep compiled adapters in its archive, and complains when it links them; the classes are what counts.
_AOT = (
    "-XX:+IgnoreUnrecognizedVMOptions",
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:-AOTAdapterCaching",
    "-XX:-AOTStubCaching",
)

# Warnings, and the few lines that tell of a start; the file is bounded.
_LOGGING = """\
appender.file.type=RollingFile
appender.file.name=File
appender.file.fileName=kafka.log
appender.file.filePattern=kafka.log.%i
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d{yyyy-MM-dd HH:mm:ss,SSS} %p %m (%c)%n
appender.file.policy.type=SizeBasedTriggeringPolicy
appender.file.policy.size=8MB
appender.file.strategy.type=DefaultRolloverStrategy
appender.file.strategy.max=1
rootLogger.level=WARN
rootLogger.appenderRef.file.ref=File
logger.server.name=kafka.server.KafkaRaftServer
logger.server.level=INFO
logger.version.name=org.apache.kafka.common.utils.AppInfoParser
logger.version.level=INFO
logger.log.name=kafka.log.LogManager
logger.log.level=INFO
"""


class EmbeddedKafka(EmbeddedServer):
    """Apache Kafka from the cache; fetches it, finds Java, formats its storage and starts it.

    Args:
        archive: use the archive of loaded classes when `fetch()` has made one (a start takes half the time).
    """

    name = "Embedded Kafka"
    orderly = ((signal.SIGTERM, 20.0),)
    at_once = ()

    def __init__(self, home: Path, *, throw_away: bool, archive: bool = True) -> None:
        super().__init__(home, throw_away=throw_away)
        self._port = 0
        self._controller_port = 0
        self._archive = archive
        # What a training run adds to the command line.
        self._options: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def log_file(self) -> Path:
        return self.home / "kafka.log"

    def _answers(self) -> str | None:
        return kafka_answers(self.url, 2.0)

    def log_tail(self, lines: int = 50) -> str:
        # The console holds what the JVM itself says, when it cannot start at all.
        return "\n".join(filter(None, (tail(self.console_file, 10), tail(self.log_file, lines))))

    def _prepare(self) -> Launch:
        java = find_java()
        cache = KafkaCache()
        cache.fill()
        if not self._port:
            ports = self._remembered(lambda: {"port": free_port(), "controller_port": free_port()})
            self._port, self._controller_port = ports["port"], ports["controller_port"]
        self._format(java, cache)
        (self.home / "tmp").mkdir(exist_ok=True)
        (self.home / "log4j2.properties").write_text(_LOGGING, "utf-8")
        controller = f"127.0.0.1:{self._controller_port}"
        settings = broker_settings({"PLAINTEXT": self.url, "CONTROLLER": controller}, self.url, f"1@{controller}")
        write_properties(self.home / "server.properties", {**settings, "log.dirs": "data"})
        archive = archive_options(java, cache) if self._archive else ()
        # Paths below `home` are relative to it, so that its name may hold anything.
        argv = [
            *(str(java.binary), *_JVM, *archive, *self._options, "-Djava.io.tmpdir=tmp"),
            *("-Dlog4j2.configurationFile=log4j2.properties", "-cp", cache.class_path),
            *("kafka.Kafka", "server.properties"),
        ]
        return Launch(argv, java_environment(), self.home)

    def _format(self, java: Java, cache: KafkaCache) -> None:
        data = self.home / "data"
        if (data / "meta.properties").exists():
            return
        template = formatted(java, cache)
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(template, new)
        write_properties(
            new / "meta.properties",
            {"version": "1", "node.id": "1", "cluster.id": _random_id(), "directory.id": _random_id()},
        )
        shutil.rmtree(data, ignore_errors=True)
        new.replace(data)


def fetch(console: Console | None = None) -> str:
    """Fill the cache: jars, formatted storage, archive of loaded classes. Returns what was done, for a person."""
    java, cache = find_java(), KafkaCache()
    done = ["jars fetched"] if cache.fill(console) else []
    formatted(java, cache)
    if make_archive(java, cache):
        done.append("archive of loaded classes made")
    return f"Apache Kafka {kafka_version()} in {cache.directory}: {', '.join(done) or 'all there'}"


def formatted(java: Java, cache: KafkaCache) -> Path:
    """A storage directory made once by Kafka's own StorageTool and copied for every new broker.

    It holds the feature levels of a new cluster; the ids in meta.properties are new in each copy. This saves a second
    JVM (0.7 s) at each first start.
    """
    template = cache.directory / "format"
    if template.is_dir():
        return template
    with cache.lock():
        if template.is_dir():
            return template
        with tempfile.TemporaryDirectory(dir=cache.directory, prefix="format-") as work:
            settings = broker_settings(
                {"PLAINTEXT": "127.0.0.1:9092", "CONTROLLER": "127.0.0.1:9093"}, "127.0.0.1:9092", "1@127.0.0.1:9093"
            )
            write_properties(Path(work) / "server.properties", {**settings, "log.dirs": "data"})
            argv = [
                *(str(java.binary), *_JVM, "-Dlog4j2.level=OFF", "-cp", cache.class_path),
                *("kafka.tools.StorageTool", "format", "--cluster-id", _random_id(), "--config", "server.properties"),
            ]
            try:
                subprocess.run(
                    argv,
                    cwd=work,
                    env=java_environment(),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=120,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                said = getattr(error, "stderr", None) or getattr(error, "stdout", None) or b""
                text = said.decode("utf-8", "replace")[-2000:]
                raise DevStackError(
                    f"Kafka's storage cannot be formatted with {java.binary}: {error}\n{text}"
                ) from error
            (Path(work) / "data").rename(template)
    return template


def archive_file(java: Java, cache: KafkaCache) -> Path:
    """Where the archive of loaded classes for this runtime is kept."""
    return cache.directory / f"classes-{java.mark}.{'aot' if java.version >= 25 else 'jsa'}"


def archive_options(java: Java, cache: KafkaCache) -> tuple[str, ...]:
    """The options that use the archive when it is there: an AOT cache (JEP 514) or application class data (JEP 350)."""
    file = archive_file(java, cache)
    if not file.exists():
        return ()
    # A runtime that cannot use the file starts without it.
    return (*_AOT, f"-XX:AOTCache={file}") if java.version >= 25 else (f"-XX:SharedArchiveFile={file}", "-Xshare:auto")


def make_archive(java: Java, cache: KafkaCache) -> bool:
    """Start a broker once and have the JVM write what it loaded; True when there is a new archive.

    Some 5 to 10 s, so only `kehu devstack fetch` does it. A runtime without a base archive of its own makes none.
    """
    file = archive_file(java, cache)
    if file.exists():
        return False
    with cache.lock():
        if file.exists():
            return False
        with tempfile.TemporaryDirectory(dir=cache.directory, prefix="train-") as work:
            new = Path(work) / file.name
            broker = EmbeddedKafka(Path(work) / "kafka", throw_away=True, archive=False)
            at_exit = (
                (*_AOT, f"-XX:AOTCacheOutput={new}") if java.version >= 25 else (f"-XX:ArchiveClassesAtExit={new}",)
            )
            broker._options = at_exit
            broker.orderly = ((signal.SIGTERM, 60.0),)  # the archive is written at the end
            broker.start()
            broker.stop()
            with contextlib.suppress(FileNotFoundError):
                new.replace(file)
    return file.exists()


def java_environment() -> dict[str, str]:
    """The environment of the JVM: file names in UTF-8, nothing of ours (JAVA_TOOL_OPTIONS, KAFKA_OPTS)."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def write_properties(path: Path, values: dict[str, str]) -> None:
    """Write a Java properties file (ISO 8859-1: our values are ASCII)."""
    path.write_text("".join(f"{key}={value}\n" for key, value in values.items()), "ascii")


def _random_id() -> str:
    """A Kafka Uuid: 16 random bytes in URL-safe base64; not one that starts with a dash, which would be an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text
