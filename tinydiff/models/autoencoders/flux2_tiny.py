"""fal's tiny autoencoder for FLUX.2: one like TAESD inside, and one more halving to stride 16.

Source: the Flux2TinyAutoEncoder class and checkpoint of fal/FLUX.2-Tiny-AutoEncoder. The inner autoencoder
has 32 latent channels at stride 8, the whole 128 at stride 16. Its latents are the denoiser's own: neither
the batch norm's statistics nor the patches of FLUX.2's large autoencoder come in between.

Shape letters: B batch, C channels, F frames (each coded on its own; images have one), H height, W width, Z
latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tinydiff.models.autoencoders import tiny
from tinydiff.models.autoencoders.coder import Coder, framewise
from tinydiff.models.family import Autoencoder
from tinydiff.ops.conv import conv2d
from tinydiff.ops.norm import group_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows, norm_rows, under
from tinydiff.parallel.strips import Strip, halo

GROUPS = 8


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "silu"
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    """Not read by the reference, like the next three."""
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 0.13025
    auto_map: Mapping[str, str] | None = None
    """Where transformers' remote-code loader finds the class; not read."""

    def __post_init__(self) -> None:
        if self.latent_channels % (4 * GROUPS):
            raise ValueError(
                f"latent_channels is {self.latent_channels}; it must divide by {4 * GROUPS}, a quarter of "
                f"it by {GROUPS}"
            )
        _ = self.inner  # raises the errors of the inner Config

    @property
    def inner(self) -> tiny.Config:
        """The autoencoder inside, at half the stride."""
        return tiny.Config(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            latent_channels=self.latent_channels // 4,
            encoder_block_out_channels=self.encoder_block_out_channels,
            decoder_block_out_channels=self.decoder_block_out_channels,
            act_fn=self.act_fn,
            upsampling_scaling_factor=self.upsampling_scaling_factor,
            num_encoder_blocks=self.num_encoder_blocks,
            num_decoder_blocks=self.num_decoder_blocks,
        )

    @property
    def z_dim(self) -> int:
        return self.latent_channels

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels per latent, along height and width."""
        return 2 * self.inner.scale_factor_spatial

    @property
    def scale_factor_temporal(self) -> int:
        return 1


# --- weights


def _residual_rows(name: str, width: int) -> Iterator[Row]:
    yield from conv_rows(f"{name}.0", width, width, (3, 3))
    yield from norm_rows(f"{name}.1", width, bias=True)
    yield from conv_rows(f"{name}.3", width, width, (3, 3))


def encoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the encoder half."""
    yield from under("tiny_vae", tiny.encoder_spec(c.inner))
    yield from conv_rows("extra_encoder", c.inner.latent_channels, c.latent_channels, (4, 4))
    yield from _residual_rows("residual_encoder", c.latent_channels)


def decoder_spec(c: Config) -> Iterator[Row]:
    """Every weight of the decoder half."""
    half = c.inner.latent_channels
    # The weight of a transposed convolution has its input channels first.
    yield Row("extra_decoder.weight", (c.latent_channels, half, 4, 4))
    yield Row("extra_decoder.bias", (half,))
    yield from _residual_rows("residual_decoder", half)
    yield from under("tiny_vae", tiny.decoder_spec(c.inner))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    yield from encoder_spec(c)
    yield from decoder_spec(c)


# --- what callers use


def _residual(x: Tensor, w: Weights, strip: Strip) -> Tensor:
    y = F.silu(group_norm(conv2d(x, w / 0, padding=1, strip=strip), w / 1, GROUPS, 1e-5, strip))
    return x + conv2d(y, w / 3, padding=1, strip=strip)


def _double(z: Tensor, w: Weights, strip: Strip) -> Tensor:
    """A transposed convolution with stride 2.

    Each input row also reaches one output row beyond its own two, so a strip needs its neighbours' rows.
    """
    beyond = 2 if strip.divided else 0  # output rows of a neighbour's input row
    return F.conv_transpose2d(halo(strip, z, 1, 1), w["weight"], w["bias"], stride=2, padding=(1 + beyond, 1))


def _latents(c: Config, w: Weights, x_BCHW: Tensor, strip: Strip) -> Tensor:
    z = tiny.image_latents(c.inner, w / "tiny_vae", x_BCHW, strip)
    z = conv2d(z, w / "extra_encoder", stride=2, padding=1, strip=strip)
    return _residual(z, w / "residual_encoder", strip)


def _pixels(c: Config, w: Weights, z_BZHW: Tensor, strip: Strip) -> Tensor:
    z = _residual(_double(z_BZHW, w / "extra_decoder", strip), w / "residual_decoder", strip)
    return tiny.image_pixels(c.inner, w / "tiny_vae", z, strip)


CODER = Coder[Config](framewise(_latents), framewise(_pixels))
encode, decode = CODER.encode, CODER.decode

FAMILY = Autoencoder(Config, spec, encode, decode)
