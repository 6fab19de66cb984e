"""What the HTTP resources are given: the parts of a running server, and what they may ask of its scheduler."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tinydiff.serve.jobs import Job, files_of
from tinydiff.serve.options import ServeOptions

if TYPE_CHECKING:
    import numpy

    from tinydiff.records import Request
    from tinydiff.runtime.blueprint import Blueprint
    from tinydiff.serve.files import Files
    from tinydiff.serve.metrics import Metrics
    from tinydiff.serve.storage import Uploader
    from tinydiff.serve.store import Store


class News(NamedTuple):
    """What became known of a job since one asked last."""

    job: Job
    """As it is now; `job.status in DONE` ends it."""
    done: int
    """Steps made of `total`, over all its outputs."""
    total: int
    previews: tuple[numpy.ndarray, ...]
    """Images uint8 [H, W, 3] of where the first output stood, oldest first, made only where
    `wants_previews` asked.
    """


class Watch(Protocol):
    """Someone who waits for a job. Use as a context manager."""

    def next(self, timeout: float) -> News | None:
        """What is new, as soon as there is something; None after `timeout` seconds without."""
        ...

    def __enter__(self) -> Watch: ...

    def __exit__(self, *_: object) -> None: ...


class Place(NamedTuple):
    """Where a queued job stands."""

    position: int
    """Jobs before it; 0 is next, or running."""
    eta_s: float | None
    """Seconds until it is done, from measured times; None before any were measured."""


class State(NamedTuple):
    """What the scheduler does."""

    phase: str
    """loading, warming, compiling (it answers, not yet at full speed), ready, asleep, stopping or failed."""
    done: int
    total: int
    """Of a phase that has parts."""
    eta_s: float | None
    detail: str
    """Why it failed; else ""."""


class Scheduler(Protocol):
    """Owns the device. Every method may be called from any thread and, but for `stop`, returns at once."""

    def start(self) -> None:
        """Load the model and begin to take jobs, in the background."""
        ...

    def stop(self, timeout: float) -> None:
        """Take no more jobs, let the running ones go on for `timeout` seconds at most, queue again what is
        left, and end.
        """
        ...

    def ended(self) -> bool:
        """Whether its threads have ended; after `stop` one may still be within a long step."""
        ...

    def submit(self, job: Job, previews: int = 0) -> Job:
        """Queue a job, or join the running one of the same `idempotency` and owner, which is returned then.
        previews: how many images of the first output on its way are wanted. Raises Busy and Stopping."""
        ...

    def watch(self, id: str) -> Watch:
        """Watch a job of this server from now on."""
        ...

    def cancel(self, id: str) -> Job | None:
        """Have a job fail with the code "cancelled", a running one after its step at the latest. None if
        there is none of that id.
        """
        ...

    def place(self, job: Job) -> Place: ...

    def poll_after_ms(self, job: Job) -> int:
        """After how many milliseconds asking again is worth while, from measured step times: 200 to 10,000."""
        ...

    def state(self) -> State: ...

    def sleep(self) -> None:
        """Let the weights leave the device once nothing runs; raises Busy while jobs run or wait."""
        ...

    def wake(self) -> None:
        """Bring them back, in the background; the next job does so too."""
        ...

    def figures(self) -> Mapping[str, Any]:
        """Numbers for /server_info: jobs queued and running, batch sizes, step seconds by tokens and batch
        size, memory.
        """
        ...


MOST_REQUEST_BYTES = 2**29
"""Bytes of images that admitted requests keep in memory; beyond it the oldest are read from their files again."""


class AdmittedRequests:
    """Requests from admission to the device, so that no image is decoded and resized twice.

    Each is stored under its job's id and taken once.
    """

    def __init__(self, most_bytes: int = MOST_REQUEST_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, id: str, request: Request) -> None:
        """Keep a request that has images; one without is cheap to make again."""
        if not (size := image_bytes(request)):
            return
        with self._lock:
            self._requests[id] = request
            self._bytes += size
            while self._bytes > self._most:
                self._bytes -= image_bytes(self._requests.popitem(last=False)[1])

    def take(self, id: str) -> Request | None:
        """Remove and return the request of a job; None where it is not kept."""
        with self._lock:
            request = self._requests.pop(id, None)
            self._bytes -= 0 if request is None else image_bytes(request)
        return request


def image_bytes(request: Request) -> int:
    """Bytes of all images in a request."""
    arrays = (*request.images, *request.originals, *(() if request.mask is None else (request.mask,)))
    return sum(array.nbytes for array in arrays)


@dataclass(frozen=True)
class Service:
    """A running server."""

    options: ServeOptions
    blueprint: Blueprint
    name: str
    """What clients call the model."""
    created: int
    """When the server started, seconds since 1970."""
    store: Store
    files: Files
    scheduler: Scheduler
    metrics: Metrics
    uploader: Uploader | None = None
    """Where outputs are brought to object storage."""
    requests: AdmittedRequests = field(default_factory=AdmittedRequests)
    """Admitted requests whose jobs wait for the device."""

    def forget(self, job: Job) -> bool:
        """Remove a job that is done, with all its files, here and in object storage. False where there is
        none any more.
        """
        if not self.store.delete(job.id):
            return False
        for id in files_of(job):
            self.files.delete(id)
        if self.uploader is not None:
            self.uploader.remove(job)
        return True
