"""The types of stored tensors that are read as they are, by the names of safetensors and GGUF."""

from __future__ import annotations

import torch

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Float8 and integers are read by `io.quantised`, with what stands beside them."""
