"""Quantised weights of safetensors files, decoded to float32 as they are read.

What stands beside a weight tells its format: scales, a marker, a table. `decoded` gives the file with whole
weights in place of both, so that whoever reads it need not know. A key beside a weight that no format
explains is an error, since a cast without it would be another weight.

| beside `X.weight` | format |
|---|---|
| nothing | float8, as it is |
| `X.scale_weight`, `X.weight_scale` | float8 or int8 with one scale, one a row, or one a block of a row |
| `X.comfy_quant`, or `_quantization_metadata` in the header | ComfyUI's formats, each layer its own |
| `X.weight_scale`, `X.weight_scale_2` or `X.weight_global_scale` | NVFP4 |
| `X.weight.absmax`, `X.weight.quant_map`, ... | bitsandbytes NF4 and FP4 |
| `X.SCB` | bitsandbytes int8 |

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.io.floats import EIGHT_BITS, FLOATS
from tinydiff.io.kept import Kept, Rows
from tinydiff.ops import packed
from tinydiff.parallel.plan import PACKED

Archive = Any
"""What `safe_open` gives."""
Shape = tuple[int, ...]
Decode = Callable[[Archive, int, int], Tensor]

FLOAT8 = ("F8_E4M3", "F8_E5M2")
BESIDE = re.compile(
    r"^(?P<of>(?:.*\.)?)(?P<what>scale_weight|scale_input|comfy_quant|input_scale|weight_scale|weight_scale_2"
    r"|weight_global_scale|input_global_scale|input_absmax|pre_quant_scale|SCB|weight_format"
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4)))$"
)
"""A key that stands beside a weight: the layer's name with its dot, and what it is."""
UNUSED = ("scale_input", "input_scale", "input_global_scale", "input_absmax", "weight_format")
"""Beside a weight, about the layer's input or the kernel, which a weight in float32 does not need."""
MARKS = ("scaled_fp8",)
"""Keys that say something of the whole file."""
FUSED = ("img_attn.qkv", "txt_attn.qkv", "linear1")
"""Layers of Black Forest Labs' own layout, whose NVFP4 files are as ComfyUI's, without a marker."""


class Recipe(NamedTuple):
    """A weight whole: its shape, and what gives its rows [low, high) as float32.

    scales: where a value is its code times a scale, what gives those of the rows [low, high). groups: how
    many a row has. stored: the packed type that the weight stays in. blocks: what gives its rows.
    """

    shape: Shape
    decode: Decode
    scales: Decode | None = None
    groups: int = 1
    stored: str | None = None
    blocks: Decode | None = None


@dataclass(frozen=True)
class TensorReader:
    """A decoded tensor, read in pieces, as `safe_open` gives one."""

    archive: Archive
    recipe: Recipe

    def get_shape(self) -> list[int]:
        return list(self.recipe.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        first, *others = box
        low, high, _ = first.indices(self.recipe.shape[0])
        return self.recipe.decode(self.archive, low, high)[(slice(None), *others)]


@dataclass(frozen=True)
class Decoded:
    """A file with whole weights in place of quantised ones."""

    archive: Archive
    recipes: Mapping[str, Recipe]
    plain: tuple[str, ...]
    """Keys of the tensors that are whole in the file."""

    def keys(self) -> list[str]:
        return [*self.plain, *self.recipes]

    def get_slice(self, key: str) -> Any:
        recipe = self.recipes.get(key)
        return self.archive.get_slice(key) if recipe is None else TensorReader(self.archive, recipe)

    def get_tensor(self, key: str) -> Tensor:
        recipe = self.recipes.get(key)
        return (
            self.archive.get_tensor(key)
            if recipe is None
            else recipe.decode(self.archive, 0, recipe.shape[0])
        )

    def kept(self, key: str) -> Kept | None:
        """A matrix as it is in the file; None where it is neither codes and scales nor blocks."""
        recipe = self.recipes.get(key)
        if recipe is None or len(recipe.shape) != 2:
            return None
        scales = recipe.scales and partial(recipe.scales, self.archive)
        if recipe.stored is not None and (blocks := recipe.blocks) is not None:
            rows = Rows(lambda rows: blocks(self.archive, rows.start, rows.stop))
            return Kept(recipe.stored, rows, recipe.groups, scales)
        if scales is None:
            return None
        codes = self.archive.get_slice(key)
        stored = str(EIGHT_BITS[codes.get_dtype()]).removeprefix("torch.")
        return Kept(stored, codes, recipe.groups, scales)

    def metadata(self) -> dict[str, str]:
        return self.archive.metadata() or {}


def decoded(file: Path, archive: Archive) -> Archive:
    """The archive itself where nothing in it is quantised, else with whole weights.

    Raises ValueError, a clause about the file.
    """
    at = file.stat()
    found = _recipes(file, at.st_size, at.st_mtime_ns)
    return archive if found is None else Decoded(archive, *found)


@lru_cache(maxsize=64)
def _recipes(file: Path, size: int, changed: int) -> tuple[dict[str, Recipe], tuple[str, ...]] | None:
    """(weight -> how it is decoded, the other keys) of a file; None where nothing is quantised."""
    from safetensors import safe_open

    archive: Archive = safe_open(file, framework="pt")
    keys = list(archive.keys())
    types = {key: str(archive.get_slice(key).get_dtype()) for key in keys}
    beside = _beside(keys)
    formats = _formats(archive, beside)
    if not beside and not {"F8_E4M3", "F8_E5M2"} & set(types.values()):
        return None
    hidden = {name for own in beside.values() for name in own.values()}
    weights = [key for key in keys if key not in hidden and key.rpartition(".")[2] not in MARKS]
    recipes: dict[str, Recipe] = {}
    for key in weights:
        layer = key.removesuffix("weight")
        own = beside.get(layer, {}) if key.endswith("weight") else {}
        if own or types[key] in FLOAT8:
            recipe = _recipe(archive, key, types[key], own, formats.get(layer))
            if recipe is not None:
                recipes[key] = recipe
    return recipes, tuple(key for key in weights if key not in recipes)


def _beside(keys: list[str]) -> dict[str, dict[str, str]]:
    """Layer, with its dot -> {what stands beside its weight: the key}."""
    beside: dict[str, dict[str, str]] = {}
    weights = set(keys)
    for key in keys:
        found = BESIDE.match(key)
        if found is not None and f"{found['of']}weight" in weights:
            beside.setdefault(found["of"], {})[found["what"]] = key
    return beside


def _formats(archive: Archive, beside: Mapping[str, Mapping[str, str]]) -> dict[str, Entries]:
    """Layer, with its dot -> what ComfyUI's marker says of it."""
    formats: dict[str, Entries] = {}
    layers = json.loads((archive.metadata() or {}).get("_quantization_metadata", "{}")).get("layers", {})
    for layer in beside:
        names = (layer[:-1], re.sub(r"^(?:model\.)?diffusion_model\.", "", layer[:-1]))
        said = next((layers[name] for name in names if name in layers), None)
        if (key := beside[layer].get("comfy_quant")) is not None:
            said = json.loads(bytes(archive.get_tensor(key).view(torch.uint8).tolist()))
        if said is not None:
            formats[layer] = {"format": said} if isinstance(said, str) else said
    return formats


def _recipe(
    archive: Archive, key: str, dtype: str, own: Mapping[str, str], said: Entries | None
) -> Recipe | None:
    """How a weight is decoded; None for a plain one with nothing but what is about its input.

    Raises ValueError for an unknown format.
    """
    shape = tuple(archive.get_slice(key).get_shape())
    named = str(said["format"]) if said else None
    needed = set(own) - set(UNUSED) - {"comfy_quant"}
    scale = own.get("scale_weight") or own.get("weight_scale")
    if "weight.absmax" in own:
        return _bitsandbytes(archive, key, own)
    if dtype == "I8" and needed == {"SCB"}:
        if "weight_format" in own and archive.get_tensor(own["weight_format"]).any():
            raise ValueError(f"is quantised by bitsandbytes, and {key!r} is tiled for a GPU (weight_format)")
        return Recipe(shape, lambda a, low, high: _by_largest(a, key, own["SCB"], low, high))
    if named == "mxfp8" and scale is not None:
        return Recipe(shape, lambda a, low, high: _mxfp8(a, key, scale, low, high))
    if dtype == "U8" and scale is not None and needed & {"weight_scale_2", "weight_global_scale"}:
        comfy = named is not None or any(f".{part}." in f".{key}" for part in FUSED)
        return _nvfp4(key, shape, own, comfy)
    known = named in (None, "float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
    if dtype in EIGHT_BITS and scale is not None and known and needed <= {"scale_weight", "weight_scale"}:
        width = int(said.get("convrot_groupsize", 256)) if said and said.get("convrot") else 0
        decode: Decode = lambda a, low, high: _scaled(a, key, scale, low, high, width)  # noqa: E731
        if width or (groups := _groups(archive.get_slice(scale).get_shape(), shape)) is None:
            return Recipe(shape, decode)
        return Recipe(shape, decode, lambda a, low, high: _scales(a, scale, low, high), groups)
    if dtype in FLOAT8 and not needed and named is None:
        ones: Decode = lambda a, low, high: torch.ones(high - low, 1)  # noqa: E731
        return Recipe(shape, lambda a, low, high: _rows(a, key, low, high), ones)
    if dtype in FLOATS and not needed:
        return None
    what = named or ", ".join(sorted(needed)) or dtype
    raise ValueError(f"is quantised in a way that is not known: {key!r} is {dtype} with {what}")


def _rows(archive: Archive, key: str, low: int, high: int) -> Tensor:
    """Rows of a stored tensor as float32."""
    if not archive.get_slice(key).get_shape():
        return archive.get_tensor(key).float()
    return archive.get_slice(key)[low:high].float()


def _scaled(archive: Archive, key: str, scale_key: str, low: int, high: int, rotated: int) -> Tensor:
    """8-bit rows times their scale: one, one a row, or one a block of a row.

    rotated: the columns of a group that a Hadamard matrix was applied to; 0 for none.
    """
    codes, scale = _rows(archive, key, low, high), archive.get_tensor(scale_key).float()
    if scale.numel() == 1:
        y = codes * scale.reshape(())
    else:
        scale = scale[low:high].reshape(len(codes), -1, 1)
        y = (codes.reshape(len(codes), scale.shape[1], -1) * scale).view_as(codes)
    return _unrotated(y, rotated) if rotated else y


def _groups(scale: Sequence[int], shape: Shape) -> int | None:
    """How many scales a row of this weight has; None where they are not rows of scales."""
    count = math.prod(scale)
    if count == 1:
        return 1
    return count // shape[0] if scale[0] == shape[0] else None


def _scales(archive: Archive, key: str, low: int, high: int) -> Tensor:
    """The scales of rows as float32 [N, G]."""
    scale = archive.get_tensor(key).float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).repeat(high - low, 1)
    return scale[low:high].reshape(high - low, -1)


def _by_largest(archive: Archive, key: str, largest_key: str, low: int, high: int) -> Tensor:
    """int8 rows whose largest absolute value is 127."""
    return _rows(archive, key, low, high) * _rows(archive, largest_key, low, high)[:, None] / 127


def _unrotated(rows: Tensor, width: int) -> Tensor:
    """Rows times the regular Hadamard matrix, which is its own inverse, in groups of `width` columns.

    A power of 4.
    """
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.kron(matrix, four)
    if len(matrix) != width:
        raise ValueError(f"is rotated in groups of {width} columns, which is no power of 4")
    return (rows.reshape(len(rows), -1, width) @ (matrix / width**0.5)).view_as(rows)


def _tiled(scale: Tensor, low: int, high: int, columns: int) -> Tensor:
    """Rows of scales [rows, columns] that stand in tiles of 128 x 4, as cuBLAS wants them."""
    wide = -(-columns // 4)
    row, column = torch.arange(low, high)[:, None], torch.arange(columns)[None]
    at = (row // 128 * wide + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return scale.flatten()[at]


def _mxfp8(archive: Archive, key: str, scale_key: str, low: int, high: int) -> Tensor:
    codes = _rows(archive, key, low, high)
    power = _tiled(archive.get_tensor(scale_key).view(torch.uint8), low, high, codes.shape[1] // 32)
    scale = torch.ldexp(torch.ones(power.shape), power.int() - 127)
    return (codes.view(len(codes), -1, 32) * scale[..., None]).view_as(codes)


def _nvfp4(key: str, shape: Shape, own: Mapping[str, str], comfy: bool) -> Recipe:
    """Three layouts of the same values.

    ComfyUI's has the even column in the high half of a byte and scales in tiles; LightX2V's has the scales in
    tiles, and a second scale that divides; ModelOpt's has neither.
    """
    columns, inverse = 2 * shape[1], "weight_global_scale" in own
    tiled, high_first = comfy or inverse, comfy and not inverse

    def blocks(archive: Archive, low: int, high: int) -> Tensor:
        codes = archive.get_slice(key)[low:high].view(torch.uint8)
        codes = codes >> 4 | codes << 4 if high_first else codes
        scale = archive.get_tensor(own["weight_scale"]).view(torch.uint8)
        scale = _tiled(scale, low, high, columns // 16) if tiled else scale[low:high]
        return torch.cat([scale[..., None], codes.view(len(codes), -1, 8)], 2).flatten(1)

    def second(archive: Archive, low: int, high: int) -> Tensor:
        scale = archive.get_tensor(own.get("weight_global_scale") or own["weight_scale_2"]).float()
        return (1 / scale if inverse else scale).reshape(1, 1).repeat(high - low, 1)

    def decode(archive: Archive, low: int, high: int) -> Tensor:
        y = packed.decode("NVFP4", blocks(archive, low, high), second(archive, low, high))
        if "pre_quant_scale" in own:  # multiplies the layer's input
            y = y * archive.get_tensor(own["pre_quant_scale"]).float()
        return y

    whole = Recipe((shape[0], columns), decode)
    if "pre_quant_scale" in own or columns % 16:
        return whole
    return whole._replace(scales=second, stored="NVFP4", blocks=blocks)


def _bitsandbytes(archive: Archive, key: str, own: Mapping[str, str]) -> Recipe:
    """Codes of 4 bits, the first in the high half of a byte, in blocks that cross rows; the largest absolute
    values of blocks may be quantised themselves.
    """
    state_key = next((each for what, each in own.items() if "quant_state" in what), None)
    if state_key is None:
        raise ValueError(f"is quantised by bitsandbytes, and {key!r} has no quant_state")
    state = json.loads(bytes(archive.get_tensor(state_key).tolist()))
    shape, size = tuple(state["shape"]), int(state["blocksize"])
    values = 1
    for each in shape[1:]:
        values *= each

    def largest(archive: Archive, start: int, stop: int) -> Tensor:
        """The largest absolute values of the blocks [start, stop)."""
        each = archive.get_tensor(own["weight.absmax"])
        if "weight.nested_absmax" not in own:
            return each[start:stop].float()
        at = torch.arange(start, stop) // int(state["nested_blocksize"])
        outer = archive.get_tensor(own["weight.nested_absmax"]).float()[at]
        table = archive.get_tensor(own["weight.nested_quant_map"]).float()
        return table[each[start:stop].int()] * outer + float(state["nested_offset"])

    def decode(archive: Archive, low: int, high: int) -> Tensor:
        start, stop = low * values, high * values
        stored = archive.get_tensor(key).flatten()[start // 2 : -(-stop // 2)].int()
        codes = torch.stack([stored >> 4, stored & 15], -1).flatten()[start % 2 :][: stop - start]
        first = start // size
        scale = largest(archive, first, -(-stop // size))[torch.arange(start, stop) // size - first]
        table = archive.get_tensor(own["weight.quant_map"]).float()
        return (table[codes] * scale).view(high - low, *shape[1:])

    def blocks(archive: Archive, low: int, high: int) -> Tensor:
        start, stop = low * values, high * values
        codes = archive.get_tensor(key).flatten()[start // 2 : stop // 2].view(-1, width // 2)
        first = start // size
        at = torch.arange(start, stop, width) // size - first
        scale = largest(archive, first, -(-stop // size))[at].contiguous()
        bytes_of = scale.view(torch.uint8).view(-1, 4)
        return torch.cat([bytes_of, codes], 1).view(high - low, -1)

    whole = Recipe(shape, decode)
    stored = str(state["quant_type"]).upper()
    width = PACKED[stored][0] if stored in packed.BITSANDBYTES else 1
    table = archive.get_tensor(own["weight.quant_map"]).float()
    alike = stored in packed.BITSANDBYTES and torch.equal(table, torch.tensor(packed.BITSANDBYTES[stored]))
    if not alike or values % width or size % width:
        return whole
    return whole._replace(stored=stored, blocks=blocks)
