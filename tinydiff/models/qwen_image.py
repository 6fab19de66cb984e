"""Qwen-Image, -2512, -Edit, -Edit-2509, -Edit-2511 and -Layered: text and image streams in joint attention.

Source: arXiv 2508.02324 and the QwenImageTransformer2DModel checkpoints. Variants differ in three switches of
`Config`: Edit-2511 puts reference images at timestep 0 (`zero_cond_t`), Layered embeds whether an image has
alpha (`use_additional_t_cond`) and counts its condition image before the first layer (`use_layer3d_rope`).

Shape letters: B batch, T text tokens, L image tokens, P packed latent values of a token, D width, H heads, E
head width, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models import qwen_prompts
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import IMAGE, TEXT, Streams, feed_forward, heads, joint_attention
from tinydiff.models.qwen_prompts import EDIT, TEXT_TO_IMAGE, ImageTokens, caption, encode_images, text_states
from tinydiff.models.recipe import (
    Context,
    Latents,
    LoopInputs,
    Patch,
    fit_area,
    latent_size,
    on_grid,
    reference_tokens,
    shift_by_tokens,
    token_count,
)
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.embed import embedder
from tinydiff.ops.linear import embedding, linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, modulate, rms_norm
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions, rope_table
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.records import Request

Tensors = dict[str, Tensor]

SINUSOIDS = 256


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False
    pooled_projection_dim: int | None = None
    """In the first release's file only; the network has no pooled text."""

    def __post_init__(self) -> None:
        if self.guidance_embeds:
            raise ValueError(
                "guidance_embeds is true; no released Qwen-Image has weights for an embedded guidance scale"
            )
        if self.in_channels != self.out_channels * self.patch_size**2:
            packed = self.out_channels * self.patch_size**2
            raise ValueError(
                f"in_channels is {self.in_channels}; it must be out_channels * patch_size**2, {packed}"
            )
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {self.axes_dims_rope}; they must be even and sum to "
                f"{self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# --- weights


def _block_rows(c: Config) -> Iterator[Row]:
    d = c.width
    yield from through("steps", linear_rows("img_mod.1", d, 6 * d))
    out = linear_rows("attn.to_out.0", d, d, "in", attends=("joint", "joint"))
    yield from through("image", _heads_rows(c, IMAGE), out, _feed_forward_rows(c, "img_mlp"))
    yield from through("steps", linear_rows("txt_mod.1", d, 6 * d))
    out = linear_rows("attn.to_add_out", d, d, "in")
    yield from through("text", _heads_rows(c, TEXT), out, _feed_forward_rows(c, "txt_mlp"))


def _heads_rows(c: Config, names: tuple[str, ...]) -> Iterator[Row]:
    for name in names[:3]:
        yield from linear_rows(f"attn.{name}", c.width, c.width, "out")
    for name in names[3:]:
        yield from norm_rows(f"attn.{name}", c.attention_head_dim)


def _feed_forward_rows(c: Config, name: str) -> Iterator[Row]:
    yield from linear_rows(f"{name}.net.0.proj", c.width, 4 * c.width, "out")
    yield from linear_rows(f"{name}.net.2", 4 * c.width, c.width, "in")


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split."""
    d, embed = c.width, "time_text_embed"
    yield from linear_rows(f"{embed}.timestep_embedder.linear_1", SINUSOIDS, d)
    yield from linear_rows(f"{embed}.timestep_embedder.linear_2", d, d)
    if c.use_additional_t_cond:
        yield Row(f"{embed}.addition_t_embedding.weight", (2, d))
    yield from norm_rows("txt_norm", c.joint_attention_dim)
    yield from through("prompt", linear_rows("txt_in", c.joint_attention_dim, d))
    yield from through("image", linear_rows("img_in", c.in_channels, d))
    yield from repeat("transformer_blocks", c.num_layers, _block_rows(c))
    yield from through("steps", linear_rows("norm_out.linear", d, 2 * d))
    yield from through("image", linear_rows("proj_out", d, c.in_channels))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", shared=True),
    Cond("sin", "image", shared=True),
    Cond("text_cos", "text", shared=True),
    Cond("text_sin", "text", shared=True),
    Cond("frozen", "image", dim=1, shared=True),
    Cond("mask", "text", dim=1, shared=True),
    Cond("text", "text", dim=1),
)
"""The tensors of a request that belong to no block."""


def _sinusoids(t_S: Tensor) -> Tensor:
    """Timesteps [S] between 0 and 1 -> [S, 256], cosines first.

    The factor 1000 comes last, so that half types round t only.
    """
    half = SINUSOIDS // 2
    frequency = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=t_S.device) / half)
    angle = 1000 * (t_S.to(compute_dtype(t_S))[:, None] * frequency)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _time(w: Weights, t_S: Tensor, kind_B: Tensor | None) -> Tensor:
    """Timesteps [S] between 0 and 1 -> activated time embedding [S, 1, D], or [S, B, D] with kinds.

    kind_B: int64, the row of Layered's additional embedding for each image.
    """
    time = embedder(_sinusoids(t_S).to(t_S.dtype), w / "timestep_embedder")[:, None]
    return F.silu(time if kind_B is None else time + embedding(kind_B, w / "addition_t_embedding"))


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, joint_attention_dim], `positions` [L, 3] from the function of this name, and
    optionally: `mask` [B, T], 1 where a text token is real; `frozen` [1, L, 1] bool, the tokens of
    reference images; `kind` [1 or B] int64, Layered's additional condition, 0 in all its pipelines.
    """
    dtype = w.dtype
    text = linear(rms_norm(inputs["text"].to(dtype), w / "txt_norm"), w / "txt_in")
    request = {"text": text}
    image_at, text_at = inputs["positions"], text_positions(c, inputs["positions"], text.shape[1])
    for prefix, places in (("", image_at), ("text_", text_at)):
        cos, sin = rope_table(places, c.axes_dims_rope, dtype=torch.float32)
        request |= {f"{prefix}cos": cos, f"{prefix}sin": sin}
    if "mask" in inputs:
        request["mask"] = inputs["mask"].bool()

    embed, kind = w / "time_text_embed", inputs["kind"] if c.use_additional_t_cond else None
    time = _time(embed, timesteps_S.to(dtype) / 1000, kind)
    steps = {"norm_out": linear(time, w / "norm_out" / "linear")}
    for _, at in blocks(c):
        for name in ("txt_mod", "img_mod"):
            steps[f"{at}.{name}"] = torch.unflatten(linear(time, w / at / name / 1), -1, (6, -1))
    if c.zero_cond_t and "frozen" in inputs:
        request["frozen"] = inputs["frozen"]
        frozen_time = _time(embed, torch.zeros_like(timesteps_S[:1], dtype=dtype), kind)[0]
        for _, at in blocks(c):
            request[f"{at}.frozen_mod"] = torch.unflatten(
                linear(frozen_time, w / at / "img_mod" / 1), -1, (6, -1)
            )
    return request, steps


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Packed latent tokens [B, L, P] -> text [B, T, D], image [B, L, D]."""
    text = request["text"].expand(x_BLP.shape[0], -1, -1)
    return text, linear(x_BLP.to(w.dtype), w / "img_in")


def _modulations(
    packed: Tensor, frozen_packed: Tensor | None = None, frozen: Tensor | None = None
) -> tuple[Tensor, ...]:
    """[B, 6, D] -> shift, scale and gate of attention, then of the feed-forward: [B, 1, D] each.

    [B, L, D] each where some tokens are frozen: those have the modulation `frozen_rows`, of timestep 0.
    """
    moving = packed.unsqueeze(2).unbind(1)
    if frozen_packed is None or frozen is None:
        return moving
    fixed = frozen_packed.unsqueeze(2).unbind(1)
    return tuple(torch.where(frozen, a, b) for a, b in zip(fixed, moving, strict=True))


def _finish(plan: Plan, x: Tensor, attended: Tensor, modulations: tuple[Tensor, ...], ff: Weights) -> Tensor:
    """The gated residual of attention, then the modulated feed-forward."""
    _, _, gate, ff_shift, ff_scale, ff_gate = modulations
    x = x + gate * attended
    x = x + ff_gate * feed_forward(plan, ff, modulate(x, ff_shift, ff_scale), gelu_tanh)
    # The residuals can exceed the largest number of float16.
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def block(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Joint attention, then a feed-forward for each stream, all modulated by the time."""
    text, image = streams
    of_text = _modulations(request["txt_mod"])
    of_image = _modulations(request["img_mod"], request.get("frozen_mod"), shared.get("frozen"))
    a, width = w / "attn", c.attention_head_dim
    y_text, y_image = modulate(text, of_text[0], of_text[1]), modulate(image, of_image[0], of_image[1])
    y_text, y_image = joint_attention(
        plan,
        heads(a, y_text, width, (shared["text_cos"], shared["text_sin"]), TEXT),
        heads(a, y_image, width, (shared["cos"], shared["sin"]), IMAGE),
        shared,
    )
    return (
        _finish(plan, text, linear_sum(plan, y_text, a / "to_add_out"), of_text, w / "txt_mlp"),
        _finish(plan, image, linear_sum(plan, y_image, a / "to_out" / 0), of_image, w / "img_mlp"),
    )


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    return [(block, f"transformer_blocks.{i}") for i in range(c.num_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """The image stream [B, L, D] -> predicted velocity of each token [B, L, P]."""
    scale, shift = step["norm_out"][:, None].chunk(2, -1)
    return linear(modulate(streams[1], shift, scale), w / "proj_out")


# --- what a pipeline needs of this family


def positions(c: Config, sizes: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] (image, row, column) of the packed tokens of latents of `sizes` (height, width).

    The output comes first, an image or all layers, then the reference images. Rows and columns are
    counted from the middle of each image. Layered's last image, the condition image, is at -1, before all
    layers.
    """
    grids: list[Tensor] = []
    for i, size in enumerate(sizes):
        height, width = (n // c.patch_size for n in size)
        index = -1 if c.use_layer3d_rope and i == len(sizes) - 1 else i
        first = torch.tensor([index, height // 2 - height, width // 2 - width], device=device)
        grids.append(grid_positions(1, height, width, device=device) + first)
    return torch.cat(grids)


def text_positions(c: Config, positions_LA: Tensor, tokens: int) -> Tensor:
    """Positions [T, 3] of text: on the diagonal, starting beyond all rows and columns of the images.

    In Layered they also start beyond all layers.
    """
    axes = positions_LA if c.use_layer3d_rope else positions_LA[:, 1:]
    return (axes.amax() + 1 + torch.arange(tokens, device=axes.device))[:, None].expand(-1, 3)


EDIT_PIXELS = 1024 * 1024
"""Pixels of an image to edit as the network sees it."""
LANGUAGE_MODEL_PIXELS = 384 * 384
"""Pixels of an image to edit as the language model sees it, from Edit-2509 on."""


def _resized(context: Context, images: Sequence[numpy.ndarray], area: int) -> list[numpy.ndarray]:
    """Each image resized to about `area` pixels, with its own aspect."""
    return [context.resize(image, *fit_area(area, *image.shape[:2])) for image in images]


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of text to image: Qwen-Image and -2512."""
    vae = context.nets["vae"].config
    shared = {"positions": positions(c, [latent_size(vae, request.output)[1:]], context.device)}
    branches = [
        {"text": text_states(context, TEXT_TO_IMAGE, text, request.text.max_tokens)} | shared
        for text in request.texts
    ]
    return on_grid(branches, vae, request.output, patch(c))


def _edit(
    c: Config,
    context: Context,
    request: Request,
    before: str,
    image_tokens: ImageTokens,
    references: Sequence[Tensor],
) -> LoopInputs:
    """Loop inputs of editing.

    before: text before each prompt. references: latents [1, C, 1, H, W] of the images to edit.
    """
    vae = context.nets["vae"].config
    known = reference_tokens(
        token_count(vae, request.output, patch(c)), [patchify(latents, patch(c)) for latents in references]
    )
    assert known is not None
    sizes = [latent_size(vae, request.output)[1:], *(latents.shape[3:] for latents in references)]
    shared = {"positions": positions(c, sizes, context.device), "frozen": ~known.denoised}
    branches = [
        {"text": text_states(context, EDIT, before + text, image_tokens=image_tokens)} | shared
        for text in request.texts
    ]
    return on_grid(branches, vae, request.output, patch(c), known)


def prepare_edit(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of Edit: language model and denoiser see one image at one size."""
    images = _resized(context, request.images.originals, EDIT_PIXELS)
    return _edit(
        c,
        context,
        request,
        qwen_prompts.IMAGE,
        encode_images(context, images),
        [context.encode(context.pixels(images))],
    )


def prepare_edit_plus(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of Edit-2509 and -2511: numbered images, which the language model sees smaller."""
    # The model was trained with the word Picture.
    before = "".join(
        f"Picture {i}: {qwen_prompts.IMAGE}" for i in range(1, len(request.images.originals) + 1)
    )
    image_tokens = encode_images(context, _resized(context, request.images.originals, LANGUAGE_MODEL_PIXELS))
    references = [
        context.encode(context.pixels([image]))
        for image in _resized(context, request.images.originals, EDIT_PIXELS)
    ]
    return _edit(c, context, request, before, image_tokens, references)


def prepare_layered(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of Layered, which decomposes an image with alpha: the whole image again, then its layers.

    Without a prompt the language model captions the image. Noise is drawn for one layer after another, each
    [C, H, W].
    """
    vae = context.nets["vae"].config
    p, (_, height, width) = c.patch_size, latent_size(vae, request.output)
    whole = context.resize(request.images.originals[0], request.output.height, request.output.width)
    prompt, *negative = request.texts
    texts = [prompt if prompt.strip() else caption(context, whole), *negative]
    reference = patchify(context.encode(context.pixels([whole])), patch(c))
    images = request.output.layers + 1
    shared = {
        "positions": positions(c, [(height, width)] * (images + 1), context.device),
        "kind": torch.zeros(1, dtype=torch.int64, device=context.device),
    }

    def unpack(x: Tensor) -> Tensor:
        grid = {"f": images, "h": height // p, "w": width // p, "p": p, "q": p}
        return rearrange(x[0], "(f h w) (c p q) -> f c 1 (h p) (w q)", **grid)[1:]

    return LoopInputs(
        branches=tuple(
            {"text": text_states(context, TEXT_TO_IMAGE, text, request.text.max_tokens)} | shared
            for text in texts
        ),
        latents=(
            Latents(
                size=(images, vae.z_dim, height, width),
                pack=lambda x: rearrange(x, "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=p),
                unpack=unpack,
            ),
        ),
        given_tokens=reference_tokens(images * reference.shape[1], [reference]),
        guidance="classifier_free",
        revised=None if prompt.strip() else texts[0],
    )


def patch(c: Config) -> Patch:
    """Latents to a token along frames, height and width."""
    return 1, c.patch_size, c.patch_size


def mu(c: Config, tokens: int, steps: int, scheduler: Entries) -> float | None:
    """The dynamic shift of the schedule.

    Layered's pipeline has a shift of its own, which grows with an image's side, whatever the scheduler's
    file says.
    """
    return (tokens / 256) ** 0.5 if c.use_layer3d_rope else shift_by_tokens(tokens, scheduler)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    vae = nets["vae"]
    yield "in_channels", vae.z_dim * prod(patch(c)), "the vae's latents need"
    yield "joint_attention_dim", nets["text_encoder"].hidden_size, "the text encoder gives"
    yield "use_layer3d_rope", row.layers > 0, f"the pipeline of {row.name} needs"
    yield "use_layer3d_rope", vae.in_channels == 4, f"a vae with {vae.in_channels} channels of pixels needs"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines={
        "QwenImagePipeline": prepare,
        "QwenImageEditPipeline": prepare_edit,
        "QwenImageEditPlusPipeline": prepare_edit_plus,
        "QwenImageLayeredPipeline": prepare_layered,
    },
    patch=patch,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    guidance="token_normed",
    mu=mu,
    linear_grid=True,
    hidden_states={"text_encoder": (-1,)},
)
