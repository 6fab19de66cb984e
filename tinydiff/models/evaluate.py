"""One whole evaluation of a family's network, nothing kept between calls: what the loop does in parts, for tests, training and readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

Tensors = dict[str, Tensor]


def predict(family: Any, c: Any, plan: Plan, w: Weights, x_BLP: Tensor, t_B: Tensor, inputs: Tensors) -> Tensor:
    """Tokens [B, L, P] at timesteps [B], or [1] for all, -> velocity [B, L, P]. `inputs` as the family's `hoist` takes them."""
    *_, velocity = walk(family, c, plan, w, x_BLP, t_B, inputs)
    return velocity


def walk(family: Any, c: Any, plan: Plan, w: Weights, x_BLP: Tensor, t_B: Tensor, inputs: Tensors) -> Iterator[Any]:
    """The same, one after another: what enters the first block, what each block returns, the velocity."""
    request, steps = family.hoist(c, plan, w, inputs, t_B)
    rows = {name: _per_image(table, len(t_B)) for name, table in steps.items()}
    shared = rows | {name: request[name] for name in family.SHARED if name in request}
    x = family.pre(c, plan, w, x_BLP, Weights(request), rows)
    yield x
    for fn, at in family.blocks(c):
        x = fn(c, plan, w / at, x, Weights(request | rows) / at, shared)
        yield x
    yield family.post(c, plan, w, x, Weights(request), rows)


def _per_image(table: Tensor, images: int) -> Tensor:
    """Rows [S, 1 or B, ...] made for one timestep per image -> [S, ...], image b at row b."""
    return table[0] if images == 1 else torch.stack([rows[min(b, len(rows) - 1)] for b, rows in enumerate(table)])
