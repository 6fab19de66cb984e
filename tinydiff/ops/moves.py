"""Carrying out the plan's moves on activations. One rank: every move is the identity."""

from __future__ import annotations

from torch import Tensor

from tinydiff.parallel.plan import Plan


def move(plan: Plan, name: str, x: Tensor) -> Tensor:
    """Perform the plan's move `name` on `x`; the identity where the plan has no such move or its axis has one rank."""
    sizes = dict(plan.sizes)
    for key, step in plan.moves:
        if key == name and sizes.get(step.axis, 1) > 1:
            raise RuntimeError(f"the plan splits axis {step.axis!r} over {sizes[step.axis]} ranks; this executor runs on one")
    return x
