"""Adding frames between the decoded ones with RIFE.

Two frames are in memory at a time, so memory does not grow with the length of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.io import archive
from tinydiff.models import interpolators
from tinydiff.models.interpolators import Frame
from tinydiff.ops.host import of_array
from tinydiff.ops.weights import Weights
from tinydiff.records import Interpolation, UserError
from tinydiff.runtime import network_file

FIELD = "frame_interpolation_model_path"
HUB_ID = "elfgum/RIFE-4.22.lite"
"""The published weights that SGLang Diffusion takes by default."""
FILE = "flownet.pkl"
"""The name of the file in every release of RIFE."""
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
SCENE_THRESHOLD = 0.15
SMALL = 32
"""Side in pixels of the frames whose difference tells where a scene ends."""


@dataclass(frozen=True)
class Interpolator:
    """A network in memory.

    prepare: a frame [1, 3, H, W] in [0, 1] -> as the network sees it. between: that of two frames and a time
    [1] -> the frame then, with its padding.
    """

    config: interpolators.Config
    device: torch.device
    prepare: Callable[[Tensor], tuple[Tensor, Tensor]]
    between: Callable[[Frame, Frame, Tensor], Tensor]


class _Prepared(NamedTuple):
    """A decoded frame. small: [1, 3, SMALL, SMALL]."""

    pixels: numpy.ndarray
    seen: Frame
    small: Tensor


@lru_cache(maxsize=16)
def locate(path: str | None) -> Path:
    """The file that `frame_interpolation_model_path` names; the published one of the hub for None."""
    example = f"{HUB_ID}:{FILE}"
    if path is not None:
        return network_file.located(path, FIELD, example, FILE)
    try:
        return network_file.located(example, FIELD, example)
    except UserError as error:
        why = str(error).removeprefix(f"{FIELD}: ")
        raise UserError(
            FIELD,
            f"{FIELD}: name a model file of RIFE 4.5 to 4.26, such as the {FILE} to which "
            f"github.com/hzwer/Practical-RIFE links, because the default {HUB_ID} is not here ({why})",
        ) from None


@lru_cache(maxsize=16)
def read(path: Path) -> interpolators.Config:
    """The network that a file holds, from its header. Raises UserError for a file of another network."""
    return _config(path, archive.shapes_of(network_file.opened(path, FIELD)))


def _config(path: Path, shapes: dict[str, tuple[int, ...]]) -> interpolators.Config:
    canonical_shapes = {
        name: shape for each, shape in shapes.items() if (name := interpolators.canonical(each))
    }
    config = interpolators.read(canonical_shapes)
    if config is None:
        reason = f"its weights begin with {', '.join(list(shapes)[:3])}"
        if interpolators.too_old(canonical_shapes):
            reason = "it is one of RIFE 4.0 to 4.4, whose networks are others"
        raise UserError(FIELD, f"{FIELD}: {str(path)!r} holds no IFNet of RIFE 4.5 to 4.26; {reason}")
    return config


@lru_cache(maxsize=4)
def load(path: Path, device: torch.device, scale: float, compiled: bool) -> Interpolator:
    """The network in memory, float32. The last four stay loaded."""
    config, file = read(path), network_file.opened(path, FIELD)
    names = {name: each for each in file.keys() if (name := interpolators.canonical(each))}  # noqa: SIM118
    tensors = {name: file.get_tensor(each).float().to(device) for name, each in names.items()}

    def prepare(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        pixels, encoded = interpolators.prepared(config, Weights(weights), x, scale)
        return pixels, encoded

    def between(
        weights: dict[str, Tensor], first: Tensor, first_encoded: Tensor, second: Tensor,
        second_encoded: Tensor, time: Tensor,
    ) -> Tensor:  # fmt: skip
        frames = Frame(first, first_encoded), Frame(second, second_encoded)
        return interpolators.between(config, Weights(weights), *frames, time, scale)

    if compiled:
        from tinydiff.sampling.compile import per_size

        between = per_size(between)
    return Interpolator(
        config, device, lambda x: prepare(tensors, x), lambda a, b, time: between(tensors, *a, *b, time)
    )


def needs(asked: Interpolation, height: int, width: int) -> tuple[int, int]:
    """(bytes of the weights, bytes of making a frame beside them)."""
    config = read(asked.model)
    weights = 4 * sum(row.numel for row in interpolators.spec(config))
    return weights, interpolators.working_bytes(config, height, width, asked.scale)


def interpolated(
    net: Interpolator, frames: Iterable[numpy.ndarray], asked: Interpolation
) -> Iterator[numpy.ndarray]:
    """Frames uint8 [H, W, 3] -> each of them, and after it those up to the next: `asked.factor` for each.

    The last one is repeated, so that the duration is that of the given frames. Where a scene ends the earlier
    frame is repeated too.
    """
    before: _Prepared | None = None
    for pixels in frames:
        prepared = _prepared(net, pixels)
        if before is not None:
            yield from _filled(net, before, prepared, asked)
        yield pixels
        before = prepared
    if before is not None:
        yield from [before.pixels] * (asked.factor - 1)


@torch.no_grad()
def _prepared(net: Interpolator, pixels: numpy.ndarray) -> _Prepared:
    x = of_array(pixels.copy()).to(net.device).permute(2, 0, 1)[None].float() / 255
    return _Prepared(pixels, Frame(*net.prepare(x)), F.adaptive_avg_pool2d(x, SMALL))


def _filled(
    net: Interpolator, first: _Prepared, second: _Prepared, asked: Interpolation
) -> Iterator[numpy.ndarray]:
    """The frames between two."""
    if (first.small - second.small).abs().mean().item() > asked.scene_threshold:
        yield from [first.pixels] * (asked.factor - 1)
        return
    height, width = first.pixels.shape[:2]
    for step in range(1, asked.factor):
        time = torch.tensor([step / asked.factor], device=net.device)
        with torch.no_grad():
            between = net.between(first.seen, second.seen, time)[0, :, :height, :width]
            levels = (between * 255).round().clamp(0, 255).to(torch.uint8)
        yield levels.permute(1, 2, 0).cpu().numpy()
