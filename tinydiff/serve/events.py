"""Where waiting HTTP threads hear of jobs: what is new of each, until it is done. No torch here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinydiff.serve.jobs import DONE, Job
from tinydiff.serve.service import News

POLL_S = 0.1
"""Seconds between looks at a job that has no board here."""


@dataclass
class Board:
    """What is known of one job. `version` counts what was posted."""

    job: Job
    changed: threading.Condition
    """Of the boards' one lock; each has its own, so that a step wakes those who wait for its images and
    nobody else.
    """
    done: int = 0
    total: int = 0
    previews: list[Any] = field(default_factory=list)
    version: int = 0


class Boards:
    """The boards of all jobs of this server that are not done, or that someone still reads."""

    def __init__(self) -> None:
        self._boards: dict[str, Board] = {}
        self._readers: dict[str, int] = {}
        self._lock = threading.Lock()

    def open(self, job: Job) -> None:
        """A board for a job that has none."""
        with self._lock:
            self._boards.setdefault(job.id, Board(job, threading.Condition(self._lock)))

    def post(
        self, job: Job, done: int | None = None, total: int | None = None, previews: Sequence[Any] = ()
    ) -> None:
        """Something is new; a job that is done needs its board no more, but for its readers."""
        with self._lock:
            board = self._boards.get(job.id)
            if board is None:
                return
            board.job = job
            board.done, board.total = (
                board.done if done is None else done,
                board.total if total is None else total,
            )
            board.previews += previews
            board.version += 1
            if job.status in DONE and not self._readers.get(job.id):
                del self._boards[job.id]
            board.changed.notify_all()

    def previewed(self, id: str) -> int:
        """How many previews were posted."""
        with self._lock:
            board = self._boards.get(id)
            return len(board.previews) if board else 0

    def known(self, id: str) -> bool:
        """Whether there is a board for a job."""
        return id in self._boards

    def drop(self, id: str) -> None:
        with self._lock:
            self._boards.pop(id, None)

    def close(self, get: Callable[[str], Job | None]) -> None:
        """Tell all readers how their jobs stand, at the server's end."""
        for id in list(self._boards):
            job = get(id)
            if job is not None:
                self.post(job)

    def watch(self, id: str, get: Callable[[], Job | None]) -> Reader:
        """get: the job as the store has it, for one that is done and has no board any more."""
        return Reader(self, id, get)


class Reader:
    """See `service.Watch`."""

    def __init__(self, boards: Boards, id: str, get: Callable[[], Job | None]) -> None:
        self._boards, self._id, self._get = boards, id, get
        self._seen, self._shown = 0, 0

    def __enter__(self) -> Reader:
        with self._boards._lock:
            self._boards._readers[self._id] = self._boards._readers.get(self._id, 0) + 1
        return self

    def __exit__(self, *_: object) -> None:
        boards = self._boards
        with boards._lock:
            boards._readers[self._id] -= 1
            if not boards._readers[self._id]:
                del boards._readers[self._id]
                board = boards._boards.get(self._id)
                if board is not None and board.job.status in DONE:
                    del boards._boards[self._id]

    def next(self, timeout: float) -> News | None:
        boards, deadline = self._boards, time.monotonic() + timeout
        with boards._lock:
            while (board := boards._boards.get(self._id)) is not None and board.version == self._seen:
                if (left := deadline - time.monotonic()) <= 0:
                    return None
                board.changed.wait(left)
            if board is not None:
                previews, self._seen, self._shown = (
                    tuple(board.previews[self._shown :]),
                    board.version,
                    len(board.previews),
                )
                return News(board.job, board.done, board.total, previews)
        while (job := self._get()) is not None and job.status not in DONE:  # another server makes it, or will
            if (left := deadline - time.monotonic()) <= 0:
                return None
            time.sleep(min(POLL_S, left))
            if self._boards.known(self._id):
                return self.next(max(0.0, deadline - time.monotonic()))
        return None if job is None else News(job, 0, 0, ())
