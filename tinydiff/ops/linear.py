"""Matrix products with weights. The only module that reads what stands beside a weight under its prefix.

A layer's entries are plain tensors whose names say what they are:
weight [O, I], or [O, C, ...] for the kernel of a patch embedding, where I counts all values of a patch.
weight_scale [O, G] beside a weight [O, I] of 8 bits: what each of the G equal groups of a row is multiplied
by, in float32.
weight_q4_k and other packed types in place of a weight: its rows as bytes, uint8 [O, bytes] (see
`ops.packed`).
A weight of these kinds is decoded in float32 and rounded once to the compute dtype, so it has the bits of one
that was decoded when it was loaded.
bias [O].
lora_a [R, I] and lora_b [O, R]: the low-rank matrices of any number of adapters, concatenated along R.
Each image has its own strength for each of the R directions (`Weights.lora_scale`), so images with different
adapters share a batch, and another strength or another adapter of the same R needs no new graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops import packed
from tinydiff.ops.weights import Weights
from tinydiff.parallel.moves import move
from tinydiff.parallel.plan import LORA_A, LORA_B, LORA_SCALE, PACKED, WEIGHT_SCALE, Plan, packed_leaf

_PACKED_LEAVES = {stored: packed_leaf(stored) for stored in PACKED}


def linear(x: Tensor, w: Weights) -> Tensor:
    """x [..., I] -> [..., O]: `x @ w.weight.T + w.bias`, the bias optional."""
    return product(x, w, w.get("bias"))


def linear_sum(plan: Plan, x: Tensor, w: Weights) -> Tensor:
    """The row-split linear: partial products are summed over `tp` before the bias is added, once."""
    y = move(plan, "sum", product(x, w))
    bias = w.get("bias")
    return y if bias is None else y + bias


def product(x: Tensor, w: Weights, bias: Tensor | None = None) -> Tensor:
    """x [B, ..., I] times the layer's weight and its low-rank differences -> [B, ..., O]."""
    y = F.linear(x, _whole(w), bias)
    down = w.get(LORA_A)
    return y if down is None else y + F.linear(_scaled(F.linear(x, down), w.lora_scale), w[LORA_B])


def _whole(w: Weights) -> Tensor:
    """The layer's weight [O, I] in the type of the product."""
    weight, scale = w.get("weight"), w.get(WEIGHT_SCALE)
    if weight is None:
        for stored, leaf in _PACKED_LEAVES.items():
            if (rows := w.get(leaf)) is not None:
                return packed.decode(stored, rows, scale).to(w.dtype)
        raise KeyError(f"{w.at}weight")
    weight = weight.flatten(1)
    if scale is None:
        return weight
    groups = scale.shape[1]
    return (torch.unflatten(weight.float(), 1, (groups, -1)) * scale.unsqueeze(-1)).flatten(1).to(w.dtype)


def embedding(ids: Tensor, w: Weights) -> Tensor:
    """Rows of the layer's table and of its low-rank differences, by ids [B, ...] int64 -> [B, ..., I]."""
    y, up = F.embedding(ids, _whole(w)), w.get(LORA_B)
    return y if up is None else y + F.linear(_scaled(F.embedding(ids, up), w.lora_scale), w[LORA_A].T)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x [B, ..., R] times scale [1 or B, R], in the type of the scale and rounded once."""
    if scale is None:
        raise ValueError(f"weights with {LORA_A} were evaluated without {LORA_SCALE}")
    while scale.ndim < x.ndim:
        scale = scale.unsqueeze(1)
    return (x * scale).to(x.dtype)
