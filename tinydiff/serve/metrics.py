"""Metrics of a running server for Prometheus. Every name begins with `tinydiff_`; labels have few values."""

from __future__ import annotations

from collections.abc import Mapping

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
"""Content-Type of `Metrics.text`."""

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
"""HTTP methods with a label of their own; a client can invent any other."""

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Histogram buckets in seconds for a step."""
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Histogram buckets in seconds for stages, jobs and requests."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Histogram buckets for batch sizes."""


class Metrics:
    """The metrics of one server, in their own registry. Any thread may call any method."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        Info("tinydiff", "The version of tinydiff.", registry=own).info({"version": __version__})
        ProcessCollector(namespace="tinydiff", registry=own)
        self._queued = Gauge("tinydiff_jobs_queued", "Jobs waiting in the queue.", registry=own)
        self._running = Gauge("tinydiff_jobs_running", "Jobs running now.", registry=own)
        self._finished = Counter("tinydiff_jobs_finished", "Finished jobs.", ("kind", "status"), registry=own)
        self._failures = Counter(
            "tinydiff_job_failures", "Jobs that failed, by code.", ("kind", "code"), registry=own
        )
        self._cancelled = Counter(
            "tinydiff_jobs_cancelled", "Jobs that were cancelled.", ("kind",), registry=own
        )
        self._wait = Histogram(
            "tinydiff_job_wait_seconds",
            "Seconds from request to start.",
            ("kind",),
            buckets=LONG,
            registry=own,
        )
        self._whole = Histogram(
            "tinydiff_job_seconds", "Seconds from request to result.", ("kind",), buckets=LONG, registry=own
        )
        self._outputs = Counter("tinydiff_outputs", "Images and videos made.", ("kind",), registry=own)
        self._stage = Histogram(
            "tinydiff_stage_seconds",
            "Seconds of each stage of a job.",
            ("stage",),
            buckets=LONG,
            registry=own,
        )
        self._step = Histogram(
            "tinydiff_step_seconds",
            "Seconds of a denoising step of a whole batch.",
            buckets=SHORT,
            registry=own,
        )
        self._steps = Counter("tinydiff_steps", "Denoising steps, counted for each image.", registry=own)
        self._batch = Histogram(
            "tinydiff_batch_size", "Images that shared a denoising step.", buckets=SIZES, registry=own
        )
        self._recompiles = Counter("tinydiff_recompiles", "Compiled graphs.", registry=own)
        self._peak = Gauge("tinydiff_peak_memory_bytes", "Peak memory of the device in bytes.", registry=own)
        self._loaded = Gauge(
            "tinydiff_model_loaded", "1 while a model is on the device, 0 while all sleep.", registry=own
        )
        self._on_device = Gauge(
            "tinydiff_model_on_device", "1 while this model is on the device.", ("model",), registry=own
        )
        self._requests = Counter(
            "tinydiff_http_requests", "Requests answered.", ("route", "method", "status"), registry=own
        )
        self._answer = Histogram(
            "tinydiff_http_request_seconds",
            "Seconds to answer a request.",
            ("route", "method"),
            buckets=LONG,
            registry=own,
        )

    def jobs(self, queued: int, running: int) -> None:
        """Set the number of jobs now."""
        self._queued.set(queued)
        self._running.set(running)

    def finished(self, job: Job) -> None:
        """Count a finished job."""
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
        """Count a finished stage of a job."""
        self._stage.labels(name).observe(seconds)

    def steps(self, count: int, batch: int, seconds: float) -> None:
        """Count `count` steps of a batch of `batch` images. seconds: of one step."""
        for _ in range(count):
            self._step.observe(seconds)
            self._batch.observe(batch)
        self._steps.inc(count * batch)

    def recompiled(self, count: int = 1) -> None:
        """Count compiled graphs."""
        self._recompiles.inc(count)

    def peak_memory(self, count: int) -> None:
        """Set the peak memory of the device in bytes."""
        self._peak.set(count)

    def loaded(self, models: Mapping[str, bool]) -> None:
        """Set which models are on the device."""
        self._loaded.set(any(models.values()))
        for name, is_loaded in models.items():
            self._on_device.labels(name).set(is_loaded)

    def request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Count an answered request. route: its template, not its URL; None for an unknown route."""
        where, how = route or "none", method if method in METHODS else "other"
        self._requests.labels(where, how, str(status)).inc()
        self._answer.labels(where, how).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
