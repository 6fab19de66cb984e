"""What a call costs, in function calls and in bytes: the same on every machine, busy or not."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


class Cost:
    """calls: of functions, Python's own and those in C, on this thread. bytes: the most that was allocated at
    once, beyond the start.
    """

    calls = 0
    bytes = 0


@contextmanager
def counting(memory: bool = True) -> Iterator[Cost]:
    """What the block costs. memory: whether bytes are counted too, which takes several times as long."""
    cost = Cost()

    def note(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            cost.calls += 1

    if memory:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
    sys.setprofile(note)
    try:
        yield cost
    finally:
        sys.setprofile(None)
        if memory:
            cost.bytes = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()
