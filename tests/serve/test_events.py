"""A reader gets the events of its own job at once, until the job is done."""

import threading
from dataclasses import replace

import pytest

from tinydiff.serve.events import Events
from tinydiff.serve.jobs import Job

JOB, OTHER = (Job(f"img_{letter}", "image", 0.0) for letter in "ab")


@pytest.fixture
def events():
    events = Events()
    events.open(JOB)
    events.open(OTHER)
    return events


def watched(events, job):
    return events.watch(job.id, lambda: None)


def test_an_event_wakes_its_reader(events):
    with watched(events, JOB) as watch:
        threading.Timer(0.05, events.publish, (JOB, 3, 8)).start()
        assert watch.next(10)[:3] == (JOB, 3, 8)


def test_events_of_other_jobs_wake_no_reader(events, monkeypatch):
    woken, wait = [], threading.Condition.wait
    with watched(events, JOB) as watch:
        threading.Timer(0.05, lambda: [events.publish(OTHER, step, 8) for step in range(8)]).start()
        monkeypatch.setattr(
            threading.Condition, "wait", lambda *args: (wait(*args), woken.append(threading.get_ident()))
        )
        assert watch.next(0.2) is None
    assert woken.count(threading.get_ident()) == 1  # when its time was over


def test_events_published_before_are_read_once(events):
    with watched(events, JOB) as watch:
        events.publish(JOB, 1, 8, ["first"])
        events.publish(JOB, 2, 8, ["second"])
        assert watch.next(1)[1:] == (2, 8, ("first", "second"))
        assert watch.next(0) is None


def test_the_events_of_a_done_job_stay_for_its_readers(events):
    done = replace(JOB, status="completed")
    with watched(events, JOB) as watch:
        events.publish(done)
        assert events.has(JOB.id) and watch.next(1).job is done
    assert not events.has(JOB.id)


def test_a_job_without_events_is_read_from_the_store():
    states = iter([JOB, JOB, replace(JOB, status="completed")])
    with Events().watch(JOB.id, lambda: next(states)) as watch:
        assert watch.next(10_000).job.status == "completed"  # long before the test's own limit
