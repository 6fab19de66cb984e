"""What a server does on its device: load a model, encode requests, denoise and decode their images.

Of the server's models one is current, and every command is for it. Another one becomes current once the loop
is empty; the others stay loaded while the plan has room for them.

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

from tinydiff.parallel.plan import ALONE
from tinydiff.parallel.ranks import Ranks, command_group, describe_failure, from_first, to_all
from tinydiff.records import RankError, Request
from tinydiff.runtime import aside, device_model, fit, preview, step_down, torch_state
from tinydiff.runtime import blueprint as blueprints
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.continuous import BatchSlot, StepResult, Turn
from tinydiff.runtime.loras import Read
from tinydiff.runtime.pipeline import Conditioning, Made
from tinydiff.runtime.shortage import give_memory_back, short_of_memory
from tinydiff.runtime.step_times import StepTimes

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
    """The models of a server on this rank, and the images in the loop. Used by one thread."""

    def __init__(
        self, blueprints: Mapping[str, Blueprint], max_batch: int, ranks: Ranks | None = None
    ) -> None:
        """blueprints: of each model by its name, with the adapters that are merged; the first is current, and
        several ranks have one. max_batch: images that share the loop at most.
        """
        self.ranks = ranks
        self.commands = ALONE if ranks is None else command_group()
        self.models = {
            name: device_model.make(each, max_batch, ranks is None) for name, each in blueprints.items()
        }
        self._order = tuple(self.models)
        """Their names, the one used last at the end."""
        self.use(next(iter(blueprints)))
        self.failure: RankError | None = None
        """Why the ranks are no longer in step."""
        self._requests: dict[str, tuple[Request, Conditioning]] = {}
        self._done: dict[tuple[str, int], BatchSlot] = {}
        """(job, index) -> an output whose last step is done."""

    # --- ranks ---

    def run_command(
        self, method: Callable[..., T], arguments: Sequence[Any], named: Mapping[str, object]
    ) -> T:
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

    # --- the models ---

    def use(self, name: str) -> None:
        """Make a model the current one. The loop is empty."""
        self.name, self.current = name, self.models[name]
        self._order = (*(other for other in self._order if other != name), name)

    @property
    def blueprint(self) -> Blueprint:
        """Of the current model."""
        return self.current.blueprint

    @property
    def loop(self) -> Any:
        """The images of the current model that are being denoised."""
        return self.current.loop

    @property
    def model(self) -> Model | None:
        """The current model, where it is on the device."""
        return self.current.model

    def loaded(self) -> Model:
        """The current model, which is on the device."""
        assert self.current.model is not None, "load comes first"
        return self.current.model

    def loaded_names(self) -> frozenset[str]:
        """The models that are on the device. For any thread."""
        return frozenset(name for name, each in self.models.items() if each.model is not None)

    @property
    def waits(self) -> bool:
        """Whether the current model waits in the host's memory, so that `wake` brings it back."""
        return self.current.waiting is not None

    def make_room(self, keep: bool, least: int = 0) -> list[str]:
        """Let the least recently used other models leave until the current one's plan fits.

        keep: as of `unload`. least: how many leave at least, if there are so many. Returns their names.
        """
        others = [name for name in self._order[:-1] if self.models[name].model is not None]
        if not others:
            return []
        count = max(least, device_model.leaving(self.current, [self.models[name] for name in others]))
        for name in others[:count]:
            self.unload(keep, name)
        return others[:count]

    @on_all_ranks
    def load(self) -> None:
        """Load the current model, without adapters of requests."""
        self.current.load(self.ranks)

    def unload(self, keep: bool, name: str | None = None) -> bool:
        """Remove a model, by default the current one, from the device.

        keep: its weights wait in the host's memory, if that has room.

        Returns whether they do.
        """
        name = self.name if name is None else name
        model = self.models[name].model
        assert model is not None, "asked where it is loaded"
        waits = keep and aside.can_wait(model, 1 if self.ranks is None else self.ranks.layout.size)
        del model
        self._unload(name, waits)
        return waits

    @on_all_ranks
    def _unload(self, name: str, waits: bool) -> None:
        self.models[name].unload(waits)

    @on_all_ranks
    def wake(self) -> None:
        """Bring the current model back from the host's memory, with the adapters that it had."""
        self.current.wake()

    def step_down(self, request: Request) -> list[str]:
        """Load the current model again with less of it on the device.

        This is for a request that ran out of memory and fits then. All jobs are removed first.

        Returns the components that left; none where nothing can be done, or there are several ranks.
        """
        smaller = None if self.ranks is not None else self.current.smaller()
        if smaller is None or not fit.fits(smaller, request):
            return []
        for job in self.jobs():
            self.remove(job)
        moved = step_down.moved(self.loaded().blueprint, smaller)
        self.unload(keep=False)
        self.current.blueprint, self.current.settled = smaller, True
        self.loop.step_times = StepTimes()  # and what fitted before
        self.load()
        return moved

    @on_all_ranks
    def attach(self, adapters: tuple[Read, ...]) -> None:
        """Put adapters beside the weights, in place of those that are there."""
        self.current.model = blueprints.with_adapters(self.loaded(), adapters, "dynamic")

    # --- requests ---

    @on_all_ranks
    def condition(self, job: str, request: Request) -> Conditioning:
        """Run the encoders for a job. Its outputs can then be started."""
        conditioning = self.current.backend.condition(self.loaded(), request)
        self._requests[job] = conditioning.settled(request), conditioning
        return conditioning

    @on_all_ranks
    def start(self, job: str, index: int, priority: int = 0, previews: int = 0, owner: str = "") -> None:
        """Let output number `index` of a job into the loop. previews: how many of it are wanted."""
        request, conditioning = self._requests[job]
        asked = self.loaded(), request, conditioning, job, index
        self.loop.add(self.current.backend.make_slot(*asked, priority, previews, owner))

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
        return self.current.to_colours is not None

    @on_all_ranks
    def preview(self, job: str) -> numpy.ndarray:
        """What a job's first output may become, uint8 [height, width, 3]: that of the latest step."""
        assert self.current.to_colours is not None, "asked where there are previews"
        slot, output = self.loop.slot(job, 0), self._requests[job][0].output
        latents = slot.inputs.unpack(slot.to_image_tokens(self.loop.clean(slot)))[0]
        return preview.preview_frame(self.current.to_colours, latents, output.height, output.width)

    @on_all_ranks
    def finish(self, job: str, index: int) -> tuple[Made, dict[str, object]]:
        """(an output whose last step is done, decoded; its effective parameters)."""
        return self.current.backend.finish(
            self.loaded(), self._requests[job][0], self._done.pop((job, index))
        )

    def jobs(self) -> set[str]:
        """Jobs that are conditioned and not removed."""
        return set(self._requests)

    @on_all_ranks
    def remove(self, job: str) -> None:
        """Forget a job and remove its images from the loop."""
        self.loop.leave(job)
        self._requests.pop(job, None)
        self._done = {key: slot for key, slot in self._done.items() if key[0] != job}
