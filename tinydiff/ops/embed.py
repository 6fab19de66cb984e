"""Sinusoidal timestep embedding. Source: arXiv 2006.11239, in the [cos, sin] order of the released checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 1e4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Timesteps t [...] -> [..., dim], cosines first. `dim` is even; computed in `dtype`."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t.to(dtype)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)
