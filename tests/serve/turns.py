"""A server of several models that runs turn by turn, for tests."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinydiff.config import ModelOptions
from tinydiff.serve import server
from tinydiff.serve.jobs import Job, new_id
from tinydiff.serve.options import ServeOptions

TWO = ("a=tinydiff/shapes", "b=tinydiff/shapes")
ASKED = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1, "height": 64, "width": 64}


def service(folder, models=TWO, model_options=(), **options):
    given = {"state_dir": str(folder), "warmup_steps": 0, "models": models, **options}
    return server.build(ModelOptions(**dict(model_options)), ServeOptions(**given))


def job(model, priority=0, **fields):
    return Job(new_id("image"), "image", time.time(), model=model, fields=ASKED | fields, priority=priority)


class Turns:
    """A server of several models whose scheduler has no threads: each turn is a call."""

    def __init__(self, folder, **options):
        self.service = service(folder, **options)
        self.scheduler = self.service.scheduler
        self.scheduler._set_phase("ready")
        self.device = self.scheduler.device

    def submit(self, *models, **fields):
        return [self.scheduler.submit(job(model, **fields)) for model in models]

    def turn(self):
        """The models of the images that run together in the next turn of the loop."""
        self.scheduler._remove_ended()
        self.scheduler._begin_again()
        self.scheduler._take_jobs()
        self.scheduler._start_images()
        running = [self.scheduler._jobs[slot.job].job.model for slot in self.device.loop.slots]
        if running:
            self.scheduler._step()
        return running or ["again"] * len(self.scheduler._short)

    def drain(self):
        """The models of the running images, turn by turn, until nothing is left to run."""
        rounds = []
        while running := self.turn():
            rounds.append(running)
        self.scheduler._savers.shutdown(wait=True)
        self.scheduler._savers = ThreadPoolExecutor(1)
        return rounds

    def close(self):
        self.scheduler._savers.shutdown(wait=True)
        self.service.store.close()


@pytest.fixture
def turns(tmp_path):
    """turns(...) gives `Turns` of a server with these options."""
    made = []

    def start(**options):
        made.append(Turns(tmp_path / str(len(made)), **options))
        return made[-1]

    yield start
    for one in made:
        one.close()
