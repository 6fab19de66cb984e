"""Random packed weights whose values are finite and small."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tinydiff.parallel.plan import PACKED, SCALED

_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
_HALVES |= {"Q4_K": (0, 2), "Q5_K": (0, 2)}
"""Where a block has scales in float16, if not in its first two bytes alone."""
_LARGEST = {"Q2_K": 45, "Q3_K": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4064, "IQ4_XS": 4064}
_LARGEST |= {"Q8_0": 127, "IQ4_NL": 127}


def blocks(stored: str, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """(rows uint8 [outputs, bytes], scales of the rows where the type has them), values about 0.1."""
    values, size = PACKED[stored]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (outputs * inputs // values, size), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(len(x), 1, generator=generator) + 0.5) / 5
    if stored == "MXFP4":
        x[:, :1] = torch.randint(121, 124, (len(x), 1), generator=generator)
    elif stored in ("NF4", "FP4"):
        x[:, :4] = scale.view(torch.uint8)
    elif stored == "NVFP4":
        x[:, :1] = (100 * scale).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        for at in _HALVES.get(stored, (0,)):
            x[:, at : at + 2] = (scale / _LARGEST.get(stored, 16)).half().view(torch.uint8)
    rows = x.view(outputs, -1)
    if stored not in SCALED:
        return rows, None
    return rows, (torch.rand(outputs, 1, generator=generator) + 0.5) / 400


def gguf_file(path: Path, tensors: Mapping[str, Any], architecture: str = "wan", **entries: Any) -> None:
    """Write tensors, each whole or (type, its bytes), and entries of the metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in entries.items():
        if isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind, data = value
            writer.add_tensor(name, _numpy(data), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, _numpy(value))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def _numpy(data: Any) -> Any:
    return data.contiguous().numpy() if isinstance(data, Tensor) else data
