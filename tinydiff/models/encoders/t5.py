"""The encoder half of T5 v1.1 and its relatives: UMT5 (a position table in every block) and ByT5.

Source: arXiv 1910.10683, 2304.09151. Attention is not scaled; positions enter as a learned bias per head,
bucketed by distance. Shape letters: B batch, T tokens, C width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries, typed
from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.family import Encoder
from tinydiff.ops.activations import Activation, gelu_tanh
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import lookup
from tinydiff.ops.linear import embedding, linear, linear_sum
from tinydiff.ops.norm import rms_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, under

ACTIVATIONS: dict[str, Activation] = {"gelu_new": gelu_tanh, "gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json. Fields that change no number are left out."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "gelu_new"
    is_gated_act: bool = True
    model_type: str = "umt5"

    def __post_init__(self) -> None:
        if self.dense_act_fn not in ACTIVATIONS:
            raise ValueError(f"dense_act_fn is {self.dense_act_fn!r}; known are {', '.join(ACTIVATIONS)}")
        exact = self.relative_attention_num_buckets // 4
        if not 1 <= exact < self.relative_attention_max_distance:
            buckets = f"relative_attention_num_buckets is {self.relative_attention_num_buckets}"
            more = f"relative_attention_max_distance, {self.relative_attention_max_distance}"
            raise ValueError(f"{buckets}; it must be at least 4, and a quarter of it less than {more}")

    @property
    def biased_blocks(self) -> range:
        """Blocks with a position table of their own; the others use that of block 0."""
        return range(self.num_layers if self.model_type == "umt5" else 1)


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a config.json, of an encoder or of a whole T5.

    class_name: UMT5EncoderModel or T5EncoderModel, as in transformers. Raises ValueError, one sentence,
    for what is not implemented.
    """
    kind, usual = ("umt5", "gated-gelu") if class_name.startswith("UMT5") else ("t5", "relu")
    proj = entries.get("feed_forward_proj", usual)
    gate, _, act = proj.rpartition("-") if isinstance(proj, str) else ("?", "", "")
    if gate not in ("", "gated"):
        raise ValueError(
            f"feed_forward_proj is {proj!r}; it must be an activation such as 'relu', or 'gated-' and one"
        )
    derived = {
        "dense_act_fn": "gelu_new" if proj == "gated-gelu" else act,
        "is_gated_act": bool(gate),
        "model_type": kind,
    }
    return Config(**typed(Config, {**entries, **derived}))


def _attention_rows(c: Config, biased: bool) -> Iterator[Row]:
    inner = c.num_heads * c.d_kv
    for name in ("q", "k", "v"):
        yield from linear_rows(f"SelfAttention.{name}", c.d_model, inner, "out", bias=False, head=c.d_kv)
    yield from linear_rows("SelfAttention.o", inner, c.d_model, "in", bias=False, head=c.d_kv)
    if biased:
        yield Row(
            "SelfAttention.relative_attention_bias.weight",
            (c.relative_attention_num_buckets, c.num_heads),
            split=1,
        )
    yield from norm_rows("layer_norm", c.d_model)


def _dense_rows(c: Config) -> Iterator[Row]:
    for name in ("wi_0", "wi_1") if c.is_gated_act else ("wi",):
        yield from linear_rows(f"DenseReluDense.{name}", c.d_model, c.d_ff, "out", bias=False)
    yield from linear_rows("DenseReluDense.wo", c.d_ff, c.d_model, "in", bias=False)
    yield from norm_rows("layer_norm", c.d_model)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once."""
    yield Row("shared.weight", (c.vocab_size, c.d_model), split=0, tied=True)
    for i in range(c.num_layers):
        yield from under(f"encoder.block.{i}.layer.0", _attention_rows(c, i in c.biased_blocks))
        yield from under(f"encoder.block.{i}.layer.1", _dense_rows(c))
    yield from norm_rows("encoder.final_layer_norm", c.d_model)


def key_map(c: Config) -> KeyMap:
    """A whole T5 has another half; `encoder.embed_tokens` is `shared`'s second name."""
    return KeyMap((*unread("decoder", "lm_head"), also("encoder.embed_tokens", "shared")))


def buckets(c: Config, length: int, device: torch.device | str | None = None) -> Tensor:
    """Bucket [T, T] of each (query, key) pair by their distance.

    Half of the buckets are for keys behind the query. Near keys have exact buckets, far keys logarithmic
    ones.
    """
    at = torch.arange(length, device=device)
    offset = at[None, :] - at[:, None]
    half = c.relative_attention_num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    span = math.log(c.relative_attention_max_distance / exact)
    ratio = torch.log(distance.clamp_min(1).float() / exact) / span
    far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(offset > 0, half, 0) + torch.where(distance < exact, distance, far)


def encode(c: Config, plan: Plan, w: Weights, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Token ids [B, T] int64 and mask [B, T] -> last hidden states [B, T, C].

    mask: 1 for tokens, 0 for padding, which is not attended to.
    """
    x = lookup(plan, ids_BT, w / "shared")
    bucket = buckets(c, ids_BT.shape[1], ids_BT.device)
    hidden = None if mask_BT is None else (mask_BT[:, None, None] == 0)
    bias = None
    for i in range(c.num_layers):
        block = w / "encoder" / "block" / i / "layer"
        a = block / 0 / "SelfAttention"
        if i in c.biased_blocks:
            bias = embedding(bucket[None], a / "relative_attention_bias").permute(0, 3, 1, 2)
            if hidden is not None:
                bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        y = rms_norm(x, block / 0 / "layer_norm", c.layer_norm_epsilon)
        q, k, v = (torch.unflatten(linear(y, a / name), -1, (-1, c.d_kv)) for name in ("q", "k", "v"))
        x = x + linear_sum(plan, attention(plan, q, k, v, bias, scale=1.0).flatten(2), a / "o")
        y = rms_norm(x, block / 1 / "layer_norm", c.layer_norm_epsilon)
        x = x + _dense(c, plan, block / 1 / "DenseReluDense", y)
    return rms_norm(x, w / "encoder" / "final_layer_norm", c.layer_norm_epsilon)


def _dense(c: Config, plan: Plan, w: Weights, x: Tensor) -> Tensor:
    act = ACTIVATIONS[c.dense_act_fn]
    y = act(linear(x, w / "wi_0")) * linear(x, w / "wi_1") if c.is_gated_act else act(linear(x, w / "wi"))
    return linear_sum(plan, y, w / "wo")


FAMILY = Encoder(
    "text_encoder",
    Config,
    spec,
    head_width=lambda c: c.d_kv,
    biased=True,
    keys=key_map,
    read=config_from,
)
