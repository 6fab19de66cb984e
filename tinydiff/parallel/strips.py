"""The height of an image sharded over ranks, for networks that look at neighbouring pixels.

Every rank runs the same network on its strip.

Ranks exchange the edges of their strips where a convolution reaches across, merge statistics where a norm
covers the whole image, and gather keys and values where every pixel attends to all. So the result is that of
one rank, whatever the heights of the strips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.parallel.moves import reshard, wait
from tinydiff.parallel.plan import ALONE, Group, Plan, Replicate, Shard


@dataclass(frozen=True)
class Strip:
    """This rank's strip of an image. heights: of all strips, from the top.

    Heights are in units that hold at every resolution: the height of a strip's tensor (or its pixels,
    flattened) is a multiple of the strip's height, by the same factor for all strips.
    """

    group: Group
    heights: tuple[int, ...]

    @property
    def divided(self) -> bool:
        """Whether there is more than one strip."""
        return self.group.size > 1


WHOLE = Strip(ALONE, (1,))


def in_strips(plan: Plan, fn: Callable[[Tensor, Strip], Tensor], x: Tensor, unit: int) -> Tensor:
    """`fn(x, WHOLE)` over [..., H, W], computed in strips by the ranks of the plan's axis `height`.

    Each rank gets the whole result.

    unit: pixels of height that stay together, the stride of an encoder. An image whose height is not a
    multiple of the unit, or has fewer units than ranks, is computed whole on every rank.
    """
    group, (units, rest) = plan.group("height"), divmod(x.shape[-2], unit)
    if group.size == 1 or units < group.size or rest:
        return fn(x, WHOLE)
    strip = Strip(
        group, tuple(units // group.size + (rank < units % group.size) for rank in range(group.size))
    )
    mine = torch.split(x, [height * unit for height in strip.heights], -2)[group.rank]
    return gather(strip, fn(mine, strip), -2)


def halo(strip: Strip, x: Tensor, above: int, below: int) -> Tensor:
    """A strip with the edges of its neighbours: x [..., H, W] -> [..., above + H + below, W].

    Outside the image the edges are zeros.

    A whole image is returned as it is. `above` and `below` must not exceed the height of any strip.
    """
    group = strip.group
    if not strip.divided or above == below == 0:
        return x
    has_upper, has_lower = group.rank > 0, group.rank < group.size - 1
    sent, got = [0] * group.size, [0] * group.size
    if has_upper:
        sent[group.rank - 1], got[group.rank - 1] = below, above
    if has_lower:
        sent[group.rank + 1], got[group.rank + 1] = above, below
    rows = x.movedim(-2, 0)
    edges = torch.cat([rows[: below * has_upper], rows[rows.shape[0] - above * has_lower :]]).contiguous()
    near = wait(torch.ops._c10d_functional.all_to_all_single(edges, got, sent, group.name)).movedim(0, -2)
    near = F.pad(near, (0, 0, 0 if has_upper else above, 0 if has_lower else below))
    return torch.cat([near[..., :above, :], x, near[..., above:, :]], -2)


def gather(strip: Strip, x: Tensor, dim: int) -> Tensor:
    """A strip's x -> that of the whole image, on every rank.

    dim: the dimension, counted from the last, of the height or of flattened pixels.
    """
    if not strip.divided:
        return x
    each = x.shape[dim] // strip.heights[strip.group.rank]
    lengths = [each * height for height in strip.heights]
    padded = F.pad(x, (*(0, 0) * (-dim - 1), 0, max(lengths) - x.shape[dim]))
    return torch.cat(
        [part.narrow(dim, 0, n) for part, n in zip(all_ranks(strip.group, padded), lengths, strict=True)], dim
    )


def statistics(strip: Strip, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over a strip -> over the image.

    They are merged rather than summed: a sum of squares would lose precision under a large mean.
    """
    if not strip.divided:
        return mean, variance
    shares = [height / sum(strip.heights) for height in strip.heights]

    def average(values: Tensor) -> Tensor:
        return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)

    means, variances = all_ranks(strip.group, torch.stack([mean, variance])).unbind(1)
    mean = average(means)
    return mean, average(variances + (means - mean).square())


def all_ranks(group: Group, x: Tensor) -> Tensor:
    """x of one shape on every rank -> [ranks, *x.shape]."""
    return reshard(x[None], Shard(0), Replicate(), group)
