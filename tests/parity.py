"""Comparing a network with its reference: every parameter redrawn, float64 on both sides, the reference's
roundings taken out.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tinydiff.parallel.plan import Row
from tinydiff.parity.reference import doubles, draw, randomised

__all__ = ["Recording", "close", "doubles", "draw", "randomised", "shapes", "tracked", "unread"]


def shapes(items: Iterable[Row] | Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape, of spec rows or of a state dict. Two rows of one name are an error."""
    if isinstance(items, Mapping):
        return {name: tuple(tensor.shape) for name, tensor in items.items()}
    rows = list(items)
    table = {row.name: row.shape for row in rows}
    assert len(table) == len(rows), "the spec names a weight twice"
    return table


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert equal shape and type and values within `tolerance`, absolutely. The reference must be finite,
    not constant, of order one.
    """
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"types differ: {actual.dtype} and {expected.dtype}"
    spread = expected.double().std().item()  # not a number where a value is not
    assert 1e-2 < spread < 1e3, f"the reference is degenerate: its deviation is {spread:.1e}"
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"differs by {error:.1e}, allowed is {tolerance:.0e}"


class Recording(dict):
    """A flat weight dict that remembers which names were read."""

    def __init__(self, flat: Mapping[str, Tensor]) -> None:
        super().__init__(flat)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        if name in self:
            self.read.add(name)
        return super().get(name, default)


def tracked(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, of which autograd keeps track."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in flat.items()}


def unread(y: Tensor, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tracked weights that y does not depend on."""
    gradients = torch.autograd.grad(y, list(weights.values()), torch.ones_like(y), allow_unused=True)
    return [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]
