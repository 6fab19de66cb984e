"""Decoder language models as text encoders: Llama, Mistral, Ministral 3, Qwen 2.5 (VL), Qwen 3, Gemma 2 to 4.

All are one stack. Source: arXiv 2302.13971 (Llama), 2310.06825, 2502.13923, 2505.09388, 2408.00118,
2503.19786, and the Gemma4Unified classes of transformers. `decoder_config` holds their differences;
`decoder_generate` generates text with them. Only the layers up to the last state wanted are built.

Shape letters: B batch, T tokens computed, S tokens they may see, C width, H heads, D head width, A axes of a
position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.encoders.decoder_config import ACTIVATIONS, CLASSES, SLIDING, Config, Rope, config_from
from tinydiff.models.family import Encoder
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import lookup
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import compute_dtype, rms_norm
from tinydiff.ops.rope import rotate_half
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, under

__all__ = [
    "CLASSES",
    "Config",
    "Rope",
    "block",
    "config_from",
    "embed",
    "encode",
    "frequencies",
    "key_map",
    "last_norm",
    "spec",
    "views",
]

# --- weights


def _layer_rows(c: Config, kind: str) -> Iterator[Row]:
    d, (width, keys, keys_are_values) = c.hidden_size, c.heads(kind)
    yield from norm_rows("input_layernorm", d)
    for name, heads in (("q_proj", c.num_attention_heads), ("k_proj", keys), ("v_proj", keys)):
        if name != "v_proj" or not keys_are_values:
            yield from linear_rows(f"self_attn.{name}", d, heads * width, "out", bias=c.qkv_bias, head=width)
    yield from linear_rows(
        "self_attn.o_proj", c.num_attention_heads * width, d, "in", bias=c.o_bias, head=width
    )
    if c.qk_norm:
        yield from norm_rows("self_attn.q_norm", width)
        yield from norm_rows("self_attn.k_norm", width)
    yield from norm_rows("post_attention_layernorm", d)
    if c.sandwich_norms:
        yield from norm_rows("pre_feedforward_layernorm", d)
        yield from norm_rows("post_feedforward_layernorm", d)
    for name in ("gate_proj", "up_proj"):
        yield from linear_rows(f"mlp.{name}", d, c.intermediate_size, "out", bias=c.mlp_bias)
    yield from linear_rows("mlp.down_proj", c.intermediate_size, d, "in", bias=c.mlp_bias)
    if c.layer_scalars:
        yield Row("layer_scalar", (1,))


def spec(c: Config) -> Iterator[Row]:
    """Every weight that is read, once, under the names of the text model alone.

    `key_map` maps the released names to them.
    """
    yield Row("embed_tokens.weight", (c.vocab_size, c.hidden_size), split=0, tied=c.tie_word_embeddings)
    for i, kind in enumerate(c.layer_types[: c.layers]):
        yield from under(f"layers.{i}", _layer_rows(c, kind))
    if c.final_norm:
        yield from norm_rows("norm", c.hidden_size)
    if c.lm_head and not c.tie_word_embeddings:
        yield Row("lm_head.weight", (c.vocab_size, c.hidden_size), split=0)


TOWERS = (
    "visual", "vision_tower", "vision_model", "multi_modal_projector", "audio_tower", "vision_embedder",
    "embed_vision", "embed_audio",
)  # fmt: skip
"""The first parts of keys of vision and audio towers beside a language model."""


PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""Prefixes of the text model's names in released files."""


def key_map(c: Config) -> KeyMap:
    """Other towers, the output head and layers beyond `c.layers` are unread.

    A tied output head is the embeddings' second name.
    """
    beyond = tuple(f"layers.{i}" for i in range(c.layers, c.num_hidden_layers))
    left = (*TOWERS, *beyond, "rotary_emb", "layers.*.self_attn.rotary_emb")
    if not c.final_norm:
        left = (*left, "norm")
    if not c.lm_head and not c.tie_word_embeddings:
        left = (*left, "lm_head")
    head = "embed_tokens" if c.tie_word_embeddings else "lm_head"
    named = {"embed_tokens": "embed_tokens", "layers": "layers", "norm": "norm", "lm_head": head}
    return KeyMap(
        tuple(
            line
            for prefix in PREFIXES
            for line in (
                *unread(*(prefix + name for name in left)),
                *(also(prefix + name, row) for name, row in named.items() if prefix + name != row),
            )
        )
    )


# --- positions and masks


def frequencies(rope: Rope, dim: int) -> tuple[Tensor, float]:
    """(radians per position of each channel pair [dim / 2], factor of cosines and sines).

    Float32, as the references keep them. Source of the scalings: arXiv 2306.15595 (linear), Llama 3.1's
    code (llama3), arXiv 2309.00071 (yarn).
    """
    wavelength = rope.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
    plain, factor, trained = 1.0 / wavelength, rope.factor, rope.original_max_position_embeddings
    match rope.rope_type:
        case "linear":
            return plain / factor, 1.0
        case "llama3":
            period = 2 * math.pi / plain
            blend = (trained / period - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            mixed = (1 - blend) * plain / factor + blend * plain
            slow, fast = period > trained / rope.low_freq_factor, period < trained / rope.high_freq_factor
            return torch.where(slow, plain / factor, torch.where(fast, plain, mixed)), 1.0
        case "yarn":
            turns = (rope.beta_fast, rope.beta_slow)
            low, high = (
                dim * math.log(trained / (turn * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
                for turn in turns
            )
            if rope.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            ramp = (torch.arange(dim // 2).float() - low) / (high - low if high > low else 1e-3)
            kept = 1 - ramp.clamp(0, 1)
            return 1.0 / (factor * wavelength) * (1 - kept) + plain * kept, _yarn_factor(rope)
        case "proportional":
            turning = int(rope.partial_rotary_factor * dim // 2)
            return F.pad(plain[:turning], (0, dim // 2 - turning)) / factor, 1.0
        case _:  # "default"
            return plain, 1.0


def _yarn_factor(rope: Rope) -> float:
    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)


class View(NamedTuple):
    """Positions and masks of the tokens, as the layers of one kind read them.

    cos, sin: [B or 1, T, D / 2]. mask: [B or 1, 1, T, S], 0 where a token sees another, else -inf. blind:
    bool [B or 1, T, 1, 1], tokens that see nothing (padding on the left). stretch: [B or 1, T, 1, 1],
    factor of the queries, or None.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor
    blind: Tensor
    stretch: Tensor | None

    @property
    def head_width(self) -> int:
        return 2 * self.cos.shape[-1]


def views(c: Config, positions: Tensor, mask_BS: Tensor, like: Tensor) -> dict[str, View]:
    """Kind of layer -> its View, for tokens at `positions` [B or 1, T], or [3, B or 1, T] on three axes.

    The T tokens are the last of the S that mask_BS counts.
    """
    local = c.local_rope_parameters or c.rope_parameters
    ropes = {kind: local if kind == SLIDING else c.rope_parameters for kind in set(c.layer_types[: c.layers])}
    return {
        kind: _view(
            rope,
            c.heads(kind).width,
            c.sliding_window if kind == SLIDING else None,
            positions,
            mask_BS,
            like,
        )
        for kind, rope in ropes.items()
    }


def _view(
    rope: Rope, head_width: int, window: int | None, positions: Tensor, mask_BS: Tensor, like: Tensor
) -> View:
    device = positions.device
    turn, factor = frequencies(rope, head_width)
    at = positions[..., None]
    if positions.ndim == 3:
        if not rope.mrope_section:
            raise ValueError("positions on three axes need a rope with mrope_section")
        axis = torch.repeat_interleave(
            torch.arange(3, device=device), torch.tensor(rope.mrope_section, device=device)
        )
        at = positions.movedim(0, -1)[..., axis]
    wide = compute_dtype(like)
    angle = at.to(wide) * turn.to(device, wide)
    cos, sin = ((table * factor).to(like.dtype) for table in (angle.cos(), angle.sin()))

    key = torch.arange(mask_BS.shape[1], device=device)
    query = key[-positions.shape[-1] :, None]
    near = key <= query if window is None else (key <= query) & (key > query - window)
    seen = near & mask_BS[:, None, None].bool()
    blind = ~seen.any(-1, keepdim=True)
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=device).masked_fill(~(seen | blind), -math.inf)

    stretch = None
    if rope.llama_4_scaling_beta:
        lengths = torch.floor(positions / rope.original_max_position_embeddings)
        stretch = (1 + rope.llama_4_scaling_beta * torch.log(1 + lengths)).to(like.dtype)[..., None, None]
    return View(cos, sin, mask, blind.transpose(1, 2), stretch)


# --- the network


def embed(c: Config, plan: Plan, w: Weights, ids_BT: Tensor) -> Tensor:
    """Token ids [B, T] int64 -> their embeddings [B, T, C], the network's state 0."""
    x = lookup(plan, ids_BT, w / "embed_tokens")
    # The references round the root to float32, then to x's type.
    return x * torch.tensor(c.hidden_size**0.5).to(x) if c.scale_embeddings else x


def last_norm(c: Config, w: Weights, x: Tensor) -> Tensor:
    """The norm after the model's last layer."""
    return _norm(c, x, w / "norm")


def encode(
    c: Config,
    plan: Plan,
    w: Weights,
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    take: tuple[int, ...],
    positions: Tensor | None = None,
    embeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Token ids [B, T] int64 and mask [B, T] -> the hidden states [B, T, C] named by `take`.

    mask: 1 for tokens, 0 for padding on either side. take: 0 for the embeddings, i for the output of
    layer i; that of the model's last layer is normalised. This is the numbering of transformers'
    hidden_states. positions: [B, T], or [3, B, T] on three axes; by default 0, 1, 2, ... with padding
    counted. embeds: [B, T, C] in place of the embeddings of the ids, where images stand among the words.
    """
    if beyond := [state for state in take if not 0 <= state <= c.layers]:
        raise ValueError(
            f"take has state {beyond[0]}; a stack of {c.layers} layers has states 0 to {c.layers}"
        )
    x = embed(c, plan, w, ids_BT) if embeds is None else embeds
    at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
    view = views(c, at, x.new_ones(1, x.shape[1]) if mask_BT is None else mask_BT, x)
    states = {0: x}
    for i in range(max(take)):
        x, _ = block(c, plan, w / "layers" / i, x, view[c.layer_types[i]])
        if i + 1 in take:
            states[i + 1] = last_norm(c, w, x) if i + 1 == c.num_hidden_layers else x
    return tuple(states[state] for state in take)


def block(
    c: Config, plan: Plan, w: Weights, x_BTC: Tensor, view: View, past: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer -> (x [B, T, C], keys and values [B, S, H, D] of all tokens so far).

    past: keys and values of the tokens before these.
    """
    y, cache = _attention(c, plan, w / "self_attn", _norm(c, x_BTC, w / "input_layernorm"), view, past)
    if c.sandwich_norms:
        x = x_BTC + _norm(c, y, w / "post_attention_layernorm")
        y = _dense(c, plan, w / "mlp", _norm(c, x, w / "pre_feedforward_layernorm"))
        x = x + _norm(c, y, w / "post_feedforward_layernorm")
        return x * w["layer_scalar"].to(x.dtype) if c.layer_scalars else x, cache
    x = x_BTC + y
    return x + _dense(c, plan, w / "mlp", _norm(c, x, w / "post_attention_layernorm")), cache


def _attention(
    c: Config, plan: Plan, w: Weights, x: Tensor, view: View, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    def heads(name: str) -> Tensor:
        return torch.unflatten(linear(x, w / name), -1, (-1, view.head_width))

    q, k = heads("q_proj"), heads("k_proj")
    v = heads("v_proj") if "v_proj.weight" in w else k
    if c.value_norm:
        v = F.rms_norm(v, v.shape[-1:], None, c.rms_norm_eps)
    if c.qk_norm:
        q, k = _norm(c, q, w / "q_norm"), _norm(c, k, w / "k_norm")
    q, k = rotate_half(q, view.cos, view.sin), rotate_half(k, view.cos, view.sin)
    if view.stretch is not None:
        q = q * view.stretch
    if past is not None:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    cache = (k, v)
    k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in cache)
    scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
    cap = c.attn_logit_softcapping
    y = attention(plan, q, k, v, view.mask, scale) if cap is None else _capped(q, k, v, view.mask, scale, cap)
    return linear_sum(plan, y.masked_fill(view.blind, 0).flatten(2), w / "o_proj"), cache


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention whose scores are squeezed into (-cap, cap); no fused kernel does this."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    weights = (cap * torch.tanh(scores / cap) + mask).softmax(-1, dtype=compute_dtype(q)).to(q.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _dense(c: Config, plan: Plan, w: Weights, x: Tensor) -> Tensor:
    y = ACTIVATIONS[c.hidden_act](linear(x, w / "gate_proj")) * linear(x, w / "up_proj")
    return linear_sum(plan, y, w / "down_proj")


def _norm(c: Config, x: Tensor, w: Weights) -> Tensor:
    if not c.norm_plus_one:
        return rms_norm(x, w, c.rms_norm_eps)
    wide = x.to(compute_dtype(x))
    return F.rms_norm(wide, x.shape[-1:], 1 + w["weight"].to(wide.dtype), c.rms_norm_eps).to(x.dtype)


FAMILY = Encoder(
    "text_encoder",
    Config,
    spec,
    head_width=lambda c: c.head_dim,
    biased=True,
    keys=key_map,
    read=config_from,
)
