"""A pipeline of diffusers behind the server: the same queue, progress, cancelling and answers."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from falcon import testing
from PIL import Image

import tinydiff
from tests.runtime import foreign_folders
from tests.serve.test_scheduler import asked, wait
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.records import UserError
from tinydiff.runtime import backends, foreign_run
from tinydiff.serve import info, server
from tinydiff.serve.app import make_app
from tinydiff.serve.options import ServeOptions


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return foreign_folders.stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd")


@pytest.fixture(scope="module")
def model(unet):
    return tinydiff.load(unet, backend="diffusers")


@pytest.fixture
def service(unet, tmp_path):
    options = ServeOptions(state_dir=str(tmp_path), lease=5.0, warmup_steps=0)
    made = server.build(ModelOptions(model_path=str(unet), backend="diffusers"), options)
    made.scheduler.start()
    yield made
    made.scheduler.stop(0.0)


def test_a_job_makes_the_librarys_images_and_tells_every_step(service, model):
    given = {"num_inference_steps": 3, "diffusers_kwargs": {"eta": 0.5}}
    job, heard = wait(service, service.scheduler.submit(asked(num_outputs_per_prompt=2, **given)))
    assert job.status == "completed", job.error
    expected = tinydiff.generate(model, "a red circle", seed=1, num_outputs_per_prompt=2, **given)
    for output, image in zip(job.outputs, expected.images, strict=True):
        data = service.files.path(output.file).read_bytes()
        assert (np.asarray(Image.open(io.BytesIO(data))) == image).all()
    assert job.result["seeds"] == [1, 2] and job.result["computed_steps"] == 6
    assert heard[-1].done == heard[-1].total == 6
    told = job.result["parameters"]
    assert told["backend"] == "diffusers" and told["eta"] == 0.5 and told["num_inference_steps"] == 3
    assert job.result["usage"]["input_tokens"] > 3


def test_http_tells_the_model_and_refuses_what_it_does_not_take(service):
    client = testing.TestClient(make_app(service), headers={"Host": "localhost"})
    card = client.simulate_get("/v1/models").json["data"][0]
    assert card["pipeline_class"] == "StableDiffusionPipeline" and card["task_types"] == ["T2I"]
    assert card["dit_precision"] == card["vae_precision"] == "fp32"
    assert card["defaults"]["num_inference_steps"] == 50 and card["sizes"]["default"] == "16x16"
    assert info.tasks(service) == ["T2I"]
    for body, field in (
        ({"flow_shift": 3.0}, "flow_shift"),
        ({"diffusers_kwargs": {"clip_skp": 1}}, "diffusers_kwargs"),
        ({"size": "16x16", "diffusers_kwargs": {"width": 8}}, "diffusers_kwargs"),
        ({"loras": {"ink": 1.0}}, "loras"),
    ):
        answer = client.simulate_post("/v1/images/generations", json={"prompt": "x", **body})
        assert answer.status_code == 400 and answer.json["error"]["param"] == field, answer.json
    answer = client.simulate_post("/v1/videos", json={"prompt": "x"})
    assert answer.status_code == 400 and "makes images, not videos" in answer.json["error"]["message"]


def test_a_running_job_ends_within_a_step_when_it_is_cancelled(service, monkeypatch):
    """The second step of the job waits until the job is cancelled; no third one runs."""
    steps, first, go = [], threading.Event(), threading.Event()
    make = foreign_run.make

    def held(model, request, seed, on_step):
        def step(done, total):
            steps.append(done)
            on_step(done, total)
            first.set()
            assert go.wait(60)

        return make(model, request, seed, step)

    monkeypatch.setattr(foreign_run, "make", held)
    job = service.scheduler.submit(asked(num_inference_steps=9))
    assert first.wait(60)
    service.scheduler.cancel(job.id)
    go.set()
    ended, _ = wait(service, job)
    assert ended.status == "failed" and ended.error.code == "cancelled"
    monkeypatch.setattr(foreign_run, "make", make)
    again, _ = wait(service, service.scheduler.submit(asked()))
    assert again.status == "completed" and len(steps) < 9


def slots(model, *jobs, steps=3):
    """A loop with an output of each (job, priority)."""
    [request] = backends.DIFFUSERS.admit(
        model.blueprint, SamplingOptions(prompt=("x",), num_inference_steps=steps)
    )
    loop = foreign_run.OneByOne()
    for job, priority in jobs:
        loop.add(
            foreign_run.make_slot(model, request, foreign_run.condition(model, request), job, 0, priority)
        )
    return loop


def test_a_call_runs_to_its_end_before_another_begins_and_the_highest_priority_is_next(model):
    loop, order = slots(model, ("a", 0), ("b", 0), ("c", 5)), []
    loop.run(loop.choose())
    loop.add(slots(model, ("d", 9)).slots[0])
    while loop.slots:
        result = loop.run(loop.choose())
        assert result.error is None
        order += [slot.job for slot in result.done]
    assert order == ["c", "d", "a", "b"]


def test_an_output_that_leaves_ends_its_thread_at_the_step_where_it_stands(model):
    before = threading.active_count()
    loop = slots(model, ("a", 0), steps=9)
    assert loop.run(loop.choose()).steps == 1 and threading.active_count() == before + 1
    loop.leave("a")
    assert loop.slots == [] and threading.active_count() == before


def test_an_output_that_fails_leaves_the_loop_with_its_error(model, monkeypatch):
    def fails(*_):
        raise UserError("prompt", "prompt: is wrong")

    monkeypatch.setattr(foreign_run, "make", fails)
    loop = slots(model, ("a", 0))
    assert str(loop.run(loop.choose()).error) == "prompt: is wrong" and loop.slots == []


def test_adapters_are_loaded_at_the_start_only(service, unet, tmp_path):
    with pytest.raises(UserError, match=r"^lora_path: diffusers loads adapters at the start"):
        service.adapters.add("ink", "x")
    with pytest.raises(UserError, match=r"^lora_dir: diffusers loads adapters at the start"):
        options = ServeOptions(state_dir=str(tmp_path), lora_dir=str(tmp_path))
        server.build(ModelOptions(model_path=str(unet), backend="diffusers"), options)
