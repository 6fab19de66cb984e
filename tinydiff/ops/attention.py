"""Attention behind one function. A backend is a name in `BACKENDS`; all take and return [B, L, H, D]."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydiff.ops.moves import move
from tinydiff.parallel.plan import Plan


def _sdpa(kernel: SDPBackend | None) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if kernel is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            with sdpa_kernel(kernel):
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.transpose(1, 2)

    return attend


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa(None),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math": _sdpa(SDPBackend.MATH),
}
"""torch's scaled dot product attention: `sdpa` lets torch choose the kernel, the others insist on one."""


def attention(plan: Plan, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale + mask) v -> [B, L, H, D]; scale defaults to 1/sqrt(D), mask is added and broadcasts to [B, H, L, M].

    The plan's backend computes it; a backend that cannot serve these inputs raises torch's RuntimeError.
    """
    q, k, v = (move(plan, "heads", x) for x in (q_BLHD, k_BMHD, v_BMHD))
    return move(plan, "tokens", BACKENDS[plan.attention](q, k, v, mask, scale))


def serves(backend: str, width: int, biased: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the backend's kernel runs there for heads of this width and type, with a bias if `biased`. Torch alone knows: it is tried."""
    x = torch.zeros(1, 16, 1, width, dtype=dtype, device=device)
    bias = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device) if biased else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason before it raises
        try:
            attention(Plan(attention=backend), x, x, x, bias)
        except RuntimeError:
            return False
    return True
