"""The 256 colours of a GIF, chosen of all its frames with 16 MiB and the memory of one.

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
"""Bits of red, of green and of blue that two colours of one bin share."""
ROUNDS = 4
"""How often the means are moved."""


def packed(frame: Frame, bits: int = 8) -> NDArray[np.int32]:
    """The upper `bits` of red, green and blue side by side in one number: uint8 [H, W, 3] -> [H, W]."""
    red, green, blue = (frame[..., channel].astype(np.int32) >> (8 - bits) for channel in range(3))
    return (red << 2 * bits) | (green << bits) | blue


def few(frames: Iterable[Frame]) -> NDArray[np.intp] | None:
    """The colours of all frames, packed and sorted [N]; None where they are too many for a GIF."""
    seen = np.zeros(1 << 24, dtype=np.bool_)
    for frame in frames:
        seen[packed(frame)] = True
        if np.count_nonzero(seen) > COLOURS:
            return None
    return np.flatnonzero(seen)


def of_many(frames: Iterable[Frame]) -> Frame:
    """At most `COLOURS` colours [N, 3] near to all that the frames hold, [T, H, W, 3].

    Colours are counted in bins. The box of bins with the largest error is cut in two, again and again; then
    every bin goes to the nearest of the means, and these become the means of what they got. A bin weighs as
    the root of its count in the frame that has most of it: a colour gets its own place because it is far from
    the others, not because it is frequent.
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
    """The mean [N, 3] of the colours [B, 3] in each place; empty places are left out."""
    total = np.bincount(places, weights)
    sums = np.stack([np.bincount(places, weights * channel) for channel in colours.T], 1)
    return sums[total > 0] / total[total > 0, None]


def _boxes(colours: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each of the colours [B, 3] the number of its box, of at most `COLOURS`."""
    boxes, errors = [np.arange(len(colours))], [_error(colours, weights)]
    while len(boxes) < COLOURS:
        worst = int(np.argmax([error.sum() for error in errors]))
        if errors[worst].sum() < 1e-6:  # each colour has its place
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
    """Weighted squares of the distances to the mean, in red, green and blue."""
    return weights @ (colours - np.average(colours, axis=0, weights=weights)) ** 2
