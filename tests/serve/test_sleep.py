"""A server that sleeps: its weights leave the device and come back, and nothing is read or compiled again."""

from __future__ import annotations

import time
import weakref
from functools import partial

import pytest
import torch

from tests.parallel.test_families import denoised
from tests.runtime.test_streaming import CPU
from tinydiff.config import ModelOptions
from tinydiff.ops.store import Berth, Store, Whole
from tinydiff.parallel.plan import Plan
from tinydiff.runtime import aside, blueprint
from tinydiff.sampling.compile import compiled_denoise, graph_count
from tinydiff.serve import server
from tinydiff.serve.jobs import Job, new_id
from tinydiff.serve.options import ServeOptions


class Idle:
    """A server whose scheduler has no threads: each turn is a call, and its clock stands."""

    def __init__(self, folder, **options):
        given = {"state_dir": str(folder), "warmup_steps": 0, "idle_unload": 300.0, **options}
        self.service = server.build(ModelOptions(), ServeOptions(**given))
        self.scheduler, self.now = self.service.scheduler, 0.0
        self.scheduler.loading.clock = lambda: self.now
        self.scheduler.wake()
        self.scheduler.loading.load()
        self.scheduler._set_phase("ready")

    def after(self, seconds):
        """The phase that clients see after a turn without a job, so many seconds later."""
        self.now += seconds
        self.scheduler._wake_up.set()
        self.scheduler._idle()
        return self.scheduler.state().phase

    def loaded(self):
        lines = self.service.metrics.text().decode().splitlines()
        return next(line for line in lines if line.startswith("tinydiff_model_loaded ")).split()[1]


@pytest.fixture
def reads(monkeypatch):
    """The loads from files so far. Weights that wait do so in other memory, as those of a GPU do."""
    monkeypatch.setattr(aside, "can_wait", lambda model, ranks: True)
    move, found, load = aside.moved, [], blueprint.load
    monkeypatch.setattr(aside, "moved", lambda model, device, pinned=False: move(model, device))
    monkeypatch.setattr(blueprint, "load", lambda *given: (found.append(1), load(*given))[1])
    return found


@pytest.mark.parametrize(("unload_to", "loads"), [("host", 1), ("nothing", 2)])
def test_the_weights_leave_when_nothing_comes_and_return(tmp_path, reads, unload_to, loads):
    idle = Idle(tmp_path, unload_to=unload_to)
    device = idle.scheduler.device
    held = weakref.ref(device.model.denoiser.weights["proj_out.weight"])
    want = {name: x.clone() for name, x in device.model.denoiser.weights.items()}
    assert (idle.after(300), idle.loaded()) == ("ready", "1.0")
    assert (idle.after(1), idle.loaded()) == ("asleep", "0.0")
    assert device.model is None and held() is None and device.waits == (unload_to == "host")
    assert idle.after(9) == "asleep"
    job = Job(new_id("image"), "image", time.time(), fields={"prompt": "a", "num_inference_steps": 1})
    idle.scheduler.submit(job)
    idle.scheduler._take_jobs()
    assert idle.scheduler.device.jobs() == {job.id} and not device.waits
    came = device.model.denoiser.weights
    assert came.keys() == want.keys() and all(torch.equal(x, want[name]) for name, x in came.items())
    assert (idle.scheduler.state().phase, idle.loaded(), len(reads)) == ("ready", "1.0", loads)


def test_a_server_that_was_told_to_sleep_wakes_with_what_waits(tmp_path, reads):
    idle = Idle(tmp_path, idle_unload=None)
    assert idle.after(1e6) == "ready"
    idle.scheduler.sleep()
    assert idle.after(0) == "asleep" and idle.scheduler.device.waits
    idle.scheduler.wake()
    assert idle.after(0) == "compiling" and idle.loaded() == "1.0" and len(reads) == 1


def test_weights_that_share_memory_share_it_where_they_go():
    whole = torch.arange(12.0)
    flats = {"a": {"x": whole[2:8].view(2, 3).T}, "b": {"y": whole, "absent": torch.empty(2, device="meta")}}
    came = aside.moved_weights(flats, CPU)
    assert came["a"]["x"].equal(flats["a"]["x"]) and came["b"]["y"].equal(whole)
    assert came["a"]["x"].untyped_storage().data_ptr() == came["b"]["y"].untyped_storage().data_ptr()
    assert came["b"]["y"].data_ptr() != whole.data_ptr() and came["b"]["absent"].is_meta


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_weights_that_came_back_run_in_the_same_graph():
    run = partial(denoised, "Wan, text", Plan(), dtype=torch.float32, run=compiled_denoise)
    want, before = run(), graph_count()

    def back(net):
        return aside.replace(net, weights=aside.moved_weights({"net": net.weights}, CPU)["net"])

    assert before > 0 and torch.equal(run(adapt=back), want) and graph_count() == before


def test_what_streamed_and_offloaded_networks_hold_is_given_back():
    berth = Berth()
    whole = Whole(lambda: {"x": torch.ones(2)}, berth)
    store = Store(whole, CPU)
    assert store.read("x")["x"].sum() == 2 and whole.there
    store.source.release()
    assert not whole.there and berth.holder is None and store.read("x")["x"].sum() == 2
