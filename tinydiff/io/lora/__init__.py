"""LoRA files: read into differences of a model's weights, whatever trainer wrote them."""

from tinydiff.io.lora.differences import Difference, LowRank, measured
from tinydiff.io.lora.names import Component
from tinydiff.io.lora.reader import Adapter, read_adapter

__all__ = ["Adapter", "Component", "Difference", "LowRank", "measured", "read_adapter"]
