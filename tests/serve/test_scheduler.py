"""The real scheduler with the shipped model, over a real store and real files."""

import sqlite3
import threading
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tinydiff.config import ModelOptions
from tinydiff.models import upscalers
from tinydiff.models.interpolators import Config, spec
from tinydiff.models.upscalers import Compact
from tinydiff.records import Sound
from tinydiff.runtime import fit, pipeline
from tinydiff.serve import answers, outputs, scheduler, server
from tinydiff.serve.errors import of_failure
from tinydiff.serve.jobs import DONE, Busy, Job, Stopping, new_id
from tinydiff.serve.options import ServeOptions

NARROW = Config((8, 6, 4, 4), 13, 5, 6, 3)
"""A small network of RIFE 4.22's kind."""


@pytest.fixture
def started(tmp_path):
    """make(**options): a service whose scheduler runs."""
    services = []

    def make(**options):
        given = {"state_dir": str(tmp_path), "lease": 2.0, "warmup_steps": 0, **options}
        service = server.build(ModelOptions(), ServeOptions(**given))
        services.append(service)
        service.scheduler.start()
        return service

    yield make
    for service in services:
        service.scheduler.stop(0.0)


def asked(kind="image", owner="", priority=0, pinned=False, **fields):
    told = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, **fields}
    return Job(new_id(kind), kind, time.time(), owner=owner, fields=told, priority=priority, pinned=pinned)


def wait(service, job, seconds=60):
    """The job when it is done, and all the news on the way."""
    heard = []
    with service.scheduler.watch(job.id) as watch:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (news := watch.next(1.0)) is not None:
                heard.append(news)
                if news.job.status in DONE:
                    return news.job, heard
    raise AssertionError(f"{service.store.get(job.id)} after {seconds} s; {service.scheduler.state()}")


def test_an_image_comes_with_its_parameters_seeds_timings_and_steps(started):
    service = started()
    job, heard = wait(service, service.scheduler.submit(asked(num_outputs_per_prompt=2)))
    assert job.status == "completed" and job.progress == 100
    assert (
        job.result["seeds"] == [1, 2]
        and job.result["computed_steps"] == 4
        and job.result["skipped_steps"] == 0
    )
    assert job.result["parameters"]["num_inference_steps"] == 2
    assert {"queue", "encode", "denoise", "decode", "save"} <= job.result["seconds"].keys()
    assert (
        job.result["usage"]["output_tokens"] == 128
        and job.result["usage"]["input_tokens_details"]["text_tokens"] > 3
    )
    for output in job.outputs:
        assert service.files.path(output.file).read_bytes().startswith(b"\x89PNG")
    assert heard[-1].done == heard[-1].total == 4


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_is_cut_of_a_long_prompt_is_in_the_answer_the_job_and_the_file(started, kind):
    service = started()
    more = {"num_frames": 5} if kind == "video" else {}
    job, _ = wait(service, service.scheduler.submit(asked(kind, prompt="a red circle " * 20, **more)))
    cut = ["prompt: the last 29 of its tokens were cut, the model reads 32"]
    shown = answers.describe(service, job, "http://here")
    assert shown["warnings"] == shown["parameters"]["warnings"] == cut
    if kind == "image":
        assert answers.finished_images(service, job, "http://here")["warnings"] == cut
        with Image.open(service.files.path(job.outputs[0].file)) as opened:
            assert cut[0] in opened.info["parameters"]
    short, _ = wait(service, service.scheduler.submit(asked()))
    assert answers.describe(service, short, "http://here")["warnings"] == []


@pytest.mark.parametrize("pinned", [True, False])
def test_a_client_does_not_wait_for_a_disk_that_is_full(started, monkeypatch, pinned):
    """It is told at once, in the status that says so; a job that nobody waits for is noted once there is
    room.
    """
    service = started()
    full, finish, tried = threading.Event(), service.store.finish, []

    def kept(*args, **made):
        tried.append(args)
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        return finish(*args, **made)

    monkeypatch.setattr(service.store, "finish", kept)
    full.set()
    job = service.scheduler.submit(asked(pinned=pinned))
    if pinned:
        told, _ = wait(service, job)
        assert told.error.code == "storage_failed" and of_failure(told.error).status == 507
    else:
        until(lambda: tried)
        assert service.store.get(job.id).status == "in_progress"
    full.clear()
    until(lambda: service.store.get(job.id).status == "completed")


def test_a_video_has_a_thumbnail_and_a_spritesheet(started):
    service = started()
    job, _ = wait(service, service.scheduler.submit(asked("video", num_frames=5, num_inference_steps=1)))
    assert [(output.variant, output.media_type) for output in job.outputs] == [
        ("content", "video/mp4"),
        ("thumbnail", "image/webp"),
        ("spritesheet", "image/webp"),
    ]


def test_previews_come_on_the_way(started):
    service = started()
    _, heard = wait(service, service.scheduler.submit(asked(num_inference_steps=30), previews=2))
    pictures = [picture for news in heard for picture in news.previews]
    assert 1 <= len(pictures) <= 2 and pictures[0].shape == (128, 128, 3)


def test_many_jobs_are_each_made_once(started):
    service = started()
    jobs = [service.scheduler.submit(asked(seed=k, num_inference_steps=1 + k % 3)) for k in range(12)]
    done = [wait(service, job)[0] for job in jobs]
    assert [job.status for job in done] == ["completed"] * 12
    assert all(job.attempts == 1 and len(job.outputs) == 1 for job in done)


def held(monkeypatch):
    """Steps wait until the returned event is set."""
    go, step = threading.Event(), pipeline.loop.denoise

    def slow(*args):
        go.wait(30)
        return step(*args)

    monkeypatch.setattr(pipeline.loop, "denoise", slow)
    return go


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("most", [1, 2])
def test_a_large_job_does_not_keep_another_key_waiting(started, monkeypatch, most):
    """Ten images of one key, all asked for before: the other's image is done among the first, whatever the
    seats are.
    """
    service = started(batching_max_size=most)
    go, ended, finish = held(monkeypatch), [], pipeline.finish
    monkeypatch.setattr(
        pipeline,
        "finish",
        lambda model, request, *rest: (ended.append(request.text.prompt), finish(model, request, *rest))[1],
    )
    large = service.scheduler.submit(asked(owner="a", num_outputs_per_prompt=10, prompt="large"))
    until(lambda: service.store.get(large.id).status == "in_progress")
    more = service.scheduler.submit(asked(owner="a", prompt="more"))
    small = service.scheduler.submit(asked(owner="b", prompt="small"))
    go.set()
    for job in (large, more, small):
        assert wait(service, job)[0].status == "completed"
    assert ended.index("small") <= most and ended.count("large") == 10


def test_cancel_takes_effect_within_a_step(started, monkeypatch):
    service = started()
    go = held(monkeypatch)
    job = service.scheduler.submit(asked(num_inference_steps=1000))
    until(lambda: service.store.get(job.id).status == "in_progress")
    service.scheduler.cancel(job.id)
    go.set()
    made, _ = wait(service, job)
    assert (made.status, made.error.code, made.outputs) == ("failed", "cancelled", ())


def test_a_queued_job_is_cancelled_at_once(started, monkeypatch):
    service = started(batching_max_size=1)
    go = held(monkeypatch)
    first, second = (service.scheduler.submit(asked()) for _ in range(2))
    until(lambda: service.store.get(first.id).status == "in_progress")
    assert service.scheduler.place(second).position == 0
    service.scheduler.cancel(second.id)
    assert service.store.get(second.id).error.code == "cancelled"
    go.set()
    assert wait(service, first)[0].status == "completed"


def test_a_full_queue_says_when_to_come_back(started, monkeypatch):
    service = started(batching_max_size=1, max_queue=1)
    go = held(monkeypatch)
    first = service.scheduler.submit(asked())
    until(lambda: service.store.get(first.id).status == "in_progress")
    service.scheduler.submit(asked())
    with pytest.raises(Busy) as busy:
        service.scheduler.submit(asked())
    assert busy.value.seconds > 0
    go.set()


def test_a_job_that_runs_out_of_memory_fails_alone(started, monkeypatch):
    service = started()
    begin = pipeline.begin

    def short(model, conditioning, seed, *rest):
        if seed == 13:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(model, conditioning, seed, *rest)

    monkeypatch.setattr(pipeline, "begin", short)
    jobs = [service.scheduler.submit(asked(seed=seed)) for seed in (12, 13, 14)]
    done = [wait(service, job)[0] for job in jobs]
    assert [job.status for job in done] == ["completed", "failed", "completed"]
    assert done[1].error.code == "insufficient_memory"
    assert done[1].error.message == "size: 128x128 does not fit into memory; take a smaller size"


def test_a_job_that_runs_out_of_memory_is_told_the_largest_size_that_fits(started, monkeypatch):
    service = started()
    monkeypatch.setattr(pipeline, "begin", lambda *_: (_ for _ in ()).throw(MemoryError()))
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1)
    monkeypatch.setattr(fit, "largest", lambda plan, request, free: (96, 64))
    job, _ = wait(service, service.scheduler.submit(asked()))
    told = "size: 128x128 does not fit into memory; the largest that fits is about 96x64"
    assert (job.error.code, job.error.message) == ("insufficient_memory", told)


def ends(service):
    """How many jobs were counted as done."""
    lines = service.metrics.text().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tinydiff_jobs_finished_total")
    )


def test_a_job_cancelled_while_it_is_stored_ends_once_and_leaves_no_file(started, monkeypatch):
    service, go, save = started(), threading.Event(), outputs.save
    monkeypatch.setattr(outputs, "save", lambda *args: (go.wait(30), save(*args))[1])
    job = service.scheduler.submit(asked())
    until(lambda: "decode" in getattr(service.scheduler._jobs.get(job.id), "seconds", ()))
    service.scheduler.cancel(job.id)
    until(lambda: service.store.get(job.id).status == "failed")
    go.set()
    service.scheduler.stop(10.0)
    assert service.store.get(job.id).error.code == "cancelled"
    assert not any(service.files.folder.iterdir()) and ends(service) == 1


@pytest.mark.parametrize(("extension", "kinds"), [("mp4", ["video", "audio"]), ("gif", ["video"])])
def test_a_video_is_stored_with_its_sound_where_the_format_holds_any(started, monkeypatch, extension, kinds):
    service, finish = started(), pipeline.finish
    tone = np.sin(np.arange(6000) / 4).astype(np.float32)[:, None]
    monkeypatch.setattr(pipeline, "finish", lambda *args: finish(*args)._replace(sound=Sound(tone, 24000)))
    asking = asked("video", num_frames=5, width=64, height=64)
    job, _ = wait(service, service.scheduler.submit(replace(asking, answer={"output_format": extension})))
    assert job.status == "completed"
    with av.open(str(service.files.path(job.outputs[0].file))) as container:
        assert [stream.type for stream in container.streams] == kinds
        if "audio" in kinds:
            heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
            assert container.streams.audio[0].rate == 24000 and np.abs(heard).max() > 0.5


def test_a_video_with_added_and_enlarged_frames(tmp_path):
    """The operator chooses the networks, a request asks for them; their stages are among its seconds."""
    torch.save({f"module.{row.name}": torch.zeros(row.shape) for row in spec(NARROW)}, tmp_path / "a.pkl")
    torch.save(
        {row.name: torch.zeros(row.shape) for row in upscalers.spec(Compact(4, 0, 2))}, tmp_path / "b.pth"
    )
    models = {"frame_interpolation_model_path": str(tmp_path / "a.pkl")}
    models["upscaling_model_path"] = str(tmp_path / "b.pth")
    options = ServeOptions(state_dir=str(tmp_path / "state"), lease=2.0, warmup_steps=0)
    service = server.build(ModelOptions(**models), options)
    service.scheduler.start()
    try:
        asking = asked("video", num_frames=5, width=64, height=64, fps=8, enable_upscaling=True)
        asking.fields.update(enable_frame_interpolation=True, frame_interpolation_exp=2)
        job, _ = wait(service, service.scheduler.submit(asking))
    finally:
        service.scheduler.stop(0.0)
    assert job.status == "completed" and job.result["parameters"]["frame_interpolation_exp"] == 2
    assert all(job.result["seconds"][stage] > 0 for stage in ("decode", "interpolation", "upscale", "save"))
    video, thumbnail, _ = (service.files.path(output.file) for output in job.outputs)
    with av.open(str(video)) as file:
        [stream] = file.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert stream.average_rate == 32 and np.shape(frames) == (20, 128, 128, 3)
    assert Image.open(thumbnail).size == (64, 64)


def test_a_job_cancelled_as_it_completes_keeps_its_files(started, monkeypatch):
    service, at, go = started(), threading.Event(), threading.Event()
    finish = service.store.finish

    def slow(id, server, status, **made):
        if status == "completed":
            at.set()
            go.wait(30)
        return finish(id, server, status, **made)

    monkeypatch.setattr(service.store, "finish", slow)
    ended, end = threading.Event(), service.scheduler._end_job
    monkeypatch.setattr(service.scheduler, "_end_job", lambda *args: (end(*args), ended.set()))
    job = service.scheduler.submit(asked())
    assert at.wait(30)
    service.scheduler.cancel(job.id)
    assert ended.wait(30)
    go.set()
    made, _ = wait(service, job)
    assert made.status == "completed" and service.files.path(made.outputs[0].file) and ends(service) == 1


def test_a_job_that_comes_as_the_queue_was_found_empty_is_not_left_waiting(started, monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_S", 60.0)
    service, come = started(), threading.Event()
    take, job = service.store.take, asked()

    def late(*args):
        found = take(*args)
        if found is None and not come.is_set():
            come.set()
            service.scheduler.submit(job)
        return found

    monkeypatch.setattr(service.store, "take", late)
    service.scheduler.wake()
    assert come.wait(30) and wait(service, job, 30)[0].status == "completed"


def test_an_unforeseen_error_is_reported_without_its_inside(started, monkeypatch):
    service = started()
    monkeypatch.setattr(pipeline, "finish", lambda *_: 1 / 0)
    job, _ = wait(service, service.scheduler.submit(asked()))
    assert job.error.code == "server_error" and "division" not in job.error.message


def test_sleep_gives_the_memory_back_and_the_next_job_wakes(started):
    service = started()
    wait(service, service.scheduler.submit(asked()))
    service.scheduler.sleep()
    until(lambda: service.scheduler.state().phase == "asleep")
    assert service.scheduler.device.model is None
    assert wait(service, service.scheduler.submit(asked()))[0].status == "completed"


def test_the_model_leaves_when_nothing_comes_and_returns(started):
    service = started(idle_unload=0.2)
    wait(service, service.scheduler.submit(asked()))
    until(lambda: service.scheduler.device.model is None)
    assert wait(service, service.scheduler.submit(asked()))[0].status == "completed"


def test_stopping_queues_again_what_is_left(started, monkeypatch):
    service = started()
    go = held(monkeypatch)
    waiting, pinned = (
        service.scheduler.submit(asked(num_inference_steps=1000)),
        service.scheduler.submit(asked(pinned=True)),
    )
    until(lambda: service.store.get(waiting.id).status == "in_progress")
    ender = threading.Thread(target=service.scheduler.stop, args=(0.05,))
    ender.start()
    until(lambda: service.scheduler.state().phase == "stopping")
    with pytest.raises(Stopping):
        service.scheduler.submit(asked())
    go.set()
    ender.join()
    assert service.store.get(waiting.id).status == "queued"
    assert service.store.get(pinned.id).error.code == "server_restarted"


def test_what_waits_has_a_lease_from_the_start(started, monkeypatch):
    """Else a job of a server that is killed in its first moment would wait for ever."""
    service = started(batching_max_size=1)
    go = held(monkeypatch)
    until(lambda: service.scheduler.state().phase == "ready")
    monkeypatch.setattr(service.store, "renew", lambda *_: None)
    _, second = (service.scheduler.submit(asked(pinned=True)) for _ in range(2))
    assert service.store.get(second.id).lease > time.time()
    go.set()


def test_stopping_does_not_wait_for_a_step_without_end(started, monkeypatch):
    service = started()
    go = held(monkeypatch)
    job = service.scheduler.submit(asked())
    until(lambda: service.store.get(job.id).status == "in_progress")
    service.scheduler.stop(0.1)
    assert not service.scheduler.ended()
    go.set()
    until(service.scheduler.ended)


def test_declared_sizes_are_made_before_the_server_is_ready(started):
    service = started(warmup_resolutions=("128x128", "96x160"), warmup_steps=1)
    phases = set()

    def ready():
        phases.add(service.scheduler.state()[:3])
        return service.scheduler.state().phase == "ready"

    until(ready)
    assert any(phase == ("warming", 1, 2) for phase in phases)
    assert len(service.scheduler.figures()["step_seconds"]) == 2
