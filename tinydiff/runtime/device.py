"""What a server does on its device: load the model, encode requests, denoise and decode their images.

On several GPUs every rank has a `Device`, and all of them run the same commands in the same order, because
each command communicates. The leading rank, where the scheduler runs, calls methods. The others are in
`follow`, and are told each call. What is decided by measured times is decided by the leading rank and told
too. A command that fails on all ranks alike raises its error; one that fails on some raises RankError, and
the server ends, since those ranks are no longer in step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy
from torch import Tensor

from tinydiff.parallel.plan import ALONE
from tinydiff.parallel.ranks import Ranks, command_group, describe_failure, from_first, to_all
from tinydiff.records import RankError, Request
from tinydiff.runtime import aside, backends, postprocess, preview, torch_state
from tinydiff.runtime import blueprint as blueprints
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.continuous import BatchSlot, StepResult, Turn
from tinydiff.runtime.loras import Read
from tinydiff.runtime.pipeline import Conditioning, Made
from tinydiff.runtime.shortage import give_memory_back, short_of_memory

P = ParamSpec("P")
T = TypeVar("T")

NO_COMMAND: tuple[Any, ...] = ()
"""Told in place of (method, arguments, named arguments) when the server ends."""


def on_all_ranks(method: Callable[Concatenate[Device, P], T]) -> Callable[Concatenate[Device, P], T]:
    """Lets the other ranks run the method too. Arguments are small objects that can be pickled."""

    @wraps(method)
    def broadcast(self: Device, *arguments: P.args, **named: P.kwargs) -> T:
        from_first(self.commands, (method.__name__, arguments, named))
        return self.run_command(method, arguments, named)

    return broadcast


class Device:
    """The model of a server on this rank, and the images in its loop. Used by one thread."""

    def __init__(self, blueprint: Blueprint, max_batch: int, ranks: Ranks | None = None) -> None:
        """blueprint: with the adapters that are merged. max_batch: images that share the loop at most."""
        self.blueprint, self.ranks, self.backend = blueprint, ranks, backends.of(blueprint)
        self.commands = ALONE if ranks is None else command_group()
        # Two threads of one rank may not communicate at once, so a graph is compiled when it is needed.
        self.loop = self.backend.make_loop(max_batch, ranks is None)
        self.model: Model | None = None
        self._waiting: Model | None = None
        """The model while it waits in the host's memory."""
        self.failure: RankError | None = None
        """Why the ranks are no longer in step."""
        self._to_colours: Tensor | None = None
        self._requests: dict[str, tuple[Request, Conditioning]] = {}
        self._done: dict[tuple[str, int], BatchSlot] = {}
        """(job, index) -> an output whose last step is done."""

    # --- ranks ---

    def run_command(self, method: Callable[..., T], arguments: Sequence[Any], named: Mapping[str, Any]) -> T:
        """Run a method on this rank. Raises its error where it failed on all ranks, else RankError."""
        error = None
        try:
            value = method(self, *arguments, **named)
        except Exception as raised:
            value, error = None, raised
            if short_of_memory(raised):
                give_memory_back()
        rank = self.commands.rank
        failures = to_all(self.commands, None if error is None else describe_failure(rank, error))
        first = next((failure for failure in failures if failure), None)
        if first is not None and None in failures:
            self.failure = RankError(first)
            raise self.failure from error
        if error is not None:
            raise error
        return cast("T", value)

    @torch_state.default_torch_state()
    def follow(self) -> None:
        """Run the commands of the leading rank until it closes the device. Raises RankError."""
        while command := from_first(self.commands, NO_COMMAND):
            name, arguments, named = command
            with suppress(Exception):  # the leading rank has the same error
                self.run_command(getattr(Device, name).__wrapped__, arguments, named)
            if self.failure is not None:
                raise self.failure

    def close(self) -> None:
        """Let the other ranks return from `follow`, unless they have failed."""
        if self.failure is None:
            from_first(self.commands, NO_COMMAND)

    # --- the model ---

    @on_all_ranks
    def load(self) -> None:
        """Load the model, without adapters of requests."""
        self.model = self.backend.load(self.blueprint, self.ranks)
        self._to_colours = self.backend.fit_colours(self.model)

    def unload(self, keep: bool) -> bool:
        """Remove the model from the device. keep: its weights wait in the host's memory, if that has room.

        Returns whether they do.
        """
        waits = keep and aside.can_wait(self.loaded(), 1 if self.ranks is None else self.ranks.layout.size)
        self._unload(waits)
        return waits

    @on_all_ranks
    def _unload(self, waits: bool) -> None:
        model, self.model = self.loaded(), None
        aside.release(model)
        if waits:
            self._waiting = aside.moved(model, aside.HOST, pinned=model.blueprint.pinned is not False)
        del model
        postprocess.unload()
        give_memory_back()

    @property
    def waits(self) -> bool:
        """Whether the model waits in the host's memory, so that `wake` brings it back."""
        return self._waiting is not None

    @on_all_ranks
    def wake(self) -> None:
        """Bring the waiting model back, with the adapters that it had."""
        assert self._waiting is not None, "asked where a model waits"
        self.model = aside.moved(self._waiting, self.blueprint.device)
        self._waiting = None

    @on_all_ranks
    def attach(self, adapters: tuple[Read, ...]) -> None:
        """Put adapters beside the weights, in place of those that are there."""
        self.model = blueprints.with_adapters(self.loaded(), adapters, "dynamic")

    # --- requests ---

    @on_all_ranks
    def condition(self, job: str, request: Request) -> Conditioning:
        """Run the encoders for a job. Its outputs can then be started."""
        conditioning = self.backend.condition(self.loaded(), request)
        self._requests[job] = request, conditioning
        return conditioning

    @on_all_ranks
    def start(self, job: str, index: int, priority: int = 0, previews: int = 0, owner: str = "") -> None:
        """Let output number `index` of a job into the loop. previews: how many of it are wanted."""
        request, conditioning = self._requests[job]
        asked = self.loaded(), request, conditioning, job, index
        self.loop.add(self.backend.make_slot(*asked, priority, previews, owner))

    def step(self, count: int | None = None) -> StepResult:
        """Run the next steps of some images. count: how many; by default as many as pays."""
        return self._run_turn(self.loop.choose(count))

    @on_all_ranks
    def _run_turn(self, turn: Turn) -> StepResult:
        result = self.loop.run(turn)
        self._done |= {(slot.job, slot.index): slot for slot in result.done}
        return result

    @property
    def has_previews(self) -> bool:
        """Whether `preview` may be called."""
        return self._to_colours is not None

    @on_all_ranks
    def preview(self, job: str) -> numpy.ndarray:
        """What a job's first output may become, uint8 [height, width, 3]: that of the latest step."""
        assert self._to_colours is not None, "asked where there are previews"
        slot, output = self.loop.slot(job, 0), self._requests[job][0].output
        latents = slot.inputs.unpack(slot.to_image_tokens(self.loop.clean(slot)))[0]
        return preview.preview_frame(self._to_colours, latents, output.height, output.width)

    @on_all_ranks
    def finish(self, job: str, index: int) -> tuple[Made, dict[str, Any]]:
        """(an output whose last step is done, decoded; its effective parameters)."""
        return self.backend.finish(self.loaded(), self._requests[job][0], self._done.pop((job, index)))

    def jobs(self) -> set[str]:
        """Jobs that are conditioned and not removed."""
        return set(self._requests)

    @on_all_ranks
    def remove(self, job: str) -> None:
        """Forget a job and remove its images from the loop."""
        self.loop.leave(job)
        self._requests.pop(job, None)
        self._done = {key: slot for key, slot in self._done.items() if key[0] != job}

    def loaded(self) -> Model:
        """The model, where it is on the device."""
        assert self.model is not None, "load comes first"
        return self.model
