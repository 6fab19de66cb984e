"""Sinusoidal timestep embedding and the layers behind it. Source: arXiv 2006.11239, in the [cos, sin] order of the released checkpoints."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.linear import linear
from tinydiff.ops.weights import Weights


def timestep_embedding(t: Tensor, dim: int, max_period: float = 1e4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Timesteps t [...] -> [..., dim], cosines first. `dim` is even; computed in `dtype`."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t.to(dtype)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def embedder(x: Tensor, w: Weights) -> Tensor:
    """The checkpoints' embedder of a sinusoid or a vector, x [..., I] -> [..., D]: `linear_1`, SiLU, `linear_2`."""
    return linear(F.silu(linear(x, w / "linear_1")), w / "linear_2")
