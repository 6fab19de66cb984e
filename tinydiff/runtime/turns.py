"""Whose turn it is where more images wait than go on together: keys take turns, then a key's jobs, then a
job's images as they came.

An image that has begun goes on to its end before its turn passes, so that equal requests are done one after
another, not all at the end. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar

Path = tuple[str, ...]
"""(key,), or (key, job): a key, or a job of one."""


class Waiting(Protocol):
    """An image in line."""

    priority: int
    begun: bool
    """Whether a step of it was made."""

    @property
    def path(self) -> Path:
        """(key, job) that it belongs to."""
        ...


One = TypeVar("One", bound=Waiting)


def line(waiting: Sequence[One], turns: Mapping[Path, int]) -> list[One]:
    """The images in the order in which they go on, of the highest priority first. waiting: as they came.
    turns: number of the turn at which a key or a job last began an image; one that began none goes before
    them."""
    return sorted(_in_turn(waiting, turns, 1), key=lambda one: -one.priority)


def _in_turn(waiting: Sequence[One], turns: Mapping[Path, int], depth: int) -> list[One]:
    """The first image of each group, then the second of each, and so on; those of one round that have begun
    go first.
    """
    groups: dict[Path, list[One]] = {}
    for one in waiting:
        groups.setdefault(one.path[:depth], []).append(one)
    longest_ago = sorted(groups, key=lambda path: turns.get(path, 0))
    parts = [_in_turn(groups[path], turns, depth + 1) if depth < 2 else groups[path] for path in longest_ago]
    rounds = [[one for one in each if one is not None] for each in zip_longest(*parts)]
    return [one for each in rounds for one in sorted(each, key=lambda one: not one.begun)]
