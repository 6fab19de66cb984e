"""HunyuanVideo-1.5's autoencoder: causal convolutions, and pixels folded into channels where it resamples.

Source: arXiv 2511.18870 and the AutoencoderKLHunyuanVideo15 checkpoints. A convolution repeats the first
frame and the pixels at the border where it looks beyond them. Nothing looks at a later frame, so a video may
be coded in chunks: `Past` keeps what later frames look back on.

Shape letters: B batch, C channels, T frames, F latent frames, H height, W width, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.models.autoencoders.coder import Coder, Past, in_chunks
from tinydiff.models.family import Autoencoder
from tinydiff.ops.attention import attention
from tinydiff.ops.conv import pad_replicate
from tinydiff.ops.linear import linear
from tinydiff.ops.norm import channel_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import SINGLE, Row, conv_rows, under
from tinydiff.parallel.strips import Strip, gather


@dataclass(frozen=True)
class Config:
    """Field names are those of config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    layers_per_block: int = 2
    spatial_compression_ratio: int = 16
    temporal_compression_ratio: int = 4
    downsample_match_channel: bool = True
    upsample_match_channel: bool = True
    scaling_factor: float = 1.03682

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
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
        for name in ("downsample_match_channel", "upsample_match_channel"):
            if not getattr(self, name):
                raise ValueError(f"{name} is false; every released autoencoder of this kind has true")

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
    """The convolution at a change of resolution. time: frames after the first are halved or doubled too."""

    at: str
    width_out: int
    time: bool


class Stage(NamedTuple):
    """Residual blocks (prefix, width in, width out), then the change of resolution.

    None in the last stage.
    """

    blocks: tuple[tuple[str, int, int], ...]
    resample: Resample | None


def _stages(way: str, widths: tuple[int, ...], layers: int, times: range) -> Iterator[Stage]:
    for i, width in enumerate(widths):
        at = f"{way}_blocks.{i}"
        blocks = tuple((f"{at}.resnets.{j}", width, width) for j in range(layers))
        last = i == len(widths) - 1
        change = None if last else Resample(f"{at}.{way}samplers.0.conv", widths[i + 1], i in times)
        yield Stage(blocks, change)


def down_stages(c: Config) -> Iterator[Stage]:
    """The encoder's stages, from the image on."""
    last = len(c.block_out_channels) - 1
    return _stages("down", c.block_out_channels, c.layers_per_block, range(last - 2, last))


def up_stages(c: Config) -> Iterator[Stage]:
    """The decoder's stages, from the latents on."""
    return _stages("up", c.block_out_channels[::-1], c.layers_per_block + 1, range(2))


def _norm_row(name: str, width: int) -> Row:
    return Row(f"{name}.gamma", (width, 1, 1, 1))


def _conv_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    return conv_rows(f"{name}.conv", inner, outer, (3, 3, 3))


def _block_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield _norm_row(f"{name}.norm1", inner)
    yield from _conv_rows(f"{name}.conv1", inner, outer)
    yield _norm_row(f"{name}.norm2", outer)
    yield from _conv_rows(f"{name}.conv2", outer, outer)


def _middle_rows(width: int) -> Iterator[Row]:
    yield from _block_rows("mid_block.resnets.0", width, width)
    yield _norm_row("mid_block.attentions.0.norm", width)
    for name in ("to_q", "to_k", "to_v", "proj_out"):
        yield from conv_rows(f"mid_block.attentions.0.{name}", width, width, (1, 1, 1))
    yield from _block_rows("mid_block.resnets.1", width, width)


def _end_rows(width: int, channels: int) -> Iterator[Row]:
    yield _norm_row("norm_out", width)
    yield from _conv_rows("conv_out", width, channels)


def _stage_rows(stage: Stage, down: bool) -> Iterator[Row]:
    for block in stage.blocks:
        yield from _block_rows(*block)
    if (r := stage.resample) is not None:
        folded = 8 if r.time else 4
        outer = r.width_out // folded if down else r.width_out * folded
        yield from _conv_rows(r.at, stage.blocks[-1][2], outer)


def encoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the encoder half."""
    first, last = c.block_out_channels[0], c.block_out_channels[-1]
    yield from under("encoder", _conv_rows("conv_in", c.in_channels, first))
    for stage in down_stages(c):
        yield from under("encoder", _stage_rows(stage, down=True))
    yield from under("encoder", _middle_rows(last), _end_rows(last, 2 * c.latent_channels))


def decoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the decoder half."""
    first, last = c.block_out_channels[-1], c.block_out_channels[0]
    yield from under("decoder", _conv_rows("conv_in", c.latent_channels, first), _middle_rows(first))
    for stage in up_stages(c):
        yield from under("decoder", _stage_rows(stage, down=False))
    yield from under("decoder", _end_rows(last, c.out_channels))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield from encoder_spec(c)
    yield from decoder_spec(c)


# --- layers


def _conv(x_BCTHW: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    """A 3x3x3 convolution that sees no later frame. Beyond the border stand the border's own pixels."""
    x, w = pad_replicate(x_BCTHW, strip), w / "conv"
    before = None if past is None else past.get(w.at)
    x = torch.cat([x[:, :, :1].expand(-1, -1, 2, -1, -1) if before is None else before, x], 2)
    if past is not None:
        past[w.at] = x[:, :, -2:].clone()  # a view would keep all of x alive
    return F.conv3d(x, w["weight"], w["bias"])


def _half(x: Tensor, norm: Weights, conv: Weights, past: Past | None, strip: Strip) -> Tensor:
    """Norm, activation, convolution: a half of a block, and the end of a network."""
    return _conv(F.silu(channel_norm(x, norm)), conv, past, strip)


def _block(x: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    y = _half(x, w / "norm1", w / "conv1", past, strip)
    return x + _half(y, w / "norm2", w / "conv2", past, strip)


def _attention(x_BCTHW: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    """One head of attention: a pixel sees all pixels of its own frame and of those before."""
    frames, height = x_BCTHW.shape[2:4]
    pixels = rearrange(channel_norm(x_BCTHW, w / "norm"), "b c t h w -> b t (h w) c")
    q, k, v = (linear(pixels, w / name)[..., None, :] for name in ("to_q", "to_k", "to_v"))
    kv = gather(strip, torch.stack([k, v]), -3)
    if past is not None:
        kv = torch.cat([past[w.at], kv], 2) if w.at in past else kv
        past[w.at] = kv
    keys, values = kv.unbind(0)
    ends = range(kv.shape[2] - frames + 1, kv.shape[2] + 1)
    seen = [
        attention(SINGLE, q[:, i], keys[:, :end].flatten(1, 2), values[:, :end].flatten(1, 2)).flatten(2)
        for i, end in enumerate(ends)
    ]
    y = linear(torch.stack(seen, 1), w / "proj_out")
    return x_BCTHW + rearrange(y, "b t (h w) c -> b c t h w", h=height)


def _middle(x: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    x = _block(x, w / "resnets" / 0, past, strip)
    x = _attention(x, w / "attentions" / 0, past, strip)
    return _block(x, w / "resnets" / 1, past, strip)


def _fold(x: Tensor, time: int) -> Tensor:
    return rearrange(x, "b c (t a) (h p) (w q) -> b (a p q c) t h w", a=time, p=2, q=2)


def _unfold(x: Tensor, time: int) -> Tensor:
    return rearrange(x, "b (a p q c) t h w -> b c (t a) (h p) (w q)", a=time, p=2, q=2)


def _mean(x: Tensor, width: int) -> Tensor:
    """Neighbouring channels averaged, so that `width` are left."""
    return rearrange(x, "b (o g) t h w -> b o g t h w", o=width).mean(2)


def _down(x: Tensor, w: Weights, r: Resample, past: Past | None, first: bool, strip: Strip) -> Tensor:
    """Squares of pixels, or cubes, folded into channels; beside it the average of x's own channels."""
    y = _conv(x, w / r.at, past, strip)
    if not r.time:
        return _fold(y, 1) + _mean(_fold(x, 1), r.width_out)
    cut = int(first)  # the first frame of a video is halved in space alone
    made = [_fold(y[:, :, cut:], 2) + _mean(_fold(x[:, :, cut:], 2), r.width_out)]
    if first:
        twice = _fold(y[:, :, :1], 1).repeat(1, 2, 1, 1, 1)
        made.insert(0, twice + _mean(_fold(x[:, :, :1], 1), r.width_out))
    return torch.cat(made, 2)


def _up(x: Tensor, w: Weights, r: Resample, past: Past | None, first: bool, strip: Strip) -> Tensor:
    """Channels unfolded into squares of pixels, or cubes; beside it x's own channels, repeated."""
    y = _conv(x, w / r.at, past, strip)
    repeats = y.shape[1] // x.shape[1]
    if not r.time:
        return _unfold(y, 1) + _unfold(x.repeat_interleave(repeats, 1), 1)
    cut = int(first)  # the first frame of a video is doubled in space alone
    made = [_unfold(y[:, :, cut:], 2) + _unfold(x[:, :, cut:], 2).repeat_interleave(repeats, 1)]
    if first:
        own = _unfold(x[:, :, :1], 1).repeat_interleave(repeats // 2, 1)
        made.insert(0, _unfold(y[:, :, :1], 1)[:, : r.width_out] + own)
    return torch.cat(made, 2)


def _encode_chunk(c: Config, w: Weights, x: Tensor, past: Past | None, strip: Strip) -> Tensor:
    first = not past
    x = _conv(x, w / "conv_in", past, strip)
    for stage in down_stages(c):
        for name, _, _ in stage.blocks:
            x = _block(x, w / name, past, strip)
        if stage.resample is not None:
            x = _down(x, w, stage.resample, past, first, strip)
    x = _middle(x, w / "mid_block", past, strip)
    return _half(x, w / "norm_out", w / "conv_out", past, strip) + _mean(x, 2 * c.latent_channels)


def _decode_chunk(c: Config, w: Weights, z: Tensor, past: Past | None, strip: Strip) -> Tensor:
    first = not past
    own = z.repeat_interleave(c.block_out_channels[-1] // c.latent_channels, 1)
    x = _middle(_conv(z, w / "conv_in", past, strip) + own, w / "mid_block", past, strip)
    for stage in up_stages(c):
        for name, _, _ in stage.blocks:
            x = _block(x, w / name, past, strip)
        if stage.resample is not None:
            x = _up(x, w, stage.resample, past, first, strip)
    return _half(x, w / "norm_out", w / "conv_out", past, strip)


# --- what callers use


def _moments(c: Config, w: Weights, x: Tensor, chunk: int | None, strip: Strip) -> Tensor:
    e = w / "encoder"
    return in_chunks(lambda part, past: _encode_chunk(c, e, part, past, strip), x, chunk, 4)


def _pixels(c: Config, w: Weights, z: Tensor, chunk: int | None, strip: Strip) -> Tensor:
    d = w / "decoder"
    return in_chunks(lambda part, past: _decode_chunk(c, d, part, past, strip), z, chunk, 1)


CODER = Coder[Config](
    _moments,
    _pixels,
    lambda c, w, z: z * c.scaling_factor,
    lambda c, w, z: z / c.scaling_factor,
)
moments, encode, raw_pixels, decode = CODER.moments, CODER.encode, CODER.raw_pixels, CODER.decode

FAMILY = Autoencoder(Config, spec, encode, decode, up_stages=up_stages, wide_norms=True)
