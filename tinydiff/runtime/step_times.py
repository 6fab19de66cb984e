"""Measured step times: the batch size that pays, and how long a step takes. No torch here.

A kind of image is any hashable value on which the time of a step depends, such as its number of tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Mapping

RECENT = 8
"""Latest measurements that count. The smallest is the step time: disturbances only ever make a step slower.
"""
WORTH = 0.97
"""A larger batch is chosen where an image takes at most this share of its time in the smaller batch."""
TRIES = 3
"""Measurements before a batch size is given up, since a first step is often slow."""
RETRY_EVERY = 256
"""After this many steps of a kind, batch sizes above the current one are forgotten and so tried again: the
machine may be less busy by then, or a graph compiled."""
MAX_KINDS = 256
"""Kinds of image that are remembered. The least recently seen is forgotten, because clients choose sizes."""


class StepTimes:
    """Seconds of a step, by kind of image and batch size."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, dict[int, deque[float]]] = OrderedDict()
        self._limits: dict[Hashable, int] = {}
        self._count: Counter[Hashable] = Counter()

    def record(self, kind: Hashable, count: int, seconds: float) -> None:
        """Record that a step of `count` images took `seconds`."""
        times = self._seconds.setdefault(kind, {})
        self._seconds.move_to_end(kind)
        times.setdefault(count, deque(maxlen=RECENT)).append(seconds)
        self._count[kind] += 1
        if self._count[kind] % RETRY_EVERY == 0:
            self._seconds[kind] = {size: recent for size, recent in times.items() if size <= count}
        if len(self._seconds) > MAX_KINDS:
            oldest, _ = self._seconds.popitem(last=False)
            self._limits.pop(oldest, None)
            del self._count[oldest]

    def limit_below(self, kind: Hashable, count: int) -> None:
        """Choose batches smaller than `count`, which did not fit into memory."""
        self._limits[kind] = min(self._limits.get(kind, count), max(1, count - 1))

    def unlimit(self, kind: Hashable) -> None:
        """Forget the limit of a kind."""
        self._limits.pop(kind, None)

    def seconds(self, kind: Hashable, count: int) -> float | None:
        """Seconds of a step of `count` images, or of the nearest batch size that was measured."""
        times = self._seconds.get(kind)
        if not times:
            return None
        return min(times[min(times, key=lambda size: abs(size - count))])

    def batch_size(self, kind: Hashable, waiting: int) -> int:
        """How many of the `waiting` images to compute together.

        1, 2, 4, ... as long as each doubling was measured to pay, or is not measured yet.
        """
        most, times = min(waiting, self._limits.get(kind, waiting)), self._seconds.get(kind, {})
        size = 1
        while size < most:
            if size not in times:
                return size
            larger = min(2 * size, most)
            tried = times.get(larger, ())
            if not tried or min(tried) / larger > WORTH * min(times[size]) / size:
                return size if len(tried) >= TRIES else larger
            size = larger
        return size

    def table(self) -> Mapping[str, Mapping[int, float]]:
        """Step seconds by batch size, for each kind in the order in which kinds were first seen."""
        return {
            str(i): {size: round(min(recent), 6) for size, recent in sorted(times.items())}
            for i, times in enumerate(self._seconds.values())
        }
