"""The database of the store: tables, rows, and the differences of SQLite and PostgreSQL. No torch here."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tinydiff.records import UserError
from tinydiff.serve.jobs import Failure, Job, Output

COLUMNS = (
    "id", "kind", "owner", "status", "priority", "progress",
    "created_at", "started_at", "completed_at", "expires_at", "pinned", "server",
    "lease", "attempts", "idempotency", "model", "error", "outputs", "result", "rest",
)  # fmt: skip
"""Columns of a job. `error`, `outputs`, `result` and `rest`, its other fields, are JSON."""

STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE tinydiff_jobs (
            id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
            priority INTEGER NOT NULL, progress INTEGER NOT NULL, created_at DOUBLE PRECISION NOT NULL,
            started_at DOUBLE PRECISION, completed_at DOUBLE PRECISION, expires_at DOUBLE PRECISION,
            pinned INTEGER NOT NULL, server TEXT NOT NULL, lease DOUBLE PRECISION NOT NULL,
            attempts INTEGER NOT NULL, idempotency TEXT NOT NULL,
            error TEXT NOT NULL, outputs TEXT NOT NULL, result TEXT NOT NULL, rest TEXT NOT NULL,
            bytes BIGINT NOT NULL, cancel_asked INTEGER DEFAULT 0 NOT NULL,
            ticket TEXT DEFAULT '' NOT NULL)""",
        "CREATE INDEX tinydiff_by_status ON tinydiff_jobs (status, owner)",
        "CREATE INDEX tinydiff_by_page ON tinydiff_jobs (owner, kind, created_at, id)",
        "CREATE INDEX tinydiff_by_expiry ON tinydiff_jobs (expires_at)",
        "CREATE INDEX tinydiff_by_bytes ON tinydiff_jobs (completed_at, bytes) WHERE bytes > 0",
        """CREATE INDEX tinydiff_by_server ON tinydiff_jobs (server)
            WHERE status IN ('queued', 'in_progress') AND server <> ''""",
        """CREATE UNIQUE INDEX tinydiff_once ON tinydiff_jobs (owner, idempotency)
            WHERE idempotency <> '' AND status IN ('queued', 'in_progress')""",
        "CREATE TABLE tinydiff_turns (owner TEXT PRIMARY KEY, last_start DOUBLE PRECISION NOT NULL)",
    ),
    ("ALTER TABLE tinydiff_jobs ADD COLUMN model TEXT DEFAULT '' NOT NULL",),
)
"""Migrations: the statements that lead from version n to n + 1. A released one never changes."""

BUSY = 5.0
"""Seconds that SQLite waits for a transaction of another process."""

PATIENCE = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""Defaults of a connection: seconds after which an unresponsive database counts as lost."""

LINE = """FROM tinydiff_jobs AS queued
    LEFT JOIN tinydiff_turns AS turns ON turns.owner = queued.owner
    LEFT JOIN (SELECT owner, count(*) AS jobs FROM tinydiff_jobs WHERE status = 'in_progress' GROUP BY owner)
        AS running ON running.owner = queued.owner
    WHERE queued.status = 'queued'"""
"""Queued jobs, with the number of running jobs of their owner and the start of the last one."""

OPEN = "status IN ('queued', 'in_progress')"
HELD = f"{OPEN} AND server <> ''"
"""Jobs that belong to a server: in progress there, or pinned to it and waiting."""


@dataclass(frozen=True, eq=False)
class Dialect:
    """A database and its dialect. Statements have `:name` for values and `{word}` for members of this."""

    connect: Callable[[], Any]
    """Opens a connection with `execute(statement, values)` and `close()`, in autocommit mode."""
    option: str
    """The option that chose the database."""
    shown: str
    value: str
    """The replacement of `:name` in a statement."""
    begin: str
    durable: str
    """Runs before a transaction that must survive a loss of power; `quick` runs before others."""
    quick: str
    alone: str
    """Runs in a transaction: waits until no other transaction that ran it is open."""
    lock: str
    """Ends a SELECT: locks its rows until the end of the transaction."""
    skip: str
    """Ends a SELECT: locks its rows, and skips rows that are locked."""
    skew: str
    """Seconds to add to a time of this machine to get the database's time."""
    errors: tuple[type[Exception], ...]
    """Exceptions of the database. `lost` are those after which a transaction should be repeated."""
    lost: tuple[type[Exception], ...]
    one_writer: bool
    """Whether only one transaction can write at a time."""

    @cache  # noqa: B019  each store has one dialect
    def spelled(self, statement: str) -> str:
        words = {"columns": ", ".join(COLUMNS), "line": LINE, "open": OPEN, "held": HELD}
        words |= {"alone": self.alone, "lock": self.lock, "skip": self.skip, "skew": self.skew}
        return re.sub(r":(\w+)", self.value, statement.format(**words))


def sqlite(path: Path) -> Dialect:
    """The database in the file `path`, created if missing. Raises UserError."""

    def connect() -> sqlite3.Connection:
        # The pool gives a connection to one thread at a time, but not always to the same one.
        return sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with closing(connect()) as connection:
            mode = _journal(connection)
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            "state_dir", f"state_dir: cannot store jobs in {str(path)!r}: {_plain(error)}"
        ) from error
    if mode != "wal":
        message = f"state_dir: {str(path.parent)!r} is on a file system without shared memory"
        raise UserError("state_dir", f"{message}; use a local directory")
    return Dialect(
        connect=connect,
        option="state_dir",
        shown=str(path),
        value=r":\1",
        begin="BEGIN IMMEDIATE",
        # Data of a killed process is safe in the page cache; only a loss of power can lose it. Waiting for
        # the disk takes milliseconds: worth it before a job is confirmed to a client, too slow for each
        # progress.
        durable="PRAGMA synchronous=FULL",
        quick="PRAGMA synchronous=NORMAL",
        alone="SELECT 1",  # every transaction is
        lock="",
        skip="",
        skew="0",
        errors=(sqlite3.Error,),
        lost=(),
        one_writer=True,
    )


def _journal(connection: sqlite3.Connection) -> str:
    """Switch to a write-ahead log, which the file remembers; returns the mode that it got."""
    until = time.monotonic() + BUSY
    while True:
        try:
            return connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        except sqlite3.OperationalError as error:  # this statement does not wait for other processes
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def postgres(url: str) -> Dialect:
    """The database at `postgresql://...`. Raises UserError for another URL, or without psycopg."""
    shown = re.sub(r"//.*@", "//", url).partition("?")[0]  # messages must not show the password
    if not url.startswith(("postgresql://", "postgres://")):
        message = f"state_url: {shown!r} must have the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        raise UserError("state_url", message)
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as error:
        message = (
            f"state_url: {shown!r} needs psycopg, which cannot be loaded ({_plain(error)}); "
            "run pip install 'psycopg[binary]'"
        )
        raise UserError("state_url", message) from error

    def connect() -> Any:
        # Connection poolers do not support prepared statements.
        connection = psycopg.connect(
            **{**PATIENCE, **conninfo_to_dict(url)}, autocommit=True, prepare_threshold=None
        )
        # The database releases the row locks of a server that disappeared.
        connection.execute("SET idle_in_transaction_session_timeout = '30s'")
        return connection

    return Dialect(
        connect=connect,
        option="state_url",
        shown=shown,
        value=r"%(\1)s",
        # each statement sees what others have committed by then
        begin="BEGIN ISOLATION LEVEL READ COMMITTED",
        durable="",
        quick="",
        alone="SELECT pg_advisory_xact_lock(7810041)",
        lock="FOR UPDATE",
        skip="FOR UPDATE OF queued SKIP LOCKED",
        skew="(CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION) - :clock)",
        errors=(psycopg.Error,),
        lost=(psycopg.OperationalError, psycopg.InterfaceError),
        one_writer=False,
    )


def prepare(dialect: Dialect) -> None:
    """Migrate the tables to this version. Raises UserError for newer tables or an unusable database."""
    option, shown = dialect.option, dialect.shown
    try:
        with closing(dialect.connect()) as connection:
            connection.execute(dialect.begin)
            connection.execute(dialect.alone)
            connection.execute("CREATE TABLE IF NOT EXISTS tinydiff_schema (version INTEGER NOT NULL)")
            version = connection.execute("SELECT max(version) FROM tinydiff_schema").fetchone()[0] or 0
            for statement in (statement for step in STEPS[version:] for statement in step):
                connection.execute(statement)
            if version < len(STEPS):
                connection.execute(f"INSERT INTO tinydiff_schema (version) VALUES ({len(STEPS)})")
            connection.execute("COMMIT")
    except dialect.errors as error:
        raise UserError(option, f"{option}: cannot use the database {shown!r}: {_plain(error)}") from error
    if version > len(STEPS):
        message = f"{option}: {shown!r} was written by a newer tinydiff (version {version}, not {len(STEPS)})"
        raise UserError(option, f"{message}; upgrade tinydiff or use another {option}")


def to_json(value: Any) -> str:
    """A value as JSON text for a column."""
    return json.dumps(value, default=lambda other: asdict(other) if is_dataclass(other) else dict(other))  # type: ignore[arg-type]


def to_row(job: Job) -> dict[str, object]:
    """Column -> value."""
    values = {entry.name: getattr(job, entry.name) for entry in fields(job)}
    rest = {name: value for name, value in values.items() if name not in COLUMNS}
    row = {name: values[name] for name in COLUMNS if name in values}
    texts = {name: to_json(row[name]) for name in ("error", "outputs", "result")}
    return row | texts | {"rest": to_json(rest), "pinned": int(job.pinned), "bytes": bytes_here(job.outputs)}


def to_job(row: Iterable[Any]) -> Job:
    """The job of a row with COLUMNS."""
    values = dict(zip(COLUMNS, row, strict=True))
    error, outputs, result, rest = (
        json.loads(values.pop(name)) for name in ("error", "outputs", "result", "rest")
    )
    rest["inputs"] = {name: tuple(files) for name, files in rest["inputs"].items()}
    made = {
        "error": error and Failure(**error),
        "outputs": tuple(Output(**output) for output in outputs),
        "result": result,
    }
    return Job(**values | rest | made | {"pinned": bool(values["pinned"])})


def bytes_here(outputs: Iterable[Output]) -> int:
    """Bytes of the outputs that are not in object storage."""
    return sum(output.size for output in outputs if output.url is None)


def _plain(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())
