"""Compiling while serving: a form of the loop runs eagerly until its graph is made, in a thread beside it,
and from then on compiled.

Everything the loop takes is a value that nobody changes, so the thread simply makes the same step again with
the compiled function, and throws the result away.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from queue import SimpleQueue

import torch

from tinydiff.runtime.ambient import plain
from tinydiff.sampling.loop import Denoise, Denoising

log = logging.getLogger(__name__)


class Background:
    """Which forms of the loop are compiled. For one thread that asks; it has a thread of its own."""

    def __init__(self) -> None:
        self._asked: set[Hashable] = set()
        self._ready: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._wanted: SimpleQueue[tuple[Hashable, Denoise, Denoising]] = SimpleQueue()
        self._threads = (
            torch.get_num_threads()
        )  # a graph is made for so many, and each thread has its own setting

    def best(self, compiled: Denoise, seat: Denoising) -> Denoise:
        """The function for the seat's next steps: `compiled` where that is ready, else the seat's own, and
        `compiled` is made ready.
        """
        key = compiled, _structure(seat)
        if key in self._ready:
            return compiled
        if key not in self._asked:
            if not self._asked:
                threading.Thread(target=self._run, name="compiler", daemon=True).start()
            self._asked.add(key)
            self._wanted.put((key, compiled, seat))
        return seat.denoise

    def progress(self) -> tuple[int, int]:
        """(forms that are done, all that were asked for)."""
        return len(self._ready) + len(self._failed), len(self._asked)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            key, compiled, seat = self._wanted.get()
            try:
                with plain():
                    compiled(seat.network, seat.state, seat.rows, seat.noise, seat.kept, seat.at, seat.at + 1)
                self._ready.add(key)
            except Exception:
                log.exception("the loop could not be compiled and goes on eagerly")
                self._failed.add(key)
            del key, compiled, seat  # while it waits for the next it holds no weights


def _structure(seat: Denoising) -> Hashable:
    """What a graph is made for: one image or several, kept tokens, fresh noise, what is hoisted, and all
    types; lengths may vary.
    """
    trees = [tree for branch in seat.network.branches for tree in branch]
    told = tuple(
        (at, name, x.ndim, x.dtype)
        for tree in trees
        for at, below in tree.items()
        for name, x in below.items()
    )
    return seat.state.x.shape[0] > 1, seat.state.x.dtype, seat.kept is None, seat.noise is None, told
