"""LTX-2's latent upsampler: latents of a video to those of one twice as high and wide.

It runs between the two stages of a request, on raw latents. Source: the LTX2LatentUpsamplerModel checkpoints
of LTX-2 (`use_rational_resampler`) and LTX-2.3, which differ in the names of one layer.

Shape letters: B batch, Z latent channels, F latent frames, H height, W width, D width of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tinydiff.keymap import KeyMap, unread
from tinydiff.models.family import Upsampler
from tinydiff.ops.conv import conv2d, per_frame
from tinydiff.ops.norm import group_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows, norm_rows

GROUPS, EPS = 32, 1e-5


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 128
    mid_channels: int = 1024
    num_blocks_per_stage: int = 4
    dims: int = 3
    spatial_upsample: bool = True
    temporal_upsample: bool = False
    rational_spatial_scale: float = 2.0
    use_rational_resampler: bool = True

    def __post_init__(self) -> None:
        fixed = {
            "dims": 3,
            "spatial_upsample": True,
            "temporal_upsample": False,
            "rational_spatial_scale": 2.0,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; the upsampler runs with {value!r} only")
        if self.mid_channels % GROUPS:
            raise ValueError(f"mid_channels is {self.mid_channels}; it must be a multiple of {GROUPS}")

    @property
    def upsampler(self) -> str:
        """Name of the convolution whose channels become pixels."""
        return "upsampler.conv" if self.use_rational_resampler else "upsampler.0"


def _block_rows(name: str, width: int) -> Iterator[Row]:
    for i in (1, 2):
        yield from conv_rows(f"{name}.conv{i}", width, width, (3, 3, 3))
        yield from norm_rows(f"{name}.norm{i}", width, bias=True)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape."""
    width = c.mid_channels
    yield from conv_rows("initial_conv", c.in_channels, width, (3, 3, 3))
    yield from norm_rows("initial_norm", width, bias=True)
    for stack in ("res_blocks", "post_upsample_res_blocks"):
        for i in range(c.num_blocks_per_stage):
            yield from _block_rows(f"{stack}.{i}", width)
    yield from conv_rows(c.upsampler, width, 4 * width, (3, 3))
    yield from conv_rows("final_conv", width, c.in_channels, (3, 3, 3))


def key_map(c: Config) -> KeyMap:
    """The kernel that blurs before a reduction, of which there is none, is unread."""
    return KeyMap(unread("upsampler.blur_down.kernel"))


def _conv(x: Tensor, w: Weights) -> Tensor:
    return F.conv3d(x, w["weight"], w["bias"], padding=1)


def _block(x: Tensor, w: Weights) -> Tensor:
    y = F.silu(group_norm(_conv(x, w / "conv1"), w / "norm1", GROUPS, EPS))
    return F.silu(group_norm(_conv(y, w / "conv2"), w / "norm2", GROUPS, EPS) + x)


def upsample(c: Config, w: Weights, z_BZFHW: Tensor) -> Tensor:
    """Raw latents [B, Z, F, H, W] -> raw latents [B, Z, F, 2H, 2W]."""
    x = F.silu(group_norm(_conv(z_BZFHW, w / "initial_conv"), w / "initial_norm", GROUPS, EPS))
    for i in range(c.num_blocks_per_stage):
        x = _block(x, w / "res_blocks" / i)
    up = w / c.upsampler
    x = per_frame(lambda image: F.pixel_shuffle(conv2d(image, up, padding=1), 2), x)
    for i in range(c.num_blocks_per_stage):
        x = _block(x, w / "post_upsample_res_blocks" / i)
    return _conv(x, w / "final_conv")


FAMILY = Upsampler(Config, spec, key_map)
