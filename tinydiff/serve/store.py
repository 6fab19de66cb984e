"""All jobs, in a database: SQLite in a directory, or PostgreSQL, where several servers share one queue.

Every method is one transaction, committed when it returns. So after a crash every job is queued, leased to a
server, or done. No torch here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, LifoQueue
from threading import Lock, Semaphore
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from tinydiff.serve import sql
from tinydiff.serve.jobs import DONE, Busy, Failure, Job, Kind, Output, Status, Turn, Unreachable

CONNECTIONS = 8
"""Most connections; a call waits for a free one. A statement takes under 1 ms, so more are not faster."""

PATIENCE = 10.0
"""Seconds that a call tries to reach the database, with PAUSE seconds between attempts."""
PAUSE = 0.1

MOST_ATTEMPTS = 3
"""How often a job may start; a job that crashes its server would crash it again and again."""

CANCELLED = Failure("cancelled", "the job was cancelled")
RESTARTED = Failure("server_restarted", "the server stopped before the job was done; send the request again")
GIVEN_UP = Failure(
    "server_restarted",
    f"the server stopped {MOST_ATTEMPTS} times before the job was done; it will not run again",
)

Policy = Literal["rerun", "fail"]
Execute = Callable[..., Any]
"""(statement, **values) -> cursor."""
Made = TypeVar("Made")


def open_store(
    state_dir: Path, state_url: str | None, most_queued: int, lifetime: float = 86400.0, shared: bool = False
) -> Store:
    """The store at `state_url`, postgresql://..., or in `state_dir` where that is None.

    most_queued: limit for waiting jobs. lifetime: seconds for which a done job is kept by default. shared:
    whether owners share the queue, see `add`. Raises UserError naming the option where the database cannot be
    used, or was written by a newer version.
    """
    dialect = sql.sqlite(Path(state_dir) / "jobs.sqlite3") if state_url is None else sql.postgres(state_url)
    sql.prepare(dialect)
    return Store(dialect, most_queued, lifetime, shared)


class Store:
    """Jobs by id. Any thread may call any method; with PostgreSQL each may raise Unreachable.

    Times are seconds since 1970 by the caller's clock. Leases use the database's clock, so that servers whose
    clocks differ do not take each other's jobs.
    """

    def __init__(self, dialect: sql.Dialect, most_queued: int, lifetime: float, shared: bool = False) -> None:
        self._dialect, self._most_queued = dialect, most_queued
        self._lifetime, self._shared = lifetime, shared
        self._idle: LifoQueue[Any] = LifoQueue()  # free connections; None for one that is not open
        for _ in range(CONNECTIONS):
            self._idle.put(None)
        # SQLite writers poll for the lock; a lock between threads is faster.
        self._writing = Lock() if dialect.one_writer else Semaphore(2**20)
        self._uncertain: list[str] = []  # tickets of calls of `take` whose success is unknown

    # --- the life of a job ---

    def add(self, job: Job) -> Job:
        """Queue a job. Returns it, or the unfinished job with its owner and `idempotency`.

        Raises Busy(0) where the queue is full, or where owners share it and this one has as many waiting jobs
        as there are free places. So no owner can fill the queue.
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
                return Busy(0, "this API key has as many waiting jobs as the queue has free places")
            names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
            execute(f"INSERT INTO tinydiff_jobs ({names}) VALUES ({values})", **row)
            return job

        # A pinned job ends with its client's connection, so it need not survive a loss of power.
        if isinstance(queued := self._write(work, durable=not job.pinned), Busy):
            raise queued
        return queued

    def take(self, server: str, lease_until: float, turn: Turn | None = None) -> Job | None:
        """The next queued job for `server`, now in progress with a lease until `lease_until`; None if none.

        Order: the highest priority, then the owner with the fewest running jobs, then the owner served least
        recently, then the oldest job. turn: the model whose turn it is. Where the next job is of another
        model, jobs of this one that came before the turn began may still overtake it, but for those of a
        lower priority.
        """
        if not self._uncertain and not self._select(
            "SELECT 1 FROM tinydiff_jobs WHERE status = 'queued' LIMIT 1"
        ):
            return None  # a read does not wait for writers
        ticket = self._uncertain.pop() if self._uncertain else secrets.token_hex(8)
        mine = "SELECT {columns} FROM tinydiff_jobs WHERE {held} AND server = :server AND ticket = :ticket"
        next_in_line = """SELECT queued.id, queued.owner, queued.model, queued.priority {line}
            AND (queued.pinned = 0 OR queued.server = :server) %s
            ORDER BY queued.priority DESC, COALESCE(running.jobs, 0), COALESCE(turns.last_start, 0),
            queued.created_at, queued.id
            LIMIT 1 {skip}"""
        of_turn = "AND queued.model = :model AND queued.created_at <= :began AND queued.priority >= :priority"
        take = """UPDATE tinydiff_jobs SET status = 'in_progress', server = :server,
            lease = :until + {skew}, started_at = :now, progress = 0, attempts = attempts + 1,
            ticket = :ticket WHERE id = :id"""
        owners_turn = """INSERT INTO tinydiff_turns (owner, last_start) VALUES (:owner, :now)
            ON CONFLICT (owner) DO UPDATE SET last_start = excluded.last_start"""

        def work(execute: Execute) -> Job | None:
            if taken := _jobs(execute(mine, server=server, ticket=ticket)):
                return taken[0]
            found = execute(next_in_line % "", server=server).fetchone()
            if found is not None and turn is not None and found[2] != turn.model:
                values = {**turn._asdict(), "priority": found[3]}
                found = execute(next_in_line % of_turn, server=server, **values).fetchone()
            if found is None:
                return None
            id, owner = found[:2]
            execute(take, id=id, server=server, until=lease_until, now=time.time(), ticket=ticket)
            execute(owners_turn, owner=owner, now=time.time())
            return _jobs(execute(mine, server=server, ticket=ticket))[0]

        try:
            return self._write(work)
        except Unreachable:
            self._uncertain.append(ticket)
            raise

    def renew(self, server: str, until: float) -> None:
        """Renew the leases of a server's jobs, in progress or pinned, until `until`."""
        statement = "UPDATE tinydiff_jobs SET lease = :until + {skew} WHERE {held} AND server = :server"
        self._write(lambda execute: execute(statement, server=server, until=until))

    def progress(self, id: str, server: str, percent: int) -> bool:
        """Store the progress of a job. False where the server no longer has it."""
        statement = """UPDATE tinydiff_jobs SET progress = :percent
            WHERE id = :id AND server = :server AND status = 'in_progress'"""
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
        result: Mapping[str, object] | None = None,
        expires_at: float | None = None,
    ) -> bool:
        """End a job that is in progress at `server`, or queued where that is "".

        False where another server has the job, or it is done; then its outputs are not used.
        """
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
        """Cancel a job: a queued one fails at once, a running one when its server reads `cancelled`.

        Returns the job after that, None if there is none.
        """

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
        """Ids of running jobs of `server` that were cancelled."""
        statement = "SELECT id FROM tinydiff_jobs WHERE {held} AND server = :server AND cancel_asked = 1"
        return [id for (id,) in self._select(statement, server=server)]

    def requeue(self, server: str, policy: Policy) -> int:
        """Queue the jobs of `server` again, or fail them, by `policy`; returns how many.

        Pinned jobs, whose clients are gone, and cancelled ones always fail. A server calls this for itself.
        """
        return self._release("server = :server", policy, server=server)

    def reclaim(self, now: float, policy: Policy) -> int:
        """Do what `requeue` does for all jobs whose lease ended before `now`."""
        return self._release("lease > 0 AND lease < :now + {skew}", policy, now=now)

    # --- reading ---

    def get(self, id: str) -> Job | None:
        return self._attempt(lambda execute: self._one(execute, id)) if _possible(id) else None

    def page(
        self, kind: Kind, owner: str, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[Job], bool]:
        """(at most `limit` jobs after the job `after`, whether there are more), sorted by creation.

        Raises KeyError where the owner has no job `after`.
        """
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
        jobs = [sql.to_job(row) for row in self._select(statement, **values, limit=limit + 1)]
        return jobs[:limit], len(jobs) > limit

    def position(self, job: Job) -> int:
        """How many jobs `take` would return before this one.

        It counts as if no job were added or finished, and models had no turns.
        """
        # Fair share: by priority, then by the owner's running jobs plus this job's place among the owner's
        # queued ones. Of equals the owner with more running jobs comes first, then the one served least
        # recently.
        statement = """WITH line AS (
                SELECT queued.id, -queued.priority AS rank, COALESCE(running.jobs, 0) + row_number() OVER (
                    PARTITION BY queued.owner
                    ORDER BY queued.priority DESC, queued.created_at, queued.id) AS round,
                    -COALESCE(running.jobs, 0) AS joined, COALESCE(turns.last_start, 0) AS last_start,
                    min(queued.created_at) OVER (PARTITION BY queued.owner) AS since {line})
            SELECT count(*) FROM line WHERE (rank, round, joined, last_start, since, id)
                < (SELECT rank, round, joined, last_start, since, id FROM line WHERE id = :id)"""
        return self._select(statement, id=job.id)[0][0]

    def check(self) -> None:
        """Raise the error that `add` would meet now: the database's own, or Unreachable."""
        self._write(lambda execute: None)

    def counts(self) -> dict[Status, int]:
        """Number of jobs of each status."""
        found = self._select("SELECT status, count(*) FROM tinydiff_jobs GROUP BY status")
        return dict.fromkeys(get_args(Status), 0) | dict(found)

    # --- done jobs and their files ---

    def expired(self, now: float) -> list[Job]:
        """Done jobs, failed ones too, whose lifetime has ended, in that order."""
        statement = """SELECT {columns} FROM tinydiff_jobs
            WHERE expires_at <= :now AND completed_at > 0 ORDER BY expires_at, id"""
        return [sql.to_job(row) for row in self._select(statement, now=now)]

    def oldest(self) -> Job | None:
        """The job that was done first, of the done jobs with files here."""
        statement = """SELECT {columns} FROM tinydiff_jobs
            WHERE bytes > 0 AND completed_at > 0 ORDER BY completed_at LIMIT 1"""
        found = self._select(statement)
        return sql.to_job(found[0]) if found else None

    def update_outputs(self, id: str, outputs: Iterable[Output]) -> bool:
        """Replace the outputs of a done job. False where there is none with this id."""
        outputs = tuple(outputs)
        statement = """UPDATE tinydiff_jobs SET outputs = :outputs, bytes = :bytes
            WHERE id = :id AND status IN ('completed', 'failed')"""
        values = {"id": id, "outputs": sql.to_json(outputs), "bytes": sql.bytes_here(outputs)}
        return self._write(lambda execute: execute(statement, **values).rowcount == 1)

    def every(self) -> list[Job]:
        """All jobs; slow, for rare use."""
        return [sql.to_job(row) for row in self._select("SELECT {columns} FROM tinydiff_jobs")]

    def delete(self, id: str) -> bool:
        """Delete a job; a running one should be cancelled before. False if there was none."""
        statement = "DELETE FROM tinydiff_jobs WHERE id = :id"
        return _possible(id) and self._write(lambda execute: execute(statement, id=id).rowcount == 1)

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        held = []
        try:
            while True:
                held.append(self._idle.get_nowait())
        except Empty:
            for connection in held:
                self._discard(connection)

    # --- inside a transaction ---

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
        result: Mapping[str, object] = MappingProxyType({}),
        expires_at: float | None = None,
        ticket: str = "",
        **values: str,
    ) -> bool:
        """End the job that matches `where`; whether there was one."""
        progress = ", progress = 100" if status == "completed" else ""
        statement = f"""UPDATE tinydiff_jobs SET status = :status, completed_at = :now,
            expires_at = :expires_at, error = :error, outputs = :outputs, result = :result, bytes = :bytes,
            lease = 0, cancel_asked = 0, ticket = :ticket{progress} WHERE {where}"""
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
        # Ordered by id, so that two servers which do this at once cannot deadlock.
        leftover = f"""SELECT id, pinned, attempts, cancel_asked FROM tinydiff_jobs
            WHERE {{held}} AND {where} ORDER BY id {{lock}}"""
        queue = """UPDATE tinydiff_jobs SET status = 'queued', server = '', lease = 0, progress = 0,
            started_at = NULL, ticket = '' WHERE id = :id"""

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

    # --- connections ---

    def _select(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        return self._attempt(lambda execute: execute(statement, **values).fetchall())

    def _write(self, work: Callable[[Execute], Made], durable: bool = False) -> Made:
        """`work(execute)` in a transaction. It may run again after a commit whose confirmation was lost."""
        dialect = self._dialect

        def transaction(execute: Execute) -> Made:
            for statement in (dialect.durable if durable else dialect.quick, dialect.begin):
                if statement:
                    execute(statement)
            made = work(execute)
            execute("COMMIT")
            return made

        if not self._writing.acquire(timeout=sql.BUSY):
            raise Unreachable(f"the database {self._dialect.shown!r} is locked by other writers")
        try:
            return self._attempt(transaction)
        finally:
            self._writing.release()

    def _attempt(self, work: Callable[[Execute], Made]) -> Made:
        """`work(execute)` on a connection; repeated on a new one after the database was unreachable."""
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
                self.close()  # the other connections are broken too
                if time.monotonic() > until:
                    raise Unreachable(
                        f"the database {self._dialect.shown!r} does not answer: {error}"
                    ) from error
                time.sleep(PAUSE)

    @contextmanager
    def _connection(self) -> Generator[Any]:
        connection = self._idle.get()
        try:
            connection = self._dialect.connect() if connection is None else connection
            yield connection
        except BaseException:
            self._discard(connection)  # this rolls back
            raise
        self._idle.put(connection)

    def _discard(self, connection: Any) -> None:
        self._idle.put(None)
        if connection is not None:
            connection.close()


def _jobs(cursor: Any) -> list[Job]:
    return [sql.to_job(row) for row in cursor.fetchall()]


def _possible(id: str) -> bool:
    """Whether a job can have this id, which comes from a URL; databases refuse some strings."""
    return id.isascii() and id.isprintable()
