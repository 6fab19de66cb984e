"""Who waits hears of its own job, at once, until it is done."""

import threading
import time
from dataclasses import replace

import pytest

from tinydiff.serve.events import Boards
from tinydiff.serve.jobs import Job

JOB, OTHER = (Job(f"img_{letter}", "image", 0.0) for letter in "ab")


@pytest.fixture
def boards():
    boards = Boards()
    boards.open(JOB)
    boards.open(OTHER)
    return boards


def watched(boards, job):
    return boards.watch(job.id, lambda: None)


def test_news_wake_who_waits(boards):
    with watched(boards, JOB) as watch:
        threading.Timer(0.05, boards.post, (JOB, 3, 8)).start()
        assert watch.next(10)[:3] == (JOB, 3, 8)


def test_news_of_other_jobs_wake_nobody_else(boards, monkeypatch):
    woken, wait = [], threading.Condition.wait
    with watched(boards, JOB) as watch:
        threading.Timer(0.05, lambda: [boards.post(OTHER, step, 8) for step in range(8)]).start()
        monkeypatch.setattr(
            threading.Condition, "wait", lambda *args: (wait(*args), woken.append(threading.get_ident()))
        )
        assert watch.next(0.2) is None
    assert woken.count(threading.get_ident()) == 1  # when its time was over


def test_what_was_posted_before_is_told_once(boards):
    with watched(boards, JOB) as watch:
        boards.post(JOB, 1, 8, ["first"])
        boards.post(JOB, 2, 8, ["second"])
        assert watch.next(1)[1:] == (2, 8, ("first", "second"))
        assert watch.next(0) is None


def test_a_done_jobs_board_stays_for_its_readers_only(boards):
    done = replace(JOB, status="completed")
    with watched(boards, JOB) as watch:
        boards.post(done)
        assert boards.known(JOB.id) and watch.next(1).job is done
    assert not boards.known(JOB.id)


def test_a_job_without_a_board_is_asked_for_in_the_store():
    states = iter([JOB, JOB, replace(JOB, status="completed")])
    with Boards().watch(JOB.id, lambda: next(states)) as watch:
        begun = time.monotonic()
        assert watch.next(10).job.status == "completed"
        assert time.monotonic() - begun < 5
