"""Image autoencoders of the class AutoencoderKL, and FLUX.2's with its 2x2 patches.

Source: arXiv 2112.10752 and the AutoencoderKL and AutoencoderKLFlux2 checkpoints. FLUX.1, Z-Image, Ovis-Image
and SD3 have z 16 at stride 8; FLUX.2 has z 32 at stride 8, which the denoiser sees as 128 channels at stride
16. Latents are normalised by a shift and a scale or, in FLUX.2, by the running statistics of a batch norm
over patches.

Shape letters: B batch, C channels, F frames (each coded on its own; images have one), H height, W width, Z
latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.keymap import KeyMap, unread
from tinydiff.models.autoencoders.coder import Coder, framewise
from tinydiff.models.family import Autoencoder
from tinydiff.ops.attention import attention
from tinydiff.ops.conv import conv2d, halve
from tinydiff.ops.linear import linear
from tinydiff.ops.norm import group_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import SINGLE, Row, conv_rows, linear_rows, norm_rows, under
from tinydiff.parallel.strips import Strip, gather


@dataclass(frozen=True)
class Config:
    """Field names are those of config.json of both classes; defaults are AutoencoderKL's."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    """Not read, like `latents_std`: no pipeline of diffusers for a denoiser supported here reads them."""
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    patch_size: tuple[int, int] | None = None
    """FLUX.2: latents folded into channels before the batch norm. None: no folding and no batch norm."""
    batch_norm_eps: float = 1e-4
    """ERNIE-Image's config says 1e-4 too, but its pipeline uses 1e-5 (see `config_overrides`)."""
    batch_norm_momentum: float = 0.1
    """Not read, like the next two: they matter for training or for diffusers' own pipelines."""
    sample_size: int | tuple[int, ...] = 32
    force_upcast: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for name, block in kinds.items():
            if getattr(self, name) != (block,) * levels:
                raise ValueError(
                    f"{name} is {list(getattr(self, name))}; it must be {block} once per width of "
                    "block_out_channels"
                )
        if len(self.decoder_widths) != levels:
            raise ValueError(
                f"decoder_block_out_channels has {len(self.decoder_widths)} widths and block_out_channels "
                f"{levels}"
            )
        widths = (*self.block_out_channels, *self.decoder_widths)
        if odd := [width for width in widths if width % self.norm_num_groups]:
            raise ValueError(
                f"norm_num_groups is {self.norm_num_groups}, which a width of {odd[0]} does not divide by"
            )
        if self.act_fn != "silu":
            raise ValueError(
                f"act_fn is {self.act_fn!r}; every released autoencoder of this kind uses 'silu'"
            )
        if self.patch_size is not None and (len(self.patch_size) != 2 or len(set(self.patch_size)) != 1):
            raise ValueError(
                f"patch_size is {list(self.patch_size)}; it must be height and width of a square"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def stride(self) -> int:
        """Pixels per raw latent, along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def z_dim(self) -> int:
        """Channels of the normalised latents."""
        return self.latent_channels * prod(self.patch_size or ())

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels per normalised latent, along height and width."""
        return self.stride * (1 if self.patch_size is None else self.patch_size[0])

    @property
    def scale_factor_temporal(self) -> int:
        return 1


# --- structure: which layers there are, read by spec and by the forward functions alike


class Stage(NamedTuple):
    """Residual blocks (prefix, width in, width out), then the convolution that changes the resolution.

    resample: the convolution's prefix; None in the last stage.
    """

    blocks: tuple[tuple[str, int, int], ...]
    resample: str | None


def _stages(way: str, widths: tuple[int, ...], layers: int) -> Iterator[Stage]:
    for i, (inner, outer) in enumerate(pairwise((widths[0], *widths))):
        at = f"{way}_blocks.{i}"
        blocks = tuple((f"{at}.resnets.{j}", inner if j == 0 else outer, outer) for j in range(layers))
        yield Stage(blocks, f"{at}.{way}samplers.0.conv" if i < len(widths) - 1 else None)


def down_stages(c: Config) -> Iterator[Stage]:
    """The encoder's stages, from the image on."""
    return _stages("down", c.block_out_channels, c.layers_per_block)


def up_stages(c: Config) -> Iterator[Stage]:
    """The decoder's stages, from the latents on."""
    return _stages("up", c.decoder_widths[::-1], c.layers_per_block + 1)


def _block_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield from norm_rows(f"{name}.norm1", inner, bias=True)
    yield from conv_rows(f"{name}.conv1", inner, outer, (3, 3))
    yield from norm_rows(f"{name}.norm2", outer, bias=True)
    yield from conv_rows(f"{name}.conv2", outer, outer, (3, 3))
    if inner != outer:
        yield from conv_rows(f"{name}.conv_shortcut", inner, outer, (1, 1))


def _stage_rows(stage: Stage) -> Iterator[Row]:
    for block in stage.blocks:
        yield from _block_rows(*block)
    if stage.resample is not None:
        width = stage.blocks[-1][2]
        yield from conv_rows(stage.resample, width, width, (3, 3))


def _middle_rows(c: Config, width: int) -> Iterator[Row]:
    yield from _block_rows("mid_block.resnets.0", width, width)
    if c.mid_block_add_attention:
        yield from norm_rows("mid_block.attentions.0.group_norm", width, bias=True)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from linear_rows(f"mid_block.attentions.0.{name}", width, width)
    yield from _block_rows("mid_block.resnets.1", width, width)


def _end_rows(width: int, channels: int) -> Iterator[Row]:
    yield from norm_rows("conv_norm_out", width, bias=True)
    yield from conv_rows("conv_out", width, channels, (3, 3))


def encoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the encoder half."""
    first, last, moments = c.block_out_channels[0], c.block_out_channels[-1], 2 * c.latent_channels
    yield from under("encoder", conv_rows("conv_in", c.in_channels, first, (3, 3)))
    for stage in down_stages(c):
        yield from under("encoder", _stage_rows(stage))
    yield from under("encoder", _middle_rows(c, last), _end_rows(last, moments))
    if c.use_quant_conv:
        yield from conv_rows("quant_conv", moments, moments, (1, 1))


def decoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the decoder half."""
    first, last = c.decoder_widths[-1], c.decoder_widths[0]
    if c.use_post_quant_conv:
        yield from conv_rows("post_quant_conv", c.latent_channels, c.latent_channels, (1, 1))
    yield from under(
        "decoder", conv_rows("conv_in", c.latent_channels, first, (3, 3)), _middle_rows(c, first)
    )
    for stage in up_stages(c):
        yield from under("decoder", _stage_rows(stage))
    yield from under("decoder", _end_rows(last, c.out_channels))


def statistics_spec(c: Config) -> Iterator[Row]:
    """The statistics that both halves read, where they are weights."""
    if c.patch_size is not None:
        yield Row("bn.running_mean", (c.z_dim,))
        yield Row("bn.running_var", (c.z_dim,))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield from encoder_spec(c)
    yield from decoder_spec(c)
    yield from statistics_spec(c)


def key_map(c: Config) -> KeyMap:
    """The batch norm's counter is read by training alone."""
    return KeyMap(unread("bn.num_batches_tracked"))


# --- layers


def _half(c: Config, x: Tensor, norm: Weights, conv: Weights, strip: Strip) -> Tensor:
    """Norm, activation, convolution: a half of a block, and the end of a network."""
    return conv2d(F.silu(group_norm(x, norm, c.norm_num_groups, strip=strip)), conv, padding=1, strip=strip)


def _block(c: Config, x: Tensor, w: Weights, strip: Strip) -> Tensor:
    shortcut = conv2d(x, w / "conv_shortcut") if "conv_shortcut.weight" in w else x
    y = _half(c, x, w / "norm1", w / "conv1", strip)
    return shortcut + _half(c, y, w / "norm2", w / "conv2", strip)


def _attention(c: Config, x_BCHW: Tensor, w: Weights, strip: Strip) -> Tensor:
    """One head of attention over all pixels."""
    normed = group_norm(x_BCHW, w / "group_norm", c.norm_num_groups, strip=strip)
    pixels = rearrange(normed, "b c h w -> b (h w) c")
    q, k, v = (linear(pixels, w / name)[:, :, None] for name in ("to_q", "to_k", "to_v"))
    y = linear(attention(SINGLE, q, gather(strip, k, -3), gather(strip, v, -3))[:, :, 0], w / "to_out" / 0)
    return x_BCHW + rearrange(y, "b (h w) c -> b c h w", h=x_BCHW.shape[2])


def _middle(c: Config, x: Tensor, w: Weights, strip: Strip) -> Tensor:
    x = _block(c, x, w / "resnets" / 0, strip)
    if c.mid_block_add_attention:
        x = _attention(c, x, w / "attentions" / 0, strip)
    return _block(c, x, w / "resnets" / 1, strip)


def _blocks(c: Config, x: Tensor, w: Weights, stage: Stage, strip: Strip) -> Tensor:
    for name, _, _ in stage.blocks:
        x = _block(c, x, w / name, strip)
    return x


def _moments(c: Config, w: Weights, x_BCHW: Tensor, strip: Strip) -> Tensor:
    e = w / "encoder"
    x = conv2d(x_BCHW, e / "conv_in", padding=1, strip=strip)
    for stage in down_stages(c):
        x = _blocks(c, x, e, stage, strip)
        if stage.resample is not None:
            x = halve(x, e / stage.resample, strip)
    x = _half(c, _middle(c, x, e / "mid_block", strip), e / "conv_norm_out", e / "conv_out", strip)
    return conv2d(x, w / "quant_conv") if c.use_quant_conv else x


def _pixels(c: Config, w: Weights, z_BZHW: Tensor, strip: Strip) -> Tensor:
    d = w / "decoder"
    z = conv2d(z_BZHW, w / "post_quant_conv") if c.use_post_quant_conv else z_BZHW
    x = _middle(c, conv2d(z, d / "conv_in", padding=1, strip=strip), d / "mid_block", strip)
    for stage in up_stages(c):
        x = _blocks(c, x, d, stage, strip)
        if stage.resample is not None:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv2d(x, d / stage.resample, padding=1, strip=strip)
    return _half(c, x, d / "conv_norm_out", d / "conv_out", strip)


# --- what callers use


def normalise(c: Config, w: Weights, z_BZFHW: Tensor) -> Tensor:
    """Raw latents -> latents of about zero mean and unit variance, as the denoiser sees them.

    FLUX.2's latents are folded into patches first.
    """
    mean, std = _statistics(c, w, z_BZFHW)
    if c.patch_size is not None:
        ph, pw = c.patch_size
        z_BZFHW = rearrange(z_BZFHW, "b c f (h ph) (w pw) -> b (c ph pw) f h w", ph=ph, pw=pw)
    return (z_BZFHW - mean) / std


def raw_latents(c: Config, w: Weights, z_BZFHW: Tensor) -> Tensor:
    """Inverse of `normalise`."""
    mean, std = _statistics(c, w, z_BZFHW)
    z = z_BZFHW * std + mean
    if c.patch_size is None:
        return z
    ph, pw = c.patch_size
    return rearrange(z, "b (c ph pw) f h w -> b c f (h ph) (w pw)", ph=ph, pw=pw)


def _statistics(c: Config, w: Weights, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of normalised channels, each to broadcast over [B, Z, F, H, W]."""
    if c.patch_size is not None:
        mean, std = (w / "bn")["running_mean"], ((w / "bn")["running_var"] + c.batch_norm_eps).sqrt()
    else:
        mean = torch.tensor(c.shift_factor or 0.0, dtype=torch.float64)
        std = torch.tensor(1 / c.scaling_factor, dtype=torch.float64)
    mean, std = (values.to(like).view(1, -1, 1, 1, 1) for values in (mean, std))
    return mean, std


CODER = Coder[Config](
    framewise(_moments),
    framewise(_pixels),
    normalise,
    raw_latents,
    stride=lambda c: c.stride,
)
moments, encode, raw_pixels, decode = CODER.moments, CODER.encode, CODER.raw_pixels, CODER.decode

FAMILY = Autoencoder(Config, spec, encode, decode, keys=key_map, up_stages=up_stages)
