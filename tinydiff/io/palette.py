"""The 256 colours of a GIF, chosen from all its frames with 16 MiB and the memory of one frame.

Shapes: N colours, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]

COLOURS = 256
BITS = 5
"""Bits of red, green and blue that the colours of one bin share."""
ROUNDS = 4
"""Iterations of k-means."""


def packed(frame: Frame, bits: int = 8) -> NDArray[np.int32]:
    """The upper `bits` of red, green and blue in one integer: uint8 [H, W, 3] -> [H, W]."""
    red, green, blue = (frame[..., channel].astype(np.int32) >> (8 - bits) for channel in range(3))
    return (red << 2 * bits) | (green << bits) | blue


def few(frames: Iterable[Frame]) -> NDArray[np.intp] | None:
    """The colours of all frames, packed and sorted [N]; None if they are too many for a GIF."""
    seen = np.zeros(1 << 24, dtype=np.bool_)
    for frame in frames:
        seen[packed(frame)] = True
        if np.count_nonzero(seen) > COLOURS:
            return None
    return np.flatnonzero(seen)


def of_many(frames: Iterable[Frame]) -> Frame:
    """At most `COLOURS` colours [N, 3] close to all colours of the frames [T, H, W, 3].

    Colours are counted in bins. Boxes of bins are split, the one with the largest error first; then k-means
    moves the means of the boxes. A bin's weight is the square root of its largest count in any frame, so that
    a colour gets an entry because it is far from the others, not because it is frequent.
    """
    bins = 1 << 3 * BITS
    counts, sums, peaks = np.zeros(bins), np.zeros((3, bins)), np.zeros(bins)
    for frame in frames:
        places = packed(frame, BITS).ravel()
        here = np.bincount(places, minlength=bins)
        counts += here
        peaks = np.maximum(peaks, here)
        for channel in range(3):
            sums[channel] += np.bincount(places, frame[..., channel].ravel(), minlength=bins)
    used = counts > 0
    colours, weights = (sums[:, used] / counts[used]).T, np.sqrt(peaks[used])
    nearest = _boxes(colours, weights)
    for _ in range(ROUNDS):
        means = _means(colours, weights, nearest)
        nearest = np.argmin((means**2).sum(1) - 2 * colours @ means.T, axis=1)
    return _means(colours, weights, nearest).round().astype(np.uint8)


def _means(
    colours: NDArray[np.float64], weights: NDArray[np.float64], places: NDArray[np.intp]
) -> NDArray[np.float64]:
    """The mean [N, 3] of the colours [B, 3] in each cluster; empty clusters are left out."""
    total = np.bincount(places, weights)
    sums = np.stack([np.bincount(places, weights * channel) for channel in colours.T], 1)
    return sums[total > 0] / total[total > 0, None]


def _boxes(colours: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.intp]:
    """The index of the box of each colour [B, 3]; at most `COLOURS` boxes."""
    boxes, errors = [np.arange(len(colours))], [_error(colours, weights)]
    while len(boxes) < COLOURS:
        worst = int(np.argmax([error.sum() for error in errors]))
        if errors[worst].sum() < 1e-6:  # every colour has its own box
            break
        box, error = boxes.pop(worst), errors.pop(worst)
        axis = int(np.argmax(error))
        below = colours[box, axis] <= np.average(colours[box, axis], weights=weights[box])
        for part in (box[below], box[~below]):
            boxes.append(part)
            errors.append(_error(colours[part], weights[part]))
    places = np.empty(len(colours), dtype=np.intp)
    for number, box in enumerate(boxes):
        places[box] = number
    return places


def _error(colours: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted squared distances to the mean, in red, green and blue."""
    return weights @ (colours - np.average(colours, axis=0, weights=weights)) ** 2
