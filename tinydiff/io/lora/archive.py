"""Reading a LoRA file: the tensors and the metadata of a safetensors file, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinydiff.io.archive import instead

PICKLE = (b"PK\x03\x04", b"\x80")
"""How files of torch.save begin, new and old."""


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors in at least float32, metadata). ValueError in words that follow the name of the file.

    The tensors are copies: a mapped file that is overwritten in place would end the process.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: _wide(key, opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if _start(file).startswith(PICKLE):
            words = "is a pickle, which can run code and is never read; convert it to safetensors"
            raise ValueError(words) from error
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(instead(file) or f"is truncated or not a safetensors file ({reason})") from error
    if not tensors:
        raise ValueError("holds no tensors")
    return tensors, metadata


def _start(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(4)
    except OSError:
        return b""


def _wide(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() and tensor.numel() > 1 and not key.endswith(".reshape_weight"):
        raise ValueError(f"has values of {tensor.dtype} in {key}, not floating-point numbers")
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(wide, copy=True)
