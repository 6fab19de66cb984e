"""Files of tensors, opened by mapping them: safetensors, GGUF, and torch's own .pth, .pt, .bin, .ckpt, .pkl.

A pickle is read by torch's weights-only reader, which knows tensors and plain containers: nothing in the file
is run. Quantised weights are decoded as they are read. All are asked alike: `keys`, `get_tensor`,
`get_slice`, `metadata`.

    shapes, metadata = archive.header(path)  # what `models.layouts.recognise` takes
    shapes, metadata = archive.header(*weight_files(directory))
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinydiff.io import gguf, quantised
from tinydiff.io.floats import FLOATS
from tinydiff.records import UserError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
"""Extensions of files that torch.save wrote."""

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
"""Keys under which training scripts keep the weights beside other things."""


@dataclass(frozen=True)
class Slice:
    """A tensor of a pickle, as `safe_open` gives one."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return _NAMES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        return self.tensor[box]


@dataclass(frozen=True)
class Pickle:
    """The tensors of a pickle, mapped."""

    tensors: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def get_slice(self, key: str) -> Slice:
        return Slice(self.tensors[key])

    def metadata(self) -> dict[str, str]:
        return {}


Archive = Any
"""A `Pickle`, a `gguf.Gguf`, a `quantised.Decoded`, or what `safe_open` gives."""

_PAGE = "is a web page, not the weights; take the link that downloads the file itself"
_INSTEAD = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; `git lfs pull` fetches them",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
"""How a file begins that a download left in the place of one -> the clause for it."""


def opened(file: Path) -> Archive:
    """The mapped file. Raises UserError for one that is cut short, or holds code."""
    if file.suffix == ".gguf":
        return _gguf(file)
    return _pickle(file) if file.suffix in PICKLES else _safetensors(file)


def instead(file: Path) -> str | None:
    """What a download left in the place of a file of weights, as a clause; None where it may be weights."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError:
        return None
    return next(
        (words for begins, words in _INSTEAD.items() if start.lstrip().lower().startswith(begins)), None
    )


def shapes_of(archive: Archive) -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor in an opened file."""
    return {key: tuple(archive.get_slice(key).get_shape()) for key in archive.keys()}  # noqa: SIM118


def header(*files: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(key -> shape, metadata) of a file, or of the shards of one, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        archive = opened(file)
        shapes |= shapes_of(archive)
        metadata |= archive.metadata() or {}
    return shapes, metadata


def _safetensors(file: Path) -> Archive:
    """A header is checked against the file's length, so that a truncated file is found here."""
    try:
        archive = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(
            "model_path", f"model_path: {str(file)!r} does not exist, though the index beside it names it"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        broken = f"is truncated or not a safetensors file ({reason})"
        raise _refused(file, instead(file) or broken) from error
    try:
        return quantised.decoded(file, archive)
    except (ValueError, LookupError, TypeError) as error:
        raise _refused(file, str(error)) from error


def _gguf(file: Path) -> Archive:
    try:
        return gguf.opened(file)
    except OSError as error:
        raise _refused(file, f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise _refused(file, instead(file) or str(error)) from error


def _pickle(file: Path) -> Pickle:
    if not file.is_file():
        raise _refused(file, "does not exist")
    if not zipfile.is_zipfile(file):
        old = "a pickle of before torch 1.6, which cannot be mapped; save it anew with torch.save"
        raise _refused(file, instead(file) or f"is truncated, or {old}")
    try:
        unpickled = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        what = f"asks to run {asked[1]!r}" if asked else "holds more than tensors"
        raise _refused(
            file, f"{what}, and nothing in a pickle is ever run; take a safetensors file"
        ) from error
    except Exception as error:  # whatever its unpickler meets in a broken file
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise _refused(
            file, f"is truncated or not a file of torch ({reason or type(error).__name__})"
        ) from error
    return Pickle(_weights(file, unpickled))


def _weights(file: Path, unpickled: object) -> dict[str, Tensor]:
    """The tensors of what a pickle holds: a dict of them, or one under a usual key beside other things."""
    while isinstance(unpickled, dict) and (inner := _inner(unpickled)) is not None:
        unpickled = inner
    if not isinstance(unpickled, dict) or not unpickled:
        raise _refused(file, "holds no named tensors, so it is no file of weights")
    if other := next((key for key, value in unpickled.items() if not _plain(value)), None):
        raise _refused(file, f"holds no plain tensor under {str(other)!r}, so it is no file of weights")
    return {str(key): value.detach() for key, value in unpickled.items() if isinstance(value, Tensor)}


def _inner(unpickled: dict[object, object]) -> dict[object, object] | None:
    wrapped = (unpickled.get(name) for name in _WRAPPERS)
    return next((each for each in wrapped if isinstance(each, dict)), None)


def _plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _refused(file: Path, why: str) -> UserError:
    return UserError("model_path", f"model_path: {str(file)!r} {why}")
