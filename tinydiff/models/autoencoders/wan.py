"""The Wan video autoencoders: causal in time, 4x fewer frames, 8x or 16x smaller frames.

Source: arXiv 2503.20314 and the AutoencoderKLWan checkpoints (Wan2.1: z 16, stride 8; Wan2.2 TI2V: z 48,
stride 16, residual). Qwen-Image's AutoencoderKLQwenImage is Wan2.1's network run on single frames, in
Qwen-Image-Layered with a fourth channel for alpha. A video has 4k + 1 frames; the first is coded alone, every
later group of four becomes one latent frame. Because every operation is causal, a video may be run in one
pass or in chunks of latent frames with the same result: `past` then carries, by layer name, the frames that
the next chunk looks back on. A single pass has no past. A frame may be a strip of rows (`parallel.strips`).

Shape letters: B batch, C channels, T frames, F latent frames, H height, W width, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.models.autoencoders.coder import Coder, Past, by_statistics, in_chunks
from tinydiff.models.family import Autoencoder
from tinydiff.ops.attention import attention
from tinydiff.ops.conv import causal_conv3d, conv2d, halve, per_frame
from tinydiff.ops.norm import channel_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import SINGLE, Row, conv_rows, under
from tinydiff.parallel.strips import Strip, gather, halo


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    clip_output: bool = True
    """Not read: the reference clips its pixels whatever this says, and so does `decode`."""
    input_channels: int | None = None
    """AutoencoderKLQwenImage's name for both `in_channels` and `out_channels`, which it then sets."""

    def __post_init__(self) -> None:
        if self.input_channels is not None:
            for name in ("in_channels", "out_channels"):
                object.__setattr__(self, name, self.input_channels)
        if self.attn_scales:
            raise ValueError(
                f"attn_scales is {self.attn_scales}; no released Wan autoencoder has attention outside its "
                "middle block"
            )

        area = (self.patch_size or 1) ** 2
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) not in (3 * area, 4 * area):
                raise ValueError(
                    f"{name} is {getattr(self, name)} and patch_size {self.patch_size}; there must be 3 or "
                    "4 channels"
                    " for each pixel of a patch"
                )

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def stride(self) -> int:
        """Pixels per latent, along height and width, as the levels make them.

        Pipelines size latents by `scale_factor_spatial`. Where a config says another number there,
        the output has another size than was asked for.
        """
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)


def check_statistics(c: Config) -> None:
    """Raises ValueError for a Config that is enough to plan with but not to run.

    Its statistics must have one value per latent channel.
    """
    for name in ("latents_mean", "latents_std"):
        if (count := len(getattr(c, name))) != c.z_dim:
            raise ValueError(
                f"{name} has {count} values; it must have one for each of {c.z_dim} channels (z_dim)"
            )


# --- structure: which layers there are, read by spec and by the forward functions alike


class Resample(NamedTuple):
    """A change of resolution: halving or doubling the frame size, and the frame rate too if `time`."""

    at: str
    width_in: int
    width_out: int
    time: bool


class Stage(NamedTuple):
    """Residual blocks (prefix, width in, width out), then a change of resolution.

    skip: whether the parameter-free shortcut is added.
    """

    blocks: tuple[tuple[str, int, int], ...]
    resample: Resample | None
    skip: bool


def _widths(base: int, multipliers: Iterable[int]) -> list[int]:
    return [base * m for m in multipliers]


def down_stages(c: Config) -> Iterator[Stage]:
    """The encoder's stages, from the video on."""
    widths = _widths(c.base_dim, (1, *c.dim_mult))
    last, index = len(c.dim_mult) - 1, 0
    for i, (inner, outer) in enumerate(pairwise(widths)):
        if c.is_residual:
            names = [f"down_blocks.{i}.resnets.{j}" for j in range(c.num_res_blocks)]
            at = f"down_blocks.{i}.downsampler"
        else:  # one flat list: the blocks of a stage, then its resampling
            names = [f"down_blocks.{index + j}" for j in range(c.num_res_blocks)]
            at = f"down_blocks.{index + c.num_res_blocks}"
            index += c.num_res_blocks + 1
        blocks = tuple((name, inner if j == 0 else outer, outer) for j, name in enumerate(names))
        resample = Resample(at, outer, outer, c.temperal_downsample[i]) if i < last else None
        yield Stage(blocks, resample, c.is_residual)


def up_stages(c: Config) -> Iterator[Stage]:
    """The decoder's stages, from the latents on."""
    widths = _widths(c.decoder_base_dim or c.base_dim, (c.dim_mult[-1], *reversed(c.dim_mult)))
    last, doubled = len(c.dim_mult) - 1, tuple(reversed(c.temperal_downsample))
    for i, (inner, outer) in enumerate(pairwise(widths)):
        if i and not c.is_residual:
            inner //= 2  # the resampling of the stage before halved the width
        names = [f"up_blocks.{i}.resnets.{j}" for j in range(c.num_res_blocks + 1)]
        blocks = tuple((name, inner if j == 0 else outer, outer) for j, name in enumerate(names))
        at = f"up_blocks.{i}.upsampler" if c.is_residual else f"up_blocks.{i}.upsamplers.0"
        resample = (
            Resample(at, outer, outer if c.is_residual else outer // 2, doubled[i]) if i < last else None
        )
        yield Stage(blocks, resample, c.is_residual and i < last)


def _block_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield Row(f"{name}.norm1.gamma", (inner, 1, 1, 1))
    yield from conv_rows(f"{name}.conv1", inner, outer, (3, 3, 3))
    yield Row(f"{name}.norm2.gamma", (outer, 1, 1, 1))
    yield from conv_rows(f"{name}.conv2", outer, outer, (3, 3, 3))
    if inner != outer:
        yield from conv_rows(f"{name}.conv_shortcut", inner, outer, (1, 1, 1))


def _middle_rows(width: int) -> Iterator[Row]:
    yield from _block_rows("mid_block.resnets.0", width, width)
    yield Row("mid_block.attentions.0.norm.gamma", (width, 1, 1))
    yield from conv_rows("mid_block.attentions.0.to_qkv", width, 3 * width, (1, 1))
    yield from conv_rows("mid_block.attentions.0.proj", width, width, (1, 1))
    yield from _block_rows("mid_block.resnets.1", width, width)


def _stage_rows(stage: Stage, time_factor: int) -> Iterator[Row]:
    for block in stage.blocks:
        yield from _block_rows(*block)
    if (r := stage.resample) is not None:
        yield from conv_rows(f"{r.at}.resample.1", r.width_in, r.width_out, (3, 3))
        if r.time:
            yield from conv_rows(f"{r.at}.time_conv", r.width_in, time_factor * r.width_in, (3, 1, 1))


def encoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the encoder half."""
    first, last = c.base_dim, c.base_dim * c.dim_mult[-1]
    yield from under("encoder", conv_rows("conv_in", c.in_channels, first, (3, 3, 3)))
    for stage in down_stages(c):
        yield from under("encoder", _stage_rows(stage, 1))
    yield from under(
        "encoder",
        _middle_rows(last),
        [Row("norm_out.gamma", (last, 1, 1, 1))],
        conv_rows("conv_out", last, 2 * c.z_dim, (3, 3, 3)),
    )
    yield from conv_rows("quant_conv", 2 * c.z_dim, 2 * c.z_dim, (1, 1, 1))


def decoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the decoder half."""
    base = c.decoder_base_dim or c.base_dim
    first, last = base * c.dim_mult[-1], base * c.dim_mult[0]
    yield from conv_rows("post_quant_conv", c.z_dim, c.z_dim, (1, 1, 1))
    yield from under("decoder", conv_rows("conv_in", c.z_dim, first, (3, 3, 3)), _middle_rows(first))
    for stage in up_stages(c):
        yield from under("decoder", _stage_rows(stage, 2))
    yield from under(
        "decoder",
        [Row("norm_out.gamma", (last, 1, 1, 1))],
        conv_rows("conv_out", last, c.out_channels, (3, 3, 3)),
    )


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield from encoder_spec(c)
    yield from decoder_spec(c)


# --- layers


def _recall(past: Past | None, key: str, x: Tensor, reach: int) -> Tensor | None:
    """The frames before x that layer `key` looks back on, None at the start of a video.

    Stores the last `reach` frames in `past` for the next chunk.
    """
    if past is None:
        return None
    before = past.get(key)
    seen = x if before is None or x.shape[2] >= reach else torch.cat([before, x], 2)
    past[key] = seen[:, :, -reach:].clone()  # a view would keep all of x alive
    return before


def _conv(x: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    x = halo(strip, x, 1, 1)  # first, so that the rows of neighbours are remembered too
    return causal_conv3d(x, w, _recall(past, w.at, x, 2), strip)


def _block(x: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    shortcut = causal_conv3d(x, w / "conv_shortcut") if "conv_shortcut.weight" in w else x
    y = _conv(F.silu(channel_norm(x, w / "norm1")), w / "conv1", past, strip)
    return shortcut + _conv(F.silu(channel_norm(y, w / "norm2")), w / "conv2", past, strip)


def _frame_attention(x_BCHW: Tensor, w: Weights, strip: Strip) -> Tensor:
    """One head of attention over the pixels of each frame."""
    qkv = conv2d(channel_norm(x_BCHW, w / "norm"), w / "to_qkv")
    qkv = rearrange(qkv, "b (three c) h w -> three b (h w) 1 c", three=3)
    k, v = gather(strip, qkv[1:], -3).unbind(0)
    y = attention(SINGLE, qkv[0], k, v)
    return x_BCHW + conv2d(rearrange(y, "b (h w) 1 c -> b c h w", h=x_BCHW.shape[2]), w / "proj")


def _middle(x: Tensor, w: Weights, past: Past | None, strip: Strip) -> Tensor:
    x = _block(x, w / "resnets" / 0, past, strip)
    x = per_frame(lambda frame: _frame_attention(frame, w / "attentions" / 0, strip), x)
    return _block(x, w / "resnets" / 1, past, strip)


def _downsample(x: Tensor, w: Weights, time: bool, past: Past | None, strip: Strip) -> Tensor:
    x = per_frame(lambda frame: halve(frame, w / "resample" / 1, strip), x)
    if not time:
        return x
    before, w = _recall(past, w.at, x, 1), w / "time_conv"
    window = x if before is None else torch.cat([before, x], 2)
    halved = [F.conv3d(window, w["weight"], w["bias"], stride=(2, 1, 1))] if window.shape[2] >= 3 else []
    return torch.cat([x[:, :, :1], *halved], 2) if before is None else halved[0]


def _upsample(x: Tensor, w: Weights, time: bool, past: Past | None, strip: Strip) -> Tensor:
    if time:
        key = f"{w.at}time_conv."
        started = past is not None and key in past
        first, rest = (x[:, :, :0], x) if started else (x[:, :, :1], x[:, :, 1:])
        before = _recall(past, key, rest, 2)
        if rest.shape[2]:
            doubled = causal_conv3d(rest, w / "time_conv", before)
            first = torch.cat([first, rearrange(doubled, "b (two c) t h w -> b c (t two) h w", two=2)], 2)
        x = first
    at = w / "resample" / 1

    def double(frame: Tensor) -> Tensor:
        return conv2d(F.interpolate(frame, scale_factor=2, mode="nearest-exact"), at, padding=1, strip=strip)

    return per_frame(double, x)


def _average_down(x: Tensor, width: int, ft: int, fs: int) -> Tensor:
    """Shortcut: fold space and time into channels, then average groups of channels down to `width`.

    Zero frames in front fill the number of frames up to a multiple of ft.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    folded = rearrange(x, "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w", ft=ft, fh=fs, fw=fs)
    return rearrange(folded, "b (o g) t h w -> b o g t h w", o=width).mean(2)


def _duplicate_up(x: Tensor, width: int, ft: int, first: bool) -> Tensor:
    """Shortcut: repeat channels, then unfold them into space and time.

    At the start of a video (`first`) the first ft - 1 frames are dropped.
    """
    x = x.repeat_interleave(width * ft * 4 // x.shape[1], 1)
    y = rearrange(x, "b (o ft fh fw) t h w -> b o (t ft) (h fh) (w fw)", o=width, ft=ft, fh=2, fw=2)
    return y[:, :, ft - 1 :] if first else y


def _down(x: Tensor, w: Weights, stage: Stage, past: Past | None, strip: Strip) -> Tensor:
    start = x
    for name, _, _ in stage.blocks:
        x = _block(x, w / name, past, strip)
    if (r := stage.resample) is not None:
        x = _downsample(x, w / r.at, r.time, past, strip)
    if not stage.skip:
        return x
    ft, fs = (1, 1) if r is None else (2 if r.time else 1, 2)
    return x + _average_down(start, x.shape[1], ft, fs)


def _encode_chunk(c: Config, w: Weights, x: Tensor, past: Past | None, strip: Strip) -> Tensor:
    x = _conv(x, w / "conv_in", past, strip)
    for stage in down_stages(c):
        x = _down(x, w, stage, past, strip)
    x = _middle(x, w / "mid_block", past, strip)
    return _conv(F.silu(channel_norm(x, w / "norm_out")), w / "conv_out", past, strip)


def _decode_chunk(c: Config, w: Weights, z: Tensor, past: Past | None, strip: Strip) -> Tensor:
    first = not past
    x = _middle(_conv(z, w / "conv_in", past, strip), w / "mid_block", past, strip)
    for stage in up_stages(
        c
    ):  # here and in no function of its own, which would keep what enters a stage alive
        start = x if stage.skip else None
        for name, _, _ in stage.blocks:
            x = _block(x, w / name, past, strip)
        if (r := stage.resample) is not None:
            x = _upsample(x, w / r.at, r.time, past, strip)
            if start is not None:
                x = x + _duplicate_up(start, r.width_out, 2 if r.time else 1, first)
    return _conv(F.silu(channel_norm(x, w / "norm_out")), w / "conv_out", past, strip)


# --- what callers use


def _moments(c: Config, w: Weights, x: Tensor, chunk: int | None, strip: Strip) -> Tensor:
    e = w / "encoder"
    y = in_chunks(lambda part, past: _encode_chunk(c, e, part, past, strip), x, chunk, 4)
    return causal_conv3d(y, w / "quant_conv")


def _pixels(c: Config, w: Weights, z: Tensor, chunk: int | None, strip: Strip) -> Tensor:
    z, d = causal_conv3d(z, w / "post_quant_conv"), w / "decoder"
    return in_chunks(lambda part, past: _decode_chunk(c, d, part, past, strip), z, chunk, 1)


def _statistics(c: Config, w: Weights, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
        for v in (c.latents_mean, c.latents_std)
    )
    return mean, std


CODER = Coder[Config](
    _moments,
    _pixels,
    *by_statistics(_statistics),
    stride=lambda c: c.stride,
    patch=lambda c: c.patch_size or 1,
)
moments, encode, raw_pixels, decode = CODER.moments, CODER.encode, CODER.raw_pixels, CODER.decode

FAMILY = Autoencoder(
    Config, spec, encode, decode, up_stages=up_stages, check_runnable=check_statistics, wide_norms=True
)
