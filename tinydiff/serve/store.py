"""Every job of the server, in a database: SQLite in a directory, or PostgreSQL, where several servers share
one queue.

What a method changed is changed for good when it returns, and each is one transaction, so a server that is
killed leaves every job queued, with a server until its lease runs out, or done. No torch here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, LifoQueue
from threading import Lock, Semaphore
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from tinydiff.serve import sql
from tinydiff.serve.jobs import DONE, Busy, Failure, Job, Kind, Output, Status, Unreachable

CONNECTIONS = 8
"""Connections at most; who finds none free waits for one. A statement takes less than a millisecond, so more
would not be faster.
"""

PATIENCE = 10.0
"""Seconds that a call waits for a database that went away; PAUSE between its attempts."""
PAUSE = 0.1

MOST_ATTEMPTS = 3
"""How often a job begins at most: one that brings its server down would go on to do so."""

CANCELLED = Failure("cancelled", "the job was cancelled")
RESTARTED = Failure("server_restarted", "the server stopped before the job was done; ask for it again")
GIVEN_UP = Failure(
    "server_restarted",
    f"the server stopped {MOST_ATTEMPTS} times before the job was done; it is not tried again",
)

Policy = Literal["rerun", "fail"]
Execute = Callable[..., Any]
"""(statement, **values) -> cursor."""
Made = TypeVar("Made")


def open_store(
    state_dir: Path, state_url: str | None, most_queued: int, lifetime: float = 86400.0, shared: bool = False
) -> Store:
    """The store at `state_url`, postgresql://..., or where that is None in `state_dir`.

    most_queued: jobs that wait at most. lifetime: seconds that a done job is kept where `finish` does not
    say. shared: whether owners share the queue, see `add`. Raises UserError naming the option where the
    database cannot be used, or a newer version wrote it.
    """
    dialect = sql.sqlite(Path(state_dir) / "jobs.sqlite3") if state_url is None else sql.postgres(state_url)
    sql.prepare(dialect)
    return Store(dialect, most_queued, lifetime, shared)


class Store:
    """Jobs by id. Every method may be called from any thread; with PostgreSQL it raises Unreachable where the
    database stays away.

    Times are seconds since 1970 of the calling machine. Leases lie in the database's own clock: each machine
    adds how far it is from that, so that servers whose clocks differ do not take each other's jobs.
    """

    def __init__(self, dialect: sql.Dialect, most_queued: int, lifetime: float, shared: bool = False) -> None:
        self._dialect, self._most_queued, self._lifetime, self._shared = (
            dialect,
            most_queued,
            lifetime,
            shared,
        )
        self._idle: LifoQueue[Any] = (
            LifoQueue()
        )  # connections that nobody uses; None stands for one that is not open
        for _ in range(CONNECTIONS):
            self._idle.put(None)
        # SQLite lets waiting writers sleep and try again, threads of one process can do better.
        self._writing = Lock() if dialect.one_writer else Semaphore(2**20)
        self._unsure: list[str] = []  # tickets of calls of `take` that may have succeeded unheard

    # --- the way of a job
    # -------------------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> Job:
        """Queue a job. Returns it, or the one of the same owner and `idempotency` that is not done, even
        where the queue is full.

        Raises Busy(0) where it is full, or where owners share it and this one has as many jobs waiting as
        places are left: so nobody fills it, and whoever comes finds room.
        """
        row = sql.to_row(job)
        waiting = """SELECT count(*), COALESCE(sum(CASE WHEN owner = :owner THEN 1 ELSE 0 END), 0)
            FROM tinydiff_jobs WHERE status = 'queued'"""
        same = "id = :id OR (owner = :owner AND idempotency = :idempotency AND idempotency <> '' AND {open})"

        def work(execute: Execute) -> Job | Busy:
            execute("{alone}")
            if found := _jobs(execute("SELECT {columns} FROM tinydiff_jobs WHERE " + same, **row)):
                return found[0]
            queued, own = execute(waiting, owner=job.owner).fetchone()
            if queued >= self._most_queued:
                return Busy(0)
            if self._shared and own >= self._most_queued - queued:
                return Busy(0, "this key has as many jobs waiting as the queue has places left")
            execute(
                f"INSERT INTO tinydiff_jobs ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})",
                **row,
            )
            return job

        # A pinned job ends with its client's connection, which no loss of power spares.
        if isinstance(queued := self._write(work, durable=not job.pinned), Busy):
            raise queued
        return queued

    def take(self, server: str, lease_until: float) -> Job | None:
        """The next queued job that `server` may run, now in progress there until `lease_until`; None if there
        is none.

        The highest priority comes first; then the owner of whom the fewest run, and of those the one whose
        turn is longest ago; then the oldest job.
        """
        if not self._unsure and not self._rows("SELECT 1 FROM tinydiff_jobs WHERE status = 'queued' LIMIT 1"):
            return None  # to look takes no turn of writing
        ticket = self._unsure.pop() if self._unsure else secrets.token_hex(8)
        mine = "SELECT {columns} FROM tinydiff_jobs WHERE {held} AND server = :server AND ticket = :ticket"
        next_in_line = """SELECT queued.id, queued.owner {line} AND (queued.pinned = 0 OR queued.server = :server)
            ORDER BY queued.priority DESC, COALESCE(running.jobs, 0), COALESCE(turns.last_start, 0), queued.created_at, queued.id
            LIMIT 1 {skip}"""
        take = """UPDATE tinydiff_jobs SET status = 'in_progress', server = :server, lease = :until + {skew}, started_at = :now,
            progress = 0, attempts = attempts + 1, ticket = :ticket WHERE id = :id"""
        turn = """INSERT INTO tinydiff_turns (owner, last_start) VALUES (:owner, :now)
            ON CONFLICT (owner) DO UPDATE SET last_start = excluded.last_start"""

        def work(execute: Execute) -> Job | None:
            if taken := _jobs(execute(mine, server=server, ticket=ticket)):
                return taken[0]
            found = execute(next_in_line, server=server).fetchone()
            if found is None:
                return None
            id, owner = found
            execute(take, id=id, server=server, until=lease_until, now=time.time(), ticket=ticket)
            execute(turn, owner=owner, now=time.time())
            return _jobs(execute(mine, server=server, ticket=ticket))[0]

        try:
            return self._write(work)
        except Unreachable:
            self._unsure.append(ticket)
            raise

    def renew(self, server: str, until: float) -> None:
        """The server lives: its jobs, in progress or pinned and waiting, are its own until then."""
        statement = "UPDATE tinydiff_jobs SET lease = :until + {skew} WHERE {held} AND server = :server"
        self._write(lambda execute: execute(statement, server=server, until=until))

    def progress(self, id: str, server: str, percent: int) -> bool:
        """Note how far a job is. False where it is no longer this server's."""
        statement = "UPDATE tinydiff_jobs SET progress = :percent WHERE id = :id AND server = :server AND status = 'in_progress'"
        return self._write(
            lambda execute: execute(statement, id=id, server=server, percent=percent).rowcount == 1
        )

    def finish(
        self,
        id: str,
        server: str,
        status: Status,
        *,
        error: Failure | None = None,
        outputs: Iterable[Output] = (),
        result: Mapping[str, Any] | None = None,
        expires_at: float | None = None,
    ) -> bool:
        """End a job that is in progress at `server`, or queued where that is "". False where it is not:
        somebody else has it, or it is done, so what was made of it counts for nothing."""
        assert status in DONE
        outputs, ticket = tuple(outputs), secrets.token_hex(8)
        where = (
            "id = :id AND (status = 'in_progress' AND server = :server OR status = 'queued' AND :server = '')"
        )

        def work(execute: Execute) -> bool:
            if execute(
                "SELECT 1 FROM tinydiff_jobs WHERE id = :id AND ticket = :ticket", id=id, ticket=ticket
            ).fetchone():
                return True
            made = status, error, outputs, result or {}, expires_at
            return self._end(execute, where, *made, id=id, server=server, ticket=ticket)

        return self._write(work)

    def cancel(self, id: str) -> Job | None:
        """A queued job fails at once, one in progress as soon as its server sees it in `cancelled`; a done
        one stays as it is. Returns the job as it is then, None if there is none."""

        def work(execute: Execute) -> Job | None:
            job = self._one(execute, id, "{lock}")
            if job is None or job.status in DONE:
                return job
            if job.status == "queued":
                self._end(execute, "id = :id", "failed", CANCELLED, id=id)
            else:
                execute("UPDATE tinydiff_jobs SET cancel_asked = 1 WHERE id = :id", id=id)
            return self._one(execute, id)

        return self._write(work) if _possible(id) else None

    def cancelled(self, server: str) -> list[str]:
        """Ids of the jobs in progress at `server` that shall end."""
        statement = "SELECT id FROM tinydiff_jobs WHERE {held} AND server = :server AND cancel_asked = 1"
        return [id for (id,) in self._rows(statement, server=server)]

    def requeue(self, server: str, policy: Policy) -> int:
        """Let go of what `server` left: queue it again or fail it, by `policy`; pinned jobs, whose clients
        are gone, always fail, and cancelled ones too. For the server itself, when it starts or stops. Returns
        how many."""
        return self._release("server = :server", policy, server=server)

    def reclaim(self, now: float, policy: Policy) -> int:
        """The same for jobs whose lease ran out before `now`, those of servers that are gone. A server renews
        its own before.
        """
        return self._release("lease > 0 AND lease < :now + {skew}", policy, now=now)

    # --- reading
    # ----------------------------------------------------------------------------------------------------------------------

    def get(self, id: str) -> Job | None:
        return self._attempt(lambda execute: self._one(execute, id)) if _possible(id) else None

    def page(
        self, kind: Kind, owner: str, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs in the order they came, or the latest first, from behind the job `after`; and
        whether there are more.
        Raises KeyError where the owner has no such job `after`."""
        start, than, order = "", *((">", "ASC") if ascending else ("<", "DESC"))
        values = {"kind": kind, "owner": owner}
        if after is not None:
            job = self.get(after)
            if job is None or (job.kind, job.owner) != (kind, owner):
                raise KeyError(after)
            start = f"AND (created_at, id) {than} (:created_at, :after)"
            values |= {"created_at": job.created_at, "after": after}
        statement = f"""SELECT {{columns}} FROM tinydiff_jobs WHERE kind = :kind AND owner = :owner {start}
            ORDER BY created_at {order}, id {order} LIMIT :limit"""
        jobs = [sql.to_job(row) for row in self._rows(statement, **values, limit=limit + 1)]
        return jobs[:limit], len(jobs) > limit

    def position(self, job: Job) -> int:
        """How many queued jobs `take` would give out before this one, were none added or finished; 0 for one
        that is not queued.
        """
        # Who has the fewest running goes first, so an owner's jobs come in rounds, the next one when as many
        # run of all; whoever had more running at the start joins a round later, and is first in it.
        statement = """WITH line AS (
                SELECT queued.id, -queued.priority AS rank, COALESCE(running.jobs, 0) + row_number() OVER (
                    PARTITION BY queued.owner ORDER BY queued.priority DESC, queued.created_at, queued.id) AS round,
                    -COALESCE(running.jobs, 0) AS joined, COALESCE(turns.last_start, 0) AS last_start,
                    min(queued.created_at) OVER (PARTITION BY queued.owner) AS since {line})
            SELECT count(*) FROM line WHERE (rank, round, joined, last_start, since, id)
                < (SELECT rank, round, joined, last_start, since, id FROM line WHERE id = :id)"""
        return self._rows(statement, id=job.id)[0][0]

    def check(self) -> None:
        """Raise what a job would meet that is queued now: the database's own error, or Unreachable."""
        self._write(lambda execute: None)

    def counts(self) -> dict[Status, int]:
        """How many jobs there are of each status."""
        found = self._rows("SELECT status, count(*) FROM tinydiff_jobs GROUP BY status")
        return dict.fromkeys(get_args(Status), 0) | dict(found)

    # --- done jobs and their files
    # ----------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> list[Job]:
        """Done jobs whose time is over, the first first: every done job has one, failed ones too."""
        statement = "SELECT {columns} FROM tinydiff_jobs WHERE expires_at <= :now AND completed_at > 0 ORDER BY expires_at, id"
        return [sql.to_job(row) for row in self._rows(statement, now=now)]

    def oldest(self) -> Job | None:
        """Of the done jobs with files here the one that was done first."""
        statement = "SELECT {columns} FROM tinydiff_jobs WHERE bytes > 0 AND completed_at > 0 ORDER BY completed_at LIMIT 1"
        found = self._rows(statement)
        return sql.to_job(found[0]) if found else None

    def total_bytes(self) -> int:
        """Bytes of all outputs that lie here, not in object storage."""
        return int(self._rows("SELECT COALESCE(sum(bytes), 0) FROM tinydiff_jobs WHERE bytes > 0")[0][0])

    def update_outputs(self, id: str, outputs: Iterable[Output]) -> bool:
        """Replace what is noted of a done job's files. False where there is none of that id."""
        outputs = tuple(outputs)
        statement = "UPDATE tinydiff_jobs SET outputs = :outputs, bytes = :bytes WHERE id = :id AND status IN ('completed', 'failed')"
        values = {"id": id, "outputs": sql.to_json(outputs), "bytes": sql.bytes_here(outputs)}
        return self._write(lambda execute: execute(statement, **values).rowcount == 1)

    def every(self) -> list[Job]:
        """All jobs there are, for what seldom has to look through them."""
        return [sql.to_job(row) for row in self._rows("SELECT {columns} FROM tinydiff_jobs")]

    def delete(self, id: str) -> bool:
        """Forget a job. Whoever runs it learns so from `progress` and `finish`; cancel it before. False if
        there was none.
        """
        statement = "DELETE FROM tinydiff_jobs WHERE id = :id"
        return _possible(id) and self._write(lambda execute: execute(statement, id=id).rowcount == 1)

    def close(self) -> None:
        """Let go of the connections; a later call opens its own."""
        held = []
        try:
            while True:
                held.append(self._idle.get_nowait())
        except Empty:
            for connection in held:
                self._let_go(connection)

    # --- inside a transaction
    # ---------------------------------------------------------------------------------------------------------

    def _one(self, execute: Execute, id: str, lock: str = "") -> Job | None:
        found = _jobs(execute(f"SELECT {{columns}} FROM tinydiff_jobs WHERE id = :id {lock}", id=id))
        return found[0] if found else None

    def _end(
        self,
        execute: Execute,
        where: str,
        status: Status,
        error: Failure | None,
        outputs: tuple[Output, ...] = (),
        result: Mapping[str, Any] = MappingProxyType({}),
        expires_at: float | None = None,
        ticket: str = "",
        **values: str,
    ) -> bool:
        """Make the job `where` a done one; whether there was one."""
        progress = ", progress = 100" if status == "completed" else ""
        statement = f"""UPDATE tinydiff_jobs SET status = :status, completed_at = :now, expires_at = :expires_at, error = :error,
            outputs = :outputs, result = :result, bytes = :bytes, lease = 0, cancel_asked = 0, ticket = :ticket{progress} WHERE {where}"""
        now = time.time()
        made = {"error": sql.to_json(error), "outputs": sql.to_json(outputs), "result": sql.to_json(result)}
        ends = {
            "status": status,
            "now": now,
            "expires_at": now + self._lifetime if expires_at is None else expires_at,
        }
        return (
            execute(
                statement, **made, **ends, bytes=sql.bytes_here(outputs), ticket=ticket, **values
            ).rowcount
            == 1
        )

    def _release(self, where: str, policy: Policy, **values: Any) -> int:
        # In the order of ids, so that two servers that do this at once wait for each other instead of both.
        leftover = f"SELECT id, pinned, attempts, cancel_asked FROM tinydiff_jobs WHERE {{held}} AND {where} ORDER BY id {{lock}}"
        queue = """UPDATE tinydiff_jobs SET status = 'queued', server = '', lease = 0, progress = 0, started_at = NULL, ticket = ''
            WHERE id = :id"""

        def work(execute: Execute) -> int:
            found = execute(leftover, **values).fetchall()
            for id, pinned, attempts, cancel_asked in found:
                spent = GIVEN_UP if attempts >= MOST_ATTEMPTS else None
                failure = CANCELLED if cancel_asked else RESTARTED if pinned or policy == "fail" else spent
                if failure is None:
                    execute(queue, id=id)
                else:
                    self._end(execute, "id = :id", "failed", failure, id=id)
            return len(found)

        return self._write(work)

    # --- connections
    # ------------------------------------------------------------------------------------------------------------------

    def _rows(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        return self._attempt(lambda execute: execute(statement, **values).fetchall())

    def _write(self, work: Callable[[Execute], Made], durable: bool = False) -> Made:
        """`work(execute)` in a transaction. `work` may be done again though it was committed, where the
        answer to that was lost.
        """
        dialect = self._dialect

        def transaction(execute: Execute) -> Made:
            for statement in (dialect.durable if durable else dialect.quick, dialect.begin):
                if statement:
                    execute(statement)
            made = work(execute)
            execute("COMMIT")
            return made

        if not self._writing.acquire(timeout=sql.BUSY):
            raise Unreachable(f"the database {self._dialect.shown!r} takes no more: others hold it")
        try:
            return self._attempt(transaction)
        finally:
            self._writing.release()

    def _attempt(self, work: Callable[[Execute], Made]) -> Made:
        """`work(execute)` on a connection, and from its start on another one where the database went away
        under it.
        """
        until = time.monotonic() + PATIENCE
        while True:
            try:
                with self._connection() as connection:

                    def execute(statement: str, **values: Any) -> Any:
                        return connection.execute(
                            self._dialect.spelled(statement), values | {"clock": time.time()}
                        )

                    return work(execute)
            except self._dialect.lost as error:
                self.close()  # the others are as old
                if time.monotonic() > until:
                    raise Unreachable(
                        f"the database {self._dialect.shown!r} does not answer: {error}"
                    ) from error
                time.sleep(PAUSE)

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        connection = self._idle.get()
        try:
            connection = self._dialect.connect() if connection is None else connection
            yield connection
        except BaseException:
            self._let_go(connection)  # which takes back what was not committed
            raise
        self._idle.put(connection)

    def _let_go(self, connection: Any) -> None:
        self._idle.put(None)
        if connection is not None:
            connection.close()


def _jobs(cursor: Any) -> list[Job]:
    return [sql.to_job(row) for row in cursor.fetchall()]


def _possible(id: str) -> bool:
    """Whether a job can have this id, which comes from an address and may be anything; a database refuses
    some texts.
    """
    return id.isascii() and id.isprintable()
