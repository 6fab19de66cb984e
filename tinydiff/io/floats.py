"""The types of stored tensors that are read as they are, by the names of safetensors and GGUF."""

from __future__ import annotations

import torch

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those of 8 bits mean nothing without what stands beside them."""
EIGHT_BITS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
"""Types of weights that have scales beside them: see `io.quantised` and `io.kept`."""
TYPES = FLOATS | EIGHT_BITS | {"U8": torch.uint8}
"""With the bytes of packed weights."""
