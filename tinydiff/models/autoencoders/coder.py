"""What every autoencoder of images and video does around its two networks: tiles, strips, normalised latents.

Shape letters: B batch, C channels, T frames, F latent frames, H height, W width, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from tinydiff.ops.conv import per_frame
from tinydiff.ops.tiles import ImageFunction, tiled, tiled_in_time
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import SINGLE, Plan
from tinydiff.parallel.strips import Strip


class CoderConfig(Protocol):
    """What a coder reads in the config of an autoencoder."""

    @property
    def latent_channels(self) -> int: ...
    @property
    def scale_factor_spatial(self) -> int: ...
    @property
    def scale_factor_temporal(self) -> int: ...


C = TypeVar("C", bound=CoderConfig)

Tile = Callable[[C, Weights, Tensor, int | None, Strip], Tensor]
"""(config, weights, pixels or latents of one tile or of a strip of it, latent frames per pass, strip) -> the
other.
"""

Scaling = Callable[[C, Weights, Tensor], Tensor]
"""(config, weights, latents) -> latents."""

Past = dict[str, Tensor]
"""Prefix of a layer -> what it looks back on when it runs on the next chunk of frames."""


@dataclass(frozen=True, eq=False)
class Coder(Generic[C]):
    """The functions of an autoencoder that callers use, made of its two networks.

    encode_tile gives the mean of the raw latents, then what else the encoder predicts; decode_tile gives
    pixels. normalise: from raw latents to those that the denoiser sees, of about zero mean and unit variance;
    raw_latents: the opposite. stride: pixels per raw latent, along height and width. patch: side of the
    squares of pixels that are folded into channels before tiles are cut. tile_frames: for networks whose
    result depends on the frames of a pass, the latent frames of a tile beside its first one, and from the
    start of a tile to that of the next. strips: whether the networks run on a strip; otherwise every rank
    runs an image of one tile whole.

    All methods have the same options. chunk: latent frames per pass, at least 1; None: all at once. It has no
    effect where the network fixes its passes. tile: side in pixels of overlapping tiles that are coded one by
    one and blended; None: the whole image. The ranks of the plan's axis `height` share the work; each gets
    the whole result.
    """

    encode_tile: Tile[C]
    decode_tile: Tile[C]
    normalise: Scaling[C] = lambda c, w, z: z
    raw_latents: Scaling[C] = lambda c, w, z: z
    stride: Callable[[C], int] = lambda c: c.scale_factor_spatial
    patch: Callable[[C], int] = lambda c: 1
    tile_frames: tuple[int, int] | None = None
    strips: bool = True

    def moments(
        self,
        c: C,
        w: Weights,
        x_BCTHW: Tensor,
        chunk: int | None = None,
        tile: int | None = None,
        plan: Plan = SINGLE,
    ) -> Tensor:
        """Pixels [B, C, T, H, W] in [-1, 1] -> [B, ..., F, H', W'], the mean of the raw latents in front."""
        p, side = (
            self.patch(c),
            None if tile is None else self._checked(tile, 4 * self.stride(c)) // self.patch(c),
        )

        def tile_moments(x: Tensor, strip: Strip) -> Tensor:
            return self.encode_tile(c, w, x, chunk, strip)

        scales = (p / self.stride(c), 1 / c.scale_factor_temporal)
        return self._in_tiles(tile_moments, fold(x_BCTHW, p), side, scales, plan)

    def encode(
        self,
        c: C,
        w: Weights,
        x_BCTHW: Tensor,
        chunk: int | None = None,
        tile: int | None = None,
        plan: Plan = SINGLE,
    ) -> Tensor:
        """Pixels [B, C, T, H, W] in [-1, 1] -> normalised latents [B, Z, F, H', W'], the mean."""
        mean = self.moments(c, w, x_BCTHW, chunk, tile, plan)[:, : c.latent_channels]
        return self.normalise(c, w, mean)

    def raw_pixels(
        self,
        c: C,
        w: Weights,
        z_BZFHW: Tensor,
        chunk: int | None = None,
        tile: int | None = None,
        plan: Plan = SINGLE,
    ) -> Tensor:
        """Raw latents [B, Z, F, H', W'] -> pixels [B, C, T, H, W], not clipped."""
        p, side = (
            self.patch(c),
            None if tile is None else self._checked(tile, self.stride(c)) // self.stride(c),
        )

        def tile_pixels(z: Tensor, strip: Strip) -> Tensor:
            return self.decode_tile(c, w, z, chunk, strip)

        scales = (self.stride(c) / p, c.scale_factor_temporal)
        return unfold(self._in_tiles(tile_pixels, z_BZFHW, side, scales, plan), p)

    def decode(
        self,
        c: C,
        w: Weights,
        z_BZFHW: Tensor,
        chunk: int | None = None,
        tile: int | None = None,
        plan: Plan = SINGLE,
    ) -> Tensor:
        """Normalised latents [B, Z, F, H', W'] -> pixels [B, C, T, H, W] in [-1, 1]."""
        return self.raw_pixels(c, w, self.raw_latents(c, w, z_BZFHW), chunk, tile, plan).clamp(-1, 1)

    def _checked(self, tile: int, step: int) -> int:
        """The side of a tile, which is a multiple of `step` pixels: tiles begin where latents do. Raises
        ValueError.
        """
        if tile <= 0 or tile % step:
            nearest = max(step, round(tile / step) * step)
            raise ValueError(f"tile: {tile} pixels is no multiple of {step}; take {nearest}")
        return tile

    def _in_tiles(
        self, fn: ImageFunction, x: Tensor, side: int | None, scales: tuple[float, float], plan: Plan
    ) -> Tensor:
        """fn over x. side: of a tile of x. scales: size and frames of fn's output over those of its input."""
        scale, rate = scales
        if not self.strips and (side is None or max(x.shape[-2:]) <= side):
            plan = SINGLE

        def all_tiles(frames: Tensor) -> Tensor:
            return tiled(fn, frames, side, scale, plan)

        if self.tile_frames is None:
            return all_tiles(x)
        size, stride = (round(frames / min(rate, 1)) for frames in self.tile_frames)
        return tiled_in_time(all_tiles, x, size, stride, rate)


# --- what families build their two networks and their statistics with


def framewise(fn: Callable[[C, Weights, Tensor, Strip], Tensor]) -> Tile[C]:
    """A network of single images [B, C, H, W], run on every frame."""
    return lambda c, w, x, chunk, strip: per_frame(lambda image: fn(c, w, image, strip), x, chunk)


def in_chunks(
    fn: Callable[[Tensor, Past | None], Tensor], x_BCTHW: Tensor, chunk: int | None, time: int
) -> Tensor:
    """A network that looks at no later frame, run on `chunk` latent frames at a time.

    fn gets the frames and what it remembers of those before: None where nothing comes after, and nothing at
    the first chunk. time: frames of x per latent frame; the first latent frame has one.
    """
    if chunk is None:
        return fn(x_BCTHW, None)
    past: Past = {}
    bounds = [0, *range(time * (chunk - 1) + 1, x_BCTHW.shape[2], time * chunk), x_BCTHW.shape[2]]
    return torch.cat([fn(x_BCTHW[:, :, start:stop], past) for start, stop in pairwise(bounds)], 2)


def fold(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Squares of `patch` x `patch` pixels -> channels."""
    return rearrange(x_BCTHW, "b c t (h p) (w q) -> b (c q p) t h w", p=patch, q=patch)


def unfold(x_BCTHW: Tensor, patch: int) -> Tensor:
    """The opposite of `fold`."""
    return rearrange(x_BCTHW, "b (c q p) t h w -> b c t (h p) (w q)", p=patch, q=patch)


def by_statistics(
    statistics: Callable[[C, Weights, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Scaling[C], Scaling[C]]:
    """`normalise` and `raw_latents` of a coder.

    statistics: (config, weights, latents whose type and device to use) -> mean and deviation.
    """

    def normalise(c: C, w: Weights, z: Tensor) -> Tensor:
        mean, std = statistics(c, w, z)
        return (z - mean) / std

    def raw_latents(c: C, w: Weights, z: Tensor) -> Tensor:
        mean, std = statistics(c, w, z)
        return z * std + mean

    return normalise, raw_latents
