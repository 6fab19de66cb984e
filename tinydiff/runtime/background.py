"""Compiling while serving: images are denoised eagerly until their graph is compiled, in a thread beside it.

All that the loop takes is values that nobody changes. So the thread runs one step again with the compiled
function, and discards the result.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from queue import SimpleQueue

import torch

from tinydiff.runtime.torch_state import default_torch_state
from tinydiff.sampling.loop import Denoise, Denoising

log = logging.getLogger(__name__)


class Background:
    """Compiled graphs, made in a thread of its own. Only one other thread may call it."""

    def __init__(self, beside: bool = True) -> None:
        """beside: False lets a graph compile where it is first used, while the images wait."""
        self._beside = beside
        self._requested: set[Hashable] = set()
        self._done: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._queue: SimpleQueue[tuple[Hashable, Denoise, Denoising]] = SimpleQueue()
        # A graph is compiled for a number of threads, and each thread has its own setting.
        self._threads = torch.get_num_threads()

    def best(self, compiled: Denoise, image: Denoising) -> Denoise:
        """The function for the next steps: `compiled` where its graph is ready, else the image's own.

        In that case the thread compiles the graph.
        """
        key = compiled, _structure(image)
        if not self._beside:
            self._requested.add(key)
            self._done.add(key)
        if key in self._done:
            return compiled
        if key not in self._requested:
            if not self._requested:
                threading.Thread(target=self._run, name="compiler", daemon=True).start()
            self._requested.add(key)
            self._queue.put((key, compiled, image))
        return image.denoise

    def progress(self) -> tuple[int, int]:
        """(graphs that are done or failed, all graphs that were requested)."""
        return len(self._done) + len(self._failed), len(self._requested)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            key, compiled, image = self._queue.get()
            try:
                with default_torch_state():
                    compiled(image.network, image.state, image.inputs, image.step, image.step + 1)
                self._done.add(key)
            except Exception:
                log.exception("compiling the loop failed; these images run eagerly")
                self._failed.add(key)
            del key, compiled, image  # hold no weights while waiting


def _structure(image: Denoising) -> Hashable:
    """What a graph depends on: one image or several, fixed tokens, fresh noise, a step cache, the hoisted
    tensors, all types. Lengths may vary.
    """
    trees = [tree for branch in image.network.branches for tree in branch]
    tensors = tuple(
        (prefix, name, x.ndim, x.dtype)
        for tree in trees
        for prefix, below in tree.items()
        for name, x in below.items()
    )
    x, inputs = image.state.x, image.inputs
    given = tuple(each is not None for each in (inputs.noise, inputs.fixed, inputs.limits))
    return x.shape[0] > 1, x.dtype, given, tensors
