"""Files of tensors, opened by mapping them: safetensors, and torch's own .pth, .pt, .bin and .ckpt.

A pickle is read by torch's weights-only reader, which knows tensors and plain containers: nothing in the file is
run. Either is asked alike: `keys`, `get_tensor`, `get_slice`, `metadata`.

    shapes, metadata = archive.header(path)  # what `models.layouts.recognise` takes
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinydiff.records import UserError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types read as they are. Anything else (float8, integers) needs scales that a cast would silently drop."""

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
"""Extensions of files that torch.save wrote."""

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_WRAPPERS = ("state_dict", "model", "module")
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
"""A `Pickle`, or what `safe_open` gives."""


def opened(file: Path) -> Archive:
    """The mapped file. Raises UserError for one that is cut short, or holds code."""
    return _pickle(file) if file.suffix in PICKLES else _safetensors(file)


def header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(key -> shape, metadata) of a file, from its header alone."""
    archive = opened(file)
    shapes = {key: tuple(archive.get_slice(key).get_shape()) for key in archive.keys()}  # noqa: SIM118
    return shapes, archive.metadata() or {}


def _safetensors(file: Path) -> Archive:
    """A header is checked against the file's length, so that a truncated file is found here."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(
            "model_path", f"model_path: {str(file)!r} does not exist, though the index beside it names it"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(
            "model_path", f"model_path: {str(file)!r} is truncated or not a safetensors file ({reason})"
        ) from error


def _pickle(file: Path) -> Pickle:
    try:
        held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError("model_path", f"model_path: {str(file)!r} does not exist") from None
    except pickle.UnpicklingError as error:
        asked = re.search(
            r"(?:Unsupported global: GLOBAL|Unsupported class|Blocked by[^:]*:|unsupported GLOBAL) ([\w.]+)",
            str(error),
        )
        what = f"asks to run {asked[1]!r}" if asked else "holds more than tensors"
        raise UserError(
            "model_path",
            f"model_path: {str(file)!r} {what}, and nothing in a pickle is ever run; take a safetensors file",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            "model_path", f"model_path: {str(file)!r} is truncated or not a file of torch ({reason})"
        ) from error
    while isinstance(held, dict) and (
        inner := next((held[k] for k in _WRAPPERS if isinstance(held.get(k), dict)), None)
    ):
        held = inner
    tensors = {} if not isinstance(held, dict) else {str(key): value for key, value in held.items()}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        other = next((key for key, value in tensors.items() if not isinstance(value, Tensor)), None)
        what = f"under {other!r} no tensor" if other is not None else "no named tensors"
        raise UserError("model_path", f"model_path: {str(file)!r} holds {what}, so it is no file of weights")
    return Pickle(tensors)
