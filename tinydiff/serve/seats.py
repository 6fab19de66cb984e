"""Who gets the seats of the loop: shared over keys, then over a key's jobs. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinydiff.runtime.continuous import BatchSlot
    from tinydiff.serve.making import Making


def room(jobs: Iterable[Making], sittings: Collection[BatchSlot], most: int) -> bool:
    """Whether another job may come onto the device: there are at most as many with images to make as seats,
    and one more while these have more images than there are seats, so that no large job keeps others out."""
    waiting = {making.job.id: len(making.waiting) for making in list(jobs) if making.waiting}
    images = sum(waiting.values()) + len(sittings)
    return len(waiting.keys() | {one.owner for one in sittings}) < most + (images > most)


def next_in(jobs: Iterable[Making], sittings: Collection[BatchSlot], most: int) -> Making | None:
    """The job whose next image gets a seat. Of the highest priority it is the job of the key with the fewest
    seats, then the job with the fewest. Where all seats are taken, only a job that has none gets one: the
    loop lets another image pause for it."""
    by_key, by_job = Counter(one.key for one in sittings), Counter(one.owner for one in sittings)
    full = len(sittings) >= most
    able = [making for making in list(jobs) if making.waiting and not (full and by_job[making.job.id])]

    def order(making: Making) -> tuple[float, ...]:
        job = making.job
        return -job.priority, by_key[job.owner], by_job[job.id], making.taken

    return min(able, key=order, default=None)
