"""ERNIE-Image and ERNIE-Image-Turbo: one stack on image and text tokens, with one modulation for all blocks.

Source: Baidu's ERNIE-Image and the ErnieImageTransformer2DModel checkpoints; the two models differ in their
weights only.

Shape letters: B batch, T text tokens, L image tokens, P latent values of a token, D width, H heads, E head
width, S steps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.encoders.decoder_generate import Sampling, generate
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import Streams, joint_mask, split
from tinydiff.models.recipe import Context, LoopInputs, latent_size, on_grid
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, modulate, rms_norm
from tinydiff.ops.rope import grid_positions, rope_table
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.parallel.sequence import keys
from tinydiff.records import Request, UserError

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_layers: int = 36
    ffn_hidden_size: int = 12288
    in_channels: int = 128
    out_channels: int = 128
    patch_size: int = 1
    text_in_dim: int = 3072
    rope_theta: int = 256
    rope_axes_dim: tuple[int, int, int] = (32, 48, 48)
    eps: float = 1e-6
    qk_layernorm: bool = True

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise ValueError(
                f"patch_size is {self.patch_size}; a token of ERNIE-Image is one pixel of its latents (1)"
            )
        if not self.qk_layernorm:
            raise ValueError("qk_layernorm is false; ERNIE-Image normalises queries and keys")
        if self.text_in_dim == self.hidden_size:
            raise ValueError(
                f"text_in_dim is hidden_size ({self.hidden_size}); such a model has no text_proj, and none "
                "was released"
            )
        dims = self.rope_axes_dim
        if len(dims) != 3 or any(dim % 2 for dim in dims) or sum(dims) != self.head_width:
            raise ValueError(
                f"rope_axes_dim is {self.rope_axes_dim}; it must be three even parts of a head's width "
                f"{self.head_width}"
            )

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads


# --- weights


def _block_rows(c: Config) -> Iterator[Row]:
    d, a = c.hidden_size, "self_attention"
    for name in ("adaLN_sa_ln", "adaLN_mlp_ln"):
        yield from norm_rows(name, d)
    for name in ("to_q", "to_k", "to_v"):
        yield from linear_rows(f"{a}.{name}", d, d, "out", bias=False)
    for name in ("norm_q", "norm_k"):
        yield from norm_rows(f"{a}.{name}", c.head_width)
    yield from linear_rows(f"{a}.to_out.0", d, d, "in", bias=False, attends=("joint", "joint"))
    for name in ("gate_proj", "up_proj"):
        yield from linear_rows(f"mlp.{name}", d, c.ffn_hidden_size, "out", bias=False)
    yield from linear_rows("mlp.linear_fc2", c.ffn_hidden_size, d, "in", bias=False)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split."""
    d = c.hidden_size
    yield Row("x_embedder.proj.weight", (d, c.in_channels, 1, 1), input="image")
    yield Row("x_embedder.proj.bias", (d,))
    yield from through("prompt", linear_rows("text_proj", c.text_in_dim, d, bias=False))
    for name in ("time_embedding.linear_1", "time_embedding.linear_2"):
        yield from linear_rows(name, d, d)
    yield from through("steps", linear_rows("adaLN_modulation.1", d, 6 * d))
    yield from repeat("layers", c.num_layers, through("joint", _block_rows(c)))
    yield from through("steps", linear_rows("final_norm.linear", d, 2 * d))
    yield from through("image", linear_rows("final_linear", d, c.out_channels))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", dim=1, shared=True),
    Cond("sin", "image", dim=1, shared=True),
    Cond("text_cos", "text", dim=1, shared=True),
    Cond("text_sin", "text", dim=1, shared=True),
    Cond("mask", "text", dim=1, shared=True),
    Cond("text", "text", dim=1),
)
"""The tensors of a request that belong to no block."""


def _positions(grid_LA: Tensor, tokens: int, mask_BT: Tensor | None) -> Streams:
    """Positions (word, row, column) of text [B or 1, T, 3] and image [B or 1, L, 3].

    The image's first axis continues where the text ends.
    """
    device = grid_LA.device
    ends = torch.tensor([tokens], device=device) if mask_BT is None else mask_BT.sum(1)
    text = grid_positions(tokens, 1, 1, device=device).expand(len(ends), -1, -1)
    return text, grid_LA + F.pad(ends[:, None, None], (0, 2))


def _rope(c: Config, positions_BLA: Tensor) -> Streams:
    """Positions [B, L, 3] -> cosines and sines [B, L, E], each angle twice in a row.

    `_rotate` pairs the halves of a head all the same: the checkpoints were trained so. The reference computes
    angles in float32.
    """
    tables = rope_table(positions_BLA.flatten(0, 1), c.rope_axes_dim, c.rope_theta, torch.float32)
    cos, sin = (
        torch.unflatten(table.repeat_interleave(2, -1), 0, positions_BLA.shape[:2]) for table in tables
    )
    return cos, sin


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, text_in_dim], `positions` [L, 3] of the image tokens and, where texts of a batch
    differ in length, `mask` [B, T]: ones for a text's tokens, then zeros. timesteps_S: sigma * 1000.
    """
    dtype = w.dtype
    text = linear(inputs["text"].to(dtype), w / "text_proj")
    request = {"text": text}
    if "mask" in inputs:
        request["mask"] = inputs["mask"].bool()
    text_at, image_at = _positions(inputs["positions"], text.shape[1], request.get("mask"))
    for stream, places in (("text_", text_at), ("", image_at)):
        cos, sin = _rope(c, places)
        request |= {f"{stream}cos": cos, f"{stream}sin": sin}

    # Half types round the timestep, as in the reference.
    cosines, sines = timestep_embedding(timesteps_S.to(dtype), c.hidden_size).chunk(2, -1)
    time = embedder(torch.cat([sines, cosines], -1).to(dtype), w / "time_embedding")[:, None]
    modulation = torch.unflatten(linear(F.silu(time), w / "adaLN_modulation" / 1), -1, (6, -1))
    last = torch.unflatten(linear(time, w / "final_norm" / "linear"), -1, (2, -1))
    return request, {"modulation": modulation.to(compute_dtype(modulation)), "last_modulation": last}


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Latent tokens [B, L, P] -> text [B, T, D] and image [B, L, D]."""
    text = request["text"].expand(x_BLP.shape[0], -1, -1).contiguous()
    return text, linear(x_BLP.to(w.dtype), w / "x_embedder" / "proj")


def _rotate(x_BLHE: Tensor, cos_BLE: Tensor, sin_BLE: Tensor) -> Tensor:
    """Rotate the pairs (x0, x[E/2]), (x1, x[E/2 + 1]), ..., each half by its own angle.

    Computed in the wider type, returned in x's.
    """
    a, b = x_BLHE.chunk(2, -1)
    return (x_BLHE * cos_BLE.unsqueeze(2) + torch.cat([-b, a], -1) * sin_BLE.unsqueeze(2)).to(x_BLHE.dtype)


def _scaled(x: Tensor, w: Weights, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm, then `y * (1 + scale) + shift` in the modulation's type, returned in x's."""
    return (rms_norm(x, w, eps) * (1 + scale) + shift).to(x.dtype)


def block(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Self-attention and feed-forward on the joint sequence, both modulated."""
    length, x = streams[0].shape[1], torch.cat(streams, 1)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = shared["modulation"].unsqueeze(2).unbind(1)
    cos, sin = (torch.cat([shared[f"text_{name}"], shared[name]], 1) for name in ("cos", "sin"))
    mask = joint_mask(shared["mask"], x.shape[1] - length) if "mask" in shared else None

    a = w / "self_attention"
    y = _scaled(x, w / "adaLN_sa_ln", shift, scale, c.eps)
    q, k, v = (
        torch.unflatten(linear(y, a / name), -1, (-1, c.head_width)) for name in ("to_q", "to_k", "to_v")
    )
    q, k = (_rotate(rms_norm(z, a / norm, c.eps), cos, sin) for z, norm in ((q, "norm_q"), (k, "norm_k")))
    y = attention(plan, q, k, v, mask, keys=keys(plan, shared, "joint")).flatten(2)
    x = x + (gate * linear_sum(plan, y, a / "to_out" / 0)).to(x.dtype)

    ff = w / "mlp"
    y = _scaled(x, w / "adaLN_mlp_ln", ff_shift, ff_scale, c.eps)
    y = linear_sum(plan, linear(y, ff / "up_proj") * F.gelu(linear(y, ff / "gate_proj")), ff / "linear_fc2")
    (text, image), (y_text, y_image) = split(x, length), split((ff_gate * y).to(x.dtype), length)
    return text + y_text, image + y_image


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
    return [(block, f"layers.{i}") for i in range(c.num_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """The image stream [B, L, D] -> predicted velocity of each token [B, L, P]."""
    scale, shift = step["last_modulation"].unsqueeze(2).unbind(1)
    return linear(modulate(streams[1], shift, scale, c.eps), w / "final_linear")


# --- what a pipeline needs of this family


def positions(size: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [L, 3] (0, row, column) of the tokens of latents of `size` (1, height, width)."""
    return grid_positions(*size, device=device)


PIXEL = (1, 1, 1)
"""Latents per token along frames, height and width: the autoencoder folds 2x2 latents itself."""


def _text_states(context: Context, text: str, length: int) -> Tensor:
    """The language model's last hidden states but one [1, T, text_in_dim], without padding."""
    encoder = context.nets["text_encoder"]
    ids, _ = context.tokens("tokenizer", [text], length, "none")
    if ids.shape[1] == 0:  # an empty text, and a tokenizer that opens none
        ids, _ = context.tokens("tokenizer", ["<s>"], length, "none")
    (state,) = decoder_lm.encode(encoder.config, encoder.plan, encoder.w, ids, take=(encoder.config.layers,))
    return state


NEUTRAL_SAMPLING = {
    "num_beams": 1, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None,
}  # fmt: skip
"""Other sampling entries of generation_config.json, at the values that change nothing."""


def _sampling(entries: Entries) -> Sampling:
    """The pipeline's own sampling, completed by generation_config.json and transformers' defaults.

    Raises UserError for an entry that is not supported.
    """
    entries = {name: value for name, value in entries.items() if value is not None}
    for name, neutral in NEUTRAL_SAMPLING.items():
        if entries.get(name, neutral) != neutral:
            raise UserError(
                "model_path",
                f"model_path: {name} in pe/generation_config.json is {entries[name]!r}; supported is "
                f"{neutral!r}",
            )
    return Sampling(0.6, entries.get("top_k", 50), 0.95, entries.get("repetition_penalty", 1.0))


def rewrite_prompt(context: Context, request: Request) -> str:
    """The prompt, rewritten by the model's own language model for the size of the image.

    Sampling starts from one fixed seed, so a prompt and a size give the same text for every seed and rank.
    """
    net, tokenizer = context.nets["pe"], context.tokenizers["pe_tokenizer"]
    if tokenizer.chat is None:
        raise UserError(
            "model_path",
            "model_path: pe_tokenizer has no chat template; --use-pe false does without the component pe",
        )
    message = json.dumps(
        {"prompt": request.text.prompt, "width": request.output.width, "height": request.output.height},
        ensure_ascii=False,
    )
    ids, _ = context.tokens(
        "pe_tokenizer", [tokenizer.chat([{"role": "user", "content": message}])], None, "none"
    )
    limit, stop = tokenizer.longest or request.text.max_tokens, {tokenizer.eos} - {None}
    [answer] = generate(
        net.config,
        net.plan,
        net.w,
        ids,
        limit=limit,
        stop=stop,
        sampling=_sampling(net.generation),
        generator=torch.Generator().manual_seed(0),
    )
    text = tokenizer.text(answer).strip()
    log.info("the prompt as rewritten: %s", text)
    return text


def prepare(c: Config, context: Context, request: Request) -> LoopInputs:
    """Loop inputs: the prompt, rewritten if `use_pe`, and the negative prompt as it is."""
    vae = context.nets["vae"].config
    where = positions(latent_size(vae, request.output), context.device)
    prompt, *negative = request.texts
    revised = rewrite_prompt(context, request) if request.text.rewrite else None
    texts = [prompt if revised is None else revised, *negative]
    limit = context.tokenizers["tokenizer"].longest or request.text.max_tokens
    branches = [{"text": _text_states(context, text, limit), "positions": where} for text in texts]
    return replace(on_grid(branches, vae, request.output, PIXEL), revised=revised)


def must_fit(c: Config, nets: Entries, row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    for field in ("in_channels", "out_channels"):
        yield field, nets["vae"].z_dim, "the vae's latents need"
    yield "text_in_dim", nets["text_encoder"].hidden_size, "the text encoder gives"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines={"ErnieImagePipeline": prepare},
    patch=lambda c: PIXEL,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.hidden_size // c.num_attention_heads,
    must_fit=must_fit,
    linear_grid=True,
    hidden_states={"text_encoder": (-2,)},
    config_overrides={"vae": {"batch_norm_eps": 1e-5}},
)
