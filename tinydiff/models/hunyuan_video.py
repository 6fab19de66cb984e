"""HunyuanVideo and FastHunyuan: FLUX.1's two kinds of blocks on video, with a refined text.

Source: arXiv 2412.03603 and the HunyuanVideoTransformer3DModel checkpoints. The text is Llama's states; a
token refiner of a few blocks adapts them to each timestep, which is computed once before the loop. CLIP's
pooled text, the timestep and the guidance scale modulate the blocks. Only image tokens have positions.
Image to video has two forms: `latent_concat` puts the first frame and a mask beside the noise,
`token_replace` keeps the tokens of the first frame and modulates them as at timestep 0.

Shape letters: B batch, T text tokens, L image tokens, P latent values of a token, C values of a text state,
D width, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models import joint, token_refiner
from tinydiff.models.encoders import clip_text, decoder_lm, llava_vision
from tinydiff.models.encoders.qwen_vision import expand, place
from tinydiff.models.family import Denoiser
from tinydiff.models.recipe import Context, GivenTokens, LoopInputs, Patch, first_frame, latent_size, on_grid
from tinydiff.models.registry import ReleasedModel
from tinydiff.models.token_refiner import FREQUENCIES, sinusoid
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.embed import embedder
from tinydiff.ops.host import integers
from tinydiff.ops.linear import linear
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, conv_rows, linear_rows, through, under
from tinydiff.records import Request, UserError

Tensors = dict[str, Tensor]
Streams = joint.Streams

LATENT_CONCAT, TOKEN_REPLACE = "latent_concat", "token_replace"


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    image_condition_type: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm":
            raise ValueError(f"qk_norm is {self.qk_norm!r}; queries and keys are normalised by 'rms_norm'")
        if self.image_condition_type not in (None, LATENT_CONCAT, TOKEN_REPLACE):
            raise ValueError(
                f"image_condition_type is {self.image_condition_type!r}; it must be {LATENT_CONCAT!r}, "
                f"{TOKEN_REPLACE!r} or null"
            )
        if len(self.rope_axes_dim) != 3 or sum(self.rope_axes_dim) != self.attention_head_dim:
            raise ValueError(
                f"rope_axes_dim is {self.rope_axes_dim}; three axes must share the head width "
                f"{self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of a feed-forward of the image and text blocks."""
        return int(self.width * self.mlp_ratio)


def patch(c: Config) -> Patch:
    """Latents per token along frames, height and width."""
    return c.patch_size_t, c.patch_size, c.patch_size


# --- weights


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape and tensor-parallel split."""
    d = c.width
    yield from through("image", conv_rows("x_embedder.proj", c.in_channels, d, patch(c)))
    yield from under("context_embedder", token_refiner.spec(c.num_refiner_layers, c.text_embed_dim, d))
    embedders = {"timestep_embedder": FREQUENCIES, "text_embedder": c.pooled_projection_dim}
    if c.guidance_embeds:
        embedders["guidance_embedder"] = FREQUENCIES
    for name, fan_in in embedders.items():
        yield from linear_rows(f"time_text_embed.{name}.linear_1", fan_in, d)
        yield from linear_rows(f"time_text_embed.{name}.linear_2", d, d)
    yield from joint.stack_rows(c.num_layers, c.num_single_layers, d, c.attention_head_dim, (c.hidden,))
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
    Cond(joint.FROZEN, "image", dim=1, shared=True),
)
"""The tensors of a request, and the text of each step, that belong to no block."""


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, text_embed_dim], without padding; `pooled` [B, pooled_projection_dim]; `positions`
    [L, 3] of the image tokens. Where the variant has them: `guidance` [1] or [B]; `concat` [B, L, P'],
    channels beside the latents; `frozen` [1, L, 1] bool, the tokens of the first frame. timesteps_S: sigma *
    1000.
    """
    dtype, text = w.dtype, inputs["text"]
    nowhere = inputs["positions"].new_zeros(text.shape[1], 3)
    rope = c.rope_axes_dim, compute_dtype(text.to(dtype)), c.rope_theta, torch.float32
    request = joint.rope_tables(nowhere, inputs["positions"], *rope)
    request |= {name: inputs[name] for name in ("concat", joint.FROZEN) if name in inputs}

    e = w / "time_text_embed"
    pooled = embedder(inputs["pooled"].to(dtype), e / "text_embedder")

    def time(timesteps: Tensor) -> Tensor:
        return embedder(sinusoid(timesteps, dtype), e / "timestep_embedder")[:, None] + pooled

    moving = time(timesteps_S)
    if c.guidance_embeds:
        guidance = inputs["guidance"].to(dtype) * 1000  # half types round it first, as in training
        moving = moving + embedder(sinusoid(guidance, dtype), e / "guidance_embedder")
    steps = joint.modulations(w, c.num_layers, c.num_single_layers, moving)
    if joint.FROZEN in inputs:
        still = time(torch.zeros_like(timesteps_S[:1]))
        frozen = joint.modulations(w, c.num_layers, c.num_single_layers, still)
        request |= {f"{name}_{joint.FROZEN}": row[0] for name, row in frozen.items() if _of_image(name)}
    refiner, layers = w / "context_embedder", c.num_refiner_layers
    steps["text"] = token_refiner.refined(
        plan, refiner, text.to(dtype), timesteps_S, layers, c.attention_head_dim
    )
    return request, steps


def _of_image(norm: str) -> bool:
    """Whether a norm of the blocks sees image tokens."""
    return norm.endswith((".norm1", ".norm"))


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Latent tokens [B, L, P] -> text [B, T, D] and image [B, L, D]."""
    if "concat" in request:
        x_BLP = torch.cat([x_BLP, request["concat"].to(x_BLP.dtype).expand(len(x_BLP), -1, -1)], -1)
    image = linear(x_BLP.to(w.dtype), w / "x_embedder" / "proj")
    text = step["text"].expand(len(image), -1, -1).clone()  # memory of its own, as blocks return it
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


def positions(c: Config, size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] on the patch grid of latents of `size` (frames, height, width)."""
    return grid_positions(*(n // p for n, p in zip(size, patch(c), strict=True)), device=device)


TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
"""The template of a prompt: turns of Llama's chat."""
SKIPPED = 95
"""Template tokens before the prompt, whose states are left out."""
IMAGE = "<image>"
IMAGE_TEMPLATE = (
    f"<|start_header_id|>system<|end_header_id|>\n\n{IMAGE}\n"
    "Describe the video by detailing the following aspects according to the reference image: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
"""The template of a prompt with an image: turns of Llama's chat and the start of an answer."""
IMAGE_SKIPPED = 103
"""Its tokens before the prompt, the image counted as one."""
HEADER_END, HEADER = "<|end_header_id|>", 4
"""What ends the header of a turn, and how many tokens of the answer's header are left out."""
EVERY = {LATENT_CONCAT: 2, TOKEN_REPLACE: 4}
"""Kind of first frame -> of how many of the image's tokens one is read."""
EVERY_NEGATIVE = 2
"""The same for a negative prompt, whose image is black."""
IMAGE_SHARE = 0.001
"""How much of the noise that the loop starts from is the image, in every frame."""
CLIP_TOKENS = 77


def _text(context: Context, text: str, length: int) -> Tensor:
    """Llama's states of a prompt [1, T, C]."""
    llama = context.nets["text_encoder"]
    ids, mask = context.tokens("tokenizer", [TEMPLATE.format(text)], length + SKIPPED, "none")
    (states,) = decoder_lm.encode(llama.config, llama.plan, llama.w, ids, mask, take=_states(llama.config))
    return states[:, SKIPPED:]


def _states(c: decoder_lm.Config) -> tuple[int]:
    """Which states of a language model with this config are read."""
    return (c.num_hidden_layers + 1 + HIDDEN_STATE,)


def _text_and_image(context: Context, text: str, length: int, image: numpy.ndarray, every: int) -> Tensor:
    """LLaVA's states of an image, one of `every`, and of a prompt [1, N + T, C].

    The header of the answer is left out, or the last four tokens of a text that is cut off before it. Raises
    UserError for a prompt that has the image's token.
    """
    llama, eyes = context.nets["text_encoder"], context.nets["vision"]
    pixels = llava_vision.pixels(eyes.config, image).to(context.device)
    tokens = llava_vision.encode(eyes.config, eyes.plan, eyes.w, pixels)[0]
    ids, _ = context.tokens("tokenizer", [IMAGE_TEMPLATE.format(text)], length + IMAGE_SKIPPED, "none")
    row, image_id, size = integers(ids[0]), eyes.config.image_token_index, len(tokens)
    try:
        ids = torch.tensor([expand(row, image_id, [size])], device=context.device)
    except ValueError as error:
        raise UserError(
            "prompt", f"prompt: {IMAGE} stands for the input image and cannot be in a text ({error})"
        ) from error
    embeds = place(decoder_lm.embed(llama.config, llama.plan, llama.w, ids), ids, image_id, tokens)
    (states,) = decoder_lm.encode(
        llama.config, llama.plan, llama.w, ids, take=_states(llama.config), embeds=embeds
    )
    ends = [i for i, token in enumerate(row) if token == context.tokenizers["tokenizer"].token_id(HEADER_END)]
    answer = (ends[-1] if len(ends) != 2 else len(row) - 1) + 1 - HEADER
    first = row.index(image_id)
    seen = states[:, first : first + size : every]
    words = states[:, size - 1 :]  # token i of the text, behind the image, is number i of these
    return torch.cat([seen, words[:, IMAGE_SKIPPED:answer], words[:, answer + HEADER :]], 1)


def _pooled(context: Context, text: str) -> Tensor:
    """CLIP's vector of a prompt."""
    clip = context.nets["text_encoder_2"]
    ids, _ = context.tokens("tokenizer_2", [text], min(CLIP_TOKENS, clip.config.max_position_embeddings))
    pooled = clip_text.encode(clip.config, clip.plan, clip.w, ids).pooled
    assert pooled is not None
    return pooled


def _shared(c: Config, context: Context, request: Request) -> Tensors:
    """The inputs that all branches of a request have."""
    size = latent_size(context.nets["vae"].config, request.output)
    shared = {"positions": positions(c, size, context.device)}
    if c.guidance_embeds:
        shared["guidance"] = torch.tensor([request.guidance.embedded], device=context.device)
    return shared


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of text to video."""
    shared, length = _shared(c, context, request), request.text.max_tokens
    branches = [
        {"text": _text(context, text, length), "pooled": _pooled(context, text)} | shared
        for text in request.texts
    ]
    return on_grid(branches, context.nets["vae"].config, request.output, patch(c))


def prepare_image(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of image to video.

    The first frame has the form that the variant reads, and leaves a trace in the noise of every frame.
    """
    vae, output, images = context.nets["vae"].config, request.output, request.images
    black = numpy.zeros((output.height, output.width, 3), numpy.uint8)
    kind = c.image_condition_type or TOKEN_REPLACE
    seen = [(images.originals[0], EVERY[kind]), (black, EVERY_NEGATIVE)]
    shared, frames = _shared(c, context, request), latent_size(vae, output)[0]
    first, given_tokens = context.encode(context.pixels(images.resized)), None
    if kind == LATENT_CONCAT:
        beside = first_frame(torch.cat([first, torch.ones_like(first[:, :1])], 1), frames)
        shared["concat"] = patchify(beside, patch(c))
    else:
        frozen = shared[joint.FROZEN] = (shared["positions"][:, 0] == 0)[None, :, None]
        given_tokens = GivenTokens(patchify(first_frame(first, frames), patch(c)), ~frozen)
    branches = [
        {
            "text": _text_and_image(context, text, request.text.max_tokens, image, every),
            "pooled": _pooled(context, text),
            **shared,
        }
        for text, (image, every) in zip(request.texts, seen, strict=False)
    ]
    trace = patchify(first.expand(-1, -1, frames, -1, -1), patch(c)), IMAGE_SHARE
    return on_grid(branches, vae, output, patch(c), given_tokens, trace)


def leading_tokens(c: Config, configs: Entries) -> int:
    """Tokens of the text stream before those of the prompt: of the image."""
    every = EVERY[c.image_condition_type or TOKEN_REPLACE]
    return -(-configs["vision"].tokens // every) if "vision" in configs else 0


def unshown_frames(c: Config) -> int:
    """The first frames of a decoded video, which are left out."""
    return 4 if c.image_condition_type == LATENT_CONCAT else 0


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    z = nets["vae"].z_dim
    yield "in_channels", 2 * z + 1 if c.image_condition_type == LATENT_CONCAT else z, "the vae's latents need"
    yield "out_channels", z, "the vae's latents need"
    yield "text_embed_dim", nets["text_encoder"].hidden_size, "the text encoder gives"
    yield "pooled_projection_dim", nets["text_encoder_2"].hidden_size, "the second text encoder gives"
    yield "guidance_embeds", row.guidance_form == "embedded", f"the guidance of {row.name} needs"


HIDDEN_STATE = -3
"""Which of Llama's states are read, counted from the end."""

FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pooled=True,
    pipelines={"HunyuanVideoPipeline": prepare, "HunyuanVideoImageToVideoPipeline": prepare_image},
    patch=patch,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=must_fit,
    extra_components=lambda c: ("text_encoder_2", "tokenizer_2"),
    hidden_states={"text_encoder": (HIDDEN_STATE,)},
    linear_grid=True,
    leading_tokens=leading_tokens,
    unshown_frames=unshown_frames,
)
