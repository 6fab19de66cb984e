"""Strips of rows on 2 and 4 ranks: what each operation makes of its strip, put together again, is what it
makes of the whole image.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.parallel.pool import on_ranks
from tests.parity import close, draw
from tinydiff.models.autoencoders.flux2_tiny import _double
from tinydiff.ops.conv import causal_conv3d, conv2d, halve
from tinydiff.ops.norm import group_norm
from tinydiff.ops.tiles import tiled
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Group, Plan
from tinydiff.parallel.strips import WHOLE, Strip, gather, halo, in_strips, statistics

RANKS = [2, 4]


def over_all() -> Plan:
    """All ranks of the test share the rows."""
    return Plan(
        groups=(("height", Group(dist.group.WORLD.group_name, dist.get_world_size(), dist.get_rank())),)
    )


def _strip(*heights):
    group = over_all().group("height")
    return Strip(group, heights[: group.size])


def _mine(strip, x, unit=1):
    return x.split([height * unit for height in strip.heights], -2)[strip.group.rank]


def _edges():
    strip = _strip(3, 1, 2, 2)
    x = draw(2, 3, sum(strip.heights), 5)
    top = sum(strip.heights[: strip.group.rank])
    for above, below in ((1, 1), (1, 0), (0, 1)):
        bordered = F.pad(x, (0, 0, above, below))
        expected = bordered[:, :, top : top + above + strip.heights[strip.group.rank] + below]
        for mine in (_mine(strip, x), _mine(strip, x.to(memory_format=torch.channels_last))):
            assert torch.equal(halo(strip, mine, above, below), expected)
        clip = halo(strip, _mine(strip, x[:, :, None]), above, below)
        assert torch.equal(clip, expected[:, :, None])
    assert halo(strip, x, 0, 0) is x and halo(WHOLE, x, 1, 1) is x


def _pieces():
    strip = _strip(3, 1, 2, 2)
    x = draw(2, 3, sum(strip.heights), 5)
    assert torch.equal(gather(strip, _mine(strip, x), -2), x)
    assert torch.equal(
        gather(strip, _mine(strip, x).repeat_interleave(4, -2), -2), x.repeat_interleave(4, -2)
    )
    pixels = _mine(strip, x).flatten(2).transpose(1, 2)[:, :, None]
    assert torch.equal(gather(strip, pixels, -3), x.flatten(2).transpose(1, 2)[:, :, None])
    assert gather(WHOLE, x, -2) is x


def _division(units, unit, heights):
    """`by_rows` divides `units` into `heights`, or, where they are None, nothing."""
    x, seen = draw(1, 2, int(units * unit), 3), []

    def fn(part, strip):
        seen.append(strip)
        top = sum(strip.heights[: strip.group.rank]) * unit
        assert strip is WHOLE or torch.equal(
            part, x[..., top : top + strip.heights[strip.group.rank] * unit, :]
        )
        return part[..., ::unit, :] + 1

    assert torch.equal(in_strips(over_all(), fn, x, unit), x[..., ::unit, :] + 1)
    assert [strip.heights for strip in seen] == [heights or (1,)] and seen[0].divided == (heights is not None)


def _moments_of_a_far_mean():
    """In float32, a deviation of 1 around 3000: a sum of squares would lose it."""
    strip = _strip(3, 1, 2, 2)
    x = (draw(2, 4, sum(strip.heights), 500) + torch.arange(4.0).view(1, 4, 1, 1) + 3000).float()
    x[..., :2, :] += 5  # so that the strips' means differ
    variance, mean = torch.var_mean(_mine(strip, x), (2, 3), correction=0)
    mean, variance = statistics(strip, mean, variance)
    expected = torch.var_mean(x.double(), (2, 3), correction=0)
    assert (variance - expected[0]).abs().max() < 1e-3 and (mean - expected[1]).abs().max() < 1e-3
    assert statistics(WHOLE, mean, variance) == (mean, variance)


def _norms():
    strip = _strip(3, 1, 2, 2)
    x, w = (
        draw(2, 6, sum(strip.heights), 5) + 3,
        Weights({"weight": draw(6, seed=1) + 1, "bias": draw(6, seed=2)}),
    )
    for shape in (x, x[:, :, None]):  # an image, a video
        close(
            gather(strip, group_norm(_mine(strip, shape), w, 2, 1e-3, strip), -2),
            group_norm(shape, w, 2, 1e-3),
            1e-12,
        )
    half = group_norm(_mine(strip, x.bfloat16()), w, 2, 1e-3, strip)
    full = group_norm(x.bfloat16().float(), w, 2, 1e-3).bfloat16()
    close(gather(strip, half, -2), full, 2**-6)  # a last digit of values up to 4


KERNELS = [(3, 1, 1), (3, 2, 1), (4, 2, 1), (1, 1, 0), (2, 2, 0)]
"""Side, stride, padding: of the autoencoders, and a patch embedding's."""


def _convolutions():
    strip = _strip(3, 1, 2, 2)
    x = draw(2, 3, 2 * sum(strip.heights), 10)
    for side, stride, padding in KERNELS:
        w = Weights({"weight": draw(4, 3, side, side, seed=1), "bias": draw(4, seed=2)})
        part = conv2d(_mine(strip, x, 2), w, stride, padding, strip)
        close(gather(strip, part, -2), F.conv2d(x, w["weight"], w["bias"], stride, padding), 1e-12)
    w = Weights({"weight": draw(4, 3, 3, 3, seed=1), "bias": draw(4, seed=2)})
    close(
        gather(strip, halve(_mine(strip, x, 2), w, strip), -2),
        F.conv2d(F.pad(x, (0, 1, 0, 1)), w["weight"], w["bias"], 2),
        1e-12,
    )
    w = Weights({"weight": draw(3, 5, 4, 4, seed=1), "bias": draw(5, seed=2)})
    expected = F.conv_transpose2d(x, w["weight"], w["bias"], stride=2, padding=1)
    close(gather(strip, _double(_mine(strip, x, 2), w, strip), -2), expected, 1e-12)


def _clips():
    strip = _strip(3, 1, 2, 2)
    x, w = (
        draw(2, 3, 5, sum(strip.heights), 4),
        Weights({"weight": draw(4, 3, 3, 3, 3, seed=1), "bias": draw(4, seed=2)}),
    )
    whole, mine = causal_conv3d(x, w), halo(strip, _mine(strip, x), 1, 1)
    close(gather(strip, causal_conv3d(mine, w, strip=strip), -2), whole, 1e-12)
    for cut in (1, 3, 4):  # of one frame, some past; of several
        later = causal_conv3d(mine[:, :, cut:], w, mine[:, :, max(0, cut - 2) : cut], strip)
        close(gather(strip, later, -2), whole[:, :, cut:], 1e-12)
    close(gather(strip, causal_conv3d(mine[:, :, :1], w, strip=strip), -2), whole[:, :, :1], 1e-12)


def _tiles(rows, columns, scale):
    """How many tiles this rank made. A tile knows its neighbours by nothing but the blend, so that the
    results differ in no digit.
    """
    x, made = draw(1, 2, rows, columns), []

    def fn(tile, strip):
        made.append(tile.shape[-2:])
        assert strip is WHOLE
        y = tile.repeat_interleave(2, -1).repeat_interleave(2, -2) if scale == 2 else F.avg_pool2d(tile, 2)
        return torch.cat([y, y.square()], 1) + y.mean()

    expected = tiled(fn, x, 8, scale)
    made.clear()
    assert torch.equal(tiled(fn, x, 8, scale, over_all()), expected)
    return len(made)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    "check",
    [_edges, _pieces, _moments_of_a_far_mean, _norms, _convolutions, _clips],
    ids=lambda fn: fn.__name__[1:],
)
def test_strips_are_as_the_whole(ranks, check):
    on_ranks(ranks, check)


@pytest.mark.parametrize(
    ("ranks", "units", "unit", "heights"),
    [
        (2, 5, 1, (3, 2)),
        (4, 7, 8, (2, 2, 2, 1)),
        (4, 4, 2, (1, 1, 1, 1)),
        (4, 3, 2, None),  # a rank would have nothing
        (2, 4.5, 2, None),  # a part of a unit
    ],
)
def test_rows_are_divided_in_units_or_not_at_all(ranks, units, unit, heights):
    on_ranks(ranks, _division, units, unit, heights)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("size", "tiles"), [((14, 20), 12), ((8, 10), 4), ((6, 10), 2)])
@pytest.mark.parametrize("scale", [2, 0.5])
def test_tiles_are_dealt(ranks, size, tiles, scale):
    assert on_ranks(ranks, _tiles, *size, scale) == [-(-tiles // ranks)] * ranks
