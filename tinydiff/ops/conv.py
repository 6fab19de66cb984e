"""Convolutions on images and videos. Shape letters: B batch, C channels, T frames, H height, W width.

Each runs on a whole image or on a strip of its rows (`parallel.strips`). In a strip the rows of the
neighbouring ranks take the place of padding at the inner borders.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.weights import Weights
from tinydiff.parallel.strips import WHOLE, Strip, halo


def conv2d(x_BCHW: Tensor, w: Weights, stride: int = 1, padding: int = 0, strip: Strip = WHOLE) -> Tensor:
    """2-D convolution with `w.weight` [O, C, kh, kw] and `w.bias`.

    The height of a strip must be a multiple of `stride`.
    """
    if not strip.divided:
        return F.conv2d(x_BCHW, w["weight"], w.get("bias"), stride, padding)
    x_BCHW = halo(strip, x_BCHW, padding, w["weight"].shape[2] - stride - padding)
    return F.conv2d(x_BCHW, w["weight"], w.get("bias"), stride, (0, padding))


def halve(x_BCHW: Tensor, w: Weights, strip: Strip = WHOLE) -> Tensor:
    """A 3x3 convolution with stride 2, padded on the right and at the bottom only."""
    return conv2d(F.pad(halo(strip, x_BCHW, 0, 1), (0, 1, 0, 0 if strip.divided else 1)), w, stride=2)


def per_frame(fn: Callable[[Tensor], Tensor], x_BCTHW: Tensor, chunk: int | None = None) -> Tensor:
    """Apply an image function [N, C, H, W] -> [N, C', H', W'] to every frame of a video.

    chunk: the most frames per call of fn; None: all at once.
    """
    batch, _, frames = x_BCTHW.shape[:3]
    if chunk is not None and frames > chunk:
        return torch.cat([per_frame(fn, part) for part in torch.split(x_BCTHW, chunk, 2)], 2)
    if frames == 1:
        return fn(x_BCTHW[:, :, 0])[:, :, None]
    y = fn(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return torch.unflatten(y, 0, (batch, frames)).transpose(1, 2)


def causal_conv3d(x_BCTHW: Tensor, w: Weights, past: Tensor | None = None, strip: Strip = WHOLE) -> Tensor:
    """3-D convolution that never looks at later frames; height and width keep their size.

    past [B, C, <= kt-1, H, W]: the frames before x. Zeros stand for frames before those. In a strip both
    x and past come with the rows of their `halo`, so height needs no padding.
    """
    weight = w["weight"]
    reach = weight.shape[2] - 1  # frames of the past that the kernel sees
    pad_h, pad_w = 0 if strip.divided else weight.shape[3] // 2, weight.shape[4] // 2
    if past is not None:
        x_BCTHW = torch.cat([past, x_BCTHW], 2)
        reach -= past.shape[2]
    elif x_BCTHW.shape[2] == 1:
        # A single frame meets only the last temporal slice of the kernel; the others would multiply zeros.
        return F.conv2d(x_BCTHW[:, :, 0], weight[:, :, -1], w.get("bias"), padding=(pad_h, pad_w))[:, :, None]
    if reach:
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, reach, 0))
    return F.conv3d(x_BCTHW, weight, w.get("bias"), padding=(0, pad_h, pad_w))


def pad_replicate(x_BCTHW: Tensor, strip: Strip = WHOLE, before: int = 0) -> Tensor:
    """x with one more row and column on each side, copies of those at the border of the image.

    Inner borders of a strip get the row of the strip next to it. before: how many copies of the first frame
    come in front.
    """
    rows = 1
    if strip.divided:
        x_BCTHW, rows = _with_neighbours(x_BCTHW, strip), 0
    return F.pad(x_BCTHW, (1, 1, rows, rows, before, 0), mode="replicate")


def _with_neighbours(x: Tensor, strip: Strip) -> Tensor:
    """A strip between one row of each strip next to it, or its own first or last row at the border."""
    group, rows = strip.group, halo(strip, x, 1, 1)
    above = x if group.rank == 0 else rows
    below = x if group.rank == group.size - 1 else rows
    return torch.cat([above[..., :1, :], x, below[..., -1:, :]], -2)
