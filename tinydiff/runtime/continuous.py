"""Images of many requests in one denoising loop: who goes on together, and for how long.

Images of one form (`sampling.batch`) share the loop and join and leave it between two steps; how many pays is
measured (`pace`), and where there are more, keys and jobs take turns (`turns`). Several forms, say a video
and small images, share the device's time, the highest priority first; a key that asks for many forms has no
more of it than one that asks for one. All state lies in values, so an image may pause, and a step that fails
leaves every image as it was: a batch that does not fit into memory is made smaller, an image that fails alone
is handed back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydiff.records import Request
from tinydiff.runtime import pipeline
from tinydiff.runtime.background import Background
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.pace import Pace
from tinydiff.runtime.pipeline import Conditioning
from tinydiff.runtime.turns import Path, line
from tinydiff.sampling import batch
from tinydiff.sampling.loop import Denoise, Denoising

MOMENT = 0.1
"""Seconds that the loop runs at most before it hears of anything new, where several steps fit into that."""


@dataclass(eq=False)
class BatchSlot:
    """One image in the loop."""

    owner: str
    """Whose it is: the id of its job."""
    index: int
    """Which of the owner's images."""
    priority: int
    seat: Denoising
    shown: Callable[[Tensor], Tensor]
    """The seat's tokens -> those of the image."""
    compiled: Denoise | None = None
    """What takes the place of the seat's own function once it is compiled."""
    looks: tuple[int, ...] = ()
    """Numbers of steps after which it is looked at, so the loop halts there."""
    form: Hashable = None
    key: str = ""
    """Whose job it is."""
    begun: bool = False
    """Whether a step of it was made."""

    @property
    def path(self) -> Path:
        """(key, job): see `turns`."""
        return self.key, self.owner


def sitting(
    model: Model,
    request: Request,
    conditioning: Conditioning,
    owner: str,
    index: int,
    priority: int = 0,
    looks: int = 0,
    key: str = "",
) -> BatchSlot:
    """Output number `index` of a request as it enters the loop: eager, and once that is ready compiled where
    the model is to be.

    looks: how often it is looked at on its way, at even distances.
    """
    seat, shown = pipeline.begin(model, request, conditioning, request.seeds[index])
    compiled = pipeline.denoiser(model, request, conditioning, True) if model.blueprint.compiled else None
    steps = conditioning.rows.steps
    at = tuple(-(-i * steps // (looks + 1)) for i in range(1, looks + 1))
    return BatchSlot(owner, index, priority, seat, shown, compiled, at, key=key)


class Stepped(NamedTuple):
    """What a few steps of one batch came to."""

    sittings: tuple[BatchSlot, ...]
    made: int
    """Steps; 0 where they failed."""
    seconds: float
    done: tuple[BatchSlot, ...] = ()
    """Those whose last step it was; they have left the loop."""
    error: Exception | None = None
    """Why the images of `sittings` cannot go on; they have left the loop."""


@dataclass
class Continuous:
    """The images of a model's denoiser that are in the loop. For one thread."""

    family: Any
    pace: Pace = field(default_factory=Pace)
    background: Background = field(default_factory=Background)
    sittings: list[BatchSlot] = field(default_factory=list)
    """In the order in which they came."""
    _joined: tuple[list[BatchSlot], batch.Batch] | None = None
    most: int | None = None
    """Images that go on together at most; the others pause."""
    _served: dict[Hashable, float] = field(default_factory=dict)
    """Device seconds that each form had, over its share of them."""
    _turns: dict[Path, int] = field(default_factory=dict)
    """The number of the turn at which each key and each job last began an image."""

    def add(self, sitting: BatchSlot) -> None:
        """Let an image in; it begins with the next step of its form."""
        self._placed(sitting)
        self.sittings.append(sitting)

    def leave(self, owner: str) -> None:
        """Take the images of `owner` out."""
        self.sittings = [sitting for sitting in self.sittings if sitting.owner != owner]
        if not self.sittings:
            self._joined = None  # with it the weights

    def clean(self, sitting: BatchSlot) -> tuple[Tensor, int]:
        """(the clean tokens [1, L, P] that the last step implied, how many steps are made)."""
        if self._joined is None or sitting not in self._joined[0]:
            return sitting.seat.state.h1, sitting.seat.at
        sittings, joined = self._joined
        place, on = sittings.index(sitting), joined.whole
        return on.state.h1[place : place + 1], on.at if len(sittings) == 1 else sitting.seat.at + on.at

    def step(self, count: int | None = None) -> Stepped:
        """One step, or the few that fit into a moment, of those whose turn it is: `count` of them, or as many
        as are worth while.
        """
        chosen = self._chosen(count)
        if self._joined is None or self._joined[0] != chosen:
            self._part()
            self._begin(chosen)
            self._joined = chosen, batch.together(self.family, [sitting.seat for sitting in chosen])
        joined, key = self._joined[1], _size(chosen[0].seat)
        pace = self.pace.step(key, len(chosen))
        steps = max(1, min(self._unseen(chosen, batch.left(joined)), int(MOMENT / pace))) if pace else 1
        started = time.perf_counter()
        try:
            compiled = chosen[0].compiled
            going = batch.advance(joined, steps, compiled and self.background.best(compiled, joined.whole))
            if going.whole.state.x.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            return self._stumbled(chosen, key, error)
        seconds, made = time.perf_counter() - started, going.whole.at - joined.whole.at
        self._joined = chosen, going
        self.pace.measured(key, len(chosen), seconds / made)
        self._served[chosen[0].form] += seconds / self._share(chosen[0].form)
        done = () if batch.left(going) else self._part()
        return Stepped(tuple(chosen), made, seconds, done)

    def _placed(self, sitting: BatchSlot) -> None:
        """Note the image's form; a new one begins level with the one that had least of the device."""
        sitting.form = batch.form(self.family, sitting.seat)
        present = {other.form for other in self.sittings}
        self._served = {form: seconds for form, seconds in self._served.items() if form in present}
        self._served.setdefault(sitting.form, min(self._served.values(), default=0.0))

    def _chosen(self, count: int | None) -> list[BatchSlot]:
        """Those of the highest priority, of the form that had least of its share of the device; keys and jobs
        in turn.
        """
        first = max(sitting.priority for sitting in self.sittings)
        form = min((s.form for s in self.sittings if s.priority == first), key=self._served.__getitem__)
        alike = line([s for s in self.sittings if s.form == form], self._turns)
        return alike[
            : count or self.pace.size(_size(alike[0].seat), min(len(alike), self.most or len(alike)))
        ]

    def _share(self, form: Hashable) -> float:
        """What a form may have of the device, a key's part being 1: each key divides its own among the forms
        that it asked for.
        """
        forms: dict[str, set[Hashable]] = {}
        for sitting in self.sittings:
            forms.setdefault(sitting.key, set()).add(sitting.form)
        return sum(1 / len(asked) for asked in forms.values() if form in asked)

    def _begin(self, chosen: list[BatchSlot]) -> None:
        """Note whose turn it was."""
        present = {path for sitting in self.sittings for path in (sitting.path, sitting.path[:1])}
        self._turns = {path: turn for path, turn in self._turns.items() if path in present}
        for sitting in chosen:
            if not sitting.begun:
                sitting.begun = True
                self._turns[sitting.path] = self._turns[sitting.path[:1]] = (
                    max(self._turns.values(), default=0) + 1
                )

    def _unseen(self, chosen: list[BatchSlot], left: int) -> int:
        """Steps until one of them is looked at, `left` at most."""
        stands = [(sitting, self.clean(sitting)[1]) for sitting in chosen]
        return min([left, *(look - at for sitting, at in stands for look in sitting.looks if look > at)])

    def _part(self) -> tuple[BatchSlot, ...]:
        """Deal the batch's state back to its images; those that are done leave and are returned."""
        if self._joined is None:
            return ()
        (sittings, joined), self._joined = self._joined, None
        for sitting, seat in zip(sittings, batch.apart(joined), strict=True):
            switched, sitting.seat = seat.stop != sitting.seat.stop, seat
            if switched and sitting in self.sittings:
                self._placed(sitting)  # its next expert
        done = tuple(sitting for sitting in sittings if sitting.seat.done and sitting in self.sittings)
        self.sittings = [sitting for sitting in self.sittings if sitting not in done]
        return done

    def _stumbled(self, chosen: list[BatchSlot], key: Hashable, error: Exception) -> Stepped:
        self._part()  # as they were before this step
        if len(chosen) > 1:
            # Which of them it was, and whether less company helps, shows when each goes on with less.
            self.pace.too_many(key, len(chosen))
            give_memory_back()
            return Stepped(tuple(chosen), 0, 0.0)
        self.leave(chosen[0].owner)
        if not short_of_memory(error):
            self.pace.enough(key)  # it was this image, not the company
        return Stepped(tuple(chosen), 0, 0.0, error=error)


def short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def give_memory_back() -> None:
    """Return what is cached and no longer used to the device."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _size(seat: Denoising) -> tuple[int, int]:
    """What the time of a step depends on: tokens and branches of guidance."""
    return seat.state.x.shape[1], len(seat.network.branches)
