"""A server out of memory: other models leave, then the model loads with less of it on the device, once, and
the jobs begin again.
"""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from PIL import Image

from tests.runtime.test_oom import short
from tests.serve.turns import TWO, Turns
from tinydiff.runtime import blueprint, fit, pipeline
from tinydiff.sampling import batch

OOM = ("does not fit into memory", "insufficient_memory")


def pixels(one, job):
    """The images of a job that is done."""
    done = one.service.store.get(job.id)
    assert done.status == "completed", done.error
    return [np.asarray(Image.open(one.service.files.path(output.file))) for output in done.outputs]


@pytest.fixture
def loads(monkeypatch):
    """What has been loaded from files, in order."""
    found, load = [], blueprint.load
    monkeypatch.setattr(blueprint, "load", lambda plan, *more: (found.append(plan), load(plan, *more))[1])
    return found


def short_alone(advance):
    """`advance` without memory after its first call, until that was so for one image alone."""
    calls = []

    def fn(before, *rest):
        calls.append(len(before.joined.state.x))
        if len(calls) > 1 and 1 not in calls[1:-1]:
            raise MemoryError
        return advance(before, *rest)

    return fn


@pytest.mark.parametrize(
    ("where", "name", "after"),
    [(batch, "advance", 1), (pipeline, "_conditioned", 1), (pipeline, "decode", 0)],
)
def test_jobs_begin_again_on_a_model_with_less_on_the_device(turns, monkeypatch, loads, where, name, after):
    """One that ran out of memory, and one that shares the loop; the images are those of the whole model."""
    want = turns(models=())
    wanted = want.submit("", num_outputs_per_prompt=2) + want.submit("", prompt="a star")
    want.drain()
    one = turns(models=())
    one.scheduler.loading.load()
    old = weakref.ref(one.device.model.denoiser.weights["proj_out.weight"])
    real = getattr(where, name)
    monkeypatch.setattr(where, name, short(1, real, after) if where is pipeline else short_alone(real))
    load, gone = blueprint.load, []
    monkeypatch.setattr(blueprint, "load", lambda *given: (gone.append(old() is None), load(*given))[1])
    jobs = one.submit("", num_outputs_per_prompt=2) + one.submit("", prompt="a star")
    one.drain()
    for job, wanted_job in zip(jobs, wanted, strict=True):
        for got, whole in zip(pixels(one, job), pixels(want, wanted_job), strict=True):
            assert np.array_equal(got, whole)
    assert gone == [True], "the old weights are gone before the new ones come"
    assert len(loads) == 3 and {net.residency.kind for net in loads[-1].nets.values()} != {"resident"}
    assert one.service.store.get(jobs[0].id).result["computed_steps"] == 4


def test_it_steps_down_once_and_then_a_request_fails_alone(turns, monkeypatch, loads):
    one, advance = turns(models=()), batch.advance
    monkeypatch.setattr(batch, "advance", short(2, advance))
    [first] = one.submit("")
    one.drain()
    error = one.service.store.get(first.id).error
    assert error.code == OOM[1] and OOM[0] in error.message and len(loads) == 2
    [second] = one.submit("")
    one.drain()
    assert pixels(one, second) and len(loads) == 2


@pytest.mark.parametrize("options", [{"on_oom": "fail"}, {"component_residency": {"all": "resident"}}])
def test_what_an_option_keeps_is_not_loaded_again(tmp_path, monkeypatch, loads, options):
    one = Turns(tmp_path, model_options=options, models=())
    monkeypatch.setattr(batch, "advance", short(1, batch.advance))
    [job] = one.submit("")
    one.drain()
    assert one.service.store.get(job.id).error.code == OOM[1] and len(loads) == 1
    one.close()


def test_a_request_that_would_not_fit_then_either_loads_nothing(turns, monkeypatch, loads):
    one = turns(models=())
    monkeypatch.setattr(batch, "advance", short(1, batch.advance))
    monkeypatch.setattr(fit, "free_bytes", lambda device: 10**6)
    [job] = one.submit("")
    one.drain()
    assert one.service.store.get(job.id).error.code == OOM[1] and len(loads) == 1


def test_other_models_leave_before_anything_is_loaded_again(turns, monkeypatch, loads):
    one, advance = turns(models=TWO), batch.advance
    one.scheduler.loading.load("b")
    one.scheduler.loading.load("a")
    assert one.scheduler.loaded() == {"a", "b"}
    monkeypatch.setattr(batch, "advance", short(1, advance))
    [job] = one.submit("a")
    one.drain()
    assert pixels(one, job) and one.scheduler.loaded() == {"a"} and len(loads) == 2
