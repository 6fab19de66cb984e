"""FLUX.1 dev, schnell and Kontext: double-stream, then single-stream blocks, conditioned on T5 and CLIP.

Source: FLUX.1's reference code, arXiv 2506.15742 (Kontext) and the FluxTransformer2DModel checkpoints.
Variants differ in `Config` only: dev and Kontext embed the guidance scale, schnell does not. In Kontext the
tokens of the images to edit follow those of the output image.

Shape letters: B batch, T text tokens, L image tokens, P latent values of a token, D width, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy
import torch
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models import joint
from tinydiff.models.encoders import clip_text, t5
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import (
    Context,
    LoopInputs,
    latent_size,
    on_grid,
    reference_tokens,
    shift_by_tokens,
    token_count,
)
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, linear_rows, through
from tinydiff.records import Request

Tensors = dict[str, Tensor]
Streams = joint.Streams


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json.

    patch_size is 1: the latents come packed, 2 x 2 to a token.
    """

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise ValueError(f"patch_size is {self.patch_size}; FLUX.1 takes packed latents, patch_size 1")
        if len(self.axes_dims_rope) != 3 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope is {self.axes_dims_rope}; three axes must share the head width "
                f"{self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


PATCH = (1, 2, 2)
"""Latents per token along frames, height and width, see `ops.patch.patchify`."""
FREQUENCIES = 256

# --- weights


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape and tensor-parallel split."""
    d = c.width
    embedders = {"timestep_embedder": FREQUENCIES}
    if c.guidance_embeds:
        embedders["guidance_embedder"] = FREQUENCIES
    embedders["text_embedder"] = c.pooled_projection_dim
    for name, fan_in in embedders.items():
        yield from linear_rows(f"time_text_embed.{name}.linear_1", fan_in, d)
        yield from linear_rows(f"time_text_embed.{name}.linear_2", d, d)
    yield from through("prompt", linear_rows("context_embedder", c.joint_attention_dim, d))
    yield from through("image", linear_rows("x_embedder", c.in_channels, d))
    yield from joint.stack_rows(c.num_layers, c.num_single_layers, d, c.attention_head_dim, (4 * d,))
    yield from through("image", linear_rows("proj_out", d, c.out_channels or c.in_channels))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", shared=True),
    Cond("sin", "image", shared=True),
    Cond("text_cos", "text", shared=True),
    Cond("text_sin", "text", shared=True),
    Cond("text", "text", dim=1),
)
"""The tensors of a request that belong to no block."""


def _embed_scalar(x: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    """Timesteps or guidance scales [N], in thousandths -> [N, D].

    Half types round them before they are multiplied by 1000, as in training.
    """
    return embedder(timestep_embedding(x.to(dtype) * 1000, FREQUENCIES).to(dtype), w)


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, joint_attention_dim], `pooled` [B, pooled_projection_dim], `positions` [L, 3] of
    the image tokens and, where the variant embeds it, `guidance` [1] or [B]. timesteps_S: sigma * 1000.
    """
    dtype = w.dtype
    text = linear(inputs["text"].to(dtype), w / "context_embedder")
    text_positions = inputs["positions"].new_zeros(text.shape[1], 3)
    request = {"text": text}
    request |= joint.rope_tables(text_positions, inputs["positions"], c.axes_dims_rope, compute_dtype(text))

    e = w / "time_text_embed"
    time = _embed_scalar(timesteps_S.to(dtype) / 1000, e / "timestep_embedder", dtype)[:, None]
    if c.guidance_embeds:
        time = time + _embed_scalar(inputs["guidance"], e / "guidance_embedder", dtype)
    time = time + embedder(inputs["pooled"].to(dtype), e / "text_embedder")
    return request, joint.modulations(w, c.num_layers, c.num_single_layers, time)


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Image tokens [B, L, P] -> text [B, T, D] and image [B, L, D]."""
    image = linear(x_BLP.to(w.dtype), w / "x_embedder")
    text = request["text"].expand(len(image), -1, -1).clone()  # memory of its own, as blocks return it
    return text, image


def double(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Joint attention of two streams with separate weights."""
    return joint.double_block(plan, w, streams, request, shared, c.attention_head_dim, gelu_tanh)


def single(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Both streams through the same weights, attention and feed-forward side by side."""
    return joint.single_block(plan, w, streams, request, shared, c.attention_head_dim, gelu_tanh)


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    stack: Stack = [(double, f"transformer_blocks.{i}") for i in range(c.num_layers)]
    return stack + [(single, f"single_transformer_blocks.{i}") for i in range(c.num_single_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """Text and image -> predicted velocity of each image token [B, L, P]."""
    return joint.last(w, streams[1], step["norm_out"])


# --- what a pipeline needs of this family


def positions(
    size: tuple[int, int, int],
    references: Sequence[Sequence[int]] = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions [L, 3] (image, row, column) of the tokens of latents of `size`, then of the references'.

    size: (1, height, width). The output image is number 0, the references are 1, 2, ...
    """
    grids = [
        grid_positions(*(n // p for n, p in zip(each, PATCH, strict=True)), device=device)
        for each in (size, *references)
    ]
    number = torch.tensor([1, 0, 0], device=device)
    return torch.cat([grid + i * number for i, grid in enumerate(grids)])


_WIDE = (
    (1568, 672),
    (1504, 688),
    (1456, 720),
    (1392, 752),
    (1328, 800),
    (1248, 832),
    (1184, 880),
    (1104, 944),
)
KONTEXT_SIZES = (*((h, w) for w, h in _WIDE), (1024, 1024), *_WIDE)
"""(width, height) in pixels of the images that Kontext was trained to edit."""


def reference_size(height: int, width: int, multiple: int = 16) -> tuple[int, int]:
    """The (height, width) of `KONTEXT_SIZES` nearest to an image's aspect, to which it is resized.

    As in the reference, the aspect is that of the image in whole tokens of `multiple` pixels.
    """
    aspect = max(1, width // multiple) / max(1, height // multiple)
    _, wide, high = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_SIZES)
    return high, wide


def _texts(context: Context, request: Request) -> list[Tensors]:
    """The text inputs of each branch: T5's states, padding included, and CLIP's pooled vector."""
    clip, large = context.nets["text_encoder"], context.nets["text_encoder_2"]
    ids, _ = context.tokens("tokenizer", request.texts, context.clip_tokens("text_encoder"))
    pooled = clip_text.encode(clip.config, clip.plan, clip.w, ids).pooled
    ids, _ = context.tokens("tokenizer_2", request.texts, request.text.max_tokens)
    text = t5.encode(large.config, large.plan, large.w, ids)
    return [{"text": states[None], "pooled": one[None]} for states, one in zip(text, pooled, strict=True)]


def _prepare(c: Config, context: Context, request: Request, references: Sequence[Tensor]) -> LoopInputs:
    """Loop inputs of all pipelines. references: latents [1, C, 1, H, W] of the images to edit."""
    vae = context.nets["vae"].config
    size = latent_size(vae, request.output)
    shared = {"positions": positions(size, [latents.shape[2:] for latents in references], context.device)}
    if c.guidance_embeds:
        shared["guidance"] = torch.tensor([request.guidance.embedded], device=context.device)
    given_tokens = reference_tokens(
        token_count(vae, request.output, PATCH), [patchify(latents, PATCH) for latents in references]
    )
    return on_grid(
        [text | shared for text in _texts(context, request)], vae, request.output, PATCH, given_tokens
    )


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of text to image: dev and schnell."""
    return _prepare(c, context, request, ())


def prepare_edit(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of editing: Kontext. It was trained with one image; several are numbered in order."""
    multiple = context.nets["vae"].config.scale_factor_spatial * PATCH[-1]

    def latents(image: numpy.ndarray) -> Tensor:
        height, width = reference_size(image.shape[0], image.shape[1], multiple)
        return context.encode(context.pixels([context.resize(image, height, width)]))

    return _prepare(c, context, request, [latents(image) for image in request.images.originals])


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    values = nets["vae"].z_dim * prod(PATCH)
    yield "in_channels", values, "the vae's latents need"
    if c.out_channels is not None:
        yield "out_channels", values, "the vae's latents need"
    yield "joint_attention_dim", nets["text_encoder_2"].d_model, "the second text encoder gives"
    yield "pooled_projection_dim", nets["text_encoder"].hidden_size, "the text encoder gives"
    yield "guidance_embeds", row.guidance_form == "embedded", f"the guidance of {row.name} needs"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pooled=True,
    pipelines={"FluxPipeline": prepare, "FluxKontextPipeline": prepare_edit},
    patch=lambda c: PATCH,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    extra_components=lambda c: ("text_encoder_2", "tokenizer_2"),
    mu=lambda c, tokens, steps, scheduler: shift_by_tokens(tokens, scheduler),
    linear_grid=True,
    own_grid=("FluxPipeline",),
)
