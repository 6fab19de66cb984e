"""Small images of a video: its first frame, and a contact sheet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

THUMBNAIL = 512
"""Pixels of the longest side of a thumbnail; a smaller frame keeps its size."""
TILE = 256
"""Pixels of the longest side of a frame on a sheet."""
TILES = 16
"""Frames on a sheet at most."""


def thumbnail(frames: numpy.ndarray) -> bytes:
    """The first of the frames, uint8 [T, H, W, 3], as WebP."""
    from tinydiff.io.images import encode_image

    return encode_image(_fitted(frames[0], THUMBNAIL), ".webp")


def spritesheet(frames: numpy.ndarray) -> bytes:
    """Up to `TILES` frames of the video, uint8 [T, H, W, 3], evenly spread from the first to the last, row by
    row, as WebP.
    """
    import numpy as np

    from tinydiff.io.images import encode_image

    count = min(TILES, len(frames))
    tiles = [_fitted(frames[round(place)], TILE) for place in np.linspace(0, len(frames) - 1, count)]
    columns = math.ceil(math.sqrt(count))
    tiles += [np.zeros_like(tiles[0])] * (-count % columns)
    rows = [np.concatenate(tiles[start : start + columns], axis=1) for start in range(0, len(tiles), columns)]
    return encode_image(np.concatenate(rows), ".webp")


def _fitted(frame: numpy.ndarray, longest: int) -> numpy.ndarray:
    """The frame with no side longer than `longest`, its shape kept."""
    from tinydiff.io.images import resize

    height, width = frame.shape[:2]
    scale = min(1.0, longest / max(height, width))
    return frame if scale == 1 else resize(frame, max(1, round(height * scale)), max(1, round(width * scale)))
