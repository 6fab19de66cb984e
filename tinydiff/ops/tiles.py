"""Running an image function on overlapping squares and blending them, so that memory does not grow with the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(fn: Callable[[Tensor], Tensor], x: Tensor, side: int | None, scale: float) -> Tensor:
    """fn over [..., H, W], whole when `side` is None or covers it, else on squares of `side` that overlap by a quarter.

    scale: size of fn's output over that of its input. Neighbours are blended linearly over their overlap, along rows, then columns.
    """
    height, width = x.shape[-2:]
    if side is None or (height <= side and width <= side):
        return fn(x)
    stride = side * 3 // 4
    keep, overlap = round(stride * scale), round(side * scale) - round(stride * scale)
    rows = [[fn(x[..., i : i + side, j : j + side]) for j in range(0, width, stride)] for i in range(0, height, stride)]
    strips = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i:
                tile = _blend(rows[i - 1][j], tile, overlap, -2)
            if j:
                tile = _blend(row[j - 1], tile, overlap, -1)
            row[j] = tile
        strips.append(torch.cat([tile[..., :keep, :keep] for tile in row], -1))
    return torch.cat(strips, -2)[..., : round(height * scale), : round(width * scale)]


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after` with its first `extent` rows faded in over the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).view(shape)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head = after.narrow(dim, 0, extent)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([tail * (1 - ramp) + head * ramp, rest], dim)
