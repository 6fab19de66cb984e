"""What a weight file says of itself, without a value of a tensor.

It says the names, types, shapes and bytes of its tensors, its metadata, and whether all of it is there.

`io.archive` opens files to load them; this also tells of a file that is cut short, or of a kind that is not
loaded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from tinydiff.entries import Entries
from tinydiff.io import archive, gguf

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
    metadata: Entries = field(default_factory=dict)
    lacks: int = 0


def read(path: Path) -> Header:
    """The header of a weight file, its format told by its first bytes.

    Raises ValueError, a clause about the file, where it is none; UserError for a pickle that cannot be read
    as weights.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(10)
            file.seek(0)
            if start[:4] == b"GGUF":
                return _gguf(gguf.read(file, size))
            if start[8:9] == b"{":
                return _safetensors(file, size)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise ValueError("ends inside its header or has a broken one") from error
    if size == 0:
        raise ValueError("is empty")
    if (words := archive.instead(path)) is not None:
        raise ValueError(words)
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


def _span(offsets: Sequence[int]) -> int:
    start, stop = offsets
    if not 0 <= start <= stop:
        raise ValueError("offsets run backwards")
    return stop - start


# --- GGUF


def _gguf(contents: gguf.Contents) -> Header:
    tensors = {name: Tensor(each.dtype, each.shape, each.bytes) for name, each in contents.tensors.items()}
    return Header("gguf", tensors, contents.metadata, contents.lacks)


# --- pickles


def _pickle(path: Path) -> Header:
    """By torch's reader of weights, which maps the file and runs nothing."""
    opened = archive.opened(path)
    tensors = {}
    for key in opened.keys():  # noqa: SIM118 (a handle, not a dict)
        tensor = opened.get_tensor(key)
        tensors[key] = Tensor(
            opened.get_slice(key).get_dtype(), tuple(tensor.shape), tensor.numel() * tensor.element_size()
        )
    return Header("pickle", tensors)
