"""What an adapter does to one weight, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Difference(Protocol):
    """What an adapter does to one weight."""

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight, in the weight's type; computed in at least float32."""
        ...

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(a [R, I], b [O, R]) whose product b @ a is the difference at strength 1; None where it has none."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + strength * scale * b @ a; a [R, I] and b [O, R], the weight flattened to [O, I]."""

    a: Tensor
    b: Tensor
    scale: float

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.a.to(weight.device, wide), self.b.to(weight.device, wide)
        return (weight.to(wide) + (strength * self.scale) * (b @ a).view(weight.shape)).to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b * self.scale
