"""IFNet, the network of RIFE 4.5 to 4.26, which makes the frame at any time between two frames.

From coarse to fine, each block refines the two optical flows and the mask of the blocks before it. Both
frames are warped by their flows, and the mask blends them. Source: "Real-Time Intermediate Flow Estimation
for Video Frame Interpolation" (arXiv 2011.06294) and the published checkpoints, whose names are kept. Shape
letters: B frame pairs, C channels, E encoded channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.conv import conv2d
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Row, conv_rows

Shapes = Mapping[str, tuple[int, ...]]
KERNEL, DOUBLING = (3, 3), (4, 4)
"""Of a convolution, and of a transposed one that doubles height and width."""
SLOPE = 0.2
"""Of leaky ReLU."""
RESIDUALS = 8
"""Residual convolutions of a block."""
SCALES = {4: (8, 4, 2, 1), 5: (16, 8, 4, 2, 1)}
"""Blocks -> how many times smaller each sees the frames."""
SCALES_LITE = (32, 16, 8, 4, 1)
"""The same for 4.25 lite, whose last block is narrower than half the block before it."""
FRAMES, FLOWS, MASK = 6, 4, 1
"""Channels of two frames, two flows and a mask."""
ENCODERS = {
    2: ("encode.0", "encode.1"),  # 4.7 to 4.9
    4: ("encode.0", "encode.2", "encode.4", "encode.6"),  # 4.10 to 4.12, 4.13 lite
    5: ("encode.cnn0", "encode.cnn1", "encode.cnn2", "encode.cnn3"),
}
"""Form of the encoder -> the names of its layers. The last of them doubles height and width."""
TRAINING = ("block_tea.", "teacher.", "caltime.", "contextnet.", "unet.")
"""Published files also hold networks that only training uses; their names begin with these."""


@dataclass(frozen=True)
class Config:
    """IFNet, sizes as they show in a file."""

    widths: tuple[int, ...]
    """Features of each block, from coarse to fine."""
    outputs: int = 13
    """Channels that a block makes: flows, a mask, and from 6 on more; 13 has features for the next block."""
    encoder: int | None = 5
    """A form of `ENCODERS`; None where the blocks see the frames alone (4.5 and 4.6)."""
    hidden: int = 16
    encoded: int = 4
    """Channels inside the encoder, and of what it makes of a frame."""
    groups: int = 1
    """Groups of the residual convolutions (2 in 4.14 lite)."""

    @property
    def scales(self) -> tuple[int, ...]:
        """How many times smaller each block sees the frames."""
        lite = len(self.widths) == len(SCALES_LITE) and 2 * self.widths[-1] < self.widths[-2]
        return SCALES_LITE if lite else SCALES[len(self.widths)]

    @property
    def carried(self) -> int:
        """Channels of the features that a block passes to the next."""
        return self.outputs - FLOWS - MASK if self.outputs == 13 else 0

    def multiple(self, scale: float) -> int:
        """What height and width must be multiples of. scale: as `between` takes it."""
        return round(4 * self.scales[0] / min(scale, 1.0))


def canonical(name: str) -> str | None:
    """The name of a weight without the prefix of a parallel wrapper; None for those of training alone."""
    name = name.removeprefix("module.")
    return None if name.startswith(TRAINING) else name


def read(shapes: Shapes) -> Config | None:
    """The network with weights of these (canonical) names and shapes; None where it is none of these."""
    widths: list[int] = []
    while len(beta := shapes.get(f"block{len(widths)}.convblock.0.beta", ())) == 4:
        widths.append(beta[1])
    residual = shapes.get("block0.convblock.0.conv.weight", ())
    last = shapes.get("block0.lastconv.0.weight", ())
    if len(widths) not in SCALES or not (len(residual) == len(last) == 4 and residual[1]):
        return None
    forms = (form for form, names in ENCODERS.items() if f"{names[-1]}.weight" in shapes)
    encoder = max(forms, default=None)
    made = Config(tuple(widths), last[1] // 4, encoder, 0, 0, widths[0] // residual[1])
    if encoder is not None:
        end = shapes[f"{ENCODERS[encoder][-1]}.weight"]
        if len(end) != 4:
            return None
        made = Config(made.widths, made.outputs, encoder, end[0], end[1], made.groups)
    return made if {row.name: row.shape for row in spec(made)} == dict(shapes) else None


def too_old(shapes: Shapes) -> bool:
    """Whether the weights are those of RIFE 4.0 to 4.4, other networks that are not run."""
    return "block0.convblock.0.0.weight" in shapes and "block3.lastconv.weight" in shapes


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, in the order in which the network reads them."""
    if c.encoder is not None:
        *names, last = ENCODERS[c.encoder]
        for index, name in enumerate(names):
            yield from conv_rows(name, c.hidden if index else 3, c.hidden, KERNEL)
        yield from _doubling_rows(last, c.hidden, c.encoded)
    for number, width in enumerate(c.widths):
        seen = FRAMES + 1 + 2 * c.encoded
        seen += MASK + FLOWS + c.carried if number else 0
        yield from conv_rows(f"block{number}.conv0.0.0", seen, width // 2, KERNEL)
        yield from conv_rows(f"block{number}.conv0.1.0", width // 2, width, KERNEL)
        for layer in range(RESIDUALS):
            name = f"block{number}.convblock.{layer}"
            yield Row(f"{name}.beta", (1, width, 1, 1))
            yield from conv_rows(f"{name}.conv", width // c.groups, width, KERNEL)
        yield from _doubling_rows(f"block{number}.lastconv.0", width, 4 * c.outputs)


def _doubling_rows(name: str, channels_in: int, channels_out: int) -> Iterator[Row]:
    yield Row(f"{name}.weight", (channels_in, channels_out, *DOUBLING))
    yield Row(f"{name}.bias", (channels_out,))


class Frame(NamedTuple):
    """A frame as the network sees it. Height and width are multiples of what its blocks need."""

    pixels: Tensor
    """[B, 3, H, W] in [0, 1]."""
    encoded: Tensor
    """[B, E, H, W]."""


def prepared(c: Config, w: Weights, x_B3HW: Tensor, scale: float = 1.0) -> Frame:
    """A frame in [0, 1] of any size, with zeros to its right and below it. scale: as `between` takes it."""
    multiple = c.multiple(scale)
    x = F.pad(x_B3HW, (0, -x_B3HW.shape[3] % multiple, 0, -x_B3HW.shape[2] % multiple))
    if c.encoder is None:
        return Frame(x, x[:, :0])
    first, *middle, last = ENCODERS[c.encoder]
    y = conv2d(x, w / first, stride=2, padding=1)
    for name in middle:
        y = conv2d(_leaky(y), w / name, padding=1)
    return Frame(x, _doubled(y if c.encoder == 2 else _leaky(y), w / last))


def between(c: Config, w: Weights, first: Frame, second: Frame, time_B: Tensor, scale: float = 1.0) -> Tensor:
    """The frames [B, 3, H, W] at `time_B` in (0, 1) between pairs of frames, near [0, 1], with their padding.

    scale: of the frames in which flow is looked for, a power of two; below 1 it finds larger motion, above 1
    smaller.
    """
    time = time_B[:, None, None, None].expand(-1, 1, *first.pixels.shape[2:])
    warped = (first, second)
    flow = mask = carried = first.pixels[:, :0]
    for number, fraction in enumerate(c.scales):
        (left, left_encoded), (right, right_encoded) = warped
        seen = torch.cat([left, right, left_encoded, right_encoded, time, mask, carried], 1)
        step, made, carried = _block(c, w / f"block{number}", seen, flow, fraction / scale)
        flow = flow + step if number else step
        mask = mask + made if number and c.encoder is None else made
        warped = _warped(first, flow[:, :2]), _warped(second, flow[:, 2:])
    share = torch.sigmoid(mask)
    return warped[0].pixels * share + warped[1].pixels * (1 - share)


def working_bytes(c: Config, height: int, width: int, scale: float = 1.0, b: int = 4) -> int:
    """About the peak of `between` for a pair of frames, in bytes of b a value: in its last block.

    There are both frames as given and as warped, each with its encoding; the flows, and what the block before
    made; what this block sees, the same once more at the size at which it works, and its first features.
    """
    height, width = (side + -side % c.multiple(scale) for side in (height, width))
    frames, seen = 4 * (3 + c.encoded), FRAMES + 1 + 2 * c.encoded + MASK + c.carried
    inside = (seen + FLOWS + c.widths[-1] // 4) * max(1.0, scale) ** 2
    return round((frames + FLOWS + c.outputs + seen + inside) * height * width * b)


def _block(
    c: Config, w: Weights, x_BCHW: Tensor, flow: Tensor, fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(what is added to `flow`, mask, features for the next block).

    flow: [B, 4, H, W]; [B, 0, H, W] for the first block. fraction: the frames are seen as many times smaller.
    """
    x = _resized(torch.cat([x_BCHW, flow / fraction], 1), 1 / fraction)
    for layer in range(2):
        x = _leaky(conv2d(x, w / "conv0" / layer / 0, stride=2, padding=1))
    for layer in range(RESIDUALS):
        x = _residual(w / "convblock" / layer, x, c.groups)
    made = _resized(F.pixel_shuffle(_doubled(x, w / "lastconv" / 0), 2), fraction)
    mask, carried = made[:, FLOWS : FLOWS + MASK], made[:, FLOWS + MASK : FLOWS + MASK + c.carried]
    return made[:, :FLOWS] * fraction, mask, carried


def _residual(w: Weights, x: Tensor, groups: int) -> Tensor:
    conv = w / "conv"
    y = F.conv2d(x, conv["weight"], conv["bias"], padding=1, groups=groups)
    return _leaky(y * w["beta"] + x)


def _warped(frame: Frame, flow_B2HW: Tensor) -> Frame:
    encoded = _warp(frame.encoded, flow_B2HW) if frame.encoded.shape[1] else frame.encoded
    return Frame(_warp(frame.pixels, flow_B2HW), encoded)


def _warp(x_BCHW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """Each pixel from where the flow points; beyond the border it is the nearest pixel of the border."""
    height, width = x_BCHW.shape[2:]
    x = _line(width, x_BCHW) + flow_B2HW[:, 0] * (2 / (width - 1))
    y = _line(height, x_BCHW)[:, None] + flow_B2HW[:, 1] * (2 / (height - 1))
    return F.grid_sample(x_BCHW, torch.stack([x, y], -1), "bilinear", "border", align_corners=True)


def _line(size: int, like: Tensor) -> Tensor:
    """Coordinates of the pixels' centers, the first at -1 and the last at 1."""
    return torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)


def _resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear") if factor != 1 else x


def _doubled(x: Tensor, w: Weights) -> Tensor:
    return F.conv_transpose2d(x, w["weight"], w["bias"], stride=2, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)
