"""Tensors as Python values."""

from __future__ import annotations

from torch import Tensor


def integers(x: Tensor) -> list[int]:
    """The values of an integer tensor [N], copied to the host at once."""
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
