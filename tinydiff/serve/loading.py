"""Which models of a server are on its device: they are loaded for jobs, and leave for others or when unused.

For the thread of the device; only `asleep` is set by others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from tinydiff.parallel.ranks import Ranks
from tinydiff.records import Request
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.device import Device
from tinydiff.runtime.loras import Read
from tinydiff.serve.metrics import Metrics
from tinydiff.serve.options import ServeOptions
from tinydiff.serve.service import ServedModel

log = logging.getLogger(__name__)


class Loading:
    """The weights of a server's models on its device."""

    def __init__(
        self,
        options: ServeOptions,
        models: Sequence[ServedModel],
        metrics: Metrics,
        ranks: Ranks | None,
        clock: Callable[[], float],
    ) -> None:
        """ranks: this rank, which leads, among several. clock: in seconds, for idle_unload."""
        self._options, self._metrics, self.clock = options, metrics, clock
        self._adapters = {model.name: model.adapters for model in models}
        self._attached: dict[str, tuple[Read, ...] | None] = {}
        bases = {model.name: model.adapters.base for model in models}
        self.device = Device(bases, options.batching_max_size, ranks)
        self.asleep, self._last_used = False, clock()

    def used(self) -> None:
        """Note that a job needs the device now."""
        self._last_used = self.clock()

    def load(self, name: str | None = None) -> Model:
        """A model, loaded onto the device unless it is there, as the current one. By default that which is.

        Models that were used least recently leave where it does not fit beside them.
        """
        device = self.device
        if name is not None and name != device.name:
            for job in device.jobs():  # their images are done
                device.remove(job)
            device.use(name)
        if device.model is None:
            started = time.perf_counter()
            for other in device.make_room(self._keep):
                self._tell(other, "left for another model")
            if device.waits:
                device.wake()
            else:
                device.load()
                self._attached[device.name] = ()
            seconds = time.perf_counter() - started
            self._metrics.stage("load", seconds)
            self._tell(device.name, f"was loaded in {seconds:.1f} s")
        if (adapters := self._adapters[device.name].now()) is not self._attached[device.name]:
            device.attach(adapters)
            self._attached[device.name] = adapters
        return device.loaded()

    def make_room(self, request: Request) -> bool:
        """Make room for a request that ran out of memory. Returns whether anything was done.

        The other models leave, or else the current one loads again with less of it on the device, which
        removes its jobs.
        """
        if others := self.device.make_room(self._keep, least=len(self._adapters)):
            for name in others:
                self._tell(name, "left because a request of another model ran out of memory")
            return True
        if not (moved := self.device.step_down(request)):
            return False
        name = self.device.name
        self._attached[name] = ()
        log.warning(
            "%s ran out of memory and was loaded with less on the device (%s)", name, ", ".join(moved)
        )
        return True

    def unload_unused(self) -> None:
        """Unload all models on request, or after `idle_unload` seconds without a job.

        The next job loads its model again.
        """
        unused = self._options.idle_unload and self.clock() - self._last_used > self._options.idle_unload
        if self.asleep or unused:
            for name in self.device.loaded_names():
                waits = self.device.unload(self._keep, name)
                self._tell(name, "moved to the host's memory" if waits else "was unloaded")

    @property
    def _keep(self) -> bool:
        return self._options.unload_to == "host"

    def _tell(self, name: str, what: str) -> None:
        """Log what happened to a model, and set the metrics."""
        log.info("%s %s", name, what)
        there = self.device.loaded_names()
        self._metrics.loaded({each: each in there for each in self._adapters})
