"""The parts of a running server that HTTP resources use, and the interface of its scheduler."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tinydiff.records import UserError, brief, nearest
from tinydiff.serve.jobs import Job, files_of
from tinydiff.serve.options import ServeOptions

if TYPE_CHECKING:
    import numpy

    from tinydiff.records import Request
    from tinydiff.runtime.blueprint import Blueprint
    from tinydiff.serve.adapters import Adapters
    from tinydiff.serve.files import Files
    from tinydiff.serve.metrics import Metrics
    from tinydiff.serve.storage import Uploader
    from tinydiff.serve.store import Store


class JobUpdate(NamedTuple):
    """What changed in a job since the last update."""

    job: Job
    """The job as it is now; an update with `job.status in DONE` is the last."""
    done: int
    """Denoising steps done, over all outputs."""
    total: int
    """Denoising steps of all outputs."""
    previews: tuple[numpy.ndarray, ...]
    """New previews of the first output, uint8 [H, W, 3], oldest first; made only where `submit` asked."""


class Watch(Protocol):
    """A client's view of a job. Use it as a context manager."""

    def next(self, timeout: float) -> JobUpdate | None:
        """The next update, as soon as there is one; None after `timeout` seconds without."""
        ...

    def __enter__(self) -> Watch: ...

    def __exit__(self, *_: object) -> None: ...


class QueuePlace(NamedTuple):
    """The place of a job in the queue."""

    position: int
    """Jobs before it; 0 for the next job and for a running one."""
    eta_s: float | None
    """Seconds until the job is done, from measured times; None before anything was measured."""


class State(NamedTuple):
    """The state of the scheduler."""

    phase: str
    """loading, warming, compiling, ready, asleep, stopping or failed.

    While compiling the server answers requests, but not yet at full speed.
    """
    done: int
    """Parts of the phase that are done; 0 for a phase without parts."""
    total: int
    """Parts of the phase; 0 for a phase without parts."""
    eta_s: float | None
    """Seconds until the server is ready; None where that is unknown."""
    detail: str
    """Why the scheduler failed; else empty."""


class Scheduler(Protocol):
    """Owns the device. Any thread may call any method; every method but `stop` returns at once."""

    def start(self) -> None:
        """Load the model and begin to take jobs, in the background."""
        ...

    def stop(self, timeout: float) -> None:
        """Take no new jobs, wait up to `timeout` seconds for running ones, queue the rest again, end."""
        ...

    def ended(self) -> bool:
        """Whether all threads have ended. After `stop` one may still be in a long step."""
        ...

    def submit(self, job: Job, previews: int = 0) -> Job:
        """Queue a job and return it, or return the unfinished job with its owner and `idempotency`.

        previews: how many previews of the first output are wanted. Raises Busy and Stopping.
        """
        ...

    def watch(self, id: str) -> Watch:
        """Watch a job from now on."""
        ...

    def cancel(self, id: str) -> Job | None:
        """Let a job fail with the code "cancelled"; a running job ends after its current step.

        Returns the job, None where there is none with this id.
        """
        ...

    def place(self, job: Job) -> QueuePlace:
        """The place of a job in the queue."""
        ...

    def poll_after_ms(self, job: Job) -> int:
        """Milliseconds that a client should wait before it asks again, from 200 to 10,000."""
        ...

    def state(self) -> State:
        """The phase of the scheduler and its progress."""
        ...

    def loaded(self) -> frozenset[str]:
        """The names of the models that are on the device."""
        ...

    def sleep(self) -> None:
        """Unload the weights from the device. Raises Busy while jobs run or wait."""
        ...

    def wake(self) -> None:
        """Load the weights again, in the background; the next job does so too."""
        ...

    def figures(self) -> Mapping[str, Any]:
        """Measurements for /server_info: jobs queued and running, step seconds by batch size, memory."""
        ...


MOST_REQUEST_BYTES = 2**29
"""Bytes of images in admitted requests; beyond it the oldest requests are read from their files again."""


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
    """Bytes of all images and of the sound in a request."""
    arrays = (
        *request.images.resized,
        *request.images.originals,
        *(() if request.images.mask is None else (request.images.mask,)),
        *(() if request.speech is None else (request.speech.samples, request.speech.sound.samples)),
    )
    return sum(array.nbytes for array in arrays)


@dataclass(frozen=True)
class ServedModel:
    """A model of a server. name: that for clients."""

    name: str
    blueprint: Blueprint
    adapters: Adapters


def find(models: Sequence[ServedModel], name: str) -> ServedModel:
    """The model with this name: its own or its released one; "" is the first. Raises UserError."""
    if not name:
        return models[0]
    own = [model for model in models if model.name == name]
    released = [model for model in models if model.blueprint.row.name == name]
    if not own and len(released) != 1:  # of two of one release the name says nothing
        names = [model.name for model in models]
        hint = nearest(name, [*names, *(model.blueprint.row.name for model in models)])
        message = f"this server does not serve {brief(name)}; it serves {', '.join(map(repr, names))}{hint}"
        raise UserError("model", f"model: {message}")
    return (own or released)[0]


@dataclass(frozen=True)
class Service:
    """A running server, seen as that of one of its models, by default of the first."""

    options: ServeOptions
    models: tuple[ServedModel, ...]
    model: ServedModel
    """The model that this view is of."""
    created: int
    """When the server started, in seconds since 1970."""
    store: Store
    files: Files
    scheduler: Scheduler
    metrics: Metrics
    uploader: Uploader | None = None
    """Uploads outputs to object storage; None where none is configured."""
    requests: AdmittedRequests = field(default_factory=AdmittedRequests)
    """Admitted requests whose jobs wait for the device."""

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.model.name

    @property
    def blueprint(self) -> Blueprint:
        return self.model.blueprint

    @property
    def adapters(self) -> Adapters:
        return self.model.adapters

    def of(self, name: str) -> Service:
        """The server as that of the model with this name: its own or its released one; "" is the first.

        Raises UserError.
        """
        return replace(self, model=find(self.models, name))

    def forget(self, job: Job) -> bool:
        """Remove a finished job and all its files, here and in object storage. False where it is gone."""
        if not self.store.delete(job.id):
            return False
        for id in files_of(job):
            self.files.delete(id)
        if self.uploader is not None:
            self.uploader.remove(job)
        return True
