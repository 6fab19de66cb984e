"""Measured step times: how many images are worth making together, and when something will be done. No torch
here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Mapping

LAST = 8
"""Measurements that count; the least of them is the time, for what disturbs only ever makes a step slower."""
WORTH = 0.97
"""What share of the time per image a larger batch may take at most to be chosen."""
TRIES = 3
"""Measurements before a batch size is given up; a first step is often slow."""
AGAIN = 256
"""Measurements of a form after which sizes larger than the one in use are forgotten, and so tried again: a
machine gets less to do, a graph is compiled."""
FORMS = 256
"""Forms remembered; those not seen longest are forgotten, for clients choose sizes."""


class Pace:
    """Seconds of a step by form of image and batch size."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, dict[int, deque[float]]] = OrderedDict()
        self._most: dict[Hashable, int] = {}
        self._count: Counter[Hashable] = Counter()

    def measured(self, form: Hashable, count: int, seconds: float) -> None:
        """A step of `count` images took so long."""
        known = self._seconds.setdefault(form, {})
        self._seconds.move_to_end(form)
        known.setdefault(count, deque(maxlen=LAST)).append(seconds)
        self._count[form] += 1
        if self._count[form] % AGAIN == 0:
            self._seconds[form] = {size: times for size, times in known.items() if size <= count}
        if len(self._seconds) > FORMS:
            forgotten, _ = self._seconds.popitem(last=False)
            self._most.pop(forgotten, None)
            del self._count[forgotten]

    def too_many(self, form: Hashable, count: int) -> None:
        """So many images did not fit into memory."""
        self._most[form] = min(self._most.get(form, count), max(1, count - 1))

    def enough(self, form: Hashable) -> None:
        """Batches of this form are limited no more."""
        self._most.pop(form, None)

    def step(self, form: Hashable, count: int) -> float | None:
        """Seconds of a step of `count` images; of the nearest size measured where that was not."""
        known = self._seconds.get(form)
        if not known:
            return None
        return min(known[min(known, key=lambda size: abs(size - count))])

    def size(self, form: Hashable, waiting: int) -> int:
        """How many of `waiting` images to make together: 1, 2, 4, ... as long as each doubling was measured
        to pay, or not yet tried.
        """
        most, known = min(waiting, self._most.get(form, waiting)), self._seconds.get(form, {})
        chosen = 1
        while chosen < most:
            if chosen not in known:
                return chosen
            larger = min(2 * chosen, most)
            tried = known.get(larger, ())
            if not tried or min(tried) / larger > WORTH * min(known[chosen]) / chosen:
                return chosen if len(tried) >= TRIES else larger
            chosen = larger
        return chosen

    def table(self) -> Mapping[str, Mapping[int, float]]:
        """Step seconds by form, numbered as they came, and batch size."""
        return {
            str(i): {size: round(min(times), 6) for size, times in sorted(known.items())}
            for i, known in enumerate(self._seconds.values())
        }
