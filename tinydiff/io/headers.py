"""What a weight file says of itself: names, types, shapes and bytes of its tensors, its metadata, and whether
all of it is there. No value of a tensor is read.

`io.archive` opens files to load them; this also tells of a file that is cut short, or of a kind that is not
loaded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from tinydiff.io import archive

Format = Literal["safetensors", "pickle", "gguf"]

LONGEST = 100_000_000
"""Bytes of a header at most, as the safetensors library has it."""


class Tensor(NamedTuple):
    """A stored tensor. dtype: by its format's own name; shape: outermost dimension first."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Header:
    """A file's own account of itself. lacks: bytes that its header speaks of and that are not there."""

    format: Format
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    lacks: int = 0


def read(path: Path) -> Header:
    """The header of a weight file, its format told by its first bytes. Raises ValueError, a clause about the
    file, where it is none; UserError for a pickle that cannot be read as weights.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(10)
            file.seek(0)
            if start[:4] == b"GGUF":
                return _gguf(file, size)
            if start[8:9] == b"{":
                return _safetensors(file, size)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise ValueError("ends inside its header or has a broken one") from error
    if size == 0:
        raise ValueError("is empty")
    if start.startswith(b"version ht"):
        raise ValueError("is a Git LFS pointer, not the weights; `git lfs pull` fetches them")
    if path.suffix in archive.PICKLES:
        return _pickle(path)
    if path.suffix == ".safetensors":
        raise ValueError("is truncated or not a safetensors file")
    raise ValueError("is no file of weights: neither safetensors nor GGUF nor torch's")


# --- safetensors


def _safetensors(file: BinaryIO, size: int) -> Header:
    length = struct.unpack("<Q", file.read(8))[0]
    if length > min(size - 8, LONGEST):
        raise ValueError("is truncated or not a safetensors file")
    try:
        stored = json.loads(file.read(length))
        metadata = stored.pop("__metadata__", None) or {}
        tensors = {
            name: Tensor(entry["dtype"], tuple(map(int, entry["shape"])), _span(entry["data_offsets"]))
            for name, entry in stored.items()
        }
        end = max((entry["data_offsets"][1] for entry in stored.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError("has a header that is not that of a safetensors file") from error
    return Header("safetensors", tensors, metadata, lacks=max(0, 8 + length + end - size))


def _span(offsets: Any) -> int:
    start, stop = offsets
    if not 0 <= start <= stop:
        raise ValueError("offsets run backwards")
    return stop - start


# --- GGUF

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


def _gguf(file: BinaryIO, size: int) -> Header:
    version, count, entries = struct.unpack("<4xIQQ", file.read(24))
    if version not in (2, 3):
        raise ValueError(f"is a GGUF file of version {version}; 2 and 3 are known")
    if count + entries > size // 8:
        raise ValueError("ends inside its header or has a broken one")
    metadata = {}
    for _ in range(entries):
        name = _text(file, size)
        metadata[name] = _value(file, size, _number(file, "I"))
    tensors, end = {}, 0
    for _ in range(count):
        name = _text(file, size)
        dims = [_number(file, "Q") for _ in range(min(_number(file, "I"), 8))]
        kind, offset = _number(file, "I"), _number(file, "Q")
        word, block, each = GGML.get(kind, (f"type {kind}", 1, 0))
        stored = math.prod(dims) // block * each
        tensors[name] = Tensor(word, tuple(reversed(dims)), stored)
        end = max(end, offset + stored)
    along = metadata.get("general.alignment", 32)
    start = -(-file.tell() // along) * along if isinstance(along, int) and along > 0 else file.tell()
    return Header("gguf", tensors, metadata, lacks=max(0, start + end - size))


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


# --- pickles


def _pickle(path: Path) -> Header:
    """By torch's reader of weights, which maps the file and runs nothing."""
    held = archive.opened(path)
    tensors = {}
    for key in held.keys():  # noqa: SIM118 (a handle, not a dict)
        tensor = held.get_tensor(key)
        tensors[key] = Tensor(
            held.get_slice(key).get_dtype(), tuple(tensor.shape), tensor.numel() * tensor.element_size()
        )
    return Header("pickle", tensors)
