"""One of the models of a server on this rank: where its weights are now, and the loop of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tinydiff.parallel.ranks import Ranks
from tinydiff.runtime import aside, backends, blueprint, fit, postprocess
from tinydiff.runtime.backends import Backend
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.shortage import give_memory_back


@dataclass
class DeviceModel:
    """A model that a device can run. Used by one thread."""

    blueprint: Blueprint
    """With the adapters that are merged."""
    backend: Backend
    loop: Any
    """The images that are being denoised."""
    model: Model | None = None
    """The model where it is on the device."""
    waiting: Model | None = None
    """The model while it waits in the host's memory."""
    to_colours: Tensor | None = field(default=None, repr=False)
    settled: bool = False
    """Whether the blueprint says where its weights live, so that no plan is made when it loads."""

    @property
    def bytes_held(self) -> int:
        """Bytes of its weights on the device."""
        return 0 if self.model is None else aside.size(self.model)

    def load(self, ranks: Ranks | None) -> None:
        """Load it from its files, without adapters of requests."""
        if self.settled:
            self.model = blueprint.load(self.blueprint, ranks)
        else:
            self.model = self.backend.load(self.blueprint, ranks)
        self.to_colours = self.backend.fit_colours(self.model)

    def smaller(self) -> Blueprint | None:
        """The blueprint with less on the device; None where there is none."""
        assert self.model is not None, "asked where it is loaded"
        least = fit.stepped_down(self.model.blueprint)
        if least is None:  # its merged adapters are those of the start; others are attached once it is loaded
            return None
        return replace(least, adapters=self.blueprint.adapters, lora_mode=self.blueprint.lora_mode)

    def unload(self, waits: bool) -> None:
        """Remove it from the device. waits: its weights stay in the host's memory."""
        model, self.model = self.model, None
        assert model is not None, "asked where it is loaded"
        aside.release(model)
        if waits:
            self.waiting = aside.moved(model, aside.HOST, pinned=model.blueprint.pinned is not False)
        del model
        postprocess.unload()
        give_memory_back()

    def wake(self) -> None:
        """Bring it back from the host's memory, with the adapters that it had."""
        assert self.waiting is not None, "asked where it waits"
        self.model = aside.moved(self.waiting, self.blueprint.device)
        self.waiting = None


def make(blueprint: Blueprint, max_batch: int, alone: bool) -> DeviceModel:
    """A model that is not loaded. max_batch: images that share the loop at most. alone: on one rank."""
    backend = backends.of(blueprint)
    # Two threads of one rank may not communicate at once, so a graph is compiled when it is needed.
    return DeviceModel(blueprint, backend, backend.make_loop(max_batch, alone))


def leaving(chosen: DeviceModel, others: Sequence[DeviceModel]) -> int:
    """How many of the other loaded models have to leave, from the first on, to make room.

    The chosen one then gets what its plan would give it alone.
    """
    held = [other.bytes_held for other in others]
    free = fit.room(chosen.blueprint.device, sum(held))
    return fit.in_the_way(fit.alone(chosen.blueprint, free), held)
