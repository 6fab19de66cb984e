"""LTX-2.5's duration head: how many seconds the shot lasts that a prompt describes.

Learned queries attend to the prompts of video and sound, as the connectors give them; a small network makes
the logarithm of the seconds of what they find. Source: the LTX2DurationHead checkpoints.

Shape letters: B batch, T text tokens, D width of the pooler, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinydiff.models.family import Encoder
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.attention import attention
from tinydiff.ops.linear import linear
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows

STREAMS = ("video", "audio")


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    video_cross_attention_dim: int = 4096
    audio_cross_attention_dim: int = 2048
    pooler_hidden_dim: int = 256
    num_queries: int = 1
    num_pooler_heads: int = 4
    mlp_hidden_dim: int = 256

    def __post_init__(self) -> None:
        if self.pooler_hidden_dim % self.num_pooler_heads:
            raise ValueError(
                f"pooler_hidden_dim is {self.pooler_hidden_dim}; it must be a multiple of num_pooler_heads, "
                f"{self.num_pooler_heads}"
            )

    @property
    def head_width(self) -> int:
        return self.pooler_hidden_dim // self.num_pooler_heads


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name and shape. The head is small, so every rank has it whole."""
    d = c.pooler_hidden_dim
    for stream, width in zip(
        STREAMS, (c.video_cross_attention_dim, c.audio_cross_attention_dim), strict=True
    ):
        yield from linear_rows(f"{stream}_input_proj", width, d)
        yield Row(f"{stream}_modality_emb", (d,))
    yield Row("attention_pooler.query_tokens", (c.num_queries, d))
    for name in ("to_q", "to_k", "to_v", "to_out"):
        yield from linear_rows(f"attention_pooler.{name}", d, d)
    yield from linear_rows("mlp_hidden", d * c.num_queries, c.mlp_hidden_dim)
    yield from linear_rows("mlp_out", c.mlp_hidden_dim, 1)


def seconds(c: Config, plan: Plan, w: Weights, video_BTW: Tensor, audio_BTW: Tensor) -> Tensor:
    """The prompts of video and of sound [B, T, width of each] -> seconds [B]."""
    streams = zip(STREAMS, (video_BTW, audio_BTW), strict=True)
    projected = [
        linear(x.to(w.dtype), w / f"{name}_input_proj") + w[f"{name}_modality_emb"] for name, x in streams
    ]
    tokens, pooler = torch.cat(projected, 1), w / "attention_pooler"
    queries = pooler["query_tokens"].expand(len(tokens), -1, -1)
    q, k, v = (
        torch.unflatten(linear(x, pooler / name), -1, (-1, c.head_width))
        for x, name in ((queries, "to_q"), (tokens, "to_k"), (tokens, "to_v"))
    )
    pooled = linear(attention(plan, q, k, v).flatten(2), pooler / "to_out").flatten(1)
    return linear(gelu_tanh(linear(pooled, w / "mlp_hidden")), w / "mlp_out")[:, 0].exp()


FAMILY = Encoder(
    role="text_encoder",
    config=Config,
    spec=spec,
    head_width=lambda c: c.head_width,
    biased=False,
)
