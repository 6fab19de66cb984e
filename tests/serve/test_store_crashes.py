"""The store where much happens at once and things go away: no job lost, none run or finished twice, whoever
dies when.
"""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from tests.serve.stored import LEASE, at_once, file, job, take
from tinydiff.records import UserError
from tinydiff.serve import sql
from tinydiff.serve import store as stores
from tinydiff.serve.jobs import Busy, Unreachable
from tinydiff.serve.store import Store, open_store


@pytest.fixture
def store(both):
    return both


# --- many at once ---


def test_threads_share_a_queue_without_doing_a_job_twice(where):
    with closing(open_store(*where, 1000)) as one, closing(open_store(*where, 1000)) as two:
        given = {one.add(job("abc"[n % 3])).id for n in range(120)}

        def drain(i):
            store, got = (one, two)[i % 2], []
            while taken := take(store, f"server {i % 2}"):
                got.append((taken.id, store.finish(taken.id, f"server {i % 2}", "completed")))
            return got

        got = [each for thread in at_once(drain) for each in thread]
        assert Counter(id for id, _ in got) == Counter(given) and all(finished for _, finished in got)
        assert one.counts() == two.counts() == {"queued": 0, "in_progress": 0, "completed": 120, "failed": 0}


def test_threads_that_repeat_a_request_share_a_job(where):
    with closing(open_store(*where, 5)) as one, closing(open_store(*where, 5)) as two:
        ids = at_once(lambda i: (one, two)[i % 2].add(job(idempotency="k")).id)
        assert len(set(ids)) == 1 and one.counts()["queued"] == 1


def test_threads_do_not_overfill_the_queue(where):
    with closing(open_store(*where, 10)) as one, closing(open_store(*where, 10)) as two:

        def fill(i):
            added = 0
            for _ in range(4):
                try:
                    added += bool((one, two)[i % 2].add(job()))
                except Busy:
                    continue
            return added

        assert sum(at_once(fill)) == 10 == one.counts()["queued"]


def test_a_job_that_is_taken_back_in_the_moment_it_ends_does_one_of_both(store):
    for _ in range(10):
        id = store.add(job()).id
        assert take(store).id == id
        ways = (
            lambda id=id: store.finish(id, "here", "completed"),
            lambda: store.reclaim(time.time() + 2 * LEASE, "rerun"),
        )
        finished, reclaimed = at_once(lambda i, ways=ways: ways[i](), 2)
        assert finished == (not reclaimed) == (store.get(id).status == "completed")
        store.delete(id)


def test_more_threads_than_connections_read_and_write(store):
    ids = [store.add(job()).id for _ in range(5)]
    assert (
        at_once(lambda i: [store.get(id).id for id in ids] == ids and bool(store.add(job())), 40)
        == [True] * 40
    )


# --- kill -9 ---

STORM = """
import sys, threading, time
from pathlib import Path
from tinydiff.serve.jobs import Job, Output, new_id
from tinydiff.serve.store import open_store

directory, url, server = sys.argv[1:]
store = open_store(Path(directory), url or None, 10**6)
store.requeue(server, "rerun")
def say(*words):
    sys.stdout.write(" ".join(words) + chr(10))
    sys.stdout.flush()
def ask():
    while True:
        say("added", store.add(Job(new_id("video"), "video", time.time())).id)
def make():
    while True:
        job = store.take(server, time.time() + 60)
        if job is not None:
            store.progress(job.id, server, 50)
            if store.finish(job.id, server, "completed", outputs=(Output("f", "video/mp4", 10, 1),)):
                say("finished", job.id)
for work in (ask, ask, make, make, make):
    threading.Thread(target=work, daemon=True).start()
threading.Event().wait()
"""


def storm(where, server):
    words = [sys.executable, "-c", STORM, str(where[0]), where[1] or "", server]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def at_work(process):
    """What a process says until it has added and finished ten jobs more."""
    lines, seen = "", Counter()
    while min(seen["added"], seen["finished"]) < 10:
        line = process.stdout.readline()
        assert line, "the process has ended"
        lines += line
        seen[line.split()[0]] += 1
    return lines


def test_killed_processes_lose_nothing_and_do_nothing_twice(where):
    said = Counter()
    for round in range(3):
        # Two at once share a queue; the second says a name that is new each time, so that what it leaves
        # comes back by its lease.
        running = [storm(where, "same"), storm(where, f"new {round}")]
        heads = [at_work(each) for each in running]
        for n, each in enumerate(running):
            heads[n] += at_work(each)  # the second goes on without the first
            each.send_signal(signal.SIGKILL)
        for head, each in zip(heads, running, strict=True):
            lines = (head + each.communicate()[0]).splitlines(keepends=True)
            said.update(tuple(line.split()) for line in lines if line.endswith("\n"))
    added = {id for word, id in said if word == "added"}
    finished = {id for word, id in said if word == "finished"}
    assert len(added) > 50 and len(finished) > 50 and set(said.values()) == {1}
    with closing(open_store(*where, 1)) as store:
        kept = {each.id: each for each in store.every()}
        assert (
            added <= kept.keys() and len(kept) <= len(added) + 3 * 2 * 2
        )  # each thread that adds may have been killed before it said so
        assert {kept[id].status for id in finished} == {"completed"}
        assert sum(each.status == "completed" for each in kept.values()) <= len(finished) + 3 * 2 * 3
        assert all(each.outputs for each in kept.values() if each.status == "completed")
        left = [each for each in kept.values() if each.status == "in_progress"]
        assert len(left) <= 3 * 2 * 3 and store.reclaim(time.time() + 2 * LEASE, "rerun") == len(left)
        while taken := take(store, "last"):
            assert taken.id not in finished and store.finish(taken.id, "last", "completed")
        assert store.counts() == {"queued": 0, "in_progress": 0, "completed": len(kept), "failed": 0}
    if where[1] is None:
        with closing(sqlite3.connect(where[0] / "jobs.sqlite3")) as file:
            assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- databases that go away ---


class Lost(Exception):
    pass


class Deaf:
    """A connection that is lost after a commit, before its answer, as often as `times` says."""

    def __init__(self, connection, times):
        self.connection, self.times = connection, times

    def execute(self, statement, values=()):
        cursor = self.connection.execute(statement, values)
        if statement == "COMMIT" and self.times:
            self.times.pop()
            raise Lost
        return cursor

    def close(self):
        self.connection.close()


@pytest.fixture
def deaf(tmp_path, monkeypatch):
    """A store, and the list of the answers that it does not hear."""
    monkeypatch.setattr(stores, "PAUSE", 0)
    dialect, times = sql.sqlite(tmp_path / "jobs.sqlite3"), []
    sql.prepare(dialect)
    with closing(
        Store(replace(dialect, connect=lambda: Deaf(dialect.connect(), times), lost=(Lost,)), 10, 60.0)
    ) as store:
        yield store, times


def test_what_was_done_unheard_is_not_done_again(deaf):
    store, times = deaf
    times += [1, 2]
    id = store.add(job()).id
    other = store.add(job()).id
    times += [1, 2]
    assert take(store).id == id and store.counts()["in_progress"] == 1 and store.get(id).attempts == 1
    times += [1, 2]
    assert store.finish(id, "here", "completed", outputs=[file()]) and store.get(id).outputs == (file(),)
    assert not store.finish(id, "here", "completed")
    times += [1, 2]
    assert store.cancel(other).error.code == "cancelled" and times == []


def test_a_job_taken_unheard_is_the_next_one_given_out(deaf, monkeypatch):
    store, times = deaf
    ids = [store.add(job()).id for _ in range(2)]
    monkeypatch.setattr(stores, "PATIENCE", -1)
    times += [1]
    with pytest.raises(Unreachable):
        take(store)
    assert [take(store).id, take(store).id] == ids and take(store) is None and store.get(ids[0]).attempts == 1


def test_a_request_waits_for_the_disk_and_progress_does_not(tmp_path):
    dialect, said = sql.sqlite(tmp_path / "jobs.sqlite3"), []

    def connect():
        connection = dialect.connect()
        connection.set_trace_callback(said.append)
        return connection

    sql.prepare(dialect)
    with closing(Store(replace(dialect, connect=connect), 10, 60.0)) as store:
        id = store.add(job()).id
        assert said[:2] == ["PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"] and said[-1] == "COMMIT"
        said.clear()
        take(store), store.progress(id, "here", 5), store.add(job(pinned=True, server="here"))
        assert said.count("PRAGMA synchronous=NORMAL") == 3 and "PRAGMA synchronous=FULL" not in said


def goes_on(finished, more=20):
    """Wait until so many more jobs are finished."""
    end, wanted = time.monotonic() + 30, len(finished) + more
    while len(finished) < wanted:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_database_that_restarts_is_waited_for(postgres, database, tmp_path):
    with (
        closing(open_store(tmp_path, database, 10**6)) as one,
        closing(open_store(tmp_path, database, 10**6)) as two,
    ):
        added, finished, over = [], [], threading.Event()

        def work(store, server):
            while not over.is_set():
                added.append(store.add(job()).id)
                if taken := store.take(server, time.time() + LEASE):
                    finished.append((taken.id, store.finish(taken.id, server, "completed", outputs=[file()])))

        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(work, *((one, "one"), (two, "two"))[n % 2]) for n in range(6)]
            for how in (signal.SIGINT, signal.SIGQUIT):
                goes_on(finished)
                postgres.stop(how)
                postgres.start()
                goes_on(finished)
            over.set()
            for each in running:
                each.result()
        kept = one.every()
        assert len(set(added)) == len(added) and {each.id for each in kept} == set(added)
        assert (
            len(finished) > 40
            and all(ok for _, ok in finished)
            and len({id for id, _ in finished}) == len(finished)
        )
        assert one.counts()["completed"] == len(finished) and one.counts()["in_progress"] == 0


def test_a_database_that_stays_away_is_reported(postgres, database, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 0.2)
    with closing(open_store(tmp_path, database, 10)) as store:
        postgres.stop()
        try:
            with pytest.raises(Unreachable, match=r"postgresql:///test_.* does not answer"):
                store.counts()
            with pytest.raises(UserError, match="state_url: cannot use the database") as caught:
                open_store(tmp_path, database, 10)
        finally:
            postgres.start()
        assert caught.value.field == "state_url" and store.add(job()) and take(store)


def test_servers_whose_clocks_differ_leave_each_other_their_jobs(database, tmp_path, monkeypatch):
    clock = time.time
    with closing(open_store(tmp_path, database, 10)) as store:
        store.add(job())
        monkeypatch.setattr(stores.time, "time", lambda: clock() - 3600)
        taken = take(store, "slow", 30)
        monkeypatch.setattr(stores.time, "time", clock)
        assert taken.lease == pytest.approx(clock() + 30, abs=10)
        assert store.reclaim(clock(), "rerun") == 0 and store.reclaim(clock() + 60, "rerun") == 1
