"""The video autoencoder of LTX-2 and LTX-2.3: 8x fewer frames, 32x smaller frames, 128 latent channels.

Source: arXiv 2601.03233 and the AutoencoderKLLTX2Video checkpoints. Pixels are folded in patches of 4x4.
A video has 8k + 1 frames, of which the first makes a latent frame of its own. The encoder is causal; the
decoder looks at frames before and after, so all frames of a video, or of a tile of it, are decoded at once.
Latents are normalised by means and deviations that are weights.

Shape letters: B batch, C channels, T frames, F latent frames, H height, W width, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.models.autoencoders.coder import Coder, by_statistics, fold, unfold
from tinydiff.models.family import Autoencoder
from tinydiff.ops.norm import compute_dtype, layer_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows, norm_rows, under

STRIDES = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}
"""What a change of resolution is called -> its factors along frames, height and width."""


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    down_block_types: tuple[str, ...] = ("LTX2VideoDownBlock3D",) * 4
    decoder_block_out_channels: tuple[int, ...] = (256, 512, 1024)
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, True)
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (True, True, True)
    decoder_inject_noise: tuple[bool, ...] = (False, False, False, False)
    downsample_type: tuple[str, ...] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    upsample_type: tuple[str, ...] = ("spatiotemporal", "spatiotemporal", "spatiotemporal")
    upsample_residual: tuple[bool, ...] = (True, True, True)
    upsample_factor: tuple[int, ...] = (2, 2, 2)
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = True
    encoder_spatial_padding_mode: str = "zeros"
    decoder_spatial_padding_mode: str = "reflect"
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None

    def __post_init__(self) -> None:
        fixed = {
            "down_block_types": ("LTX2VideoDownBlock3D",) * len(self.block_out_channels),
            "spatio_temporal_scaling": (True,) * len(self.block_out_channels),
            "decoder_spatio_temporal_scaling": (True,) * len(self.decoder_block_out_channels),
            "decoder_inject_noise": (False,) * len(self.decoder_layers_per_block),
            "timestep_conditioning": False,
            "patch_size_t": 1,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; LTX-2 and LTX-2.3 have {value!r}")
        for name in ("downsample_type", "upsample_type"):
            if unknown := set(getattr(self, name)) - STRIDES.keys():
                raise ValueError(f"{name} has {min(unknown)!r}; known are {', '.join(STRIDES)}")
        for name in ("encoder_spatial_padding_mode", "decoder_spatial_padding_mode"):
            if getattr(self, name) not in ("zeros", "reflect"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be 'zeros' or 'reflect'")
        lengths = {
            "downsample_type": len(self.block_out_channels),
            "layers_per_block": len(self.block_out_channels) + 1,
            **dict.fromkeys(
                ("upsample_type", "upsample_residual", "upsample_factor"),
                len(self.decoder_block_out_channels),
            ),
            "decoder_layers_per_block": len(self.decoder_block_out_channels) + 1,
        }
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; it must have {length}")

    @property
    def z_dim(self) -> int:
        return self.latent_channels

    @property
    def scale_factor_spatial(self) -> int:
        return self.spatial_compression_ratio or self.patch_size * 2 ** len(self.block_out_channels)

    @property
    def scale_factor_temporal(self) -> int:
        return self.temporal_compression_ratio or 2 ** len(self.block_out_channels)


# --- structure: which layers there are, read by spec and by the forward functions alike


class Stage(NamedTuple):
    """Blocks of one width and a change of resolution.

    The change comes after them on the way down, and before them on the way up.

    enter: (prefix, width in, width out) of a block before it all. change: (prefix, width in, width out)
    of the convolution; stride: its factors. residual: whether the input, folded alike, is added.
    """

    blocks: tuple[str, ...]
    width: int
    change: tuple[str, int, int]
    stride: tuple[int, int, int]
    residual: bool
    enter: tuple[str, int, int] | None = None


def down_stages(c: Config) -> Iterator[Stage]:
    """The encoder's stages, from the video on."""
    inner = c.latent_channels
    for i, outer in enumerate(c.block_out_channels):
        at, stride = f"down_blocks.{i}", STRIDES[c.downsample_type[i]]
        change = (f"{at}.downsamplers.0.conv", inner, outer // prod(stride))
        blocks = tuple(f"{at}.resnets.{j}" for j in range(c.layers_per_block[i]))
        yield Stage(blocks, inner, change, stride, True)
        inner = outer


def up_stages(c: Config) -> Iterator[Stage]:
    """The decoder's stages, from the latents on."""
    widths, layers = c.decoder_block_out_channels[::-1], c.decoder_layers_per_block[::-1]
    before = widths[0]
    for i, width in enumerate(widths):
        at, factor, stride = f"up_blocks.{i}", c.upsample_factor[::-1][i], STRIDES[c.upsample_type[i]]
        inner, outer = before // factor, width // factor
        change = (f"{at}.upsamplers.0.conv", outer * factor, outer * prod(stride))
        blocks = tuple(f"{at}.resnets.{j}" for j in range(layers[i + 1]))
        enter = None if inner == outer else (f"{at}.conv_in", inner, outer)
        yield Stage(blocks, outer, change, stride, c.upsample_residual[::-1][i], enter)
        before = outer


def _conv_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield from conv_rows(f"{name}.conv", inner, outer, (3, 3, 3))


def _block_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield from _conv_rows(f"{name}.conv1", inner, outer)
    yield from _conv_rows(f"{name}.conv2", outer, outer)
    if inner != outer:
        yield from norm_rows(f"{name}.norm3", inner, bias=True)
        yield from conv_rows(f"{name}.conv_shortcut", inner, outer, (1, 1, 1))


def _stage_rows(stage: Stage) -> Iterator[Row]:
    if stage.enter is not None:
        yield from _block_rows(*stage.enter)
    for name in stage.blocks:
        yield from _block_rows(name, stage.width, stage.width)
    yield from _conv_rows(*stage.change)


def _middle_rows(layers: int, width: int) -> Iterator[Row]:
    for i in range(layers):
        yield from _block_rows(f"mid_block.resnets.{i}", width, width)


def _encoder_rows(c: Config) -> Iterator[Row]:
    last = c.block_out_channels[-1]
    yield from _conv_rows("conv_in", c.in_channels * c.patch_size**2, c.latent_channels)
    for stage in down_stages(c):
        yield from _stage_rows(stage)
    yield from _middle_rows(c.layers_per_block[-1], last)
    yield from _conv_rows("conv_out", last, c.latent_channels + 1)


def _decoder_rows(c: Config) -> Iterator[Row]:
    first, stages = c.decoder_block_out_channels[-1], list(up_stages(c))
    yield from _conv_rows("conv_in", c.latent_channels, first)
    yield from _middle_rows(c.decoder_layers_per_block[-1], first)
    for stage in stages:
        yield from _stage_rows(stage)
    yield from _conv_rows("conv_out", stages[-1].width, c.out_channels * c.patch_size**2)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield Row("latents_mean", (c.latent_channels,))
    yield Row("latents_std", (c.latent_channels,))
    yield from under("encoder", _encoder_rows(c))
    yield from under("decoder", _decoder_rows(c))


# --- layers


class Half(NamedTuple):
    """What the convolutions of the encoder, or of the decoder, have in common."""

    causal: bool
    padding: str


def _conv(half: Half, x: Tensor, w: Weights) -> Tensor:
    """A 3x3x3 convolution that keeps the size.

    The first frame stands for those before it and, where it is not causal, the last for those after it.
    """
    first, last = x[:, :, :1], x[:, :, -1:]
    x = torch.cat([first, first, x] if half.causal else [first, x, last], 2)
    if half.padding == "zeros":
        return F.conv3d(x, w["conv.weight"], w["conv.bias"], padding=(0, 1, 1))
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 0, 0), mode=half.padding), w["conv.weight"], w["conv.bias"])


def _active(x: Tensor) -> Tensor:
    """RMS norm over channels, then SiLU; the mean of half types is taken in float32."""
    mean = x.to(compute_dtype(x)).square().mean(1, keepdim=True)
    return F.silu((x * (mean + 1e-8).rsqrt()).to(x.dtype))


def _block(c: Config, half: Half, x: Tensor, w: Weights) -> Tensor:
    y = _conv(half, _active(_conv(half, _active(x), w / "conv1")), w / "conv2")
    if "conv_shortcut.weight" in w:
        x = layer_norm(x.movedim(1, -1), w / "norm3", c.resnet_norm_eps).movedim(-1, 1)
        x = F.conv3d(x, w["conv_shortcut.weight"], w["conv_shortcut.bias"])
    return y + x


def _folded(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    p, q, r = stride
    return rearrange(x, "b c (f p) (h q) (w r) -> b (c p q r) f h w", p=p, q=q, r=r)


def _unfolded(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The opposite of `_folded`. The first frame is one frame again: copies of it are left out."""
    p, q, r = stride
    return rearrange(x, "b (c p q r) f h w -> b c (f p) (h q) (w r)", p=p, q=q, r=r)[:, :, p - 1 :]


def _down(c: Config, half: Half, x: Tensor, w: Weights, stage: Stage) -> Tensor:
    for name in stage.blocks:
        x = _block(c, half, x, w / name)
    x = torch.cat([x[:, :, : stage.stride[0] - 1], x], 2)
    y, residual = _folded(_conv(half, x, w / stage.change[0]), stage.stride), _folded(x, stage.stride)
    return y + torch.unflatten(residual, 1, (y.shape[1], -1)).mean(2)


def _up(c: Config, half: Half, x: Tensor, w: Weights, stage: Stage) -> Tensor:
    if stage.enter is not None:
        x = _block(c, half, x, w / stage.enter[0])
    y = _unfolded(_conv(half, x, w / stage.change[0]), stage.stride)
    if stage.residual:
        residual = _unfolded(x, stage.stride)
        y = y + residual.repeat(1, y.shape[1] // residual.shape[1], 1, 1, 1)
    for name in stage.blocks:
        y = _block(c, half, y, w / name)
    return y


def _mean(c: Config, w: Weights, x: Tensor) -> Tensor:
    """Pixels -> the mean of the raw latents."""
    half = Half(c.encoder_causal, c.encoder_spatial_padding_mode)
    x = _conv(half, fold(x, c.patch_size), w / "conv_in")
    for stage in down_stages(c):
        x = _down(c, half, x, w, stage)
    for i in range(c.layers_per_block[-1]):
        x = _block(c, half, x, w / f"mid_block.resnets.{i}")
    return _conv(half, _active(x), w / "conv_out")[:, : c.latent_channels]


def _pixels(c: Config, w: Weights, z: Tensor) -> Tensor:
    """Raw latents -> pixels."""
    half = Half(c.decoder_causal, c.decoder_spatial_padding_mode)
    x = _conv(half, z, w / "conv_in")
    for i in range(c.decoder_layers_per_block[-1]):
        x = _block(c, half, x, w / f"mid_block.resnets.{i}")
    for stage in up_stages(c):
        x = _up(c, half, x, w, stage)
    return unfold(_conv(half, _active(x), w / "conv_out"), c.patch_size)


# --- what callers use


def statistics(c: Config, w: Weights, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the raw latents, each to broadcast over [B, Z, F, H, W]."""
    mean, std = (w[name].to(like).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std / c.scaling_factor


def peak(c: Config, frames: int, height: int, width: int) -> int:
    """Values alive at the peak of decoding a video at once.

    A block holds its input, what its first convolution made, that normalised and activated, and copies of it
    with a frame at both ends and with reflected edges: about five and a half tensors, one less with zeros
    around them, which are not copied.
    """
    now, places = (frames - 1) // c.scale_factor_temporal + 1, height * width // c.scale_factor_spatial**2
    most = c.decoder_block_out_channels[-1] * (now + 2) * places
    for stage in up_stages(c):
        p, q, r = stage.stride
        now, places = p * now - (p - 1), places * q * r
        most = max(most, stage.width * (now + 2) * places)
    return most * (11 if c.decoder_spatial_padding_mode == "reflect" else 9) // 2


CODER = Coder[Config](
    lambda c, w, x, chunk, strip: _mean(c, w / "encoder", x),
    lambda c, w, z, chunk, strip: _pixels(c, w / "decoder", z),
    *by_statistics(statistics),
    strips=False,
)
moments, encode, raw_pixels, decode = CODER.moments, CODER.encode, CODER.raw_pixels, CODER.decode

FAMILY = Autoencoder(Config, spec, encode, decode, peak=peak)
