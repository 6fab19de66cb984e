"""Ovis-Image: the two stacks of FLUX.1 with gated feed-forwards, conditioned on the tokens of a Qwen3 alone.

Source: github.com/AIDC-AI/Ovis-Image and the OvisImageTransformer2DModel checkpoint. Against FLUX.1: no
pooled text and no embedded guidance, the text is normalised before it is projected, and text tokens have
places of their own, (0, i, i).

Shape letters: B batch, T text tokens, L image tokens, P latent values of a token, D width, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models import joint
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import Context, LoopInputs, latent_size, on_grid, shift_by_tokens
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.activations import swiglu
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, rms_norm
from tinydiff.ops.rope import grid_positions
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, linear_rows, norm_rows, through
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
    out_channels: int | None = 64
    num_layers: int = 6
    num_single_layers: int = 27
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 2048
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise ValueError(
                f"patch_size is {self.patch_size}; Ovis-Image takes packed latents, patch_size 1"
            )
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
    yield from linear_rows("timestep_embedder.linear_1", FREQUENCIES, d)
    yield from linear_rows("timestep_embedder.linear_2", d, d)
    yield from norm_rows("context_embedder_norm", c.joint_attention_dim)
    yield from through("prompt", linear_rows("context_embedder", c.joint_attention_dim, d))
    yield from through("image", linear_rows("x_embedder", c.in_channels, d))
    yield from joint.stack_rows(c.num_layers, c.num_single_layers, d, c.attention_head_dim, (4 * d, 4 * d))
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


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, joint_attention_dim], `positions` [L, 3] of the image tokens. timesteps_S: sigma
    * 1000.
    """
    dtype = w.dtype
    text = linear(rms_norm(inputs["text"].to(dtype), w / "context_embedder_norm"), w / "context_embedder")
    places = torch.arange(text.shape[1], device=text.device)[:, None]
    diagonal = places * torch.tensor([0, 1, 1], device=text.device)
    request = {"text": text}
    request |= joint.rope_tables(diagonal, inputs["positions"], c.axes_dims_rope, compute_dtype(text))

    t_S = timesteps_S.to(dtype) / 1000 * 1000  # half types round both times, as in training
    time = embedder(timestep_embedding(t_S, FREQUENCIES).to(dtype), w / "timestep_embedder")[:, None]
    return request, joint.modulations(w, c.num_layers, c.num_single_layers, time)


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Image tokens [B, L, P] -> text [B, T, D] and image [B, L, D]."""
    image = linear(x_BLP.to(w.dtype), w / "x_embedder")
    text = request["text"].expand(len(image), -1, -1).clone()  # memory of its own, as blocks return it
    return text, image


def double(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Joint attention of two streams with separate weights."""
    return joint.double_block(plan, w, streams, request, shared, c.attention_head_dim, swiglu)


def single(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Both streams through the same weights, attention and feed-forward side by side."""
    return joint.single_block(plan, w, streams, request, shared, c.attention_head_dim, swiglu)


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    stack: Stack = [(double, f"transformer_blocks.{i}") for i in range(c.num_layers)]
    return stack + [(single, f"single_transformer_blocks.{i}") for i in range(c.num_single_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """Text and image -> predicted velocity of each image token [B, L, P]."""
    return joint.last(w, streams[1], step["norm_out"])


# --- what a pipeline needs of this family


def positions(size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] (0, row, column) of the tokens of latents of `size` (1, height, width)."""
    return grid_positions(*(n // p for n, p in zip(size, PATCH, strict=True)), device=device)


TEMPLATE = (
    "<|im_start|>user\nDescribe the image by detailing the color, quantity, text, shape, size, texture, "
    "spatial relationships of the "
    "objects and background: {}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""The template of a prompt: a turn of Qwen3's chat and the start of an answer without thinking."""
SKIPPED = 28
"""Template tokens before the prompt whose states are left out: 28 of 30, as in training."""


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs: the last hidden states of the prompt in its template.

    The states of padding are set to zero; the network attends to all of them.
    """
    encoder, vae = context.nets["text_encoder"], context.nets["vae"].config
    texts = [TEMPLATE.format(text) for text in request.texts]
    ids, mask = context.tokens("tokenizer", texts, request.text.max_tokens + SKIPPED)
    last = (encoder.config.num_hidden_layers,)
    (hidden,) = decoder_lm.encode(encoder.config, encoder.plan, encoder.w, ids, mask, take=last)
    hidden = (hidden * mask[..., None].to(hidden.dtype))[:, SKIPPED:]
    shared = {"positions": positions(latent_size(vae, request.output), context.device)}
    return on_grid([{"text": text[None]} | shared for text in hidden], vae, request.output, PATCH)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    values = nets["vae"].z_dim * prod(PATCH)
    yield "in_channels", values, "the vae's latents need"
    if c.out_channels is not None:
        yield "out_channels", values, "the vae's latents need"
    yield "joint_attention_dim", nets["text_encoder"].hidden_size, "the text encoder gives"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines={"OvisImagePipeline": prepare},
    patch=lambda c: PATCH,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    mu=lambda c, tokens, steps, scheduler: shift_by_tokens(tokens, scheduler),
    linear_grid=True,
    own_grid=("OvisImagePipeline",),
    hidden_states={"text_encoder": (-1,)},
)
