"""HunyuanVideo's autoencoder: causal convolutions and group norms over frames, decoded in blended tiles.

Source: arXiv 2412.03603 and the AutoencoderKLHunyuanVideo checkpoints. A convolution repeats the first frame
and the pixels at the border where it looks beyond them. Group norms and the attention in the middle see all
frames of a pass, so another number of frames per pass is another result: as in the reference, more than 16
frames are coded in tiles of 17 that overlap by five and are blended over four.

Shape letters: B batch, C channels, T frames, F latent frames, H height, W width, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.models.autoencoders.coder import Coder
from tinydiff.models.family import Autoencoder
from tinydiff.ops.attention import attention
from tinydiff.ops.conv import pad_replicate
from tinydiff.ops.linear import linear
from tinydiff.ops.norm import group_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import SINGLE, Row, conv_rows, linear_rows, norm_rows, under
from tinydiff.parallel.strips import Strip, gather

TILE, STRIDE = 4, 3
"""Latent frames of a tile, beside its first one, and from the start of a tile to that of the next."""


@dataclass(frozen=True)
class Config:
    """Field names are those of config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: tuple[str, ...] = ("HunyuanVideoDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("HunyuanVideoUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        kinds = {"down_block_types": "HunyuanVideoDownBlock3D", "up_block_types": "HunyuanVideoUpBlock3D"}
        for name, block in kinds.items():
            if getattr(self, name) != (block,) * levels:
                raise ValueError(
                    f"{name} is {list(getattr(self, name))}; it must be {block} once per width of "
                    "block_out_channels"
                )
        if odd := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise ValueError(
                f"norm_num_groups is {self.norm_num_groups}, which a width of {odd[0]} does not divide by"
            )
        if self.act_fn != "silu":
            raise ValueError(
                f"act_fn is {self.act_fn!r}; every released autoencoder of this kind uses 'silu'"
            )
        if self.spatial_compression_ratio != 2 ** (levels - 1):
            raise ValueError(
                f"spatial_compression_ratio is {self.spatial_compression_ratio}; {levels} widths in "
                f"block_out_channels make {2 ** (levels - 1)}"
            )
        if self.temporal_compression_ratio != 4 or levels < 3:
            raise ValueError(
                f"temporal_compression_ratio is {self.temporal_compression_ratio}; it must be 4, with at "
                "least 3 widths in block_out_channels"
            )

    @property
    def z_dim(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    @property
    def scale_factor_spatial(self) -> int:
        return self.spatial_compression_ratio

    @property
    def scale_factor_temporal(self) -> int:
        return self.temporal_compression_ratio


# --- structure: which layers there are, read by spec and by the forward functions alike


class Resample(NamedTuple):
    """The convolution that halves or doubles height and width. time: also the frames after the first."""

    at: str
    time: bool


class Stage(NamedTuple):
    """Residual blocks (prefix, width in, width out), then the change of resolution.

    None in the last stage.
    """

    blocks: tuple[tuple[str, int, int], ...]
    resample: Resample | None


def _stages(way: str, widths: tuple[int, ...], layers: int) -> Iterator[Stage]:
    last = len(widths) - 1
    for i, (inner, outer) in enumerate(pairwise((widths[0], *widths))):
        at = f"{way}_blocks.{i}"
        blocks = tuple((f"{at}.resnets.{j}", inner if j == 0 else outer, outer) for j in range(layers))
        yield Stage(blocks, Resample(f"{at}.{way}samplers.0.conv", i >= last - 2) if i < last else None)


def down_stages(c: Config) -> Iterator[Stage]:
    """The encoder's stages, from the image on."""
    return _stages("down", c.block_out_channels, c.layers_per_block)


def up_stages(c: Config) -> Iterator[Stage]:
    """The decoder's stages, from the latents on."""
    return _stages("up", c.block_out_channels[::-1], c.layers_per_block + 1)


def _conv_rows(name: str, inner: int, outer: int, side: int = 3) -> Iterator[Row]:
    return conv_rows(f"{name}.conv", inner, outer, (side, side, side))


def _block_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield from norm_rows(f"{name}.norm1", inner, bias=True)
    yield from _conv_rows(f"{name}.conv1", inner, outer)
    yield from norm_rows(f"{name}.norm2", outer, bias=True)
    yield from _conv_rows(f"{name}.conv2", outer, outer)
    if inner != outer:
        yield from _conv_rows(f"{name}.conv_shortcut", inner, outer, 1)


def _stage_rows(stage: Stage) -> Iterator[Row]:
    for block in stage.blocks:
        yield from _block_rows(*block)
    if stage.resample is not None:
        width = stage.blocks[-1][2]
        yield from _conv_rows(stage.resample.at, width, width)


def _middle_rows(c: Config, width: int) -> Iterator[Row]:
    yield from _block_rows("mid_block.resnets.0", width, width)
    if c.mid_block_add_attention:
        yield from norm_rows("mid_block.attentions.0.group_norm", width, bias=True)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from linear_rows(f"mid_block.attentions.0.{name}", width, width)
    yield from _block_rows("mid_block.resnets.1", width, width)


def _end_rows(width: int, channels: int) -> Iterator[Row]:
    yield from norm_rows("conv_norm_out", width, bias=True)
    yield from _conv_rows("conv_out", width, channels)


def encoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the encoder half."""
    first, last, moments = c.block_out_channels[0], c.block_out_channels[-1], 2 * c.latent_channels
    yield from under("encoder", _conv_rows("conv_in", c.in_channels, first))
    for stage in down_stages(c):
        yield from under("encoder", _stage_rows(stage))
    yield from under("encoder", _middle_rows(c, last), _end_rows(last, moments))
    yield from conv_rows("quant_conv", moments, moments, (1, 1, 1))


def decoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the decoder half."""
    first, last = c.block_out_channels[-1], c.block_out_channels[0]
    yield from conv_rows("post_quant_conv", c.latent_channels, c.latent_channels, (1, 1, 1))
    yield from under("decoder", _conv_rows("conv_in", c.latent_channels, first), _middle_rows(c, first))
    for stage in up_stages(c):
        yield from under("decoder", _stage_rows(stage))
    yield from under("decoder", _end_rows(last, c.out_channels))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield from encoder_spec(c)
    yield from decoder_spec(c)


# --- layers


def _pointwise(x: Tensor, w: Weights) -> Tensor:
    return F.conv3d(x, w["weight"], w["bias"])


def _conv(x_BCTHW: Tensor, w: Weights, strip: Strip, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
    """A 3x3x3 convolution that sees no later frame. Beyond the border stand the border's own pixels."""
    w = w / "conv"
    x = pad_replicate(x_BCTHW, strip, 2)
    return F.conv3d(x, w["weight"], w["bias"], stride)


def _half(c: Config, x: Tensor, norm: Weights, conv: Weights, strip: Strip) -> Tensor:
    """Norm, activation, convolution: a half of a block, and the end of a network."""
    return _conv(F.silu(group_norm(x, norm, c.norm_num_groups, strip=strip)), conv, strip)


def _block(c: Config, x: Tensor, w: Weights, strip: Strip) -> Tensor:
    shortcut = w / "conv_shortcut" / "conv"
    y = _half(c, x, w / "norm1", w / "conv1", strip)
    y = _half(c, y, w / "norm2", w / "conv2", strip)
    return y + (_pointwise(x, shortcut) if "weight" in shortcut else x)


def _attention(c: Config, x_BCTHW: Tensor, w: Weights, strip: Strip) -> Tensor:
    """One head of attention: a pixel sees all pixels of its own frame and of those before."""
    frames, height = x_BCTHW.shape[2:4]
    pixels = rearrange(
        group_norm(x_BCTHW, w / "group_norm", c.norm_num_groups, strip=strip), "b c t h w -> b t (h w) c"
    )
    q, k, v = (linear(pixels, w / name)[..., None, :] for name in ("to_q", "to_k", "to_v"))
    k, v = gather(strip, k, -3), gather(strip, v, -3)
    seen = (
        attention(SINGLE, q[:, i], k[:, : i + 1].flatten(1, 2), v[:, : i + 1].flatten(1, 2))
        for i in range(frames)
    )
    y = linear(torch.stack([frame.flatten(2) for frame in seen], 1), w / "to_out" / 0)
    return x_BCTHW + rearrange(y, "b t (h w) c -> b c t h w", h=height)


def _middle(c: Config, x: Tensor, w: Weights, strip: Strip) -> Tensor:
    x = _block(c, x, w / "resnets" / 0, strip)
    if c.mid_block_add_attention:
        x = _attention(c, x, w / "attentions" / 0, strip)
    return _block(c, x, w / "resnets" / 1, strip)


def _blocks(c: Config, x: Tensor, w: Weights, stage: Stage, strip: Strip) -> Tensor:
    for name, _, _ in stage.blocks:
        x = _block(c, x, w / name, strip)
    return x


def _double(x_BCTHW: Tensor, time: bool) -> Tensor:
    """Each pixel four times; where `time`, each frame but the first twice."""
    first, rest = x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]
    x = torch.cat([first, rest.repeat_interleave(2, 2)], 2) if time else x_BCTHW
    return x.repeat_interleave(2, 3).repeat_interleave(2, 4)


def _moments(c: Config, w: Weights, x_BCTHW: Tensor, strip: Strip) -> Tensor:
    e = w / "encoder"
    x = _conv(x_BCTHW, e / "conv_in", strip)
    for stage in down_stages(c):
        x = _blocks(c, x, e, stage, strip)
        if stage.resample is not None:
            x = _conv(x, e / stage.resample.at, strip, (2 if stage.resample.time else 1, 2, 2))
    x = _half(c, _middle(c, x, e / "mid_block", strip), e / "conv_norm_out", e / "conv_out", strip)
    return _pointwise(x, w / "quant_conv")


def _pixels(c: Config, w: Weights, z_BZFHW: Tensor, strip: Strip) -> Tensor:
    d = w / "decoder"
    x = _middle(
        c, _conv(_pointwise(z_BZFHW, w / "post_quant_conv"), d / "conv_in", strip), d / "mid_block", strip
    )
    for stage in up_stages(c):
        x = _blocks(c, x, d, stage, strip)
        if stage.resample is not None:
            x = _conv(_double(x, stage.resample.time), d / stage.resample.at, strip)
    return _half(c, x, d / "conv_norm_out", d / "conv_out", strip)


# --- what callers use


CODER = Coder[Config](
    lambda c, w, x, chunk, strip: _moments(c, w, x, strip),
    lambda c, w, z, chunk, strip: _pixels(c, w, z, strip),
    lambda c, w, z: z * c.scaling_factor,
    lambda c, w, z: z / c.scaling_factor,
    tile_frames=(TILE, STRIDE),
)
moments, encode, raw_pixels, decode = CODER.moments, CODER.encode, CODER.raw_pixels, CODER.decode

FAMILY = Autoencoder(Config, spec, encode, decode, up_stages=up_stages, frames_per_pass=lambda c: TILE + 1)
