"""GGUF files: what their header says, and their tensors, mapped. Source: the GGUF specification."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from tinydiff.io.floats import FLOATS
from tinydiff.io.kept import Kept
from tinydiff.ops import packed
from tinydiff.parallel.plan import PACKED

GGML = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4)},
    **{27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
}
"""Number of a type -> its name, the values of a block and the bytes of one. Source: the GGUF specification.
"""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
SHOWN = 8
"""Values of a list in the metadata that are kept; a vocabulary has 100,000."""


class Placed(NamedTuple):
    """A tensor of a file. shape: outermost dimension first. start: of its bytes, from the file's own."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


class Contents(NamedTuple):
    """What a header says. lacks: bytes that it speaks of and that are not there."""

    tensors: Mapping[str, Placed]
    metadata: Mapping[str, object]
    lacks: int


def read(file: BinaryIO, size: int) -> Contents:
    """The header of an open file of `size` bytes.

    Raises ValueError, EOFError or struct.error for a broken one.
    """
    version, count, entries = struct.unpack("<4xIQQ", file.read(24))
    if version not in (2, 3):
        raise ValueError(f"is a GGUF file of version {version}; 2 and 3 are known")
    if count + entries > size // 8:
        raise ValueError("ends inside its header or has a broken one")
    metadata = {}
    for _ in range(entries):
        name = _text(file, size)
        metadata[name] = _value(file, size, _number(file, "I"))
    tensors = {}
    for _ in range(count):
        name = _text(file, size)
        dims = [_number(file, "Q") for _ in range(min(_number(file, "I"), 8))]
        kind, offset = _number(file, "I"), _number(file, "Q")
        word, block, each = GGML.get(kind, (f"type {kind}", 1, 0))
        if dims and dims[0] % block:
            raise ValueError(f"has a broken header: {name!r} is no whole number of blocks of {word}")
        tensors[name] = Placed(word, tuple(reversed(dims)), offset, math.prod(dims) // block * each)
    along = metadata.get("general.alignment", 32)
    start = -(-file.tell() // along) * along if isinstance(along, int) and along > 0 else file.tell()
    placed = {name: each._replace(start=start + each.start) for name, each in tensors.items()}
    end = max((each.start + each.bytes for each in placed.values()), default=start)
    return Contents(placed, metadata, max(0, end - size))


@dataclass(frozen=True)
class TensorReader:
    """A tensor of a file, read in pieces, as `safe_open` gives one. Blocks come as float32."""

    data: Tensor
    placed: Placed

    def get_shape(self) -> list[int]:
        return list(self.placed.shape)

    def get_dtype(self) -> str:
        return "F32" if self.placed.dtype in PACKED else self.placed.dtype

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        shape, dtype = self.placed.shape, self.placed.dtype
        held = self.data[self.placed.start : self.placed.start + self.placed.bytes]
        if dtype in FLOATS:
            return held.view(FLOATS[dtype]).view(shape)[box]
        if len(shape) == 1:
            return packed.decode(dtype, held[None])[0][box]
        first, *others = box
        rows = packed.decode(dtype, held.view(shape[0], -1)[first])
        return rows.view(-1, *shape[1:])[(slice(None), *others)]


@dataclass(frozen=True)
class Gguf:
    """The tensors of a file, mapped."""

    data: Tensor
    tensors: Mapping[str, Placed]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, key: str) -> TensorReader:
        return TensorReader(self.data, self.tensors[key])

    def get_tensor(self, key: str) -> Tensor:
        part = self.get_slice(key)
        return part[(slice(None),) * max(1, len(part.placed.shape))]

    def kept(self, key: str) -> Kept | None:
        """A matrix in blocks as it is in the file; None for any other."""
        placed = self.tensors[key]
        if placed.dtype not in PACKED or len(placed.shape) != 2:
            return None
        held = self.data[placed.start : placed.start + placed.bytes].view(placed.shape[0], -1)
        return Kept(placed.dtype, held)

    def metadata(self) -> dict[str, str]:
        return {}


def opened(path: Path) -> Gguf:
    """The mapped file. Raises ValueError, a clause about it, for one that is broken or cut short."""
    at = path.stat()
    contents = _contents(path, at.st_size, at.st_mtime_ns)
    if contents.lacks:
        raise ValueError(f"is truncated: its last {contents.lacks} bytes are not there")
    data = torch.from_file(str(path), shared=False, size=at.st_size, dtype=torch.uint8)
    return Gguf(data, contents.tensors)


@lru_cache(maxsize=16)
def _contents(path: Path, size: int, changed: int) -> Contents:
    with path.open("rb") as file:
        try:
            return read(file, size)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise ValueError("ends inside its header or has a broken one") from error


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _text(file: BinaryIO, size: int) -> str:
    length = _number(file, "Q")
    if length > size:
        raise EOFError
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, size: int, kind: int) -> Any:
    """A value of the metadata; of a list its first values."""
    if kind == _STRING:
        return _text(file, size)
    if kind in _NUMBERS:
        return _number(file, _NUMBERS[kind])
    if kind != _LIST:
        raise EOFError
    inner, length = _number(file, "I"), _number(file, "Q")
    if length > size or inner == _LIST:
        raise EOFError
    kept = [_value(file, size, inner) for _ in range(min(length, SHOWN))]
    if inner == _STRING:
        for _ in range(len(kept), length):
            _text(file, size)
    else:
        file.seek((length - len(kept)) * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
    return kept if length <= SHOWN else [*kept, "..."]
