"""Embeddings: a table lookup for tokens, sinusoids and two layers for timesteps.

Source of the sinusoids: arXiv 2006.11239, in the [cos, sin] order of the released checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.linear import embedding, linear, product
from tinydiff.ops.weights import Weights
from tinydiff.parallel.moves import move
from tinydiff.parallel.plan import Plan


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 1e4, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Timesteps t [...] -> [..., dim], cosines first. `dim` is even; computed in `dtype`."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t.to(dtype)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def embedder(x: Tensor, w: Weights) -> Tensor:
    """linear_1, SiLU, linear_2, as checkpoints embed a sinusoid or a vector: x [..., I] -> [..., D]."""
    return linear(F.silu(linear(x, w / "linear_1")), w / "linear_2")


def lookup(plan: Plan, ids: Tensor, w: Weights) -> Tensor:
    """Rows of a table w.weight [V, D] by ids [...] int64 -> [..., D]; `tp` divides the vocabulary."""
    table, tp = w["weight"], plan.group("tp")
    if tp.size == 1:
        return embedding(ids, w)
    local = ids - tp.rank * len(table)
    elsewhere = (local < 0) | (local >= len(table))
    embedded = embedding(local.masked_fill(elsewhere, 0), w)
    return move(plan, "sum", embedded.masked_fill(elsewhere[..., None], 0))


def scores(plan: Plan, x: Tensor, w: Weights) -> Tensor:
    """Scores of the whole vocabulary on every rank: x [..., D] times a table w.weight [V, D] -> [..., V]."""
    tp, local = plan.group("tp"), product(x, w)
    size = local.shape[-1]
    return move(plan, "sum", F.pad(local, (tp.rank * size, (tp.size - 1 - tp.rank) * size)))
