"""The scheduler: one thread that owns the device and runs the jobs of the store, batched step by step.

A second thread does the housekeeping of jobs while a step runs; a pool of threads encodes and stores outputs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from tinydiff.config import NoProgress
from tinydiff.parallel.ranks import Ranks
from tinydiff.records import Frames, Request, Sound
from tinydiff.runtime import fit, postprocess, torch_state
from tinydiff.runtime.clock import Clock
from tinydiff.runtime.continuous import BatchSlot
from tinydiff.runtime.shortage import short_of_memory
from tinydiff.serve import housekeeping, outputs, warmup
from tinydiff.serve.events import Events
from tinydiff.serve.files import Files
from tinydiff.serve.housekeeping import STORE_ERRORS, retried, server_name
from tinydiff.serve.jobs import DONE, Busy, Failure, Job, Status, Stopping, Turn
from tinydiff.serve.loading import Loading
from tinydiff.serve.metrics import Metrics
from tinydiff.serve.options import ServeOptions
from tinydiff.serve.running import (
    NOT_STORED,
    JobTimes,
    RunningJob,
    failure,
    has_room,
    next_to_start,
    usage,
)
from tinydiff.serve.service import QueuePlace, ServedModel, State, Watch, find
from tinydiff.serve.storage import Uploader
from tinydiff.serve.store import CANCELLED, Store

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Seconds between reads of the queue, which other servers may fill too."""


class DeviceScheduler:
    """The scheduler of a server with one device. `service.Scheduler` describes its methods."""

    def __init__(
        self,
        options: ServeOptions,
        models: Sequence[ServedModel],
        store: Store,
        files: Files,
        metrics: Metrics,
        request_of: Callable[[Job], Request],
        uploader: Uploader | None = None,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """request_of: a job's admitted request; raises UserError. uploader: gets finished outputs. ranks:
        this rank, which leads, among several. clock: in seconds, for idle_unload.
        """
        self.options, self.models, self.metrics = options, models, metrics
        self.store, self.files, self.uploader = store, files, uploader
        self.request_of = request_of
        self.name = server_name()
        self.events = Events()
        self.loading = Loading(options, models, metrics, ranks, clock)
        self.device = self.loading.device
        self._turn = Turn("", 0.0)
        self._jobs: dict[str, RunningJob] = {}
        self._times = JobTimes(options.batching_max_size)
        self._cancelled: set[str] = set()
        self._short: list[str] = []
        """Jobs that ran out of memory."""
        self._state = State("loading", 0, 0, None, "")
        self._ending, self._compiled = False, 0
        self._savers = ThreadPoolExecutor(2, "saver")
        self._job_ended = threading.Condition()
        self._wake_up, self._closing = threading.Event(), threading.Event()
        duties = (self.name, store, files, options, self._cancelled.update, self._closing)
        self._threads = [
            threading.Thread(target=self._device_loop, name="device", daemon=True),
            threading.Thread(target=housekeeping.run, args=duties, name="housekeeping", daemon=True),
        ]

    # --- any thread ---

    def start(self) -> None:
        if self.uploader is not None:
            self.uploader.resume()
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, previews: int = 0) -> Job:
        if self._state.phase in ("stopping", "failed"):
            raise Stopping(self._state.detail or "the server is stopping")
        job = replace(job, answer={**job.answer, "previews": previews}) if previews else job
        if job.pinned:  # no client waits here for another job, which another server may run
            job = replace(job, server=self.name, lease=time.time() + self.options.lease)
            self.events.open(job)
        try:
            queued = self.store.add(job)
        except Exception as error:
            self.events.drop(job.id)
            if isinstance(error, Busy):
                seconds = self._times.until_done(job.kind, self.options.max_queue) or 5.0
                raise Busy(seconds, error.why) from None
            raise
        if queued.id != job.id:
            self.events.drop(job.id)
        self._wake_up.set()
        return queued

    def watch(self, id: str) -> Watch:
        return self.events.watch(id, lambda: self.store.get(id))

    def cancel(self, id: str) -> Job | None:
        before, job = self.store.get(id), self.store.cancel(id)
        if job is None or before is None:
            return None
        if job.status in DONE:
            never_ran = before.status not in DONE and job.started_at is None
            if never_ran:  # else the server that ran it has counted it
                self.metrics.finished(job)
            self.events.publish(job)
        else:
            self._cancelled.add(id)
            self._wake_up.set()
        return job

    def place(self, job: Job) -> QueuePlace:
        if job.status in DONE:
            return QueuePlace(0, 0.0)
        running = self._jobs.get(job.id)
        position = self.store.position(job) if running is None else 0
        eta_s = running and running.eta_s
        return QueuePlace(position, eta_s or self._times.until_done(job.kind, position + 1))

    def poll_after_ms(self, job: Job) -> int:
        eta = self.place(job).eta_s
        return 1000 if eta is None else min(10_000, max(200, int(eta * 250)))

    def state(self) -> State:
        idle = self._state.phase == "ready" and not self.device.loaded_names()
        return self._state._replace(phase="asleep") if idle else self._state

    def loaded(self) -> frozenset[str]:
        return self.device.loaded_names()

    def sleep(self) -> None:
        if self._jobs or self.store.counts().get("queued", 0):
            raise Busy(self._times.until_done("image", 1) or 5.0)
        self.loading.asleep = True
        self._wake_up.set()

    def wake(self) -> None:
        self.loading.asleep = False
        self.loading.used()
        self._wake_up.set()

    def figures(self) -> Mapping[str, Any]:
        return {
            "server": self.name,
            "queued": self.store.counts().get("queued", 0),
            "running": len(self._jobs),
            "pictures_in_loop": len(self.device.loop.slots),
            "step_seconds": self.device.loop.step_times.table(),
            "job_seconds": {kind: round(seconds, 4) for kind, seconds in self._times.seconds.items()},
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }

    def stop(self, timeout: float) -> None:
        self._set_phase("stopping")
        until = time.monotonic() + timeout
        with self._job_ended:
            self._job_ended.wait_for(lambda: not self._jobs, timeout)
        self._ending = True
        self._wake_up.set()
        self._closing.set()
        for thread in self._threads:
            thread.join(max(2.0, until - time.monotonic()))
        self._savers.shutdown(wait=True)
        if self.uploader is not None:
            self.uploader.close(timeout)
        self.store.requeue(self.name, self.options.unfinished)
        self.events.close(self.store.get)

    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    # --- the thread of the device ---

    @torch_state.default_torch_state()
    def _device_loop(self) -> None:
        try:
            self._warm_up()
            self._set_phase("compiling")
            while not self._ending:
                self._check_compiling()
                self._remove_ended()
                self._begin_again()
                self._take_jobs()
                self._start_images()
                if self.device.loop.slots:
                    self._step()
                else:
                    self._idle()
                if self.device.failure is not None:
                    raise self.device.failure
        except BaseException as error:
            log.exception("the thread of the device ended")
            self._set_phase("failed", detail=f"{type(error).__name__}: {error}")
            for id in list(self._jobs):
                self._fail(id, error)
        finally:
            self.device.close()

    def _set_phase(self, phase: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        if phase == "failed" or self._state.phase not in ("stopping", "failed"):
            self._state = State(phase, done, total, None, detail)

    def _warm_up(self) -> None:
        """Load each model, the first one last, and run the declared warm-up requests."""
        for model in reversed(self.models):
            self.loading.load(model.name)
            batches = warmup.batches(self.options, model, self.request_of)
            for i, (request, count) in enumerate(batches):
                self._set_phase("warming", i, len(batches))
                warmup.make(self.device, request, count)

    def _check_compiling(self) -> None:
        """Count finished compilations. The server is ready once those of the warm-up are done."""
        done, total = self.device.loop.background.progress()
        self.metrics.recompiled(done - self._compiled)
        self._compiled = done
        if self._state.phase == "compiling":
            self._set_phase("ready" if done == total else "compiling", done, total)

    def _take_jobs(self) -> None:
        """Take jobs from the queue while the device has room."""
        able = self._state.phase in ("compiling", "ready") and not self.loading.asleep
        while able and not self._short and self._room():
            job = retried(self._next_job, self._closing)
            if job is None:
                return
            if not self._jobs and self.options.batching_delay_ms:
                # Wait for requests that come together.
                self._closing.wait(self.options.batching_delay_ms / 1000)
            self.loading.used()
            self.events.open(job)
            try:
                request = self.request_of(job)
                model = self.loading.load(find(self.models, job.model).name)
                tokens = usage(model, request)
            except Exception as error:
                self._record(job, "failed", error=failure(error))
                continue
            del model  # so that it can leave
            self._jobs[job.id] = RunningJob(job, request, tokens, job.answer.get("previews", 0))
            self._condition(self._jobs[job.id])

    def _condition(self, running: RunningJob) -> None:
        """Run the encoders for a job. Its outputs that are not decoded can then be started."""
        started = time.perf_counter()
        try:
            conditioning = self.device.condition(running.job.id, running.request)
            running.request = conditioning.settled(running.request)
            running.begin(conditioning.steps)
        except Exception as error:
            self._on_error(running.job.id, error)
            return
        seconds = time.perf_counter() - started
        running.spent("encode", seconds)
        self.metrics.stage("encode", seconds)
        self.events.publish(running.job, running.steps, running.total)

    def _on_error(self, id: str, error: Exception) -> None:
        """Let a job fail, or note that it is out of memory: it begins again once nothing holds tensors."""
        if short_of_memory(error):
            self._short.append(id)
        else:
            self._fail(id, error)

    def _begin_again(self) -> None:
        """Begin again with the jobs that ran out of memory, where something can leave the device for them."""
        short, self._short, has_more = self._short, [], False
        for running in [self._jobs[id] for id in short if id in self._jobs]:
            self.device.remove(running.job.id)
            has_more = has_more or self.loading.make_room(running.request)
            if not has_more:
                self._fail(running.job.id, MemoryError())
        there = self.device.jobs()
        for running in [each for each in list(self._jobs.values()) if each.unmade]:
            if running.job.id not in there:
                self._condition(running)

    def _next_job(self) -> Job | None:
        """The next job from the queue. While images of a model are to be made it is of that model, whose turn
        ends when the others have waited for all that came before it began.
        """
        lease = time.time() + self.options.lease
        if self.device.loop.slots or any(running.waiting for running in list(self._jobs.values())):
            return self.store.take(self.name, lease, self._turn)
        job = self.store.take(self.name, lease)
        if job is not None:
            self._turn = Turn(job.model, time.time())
        return job

    def _room(self) -> bool:
        return has_room(self._jobs.values(), self.device.loop.slots, self.options.batching_max_size)

    def _start_images(self) -> None:
        """Start images while the loop has slots."""
        most = self.options.batching_max_size
        while (running := next_to_start(self._jobs.values(), self.device.loop.slots, most)) is not None:
            index, job, started = running.waiting.popleft(), running.job, time.perf_counter()
            previews = 0 if index else running.previews
            try:
                self.loading.load()
                self.device.start(job.id, index, job.priority, previews, job.owner)
                running.spent("denoise", time.perf_counter() - started)
            except Exception as error:
                self._on_error(job.id, error)

    def _remove_ended(self) -> None:
        """End cancelled jobs, and remove the images of ended jobs from the loop."""
        while self._cancelled:
            self._end_job(self._cancelled.pop(), CANCELLED)
        for job in self.device.jobs() - self._jobs.keys():
            self.device.remove(job)

    def _step(self) -> None:
        result = self.device.step()
        self.loading.used()
        if result.error is not None:
            self._on_error(result.slots[0].job, result.error)
            return
        count = len(result.slots)
        if result.steps:
            self.metrics.steps(result.steps, count, result.seconds / result.steps)
        for slot in result.slots:
            if (running := self._jobs.get(slot.job)) is not None:
                running.spent("denoise", result.seconds / count)
                running.steps += result.steps
                self._publish_progress(running, slot)
        for slot in result.done:
            if (running := self._jobs.get(slot.job)) is not None:
                self._finish(running, slot)

    def _publish_progress(self, running: RunningJob, slot: BatchSlot) -> None:
        """Publish a job's progress, and previews of its first image at even distances where it wants them."""
        previews = []
        if running.previews and slot.index == 0 and self.device.has_previews:
            due = self.device.loop.steps_done(slot) * (running.previews + 1) // running.steps_each
            is_new = not slot.denoising.done and due > self.events.preview_count(running.job.id)
            if is_new:
                previews.append(self.device.preview(running.job.id))
        percent = min(99, 100 * running.steps // running.total)
        if percent >= running.job.progress + 5:
            running.job = replace(running.job, progress=percent)
            with suppress(*STORE_ERRORS):
                self.store.progress(running.job.id, self.name, percent)
        self.events.publish(running.job, running.steps, running.total, previews)

    def _finish(self, running: RunningJob, slot: BatchSlot) -> None:
        """Decode an image and let a saver thread store it. What is still to be made is stored here."""
        started = time.perf_counter()
        try:
            output_made, parameters = self.device.finish(running.job.id, slot.index)
        except Exception as error:
            self._on_error(running.job.id, error)
            return
        running.made.add(slot.index)
        seconds = time.perf_counter() - started
        running.spent("decode", seconds)
        self.metrics.stage("decode", seconds)
        output, clock = running.request.output, Clock(NoProgress())
        frames = postprocess.processed(self.device.blueprint, output, output_made.frames, clock)
        if isinstance(frames, Frames):  # made while they are saved, and only this thread uses the device
            self._save(running, slot.index, frames, parameters, output_made.sound)
        else:
            self._savers.submit(self._save, running, slot.index, frames, parameters, output_made.sound)

    def _idle(self) -> None:
        """Wait for jobs. Unused weights leave the device."""
        if not self._jobs:
            self.loading.unload_unused()
        if self.loading.asleep:
            self._set_phase("asleep")
            self.loading.asleep = not (retried(self.store.counts, self._closing) or {}).get("queued", 0)
        if not self.loading.asleep and self._state.phase == "asleep":
            self._set_phase("loading")
            self.loading.load()
            self._set_phase("compiling")
        self._wake_up.wait(POLL_S)
        self._wake_up.clear()  # before the queue is read, so that a job which comes then wakes this thread

    # --- the threads that store outputs ---

    def _save(
        self,
        running: RunningJob,
        index: int,
        frames: Any,
        parameters: Mapping[str, Any],
        sound: Sound | None,
    ) -> None:
        """Encode and store an output; the last output completes the job."""
        started = time.perf_counter()
        try:
            seed = running.request.seeds[index]
            stored = outputs.save(running.job, running.request, self.files, frames, seed, parameters, sound)
        except Exception as error:
            self._fail(running.job.id, error)
            return
        inside = dict(frames.seconds) if isinstance(frames, Frames) else {}
        for stage, seconds in inside.items():
            self.metrics.stage(stage, seconds)
        with self._job_ended:
            for stage, seconds in inside.items():
                running.spent(stage, seconds)
            running.spent("save", time.perf_counter() - started - sum(inside.values()))
            running.saved[index] = stored
            going = running.job.id in self._jobs
            complete = len(running.saved) == len(running.request.seeds)
            if going and complete:
                del self._jobs[running.job.id]
        if not going:
            outputs.remove(stored, self.files)
        elif complete:
            self._complete(running, parameters)

    def _complete(self, running: RunningJob, parameters: Mapping[str, Any]) -> None:
        job, files = running.job, running.files
        self._times.add(job.kind, time.monotonic() - running.taken)
        self.metrics.stage("save", running.seconds["save"])
        until = time.time() + self.options.output_lifetime
        result = running.result(parameters)
        if not self._record(job, "completed", outputs=files, result=result, expires_at=until):
            outputs.remove(files, self.files)
        elif self.uploader is not None:
            for output in files:
                self.uploader.add(job.id, output)

    def _fail(self, id: str, error: BaseException) -> None:
        running, too_large = self._jobs.get(id), None
        if running is not None and self.device.model is not None and short_of_memory(error):
            plan = self.device.model.blueprint
            too_large = fit.refusal(plan, running.request, fit.free_bytes(plan.device))
        self._end_job(id, failure(error, too_large))

    def _end_job(self, id: str, why: Failure) -> None:
        """Let a job fail unless it has ended. Only the thread that removes it from `_jobs` ends it."""
        with self._job_ended:
            running = self._jobs.pop(id, None)
        if running is not None:
            self._record(running.job, "failed", error=why)
            outputs.remove(running.files, self.files)

    def _record(self, job: Job, status: Status, **result: Any) -> bool:
        """Store and publish how a job ended. False where it had ended before, or another server has it."""

        def publish_failure() -> None:
            if job.pinned:  # its client gets an answer even while the store is unreachable
                self.events.publish(replace(job, status="failed", error=NOT_STORED))

        def finish() -> bool:
            return self.store.finish(job.id, self.name, status, **result)

        finished = retried(finish, self._closing, publish_failure)
        now = retried(lambda: self.store.get(job.id), self._closing)
        if now is None:  # the job was deleted meanwhile
            now = replace(job, status="failed", error=CANCELLED)
        self.metrics.finished(now)
        self.events.publish(now)
        with self._job_ended:
            self._job_ended.notify_all()
        return bool(finished)
