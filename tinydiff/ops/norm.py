"""Normalisation and adaptive modulation. Shape letters: B batch, C channels, L tokens, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.ops.weights import Weights
from tinydiff.parallel.moves import move
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.strips import WHOLE, Strip, statistics


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which norms and modulations compute: float32 for half types, else the input's own."""
    return torch.promote_types(x.dtype, torch.float32)


def layer_norm(x: Tensor, w: Weights | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension, computed at least in float32 and returned in x's type.

    w: its weight and bias; None for a norm without them.
    """
    dtype = compute_dtype(x)
    weight, bias = (None, None) if w is None else (w["weight"].to(dtype), w["bias"].to(dtype))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rms_norm(x: Tensor, w: Weights, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension times `w.weight`; half types are summed in float32."""
    return F.rms_norm(x, x.shape[-1:], w["weight"].to(x.dtype), eps)


def channel_norm(x: Tensor, w: Weights) -> Tensor:
    """x [B, C, ...] over its norm along C, times sqrt(C) and `w.gamma`; of half types taken in float32."""
    y = x.to(compute_dtype(x))
    inverse = y.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    return (y * inverse).to(x.dtype) * (x.shape[1] ** 0.5 * w["gamma"])


def rms_norm_across(plan: Plan, x: Tensor, w: Weights, eps: float = 1e-6) -> Tensor:
    """RMSNorm over a last dimension that `tp` divides; the mean square is taken over all ranks."""
    ranks = plan.group("tp").size
    if ranks == 1:
        return rms_norm(x, w, eps)
    wide = x.to(compute_dtype(x))
    mean = move(plan, "sum", wide.square().mean(-1, keepdim=True)) / ranks
    return (wide * torch.rsqrt(mean + eps) * w["weight"]).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights, then `y * (1 + scale) + shift`. x [B, L, D].

    Computed in the modulation's type and returned in x's type.
    """
    y = F.layer_norm(x.to(shift.dtype), x.shape[-1:], eps=eps)
    return (y * (1 + scale) + shift).to(x.dtype)


def group_norm(x: Tensor, w: Weights, groups: int, eps: float = 1e-6, strip: Strip = WHOLE) -> Tensor:
    """GroupNorm of x [B, C, ...] over groups of channels and all pixels, with `w`'s weight and bias.

    Half types are summed in float32. Where x is a strip, the statistics are those of the whole image.
    """
    if not strip.divided:
        return F.group_norm(x, groups, w["weight"].to(x.dtype), w["bias"].to(x.dtype), eps)
    y = torch.unflatten(x.to(compute_dtype(x)), 1, (groups, -1)).flatten(3)
    variance, mean = torch.var_mean(y, (2, 3), correction=0, keepdim=True)
    mean, variance = statistics(strip, mean, variance)
    weight, bias = (w[name].to(y).view(groups, -1, 1) for name in ("weight", "bias"))
    return ((y - mean) * ((variance + eps).rsqrt() * weight) + bias).to(x.dtype).reshape(x.shape)
