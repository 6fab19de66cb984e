"""Running an image function on overlapping tiles that are blended, so that memory does not grow with size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.parallel.plan import SINGLE, Group, Plan
from tinydiff.parallel.strips import WHOLE, Strip, all_ranks, in_strips

ImageFunction = Callable[[Tensor, Strip], Tensor]
"""A function of an image or of a strip of one."""


def tiled(fn: ImageFunction, x: Tensor, side: int | None, scale: float, plan: Plan = SINGLE) -> Tensor:
    """fn over x [..., H, W]: whole, or on square tiles of `side` pixels that overlap by a quarter.

    side: None, or a side that covers x, runs fn once on the whole image. scale: size of fn's output over
    that of its input. Neighbouring tiles are blended linearly over their overlap, along rows, then
    columns. The ranks of the plan's axis `height` share the work, and each gets the whole result: a whole
    image is divided into strips, tiles are computed by turns.
    """
    height, width = x.shape[-2:]
    if side is None or (height <= side and width <= side):
        return in_strips(plan, fn, x, max(1, round(1 / scale)))
    stride = side * 3 // 4
    keep, overlap = round(stride * scale), round(side * scale) - round(stride * scale)
    columns = range(0, width, stride)
    squares = [x[..., i : i + side, j : j + side] for i in range(0, height, stride) for j in columns]
    tiles = _by_turns(fn, squares, scale, plan.group("height"))
    rows = [tiles[start : start + len(columns)] for start in range(0, len(tiles), len(columns))]
    strips: list[Tensor] = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i:
                tile = blend(rows[i - 1][j], tile, overlap, -2)
            if j:
                tile = blend(row[j - 1], tile, overlap, -1)
            row[j] = tile
        strips.append(torch.cat([tile[..., :keep, :keep] for tile in row], -1))
    return torch.cat(strips, -2)[..., : round(height * scale), : round(width * scale)]


def tiled_in_time(
    fn: Callable[[Tensor], Tensor], x_BCTHW: Tensor, size: int, stride: int, scale: float
) -> Tensor:
    """fn over the frames of x: all at once up to `size` of them, else on tiles of `size` + 1 frames.

    A tile starts `stride` frames after the one before. Its first frame only leads in, but in the first tile.
    Neighbouring tiles are blended linearly over the `size` - `stride` frames that they have in common. scale:
    frames of fn's output over those of its input, not counting the first of both.
    """
    if x_BCTHW.shape[2] <= size:
        return fn(x_BCTHW)
    keep, overlap = round(stride * scale), round(size * scale) - round(stride * scale)
    parts: list[Tensor] = []
    before: Tensor | None = None
    for start in range(0, x_BCTHW.shape[2], stride):
        tile = fn(x_BCTHW[:, :, start : start + size + 1])
        if before is None:
            parts.append(tile[:, :, : keep + 1])
        else:
            tile = blend(before, tile[:, :, 1:], overlap, 2)
            parts.append(tile[:, :, :keep])
        before = tile
    return torch.cat(parts, 2)[:, :, : round((x_BCTHW.shape[2] - 1) * scale) + 1]


def _by_turns(fn: ImageFunction, squares: list[Tensor], scale: float, group: Group) -> list[Tensor]:
    """fn of every tile, one tile per rank and round; ranks without a tile left repeat the last one."""
    if group.size == 1:
        return [fn(square, WHOLE) for square in squares]
    sizes = [[round(n * scale) for n in square.shape[-2:]] for square in squares]
    tiles: list[Tensor] = []
    for start in range(0, len(squares), group.size):
        index = min(start + group.rank, len(squares) - 1)
        # The first tile is the largest; every rank pads its own to that size.
        bottom, right = (most - own for most, own in zip(sizes[0], sizes[index], strict=True))
        tiles += all_ranks(group, F.pad(fn(squares[index], WHOLE), (0, right, 0, bottom))).unbind(0)
    return [tile[..., :height, :width] for tile, (height, width) in zip(tiles, sizes, strict=False)]


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after` with its first `extent` rows faded in over the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).view(shape)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head = after.narrow(dim, 0, extent)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([tail * (1 - ramp) + head * ramp, rest], dim)
