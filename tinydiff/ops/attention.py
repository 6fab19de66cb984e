"""Attention behind one function. A backend is a name in `BACKENDS`; all take and return [B, L, H, E].

With several ranks each holds a shard of the tokens. Along `ulysses` ranks swap token shards for head shards,
so that each attends with its own heads from all tokens to all tokens. Along `ring` keys and values pass from
rank to rank, and the partial results are merged by their log-sum-exp.
Sources: arXiv 2309.14509 (Ulysses), 2310.01889 (ring attention).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydiff.parallel.moves import move, rotate, wait
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.sequence import sequence_ranks


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


def attention(
    plan: Plan,
    q_BLHE: Tensor,
    k_BMHE: Tensor,
    v_BMHE: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    keys: Sequence[Tensor] = (),
) -> Tensor:
    """softmax(q k^T * scale + mask) v -> [B, L, H, E]; scale defaults to 1 / sqrt(E).

    mask is added to the scores and broadcasts to [B, H, L, M]. The plan's backend computes the result; a
    backend that cannot serve these inputs raises torch's RuntimeError.
    Where the plan shards the sequence, L and M are this rank's tokens, the mask may depend on the key
    only, [B or 1, 1, 1, M], and `keys` (see `parallel.sequence.keys`) tells real tokens from padding.
    """
    attend = BACKENDS[plan.attention]
    if sequence_ranks(plan)[0] == 1:
        return attend(q_BLHE, k_BMHE, v_BMHE, mask, scale)
    if len(keys) != plan.group("ring").size:
        message = f"it needs one index tensor of keys per rank of the ring, and has {len(keys)}"
        raise ValueError(f"attention is sharded over ranks; {message}")
    heads, mask = q_BLHE.shape[2], None if mask is None else move(plan, "mask", mask)
    padding = -heads % plan.group("ulysses").size  # zero heads, so that every rank has as many
    q, k, v = _by_heads(plan, *(F.pad(x, (0, 0, 0, padding)) for x in (q_BLHE, k_BMHE, v_BMHE)))
    if len(keys) == 1:
        y = attend(q, *_select_keys(k, v, mask, keys[0]), scale)
    else:
        y = _ring_attention(plan, q, k, v, mask, scale, keys)
    return move(plan, "tokens", y)[:, :, :heads]


def _by_heads(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Shards of tokens -> shards of heads; in one exchange where queries and keys are equally many."""
    if q.shape == k.shape:
        return move(plan, "heads", torch.stack([q, k, v])).unbind(0)
    return move(plan, "heads", q), *move(plan, "heads", torch.stack([k, v])).unbind(0)


def _select_keys(
    k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys, values and mask at the indices `keys` int64 of the key dimension."""
    return (
        k.index_select(1, keys),
        v.index_select(1, keys),
        None if mask is None else mask.index_select(3, keys),
    )


def _ring_attention(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    keys: Sequence[Tensor],
) -> Tensor:
    """Ring attention: attend to the keys of every rank in turn while the next shard is on its way."""
    ring, kv = plan.group("ring"), torch.stack([k, v])
    y = log = None
    for turn, real in enumerate(keys):
        last = turn + 1 == ring.size
        incoming = None if last else rotate(kv, ring)
        incoming_mask = None if last or mask is None else rotate(mask, ring)
        part, part_log = attend_with_log(q, *_select_keys(kv[0], kv[1], mask, real), scale)
        if y is None or log is None:
            y, log = part, part_log
        else:
            sum_log = torch.logaddexp(log, part_log)
            y, log = y * (log - sum_log).exp() + part * (part_log - sum_log).exp(), sum_log
        kv = kv if incoming is None else wait(incoming).view(kv.shape)
        mask = mask if incoming_mask is None or mask is None else wait(incoming_mask).view(mask.shape)
    assert y is not None
    return y.to(q.dtype)


def attend_with_log(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(attention [B, L, H, E], log of its denominator [B, L, H, 1]), both at least float32.

    mask: bool [B or 1, 1, 1, M], true where a key is attended to.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        if mask is None:
            y, log, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        else:
            bias = _as_bias(mask, q.dtype).expand(*q.shape[:-1], k.shape[2])
            y, log, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, scale=scale
            )
    elif q.is_cuda:
        y, log = _unfused(q, k, v, mask, scale)
    else:
        bias = None if mask is None else _as_bias(mask, q.dtype)
        y, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=scale
        )
    if mask is not None:  # where all keys are masked a kernel may return anything
        unattended = ~mask.any(-1)
        y, log = y.masked_fill(unattended[..., None], 0), log.masked_fill(unattended, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    return y.transpose(1, 2).to(wide), log[:, :, : q.shape[2]].transpose(1, 2)[..., None].to(wide)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is true, else -inf."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _unfused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    log = scores.logsumexp(-1)
    return (scores - log[..., None]).exp() @ v, log


def serves(backend: str, width: int, biased: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the backend's kernel runs for heads of this width and type, with a bias if `biased`.

    Only torch knows, so the kernel is run once on zeros.
    """
    x = torch.zeros(1, 16, 1, width, dtype=dtype, device=device)
    bias = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device) if biased else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason before it raises
        try:
            attention(Plan(attention=backend), x, x, x, bias)
        except RuntimeError:
            return False
    return True
