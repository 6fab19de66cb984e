"""What /metrics shows after events: names, units, labels and values."""

import threading
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tinydiff.serve.jobs import Failure, Job, Output
from tinydiff.serve.metrics import Metrics

DONE = Job(
    "img_1",
    "image",
    100.0,
    status="completed",
    started_at=102.0,
    completed_at=107.0,
    outputs=(Output("f", "image/png", 9, 1),),
)


def value(metrics, name, **labels):
    """The sample `name` with these labels, None where there is none."""
    return next(
        (sample.value for sample in samples(metrics) if (sample.name, sample.labels) == (name, labels)), None
    )


def samples(metrics):
    return [
        sample
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    ]


def test_every_name_begins_with_ours():
    metrics = Metrics()
    metrics.finished(DONE)
    metrics.stage("decode", 0.5)
    metrics.request("/v1/videos", "GET", 200, 0.01)
    assert {sample.name for sample in samples(metrics) if not sample.name.startswith("tinydiff_")} == set()


def test_a_completed_job_is_counted_with_its_times_and_outputs():
    metrics = Metrics()
    clip = replace(DONE, kind="video", outputs=(*DONE.outputs, Output("t", "image/webp", 9, 1, "thumbnail")))
    for job in (DONE, clip):
        metrics.finished(job)
    assert value(metrics, "tinydiff_jobs_finished_total", kind="image", status="completed") == 1
    assert value(metrics, "tinydiff_job_wait_seconds_sum", kind="image") == 2.0
    assert value(metrics, "tinydiff_job_seconds_sum", kind="image") == 7.0
    assert value(metrics, "tinydiff_outputs_total", kind="video") == 1, "a thumbnail is no output of its own"
    assert value(metrics, "tinydiff_job_failures_total", kind="image", code="cancelled") is None


@pytest.mark.parametrize(("code", "cancels"), [("cancelled", 1), ("insufficient_memory", None)])
def test_a_failed_job_is_counted_by_its_code(code, cancels):
    metrics = Metrics()
    metrics.finished(replace(DONE, status="failed", outputs=(), started_at=None, error=Failure(code, "why")))
    assert value(metrics, "tinydiff_job_failures_total", kind="image", code=code) == 1
    assert value(metrics, "tinydiff_jobs_cancelled_total", kind="image") == cancels
    assert value(metrics, "tinydiff_job_seconds_count", kind="image") is None, (
        "the time to a failure is no time to a result"
    )
    assert value(metrics, "tinydiff_job_wait_seconds_count", kind="image") is None, "it was never started"


def test_a_clock_set_back_gives_no_negative_time():
    metrics = Metrics()
    metrics.finished(replace(DONE, started_at=90.0, completed_at=95.0))
    assert value(metrics, "tinydiff_job_wait_seconds_sum", kind="image") == 0.0
    assert value(metrics, "tinydiff_job_seconds_sum", kind="image") == 0.0


def test_steps_are_counted_one_by_one_and_by_image():
    metrics = Metrics()
    metrics.steps(4, 3, 0.5)
    assert value(metrics, "tinydiff_steps_total") == 12
    assert (value(metrics, "tinydiff_step_seconds_count"), value(metrics, "tinydiff_step_seconds_sum")) == (
        4,
        2.0,
    )
    assert value(metrics, "tinydiff_batch_size_bucket", le="2.0") == 0
    assert value(metrics, "tinydiff_batch_size_bucket", le="4.0") == 4


def test_no_steps_are_nothing():
    metrics = Metrics()
    metrics.steps(0, 3, 0.0)
    assert value(metrics, "tinydiff_steps_total") == 0


def test_stages_recompiles_memory_and_jobs():
    metrics = Metrics()
    metrics.stage("decode", 0.75)
    metrics.recompiled()
    metrics.recompiled(2)
    metrics.peak_memory(5_000_000_000)
    metrics.jobs(queued=7, running=2)
    metrics.jobs(queued=1, running=3)
    assert value(metrics, "tinydiff_stage_seconds_sum", stage="decode") == 0.75
    assert value(metrics, "tinydiff_recompiles_total") == 3
    assert value(metrics, "tinydiff_peak_memory_bytes") == 5e9
    assert (value(metrics, "tinydiff_jobs_queued"), value(metrics, "tinydiff_jobs_running")) == (1, 3)


def test_clients_cannot_make_up_labels():
    metrics = Metrics()
    for method in ("BREW", "PROPFIND"):
        metrics.request(None, method, 405, 0.5)
    assert value(metrics, "tinydiff_http_requests_total", route="none", method="other", status="405") == 2
    assert value(metrics, "tinydiff_http_request_seconds_sum", route="none", method="other") == 1.0


def test_two_servers_of_one_process_do_not_share_figures():
    first, second = Metrics(), Metrics()
    first.recompiled()
    assert value(second, "tinydiff_recompiles_total") == 0


def test_the_process_is_watched():
    assert value(Metrics(), "tinydiff_process_open_fds") > 0


def test_threads_lose_no_count():
    metrics = Metrics()
    threads = [
        threading.Thread(target=lambda: [metrics.steps(1, 2, 0.001) for _ in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "tinydiff_steps_total") == 1600
