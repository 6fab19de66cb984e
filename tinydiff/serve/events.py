"""Events of jobs: how threads that wait learn of progress, previews and the end of a job. No torch here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinydiff.serve.jobs import DONE, Job
from tinydiff.serve.service import JobUpdate

if TYPE_CHECKING:
    import numpy

POLL_S = 0.1
"""Seconds between reads of the store for a job that another server runs."""


@dataclass
class JobEvents:
    """What was published of one job. `version` counts the publications."""

    job: Job
    changed: threading.Condition
    """Each job has a condition on the one lock of `Events`, so a step wakes only the readers of its job."""
    done: int = 0
    total: int = 0
    previews: list[numpy.ndarray] = field(default_factory=list)
    version: int = 0


class Events:
    """Events of every job of this server that is not done, or that a client still reads."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobEvents] = {}
        self._readers: dict[str, int] = {}
        self._lock = threading.Lock()

    def open(self, job: Job) -> None:
        """Begin to collect events of a job; does nothing where that has begun."""
        with self._lock:
            self._jobs.setdefault(job.id, JobEvents(job, threading.Condition(self._lock)))

    def publish(
        self,
        job: Job,
        done: int | None = None,
        total: int | None = None,
        previews: Sequence[numpy.ndarray] = (),
    ) -> None:
        """Publish a job's new state, and wake its readers.

        done, total: steps; None leaves the last values. A job that is done and has no readers is dropped.
        """
        with self._lock:
            events = self._jobs.get(job.id)
            if events is None:
                return
            events.job = job
            events.done = events.done if done is None else done
            events.total = events.total if total is None else total
            events.previews += previews
            events.version += 1
            if job.status in DONE and not self._readers.get(job.id):
                del self._jobs[job.id]
            events.changed.notify_all()

    def preview_count(self, id: str) -> int:
        """How many previews of a job were published."""
        with self._lock:
            events = self._jobs.get(id)
            return len(events.previews) if events else 0

    def has(self, id: str) -> bool:
        """Whether events of a job are collected."""
        return id in self._jobs

    def drop(self, id: str) -> None:
        """Stop collecting events of a job."""
        with self._lock:
            self._jobs.pop(id, None)

    def close(self, get: Callable[[str], Job | None]) -> None:
        """Publish the last state of every job. get: reads a job from the store."""
        for id in list(self._jobs):
            job = get(id)
            if job is not None:
                self.publish(job)

    def watch(self, id: str, get: Callable[[], Job | None]) -> Subscription:
        """Watch a job. get: reads it from the store, for a job whose events are not collected here."""
        return Subscription(self, id, get)


class Subscription:
    """One client's view of a job; see `service.Watch`."""

    def __init__(self, events: Events, id: str, get: Callable[[], Job | None]) -> None:
        self._events, self._id, self._get = events, id, get
        self._version, self._previews_read = 0, 0

    def __enter__(self) -> Subscription:
        with self._events._lock:
            self._events._readers[self._id] = self._events._readers.get(self._id, 0) + 1
        return self

    def __exit__(self, *_: object) -> None:
        jobs, readers = self._events._jobs, self._events._readers
        with self._events._lock:
            readers[self._id] -= 1
            if not readers[self._id]:
                del readers[self._id]
                events = jobs.get(self._id)
                if events is not None and events.job.status in DONE:
                    del jobs[self._id]

    def next(self, timeout: float) -> JobUpdate | None:
        jobs, deadline = self._events._jobs, time.monotonic() + timeout
        with self._events._lock:
            while (events := jobs.get(self._id)) is not None and events.version == self._version:
                if (left := deadline - time.monotonic()) <= 0:
                    return None
                events.changed.wait(left)
            if events is not None:
                previews = tuple(events.previews[self._previews_read :])
                self._version, self._previews_read = events.version, len(events.previews)
                return JobUpdate(events.job, events.done, events.total, previews)
        # Another server runs the job, or will.
        while (job := self._get()) is not None and job.status not in DONE:
            if (left := deadline - time.monotonic()) <= 0:
                return None
            time.sleep(min(POLL_S, left))
            if self._events.has(self._id):
                return self.next(max(0.0, deadline - time.monotonic()))
        return None if job is None else JobUpdate(job, 0, 0, ())
