"""The matrices by which PEFT's OFT turns the inputs of a layer, from the numbers in its file."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from tinydiff.io.lora.scales import Config, number

NEUMANN = (0, 18)
"""The version of PEFT from which on its series is that of `_series`."""


def turns(triangles: Tensor, columns: int, config: Config) -> Tensor:
    """[blocks, B, B] for a weight of so many columns.

    triangles: [blocks or 1, B (B - 1) / 2], what stands above the diagonals; one may be that of all blocks.
    config: PEFT's, as far as the file has it; its defaults are PEFT's. ValueError in words that follow the
    name of the layer.
    """
    side = (1 + isqrt(1 + 8 * triangles.shape[-1])) // 2
    fits = triangles.ndim == 2 and side * (side - 1) // 2 == triangles.shape[1] and columns % side == 0
    if not fits or len(triangles) not in {1, columns // side}:
        shape = tuple(triangles.shape)
        raise ValueError(f"has oft_R of shape {shape}, which does not fit the model's {columns} columns")
    skew = _skew(triangles.to(torch.promote_types(triangles.dtype, torch.float32)), side)
    if config.get("coft"):
        skew = _limited(skew, number(config.get("eps", 6e-5), "eps of its configuration"))
    one = torch.eye(side, dtype=skew.dtype)
    if config.get("use_cayley_neumann", True):
        _check_version(config)
        terms = number(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms")
        found = _series(one, skew, int(terms))
    else:
        found = torch.linalg.solve(one + skew, one - skew, left=False)
    return found.expand(columns // side, side, side)


def _skew(triangles: Tensor, side: int) -> Tensor:
    rows, columns = torch.triu_indices(side, side, 1)
    upper = triangles.new_zeros(len(triangles), side, side)
    upper[:, rows, columns] = triangles
    return upper - upper.transpose(1, 2)


def _limited(skew: Tensor, eps: float) -> Tensor:
    """No block longer than eps over the root of their number."""
    limit, length = eps / len(skew) ** 0.5, skew.norm(dim=(1, 2), keepdim=True)
    return torch.where(length <= limit, skew, skew * (limit / length))


def _series(one: Tensor, skew: Tensor, terms: int) -> Tensor:
    """1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1), which is near the Cayley transform of -Q."""
    if terms < 3:
        return one + 2.0 * max(terms - 1, 0) * skew
    power, total = skew, one + 2 * skew
    for _ in range(max(terms, 4) - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def _check_version(config: Config) -> None:
    version = str(config.get("peft_version", "")).partition("@")[0].split(".")
    if "use_cayley_neumann" not in config:
        return
    known = tuple(int(part) for part in version[:2] if part.isdigit())
    if known < NEUMANN:
        raise ValueError("is of the kind OFT with the series of PEFT before 0.18, which is not supported")
