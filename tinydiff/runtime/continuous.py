"""Images of many requests in one denoising loop.

This decides which of them run the next steps together, and how many steps.

Images of one `batch_key` share the loop, and join and leave it between two steps. The batch size is the one
that measured step times make worthwhile (`step_times`). Where more images wait than that, owners and jobs
take turns (`fair_order`). Images that cannot share a batch, such as a video and small images, share the
device's time: the highest priority first, then whoever had the least. An owner whose images need many
different batches gets no more time than an owner whose images need one.
All state is values, so an image may pause, and a step that fails leaves every image as it was: a batch that
does not fit into memory is made smaller, and an image that fails alone is returned with its error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.models.recipe import LoopInputs
from tinydiff.ops.network import Family
from tinydiff.records import Request
from tinydiff.runtime import pipeline
from tinydiff.runtime.background import Background
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.fair_order import TurnKey, fair_order
from tinydiff.runtime.pipeline import Conditioning
from tinydiff.runtime.shortage import give_memory_back, short_of_memory
from tinydiff.runtime.step_times import StepTimes
from tinydiff.sampling import batch
from tinydiff.sampling.loop import Denoise, Denoising

MAX_CALL_SECONDS = 0.1
"""Several steps run in one call where they take no longer than this; new requests are seen between calls."""


@dataclass(eq=False)
class BatchSlot:
    """One output in the loop."""

    model: Model
    conditioning: Conditioning
    seed: int
    job: str
    """The id of its job."""
    index: int
    """Which of the job's outputs it is."""
    priority: int
    preview_steps: tuple[int, ...] = ()
    """Numbers of steps after which a preview is wanted; the loop returns there."""
    owner: str = ""
    """Whose job it is."""
    stage: int = 0
    """Number of the pipeline's stage that it is in."""
    earlier_steps: int = 0
    """Steps of the stages before that one."""
    inputs: LoopInputs = field(init=False)
    """Of its stage."""
    denoising: Denoising = field(init=False)
    to_image_tokens: Callable[[Tensor], Tensor] = field(init=False)
    """The tokens in the loop -> those of the output."""
    compiled: Denoise | None = None
    """Replaces the image's own function once its graph is compiled."""
    batch_key: Hashable = None
    started: bool = False
    """Whether a step of it has run."""

    def __post_init__(self) -> None:
        self._begin_stage()

    @property
    def turn_key(self) -> TurnKey:
        """(owner, job): see `fair_order`."""
        return self.owner, self.job

    @property
    def family(self) -> Family:
        """The network of its stage."""
        stage = self.conditioning.stages[self.stage]
        return self.model.nets[stage.stage.denoisers[0]].network.family

    @property
    def has_next_stage(self) -> bool:
        """Whether its stage is done and another one comes."""
        return self.denoising.done and self.stage + 1 < len(self.conditioning.stages)

    def begin_next_stage(self) -> None:
        """Begin the next stage with the latents of the one that is done."""
        tokens = self.to_image_tokens(self.denoising.state.x)
        before = self.inputs, self.inputs.unpack(tokens)
        self.earlier_steps += self.denoising.table.steps
        self.stage += 1
        self._begin_stage(before)

    def _begin_stage(self, before: tuple[LoopInputs, Sequence[Tensor]] | None = None) -> None:
        model, conditioning, number = self.model, self.conditioning, self.stage
        begun = pipeline.begin(model, conditioning, self.seed, number, before)
        self.inputs, self.denoising, self.to_image_tokens = begun
        if model.blueprint.compiled:
            self.compiled = pipeline.denoiser(model, conditioning.stages[number], True)


def make_slot(
    model: Model,
    request: Request,
    conditioning: Conditioning,
    job: str,
    index: int,
    priority: int = 0,
    previews: int = 0,
    owner: str = "",
) -> BatchSlot:
    """Output number `index` of a request, before its first step.

    It runs eagerly, and compiled once that is ready where the model is to be compiled. previews: how many are
    wanted, at even distances.
    """
    steps, seed = conditioning.steps, request.seeds[index]
    preview_steps = tuple(-(-i * steps // (previews + 1)) for i in range(1, previews + 1))
    return BatchSlot(model, conditioning, seed, job, index, priority, preview_steps, owner)


class Turn(NamedTuple):
    """What one call of `Continuous.run` shall do."""

    outputs: tuple[tuple[str, int], ...]
    """(job, index) of each image of the batch."""
    steps: int
    """Steps to run; 0 lets the one image begin its next stage."""


class StepResult(NamedTuple):
    """What one call of `Continuous.run` did."""

    slots: tuple[BatchSlot, ...]
    """The images of the batch."""
    steps: int
    """Steps done; 0 where they failed, or where the image began its next stage."""
    seconds: float
    done: tuple[BatchSlot, ...] = ()
    """Images whose last step this was; they have left the loop."""
    error: Exception | None = None
    """Why the images of `slots` cannot continue; they have left the loop."""


@dataclass
class Continuous:
    """The images in the loop of a model's denoiser. Used by one thread."""

    step_times: StepTimes = field(default_factory=StepTimes)
    background: Background = field(default_factory=Background)
    slots: list[BatchSlot] = field(default_factory=list[BatchSlot])
    """In order of arrival."""
    _batch: tuple[list[BatchSlot], batch.Batch] | None = None
    """The slots of the latest batch, and their state while they stay together."""
    max_batch: int | None = None
    """Images that run together at most; the others pause."""
    _device_seconds: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    """Batch key -> device seconds that its images had, divided by their share of the device."""
    _turns: dict[TurnKey, int] = field(default_factory=dict[TurnKey, int])
    """Number of the turn at which an owner or a job last started an image."""

    def add(self, slot: BatchSlot) -> None:
        """Let an image in. It starts with the next step of its batch key."""
        self._assign_batch_key(slot)
        self.slots.append(slot)

    def leave(self, job: str) -> None:
        """Remove the images of a job."""
        self.slots = [slot for slot in self.slots if slot.job != job]
        if not self.slots:
            self._batch = None  # it holds the weights

    def slot(self, job: str, index: int) -> BatchSlot:
        """Output number `index` of a job, which is in the loop."""
        return next(slot for slot in self.slots if (slot.job, slot.index) == (job, index))

    def steps_done(self, slot: BatchSlot) -> int:
        """Steps that an image has done, over all stages."""
        return slot.earlier_steps + self._step_of(slot)

    def clean(self, slot: BatchSlot) -> Tensor:
        """The clean tokens [1, L, P] implied by the latest step."""
        if self._batch is None or slot not in self._batch[0]:
            return slot.denoising.state.h1
        slots, running = self._batch
        index = slots.index(slot)
        return running.joined.state.h1[index : index + 1]

    def step(self, count: int | None = None) -> StepResult:
        """Run a step, or the few that fit into `MAX_CALL_SECONDS`, of the images whose turn it is.

        count: the batch size; by default as many images as measured step times make worthwhile.
        """
        return self.run(self.choose(count))

    def choose(self, count: int | None = None) -> Turn:
        """Whose turn it is, for how many steps. `count` as of `step`. There are images in the loop."""
        for slot in self.slots:
            if slot.has_next_stage:
                return Turn(((slot.job, slot.index),), 0)
        chosen = self._choose_slots(count)
        each = self.step_times.seconds(_time_kind(chosen[0].denoising), len(chosen))
        most = self._steps_until_preview(chosen)
        steps = max(1, min(most, int(MAX_CALL_SECONDS / each))) if each else 1
        return Turn(tuple((slot.job, slot.index) for slot in chosen), steps)

    def run(self, turn: Turn) -> StepResult:
        """Run what was chosen."""
        chosen = [self.slot(*key) for key in turn.outputs]
        if not turn.steps:
            error = self._begin_next_stage(chosen[0])
            return StepResult(tuple(chosen), 0, 0.0, error=error)
        if self._batch is None or self._batch[0] != chosen:
            self._split_batch()
            self._note_turns(chosen)
            self._batch = chosen, batch.join(chosen[0].family, [slot.denoising for slot in chosen])
        before, kind = self._batch[1], _time_kind(chosen[0].denoising)
        started = time.perf_counter()
        try:
            compiled = chosen[0].compiled
            best = compiled and self.background.best(compiled, before.joined)
            after = batch.advance(before, turn.steps, best)
            if after.joined.state.x.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            return self._on_step_error(chosen, kind, error)
        seconds, steps = time.perf_counter() - started, after.joined.step - before.joined.step
        self._batch = chosen, after
        self.step_times.record(kind, len(chosen), seconds / steps)
        self._device_seconds[chosen[0].batch_key] += seconds / self._share(chosen[0].batch_key)
        done = () if batch.steps_left(after) else self._split_batch()
        return StepResult(tuple(chosen), steps, seconds, done)

    def _begin_next_stage(self, slot: BatchSlot) -> Exception | None:
        """Take an output into its pipeline's next stage. One that fails leaves the loop."""
        try:
            slot.begin_next_stage()
        except Exception as error:
            self.leave(slot.job)
            return error
        self._assign_batch_key(slot)
        return None

    def _assign_batch_key(self, slot: BatchSlot) -> None:
        """Compute the slot's batch key.

        A new key starts level with the key that had the least of the device.
        """
        slot.batch_key = batch.batch_key(slot.family, slot.denoising)
        present = {other.batch_key for other in self.slots}
        self._device_seconds = {
            key: seconds for key, seconds in self._device_seconds.items() if key in present
        }
        self._device_seconds.setdefault(slot.batch_key, min(self._device_seconds.values(), default=0.0))

    def _choose_slots(self, count: int | None) -> list[BatchSlot]:
        """Of the highest priority, the batch key that had the least of its share of the device; of its images
        as many as run together, owners and jobs taking turns.
        """
        highest = max(slot.priority for slot in self.slots)
        keys = (slot.batch_key for slot in self.slots if slot.priority == highest)
        key = min(keys, key=self._device_seconds.__getitem__)
        same = fair_order([slot for slot in self.slots if slot.batch_key == key], self._turns)
        most = min(len(same), self.max_batch or len(same))
        return same[: count or self.step_times.batch_size(_time_kind(same[0].denoising), most)]

    def _share(self, batch_key: Hashable) -> float:
        """The share of the device that a batch key may have, where every owner has 1: an owner divides its
        own evenly among the keys of its images.
        """
        keys: dict[str, set[Hashable]] = {}
        for slot in self.slots:
            keys.setdefault(slot.owner, set()).add(slot.batch_key)
        return sum(1 / len(own) for own in keys.values() if batch_key in own)

    def _note_turns(self, chosen: list[BatchSlot]) -> None:
        """Note the owners and jobs whose images start now."""
        present = {key for slot in self.slots for key in (slot.turn_key, slot.turn_key[:1])}
        self._turns = {key: turn for key, turn in self._turns.items() if key in present}
        for slot in chosen:
            if not slot.started:
                slot.started = True
                turn = max(self._turns.values(), default=0) + 1
                self._turns[slot.turn_key] = self._turns[slot.turn_key[:1]] = turn

    def _step_of(self, slot: BatchSlot) -> int:
        """Steps of its stage that an image has done."""
        if self._batch is None or slot not in self._batch[0]:
            return slot.denoising.step
        slots, running = self._batch  # a batch of several counts from where it was formed
        return running.joined.step + (slot.denoising.step if len(slots) > 1 else 0)

    def _steps_until_preview(self, chosen: list[BatchSlot]) -> int:
        """Steps until the next preview of one of the images; at most until one is done or changes its
        expert.
        """
        counts: list[int] = []
        for slot in chosen:
            step = self._step_of(slot)
            done = slot.earlier_steps + step
            counts += [slot.denoising.stop - step, *(at - done for at in slot.preview_steps if at > done)]
        return min(counts)

    def _split_batch(self) -> tuple[BatchSlot, ...]:
        """Give each image its part of the batch's state. Finished images leave the loop and are returned."""
        if self._batch is None:
            return ()
        (slots, running), self._batch = self._batch, None
        for slot, denoising in zip(slots, batch.split(running), strict=True):
            switched, slot.denoising = denoising.stop != slot.denoising.stop, denoising
            if switched and slot in self.slots:
                self._assign_batch_key(slot)  # it goes on with another expert
        done = tuple(
            slot for slot in slots if slot.denoising.done and not slot.has_next_stage and slot in self.slots
        )
        self.slots = [slot for slot in self.slots if slot not in done]
        return done

    def _on_step_error(self, chosen: list[BatchSlot], kind: Hashable, error: Exception) -> StepResult:
        self._split_batch()  # the images are as before this step
        if len(chosen) > 1:
            # Smaller batches show whether memory was short, or which image fails.
            self.step_times.limit_below(kind, len(chosen))
            give_memory_back()
            return StepResult(tuple(chosen), 0, 0.0)
        self.leave(chosen[0].job)
        if not short_of_memory(error):
            self.step_times.unlimit(kind)  # the image failed, not the batch size
        return StepResult(tuple(chosen), 0, 0.0, error=error)


def _time_kind(image: Denoising) -> tuple[int, int]:
    """What the time of a step depends on: the tokens and the branches of guidance."""
    return image.state.x.shape[1], len(image.network.branches)
