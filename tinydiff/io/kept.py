"""Weights as a network keeps them quantised.

They come from a file that has them so, or are made in 8 bits from the rows of any other file.

A value of 8 bits is its code times the scale of its group, in float32, and that is how the same file decodes.
Made codes have one scale for each row, its largest absolute value over the largest of the type. Packed types
keep the bytes of their blocks (see `ops.packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Archive = Any
"""What `io.archive.opened` gives."""
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
"""Type of 8 bits, by torch's name -> its largest code."""


class Slice(Protocol):
    """A tensor that is read in pieces, as `safe_open` gives one."""

    def __getitem__(self, box: tuple[slice, ...], /) -> Tensor: ...


class Kept(NamedTuple):
    """A quantised matrix as it stays.

    stored: of 8 bits by torch's name, or one of `parallel.plan.PACKED`. codes: [O, I], or the bytes of a
    packed type [O, bytes of a row]. groups: scales of a row. scales: rows [low, high) of them, float32
    [N, groups]; None where the codes are all.
    """

    stored: str
    codes: Slice
    groups: int = 1
    scales: Callable[[int, int], Tensor] | None = None


View = Callable[[Archive, str], Slice]
"""(archive, key) -> what is read of a stored tensor."""


def whole(archive: Archive, key: str) -> Slice:
    """The tensor itself, decoded where it is quantised."""
    return archive.get_slice(key)


def kept(archive: Archive, key: str) -> Kept | None:
    """The matrix as its file holds it; None where it does not in a form that can be kept."""
    find = getattr(archive, "kept", None)
    return None if find is None else find(key)


def codes(stored: str) -> View:
    """What reads the codes of matrices in this type."""
    return partial(_view, stored, 0)


def scales(stored: str) -> View:
    """What reads their scales [O, groups]."""
    return partial(_view, stored, 1)


def _view(stored: str, part: int, archive: Archive, key: str) -> Slice:
    """part: 0 for the codes, 1 for the scales."""
    found = kept(archive, key)
    if found is None or found.stored != stored:
        tensor = archive.get_slice(key)
        return Rows(lambda rows: quantised(stored, tensor[(rows,)].float().flatten(1))[part])
    if not part:
        return found.codes
    assert found.scales is not None
    scales = found.scales
    return Rows(lambda rows: scales(rows.start, rows.stop))


@dataclass(frozen=True)
class Rows:
    """Rows that are made when they are read. `make` takes a slice with a start and a stop."""

    make: Callable[[slice], Tensor]

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        rows, *others = box
        return self.make(rows)[(slice(None), *others)]


def quantised(stored: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 rows [N, I] -> (codes, each the nearest; scales [N, 1]). Rows of zeros have the scale 1."""
    dtype, largest = getattr(torch, stored), LARGEST[stored]
    scale = rows.abs().amax(1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1)
    scaled = (rows / scale).clamp(-largest, largest)
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale
