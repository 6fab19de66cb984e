"""A flat dict of tensors seen through a dotted prefix. The dict stays flat; a view is a name and a reference."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Weights:
    """View of a flat weight dict below a prefix: `(w / "attn1" / "to_q")["weight"]` is `flat["attn1.to_q.weight"]`."""

    __slots__ = ("at", "flat")

    def __init__(self, flat: Mapping[str, Tensor], at: str = "") -> None:
        self.flat = flat
        self.at = at

    def __truediv__(self, name: str | int) -> Weights:
        return Weights(self.flat, f"{self.at}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.flat[self.at + name]

    def __contains__(self, name: str) -> bool:
        return self.at + name in self.flat

    def get(self, name: str) -> Tensor | None:
        return self.flat.get(self.at + name)


def leaves(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, renamed without it: plain tensors, fit to cross the boundary of a compiled region."""
    dotted = f"{prefix}."
    return {name[len(dotted) :]: tensor for name, tensor in flat.items() if name.startswith(dotted)}
