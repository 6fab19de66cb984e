"""HunyuanVideo-1.5: FLUX.1's double-stream blocks on video, with three kinds of text tokens.

Source: arXiv 2511.18870 and the HunyuanVideo15Transformer3DModel checkpoints. The text stream has, in this
order, SigLIP's tokens of the first frame (image to video alone), ByT5's states of the words to be written,
and Qwen2.5-VL's states of the prompt, which a token refiner adapts to each timestep. Each kind is marked by a
learned vector. Beside the noise stand the latents of the first frame and a mask, zeros in text to video.

Shape letters: B batch, T text tokens, G glyph tokens, N tokens of an image encoder, L image tokens, P latent
values of a token, D width, S steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models import joint, token_refiner
from tinydiff.models.encoders import decoder_lm, siglip_vision, t5
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import Context, LoopInputs, Patch, first_frame, latent_size, on_grid
from tinydiff.models.registry import ReleasedModel
from tinydiff.models.token_refiner import FREQUENCIES, sinusoid
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.embed import embedder
from tinydiff.ops.linear import embedding, linear
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, layer_norm
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, conv_rows, linear_rows, norm_rows, through, under
from tinydiff.records import Request

Tensors = dict[str, Tensor]
Streams = joint.Streams


IMAGE_TO_VIDEO = "i2v"
"""The task_type of models that start from an image."""


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 65
    out_channels: int = 32
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 54
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 1
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 3584
    text_embed_2_dim: int = 1472
    image_embed_dim: int = 1152
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    target_size: int = 640
    """The side of a square with as many pixels as the videos the model was trained on."""
    task_type: str = IMAGE_TO_VIDEO
    use_meanflow: bool = False
    """Whether a step knows at which timestep it ends (step-distilled models; arXiv 2505.13447)."""

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm":
            raise ValueError(f"qk_norm is {self.qk_norm!r}; queries and keys are normalised by 'rms_norm'")
        if len(self.rope_axes_dim) != 3 or sum(self.rope_axes_dim) != self.attention_head_dim:
            raise ValueError(
                f"rope_axes_dim is {self.rope_axes_dim}; three axes must share the head width "
                f"{self.attention_head_dim}"
            )
        if self.in_channels != 2 * self.out_channels + 1:
            raise ValueError(
                f"in_channels is {self.in_channels}; the noise, the first frame's latents and a mask make "
                f"{2 * self.out_channels + 1}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


GLYPH_WIDTH = 2048
"""Of the layers between ByT5's states and the text stream."""
PROMPT, GLYPHS, VIEW = 0, 1, 2
"""Rows of the table of kinds."""


def patch(c: Config) -> Patch:
    """Latents per token along frames, height and width."""
    return c.patch_size_t, c.patch_size, c.patch_size


# --- weights


def _glyph_rows(c: Config) -> Iterator[Row]:
    yield from norm_rows("norm", c.text_embed_2_dim, bias=True)
    yield from linear_rows("linear_1", c.text_embed_2_dim, GLYPH_WIDTH)
    yield from linear_rows("linear_2", GLYPH_WIDTH, GLYPH_WIDTH)
    yield from linear_rows("linear_3", GLYPH_WIDTH, c.width)


def _view_rows(c: Config) -> Iterator[Row]:
    yield from norm_rows("norm_in", c.image_embed_dim, bias=True)
    yield from linear_rows("linear_1", c.image_embed_dim, c.image_embed_dim)
    yield from linear_rows("linear_2", c.image_embed_dim, c.width)
    yield from norm_rows("norm_out", c.width, bias=True)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape and tensor-parallel split."""
    d = c.width
    yield from through("image", conv_rows("x_embedder.proj", c.in_channels, d, patch(c)))
    yield from under("image_embedder", _view_rows(c))
    yield from under("context_embedder", token_refiner.spec(c.num_refiner_layers, c.text_embed_dim, d))
    yield from under("context_embedder_2", _glyph_rows(c))
    for name in ("timestep_embedder", *(("timestep_embedder_r",) if c.use_meanflow else ())):
        yield from linear_rows(f"time_embed.{name}.linear_1", FREQUENCIES, d)
        yield from linear_rows(f"time_embed.{name}.linear_2", d, d)
    yield Row("cond_type_embed.weight", (3, d))
    yield from joint.stack_rows(c.num_layers, 0, d, c.attention_head_dim, (int(d * c.mlp_ratio),))
    values = c.patch_size_t * c.patch_size**2 * c.out_channels
    yield from through("image", linear_rows("proj_out", d, values))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", shared=True),
    Cond("sin", "image", shared=True),
    Cond("text_cos", "text", shared=True),
    Cond("text_sin", "text", shared=True),
    Cond("text", "text", dim=1),
    Cond("concat", "image", dim=1),
)
"""The tensors of a request, and the text of each step, that belong to no block."""


def _glyphs(w: Weights, states_BGC: Tensor) -> Tensor:
    y = F.gelu(linear(layer_norm(states_BGC, w / "norm", 1e-5), w / "linear_1"))
    return linear(F.gelu(linear(y, w / "linear_2")), w / "linear_3")


def _view(w: Weights, states_BNC: Tensor) -> Tensor:
    y = F.gelu(linear(layer_norm(states_BNC, w / "norm_in", 1e-5), w / "linear_1"))
    return layer_norm(linear(y, w / "linear_2"), w / "norm_out", 1e-5)


def _text(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> Tensor:
    """All text tokens at each step [S, B, N + G + T, D]."""
    dtype = w.dtype
    states, layers = inputs["text"].to(dtype), c.num_refiner_layers
    refined = token_refiner.refined(
        plan, w / "context_embedder", states, timesteps_S, layers, c.attention_head_dim
    )

    def kind(number: int) -> Tensor:
        ids = torch.full((len(states), 1), number, device=states.device)
        return embedding(ids, w / "cond_type_embed")  # [B, 1, D]

    parts: list[Tensor] = []
    if "image" in inputs:
        parts.append(_view(w / "image_embedder", inputs["image"].to(dtype)) + kind(VIEW))
    if "glyphs" in inputs:
        parts.append(_glyphs(w / "context_embedder_2", inputs["glyphs"].to(dtype)) + kind(GLYPHS))
    steps, images = refined.shape[:2]
    constant = [part.expand(steps, images, -1, -1) for part in parts]
    return torch.cat([*constant, refined + kind(PROMPT)], 2)


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, text_embed_dim], without padding; `positions` [L, 3] of the image tokens; `concat`
    [B or 1, L, P'], the first frame's latents and the mask. Where the request has them: `glyphs` [B, G,
    text_embed_2_dim], `image` [B, N, image_embed_dim], `ends` [S], the timestep at which each step ends: of a
    loop the next one, and 0. timesteps_S: sigma * 1000.
    """
    dtype = w.dtype
    timesteps_S = timesteps_S.to(dtype)  # half types round them first, as in training
    text = _text(c, plan, w, inputs, timesteps_S)
    nowhere = inputs["positions"].new_zeros(text.shape[2], 3)
    rope = c.rope_axes_dim, compute_dtype(text), c.rope_theta, torch.float32
    request = joint.rope_tables(nowhere, inputs["positions"], *rope) | {"concat": inputs["concat"]}
    time = embedder(sinusoid(timesteps_S, dtype), w / "time_embed" / "timestep_embedder")
    if c.use_meanflow:
        following = torch.cat([timesteps_S[1:], timesteps_S.new_zeros(1)])
        ends = inputs.get("ends", following).to(dtype)
        time = time + embedder(sinusoid(ends, dtype), w / "time_embed" / "timestep_embedder_r")
    return request, {"text": text, **joint.modulations(w, c.num_layers, 0, time[:, None])}


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Latent tokens [B, L, P] -> text [B, N + G + T, D] and image [B, L, D]."""
    x = torch.cat([x_BLP, request["concat"].to(x_BLP.dtype).expand(len(x_BLP), -1, -1)], -1)
    image = linear(x.to(w.dtype), w / "x_embedder" / "proj")
    return step["text"].expand(len(image), -1, -1).clone(), image  # memory of its own, as blocks return it


def block(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Joint attention of two streams with separate weights."""
    return joint.double_block(plan, w, streams, request, shared, c.attention_head_dim, gelu_tanh)


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    return [(block, f"transformer_blocks.{i}") for i in range(c.num_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """Text and image -> predicted velocity of each image token [B, L, P]."""
    return joint.last(w, streams[1], step["norm_out"])


# --- what a pipeline needs of this family


def positions(c: Config, size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] on the patch grid of latents of `size` (frames, height, width)."""
    return grid_positions(*(n // p for n, p in zip(size, patch(c), strict=True)), device=device)


SYSTEM = (
    "You are a helpful assistant. Describe the video by detailing the following aspects:"
    "         1. The main content and theme of the video."
    "         2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "         3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "         4. background environment, light, style and atmosphere."
    "         5. camera angles, movements, and transitions used in the video."
)
TEMPLATE = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
)
"""The template of a prompt: turns of Qwen's chat and the start of an answer."""
SKIPPED = 108
"""Template tokens before the prompt, whose states are left out."""
HIDDEN_STATE = -3
"""Which of Qwen's states are read, counted from the end."""
GLYPH_TOKENS = 256


def glyph_text(prompt: str) -> str | None:
    """What ByT5 reads: the quoted words of a prompt, each once; None where nothing is quoted."""
    quoted = (straight or curly for straight, curly in re.findall(r"\"(.*?)\"|“(.*?)”", prompt))
    texts = [f'Text "{words}"' for words in dict.fromkeys(quoted)]
    return ". ".join(texts) + ". " if texts else None


def _texts(context: Context, prompt: str, length: int) -> Tensors:
    """The text inputs of a branch: Qwen's states of the prompt, and ByT5's of what is quoted in it."""
    qwen, byt5 = context.nets["text_encoder"], context.nets["text_encoder_2"]
    take = (qwen.config.num_hidden_layers + 1 + HIDDEN_STATE,)
    text = TEMPLATE.format(prompt or " ")
    ids, mask = context.tokens("tokenizer", [text], length + SKIPPED, "none")
    (states,) = decoder_lm.encode(qwen.config, qwen.plan, qwen.w, ids, mask, take=take)
    inputs = {"text": states[:, SKIPPED:]}
    if (glyphs := glyph_text(prompt)) is not None:
        ids, _ = context.tokens("tokenizer_2", [glyphs], GLYPH_TOKENS, "none")
        inputs["glyphs"] = t5.encode(byt5.config, byt5.plan, byt5.w, ids)
    return inputs


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs, with the first frame where the request has one.

    The frame's latents and a mask of ones are beside the noise, and SigLIP's tokens of it are given. Without
    a frame, zeros are beside the noise.
    """
    vae, output = context.nets["vae"].config, request.output
    size = latent_size(vae, output)
    beside = torch.zeros(1, c.in_channels - c.out_channels, *size, device=context.device)
    shared = {"positions": positions(c, size, context.device)}
    if images := request.images.resized:
        first = context.encode(context.pixels(images))
        beside = first_frame(torch.cat([first, torch.ones_like(first[:, :1])], 1), size[0])
        tower = context.nets["image_encoder"]
        pixels = siglip_vision.pixels(tower.config, images[0]).to(context.device)
        shared["image"] = siglip_vision.encode(tower.config, tower.plan, tower.w, pixels)
    shared["concat"] = patchify(beside, patch(c))
    branches = [_texts(context, prompt, request.text.max_tokens) | shared for prompt in request.texts]
    return on_grid(branches, vae, output, patch(c))


def size_from_image(c: Config, height: int, width: int, multiple: int) -> tuple[int, int]:
    """The (height, width) of a video from an image of this size, of about `target_size`^2 pixels.

    Of the sizes up to 4:1 it has the aspect nearest to the image's among those not longer than the image.
    Source: HunyuanVideo15ImageProcessor of diffusers, whose aspects have five digits.
    """
    patches = round((c.target_size / multiple) ** 2)
    sizes = [
        (tall, wide)
        for tall in range(patches, 0, -1)
        for wide in range(max(1, patches // (tall + 1)), patches // tall + 1)
        if max(tall, wide) <= 4 * min(tall, wide)
    ]
    wanted = height / width

    def excess(size: tuple[int, int]) -> float:
        return (round(size[0] / size[1], 5) - wanted) * (1 if wanted < 1 else -1)

    tall, wide = min((size for size in sizes if excess(size) >= 0), key=excess)
    return tall * multiple, wide * multiple


def extra_components(c: Config) -> tuple[str, ...]:
    """Components needed beside transformer, vae, text_encoder, tokenizer and scheduler."""
    tower = ("image_encoder",) if c.task_type == IMAGE_TO_VIDEO else ()
    return ("text_encoder_2", "tokenizer_2", *tower)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    z = nets["vae"].z_dim
    yield "in_channels", 2 * z + 1, "the vae's latents need"
    yield "out_channels", z, "the vae's latents need"
    yield "text_embed_dim", nets["text_encoder"].hidden_size, "the text encoder gives"
    yield "text_embed_2_dim", nets["text_encoder_2"].d_model, "the second text encoder gives"
    if "image_encoder" in nets:
        yield "image_embed_dim", nets["image_encoder"].hidden_size, "the image encoder gives"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pooled=True,
    pipelines=dict.fromkeys(("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"), prepare),
    patch=patch,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    extra_components=extra_components,
    hidden_states={"text_encoder": (HIDDEN_STATE,)},
    linear_grid=True,
    size_from_image=size_from_image,
    crops_images=True,
    leading_tokens=lambda c, configs: configs["image_encoder"].tokens if "image_encoder" in configs else 0,
)
