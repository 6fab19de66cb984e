"""What a running server counts, for Prometheus. Every name begins with `tinydiff_`; labels hold few different
values.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from tinydiff.serve.jobs import Job
from tinydiff.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of `Metrics.text`."""

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
"""HTTP's methods that are told apart; a client can make up any other."""

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Bounds of what takes a moment, in seconds: an answer, a step."""
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Bounds of what can take long, in seconds: a stage, a job."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Bounds of batches."""


class Metrics:
    """The figures of one server, in a registry of its own. One method for each event; all may be called from
    any thread.
    """

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        Info("tinydiff", "What runs.", registry=own).info({"version": __version__})
        ProcessCollector(namespace="tinydiff", registry=own)
        self._queued = Gauge("tinydiff_jobs_queued", "Jobs that wait.", registry=own)
        self._running = Gauge("tinydiff_jobs_running", "Jobs that are being made.", registry=own)
        self._finished = Counter("tinydiff_jobs_finished", "Jobs done.", ("kind", "status"), registry=own)
        self._failures = Counter(
            "tinydiff_job_failures", "Jobs that failed, by code.", ("kind", "code"), registry=own
        )
        self._cancelled = Counter(
            "tinydiff_jobs_cancelled", "Jobs that were cancelled.", ("kind",), registry=own
        )
        self._wait = Histogram(
            "tinydiff_job_wait_seconds", "From request to start.", ("kind",), buckets=LONG, registry=own
        )
        self._whole = Histogram(
            "tinydiff_job_seconds", "From request to result.", ("kind",), buckets=LONG, registry=own
        )
        self._outputs = Counter("tinydiff_outputs", "Images and videos made.", ("kind",), registry=own)
        self._stage = Histogram(
            "tinydiff_stage_seconds", "Of each stage of a job.", ("stage",), buckets=LONG, registry=own
        )
        self._step = Histogram(
            "tinydiff_step_seconds", "Of a denoising step of a whole batch.", buckets=SHORT, registry=own
        )
        self._steps = Counter("tinydiff_steps", "Denoising steps, those of each image counted.", registry=own)
        self._batch = Histogram(
            "tinydiff_batch_size", "Images that shared a denoising step.", buckets=SIZES, registry=own
        )
        self._recompiles = Counter("tinydiff_recompiles", "Graphs compiled.", registry=own)
        self._peak = Gauge(
            "tinydiff_peak_memory_bytes", "The most memory of the device that was in use.", registry=own
        )
        self._requests = Counter(
            "tinydiff_http_requests", "Requests answered.", ("route", "method", "status"), registry=own
        )
        self._answer = Histogram(
            "tinydiff_http_request_seconds", "To answer one.", ("route", "method"), buckets=LONG, registry=own
        )

    def jobs(self, queued: int, running: int) -> None:
        """So many jobs there are now."""
        self._queued.set(queued)
        self._running.set(running)

    def finished(self, job: Job) -> None:
        """A job is done: its status, its times, what it made."""
        self._finished.labels(job.kind, job.status).inc()
        if job.error is not None:
            self._failures.labels(job.kind, job.error.code).inc()
            if job.error.code == "cancelled":
                self._cancelled.labels(job.kind).inc()
        if job.started_at is not None:
            self._wait.labels(job.kind).observe(max(0.0, job.started_at - job.created_at))
        if job.status == "completed" and job.completed_at is not None:
            self._whole.labels(job.kind).observe(max(0.0, job.completed_at - job.created_at))
        self._outputs.labels(job.kind).inc(sum(output.variant == "content" for output in job.outputs))

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a job has ended."""
        self._stage.labels(name).observe(seconds)

    def steps(self, count: int, batch: int, seconds: float) -> None:
        """`count` steps were made by `batch` images together. seconds: of one of them."""
        for _ in range(count):
            self._step.observe(seconds)
            self._batch.observe(batch)
        self._steps.inc(count * batch)

    def recompiled(self, count: int = 1) -> None:
        """So many graphs were compiled."""
        self._recompiles.inc(count)

    def peak_memory(self, count: int) -> None:
        """The most bytes of the device's memory that were in use."""
        self._peak.set(count)

    def request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """A request was answered. route: the pattern of its address, not the address; None where none fits."""
        where, how = route or "none", method if method in METHODS else "other"
        self._requests.labels(where, how, str(status)).inc()
        self._answer.labels(where, how).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus's text form."""
        return generate_latest(self._registry)
