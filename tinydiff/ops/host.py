"""Tensors as Python values, and arrays as tensors."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def of_array(x: numpy.ndarray) -> Tensor:
    """The tensor over an array's memory."""
    return torch.from_numpy(x)  # pyright: ignore[reportUnknownMemberType]


def integers(x: Tensor) -> list[int]:
    """The values of an integer tensor [N], copied to the host at once."""
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
