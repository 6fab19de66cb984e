"""LTX-2's autoencoder of sound: log-mel spectrograms to latents, 4x fewer windows and 4x fewer mel bins.

Source: arXiv 2601.03233 and the AutoencoderKLLTX2Audio checkpoints. Every convolution looks back along time
and to both sides along mel bins. Latents are normalised as tokens of (channels x bins) values, by means and
deviations that are weights.

Shape letters: B batch, C channels, T windows of the spectrogram, M mel bins, A latent windows, Z latent
channels, P values of a token (Z times latent bins).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.models.family import Autoencoder
from tinydiff.ops.norm import compute_dtype
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import SINGLE, Plan, Row, conv_rows, under


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    base_channels: int = 128
    output_channels: int = 2
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] | None = None
    in_channels: int = 2
    resolution: int = 256
    """Not read: it says where `attn_resolutions` would put attention."""
    latent_channels: int = 8
    norm_type: str = "pixel"
    causality_axis: str = "height"
    dropout: float = 0.0
    mid_block_add_attention: bool = False
    sample_rate: int = 16000
    mel_hop_length: int = 160
    is_causal: bool = True
    mel_bins: int = 64
    double_z: bool = True

    def __post_init__(self) -> None:
        fixed = {
            "attn_resolutions": None,
            "norm_type": "pixel",
            "causality_axis": "height",
            "mid_block_add_attention": False,
            "is_causal": True,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; LTX-2 and LTX-2.3 have {value!r}")
        if self.values != self.base_channels:
            raise ValueError(
                f"base_channels is {self.base_channels}; the statistics of latents need {self.values}, "
                "latent_channels times latent bins"
            )

    @property
    def scale_factor(self) -> int:
        """Windows of the spectrogram per latent, and mel bins per latent bin."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_bins(self) -> int:
        return self.mel_bins // self.scale_factor

    @property
    def values(self) -> int:
        """Values of a token."""
        return self.latent_channels * self.latent_bins

    @property
    def latents_per_second(self) -> float:
        return self.sample_rate / self.mel_hop_length / self.scale_factor

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_channels * factor for factor in self.ch_mult)


# --- weights


def _conv_rows(name: str, inner: int, outer: int, side: int = 3) -> Iterator[Row]:
    yield from conv_rows(f"{name}.conv", inner, outer, (side, side))


def _block_rows(name: str, inner: int, outer: int) -> Iterator[Row]:
    yield from _conv_rows(f"{name}.conv1", inner, outer)
    yield from _conv_rows(f"{name}.conv2", outer, outer)
    if inner != outer:
        yield from _conv_rows(f"{name}.nin_shortcut", inner, outer, 1)


def _middle_rows(width: int) -> Iterator[Row]:
    for i in (1, 2):
        yield from _block_rows(f"mid.block_{i}", width, width)


def _level_rows(c: Config, way: str, blocks: int, order: list[int]) -> Iterator[Row]:
    inner = c.widths[order[0]]
    for level in order:
        for j in range(blocks):
            yield from _block_rows(f"{way}.{level}.block.{j}", inner, c.widths[level])
            inner = c.widths[level]
        if level != order[-1]:
            name = f"{way}.{level}.{way}sample"
            yield from _conv_rows(f"{name}.conv" if way == "up" else name, inner, inner)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    levels, last = list(range(len(c.widths))), c.widths[-1]
    moments = c.latent_channels * (2 if c.double_z else 1)
    yield Row("latents_mean", (c.base_channels,))
    yield Row("latents_std", (c.base_channels,))
    yield from under(
        "encoder",
        _conv_rows("conv_in", c.in_channels, c.widths[0]),
        _level_rows(c, "down", c.num_res_blocks, levels),
        _middle_rows(last),
        _conv_rows("conv_out", last, moments),
    )
    yield from under(
        "decoder",
        _conv_rows("conv_in", c.latent_channels, last),
        _middle_rows(last),
        _level_rows(c, "up", c.num_res_blocks + 1, levels[::-1]),
        _conv_rows("conv_out", c.widths[0], c.output_channels),
    )


# --- layers


def _conv(x_BCTM: Tensor, w: Weights) -> Tensor:
    """A convolution that keeps the size and sees no later window."""
    reach = w["conv.weight"].shape[2] - 1
    return F.conv2d(F.pad(x_BCTM, (reach // 2, reach // 2, reach, 0)), w["conv.weight"], w["conv.bias"])


def _active(x: Tensor) -> Tensor:
    """RMS norm over channels, then SiLU."""
    mean = x.to(compute_dtype(x)).square().mean(1, keepdim=True)
    return F.silu((x * (mean + 1e-6).rsqrt()).to(x.dtype))


def _block(x: Tensor, w: Weights) -> Tensor:
    y = _conv(_active(_conv(_active(x), w / "conv1")), w / "conv2")
    return (_conv(x, w / "nin_shortcut") if "nin_shortcut.conv.weight" in w else x) + y


def _middle(x: Tensor, w: Weights) -> Tensor:
    return _block(_block(x, w / "mid" / "block_1"), w / "mid" / "block_2")


def _mean(c: Config, w: Weights, x: Tensor) -> Tensor:
    x = _conv(x, w / "conv_in")
    for level in range(len(c.widths)):
        at = w / "down" / level
        for j in range(c.num_res_blocks):
            x = _block(x, at / "block" / j)
        if level < len(c.widths) - 1:
            down = at / "downsample"
            x = F.conv2d(F.pad(x, (0, 1, 2, 0)), down["conv.weight"], down["conv.bias"], stride=2)
    return _conv(_active(_middle(x, w)), w / "conv_out")[:, : c.latent_channels]


def _spectrogram(c: Config, w: Weights, z: Tensor) -> Tensor:
    x = _middle(_conv(z, w / "conv_in"), w)
    for level in reversed(range(len(c.widths))):
        at = w / "up" / level
        for j in range(c.num_res_blocks + 1):
            x = _block(x, at / "block" / j)
        if level:
            x = _conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), at / "upsample" / "conv")[:, :, 1:]
    return _conv(_active(x), w / "conv_out")


# --- what callers use


def pack(z_BZAM: Tensor) -> Tensor:
    """Latents [B, Z, A, bins] -> tokens [B, A, P]."""
    return rearrange(z_BZAM, "b z a m -> b a (z m)")


def unpack(c: Config, tokens_BAP: Tensor) -> Tensor:
    """Tokens [B, A, P] -> latents [B, Z, A, bins]."""
    return rearrange(tokens_BAP, "b a (z m) -> b z a m", z=c.latent_channels)


def encode(
    c: Config,
    w: Weights,
    x_BCTM: Tensor,
    chunk: int | None = None,
    tile: int | None = None,
    plan: Plan = SINGLE,
) -> Tensor:
    """A log-mel spectrogram [B, C, T, M] -> normalised latents [B, Z, A, bins], the mean.

    chunk and tile have no effect, and every rank of a plan codes all of it: sound is small.
    """
    mean, std = (w[name].to(x_BCTM) for name in ("latents_mean", "latents_std"))
    return unpack(c, (pack(_mean(c, w / "encoder", x_BCTM)) - mean) / std)


def decode(
    c: Config,
    w: Weights,
    z_BZAM: Tensor,
    chunk: int | None = None,
    tile: int | None = None,
    plan: Plan = SINGLE,
) -> Tensor:
    """Normalised latents [B, Z, A, bins] -> log-mel spectrogram [B, C, 4A - 3, M]. Options as in `encode`."""
    mean, std = (w[name].to(z_BZAM) for name in ("latents_mean", "latents_std"))
    return _spectrogram(c, w / "decoder", unpack(c, pack(z_BZAM) * std + mean))


FAMILY = Autoencoder(Config, spec, encode, decode)
