"""Reads an image or video back into words, from its pixels alone: what is where, in which colour, on what
background, and how it moves.

The evaluation compares these readings with the attributes that a prompt named. Nothing here knows what was
meant to be drawn.
"""

from dataclasses import dataclass

import numpy as np
import torch

from training.scenes import CANVAS, DIRECTIONS, PALETTE, PLACES, SHAPES, coverage

Frame = np.ndarray  # uint8 [H, W, 3]; H == W

CONTRAST = 45.0  # how far from the background's colour a pixel of a shape is at least, of 441
# how far from a colour of the palette a pixel has it at most: beyond, the colour is muddy and has no name
COLOUR_LIMIT = 60.0
SPECK = 40  # pixels of a 128 x 128 canvas: fewer are not a shape
LIKENESS = 0.7  # overlap with the best of the five shapes below which a blob is none of them
SIZE_LIMIT = 23.0  # half width or height, whichever is larger, of the 128 pixels: small is below

_COLOURS = np.array(list(PALETTE.values()), dtype=np.float32)


@dataclass(frozen=True)
class Blob:
    """One connected area that differs from the background.

    Lengths in pixels of a 128 x 128 canvas, whatever the picture's size.
    """

    colour: str | None  # None: none of the palette
    shape: str | None  # None: like none of the five
    likeness: float  # overlap with the ideal shape, soft intersection over union
    x: float  # centre of the box around it
    y: float
    half: float  # half of the longer side of that box


@dataclass(frozen=True)
class Reading:
    """A frame: its background colour and its blobs, the largest first."""

    background: str | None
    blobs: tuple[Blob, ...]


def judge(named: dict[str, str], frames: torch.Tensor | np.ndarray) -> dict[str, bool]:
    """Whether each attribute that a prompt named (see `captions.describe`) holds in uint8 frames [T, H, W,
    3].

    Colour, shape and background must hold in the first, the middle and the last frame. Where one of these
    frames has another number of shapes than the prompt names, no attribute is right but the background.
    """
    frames = np.asarray(frames)
    shown = [read(frames[t]) for t in sorted({0, len(frames) // 2, len(frames) - 1})]
    pair = "relation" in named
    countable = all(len(reading.blobs) == 1 + pair for reading in shown)
    verdict = {name: countable for name in named}
    if "background" in named:
        verdict["background"] = all(reading.background == named["background"] for reading in shown)
    if not countable:
        return verdict
    ordered = [_in_order(reading.blobs, named["relation"]) if pair else reading.blobs for reading in shown]
    for which, suffix in enumerate(("", "2")[: 1 + pair]):
        for name in ("colour", "shape"):
            if name + suffix in named:
                verdict[name + suffix] = all(
                    getattr(blobs[which], name) == named[name + suffix] for blobs in ordered
                )
    first, last = ordered[0][0], ordered[-1][0]
    if "size" in named:
        verdict["size"] = size(first) == named["size"]
    if "place" in named:
        verdict["place"] = place((first.x + last.x) / 2, (first.y + last.y) / 2) == named["place"]
    if "motion" in named:
        verdict["motion"] = motion(first, last) == named["motion"]
    if pair:
        verdict["relation"] = relation(*ordered[0]) == named["relation"]
    return verdict


def size(blob: Blob) -> str:
    """small or large."""
    return "small" if blob.half < SIZE_LIMIT else "large"


def place(x: float, y: float) -> str:
    """The nearest of the five places."""
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


def motion(first: Blob, last: Blob) -> str | None:
    """How a shape gets from the first frame to the last; None where it stays, or does two things at once."""
    right, down, growth = last.x - first.x, last.y - first.y, last.half / first.half
    far = max(abs(right), abs(down))
    if far < 10:
        return "grow" if growth > 1.35 else "shrink" if growth < 1 / 1.35 else None
    if min(abs(right), abs(down)) > far / 2 or not 1 / 1.35 < growth < 1.35:
        return None
    return next(name for name, (u, v) in DIRECTIONS.items() if u * right + v * down == far)


def relation(first: Blob, second: Blob) -> str | None:
    """left of, above, or None: the first shape lies on neither side clearly."""
    right, down = second.x - first.x, second.y - first.y
    if right > 10 and right > 2 * abs(down):
        return "left of"
    return "above" if down > 10 and down > 2 * abs(right) else None


def _in_order(blobs: tuple[Blob, ...], named_relation: str) -> tuple[Blob, ...]:
    """The left one or the upper one first."""
    return tuple(sorted(blobs, key=lambda blob: blob.x if named_relation == "left of" else blob.y))


def read(frame: Frame) -> Reading:
    """What one frame shows: uint8 [H, W, 3] with H == W."""
    pixels = np.asarray(frame, dtype=np.float32)
    scale = CANVAS / pixels.shape[0]
    background, ground = _background(pixels)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    labels, count = components(distance > CONTRAST)
    found = []
    for label in range(1, count + 1):
        area = labels == label
        if area.sum() * scale**2 < SPECK:
            continue
        found.append(_blob(pixels, ground, distance, area, scale))
    return Reading(background, tuple(sorted(found, key=lambda blob: -blob.half)))


def _background(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The most common colour of the border: its name, and the median of the border pixels nearest to it."""
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    rim = np.concatenate([side.reshape(-1, 3) for side in sides])
    nearest = np.linalg.norm(rim[:, None] - _COLOURS, axis=-1).argmin(axis=1)
    ground = np.median(rim[nearest == np.bincount(nearest).argmax()], axis=0)
    return colour_name(ground), ground


def colour_name(rgb: np.ndarray) -> str | None:
    """The nearest colour of the palette, None where that is not near: rgb [3] in 0..255."""
    distances = np.linalg.norm(_COLOURS - rgb, axis=-1)
    return tuple(PALETTE)[distances.argmin()] if distances.min() < COLOUR_LIMIT else None


def _blob(
    pixels: np.ndarray, ground: np.ndarray, distance: np.ndarray, area: np.ndarray, scale: float
) -> Blob:
    """Measures one connected area: its colour inside, then how much of each pixel it covers, its box, and the
    shape most like it.
    """
    inside = area & (distance >= np.percentile(distance[area], 50))  # away from the soft edge
    colour = np.median(pixels[inside], axis=0)
    way = colour - ground
    near = _dilated(area)
    cover = np.where(near, np.clip((pixels - ground) @ way / (way @ way), 0, 1), 0)
    rows, columns = np.nonzero(cover.max(axis=1) > 0.5)[0], np.nonzero(cover.max(axis=0) > 0.5)[0]
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2
    shape, likeness = _most_like(cover, x, y, half)
    return Blob(colour_name(colour), shape, likeness, float(x * scale), float(y * scale), float(half * scale))


def _most_like(cover: np.ndarray, x: float, y: float, half: float) -> tuple[str | None, float]:
    """The shape whose ideal drawing in the same box overlaps most, over a few sizes and shifts, and that
    overlap.
    """
    side = min(int(2 * half) + 8, cover.shape[0])  # a window around it is enough, and faster
    left, top = (min(max(int(centre - side / 2), 0), cover.shape[0] - side) for centre in (x, y))
    seen = torch.from_numpy(cover[top : top + side, left : left + side].astype(np.float32))
    steps = [(dx, dy, dr) for dr in (-1.0, 0.0, 1.0) for dx in (-0.5, 0.0, 0.5) for dy in (-0.5, 0.0, 0.5)]
    u, v, r = torch.tensor([(x - left + dx, y - top + dy, half + dr) for dx, dy, dr in steps]).unbind(1)
    best: tuple[str | None, float] = (None, 0.0)
    for shape in SHAPES:
        ideal = coverage(shape, u, v, r / 0.88 if shape == "square" else r, side=side)
        overlap = (
            (torch.minimum(ideal, seen).sum((1, 2)) / torch.maximum(ideal, seen).sum((1, 2))).max().item()
        )
        if overlap > best[1]:
            best = (shape, overlap)
    return best if best[1] >= LIKENESS else (None, best[1])


def _dilated(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels beside, above and below it."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    return wide


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels the connected areas (corners count) of a boolean mask [H, W] from 1; returns the labels and how
    many there are.

    Row by row: each run of pixels joins the runs that it touches in the row above.
    """
    parents: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            run = parents[run]
        return run

    runs: list[tuple[int, int, int]] = []  # row, first column, one past the last
    above: range = range(0)
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0))
        here = range(len(runs), len(runs) + len(edges) // 2)
        for run, (first, end) in zip(here, edges.reshape(-1, 2).tolist(), strict=True):
            runs.append((row, first, end))
            parents.append(run)
            for other in above:
                if runs[other][1] <= end and first <= runs[other][2]:
                    parents[root(other)] = root(run)
        above = here
    names: dict[int, int] = {}
    labels = np.zeros(mask.shape, dtype=np.int32)
    for run, (row, first, end) in enumerate(runs):
        labels[row, first:end] = names.setdefault(root(run), len(names) + 1)
    return labels, len(names)
