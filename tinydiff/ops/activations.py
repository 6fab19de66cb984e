"""Activations that torch has no function of one argument for, with the types of all that networks use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU, of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]: the first half times SiLU of the second."""
    value, gate = x.chunk(2, -1)
    return value * F.silu(gate)
