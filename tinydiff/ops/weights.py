"""A flat dict of tensors seen through a dotted prefix. A view is a prefix and a reference to the dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Weights:
    """View of a flat dict below a prefix: `(w / "a" / "b")["weight"]` is `flat["a.b.weight"]`.

    `w.dtype` is the type in which the network computes. It belongs to the network, since a weight may be
    stored in another type.
    `w.lora_scale` is the strength of each low-rank direction for each image, float [1 or B, R]. It
    belongs to the entries `lora_a` and `lora_b` that may stand beside a weight (see `ops.linear`).
    """

    __slots__ = ("_dtype", "at", "flat", "lora_scale")

    def __init__(
        self,
        flat: Mapping[str, Tensor],
        at: str = "",
        dtype: torch.dtype | None = None,
        lora_scale: Tensor | None = None,
    ) -> None:
        self.flat = flat
        self.at = at
        self._dtype = dtype
        self.lora_scale = lora_scale

    @property
    def dtype(self) -> torch.dtype:
        if self._dtype is None:
            raise ValueError("these Weights have no dtype, the type in which the network computes")
        return self._dtype

    def __truediv__(self, name: str | int) -> Weights:
        return Weights(self.flat, f"{self.at}{name}.", self._dtype, self.lora_scale)

    def __getitem__(self, name: str) -> Tensor:
        return self.flat[self.at + name]

    def __contains__(self, name: str) -> bool:
        return self.at + name in self.flat

    def get(self, name: str) -> Tensor | None:
        return self.flat.get(self.at + name)


def leaves(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, named without it, as a plain dict for a compiled region."""
    dotted = f"{prefix}."
    return {name[len(dotted) :]: tensor for name, tensor in flat.items() if name.startswith(dotted)}
