"""Stable Diffusion 3 and 3.5: text and image streams that meet in joint attention.

Source: arXiv 2403.03206 and the SD3Transformer2DModel checkpoints. Variants differ in `Config` only: 3.5
normalises queries and keys (`qk_norm`); in the first layers of 3.5-medium the image also attends to itself
alone (`dual_attention_layers`). Positions are a stored table; an image uses a rectangle in its middle. Pooled
text is added to the time, so every image has modulations of its own.

Shape letters: B batch, T text tokens, L image tokens, P latent values of a token, D width, E head width, S
steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models.encoders import clip_text, t5
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import IMAGE, TEXT, Streams, feed_forward, heads, joint_attention
from tinydiff.models.recipe import Context, LoopInputs, Patch, latent_size, on_grid, shift_by_tokens
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import modulate
from tinydiff.ops.rope import grid_positions
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, conv_rows, linear_rows, norm_rows, through, under
from tinydiff.parallel.sequence import keys
from tinydiff.records import Request

Tensors = dict[str, Tensor]

SINUSOIDS = 256


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 192
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(
                f"qk_norm is {self.qk_norm!r}; queries and keys are normalised by 'rms_norm' or not at all "
                "(None)"
            )
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}; it must be the width of the "
                f"network, {self.width}"
            )
        if not set(self.dual_attention_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"dual_attention_layers is {self.dual_attention_layers}; the network has layers 0 to "
                f"{self.num_layers - 1}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# --- weights


def _heads_rows(c: Config, names: tuple[str, ...]) -> Iterator[Row]:
    for name in names[:3]:
        yield from linear_rows(name, c.width, c.width, "out")
    if c.qk_norm is not None:
        for name in names[3:]:
            yield from norm_rows(name, c.attention_head_dim)


def _feed_forward_rows(c: Config, name: str) -> Iterator[Row]:
    yield from linear_rows(f"{name}.net.0.proj", c.width, 4 * c.width, "out")
    yield from linear_rows(f"{name}.net.2", 4 * c.width, c.width, "in")


def _block_rows(c: Config, dual: bool, last: bool) -> Iterator[Row]:
    d = c.width
    yield from through("steps", linear_rows("norm1.linear", d, (9 if dual else 6) * d))
    yield from through("steps", linear_rows("norm1_context.linear", d, (2 if last else 6) * d))
    yield from through("image", under("attn", _heads_rows(c, IMAGE)))
    yield from through("text", under("attn", _heads_rows(c, TEXT)))
    out = linear_rows("attn.to_out.0", d, d, "in", attends=("joint", "joint"))
    yield from through("image", out, _feed_forward_rows(c, "ff"))
    if dual:
        out = linear_rows("to_out.0", d, d, "in", attends=("image", "image"))
        yield from through("image", under("attn2", _heads_rows(c, IMAGE), out))
    if not last:
        out = linear_rows("attn.to_add_out", d, d, "in")
        yield from through("text", out, _feed_forward_rows(c, "ff_context"))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split."""
    d, embed = c.width, "time_text_embed"
    yield Row("pos_embed.pos_embed", (1, c.pos_embed_max_size**2, d))
    patches = conv_rows("pos_embed.proj", c.in_channels, d, (c.patch_size, c.patch_size))
    yield from through("image", patches)
    for name, fan_in in (("timestep_embedder", SINUSOIDS), ("text_embedder", c.pooled_projection_dim)):
        yield from linear_rows(f"{embed}.{name}.linear_1", fan_in, d)
        yield from linear_rows(f"{embed}.{name}.linear_2", d, d)
    yield from through("prompt", linear_rows("context_embedder", c.joint_attention_dim, d))
    for i in range(c.num_layers):
        rows = _block_rows(c, dual=i in c.dual_attention_layers, last=i == c.num_layers - 1)
        yield from under(f"transformer_blocks.{i}", rows)
    yield from through("steps", linear_rows("norm_out.linear", d, 2 * d))
    yield from through("image", linear_rows("proj_out", d, c.patch_size**2 * c.out_channels))


# --- what is computed once, before the loop

CONDS = (
    Cond("position", "image", dim=1),
    Cond("text", "text", dim=1),
)
"""The tensors of a request that belong to no block."""


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, joint_attention_dim], `pooled` [B, pooled_projection_dim], `positions` [L] of
    the image's tokens in the position table. timesteps_S: sigma * 1000.
    """
    embed, dtype = w / "time_text_embed", w.dtype
    position = w["pos_embed.pos_embed"][:, inputs["positions"]]
    text = linear(inputs["text"].to(dtype), w / "context_embedder")
    request = {"position": position, "text": text}

    sinusoid = timestep_embedding(timesteps_S, SINUSOIDS).to(dtype)
    time_S1D = embedder(sinusoid, embed / "timestep_embedder")[:, None]
    active = F.silu(time_S1D + embedder(inputs["pooled"].to(dtype), embed / "text_embedder"))
    names = [f"{at}.{norm}" for _, at in blocks(c) for norm in ("norm1", "norm1_context")] + ["norm_out"]
    return request, {
        name: torch.unflatten(linear(active, w / name / "linear"), -1, (-1, c.width)) for name in names
    }


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Latent tokens [B, L, P] -> text [B, T, D] and image [B, L, D] with its positions added."""
    image = linear(x_BLP.to(w.dtype), w / "pos_embed" / "proj") + request["position"]
    return request["text"].expand(len(image), -1, -1), image


def _joint(
    c: Config,
    plan: Plan,
    w: Weights,
    streams: Streams,
    request: Weights,
    shared: Tensors,
    shift: Tensor,
    scale: Tensor,
) -> Streams:
    """Joint attention and the image's half of the block -> (attention's result for the text, image).

    shift, scale: the text's modulation before attention.
    """
    text, image = streams
    modulations = request["norm1"].unsqueeze(2).unbind(1)
    (image_shift, image_scale, gate), (ff_shift, ff_scale, ff_gate) = modulations[:3], modulations[3:6]
    own = modulations[6:]
    a = w / "attn"
    y_text, y_image = joint_attention(
        plan,
        heads(a, modulate(text, shift, scale), c.attention_head_dim, names=TEXT),
        heads(a, modulate(image, image_shift, image_scale), c.attention_head_dim),
        shared,
    )
    x = image + linear_sum(plan, y_image, a / "to_out" / 0) * gate
    if own:
        own_shift, own_scale, own_gate = own
        a = w / "attn2"
        q, k, v = heads(a, modulate(image, own_shift, own_scale), c.attention_head_dim)
        y = attention(plan, q, k, v, keys=keys(plan, shared, "image")).flatten(2)
        x = x + linear_sum(plan, y, a / "to_out" / 0) * own_gate
    return y_text, x + feed_forward(plan, w / "ff", modulate(x, ff_shift, ff_scale), gelu_tanh) * ff_gate


def block(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Joint attention, then a feed-forward for each stream, all modulated.

    In dual-attention layers the image also attends to itself. request: `norm1` [B, 6, D], shift, scale
    and gate of attention, then of the feed-forward; [B, 9, D] in dual-attention layers, with those of the
    second attention; `norm1_context` [B, 6, D].
    """
    shift, scale, gate, ff_shift, ff_scale, ff_gate = request["norm1_context"].unsqueeze(2).unbind(1)
    y_text, image = _joint(c, plan, w, streams, request, shared, shift, scale)
    text = streams[0] + linear_sum(plan, y_text, w / "attn" / "to_add_out") * gate
    y = feed_forward(plan, w / "ff_context", modulate(text, ff_shift, ff_scale), gelu_tanh)
    return text + y * ff_gate, image


def last_block(
    c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors
) -> tuple[Tensor]:
    """The last block: it returns the image only, since nothing reads the text after it.

    request: `norm1` as in `block`; `norm1_context` [B, 2, D]: scale, shift.
    """
    scale, shift = request["norm1_context"].unsqueeze(2).unbind(1)
    return (_joint(c, plan, w, streams, request, shared, shift, scale)[1],)


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    last = c.num_layers - 1
    return [(block if i < last else last_block, f"transformer_blocks.{i}") for i in range(c.num_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """The image [B, L, D] -> predicted velocity of each token [B, L, P]."""
    scale, shift = step["norm_out"].unsqueeze(2).unbind(1)
    y = linear(modulate(streams[-1], shift, scale), w / "proj_out")
    return rearrange(y, "b l (patch c) -> b l (c patch)", c=c.out_channels)


# --- what a pipeline needs of this family


def positions(c: Config, size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Rows [L] of the position table for latents of `size` (1, height, width).

    They are a rectangle in the middle of the square table. Raises ValueError where the table is too
    small.
    """
    side = c.pos_embed_max_size
    height, width = (n // c.patch_size for n in size[1:])
    if max(height, width) > side:
        raise ValueError(f"latents of {height} x {width} patches; the position table holds {side} x {side}")
    row, column = grid_positions(height, width, device=device).unbind(-1)
    return side * (row + (side - height) // 2) + column + (side - width) // 2


CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Component of each CLIP -> that of its tokenizer."""


def _clip(context: Context, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Both CLIPs side by side: their last states but one [B, T, C] and their pooled texts [B, P].

    P is pooled_projection_dim.
    """
    states: list[Tensor] = []
    pooled: list[Tensor] = []
    for name, tokenizer in CLIPS.items():
        encoder = context.nets[name]
        ids, _ = context.tokens(tokenizer, texts, context.clip_tokens(name))
        encoded = clip_text.encode(encoder.config, encoder.plan, encoder.w, ids)
        assert encoded.projected is not None  # checked by `must_fit`
        states.append(encoded.hidden_states[-2])
        pooled.append(encoded.projected)
    return torch.cat(states, -1), torch.cat(pooled, -1)


def _t5(c: Config, context: Context, texts: list[str], length: int) -> Tensor:
    """T5's last states [B, length, joint_attention_dim], padding included; zeros for a model without T5."""
    if "text_encoder_3" not in context.nets:
        shape, dtype = (len(texts), length, c.joint_attention_dim), context.nets["text_encoder"].dtype
        return torch.zeros(shape, dtype=dtype, device=context.device)
    encoder = context.nets["text_encoder_3"]
    ids, _ = context.tokens("tokenizer_3", texts, length)
    return t5.encode(encoder.config, encoder.plan, encoder.w, ids)


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs: CLIP's states, filled up with zeros to T5's width, then T5's states.

    Padding is attended to like words.
    """
    vae = context.nets["vae"].config
    clip, pooled = _clip(context, request.texts)
    long = _t5(c, context, request.texts, request.text.max_tokens)
    text = torch.cat([F.pad(clip, (0, c.joint_attention_dim - clip.shape[-1])), long], 1)
    shared = {"positions": positions(c, latent_size(vae, request.output), context.device)}
    pairs = zip(text, pooled, strict=True)
    branches = [{"text": states[None], "pooled": one[None]} | shared for states, one in pairs]
    return on_grid(branches, vae, request.output, patch(c))


def patch(c: Config) -> Patch:
    """Latents per token along frames, height and width."""
    return 1, c.patch_size, c.patch_size


def mu(c: Config, tokens: int, steps: int, scheduler: Entries) -> float | None:
    """The dynamic shift of the schedule, which no released scheduler uses.

    The pipeline's own default of max_shift counts only where the scheduler's class has none.
    """
    euler = scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    return shift_by_tokens(tokens, scheduler, 1.15 if euler else 1.16)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    for field in ("in_channels", "out_channels"):
        yield field, nets["vae"].z_dim, "the vae's latents need"
    clips = [nets[name] for name in CLIPS]
    pooled = sum(clip.projection_dim for clip in clips if clip.projects)
    yield "pooled_projection_dim", pooled, "the two CLIPs give"
    if "text_encoder_3" in nets:
        yield "joint_attention_dim", nets["text_encoder_3"].d_model, "text_encoder_3 gives"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pooled=True,
    pipelines={"StableDiffusion3Pipeline": prepare},
    patch=patch,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    mu=mu,
    extra_components=lambda c: ("text_encoder_2", "tokenizer_2"),
    longest_side=lambda c: c.pos_embed_max_size * c.patch_size,
    leading_tokens=lambda c, configs: configs["text_encoder"].max_position_embeddings,
)
