"""A repeated request joins the job that it started; a job whose clients have all gone is cancelled."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import falcon

from tinydiff.serve.admission import discard
from tinydiff.serve.errors import NO_RETRY, Refusal
from tinydiff.serve.jobs import DONE, Job
from tinydiff.serve.service import Service

MOST_REMEMBERED = 4096
"""Requests that are remembered; beyond it the oldest are forgotten."""
RETRY_S = 15.0
"""Seconds within which a client that gave up has asked again; the official clients wait 8 seconds at most."""
MOST_WAITING = 4
"""Clients that may wait for one job at once. Each holds a thread of the server.

An official client asks three times at most, and has left its earlier connections by then.
"""


class Retries:
    """Recognises repeated requests to one route.

    A request is a repetition if its `Idempotency-Key` says so, or the official client's count of retries. It
    joins the running job of the same key and body, unless the request that it repeats was answered with an
    error. By the count of retries a client also gets a job that was completed after it gave up; otherwise a
    client with a short timeout would never get an image.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, str] = OrderedDict()
        """Identity of a request -> id of its job."""
        self._refusals: OrderedDict[str, int] = OrderedDict()
        """Identity of a request -> how often it was answered with an error."""
        self._waiting: Counter[str] = Counter()
        """Id of a job -> how many clients wait for it."""

    def submit(self, req: falcon.Request, job: Job, previews: int = 0) -> Job:
        """Queue the job, or return the one that the request repeats.

        Raises Busy and Stopping, and Refusal for an idempotency key of another body and where too many
        clients wait for the same job.
        """
        identity = job.owner + job.answer["fingerprint"] + job.idempotency
        try:
            queued = self._repeated(req, identity) or self._service.scheduler.submit(job, previews)
            if queued.answer.get("fingerprint") != job.answer["fingerprint"]:
                message = (
                    "Idempotency-Key: a running request with another body has this key; "
                    "use a new key for each request"
                )
                raise Refusal(409, "idempotency_key_reused", message, headers=NO_RETRY)
        except Exception:
            with self._lock:
                _remember(self._refusals, identity, self._refusals.get(identity, 0) + 1)
            discard(self._service, job)
            raise
        if queued.id != job.id:
            discard(self._service, job)
        with self._lock:
            _remember(self._jobs, identity, queued.id)
            self._check_waiting(queued)
        req.context.job_id = queued.id
        return queued

    @contextmanager
    def waiting(self, job: Job) -> Generator[None]:
        """Count a client that waits for a job; the job is cancelled when the last of them leaves too early.

        Raises Refusal where MOST_WAITING clients wait already.
        """
        with self._lock:
            self._check_waiting(job)
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

    def _check_waiting(self, job: Job) -> None:
        if self._waiting[job.id] >= MOST_WAITING:
            seconds = max(1, round(self._service.scheduler.place(job).eta_s or 1.0))
            message = f"{MOST_WAITING} clients wait for this request already; ask again in {seconds} s"
            raise Refusal(429, "too_many_waiting", message, headers={"retry-after": str(seconds)})

    def _repeated(self, req: falcon.Request, identity: str) -> Job | None:
        """The job that an official client asks for again: unfinished, or completed less than RETRY_S ago."""
        if (req.get_header("x-stainless-retry-count") or "0") == "0":
            return None
        with self._lock:
            if self._refusals.get(identity):
                self._refusals[identity] -= 1
                return None
            id = self._jobs.get(identity)
        job = None if id is None else self._service.store.get(id)
        if job is None or job.status not in DONE:
            return job
        recent = time.time() - (job.completed_at or 0.0) < RETRY_S
        return job if job.status == "completed" and recent else None


def _remember(memory: OrderedDict[str, Any], identity: str, value: object) -> None:
    memory[identity] = value
    memory.move_to_end(identity)
    if len(memory) > MOST_REMEMBERED:
        memory.popitem(last=False)
