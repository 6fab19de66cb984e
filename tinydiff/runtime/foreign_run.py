"""A request on another library's pipeline: at once, or as steps between which a server does other things.

A pipeline keeps the state of its call, so a call that began runs to its end before another begins.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from tinydiff.config import Progress
from tinydiff.records import Request, Result
from tinydiff.runtime import postprocess
from tinydiff.runtime.background import Background
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.clock import Clock
from tinydiff.runtime.continuous import StepResult, Turn
from tinydiff.runtime.foreign_call import call
from tinydiff.runtime.foreign_requests import parameters
from tinydiff.runtime.pipeline import Made
from tinydiff.runtime.step_times import StepTimes
from tinydiff.runtime.torch_state import default_torch_state

OnStep = Callable[[int, int], None]


class Output(NamedTuple):
    """The frames of one output, and every effective parameter but the seed."""

    frames: numpy.ndarray
    parameters: dict[str, object]


def make(model: Model, request: Request, seed: int, on_step: OnStep) -> Output:
    """One output; on_step(done, total) is called after each step."""
    count = 0

    def counted(done: int, total: int) -> None:
        nonlocal count
        count += 1
        on_step(done, total)

    frames, effective = call(model, request, seed, counted)
    parameters_made = parameters(model.blueprint, request, frames, count, effective)
    return Output(frames, parameters_made)


def run(
    model: Model,
    request: Request,
    progress: Progress,
    save: postprocess.Save | None = None,
    keep: bool = True,
) -> Result:
    """Generate everything that one request asks for, as `runtime.pipeline.run` does."""
    clock, effective = Clock(progress), dict[str, object]()
    delivered: list[numpy.ndarray] = []
    paths: list[Path] = []
    for index, seed in enumerate(request.seeds):
        before = time.perf_counter()

        def on_step(done: int, total: int) -> None:
            nonlocal before
            now = time.perf_counter()
            clock.step_seconds.append(now - before)
            before = now
            progress.on_step(done, total)

        with clock.stage("denoise"):
            output = make(model, request, seed, on_step)
        effective = effective or output.parameters
        frames, written = postprocess.deliver(
            model.blueprint, request, index, output.frames, None, effective, clock, save, keep
        )
        paths += written
        delivered += [] if frames is None else [frames]
    return Result(
        frames=tuple(delivered),
        latents=(),
        parameters=effective,
        seeds=request.seeds,
        seconds=clock.seconds,
        step_seconds=tuple(clock.step_seconds),
        paths=tuple(paths),
    )


class Cancelled(Exception):
    """Ends a call at its next step."""


def in_steps(work: Callable[[OnStep], Output]) -> Generator[tuple[int, int], None, Output]:
    """Run `work` in a thread that stops at each of its steps: (done, total) of each, and what it returns.

    Closing the generator ends the work at the step where it stands.
    """
    reached: queue.SimpleQueue[Any] = queue.SimpleQueue()
    turn, closed = threading.Semaphore(0), threading.Event()

    def on_step(done: int, total: int) -> None:
        reached.put((done, total))
        turn.acquire()
        if closed.is_set():
            raise Cancelled

    def body() -> None:
        try:
            with default_torch_state():
                reached.put(work(on_step))
        except BaseException as error:
            reached.put(error)

    thread = threading.Thread(target=body, name="pipeline", daemon=True)
    thread.start()
    try:
        while not isinstance(step := reached.get(), Output | BaseException):
            yield step
            turn.release()
    finally:
        closed.set()
        turn.release()
        thread.join()
    if isinstance(step, BaseException):
        raise step
    return step


@dataclass(frozen=True)
class Planned:
    """A request before its first step. steps: how many each output takes, as far as it is known."""

    steps: int
    revised: str | None = None
    warnings: tuple[str, ...] = ()

    def settled(self, request: Request) -> Request:
        """The request as it is: the pipeline decides nothing of it before it runs."""
        return request


def condition(model: Model, request: Request) -> Planned:
    """The pipeline encodes the prompt itself."""
    return Planned(request.schedule.steps)


@dataclass(eq=False)
class Slot:
    """One output in the loop; see `runtime.continuous.BatchSlot`."""

    model: Model
    request: Request
    seed: int
    job: str
    index: int
    priority: int
    owner: str
    steps: Generator[tuple[int, int], None, Output] | None = None
    output: Output | None = None


def make_slot(
    model: Model,
    request: Request,
    conditioning: object,
    job: str,
    index: int,
    priority: int = 0,
    previews: int = 0,
    owner: str = "",
) -> Slot:
    """Output number `index` of a request, before its first step. There are no previews."""
    return Slot(model, request, request.seeds[index], job, index, priority, owner)


@dataclass
class OneByOne:
    """The outputs that wait for a pipeline, one of which runs; see `runtime.continuous.Continuous`."""

    max_batch: int | None = None
    step_times: StepTimes = field(default_factory=StepTimes)
    background: Background = field(default_factory=Background)
    slots: list[Slot] = field(default_factory=list[Slot])

    def add(self, slot: Slot) -> None:
        self.slots.append(slot)

    def leave(self, job: str) -> None:
        """Remove the outputs of a job; one that runs ends at the step where it stands."""
        for slot in self.slots:
            if slot.job == job and slot.steps is not None:
                slot.steps.close()
        self.slots = [slot for slot in self.slots if slot.job != job]

    def choose(self, count: int | None = None) -> Turn:
        """The output that runs, else the first one of the highest priority."""
        running = [slot for slot in self.slots if slot.steps is not None]
        slot = running[0] if running else max(self.slots, key=lambda slot: slot.priority)
        return Turn(((slot.job, slot.index),), 1)

    def run(self, turn: Turn) -> StepResult:
        """Run the next step of an output."""
        slot = next(slot for slot in self.slots if (slot.job, slot.index) == turn.outputs[0])
        if slot.steps is None:
            slot.steps = in_steps(lambda on_step: make(slot.model, slot.request, slot.seed, on_step))
        started = time.perf_counter()
        try:
            next(slot.steps)
        except StopIteration as end:
            slot.output = end.value
            self.slots.remove(slot)
            return self._step_result(slot, 0, started, done=True)
        except Exception as error:
            self.slots = [other for other in self.slots if other.job != slot.job]
            return self._step_result(slot, 0, started, error=error)
        result = self._step_result(slot, 1, started)
        self.step_times.record(_kind(slot), 1, result.seconds)
        return result

    def _step_result(
        self, slot: Slot, steps: int, started: float, done: bool = False, error: Exception | None = None
    ) -> StepResult:
        slots: Any = (slot,)
        return StepResult(slots, steps, time.perf_counter() - started, slots if done else (), error)


def _kind(slot: Slot) -> Hashable:
    output = slot.request.output
    return output.height * output.width * output.num_frames, 1


def finish(model: Model, request: Request, slot: Slot) -> tuple[Made, dict[str, object]]:
    """(an output that the loop is done with, its effective parameters)."""
    output = slot.output
    assert output is not None
    return Made(output.frames, torch.empty(0)), output.parameters


def usage(model: Model, request: Request) -> dict[str, object]:
    """OpenAI's token counts: of the prompt, where the pipeline has a tokenizer; outputs have none here."""
    tokenizer, text = getattr(model.pipe, "tokenizer", None), 0
    with suppress(TypeError, ValueError):
        text = 0 if tokenizer is None else len(tokenizer(request.text.prompt)["input_ids"])
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": 0,
        "total_tokens": text,
    }
