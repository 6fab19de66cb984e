"""HunyuanVideo's token refiner: a few blocks that adapt the states of a text to each timestep.

Only the gates of its blocks depend on the step, so the text of all steps is computed once before the loop.
Source: arXiv 2412.03603 and the HunyuanVideo checkpoints. Shape letters: B batch, T text tokens, C values of
a text state, D width, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models import joint
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import compute_dtype, layer_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, through, under

FREQUENCIES = 256


def sinusoid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Timesteps [N] -> [N, FREQUENCIES], rounded to `dtype`."""
    return timestep_embedding(x, FREQUENCIES).to(dtype)


def spec(layers: int, fan_in: int, d: int) -> Iterator[Row]:
    """Every weight once. layers: of the refiner. fan_in: values of a text state. d: the width."""
    for name, width in (("timestep_embedder", FREQUENCIES), ("text_embedder", fan_in)):
        yield from linear_rows(f"time_text_embed.{name}.linear_1", width, d)
        yield from linear_rows(f"time_text_embed.{name}.linear_2", d, d)
    yield from linear_rows("proj_in", fan_in, d)
    blocks = "token_refiner.refiner_blocks"
    yield from repeat(blocks, layers - 1, _block_rows(d))
    for row in under(f"{blocks}.{layers - 1}", _block_rows(d)):  # its result is kept for every step
        yield from through("prompt_steps", [row]) if row.name.endswith("net.2.weight") else [row]


def _block_rows(d: int) -> Iterator[Row]:
    yield from norm_rows("norm1", d, bias=True)
    for name in ("to_q", "to_k", "to_v"):
        yield from linear_rows(f"attn.{name}", d, d, "out")
    yield from linear_rows("attn.to_out.0", d, d, "in")
    yield from norm_rows("norm2", d, bias=True)
    yield from linear_rows("ff.net.0.proj", d, 4 * d, "out")
    yield from linear_rows("ff.net.2", 4 * d, d, "in")
    yield from linear_rows("norm_out.linear", d, 2 * d)


def refined(plan: Plan, w: Weights, text_BTC: Tensor, timesteps_S: Tensor, layers: int, head: int) -> Tensor:
    """The states of a text without padding -> the text at each step [S, B, T, D]. head: width of a head."""
    dtype, embed = w.dtype, w / "time_text_embed"
    mean_BC = text_BTC.to(compute_dtype(text_BTC)).mean(1).to(dtype)
    time_S1D = embedder(sinusoid(timesteps_S, dtype), embed / "timestep_embedder")[:, None]
    active_SBD = F.silu(time_S1D + embedder(mean_BC, embed / "text_embedder"))
    text_BTD = linear(text_BTC, w / "proj_in")

    def refine(active_BD: Tensor) -> Tensor:
        x = text_BTD
        for i in range(layers):
            x = _block(plan, w / "token_refiner" / "refiner_blocks" / i, x, active_BD, head)
        return x

    return torch.stack([refine(active) for active in active_SBD])


def _block(plan: Plan, w: Weights, x_BTD: Tensor, active_BD: Tensor, head: int) -> Tensor:
    """Attention of the text to itself and a feed-forward, both gated by the time."""
    gate, ff_gate = linear(active_BD, w / "norm_out" / "linear")[:, None].chunk(2, -1)
    q, k, v = joint.heads(w / "attn", layer_norm(x_BTD, w / "norm1"), head)
    x = x_BTD + linear_sum(plan, attention(plan, q, k, v).flatten(2), w / "attn" / "to_out" / 0) * gate
    return x + joint.feed_forward(plan, w / "ff", layer_norm(x, w / "norm2"), F.silu) * ff_gate
