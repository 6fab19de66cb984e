"""Rotary position embedding: tables for N axes and the two pairings. Source: arXiv 2104.09864.

Shape letters: B batch, L tokens, H heads, D head width, A axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(
    positions_LA: Tensor, dims: Sequence[int], theta: float = 1e4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, sum(dims) / 2] for positions on A axes, `dims[a]` channels each.

    `dtype` is the type the angles are computed in: float64 where the reference does so, float32 elsewhere.
    """
    angles: list[Tensor] = []
    for axis, dim in enumerate(dims):
        exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions_LA.device) / dim
        frequency = 1 / theta**exponent  # in this order, since all references round so
        angles.append(positions_LA[:, axis, None].to(dtype) * frequency)
    angle = torch.cat(angles, -1)
    return angle.cos(), angle.sin()


def grid_positions(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Positions [prod(sizes), len(sizes)] of a grid in row-major order, int64."""
    axes = [torch.arange(size, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def rotate_interleaved(x_BLHD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of each head.

    Tables: [L, D / 2], or [B, L, D / 2] where images have different ones. Computed in the wider type,
    returned in x's.
    """
    a, b = torch.unflatten(x_BLHD, -1, (-1, 2)).unbind(-1)
    cos, sin = cos_LD.unsqueeze(-2), sin_LD.unsqueeze(-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x_BLHD.dtype)


def rotate_half(x_BLHD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate the pairs (x0, x[D/2]), (x1, x[D/2+1]), ... of each head.

    Tables: [L, D / 2], or [B, L, D / 2] where images have different ones. Computed in the wider type,
    returned in x's.
    """
    a, b = x_BLHD.chunk(2, -1)
    cos, sin = cos_LD.unsqueeze(-2), sin_LD.unsqueeze(-2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BLHD.dtype)
