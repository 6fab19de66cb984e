"""Wan 2.1 and 2.2: video transformers with self-attention over the video and cross-attention to the text.

Source: arXiv 2503.20314 and the WanTransformer3DModel checkpoints. Variants differ in `Config` only: text to
video (16 channels in); image to video (36 channels: latents, mask and encoded image side by side; Wan2.1 adds
cross-attention to CLIP's tokens of the image); TI2V (48 channels, the tokens of an input first frame stay
clean, at timestep 0).

Shape letters: B batch, L latent tokens, P latent values of a token, D width, H heads, E head width, T text
tokens, S steps.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.keymap import KeyMap, unread
from tinydiff.models.encoders import clip_vision, t5
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import Context, GivenTokens, LoopInputs, first_frame, latent_size, on_grid
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, layer_norm, modulate, rms_norm_across
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions, rope_table, rotate_interleaved
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.parallel.sequence import keys, without_sequence
from tinydiff.records import Request

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(
                f"qk_norm is {self.qk_norm!r}; Wan normalises queries and keys by 'rms_norm_across_heads'"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# --- weights


def _self_attention_rows(c: Config) -> Iterator[Row]:
    d = c.width
    for key in ("to_q", "to_k", "to_v"):
        yield from linear_rows(f"attn1.{key}", d, d, "out")
    yield from linear_rows("attn1.to_out.0", d, d, "in", attends=("image", "image"))
    for key in ("norm_q", "norm_k"):
        yield from norm_rows(f"attn1.{key}", d, split=0)


def _cross_attention_rows(c: Config) -> Iterator[Row]:
    d, added = c.width, c.added_kv_proj_dim
    yield from through("image", linear_rows("attn2.to_q", d, d, "out"))
    for key in ("to_k", "to_v"):
        yield from through("prompt", linear_rows(f"attn2.{key}", d, d, "out"))
    yield from through("image", linear_rows("attn2.to_out.0", d, d, "in", attends=("image", "prompt")))
    yield from through("image", norm_rows("attn2.norm_q", d, split=0))
    yield from norm_rows("attn2.norm_k", d, split=0)
    if added is not None:
        key = linear_rows("attn2.add_k_proj", added, d, "out", attends=("image", "views"))
        yield from through("views", key, linear_rows("attn2.add_v_proj", added, d, "out"))
        yield from norm_rows("attn2.norm_added_k", d, split=0)


def _block_rows(c: Config) -> Iterator[Row]:
    d = c.width
    yield Row("scale_shift_table", (1, 6, d), float32=True)
    yield from through("image", _self_attention_rows(c))
    yield from _cross_attention_rows(c)
    if c.cross_attn_norm:
        yield from norm_rows("norm2", d, bias=True, float32=True)
    yield from through("image", linear_rows("ffn.net.0.proj", d, c.ffn_dim, "out"))
    yield from through("image", linear_rows("ffn.net.2", c.ffn_dim, d, "in"))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split, and whether it stays float32."""
    d, embed = c.width, "condition_embedder"
    yield Row("scale_shift_table", (1, 2, d), float32=True)
    yield Row("patch_embedding.weight", (d, c.in_channels, *c.patch_size), input="image")
    yield Row("patch_embedding.bias", (d,))
    yield from linear_rows(f"{embed}.time_embedder.linear_1", c.freq_dim, d, float32=True)
    yield from linear_rows(f"{embed}.time_embedder.linear_2", d, d, float32=True)
    yield from through("steps", linear_rows(f"{embed}.time_proj", d, 6 * d))
    yield from linear_rows(f"{embed}.text_embedder.linear_1", c.text_dim, d)
    yield from linear_rows(f"{embed}.text_embedder.linear_2", d, d)
    if c.image_dim is not None:
        image = f"{embed}.image_embedder"
        yield from norm_rows(f"{image}.norm1", c.image_dim, bias=True, float32=True)
        yield from linear_rows(f"{image}.ff.net.0.proj", c.image_dim, c.image_dim)
        yield from linear_rows(f"{image}.ff.net.2", c.image_dim, d)
        yield from norm_rows(f"{image}.norm2", d, bias=True, float32=True)
        if c.pos_embed_seq_len is not None:
            yield Row(f"{image}.pos_embed", (1, c.pos_embed_seq_len, c.image_dim))
    yield from repeat("blocks", c.num_layers, _block_rows(c))
    yield from through("image", linear_rows("proj_out", d, c.out_channels * prod(c.patch_size)))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", shared=True),
    Cond("sin", "image", shared=True),
    Cond("frozen", "image", dim=1, shared=True),
    Cond("frozen_modulation", shared=True),
    Cond("concat", "image", dim=1),
    Cond("frozen_time"),
)
"""The tensors of a request that belong to no block."""


def _time(c: Config, w: Weights, t_S: Tensor, angles: torch.dtype) -> tuple[Tensor, Tensor]:
    """Timesteps [S] -> time embedding [S, D] and the six modulations of all blocks [S, 6, D]."""
    w = w / "condition_embedder"
    e = w / "time_embedder"
    sinusoid = timestep_embedding(t_S, c.freq_dim, dtype=angles).to(
        torch.promote_types(w.dtype, torch.float32)
    )
    time = linear(F.silu(linear(sinusoid, e / "linear_1")), e / "linear_2").to(w.dtype)
    return time, torch.unflatten(linear(F.silu(time), w / "time_proj"), -1, (6, -1))


def _image(c: Config, w: Weights, image: Tensor) -> Tensor:
    """CLIP's tokens of the input images [B, N, C] -> [B', N', D].

    With a position table the tokens of two images make one row.
    """
    if c.pos_embed_seq_len is not None:
        image = image.reshape(-1, c.pos_embed_seq_len, image.shape[-1]) + w["pos_embed"]
    ff = w / "ff" / "net"
    y = linear(F.gelu(linear(layer_norm(image, w / "norm1", 1e-5), ff / "0.proj")), ff / 2)
    return layer_norm(y, w / "norm2", 1e-5)


def hoist(
    c: Config,
    plan: Plan,
    w: Weights,
    inputs: Tensors,
    timesteps_S: Tensor,
    angles: torch.dtype = torch.float32,
) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, text_dim], `positions` [L, 3] of the tokens on the latent grid and, where the
    variant has them: `image` [B, N, image_dim], CLIP's tokens; `concat` [B, L, P'], channels beside the
    latents; `frozen` [1, L, 1] bool, the tokens of input frames, at timestep 0. timesteps_S: sigma *
    1000. angles: the type of sinusoids and rope tables, float32 as diffusers has them.
    """
    embed = w / "condition_embedder"
    text = embed / "text_embedder"
    text_states = linear(
        F.gelu(linear(inputs["text"].to(w.dtype), text / "linear_1"), approximate="tanh"), text / "linear_2"
    )
    image = _image(c, embed / "image_embedder", inputs["image"].to(w.dtype)) if "image" in inputs else None

    third = 2 * (c.attention_head_dim // 6)
    rope = rope_table(inputs["positions"], (c.attention_head_dim - 2 * third, third, third))
    cos, sin = (table.to(angles) for table in rope)
    request = {"cos": cos, "sin": sin} | {
        name: inputs[name] for name in ("concat", "frozen") if name in inputs
    }

    heads = (-1, c.attention_head_dim)
    for _, at in blocks(c):
        a = w / at / "attn2"
        key = rms_norm_across(plan, linear(text_states, a / "to_k"), a / "norm_k", c.eps)
        request[f"{at}.attn2.k"] = torch.unflatten(key, -1, heads)
        request[f"{at}.attn2.v"] = torch.unflatten(linear(text_states, a / "to_v"), -1, heads)
        if image is not None:
            key = rms_norm_across(plan, linear(image, a / "add_k_proj"), a / "norm_added_k", c.eps)
            request[f"{at}.attn2.image_k"] = torch.unflatten(key, -1, heads)
            request[f"{at}.attn2.image_v"] = torch.unflatten(linear(image, a / "add_v_proj"), -1, heads)

    time, modulation = _time(c, w, timesteps_S, angles)
    if "frozen" in inputs:
        zero = torch.zeros_like(timesteps_S[:1])
        request["frozen_time"], request["frozen_modulation"] = _time(c, w, zero, angles)
    return request, {"time": time[:, None], "modulation": modulation[:, None]}


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Tensor:
    """Latent tokens [B, L, P] -> [B, L, D]."""
    if "concat" in request:
        x_BLP = torch.cat([x_BLP, request["concat"].to(x_BLP.dtype).expand(x_BLP.shape[0], -1, -1)], -1)
    return linear(x_BLP.to(w.dtype), w / "patch_embedding")


def _modulations(
    table: Tensor, step: Tensor, frozen_step: Tensor | None, frozen: Tensor | None, x: Tensor
) -> list[Tensor]:
    """table [1, n, D] + step [B, n, D] -> n tensors [B, 1, D], or [B, L, D] with frozen tokens.

    Frozen tokens have the modulation of timestep 0, `frozen_step` [1, n, D].
    """
    dtype = compute_dtype(x)
    moving = (table + step.to(dtype)).unsqueeze(2).unbind(1)
    if frozen_step is None or frozen is None:
        return list(moving)
    fixed = (table + frozen_step.to(dtype)).unsqueeze(2).unbind(1)
    return [torch.where(frozen, a, b) for a, b in zip(fixed, moving, strict=True)]


def block(c: Config, plan: Plan, w: Weights, x_BLD: Tensor, request: Weights, shared: Tensors) -> Tensor:
    """Self-attention, cross-attention, feed-forward; the first and the last modulated by the time."""
    heads, all_tokens = (-1, c.attention_head_dim), without_sequence(plan)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = _modulations(
        w["scale_shift_table"],
        shared["modulation"],
        shared.get("frozen_modulation"),
        shared.get("frozen"),
        x_BLD,
    )
    a = w / "attn1"
    y = modulate(x_BLD, shift, scale, c.eps)
    q, k = (
        rotate_interleaved(
            torch.unflatten(rms_norm_across(plan, linear(y, a / to), a / norm, c.eps), -1, heads),
            shared["cos"],
            shared["sin"],
        )
        for to, norm in (("to_q", "norm_q"), ("to_k", "norm_k"))
    )
    y = attention(
        plan, q, k, torch.unflatten(linear(y, a / "to_v"), -1, heads), keys=keys(plan, shared, "image")
    ).flatten(2)
    x_BLD = (x_BLD + linear_sum(plan, y, a / "to_out" / 0) * gate).to(x_BLD.dtype)

    a, text = w / "attn2", request / "attn2"
    y = layer_norm(x_BLD, w / "norm2", c.eps) if c.cross_attn_norm else x_BLD
    q = torch.unflatten(rms_norm_across(plan, linear(y, a / "to_q"), a / "norm_q", c.eps), -1, heads)
    y = attention(all_tokens, q, text["k"], text["v"])  # every rank holds all keys of the text
    if "image_k" in text:
        y = y + attention(all_tokens, q, text["image_k"], text["image_v"])
    x_BLD = x_BLD + linear_sum(plan, y.flatten(2), a / "to_out" / 0)

    f = w / "ffn" / "net"
    y = F.gelu(linear(modulate(x_BLD, ff_shift, ff_scale, c.eps), f / "0.proj"), approximate="tanh")
    return (x_BLD + linear_sum(plan, y, f / 2) * ff_gate).to(x_BLD.dtype)


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    return [(block, f"blocks.{i}") for i in range(c.num_layers)]


def post(c: Config, plan: Plan, w: Weights, x_BLD: Tensor, request: Weights, step: Tensors) -> Tensor:
    """[B, L, D] -> predicted velocity of each token [B, L, P]."""
    twice = step["time"][:, None].expand(-1, 2, -1)
    frozen = request["frozen_time"][:, None].expand(-1, 2, -1) if "frozen" in request else None
    shift, scale = _modulations(w["scale_shift_table"], twice, frozen, request.get("frozen"), x_BLD)
    y = linear(modulate(x_BLD, shift, scale, c.eps), w / "proj_out")
    return rearrange(y, "b l (patch c) -> b l (c patch)", c=c.out_channels)


# --- what a pipeline needs of this family


def positions(c: Config, size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] on the patch grid of latents of `size` (frames, height, width)."""
    return grid_positions(*(n // p for n, p in zip(size, c.patch_size, strict=True)), device=device)


def text_input(hidden_BTC: Tensor, mask_BT: Tensor) -> Tensor:
    """The encoder's last hidden states with those of padding set to zero.

    The network attends to all of them.
    """
    return hidden_BTC * mask_BT[..., None].to(hidden_BTC.dtype)


def prompt_clean(text: str) -> str:
    """Repair broken Unicode, undo HTML entities (twice, for what was escaped twice) and collapse white space.

    The reference is `prompt_clean` of diffusers' Wan pipelines.
    """
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def input_frames_mask(size: tuple[int, int, int], first: bool = True, last: bool = False) -> Tensor:
    """Image to video: which frames are input frames, as a mask [1, 4, F, H, W].

    Four frames share a latent frame; the first frame has one of its own.
    """
    frames, height, width = size
    mask = torch.zeros(4 * frames - 3)
    mask[:1] = float(first)
    if last:
        mask[-1] = 1
    grouped = torch.cat([mask[:1].repeat(4), mask[1:]]).view(frames, 4).T
    return grouped[None, :, :, None, None].expand(1, 4, frames, height, width)


def encode_texts(context: Context, request: Request) -> Tensor:
    """The prompt and, with guidance, the negative prompt -> states [B, T, width]."""
    encoder = context.nets["text_encoder"]
    texts = [prompt_clean(text) for text in request.texts]
    ids, mask = context.tokens("tokenizer", texts, request.text.max_tokens)
    states = t5.encode(encoder.config, encoder.plan, encoder.w, ids, mask)
    return text_input(states, mask).to(context.nets["transformer"].dtype)


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs: text states, and the input frames in the form that the variant reads.

    TI2V keeps clean tokens in place; image to video puts latents and a mask beside the noise.
    """
    vae, hidden = context.nets["vae"].config, encode_texts(context, request)
    size = latent_size(vae, request.output)
    given_tokens, shared = None, {"positions": positions(c, size, context.device)}
    images = () if request.images.start else request.images.resized
    if images and context.options.get("expand_timesteps"):
        frame = first_frame(context.encode(context.pixels(images)), size[0])
        frozen = (shared["positions"][:, 0] == 0)[None, :, None]
        given_tokens, shared["frozen"] = GivenTokens(patchify(frame, c.patch_size), ~frozen), frozen
    elif images:
        shared |= _image_conditions(c, context, request, size)
    return on_grid(
        [{"text": text[None]} | shared for text in hidden], vae, request.output, c.patch_size, given_tokens
    )


def _image_conditions(c: Config, context: Context, request: Request, size: tuple[int, int, int]) -> Tensors:
    """Image to video: the channels beside the noisy latents and, for Wan2.1, CLIP's tokens of the images."""
    pixels = context.pixels(request.images.resized)
    gap = pixels.new_zeros(
        1, 3, request.output.num_frames - pixels.shape[2], request.output.height, request.output.width
    )
    latents = context.encode(torch.cat([pixels[:, :, :1], gap, pixels[:, :, 1:]], 2))
    mask = input_frames_mask(size, last=len(request.images.resized) > 1).to(latents)
    beside = {"concat": patchify(torch.cat([mask, latents], 1), c.patch_size)}
    if c.image_dim is not None:
        encoder = context.nets["image_encoder"]
        views = torch.cat(
            [clip_vision.pixels(encoder.config, image) for image in request.images.originals]
        ).to(context.device)
        beside["image"] = clip_vision.encode(encoder.config, encoder.plan, encoder.w, views)
    return beside


def extra_components(c: Config) -> tuple[str, ...]:
    """Components needed beside transformer, vae, text_encoder, tokenizer and scheduler."""
    return () if c.image_dim is None else ("image_encoder",)


def input_frames(c: Config, options: Entries) -> tuple[int, ...]:
    """How many input frames a video may have: the first, or the first and the last.

    CLIP reads one image, or two where the model has a position table. TI2V takes a first frame only.
    """
    if c.image_dim is not None:
        return (1,) if c.pos_embed_seq_len is None else (2,)
    return (1,) if options.get("expand_timesteps") else (1, 2)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    z = nets["vae"].z_dim
    yield "in_channels", 2 * z + 4 if row.images[0] else z, "the vae's latents need"
    yield "out_channels", z, "the vae's latents need"
    yield "text_dim", nets["text_encoder"].d_model, "the text encoder gives"
    if c.image_dim is not None:
        yield "image_dim", nets["image_encoder"].hidden_size, "the image encoder gives"


def key_map(c: Config) -> KeyMap:
    """Unread keys of released files: a norm that nothing reads, FastWan's gates of sparse attention."""
    return KeyMap(
        unread("blocks.*.attn2.norm_added_q", "blocks.*.attn1.to_gate_compress", "blocks.*.to_gate_compress")
    )


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines=dict.fromkeys(("WanPipeline", "WanImageToVideoPipeline", "WanDMDPipeline"), prepare),
    patch=lambda c: c.patch_size,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    input_frames=input_frames,
    extra_components=extra_components,
    keys=key_map,
)
