"""Out of memory: how it is recognised, and how unused memory is returned."""

from __future__ import annotations

import gc

import torch


def short_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the CPU is out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def give_memory_back() -> None:
    """Return memory that is cached but unused to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
