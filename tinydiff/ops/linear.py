"""Matrix products with weight leaves. The only place that looks at the kind of a leaf."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.weights import Weights
from tinydiff.parallel.moves import move
from tinydiff.parallel.plan import Plan


def matmul(x: Tensor, leaf: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times a weight leaf [O, I], plus bias [O] -> [..., O]. A new storage format is a new leaf
    type and a new case here.

    A leaf [O, C, ...] is the kernel of a patch embedding, and I all values of a patch, channels outermost.
    """
    match leaf:
        case torch.Tensor():
            return F.linear(x, leaf.flatten(1), bias)
    raise TypeError(f"no product is defined for a weight leaf of type {type(leaf).__name__}")


def linear(x: Tensor, w: Weights) -> Tensor:
    """x [..., I] -> [..., O]: `x @ w.weight.T + w.bias`, the bias optional."""
    return matmul(x, w["weight"], w.get("bias"))


def linear_sum(plan: Plan, x: Tensor, w: Weights) -> Tensor:
    """The row-split linear: partial products are summed over `tp` before the bias is added, once."""
    y = move(plan, "sum", matmul(x, w["weight"]))
    bias = w.get("bias")
    return y if bias is None else y + bias
