"""A server around a scheduler that makes plain images and videos, for tests of everything around the model.

made = service(tmp_path, api_key=("k",))       # a Service over a real store and real files; options are
                                               # fields of ServeOptions
made.scheduler.steps, .step_seconds            # how long a job takes
made.scheduler.fail = lambda job: Failure(...) # or None; called once per job, before its first step
made.scheduler.gate.clear() ... .set()         # holds every job before its first step
made.scheduler.busy = 3.0; .stopping = True    # what `submit` then raises
made.scheduler.submitted                       # every queued job, in order (joined ones are not)
made.scheduler.watched                         # the job's id, once for each client that waited
made.scheduler.close()                         # ends its thread and raises what went wrong in it

with listening(made) as url: ...               # its app in a real server; the end closes the scheduler
"""

from __future__ import annotations

import io
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from tinydiff.config import ModelOptions
from tinydiff.io.images import encode_image
from tinydiff.io.video import write_video
from tinydiff.serve.adapters import Adapters
from tinydiff.serve.admission import admitted
from tinydiff.serve.app import make_app
from tinydiff.serve.connections import Limits, Server
from tinydiff.serve.files import Files
from tinydiff.serve.guard import Guard
from tinydiff.serve.jobs import Busy, Failure, Job, Output, Stopping
from tinydiff.serve.metrics import Metrics
from tinydiff.serve.options import ServeOptions
from tinydiff.serve.service import JobUpdate, QueuePlace, ServedModel, Service, State
from tinydiff.serve.store import open_store

SERVER = "fake"

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 4.0}
"""A scheduler that can start in between, as models that start from an image have."""


@cache
def blueprint():
    from tinydiff.runtime.blueprint import read

    return read(ModelOptions())


def service(folder: Path, row: dict[str, Any] | None = None, **options: Any) -> Service:
    """A server of the shipped model whose jobs lie in `directory`. row: fields of its registry row to change,
    such as image_use.
    """
    chosen = ServeOptions(**{"state_dir": str(folder), **options})
    store = open_store(folder, None, chosen.max_queue, chosen.output_lifetime, chosen.several_keys)
    files = Files(folder / "files", b"secret", chosen.output_lifetime, int(chosen.output_limit * 1e9))
    plan = replace(
        blueprint(),
        row=replace(blueprint().row, **(row or {})),
        scheduler=EULER if row else blueprint().scheduler,
    )
    name = chosen.served_model_name or plan.row.name
    scheduler: Any = FakeScheduler(store, files)
    model = ServedModel(name, plan, Adapters(plan, chosen.lora_dir))
    made = Service(chosen, (model,), model, int(time.time()), store, files, scheduler, Metrics())
    made.scheduler.service = made  # pyright: ignore
    return made


@contextmanager
def listening(made: Service, **limited: Any) -> Iterator[str]:
    """The service's app in a real server, which ends with the block; its URL, http://host:port. limited:
    other `Limits`.
    """
    limits = {"body": int(made.options.max_body * 1e6), "wants_body": Guard(made).wants_body, **limited}
    with running(make_app(made), made.scheduler.close, **limits) as url:  # pyright: ignore
        yield url


@contextmanager
def running(app: Any, end: Callable[[], None] = lambda: None, **limited: Any) -> Iterator[str]:
    """A WSGI app in our server; its URL. end: called before the server ends. limited: fields of `Limits`."""
    sock = socket.create_server(("127.0.0.1", 0))
    values = {"threads": 8, "body": 10**6, "connections": 100, "wants_body": lambda *_: True, **limited}
    server = Server(app, sock, Limits(**values), "127.0.0.1")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        try:
            end()
        finally:
            server.hang_up()
            thread.join(5)
            assert not thread.is_alive(), "the server does not end"


class FakeScheduler:
    """Keeps the contract of `service.Scheduler`; one thread makes one job after another."""

    service: Service

    def __init__(self, store: Any, files: Any) -> None:
        self.store, self.files = store, files
        self.steps, self.step_seconds = 3, 0.002
        self.fail = lambda job: None
        self.gate = threading.Event()
        self.gate.set()
        self.busy: float | None = None
        self.stopping = False
        self.phase = "ready"
        self.submitted: list[Job] = []
        self.watched: list[str] = []
        self.changed = threading.Condition()
        self.done: dict[str, int] = {}
        self.previews: dict[str, list[numpy.ndarray]] = {}
        self.wanted: dict[str, int] = {}
        self.closed = False
        self.trouble: Exception | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises where the thread has died, so that no client waits for a job that nobody makes."""
        if self.trouble is not None:
            raise RuntimeError("the thread of the fake scheduler died") from self.trouble

    def submit(self, job: Job, previews: int = 0) -> Job:
        self.check()
        if self.stopping:
            raise Stopping
        if self.busy is not None:
            raise Busy(self.busy)
        self.wanted[job.id] = previews
        queued = self.store.add(replace(job, server=SERVER) if job.pinned else job)
        if queued.id == job.id:
            self.submitted.append(queued)
        with self.changed:
            self.changed.notify_all()
        return queued

    def watch(self, id: str) -> FakeWatch:
        self.watched.append(id)
        return FakeWatch(self, id)

    def cancel(self, id: str) -> Job | None:
        job = self.store.cancel(id)
        with self.changed:
            self.changed.notify_all()
        return job

    def place(self, job: Job) -> QueuePlace:
        return QueuePlace(self.store.position(job), 1.5)

    def poll_after_ms(self, job: Job) -> int:
        self.check()
        return 200

    def state(self) -> State:
        return State(
            self.phase, 0 if self.phase != "ready" else 1, 1, None if self.phase == "ready" else 2.0, ""
        )

    def loaded(self) -> frozenset[str]:
        awake = self.phase != "asleep"
        return frozenset(model.name for model in self.service.models if awake)

    def sleep(self) -> None:
        if any(self.store.counts().get(status) for status in ("queued", "in_progress")):
            raise Busy(1.0)
        self.phase = "asleep"

    def wake(self) -> None:
        self.phase = "ready"

    def figures(self) -> dict[str, Any]:
        counts = self.store.counts()
        return {
            "queued": counts.get("queued", 0),
            "running": counts.get("in_progress", 0),
            "batch_sizes": {1: len(self.submitted)},
        }

    def close(self) -> None:
        self.closed = True
        self.gate.set()
        with self.changed:
            self.changed.notify_all()
        self.thread.join(30)
        assert not self.thread.is_alive(), "the thread of the fake scheduler does not end"
        self.store.close()
        self.check()

    def _work(self) -> None:
        try:
            while not self.closed:
                self._next()
        except Exception as error:  # kept: `check` raises it in whatever the test does next
            self.trouble = error
        with self.changed:
            self.changed.notify_all()

    def _next(self) -> None:
        job = self.store.take(SERVER, time.time() + 60)
        if job is None:
            with self.changed:
                self.changed.wait(0.05)
            return
        try:
            self._make(job)
        except Exception as error:  # a test shall see it, not wait for ever
            self.store.finish(job.id, SERVER, "failed", error=Failure("server_error", repr(error)))
        with self.changed:
            self.changed.notify_all()

    def _make(self, job: Job) -> None:
        while not self.gate.wait(0.01) and not self._cancelled(job):
            pass
        if (failure := self.fail(job)) is not None:
            self.store.finish(job.id, SERVER, "failed", error=failure)
            return
        request = self.service.requests.take(job.id) or admit(self.service, job)
        begun = time.perf_counter()
        wanted = self.wanted.get(job.id, 0)
        for step in range(self.steps):
            if self._cancelled(job):
                self.store.finish(
                    job.id, SERVER, "failed", error=Failure("cancelled", "the job was cancelled")
                )
                return
            time.sleep(self.step_seconds)
            self.store.progress(job.id, SERVER, 100 * (step + 1) // (self.steps + 1))
            with self.changed:
                self.done[job.id] = step + 1
                if step < wanted:
                    shade = numpy.full(
                        (request.output.height, request.output.width, 3), 40 * step, numpy.uint8
                    )
                    self.previews.setdefault(job.id, []).append(shade)
                self.changed.notify_all()
        outputs = [output for seed in request.seeds for output in self._outputs(job, request, seed)]
        result = {
            "parameters": {
                "prompt": request.text.prompt,
                "height": request.output.height,
                "width": request.output.width,
                "num_inference_steps": self.steps,
            },
            "seeds": list(request.seeds),
            "seconds": {"denoise": time.perf_counter() - begun},
            "computed_steps": self.steps * len(request.seeds),
            "skipped_steps": 0,
        }
        expires = time.time() + self.service.options.output_lifetime
        self.store.finish(
            job.id, SERVER, "completed", outputs=tuple(outputs), result=result, expires_at=expires
        )

    def _cancelled(self, job: Job) -> bool:
        return self.closed or job.id in self.store.cancelled(SERVER)

    def _outputs(self, job: Job, request: Any, seed: int) -> list[Output]:
        colour = numpy.array([seed * 37 % 256, seed * 91 % 256, 120], numpy.uint8)
        frames = numpy.broadcast_to(
            colour, (request.output.num_frames, request.output.height, request.output.width, 3)
        ).copy()
        if job.kind == "image":
            format = job.answer.get("output_format", "png")
            return [self._kept(job, encode_image(frames[0], f".{format}"), f"image/{format}", seed)]
        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / "clip.mp4", frames, ".mp4", request.output.fps, None, "ultrafast", {})
            clip = (Path(folder) / "clip.mp4").read_bytes()
        small = encode_image(frames[0], ".webp")
        return [
            self._kept(job, clip, "video/mp4", seed),
            self._kept(job, small, "image/webp", seed, "thumbnail"),
            self._kept(job, small, "image/webp", seed, "spritesheet"),
        ]

    def _kept(self, job: Job, data: bytes, media_type: str, seed: int, variant: str = "content") -> Output:
        return Output(
            self.files.put(data, media_type, "made", job.owner), media_type, len(data), seed, variant
        )


class FakeWatch:
    """Tells what changed since it was asked last."""

    def __init__(self, scheduler: FakeScheduler, id: str) -> None:
        self.scheduler, self.id = scheduler, id
        self.seen: tuple[Any, ...] = ()
        self.shown = 0

    def next(self, timeout: float) -> JobUpdate | None:
        end = time.monotonic() + timeout
        while True:
            self.scheduler.check()
            job = self.scheduler.store.get(self.id)
            with self.scheduler.changed:
                done = self.scheduler.done.get(self.id, 0)
                previews = tuple(self.scheduler.previews.get(self.id, ())[self.shown :])
                if (now := (job.status, done)) != self.seen or previews:
                    self.seen, self.shown = now, self.shown + len(previews)
                    return JobUpdate(job, done, self.scheduler.steps, previews)
                if (left := end - time.monotonic()) <= 0:
                    return None
                self.scheduler.changed.wait(min(left, 0.02))

    def __enter__(self) -> FakeWatch:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def admit(made: Service, job: Job) -> Any:
    """The request of a job, admitted again from its fields and files."""
    return admitted(made.adapters, made.files, made.options, job)


def picture(
    width: int = 128,
    height: int = 128,
    colour: str | tuple[int, ...] = "red",
    format: str = "PNG",
    mode: str = "RGB",
) -> bytes:
    """The bytes of a plain image."""
    out = io.BytesIO()
    Image.new(mode, (width, height), colour).save(out, format)
    return out.getvalue()


def form(*parts: tuple[str, str | bytes]) -> bytes:
    """The body of multipart/form-data; boundary=B: (name, text or bytes of a file)."""
    lines = []
    for name, value in parts:
        named = f'Content-Disposition: form-data; name="{name}"'.encode()
        file = (
            b'; filename="upload"\r\nContent-Type: application/octet-stream'
            if isinstance(value, bytes)
            else b""
        )
        lines += [b"--B", named + file, b"", value if isinstance(value, bytes) else value.encode()]
    return b"\r\n".join([*lines, b"--B--", b""])


def eventually(check: Callable[[], object]) -> None:
    """Wait until `check` is true, for 10 seconds at most."""
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.005)
