"""The networks of Real-ESRGAN, which enlarge an image: RRDBNet and SRVGGNetCompact.

Source: "ESRGAN" (arXiv 1809.00219), "Real-ESRGAN" (arXiv 2107.10833) and the published checkpoints, whose
names are kept. Shape letters: B images, H height, W width, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.conv import conv2d
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows

Shapes = Mapping[str, tuple[int, ...]]
KERNEL = (3, 3)
SLOPE = 0.2
"""Of leaky ReLU in RRDBNet."""
RESIDUAL = 0.2
"""Factor of what a dense block and a block of three add."""


@dataclass(frozen=True)
class Dense:
    """RRDBNet, sizes as they show in a file: it enlarges four times an image of `1 / fold` the size."""

    features: int = 64
    growth: int = 32
    blocks: int = 23
    fold: int = 1
    """Pixels along height and width that are folded into channels first: 1, 2 or 4."""

    @property
    def scale(self) -> int:
        """Pixels of the output per pixel of the input, along height and width."""
        return 4 // self.fold

    @property
    def reach(self) -> int:
        """Input pixels in each direction on which a pixel of the output depends."""
        return self.fold * (15 * self.blocks + 4)


@dataclass(frozen=True)
class Compact:
    """SRVGGNetCompact, sizes as they show in a file. layers: convolutions between the first and the last."""

    features: int = 64
    layers: int = 16
    scale: int = 4

    @property
    def fold(self) -> int:
        """The input may have any size."""
        return 1

    @property
    def reach(self) -> int:
        """Input pixels in each direction on which a pixel of the output depends."""
        return self.layers + 2


Config = Dense | Compact


def read(shapes: Shapes) -> Config | None:
    """The network with weights of these names and shapes; None where it is neither."""
    if (first := shapes.get("conv_first.weight", ())) and len(first) == 4:
        blocks = 1 + max((int(name.split(".")[1]) for name in shapes if _numbered(name)), default=-1)
        growth = shapes.get("body.0.rdb1.conv1.weight", (0,))[0]
        fold = isqrt(first[1] // 3)
        made = Dense(first[0], growth, blocks, fold) if fold in (1, 2, 4) and growth else None
    elif len(first := shapes.get("body.0.weight", ())) == 4:
        last = max(int(name.split(".")[1]) for name in shapes if _numbered(name))
        scale = isqrt(shapes.get(f"body.{last}.weight", (0,))[0] // 3)
        made = Compact(first[0], last // 2 - 1, scale) if scale else None
    else:
        return None
    fits = made is not None and {row.name: row.shape for row in spec(made)} == dict(shapes)
    return made if fits else None


def _numbered(name: str) -> bool:
    words = name.split(".")
    return len(words) > 2 and words[0] == "body" and words[1].isdigit() and len(words[1]) < 4


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, in the order in which the network reads them."""
    return _dense_spec(c) if isinstance(c, Dense) else _compact_spec(c)


def enlarge(c: Config, w: Weights, x_B3HW: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] -> [B, 3, H * scale, W * scale], near [0, 1].

    Any height and width: they are padded to a multiple of `fold` by repeating the last pixels.
    """
    height, width = x_B3HW.shape[-2:]
    padded = F.pad(x_B3HW, (0, -width % c.fold, 0, -height % c.fold), mode="replicate")
    y = _dense(c, w, padded) if isinstance(c, Dense) else _compact(c, w, padded)
    return y[..., : height * c.scale, : width * c.scale]


def working_bytes(c: Config, height: int, width: int, b: int = 4) -> int:
    """About the peak of `enlarge` for an image, in bytes of b a value.

    RRDBNet holds three tensors of its features and a result, all at the size of the result. SRVGGNetCompact
    holds two tensors of its features at the size of the input, in the end four of the result.
    """
    result = 3 * c.scale**2
    large, small = 3 * c.features * c.scale**2 + result, max(2 * c.features, 4 * result)
    most = large if isinstance(c, Dense) else small
    return (most + 3) * height * width * b


# --- RRDBNet


def _dense_spec(c: Dense) -> Iterator[Row]:
    width, grown = c.features, c.growth
    yield from conv_rows("conv_first", 3 * c.fold**2, width, KERNEL)
    for block in range(c.blocks):
        for part in range(1, 4):
            for layer in range(1, 6):
                out = width if layer == 5 else grown
                name = f"body.{block}.rdb{part}.conv{layer}"
                yield from conv_rows(name, width + (layer - 1) * grown, out, KERNEL)
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        yield from conv_rows(name, width, width, KERNEL)
    yield from conv_rows("conv_last", width, 3, KERNEL)


def _dense(c: Dense, w: Weights, x: Tensor) -> Tensor:
    first = conv2d(F.pixel_unshuffle(x, c.fold), w / "conv_first", padding=1)
    y = first
    for block in range(c.blocks):
        z = y
        for part in range(1, 4):
            z = _dense_block(w / "body" / block / f"rdb{part}", z)
        y = y + RESIDUAL * z
    y = first + conv2d(y, w / "conv_body", padding=1)
    for name in ("conv_up1", "conv_up2"):
        y = _leaky(conv2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), w / name, padding=1))
    return conv2d(_leaky(conv2d(y, w / "conv_hr", padding=1)), w / "conv_last", padding=1)


def _dense_block(w: Weights, x_BDHW: Tensor) -> Tensor:
    """Each convolution sees the input and what all before it made."""
    seen = x_BDHW
    for layer in range(1, 5):
        seen = torch.cat([seen, _leaky(conv2d(seen, w / f"conv{layer}", padding=1))], 1)
    return x_BDHW + RESIDUAL * conv2d(seen, w / "conv5", padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


# --- SRVGGNetCompact


def _compact_spec(c: Compact) -> Iterator[Row]:
    for layer in range(c.layers + 1):
        yield from conv_rows(f"body.{2 * layer}", c.features if layer else 3, c.features, KERNEL)
        yield Row(f"body.{2 * layer + 1}.weight", (c.features,))
    yield from conv_rows(f"body.{2 * c.layers + 2}", c.features, 3 * c.scale**2, KERNEL)


def _compact(c: Compact, w: Weights, x: Tensor) -> Tensor:
    y = x
    for layer in range(c.layers + 1):
        y = conv2d(y, w / "body" / (2 * layer), padding=1)
        y = F.prelu(y, (w / "body" / (2 * layer + 1))["weight"])
    y = conv2d(y, w / "body" / (2 * c.layers + 2), padding=1)
    return F.pixel_shuffle(y, c.scale) + F.interpolate(x, scale_factor=float(c.scale), mode="nearest")
