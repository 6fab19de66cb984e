"""Z-Image: a single-stream transformer; caption and image are refined alone, then run as one sequence.

Source: arXiv 2511.22699 and the ZImageTransformer2DModel checkpoints (Z-Image, Z-Image-Turbo). Caption and
image are each filled up to a multiple of 32 tokens with learned pad tokens, which are attended to. The
network's own output points from noise to image; `post` changes its sign.

Shape letters: B batch, L image tokens, P latent values of a token, D width, H heads, T text tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import Streams, heads, joint_mask, split
from tinydiff.models.recipe import Context, Latents, LoopInputs, latent_size, shift_by_tokens, token_count
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import timestep_embedding
from tinydiff.ops.host import integers
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, layer_norm, rms_norm
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.rope import grid_positions, rope_table
from tinydiff.ops.weights import Weights
from tinydiff.parallel import sequence
from tinydiff.parallel.plan import Cond, Input, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.records import Request

Tensors = dict[str, Tensor]

MULTIPLE = 32
"""Caption and image are each filled up to a multiple of this many tokens."""
TIME_FREQUENCIES, TIME_HIDDEN, TIME_WIDTH = 256, 1024, 256
"""Widths of the timestep's embedding, written into the reference's code."""
QK_EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1536, 512, 512)

    def __post_init__(self) -> None:
        if len(self.all_patch_size) != 1 or len(self.all_f_patch_size) != 1:
            sizes = f"all_patch_size is {self.all_patch_size} and all_f_patch_size is {self.all_f_patch_size}"
            raise ValueError(f"{sizes}; a network of one patch size is supported")
        if self.n_kv_heads != self.n_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must be n_heads, which is {self.n_heads}")
        if not self.qk_norm:
            raise ValueError("qk_norm is False; Z-Image normalises queries and keys")
        if self.siglip_feat_dim is not None:
            raise ValueError(
                f"siglip_feat_dim is {self.siglip_feat_dim}; only networks without image features (None) "
                "are supported"
            )
        if sum(self.axes_dims) != self.head_dim:
            raise ValueError(
                f"axes_dims is {self.axes_dims}; its sum must be the width of a head, {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latents per token along frames, height and width."""
        return (self.all_f_patch_size[0], self.all_patch_size[0], self.all_patch_size[0])

    @property
    def patch_name(self) -> str:
        """The patch in the names of the first and the last layer."""
        return f"{self.all_patch_size[0]}-{self.all_f_patch_size[0]}"

    @property
    def time_width(self) -> int:
        return min(self.dim, TIME_WIDTH)


# --- weights


def _layer_rows(c: Config, attends: tuple[Input, Input] | None = None) -> Iterator[Row]:
    """A layer that runs once per request (None) has no modulation."""
    d, hidden = c.dim, int(c.dim / 3 * 8)
    for key in ("to_q", "to_k", "to_v"):
        yield from linear_rows(f"attention.{key}", d, d, "out", bias=False)
    yield from linear_rows("attention.to_out.0", d, d, "in", bias=False, attends=attends)
    for key in ("norm_q", "norm_k"):
        yield from norm_rows(f"attention.{key}", c.head_dim)
    for key in ("w1", "w3"):
        yield from linear_rows(f"feed_forward.{key}", d, hidden, "out", bias=False)
    yield from linear_rows("feed_forward.w2", hidden, d, "in", bias=False)
    for key in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield from norm_rows(key, d)
    if attends is not None:
        yield from through("steps", linear_rows("adaLN_modulation.0", c.time_width, 4 * d))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split."""
    d, patch, final = c.dim, c.in_channels * prod(c.patch_size), f"all_final_layer.{c.patch_name}"
    yield Row("x_pad_token", (1, d))
    yield Row("cap_pad_token", (1, d))
    yield from through("image", linear_rows(f"all_x_embedder.{c.patch_name}", patch, d))
    yield from linear_rows("t_embedder.mlp.0", TIME_FREQUENCIES, TIME_HIDDEN)
    yield from linear_rows("t_embedder.mlp.2", TIME_HIDDEN, c.time_width)
    yield from norm_rows("cap_embedder.0", c.cap_feat_dim)
    yield from through("prompt", linear_rows("cap_embedder.1", c.cap_feat_dim, d))
    image, joint = _layer_rows(c, ("image", "image")), _layer_rows(c, ("joint", "joint"))
    yield from repeat("noise_refiner", c.n_refiner_layers, through("image", image))
    yield from repeat("context_refiner", c.n_refiner_layers, _layer_rows(c))
    yield from repeat("layers", c.n_layers, through("joint", joint))
    yield from through("steps", linear_rows(f"{final}.adaLN_modulation.1", c.time_width, d))
    yield from through("image", linear_rows(f"{final}.linear", d, patch))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", dim=1, shared=True),
    Cond("sin", "image", dim=1, shared=True),
    Cond("text_cos", "text", dim=1, shared=True),
    Cond("text_sin", "text", dim=1, shared=True),
    Cond("mask", "text", dim=1, shared=True),
    Cond("real", "image", dim=1),
    Cond("limit"),
    Cond("text", "text", dim=1),
)
"""The tensors of a request that belong to no block."""


def _modulation(time_SE: Tensor, w: Weights) -> Tensor:
    """Time embedding of S steps [S, E] -> a block's modulation [S, 1, 4, 1, D].

    The four are scale and gate of attention, then of the feed-forward.
    """
    raw = linear(time_SE, w / "adaLN_modulation" / 0)
    scale, gate, ff_scale, ff_gate = raw.to(compute_dtype(raw)).chunk(4, -1)
    return torch.stack([1 + scale, gate.tanh(), 1 + ff_scale, ff_gate.tanh()], 1)[:, None, :, None]


def _steps(c: Config, w: Weights, timesteps_S: Tensor) -> Tensors:
    """Tensors of the steps: every block's modulation, and the last norm's scale.

    The network's time runs from 0 at noise to 1 at the image.
    """
    mlp = w / "t_embedder" / "mlp"
    time = (1000 - timesteps_S.float()) / 1000 * c.t_scale
    sinusoid = timestep_embedding(time, TIME_FREQUENCIES).to(w.dtype)
    time_SE = linear(F.silu(linear(sinusoid, mlp / 0)), mlp / 2)
    final = linear(F.silu(time_SE), w / "all_final_layer" / c.patch_name / "adaLN_modulation" / 1)
    modulations = {f"{at}.modulation": _modulation(time_SE, w / at) for _, at in blocks(c)}
    return modulations | {"scale": (1 + final.to(compute_dtype(final)))[:, None, None]}


def _tables(c: Config, plan: Plan, inputs: Tensors, lengths: list[int]) -> Tensors:
    """Rope tables [1 or B, T or L, head_dim / 2], float32 as the reference keeps them.

    lengths: of the captions with their pads. The image's positions begin behind its caption, so captions
    of different lengths have tables of their own. The image's pads are all at 0.
    """
    device = inputs["positions"].device
    start = torch.tensor([[[length + 1, 0, 0]] for length in lengths], device=device)
    image = inputs["positions"] + torch.where(inputs["real"], start, 0)
    text = F.pad(torch.arange(1, max(lengths) + 1, device=device)[:, None], (0, 2)).expand(
        len(lengths), -1, -1
    )
    tables: Tensors = {}
    for stream, places in (("text_", text), ("", image)):
        rope = rope_table(places.flatten(0, 1), c.axes_dims, c.rope_theta)
        for name, table in zip(("cos", "sin"), rope, strict=True):
            tables[stream + name] = torch.unflatten(table.float(), 0, places.shape[:2])
    return tables


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, cap_feat_dim]; `positions` [L, 3] and `real` [1, L, 1] bool of the image's
    tokens, from the functions of these names; where captions differ in length, `mask` [B, T], 1 on a
    caption's tokens, which come first, and 0 behind them; where guidance is clamped, its `limit` [1, 1,
    1]. timesteps_S: sigma * 1000.
    """
    embed, pad = w / "cap_embedder", w["cap_pad_token"]
    batch, tokens, _ = inputs["text"].shape
    captions = integers(inputs["mask"].sum(1)) if "mask" in inputs else [tokens] * batch
    lengths = [length + pad_tokens(length) for length in captions]
    place, one_length = torch.arange(max(lengths), device=pad.device), len(set(lengths)) == 1

    text = linear(rms_norm(inputs["text"].to(w.dtype), embed / 0, c.norm_eps), embed / 1)
    text = F.pad(text, (0, 0, 0, max(lengths) - tokens))
    text = torch.where(place[:, None] < torch.tensor(captions, device=pad.device)[:, None, None], text, pad)
    mask = None if one_length else place < torch.tensor(lengths, device=pad.device)[:, None]
    tables = _tables(c, plan, inputs, lengths[:1] if one_length else lengths)

    rope, key_mask = (tables["text_cos"], tables["text_sin"]), None if mask is None else mask[:, None, None]
    for i in range(c.n_refiner_layers):
        text = _layer(c, plan, w / "context_refiner" / i, text, rope, None, key_mask)
    request = tables | {"text": text} | {name: inputs[name] for name in ("real", "limit") if name in inputs}
    request |= {} if mask is None else {"mask": mask}
    return request, _steps(c, w, timesteps_S)


# --- the network


def _layer(
    c: Config,
    plan: Plan,
    w: Weights,
    x_BLD: Tensor,
    rope: tuple[Tensor, Tensor],
    modulation: Tensor | None,
    mask: Tensor | None = None,
    keys: Sequence[Tensor] = (),
) -> Tensor:
    """Self-attention and a gated feed-forward, each between two norms.

    modulation [B, 4, 1, D]: scales and gates; None for a layer without them.
    """
    scale, gate, ff_scale, ff_gate = (1, 1, 1, 1) if modulation is None else modulation.unbind(1)
    a = w / "attention"
    y = (rms_norm(x_BLD, w / "attention_norm1", c.norm_eps) * scale).to(x_BLD.dtype)
    y = attention(plan, *heads(a, y, c.head_dim, rope, eps=QK_EPS), mask, keys=keys).flatten(2)
    y = linear_sum(plan, y, a / "to_out" / 0)
    x_BLD = (x_BLD + rms_norm(y, w / "attention_norm2", c.norm_eps) * gate).to(x_BLD.dtype)

    f = w / "feed_forward"
    y = (rms_norm(x_BLD, w / "ffn_norm1", c.norm_eps) * ff_scale).to(x_BLD.dtype)
    y = linear_sum(plan, F.silu(linear(y, f / "w1")) * linear(y, f / "w3"), f / "w2")
    return (x_BLD + rms_norm(y, w / "ffn_norm2", c.norm_eps) * ff_gate).to(x_BLD.dtype)


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Latent tokens with their pads [B, L, P] -> the refined caption [B, T, D] and the image [B, L, D]."""
    embed = w / "all_x_embedder" / c.patch_name
    x = rearrange(x_BLP, "b l (c patch) -> b l (patch c)", c=c.in_channels).to(w.dtype)
    x = torch.where(request["real"], linear(x, embed), w["x_pad_token"])
    return request["text"].expand(len(x), -1, -1).contiguous(), x


def refine(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """One layer over the image alone."""
    text, image = streams
    rope, keys = (shared["cos"], shared["sin"]), sequence.keys(plan, shared, "image")
    return text.clone(), _layer(c, plan, w, image, rope, request["modulation"], keys=keys)


def block(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """One layer over caption and image as one sequence."""
    text, image = streams
    cos, sin = (torch.cat([shared[f"text_{name}"], shared[name]], 1) for name in ("cos", "sin"))
    mask = joint_mask(shared["mask"], image.shape[1]) if "mask" in shared else None
    keys = sequence.keys(plan, shared, "joint")
    x = _layer(c, plan, w, torch.cat(streams, 1), (cos, sin), request["modulation"], mask, keys)
    text, image = (part.clone(memory_format=torch.contiguous_format) for part in split(x, text.shape[1]))
    return text, image


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    refiners: Stack = [(refine, f"noise_refiner.{i}") for i in range(c.n_refiner_layers)]
    return refiners + [(block, f"layers.{i}") for i in range(c.n_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """The image [B, L, D] -> predicted velocity of each token [B, L, P], minus the network's own output."""
    x = streams[1]
    y = (layer_norm(x) * step["scale"]).to(x.dtype)
    y = linear(y, w / "all_final_layer" / c.patch_name / "linear")
    return -rearrange(y, "b l (patch c) -> b l (c patch)", c=c.in_channels)


# --- what a pipeline needs of this family


TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""The language model's chat template: the user's turn, then the start of the answer."""


def pad_tokens(tokens: int) -> int:
    """How many pad tokens follow `tokens` tokens of a caption or an image."""
    return -tokens % MULTIPLE


def positions(c: Config, size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] on the patch grid of latents of `size` (frames, height, width).

    The pads behind the grid are at 0.
    """
    grid = grid_positions(*(n // p for n, p in zip(size, c.patch_size, strict=True)), device=device)
    return F.pad(grid, (0, 0, 0, pad_tokens(len(grid))))


def real(c: Config, size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """bool [1, L, 1], true for the tokens of latents of `size` and false for the pads behind them."""
    tokens = prod(n // p for n, p in zip(size, c.patch_size, strict=True))
    return torch.arange(tokens + pad_tokens(tokens), device=device).view(1, -1, 1) < tokens


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs: each text's last hidden states but one, without padding; latent tokens with their pads."""
    encoder, vae = context.nets["text_encoder"], context.nets["vae"].config
    size, tokens = latent_size(vae, request.output), token_count(vae, request.output, c.patch_size)
    shared = {"positions": positions(c, size, context.device), "real": real(c, size, context.device)}
    limit = request.guidance.normalization
    if limit:
        shared["limit"] = torch.full((1, 1, 1), limit, dtype=torch.float64, device=context.device)

    def branch(text: str) -> Tensors:
        ids, _ = context.tokens("tokenizer", [TEMPLATE.format(text)], request.text.max_tokens, "none")
        last = (encoder.config.layers,)
        [hidden] = decoder_lm.encode(encoder.config, encoder.plan, encoder.w, ids, take=last)
        return {"text": hidden} | shared

    return LoopInputs(
        branches=tuple(branch(text) for text in request.texts),
        latents=(
            Latents(
                size=(vae.z_dim, *size),
                pack=lambda x: F.pad(patchify(x, c.patch_size), (0, 0, 0, pad_tokens(tokens))),
                unpack=lambda x: unpatchify(x[:, :tokens], c.patch_size, size),
            ),
        ),
        guidance="clamped" if limit else None,
    )


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    yield "in_channels", nets["vae"].z_dim, "the vae's latents need"
    yield "cap_feat_dim", nets["text_encoder"].hidden_size, "the text encoder gives"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines={"ZImagePipeline": prepare},
    patch=lambda c: c.patch_size,
    heads=lambda c: c.n_heads,
    head_width=lambda c: c.dim // c.n_heads,
    must_fit=must_fit,
    mu=lambda c, tokens, steps, scheduler: shift_by_tokens(tokens, scheduler),
    linear_grid=True,
    hidden_states={"text_encoder": (-2,)},
    longest_side=lambda c: min(c.axes_lens[1:]) * c.patch_size[-1],
    pad_tokens=pad_tokens,
)
