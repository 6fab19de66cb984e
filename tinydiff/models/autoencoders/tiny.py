"""Tiny autoencoders (TAESD and relatives): a few convolutions that approximate a large autoencoder.

Source: the AutoencoderTiny checkpoints (stride 8). There is no norm and no attention, so a pixel depends on
its surroundings only. The latents are the denoiser's own, normalised ones.

Shape letters: B batch, C channels, F frames (each coded on its own; images have one), H height, W width, Z
latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models.autoencoders.coder import Coder, framewise
from tinydiff.models.family import Autoencoder
from tinydiff.ops.conv import conv2d
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows, under
from tinydiff.parallel.strips import Strip

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latent_magnitude: float = 3.0
    """Not read, like the next: for latents stored as bytes."""
    latent_shift: float = 0.5
    force_upcast: bool = False
    block_out_channels: tuple[int, ...] | None = None
    """A second name of `decoder_block_out_channels` that the reference writes."""

    def __post_init__(self) -> None:
        for half in ("encoder", "decoder"):
            widths, counts = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            if len(set(widths)) != 1:
                raise ValueError(
                    f"{half}_block_out_channels is {list(widths)}; all must be one width, which the layers "
                    "between keep"
                )
            if len(widths) != len(counts):
                raise ValueError(
                    f"{half}_block_out_channels has {len(widths)} stages and num_{half}_blocks {len(counts)}"
                )
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError(
                f"num_encoder_blocks is {list(self.num_encoder_blocks)} and num_decoder_blocks has another "
                "number of stages"
            )
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn is {self.act_fn!r}; known are {', '.join(ACTIVATIONS)}")
        for name, only in (("upsample_fn", "nearest"), ("upsampling_scaling_factor", 2)):
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; every released tiny autoencoder has {only!r}"
                )

    @property
    def z_dim(self) -> int:
        return self.latent_channels

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels per latent, along height and width."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    @property
    def scale_factor_temporal(self) -> int:
        return 1


# --- structure: which layers there are, read by spec and by the forward functions alike


class Layer(NamedTuple):
    """One entry of the flat list of layers.

    kind: "conv", "block" (residual), "down" (convolution with stride 2) or "up" (doubling, then a
    convolution).
    """

    at: str
    kind: str
    inner: int
    outer: int
    bias: bool = True


def encoder_layers(c: Config) -> Iterator[Layer]:
    """The encoder's layers, from the image on."""
    width, place = c.encoder_block_out_channels[0], 0
    for i, count in enumerate(c.num_encoder_blocks):
        if i == 0:
            yield Layer(f"layers.{place}", "conv", c.in_channels, width)
        else:
            yield Layer(f"layers.{place}", "down", width, width, bias=False)
        for j in range(count):
            yield Layer(f"layers.{place + 1 + j}", "block", width, width)
        place += 1 + count
    yield Layer(f"layers.{place}", "conv", width, c.latent_channels)


def decoder_layers(c: Config) -> Iterator[Layer]:
    """The decoder's layers that have weights.

    The activation after the first layer and each doubling take a number in the list but have no weights.
    """
    width, place, last = c.decoder_block_out_channels[0], 2, len(c.num_decoder_blocks) - 1
    yield Layer("layers.0", "conv", c.latent_channels, width)
    for i, count in enumerate(c.num_decoder_blocks):
        for j in range(count):
            yield Layer(f"layers.{place + j}", "block", width, width)
        after = place + count
        if i < last:
            yield Layer(f"layers.{after + 1}", "up", width, width, False)
        else:
            yield Layer(f"layers.{after}", "conv", width, c.out_channels)
        place = after + 2


def _layer_rows(layer: Layer) -> Iterator[Row]:
    if layer.kind == "block":
        for i in (0, 2, 4):
            yield from conv_rows(f"{layer.at}.conv.{i}", layer.inner, layer.outer, (3, 3))
    else:
        rows = conv_rows(layer.at, layer.inner, layer.outer, (3, 3))
        yield from (row for row in rows if layer.bias or not row.name.endswith("bias"))


def encoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the encoder half."""
    for layer in encoder_layers(c):
        yield from under("encoder", _layer_rows(layer))


def decoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the decoder half."""
    for layer in decoder_layers(c):
        yield from under("decoder", _layer_rows(layer))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield from encoder_spec(c)
    yield from decoder_spec(c)


# --- layers


def _block(c: Config, x: Tensor, w: Weights, strip: Strip) -> Tensor:
    act = ACTIVATIONS[c.act_fn]
    y = act(conv2d(x, w / 0, padding=1, strip=strip))
    y = act(conv2d(y, w / 2, padding=1, strip=strip))
    return F.relu(x + conv2d(y, w / 4, padding=1, strip=strip))


def _layer(c: Config, x: Tensor, w: Weights, layer: Layer, strip: Strip) -> Tensor:
    at = w / layer.at
    match layer.kind:
        case "block":
            return _block(c, x, at / "conv", strip)
        case "down":
            return conv2d(x, at, stride=2, padding=1, strip=strip)
        case "up":
            return conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), at, padding=1, strip=strip)
        case _:
            return conv2d(x, at, padding=1, strip=strip)


def image_latents(c: Config, w: Weights, x_BCHW: Tensor, strip: Strip) -> Tensor:
    """One pass of the encoder: pixels [B, C, H, W] in [-1, 1] -> raw latents [B, Z, H', W'].

    x: an image, or a strip of its rows.
    """
    x = (x_BCHW + 1) / 2  # the network was trained on pixels in [0, 1]
    for layer in encoder_layers(c):
        x = _layer(c, x, w / "encoder", layer, strip)
    return x


def image_pixels(c: Config, w: Weights, z_BZHW: Tensor, strip: Strip) -> Tensor:
    """One pass of the decoder: raw latents [B, Z, H', W'] -> pixels [B, C, H, W], not clipped.

    Latents beyond 3 are softly limited.
    """
    first, *others = decoder_layers(c)
    x = ACTIVATIONS[c.act_fn](_layer(c, torch.tanh(z_BZHW / 3) * 3, w / "decoder", first, strip))
    for layer in others:
        x = _layer(c, x, w / "decoder", layer, strip)
    return x * 2 - 1


# --- what callers use


CODER = Coder[Config](
    framewise(image_latents),
    framewise(image_pixels),
    lambda c, w, z: (z - c.shift_factor) * c.scaling_factor,
    lambda c, w, z: z / c.scaling_factor + c.shift_factor,
)
encode, decode = CODER.encode, CODER.decode

FAMILY = Autoencoder(Config, spec, encode, decode)
