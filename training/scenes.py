"""The procedural data set: coloured shapes on a plain background, as images of one shape or of a pair and
as videos of one moving shape.

A `Scene` says what is shown (its attributes, words of the tuples below) and exactly where (its continuous
parameters, pixels of a 128 x 128 canvas, y pointing down). `scenes` samples them, `render` draws a batch of
them with analytic distance fields. `training.captions` puts them into words.

Everything lies on a grid that the networks see as whole tokens: centres on corners of the denoiser's tokens
of 16 pixels, one radius for each size, and moving shapes go one latent pixel in each latent frame. So one
shape is one pattern of latents, moved by whole tokens.

One in ten combinations of attributes is held out by a fixed rule (`held_out`): training never sees them, the
evaluation sees nothing else.
"""

import math
import zlib
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["picture", "pair", "clip"]

CANVAS = 128  # pixels, both ways
FRAMES = 17  # of a video

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "orange": (250, 130, 10),
    "yellow": (255, 230, 20),
    "green": (35, 160, 65),
    "blue": (35, 85, 225),
    "purple": (140, 50, 180),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring")
GRID = (32.0, 64.0, 96.0)  # where centres lie, both ways, pixels
RADII = {"small": 20.0, "large": 30.0}  # half the width of the shape, pixels
PAIR_RADIUS = 20.0  # of both shapes of a pair, whose size is never named
SIZES = tuple(RADII)
PLACES = {
    "left": (32.0, 64.0),
    "right": (96.0, 64.0),
    "top": (64.0, 32.0),
    "bottom": (64.0, 96.0),
    "centre": (64.0, 64.0),
}
RELATIONS = {
    "left of": ("left", "right"),
    "above": ("top", "bottom"),
}  # where the first and the second shape go
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "grow", "shrink")
EXTENT = 32.0  # how far a moving shape goes over a video, pixels: 2 from frame to frame
PLACED = 0.6  # share of videos with a place; the others lie anywhere on the grid where the whole path fits

# What a held-out combination is a combination of, for each kind of scene.
KEYS: dict[Kind, tuple[str, ...]] = {
    "picture": ("colour", "shape", "size", "place"),
    "pair": ("colour", "shape", "relation", "colour2", "shape2"),
    "clip": ("colour", "shape", "motion"),
}
# of the checksum that holds combinations out: with it, every word is in some of them, and every word is
# trained
SALT = 2


@dataclass(frozen=True)
class Scene:
    """One image or video: attributes in words (None where the kind has no such attribute), then the
    parameters that `render` draws.

    `size` of a video is that of its first frame and `place` that of the middle of its path (None: anywhere).
    `start`, `end` and `start2` are (x, y, radius) in pixels; a image has start == end.
    """

    kind: Kind
    colour: str
    shape: str
    background: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]
    size: str | None = None
    place: str | None = None
    motion: str | None = None
    relation: str | None = None
    colour2: str | None = None
    shape2: str | None = None
    start2: tuple[float, float, float] | None = None

    @property
    def attributes(self) -> dict[str, str]:
        """Every attribute that this scene has, by name."""
        names = ("colour", "shape", "size", "place", "background", "motion", "relation", "colour2", "shape2")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the one combination in ten that training never sees (by a checksum of the
    words).
    """
    words = "/".join(str(getattr(scene, name)) for name in KEYS[scene.kind])
    return zlib.crc32(f"{SALT}/{scene.kind}/{words}".encode()) % 10 == 0


def scenes(seed: int, kind: Kind, count: int, held_out: bool = False) -> list[Scene]:
    """`count` scenes of one kind, the same for the same seed; only held-out ones, or none of those."""
    rng = Random(f"{seed}/{kind}/{held_out}")
    return [sample_scene(rng, kind, held_out) for _ in range(count)]


def sample_scene(rng: Random, kind: Kind, held_out: bool = False) -> Scene:
    """One scene with uniform attributes; only a held-out one, or only one that is not."""
    sample = {"picture": _picture, "pair": _pair, "clip": _clip}[kind]
    while True:
        scene = sample(rng)
        if _is_held_out(scene) == held_out:
            return scene


_is_held_out = held_out  # the samplers' argument of that name hides the function


def _picture(rng: Random) -> Scene:
    colour, background = rng.sample(COLOURS, 2)
    size, place = rng.choice(SIZES), rng.choice(tuple(PLACES))
    start = (*PLACES[place], RADII[size])
    return Scene("picture", colour, rng.choice(SHAPES), background, start, start, size, place)


def _pair(rng: Random) -> Scene:
    first, second = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], 2)
    background = rng.choice([colour for colour in COLOURS if colour not in (first[0], second[0])])
    relation = rng.choice(tuple(RELATIONS))
    start, start2 = ((*PLACES[place], PAIR_RADIUS) for place in RELATIONS[relation])
    words = {"relation": relation, "colour2": second[0], "shape2": second[1]}
    return Scene("pair", *first, background, start, start, start2=start2, **words)


def _clip(rng: Random) -> Scene:
    colour, background = rng.sample(COLOURS, 2)
    motion = rng.choice(MOTIONS)
    if motion in DIRECTIONS:
        size = rng.choice(SIZES)
        first = last = RADII[size]
        way = (DIRECTIONS[motion][0] * EXTENT, DIRECTIONS[motion][1] * EXTENT)
        places = (
            ("top", "centre", "bottom") if way[1] == 0 else ("left", "centre", "right")
        )  # off the path's own axis
    else:
        size, other = ("small", "large") if motion == "grow" else ("large", "small")
        first, last = RADII[size], RADII[other]
        way = (0.0, 0.0)
        places = tuple(PLACES)
    place = rng.choice(places) if rng.random() < PLACED else None
    x, y = (64.0 if step else rng.choice(GRID) for step in way) if place is None else PLACES[place]
    start, end = (x - way[0] / 2, y - way[1] / 2, first), (x + way[0] / 2, y + way[1] / 2, last)
    return Scene("clip", colour, rng.choice(SHAPES), background, start, end, size, place, motion)


def render(batch: list[Scene], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws scenes of images and pairs (T = 1) or of videos (T = 17): [B, 3, T, 128, 128] in [-1, 1], edges
    one pixel soft.
    """
    frames = FRAMES if batch[0].kind == "clip" else 1
    if any((scene.kind == "clip") != (frames > 1) for scene in batch):
        raise ValueError("a batch is all images or all videos")
    palette = torch.tensor(list(PALETTE.values()), dtype=dtype) / 127.5 - 1
    index = {colour: i for i, colour in enumerate(COLOURS)}
    background = palette[[index[scene.background] for scene in batch]]
    video = background[:, :, None, None, None].expand(-1, -1, frames, CANVAS, CANVAS).contiguous()
    time = torch.linspace(0, 1, frames, dtype=dtype)
    for shape in SHAPES:
        firsts = [
            (i, scene.colour, scene.start, scene.end) for i, scene in enumerate(batch) if scene.shape == shape
        ]
        seconds = [
            (i, scene.colour2, scene.start2, scene.start2)
            for i, scene in enumerate(batch)
            if scene.shape2 == shape
        ]
        for group in (firsts, seconds):
            if not group:
                continue
            rows, colours, starts, ends = zip(*group, strict=True)
            start, end = torch.tensor(starts, dtype=dtype), torch.tensor(ends, dtype=dtype)
            x, y, radius = (start[:, :, None] + (end - start)[:, :, None] * time).unbind(1)  # each [N, T]
            alpha = coverage(shape, x, y, radius)[:, None]
            under = video[list(rows)]
            video[list(rows)] = under.lerp_(
                palette[[index[c] for c in colours]][:, :, None, None, None].expand_as(under), alpha
            )
    return video


def to_pixels(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] as bytes [B, T, H, W, 3], rounded."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, side: int = CANVAS) -> Tensor:
    """How much of each pixel a shape covers: [..., side, side] in [0, 1] for centres and radii [...] in
    pixels.

    The box around each shape is centred on (x, y) and at most 2 * radius wide and high.
    """
    centres = torch.arange(side, dtype=x.dtype) + 0.5
    u, v = centres - x[..., None, None], centres[:, None] - y[..., None, None]
    return _distance(shape, u, v, radius[..., None, None]).neg_().add_(0.5).clamp_(0, 1)


def _distance(shape: str, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the edge, negative inside, exact near edges; u points right, v down."""
    if shape == "circle":
        return (u * u + v * v).sqrt_() - r
    if shape == "ring":
        return ((u * u + v * v).sqrt_() - 0.775 * r).abs_() - 0.225 * r  # the hole's radius is 0.55 r
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.88 * r
    if shape == "triangle":  # equilateral: width 2 r, height sqrt(3) r
        half = math.sqrt(3) / 2
        return torch.maximum(u.abs() * half - (v + half * r) / 2, v - half * r)
    if shape == "star":
        return _star(u, v, 1.05 * r)
    raise ValueError(f"no shape {shape!r}")


def _star(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Five points of radius r around 0.42 r: the plane is folded onto one half of one point, where the edge
    is one line.
    """
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    rise = (1 - cos) / 2 * r  # the box of a star lies (1 - cos 36) / 2 above its centre
    a, b = u.abs(), rise - v  # b points up
    for sign in (1, -1):
        over = (a * (sign * cos) - b * sin).clamp_(min=0).mul_(2)
        a, b = a - over * (sign * cos), b + over * sin
    a = a.abs_()
    edge = (0.42 * sin, 0.42 * cos - 1)  # from the tip (0, 1) to the notch beside it, in units of r
    length = math.hypot(*edge)
    return ((b - r) * (edge[0] / length)).sub_(a * (edge[1] / length))
