"""The one thread that owns the device: it runs the jobs of the store side by side (`runtime.continuous`) and
has their frames saved.

A second thread keeps the jobs' leases and hears of cancelled ones while a step runs; others encode and store
what is made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from tinydiff.records import Request
from tinydiff.runtime import ambient, pipeline, preview
from tinydiff.runtime import blueprint as blueprints
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.continuous import BatchSlot, Continuous, give_memory_back, short_of_memory, sitting
from tinydiff.serve import outputs, warmup
from tinydiff.serve.events import Boards
from tinydiff.serve.files import Files
from tinydiff.serve.housekeeping import AWAY, keep, patiently, server_name
from tinydiff.serve.jobs import DONE, Busy, Failure, Job, Status, Stopping
from tinydiff.serve.metrics import Metrics
from tinydiff.serve.options import ServeOptions
from tinydiff.serve.running import UNKEPT, Making, Times, failure, has_room, next_to_start, usage
from tinydiff.serve.service import Place, State, Watch
from tinydiff.serve.storage import Uploader
from tinydiff.serve.store import CANCELLED, Store

log = logging.getLogger(__name__)

POLL = 0.25
"""Seconds between looks into the queue, which other servers may fill too."""


class Scheduler:
    """See `service.Scheduler`. `start` begins it, `stop` ends it."""

    def __init__(
        self,
        options: ServeOptions,
        blueprint: Blueprint,
        store: Store,
        files: Files,
        metrics: Metrics,
        admitted: Callable[[Job], Request],
        uploader: Uploader | None = None,
    ) -> None:
        self.options, self.blueprint, self.store, self.files, self.metrics = (
            options,
            blueprint,
            store,
            files,
            metrics,
        )
        self.admitted, self.uploader = admitted, uploader
        self.name = server_name()
        self.boards, self.loop = (
            Boards(),
            Continuous(blueprint.denoiser.family, most=options.batching_max_size),
        )
        self._model: Model | None = None
        self._colours: torch.Tensor | None = None
        self._jobs: dict[str, Making] = {}
        self._times = Times(options.batching_max_size)
        self._cancelled: set[str] = set()
        self._state = State("loading", 0, 0, None, "")
        self._asleep = self._ending = False
        self._used, self._compiled = time.monotonic(), 0
        self._savers = ThreadPoolExecutor(2, "saver")
        self._news, self._knock, self._kept = threading.Condition(), threading.Event(), threading.Event()
        told = (self.name, store, files, options, self._cancelled.update, self._kept)
        self._threads = [
            threading.Thread(target=self._own_device, name="device", daemon=True),
            threading.Thread(target=keep, args=told, name="keeper", daemon=True),
        ]

    # --- from any thread
    # --------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the model and begin to take jobs, in the background."""
        if self.uploader is not None:
            self.uploader.resume()
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, previews: int = 0) -> Job:
        if self._state.phase in ("stopping", "failed"):
            raise Stopping(self._state.detail or "the server is stopping")
        job = replace(job, answer={**job.answer, "previews": previews}) if previews else job
        if job.pinned:  # others may be made by another server, so nobody waits for them here
            job = replace(job, server=self.name, lease=time.time() + self.options.lease)
            self.boards.open(job)
        try:
            queued = self.store.add(job)
        except Exception as error:
            self.boards.drop(job.id)
            if isinstance(error, Busy):
                raise Busy(
                    self._times.until_done(job.kind, self.options.max_queue) or 5.0, error.why
                ) from None
            raise
        if queued.id != job.id:
            self.boards.drop(job.id)
        self._knock.set()
        return queued

    def watch(self, id: str) -> Watch:
        return self.boards.watch(id, lambda: self.store.get(id))

    def cancel(self, id: str) -> Job | None:
        before, job = self.store.get(id), self.store.cancel(id)
        if job is None or before is None:
            return None
        if job.status in DONE:
            if before.status not in DONE and job.started_at is None:  # else whoever made it has said so
                self.metrics.finished(job)
            self.boards.post(job)
        else:
            self._cancelled.add(id)
            self._knock.set()
        return job

    def place(self, job: Job) -> Place:
        if job.status in DONE:
            return Place(0, 0.0)
        making = self._jobs.get(job.id)
        position = self.store.position(job) if making is None else 0
        return Place(position, (making and making.eta_s) or self._times.until_done(job.kind, position + 1))

    def poll_after_ms(self, job: Job) -> int:
        eta = self.place(job).eta_s
        return 1000 if eta is None else min(10_000, max(200, int(eta * 250)))

    def state(self) -> State:
        return self._state

    def sleep(self) -> None:
        if self._jobs or self.store.counts().get("queued", 0):
            raise Busy(self._times.until_done("image", 1) or 5.0)
        self._asleep = True
        self._knock.set()

    def wake(self) -> None:
        self._asleep, self._used = False, time.monotonic()
        self._knock.set()

    def figures(self) -> Mapping[str, Any]:
        return {
            "server": self.name,
            "queued": self.store.counts().get("queued", 0),
            "running": len(self._jobs),
            "pictures_in_loop": len(self.loop.sittings),
            "step_seconds": self.loop.pace.table(),
            "job_seconds": {kind: round(seconds, 4) for kind, seconds in self._times.seconds.items()},
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }

    def stop(self, timeout: float) -> None:
        """Take no more jobs, let the running ones go on for `timeout` seconds at most, queue again what is
        left, and end.
        """
        self._say("stopping")
        until = time.monotonic() + timeout
        with self._news:
            self._news.wait_for(lambda: not self._jobs, timeout)
        self._ending = True
        self._knock.set()
        self._kept.set()
        for thread in self._threads:
            thread.join(max(2.0, until - time.monotonic()))
        self._savers.shutdown(wait=True)
        if self.uploader is not None:
            self.uploader.close(timeout)
        self.store.requeue(self.name, self.options.unfinished)
        self.boards.close(self.store.get)

    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    # --- the device's thread
    # ----------------------------------------------------------------------------------------------------------

    @ambient.plain()
    def _own_device(self) -> None:
        try:
            self._load()
            self._warm()
            self._say("compiling")
            while not self._ending:
                self._see_compiling()
                self._drop()
                self._take()
                self._let_in()
                if self.loop.sittings:
                    self._step()
                else:
                    self._idle()
        except BaseException as error:
            log.exception("the device's thread ended")
            self._say("failed", detail=f"{type(error).__name__}: {error}")
            for id in list(self._jobs):
                self._fail(id, error)

    def _say(self, phase: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        if phase == "failed" or self._state.phase not in ("stopping", "failed"):
            self._state = State(phase, done, total, None, detail)

    def _load(self) -> Model:
        """The model, brought to the device where it is not there."""
        if self._model is None:
            started = time.perf_counter()
            self._model = blueprints.load(self.blueprint)
            self._colours = preview.fit(self._model)
            seconds = time.perf_counter() - started
            self.metrics.stage("load", seconds)
            log.info("%s loaded in %.1f s", self.blueprint.row.name, seconds)
        return self._model

    def _warm(self) -> None:
        """Make what is declared, as requests are made."""
        parts = warmup.parts(self.options, self.blueprint, self.admitted)
        for i, (request, count) in enumerate(parts):
            self._say("warming", i, len(parts))
            warmup.make(self._load(), request, self.loop, count)

    def _see_compiling(self) -> None:
        """Until what was made to warm up is compiled the server is not ready, though it answers."""
        done, total = self.loop.background.progress()
        self.metrics.recompiled(done - self._compiled)
        self._compiled = done
        if self._state.phase == "compiling":
            self._say("ready" if done == total else "compiling", done, total)

    def _take(self) -> None:
        """Take jobs as long as there is room for them on the device."""
        while self._state.phase in ("compiling", "ready") and not self._asleep and self._room():
            job = patiently(lambda: self.store.take(self.name, time.time() + self.options.lease), self._kept)
            if job is None:
                return
            if not self._jobs and self.options.batching_delay_ms:
                self._kept.wait(self.options.batching_delay_ms / 1000)  # for others that come with it
            self._used = time.monotonic()
            self.boards.open(job)
            try:
                request, model = (
                    self.admitted(job),
                    self._load(),
                )  # once more: another server may have taken it in
                started = time.perf_counter()
                conditioning = pipeline.condition(model, request)
            except Exception as error:
                self._note(job, "failed", error=failure(error))
                if short_of_memory(error):
                    give_memory_back()
                continue
            making = Making(job, request, conditioning, usage(model, request), job.answer.get("previews", 0))
            making.spent("encode", time.perf_counter() - started)
            self.metrics.stage("encode", making.seconds["encode"])
            self._jobs[job.id] = making
            self.boards.post(job, 0, making.total)

    def _room(self) -> bool:
        return has_room(self._jobs.values(), self.loop.sittings, self.options.batching_max_size)

    def _let_in(self) -> None:
        """Begin images while there are seats."""
        most = self.options.batching_max_size
        while (making := next_to_start(self._jobs.values(), self.loop.sittings, most)) is not None:
            index, job, started = making.waiting.popleft(), making.job, time.perf_counter()
            looks = 0 if index else making.previews
            try:
                asked = self._load(), making.request, making.conditioning
                self.loop.add(sitting(*asked, job.id, index, job.priority, looks, job.owner))
                making.spent("denoise", time.perf_counter() - started)
            except Exception as error:
                self._fail(job.id, error)

    def _drop(self) -> None:
        """End what was cancelled, and take images of jobs that ended out of the loop."""
        while self._cancelled:
            self._end(self._cancelled.pop(), CANCELLED)
        for owner in {one.owner for one in self.loop.sittings} - self._jobs.keys():
            self.loop.leave(owner)

    def _step(self) -> None:
        stepped = self.loop.step()
        self._used = time.monotonic()
        if stepped.error is not None:
            self._fail(stepped.sittings[0].owner, stepped.error)
            return
        count = len(stepped.sittings)
        if stepped.made:
            self.metrics.steps(stepped.made, count, stepped.seconds / stepped.made)
        for one in stepped.sittings:
            if (making := self._jobs.get(one.owner)) is not None:
                making.spent("denoise", stepped.seconds / count)
                making.steps += stepped.made
                self._tell(making, one)
        for one in stepped.done:
            if (making := self._jobs.get(one.owner)) is not None:
                self._finish(making, one)

    def _tell(self, making: Making, one: BatchSlot) -> None:
        """Say how far a job is, and show its first image at even distances where that was wanted."""
        pictures = []
        if making.previews and one.index == 0:
            clean, at = self.loop.clean(one)
            due = at * (making.previews + 1) // making.conditioning.rows.steps
            if not one.seat.done and due > self.boards.previewed(making.job.id) and self._colours is not None:
                latents = making.conditioning.prepared.unpack(one.shown(clean))
                pictures.append(
                    preview.picture(self._colours, latents, making.request.height, making.request.width)
                )
        percent = min(99, 100 * making.steps // making.total)
        if percent >= making.job.progress + 5:
            making.job = replace(making.job, progress=percent)
            with suppress(*AWAY):
                self.store.progress(making.job.id, self.name, percent)
        self.boards.post(making.job, making.steps, making.total, pictures)

    def _finish(self, making: Making, one: BatchSlot) -> None:
        """Decode an image and hand it on to be stored."""
        started = time.perf_counter()
        try:
            model = self._load()
            frames, _ = pipeline.finish(
                model, making.request, making.conditioning, one.shown(one.seat.state.x)
            )
        except Exception as error:
            self._fail(making.job.id, error)
            return
        seconds = time.perf_counter() - started
        making.spent("decode", seconds)
        self.metrics.stage("decode", seconds)
        conditioning = making.conditioning
        told = pipeline.parameters(
            model, making.request, conditioning.prepared.revised, conditioning.warnings
        )
        self._savers.submit(self._save, making, one.index, frames, told)

    def _idle(self) -> None:
        """Wait for work. The weights leave the device when asked to, or when nothing came for long, and come
        back with the next job.
        """
        unused = self.options.idle_unload and time.monotonic() - self._used > self.options.idle_unload
        if self._model is not None and not self._jobs and (self._asleep or unused):
            self._model = self._colours = None
            give_memory_back()
            log.info("the model left the device")
        if self._asleep:
            self._say("asleep")
            self._asleep = not (patiently(self.store.counts, self._kept) or {}).get("queued", 0)
        if not self._asleep and self._state.phase == "asleep":
            self._say("loading")
            self._load()
            self._say("compiling")
        self._knock.wait(POLL)
        self._knock.clear()  # before the queue is looked at, so that what comes then knocks again

    # --- the threads that store
    # -------------------------------------------------------------------------------------------------------

    def _save(self, making: Making, index: int, frames: Any, told: Mapping[str, Any]) -> None:
        """Encode and store an output; the last one completes the job."""
        started = time.perf_counter()
        try:
            made = outputs.save(
                making.job, making.request, self.files, frames, making.request.seeds[index], told
            )
        except Exception as error:
            self._fail(making.job.id, error)
            return
        with self._news:
            making.spent("save", time.perf_counter() - started)
            making.saved[index] = made
            going, complete = making.job.id in self._jobs, len(making.saved) == len(making.request.seeds)
            if going and complete:
                del self._jobs[making.job.id]
        if not going:
            outputs.remove(made, self.files)
        elif complete:
            self._complete(making, told)

    def _complete(self, making: Making, told: Mapping[str, Any]) -> None:
        job, files = making.job, making.files
        self._times.took(job.kind, time.monotonic() - making.taken)
        self.metrics.stage("save", making.seconds["save"])
        until = time.time() + self.options.output_lifetime
        if not self._note(job, "completed", outputs=files, result=making.result(told), expires_at=until):
            outputs.remove(files, self.files)
        elif self.uploader is not None:
            for output in files:
                self.uploader.add(job.id, output)

    def _fail(self, id: str, error: BaseException) -> None:
        self._end(id, failure(error))
        if short_of_memory(error):
            give_memory_back()

    def _end(self, id: str, why: Failure) -> None:
        """A job fails, unless it ended before: who takes it out of `_jobs` ends it, and nobody else."""
        with self._news:
            making = self._jobs.pop(id, None)
        if making is not None:
            self._note(making.job, "failed", error=why)
            outputs.remove(making.files, self.files)

    def _note(self, job: Job, status: Status, **made: Any) -> bool:
        """Write down how a job ended, and tell whoever waits; whether it was still to be ended."""

        def unkept() -> None:
            if job.pinned:  # its client waits for an answer, not for a disk
                self.boards.post(replace(job, status="failed", error=UNKEPT))

        finished = patiently(lambda: self.store.finish(job.id, self.name, status, **made), self._kept, unkept)
        now = patiently(lambda: self.store.get(job.id), self._kept) or replace(
            job, status="failed", error=CANCELLED
        )  # deleted meanwhile
        self.metrics.finished(now)
        self.boards.post(now)
        with self._news:
            self._news.notify_all()
        return bool(finished)
