"""A request that is sent again joins the job that it already began, and a job whose clients have all gone is
cancelled.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import falcon

from tinydiff.serve.admission import discard
from tinydiff.serve.errors import NO_RETRY, Refusal
from tinydiff.serve.jobs import DONE, Job
from tinydiff.serve.service import Service

REMEMBERED = 4096
"""Bodies that are remembered at most; older ones are forgotten."""
AGAIN_S = 15.0
"""Within how many seconds a client that gave up waiting has asked again; the official ones wait for 8 at
most.
"""
MOST_WAITING = 4
"""Clients that may wait for one job at once, each with a thread of the server. An official client asks three
times at most, and has gone from where it asked before."""


class Retries:
    """What the requests to one address were. A repeated one is told by `Idempotency-Key`, which any client
    may send, or by the official client's count of retries: then it joins a running job of the same key and
    body, unless what it repeats was answered with an error. By its count a client also finds what was
    completed after it gave up, else one of little patience would never get an image."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._begun: OrderedDict[str, str] = OrderedDict()
        self._refused: OrderedDict[str, int] = OrderedDict()
        self._waiting: Counter[str] = Counter()

    def submit(self, req: falcon.Request, job: Job, previews: int = 0) -> Job:
        """Queue the job, or return the one that it repeats. Raises Busy and Stopping, and Refusal for a key
        that was used for another and where too many wait for the same."""
        mark = job.owner + job.answer["fingerprint"] + job.idempotency
        try:
            queued = self._joined(req, mark) or self._service.scheduler.submit(job, previews)
            if queued.answer.get("fingerprint") != job.answer["fingerprint"]:
                message = (
                    "Idempotency-Key: a running job of another body has this key; every request needs its own"
                )
                raise Refusal(409, "idempotency_key_reused", message, headers=NO_RETRY)
        except Exception:
            with self._lock:
                _remember(self._refused, mark, self._refused.get(mark, 0) + 1)
            discard(self._service, job)
            raise
        if queued.id != job.id:
            discard(self._service, job)
        with self._lock:
            _remember(self._begun, mark, queued.id)
            self._check_company(queued)
        req.context.job_id = queued.id
        return queued

    @contextmanager
    def waiting(self, job: Job) -> Iterator[None]:
        """While a client waits for a job. When the last of them leaves before it is done, it is cancelled.
        Raises Refusal where as many wait as may."""
        with self._lock:
            self._check_company(job)
            self._waiting[job.id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting[job.id] -= 1
                last = not self._waiting[job.id]
                if last:
                    del self._waiting[job.id]
            if last and (now := self._service.store.get(job.id)) is not None and now.status not in DONE:
                self._service.scheduler.cancel(job.id)

    def _check_company(self, job: Job) -> None:
        if self._waiting[job.id] >= MOST_WAITING:
            seconds = max(1, round(self._service.scheduler.place(job).eta_s or 1.0))
            message = f"{MOST_WAITING} clients wait for this request already; ask again when it is done"
            raise Refusal(429, "too_many_waiting", message, headers={"retry-after": str(seconds)})

    def _joined(self, req: falcon.Request, mark: str) -> Job | None:
        """The job that the official client asks for again: it runs, or was completed a moment ago."""
        if (req.get_header("x-stainless-retry-count") or "0") == "0":
            return None
        with self._lock:
            if self._refused.get(mark):
                self._refused[mark] -= 1
                return None
            id = self._begun.get(mark)
        job = None if id is None else self._service.store.get(id)
        if job is None or job.status not in DONE:
            return job
        return (
            job if job.status == "completed" and time.time() - (job.completed_at or 0.0) < AGAIN_S else None
        )


def _remember(found: OrderedDict[str, Any], mark: str, value: Any) -> None:
    found[mark] = value
    found.move_to_end(mark)
    if len(found) > REMEMBERED:
        found.popitem(last=False)
