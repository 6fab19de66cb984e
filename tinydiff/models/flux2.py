"""FLUX.2: double-stream blocks, then single-stream blocks with attention and MLP side by side.

Source: Black Forest Labs' FLUX.2 and the Flux2Transformer2DModel checkpoints. No layer has a bias, and all
blocks of a kind share one modulation. Variants differ in `Config` only: dev embeds the guidance scale, klein
does not. Reference images are further image tokens.

Shape letters: B batch, T text tokens, L image tokens, P latent values of a token, D width, H heads, E head
width, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import IMAGE, TEXT, Streams, heads, joint_attention, rope_tables, split
from tinydiff.models.recipe import Context, LoopInputs, latent_size, on_grid, reference_tokens, token_count
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, modulate, rms_norm
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions, rotate_interleaved
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Input, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.parallel.sequence import keys
from tinydiff.records import Request, UserError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise ValueError(
                f"patch_size is {self.patch_size}; a token of FLUX.2 is one pixel of its latents (1)"
            )
        dims, width = self.axes_dims_rope, self.attention_head_dim
        if len(dims) != 4 or any(dim % 2 for dim in dims) or sum(dims) != width:
            raise ValueError(
                f"axes_dims_rope is {dims}; it must be four even parts of attention_head_dim ({width})"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def fused(self) -> tuple[int, ...]:
        """Widths of a single block's fused projection: queries, keys, values, and the MLP's two halves."""
        return (*[self.width] * 3, *[self.mlp_width] * 2)


# --- weights

MODULATIONS = {
    "text_modulation": ("double_stream_modulation_txt", 6),
    "image_modulation": ("double_stream_modulation_img", 6),
    "single_modulation": ("single_stream_modulation", 3),
    "last_modulation": ("norm_out", 2),
}
"""Tensors of a step [B, n, D] -> (the layer that computes them, n).

The n are shift, scale and gate, once or twice; for the last norm scale, then shift.
"""


def _double_rows(c: Config) -> Iterator[Row]:
    d = c.width
    out = linear_rows("attn.to_out.0", d, d, "in", bias=False, attends=("joint", "joint"))
    yield from through("image", _stream_rows(c, IMAGE, out, "ff"))
    out = linear_rows("attn.to_add_out", d, d, "in", bias=False)
    yield from through("text", _stream_rows(c, TEXT, out, "ff_context"))


def _stream_rows(c: Config, names: tuple[str, ...], out: Iterator[Row], ff: str) -> Iterator[Row]:
    d, m = c.width, c.mlp_width
    for name in names[:3]:
        yield from linear_rows(f"attn.{name}", d, d, "out", bias=False)
    for name in names[3:]:
        yield from norm_rows(f"attn.{name}", c.attention_head_dim)
    yield from out
    yield from linear_rows(f"{ff}.linear_in", d, 2 * m, "out", bias=False, parts=(m, m))
    yield from linear_rows(f"{ff}.linear_out", m, d, "in", bias=False)


def _single_rows(c: Config) -> Iterator[Row]:
    d, m = c.width, c.mlp_width
    yield from linear_rows("attn.to_qkv_mlp_proj", d, sum(c.fused), "out", bias=False, parts=c.fused)
    for name in ("norm_q", "norm_k"):
        yield from norm_rows(f"attn.{name}", c.attention_head_dim)
    attends: tuple[Input, Input] = ("joint", "joint")
    yield from linear_rows("attn.to_out", d + m, d, "in", bias=False, parts=(d, m), attends=attends)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split."""
    d = c.width
    for name in ("timestep", "guidance") if c.guidance_embeds else ("timestep",):
        yield from linear_rows(
            f"time_guidance_embed.{name}_embedder.linear_1", c.timestep_guidance_channels, d, bias=False
        )
        yield from linear_rows(f"time_guidance_embed.{name}_embedder.linear_2", d, d, bias=False)
    for layer, n in MODULATIONS.values():
        yield from through("steps", linear_rows(f"{layer}.linear", d, n * d, bias=False))
    yield from through("image", linear_rows("x_embedder", c.in_channels, d, bias=False))
    yield from through("prompt", linear_rows("context_embedder", c.joint_attention_dim, d, bias=False))
    yield from repeat("transformer_blocks", c.num_layers, _double_rows(c))
    yield from repeat("single_transformer_blocks", c.num_single_layers, through("joint", _single_rows(c)))
    yield from through("image", linear_rows("proj_out", d, c.out_channels or c.in_channels, bias=False))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", shared=True),
    Cond("sin", "image", shared=True),
    Cond("text_cos", "text", shared=True),
    Cond("text_sin", "text", shared=True),
    Cond("text", "text", dim=1),
)
"""The tensors of a request that belong to no block."""


def _embed_scalar(c: Config, x: Tensor, w: Weights) -> Tensor:
    """Timesteps or guidance scales [N], in thousandths -> [N, D].

    Half types round them before they are multiplied by 1000, as in the reference.
    """
    return embedder(timestep_embedding(x * 1000, c.timestep_guidance_channels).to(x.dtype), w)


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, joint_attention_dim], `positions` [L, 4] of the image tokens and, where the
    model embeds it, the `guidance` scale [1] or [B]. timesteps_S: sigma * 1000. The text has no mask: its
    padding is attended to.
    """
    dtype, e = w.dtype, w / "time_guidance_embed"
    time = _embed_scalar(c, timesteps_S.to(dtype) / 1000, e / "timestep_embedder")[:, None]
    if c.guidance_embeds:
        time = time + _embed_scalar(c, inputs["guidance"].to(dtype), e / "guidance_embedder")
    steps = {
        name: torch.unflatten(linear(F.silu(time), w / layer / "linear"), -1, (n, -1))
        for name, (layer, n) in MODULATIONS.items()
    }

    text = linear(inputs["text"].to(dtype), w / "context_embedder")
    text_positions = F.pad(torch.arange(text.shape[1], device=text.device)[:, None], (3, 0))
    request = {"text": text}
    request |= rope_tables(
        text_positions, inputs["positions"], c.axes_dims_rope, compute_dtype(text), c.rope_theta
    )
    return request, steps


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Latent tokens [B, L, P] -> text [B, T, D] and image [B, L, D]."""
    text = request["text"].expand(x_BLP.shape[0], -1, -1).contiguous()
    return text, linear(x_BLP.to(w.dtype), w / "x_embedder")


def _gated(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def _finite(x: Tensor) -> Tensor:
    """x within the range of float16, whose largest number the residuals can exceed."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _finish(
    c: Config, plan: Plan, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], ff: Weights
) -> Tensor:
    """The gated residual of attention, then the modulated feed-forward."""
    _, _, gate, ff_shift, ff_scale, ff_gate = modulation
    x = x + gate * attended
    hidden = _gated(*linear(modulate(x, ff_shift, ff_scale, c.eps), ff / "linear_in").chunk(2, -1))
    return _finite(x + ff_gate * linear_sum(plan, hidden, ff / "linear_out"))


def double(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Joint attention, then a feed-forward, each stream with its own weights."""
    a, (text, image), width = w / "attn", streams, c.attention_head_dim
    of_text, of_image = (shared[f"{name}_modulation"].unsqueeze(2).unbind(1) for name in ("text", "image"))
    y_text, y_image = (
        modulate(text, of_text[0], of_text[1], eps=c.eps),
        modulate(image, of_image[0], of_image[1], eps=c.eps),
    )
    y_text, y_image = joint_attention(
        plan,
        heads(a, y_text, width, (shared["text_cos"], shared["text_sin"]), TEXT, c.eps),
        heads(a, y_image, width, (shared["cos"], shared["sin"]), IMAGE, c.eps),
        shared,
    )
    return (
        _finish(c, plan, text, linear_sum(plan, y_text, a / "to_add_out"), of_text, w / "ff_context"),
        _finish(c, plan, image, linear_sum(plan, y_image, a / "to_out" / 0), of_image, w / "ff"),
    )


def single(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Attention and feed-forward side by side on the joint sequence, between two fused projections."""
    a, (text, image) = w / "attn", streams
    shift, scale, gate = shared["single_modulation"].unsqueeze(2).unbind(1)
    cos, sin = (torch.cat([shared[f"text_{name}"], shared[name]]) for name in ("cos", "sin"))
    y = linear(modulate(torch.cat(streams, 1), shift, scale, c.eps), a / "to_qkv_mlp_proj")
    widths = [part * y.shape[-1] // sum(c.fused) for part in c.fused]  # this rank's shard of each part
    q, k, v, *ff = torch.split(y, widths, -1)
    q, k, v = (torch.unflatten(x, -1, (-1, c.attention_head_dim)) for x in (q, k, v))
    q, k = (
        rotate_interleaved(rms_norm(x, a / norm, c.eps), cos, sin)
        for x, norm in ((q, "norm_q"), (k, "norm_k"))
    )
    y = torch.cat([attention(plan, q, k, v, keys=keys(plan, shared, "joint")).flatten(2), _gated(*ff)], -1)
    y_text, y_image = split(gate * linear_sum(plan, y, a / "to_out"), text.shape[1])
    return _finite(text + y_text), _finite(image + y_image)


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    stack: Stack = [(double, f"transformer_blocks.{i}") for i in range(c.num_layers)]
    return stack + [(single, f"single_transformer_blocks.{i}") for i in range(c.num_single_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """The image stream [B, L, D] -> predicted velocity of each token [B, L, P]."""
    scale, shift = step["last_modulation"].unsqueeze(2).unbind(1)
    return linear(modulate(streams[1], shift, scale, c.eps), w / "proj_out")


# --- what a pipeline needs of this family


def positions(
    size: Sequence[int], references: Sequence[Sequence[int]] = (), device: torch.device | str | None = None
) -> Tensor:
    """Positions [L, 4] (image, row, column, word) of the tokens of latents of `size`, then the references'.

    size: (1, height, width). The output image is at 0, the references are at 10, 20, ...
    """
    grids = [grid_positions(*each, 1, device=device) for each in (size, *references)]
    place = torch.tensor([10, 0, 0, 0], device=device)
    return torch.cat([grid + i * place for i, grid in enumerate(grids)])


PIXEL = (1, 1, 1)
"""Latents per token along frames, height and width: the autoencoder folds 2x2 latents itself."""
MAX_PIXELS = 1024 * 1024
"""Most pixels of an input image; a larger one is scaled down."""
MIN_SIDE, MAX_ASPECT = 64, 8
"""Limits of an input image: pixels of its shorter side, and the longer side over the shorter one."""

MISTRAL_CHAT = (
    "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses "
    "focusing on object "
    "relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]{}[/INST]"
)
QWEN_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""A prompt in the chat template of Mistral Small 3.2, and of Qwen3 without thinking."""


def _scaled_down(height: int, width: int) -> tuple[int, int]:
    scale = math.sqrt(MAX_PIXELS / (height * width))
    return (height, width) if scale >= 1 else (int(height * scale), int(width * scale))


def reference_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels of the part of an input image that the model sees.

    The output has the first one's size where no size is asked for. Raises UserError for an image that is
    too small or too long.
    """
    short, long = sorted((height, width))
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        allowed = f"sides of at least {MIN_SIDE} pixels, one at most {MAX_ASPECT} times the other"
        raise UserError(
            "image_path", f"image_path: an image is {width} x {height} pixels; FLUX.2 takes {allowed}"
        )
    height, width = _scaled_down(height, width)
    return height // multiple * multiple, width // multiple * multiple


def reference(context: Context, image: numpy.ndarray) -> Tensor:
    """An input image, uint8 [height, width, 3] -> latents [1, C, 1, H, W] of its middle.

    An image larger than a megapixel is scaled down to that first.
    """
    height, width = image.shape[:2]
    multiple = context.nets["vae"].config.scale_factor_spatial
    whole, cropped = _scaled_down(height, width), reference_size(height, width, multiple)
    top, left = ((n - kept) // 2 for n, kept in zip(whole, cropped, strict=True))
    resized = context.resize(image, *whole)
    return context.encode(context.pixels([resized[top : top + cropped[0], left : left + cropped[1]]]))


DEV_LAYERS, KLEIN_LAYERS = (10, 20, 30), (9, 18, 27)
"""Numbers of the language model's hidden states that are read, whatever its depth."""


def _prepare(
    c: Config, context: Context, request: Request, texts: list[str], side: str | None, layers: tuple[int, ...]
) -> LoopInputs:
    """Loop inputs of both pipelines: text states, and references behind the image's own tokens.

    layers: the hidden states of the language model that are concatenated for each token, padding
    included.
    """
    encoder, vae = context.nets["text_encoder"], context.nets["vae"].config
    ids, mask = context.tokens("tokenizer", texts, request.text.max_tokens, side, framed=False)
    text = torch.cat(decoder_lm.encode(encoder.config, encoder.plan, encoder.w, ids, mask, take=layers), -1)
    references = [reference(context, image) for image in request.images.originals]
    shared = {
        "positions": positions(
            latent_size(vae, request.output), [latents.shape[2:] for latents in references], context.device
        )
    }
    if c.guidance_embeds:
        shared["guidance"] = torch.tensor([request.guidance.embedded], device=context.device)
    given_tokens = reference_tokens(
        token_count(vae, request.output, PIXEL), [patchify(latents, PIXEL) for latents in references]
    )
    return on_grid([{"text": each[None]} | shared for each in text], vae, request.output, PIXEL, given_tokens)


def prepare_dev(c: Config, context: Context, request: Request) -> LoopInputs:
    """dev: texts are padded on the left. A prompt cannot contain the token that stands for images."""
    texts = [MISTRAL_CHAT.format(text.replace("[IMG]", "")) for text in request.texts]
    return _prepare(c, context, request, texts, "left", DEV_LAYERS)


def prepare_klein(c: Config, context: Context, request: Request) -> LoopInputs:
    """klein: texts are padded on the right unless the tokenizer's files say otherwise."""
    texts = [QWEN_CHAT.format(text) for text in request.texts]
    return _prepare(c, context, request, texts, None, KLEIN_LAYERS)


def mu(c: Config, tokens: int, steps: int, scheduler: Entries) -> float | None:
    """The dynamic shift of the schedule, linear in `steps` between its values at 10 and 200 steps.

    Each of the two values is linear in `tokens`. Above 4300 image tokens the shift is that of 200 steps.
    Source: `compute_empirical_mu` of diffusers' FLUX.2 pipelines.
    """
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    slope = 0 if tokens > 4300 else (many - few) / 190
    return slope * steps + (many - 200 * slope)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    yield "in_channels", nets["vae"].z_dim, "the vae's latents need"
    if c.out_channels is not None:
        yield "out_channels", nets["vae"].z_dim, "the vae's latents need"
    yield "joint_attention_dim", 3 * nets["text_encoder"].hidden_size, "three states of the text encoder need"
    yield "guidance_embeds", row.guidance_form == "embedded", f"the guidance of {row.name} needs"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines={"Flux2Pipeline": prepare_dev, "Flux2KleinPipeline": prepare_klein},
    patch=lambda c: PIXEL,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    mu=mu,
    linear_grid=True,
    hidden_states={"text_encoder": {"Flux2Pipeline": DEV_LAYERS, "Flux2KleinPipeline": KLEIN_LAYERS}},
    own_grid=("Flux2Pipeline", "Flux2KleinPipeline"),
    size_from_image=lambda c, height, width, multiple: reference_size(height, width, multiple),
)
