"""The order in which waiting images run: owners take turns, then the jobs of an owner, then a job's images.

An image that has started runs to its end before its owner's turn passes. So equal requests finish one after
another, not all at the end. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar

TurnKey = tuple[str, ...]
"""(owner,) or (owner, job): who takes turns."""


class Waiting(Protocol):
    """A waiting image."""

    priority: int
    started: bool
    """Whether a step of it has run."""

    @property
    def turn_key(self) -> TurnKey:
        """(owner, job)."""
        ...


Image = TypeVar("Image", bound=Waiting)


def fair_order(waiting: Sequence[Image], turns: Mapping[TurnKey, int]) -> list[Image]:
    """The images in the order in which they run, those of the highest priority first.

    waiting: in order of arrival. turns: the number of the turn at which an owner or a job last started an
    image; those that started none go first.
    """
    return sorted(_by_turns(waiting, turns, 1), key=lambda image: -image.priority)


def _by_turns(waiting: Sequence[Image], turns: Mapping[TurnKey, int], depth: int) -> list[Image]:
    """The first image of each group, then the second of each, and so on.

    In a round, started images go first.
    """
    groups: dict[TurnKey, list[Image]] = {}
    for image in waiting:
        groups.setdefault(image.turn_key[:depth], []).append(image)
    oldest_turn_first = sorted(groups, key=lambda key: turns.get(key, 0))
    lines = [
        _by_turns(groups[key], turns, depth + 1) if depth < 2 else groups[key] for key in oldest_turn_first
    ]
    rounds = [[image for image in row if image is not None] for row in zip_longest(*lines)]
    return [image for row in rounds for image in sorted(row, key=lambda image: not image.started)]
