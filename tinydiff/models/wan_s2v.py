"""Wan2.2 speech to video: Wan's transformer, to which a sound, a reference image and past frames are added.

Source: arXiv 2508.18621 and the WanModel_S2V checkpoint. The blocks are those of `models.wan`. Behind the
tokens of the video stand those of a reference image and those of past frames, packed the coarser the older
they are; both stay at timestep 0. After some blocks the tokens of each latent frame attend to that frame's
tokens of the sound (`inject`), normalised by what the sound is like as a whole. A pose video, where one is
given, is added to the tokens of the video.

Shape letters: B batch, L tokens of the video and of what stands behind it, P latent values of a token, D
width, F latent frames, K sound tokens of a latent frame, S states of the sound's encoder, C their width, T
frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.keymap import KeyMap
from tinydiff.models import wan
from tinydiff.models.family import Denoiser
from tinydiff.models.layouts.wan import LINES
from tinydiff.models.registry import ReleasedModel
from tinydiff.models.wan_s2v_recipe import BUCKETS, HEARING, PAST, prepare
from tinydiff.ops.attention import attention
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import compute_dtype, layer_norm, modulate, rms_norm_across
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.parallel.sequence import without_sequence

Tensors = dict[str, Tensor]

VIDEO, REFERENCE, MOTION = range(3)
"""Rows of the table that says what a token is."""
INJECTOR_EPS, ADAIN_EPS = 1e-6, 1e-5
"""Of the norms of an injector and of the one that the sound modulates, which the config does not name."""


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    model_type: str = "s2v"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    dim: int = 2048
    ffn_dim: int = 8192
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 16
    num_layers: int = 32
    window_size: tuple[int, ...] = ()
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    cond_dim: int = 16
    audio_dim: int = 5120
    num_audio_token: int = 4
    enable_adain: bool = False
    adain_mode: str = "attn_norm"
    audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27)
    zero_init: bool = False
    zero_timestep: bool = True
    enable_motioner: bool = False
    add_last_motion: bool = True
    enable_tsm: bool = False
    trainable_token_pos_emb: bool = False
    motion_token_num: int = 1024
    enable_framepack: bool = True
    framepack_drop_mode: str = "padd"
    motion_frames: int = 73
    audio_states: int = 25
    """Hidden states of the sound's encoder, which are 25 in the checkpoint's code."""

    def __post_init__(self) -> None:
        only = {
            **{"model_type": "s2v", "qk_norm": True, "adain_mode": "attn_norm", "enable_framepack": True},
            **{"enable_motioner": False, "add_last_motion": True, "trainable_token_pos_emb": False},
            **{"patch_size": (1, 2, 2), "zero_timestep": True},
        }
        for name, wanted in only.items():
            if getattr(self, name) != wanted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; only {wanted!r} is supported")
        if self.dim % (2 * self.num_heads) or self.dim % 4:
            raise ValueError(
                f"dim is {self.dim}; it must be a multiple of 4 and of twice num_heads, {2 * self.num_heads}"
            )
        layers = self.audio_inject_layers
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"audio_inject_layers is {list(layers)}; each must be a layer from 0 to"
                f" {self.num_layers - 1}, once"
            )

    @cached_property
    def wan(self) -> wan.Config:
        """The config of the transformer without its additions."""
        return wan.Config(
            patch_size=self.patch_size,
            num_attention_heads=self.num_heads,
            attention_head_dim=self.dim // self.num_heads,
            in_channels=self.in_dim,
            out_channels=self.out_dim,
            text_dim=self.text_dim,
            freq_dim=self.freq_dim,
            ffn_dim=self.ffn_dim,
            num_layers=self.num_layers,
            cross_attn_norm=self.cross_attn_norm,
            eps=self.eps,
        )

    @property
    def past(self) -> int:
        """Latent frames of the past frames."""
        return (self.motion_frames + 3) // 4

    @property
    def injected(self) -> tuple[int, ...]:
        """The blocks that a sound follows, in order: injector i stands behind the i-th of them."""
        return tuple(sorted(self.audio_inject_layers))


# --- weights


def _conv_rows(name: str, fan_in: int, fan_out: int) -> Iterator[Row]:
    yield Row(f"{name}.weight", (fan_out, fan_in, 3))
    yield Row(f"{name}.bias", (fan_out,))


def _audio_encoder_rows(c: Config) -> Iterator[Row]:
    d, at = c.dim, "casual_audio_encoder"  # spelt so in the checkpoint
    yield Row(f"{at}.weights", (1, c.audio_states, 1, 1))
    at = f"{at}.encoder"
    yield Row(f"{at}.padding_tokens", (1, 1, 1, d))
    yield from _conv_rows(f"{at}.conv1_local.conv", c.audio_dim, d // 4 * c.num_audio_token)
    yield from _conv_rows(f"{at}.conv2.conv", d // 4, d // 2)
    yield from _conv_rows(f"{at}.conv3.conv", d // 2, d)
    if c.enable_adain:
        yield from _conv_rows(f"{at}.conv1_global.conv", c.audio_dim, d // 4)
        yield from linear_rows(f"{at}.final_linear", d, d)


def _injector_rows(c: Config) -> Iterator[Row]:
    d = c.dim
    yield from through("image", linear_rows("q", d, d, "out"))
    yield from linear_rows("k", d, d, "out")
    yield from linear_rows("v", d, d, "out")
    yield from through("image", linear_rows("o", d, d, "in"))
    yield from norm_rows("norm_q", d, split=0)
    yield from norm_rows("norm_k", d, split=0)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: those of Wan under Wan's names, those that are added under their own."""
    d, at = c.dim, "audio_injector"
    yield from wan.spec(c.wan)
    yield Row("cond_encoder.weight", (d, c.cond_dim, *c.patch_size))
    yield Row("cond_encoder.bias", (d,))
    yield Row("trainable_cond_mask.weight", (3, d))
    for _, patch, name in BUCKETS:
        yield Row(f"frame_packer.{name}.weight", (d, c.in_dim, *patch))
        yield Row(f"frame_packer.{name}.bias", (d,))
    yield from _audio_encoder_rows(c)
    yield from repeat(f"{at}.injector", len(c.injected), _injector_rows(c))
    if c.enable_adain:
        yield from repeat(f"{at}.injector_adain_layers", len(c.injected), linear_rows("linear", d, 2 * d))


# --- what is computed once, before the loop

CONDS = (
    *(cond for cond in wan.CONDS if cond.name != "concat"),
    Cond("added", "image", dim=1),
    Cond("frames", "image", shared=True),
)
"""The tensors of a request that belong to no block."""


def _causal_conv(x_BCT: Tensor, w: Weights, stride: int = 1) -> Tensor:
    """A convolution of width 3 that sees no later frame; the first frame stands for those before it."""
    return F.conv1d(F.pad(x_BCT, (2, 0), mode="replicate"), w["conv.weight"], w["conv.bias"], stride)


def _pooled(w: Weights, x_BCT: Tensor) -> Tensor:
    """Features of frames [B, D / 4, T] -> of latent frames [B, F, D]: two convolutions with stride 2."""
    x = F.silu(layer_norm(x_BCT.mT))
    for name in ("conv2", "conv3"):
        x = F.silu(layer_norm(_causal_conv(x.mT, w / name, stride=2).mT))
    return x


def encode_audio(c: Config, w: Weights, states_BSCT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Hidden states of the sound, one per frame -> its tokens [B, F, K, D].

    With AdaIN, the sound as a whole [B, F, D] comes beside them.

    The states are weighted, and each of `num_audio_token` parts of the channels gives one token; one more is
    the same for every sound.
    """
    w = w / "casual_audio_encoder"
    shares = F.silu(w["weights"])
    x_BCT = (states_BSCT * shares / shares.sum(1, keepdim=True)).sum(1)
    w, batch = w / "encoder", len(x_BCT)
    parts = _causal_conv(x_BCT, w / "conv1_local").reshape(batch * c.num_audio_token, c.dim // 4, -1)
    tokens = torch.unflatten(_pooled(w, parts), 0, (batch, -1)).transpose(1, 2)
    same = w["padding_tokens"].expand(batch, tokens.shape[1], -1, -1)
    tokens = torch.cat([tokens, same], 2)
    if not c.enable_adain:
        return tokens, None
    return tokens, linear(_pooled(w, _causal_conv(x_BCT, w / "conv1_global")), w / "final_linear")


def pack_past(w: Weights, past_BCFHW: Tensor) -> Tensor:
    """The latents of past frames -> tokens [B, N, D], the newest first; older ones are packed more coarsely.

    Zeros stand for frames before the first. What fills no whole patch is left out.
    """
    missing = PAST - past_BCFHW.shape[2]
    past = F.pad(past_BCFHW, (0, 0, 0, 0, missing, 0)) if missing > 0 else past_BCFHW[:, :, -PAST:]
    tokens: list[Tensor] = []
    end = PAST
    for frames, patch, name in BUCKETS:
        x = past[:, :, end - frames : end]
        height, width = (n // p * p for n, p in zip(x.shape[3:], patch[1:], strict=True))
        tokens.append(linear(patchify(x[..., :height, :width], patch), w / "frame_packer" / name))
        end -= frames
    return torch.cat(tokens, 1)


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """As `wan.hoist` -> (request's tensors, steps' tensors).

    inputs: `text`, `positions` [L, 3] and `frozen` [1, L, 1] of all tokens, see `layout`; `frames` int64 [L],
    the latent frame of each; `reference` [1, R, P], the tokens of the reference image; `audio` [B, S, C, T],
    the states of the sound for the past frames and those of the video. `motion` [1, C, F, H, W], the latents
    of past frames, and `pose` [1, F H W, P'] are left out where there are none.
    """
    dtype = w.dtype
    angles = torch.promote_types(dtype, torch.float32)
    known = {name: inputs[name] for name in ("text", "positions", "frozen")}
    request, steps = wan.hoist(c.wan, plan, w, known, timesteps_S, angles)
    request["frames"], request["added"] = inputs["frames"], _added(c, w, inputs)

    tokens, whole = encode_audio(c, w, inputs["audio"].to(dtype))
    tokens = tokens[:, c.past :]
    sound = tokens.flatten(1, 2)
    heads = (-1, c.dim // c.num_heads)
    for i, at in enumerate(_injectors(c)):
        a = w / at
        key = rms_norm_across(plan, linear(sound, a / "k"), a / "norm_k", INJECTOR_EPS)
        request[f"{at}.k"] = torch.unflatten(key, -1, heads)
        request[f"{at}.v"] = torch.unflatten(linear(sound, a / "v"), -1, heads)
        if whole is not None:
            layer = w / "audio_injector" / "injector_adain_layers" / i / "linear"
            both = linear(F.silu(whole[:, c.past :]), layer).chunk(2, -1)
            for name, half in zip(("shift", "scale"), both, strict=True):
                request[f"{at}.{name}"] = half.clone(memory_format=torch.contiguous_format)
    return request, steps


def _injectors(c: Config) -> list[str]:
    return [f"audio_injector.injector.{i}" for i in range(len(c.injected))]


def _added(c: Config, w: Weights, inputs: Tensors) -> Tensor:
    """What is added to the embedded latents [1, L, D]: the pose to those of the video; of all others, which
    are no latents of this output, the whole token.
    """
    kinds, dtype = w["trainable_cond_mask.weight"], w.dtype
    behind = [linear(inputs["reference"].to(dtype), w / "patch_embedding") + kinds[REFERENCE]]
    if "motion" in inputs:
        behind.append(pack_past(w, inputs["motion"].to(dtype)) + kinds[MOTION])
    pose = w / "cond_encoder"
    if "pose" in inputs:
        video = linear(inputs["pose"].to(dtype), pose)
    else:
        tokens = len(inputs["positions"]) - sum(x.shape[1] for x in behind)
        video = pose["bias"].expand(1, tokens, -1)
    return torch.cat([video + kinds[VIDEO], *behind], 1)


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Tensor:
    """Latent tokens [B, L, P], arbitrary where they are not of the video -> [B, L, D]."""
    embedded = linear(x_BLP.to(w.dtype), w / "patch_embedding")
    return embedded.masked_fill(request["frozen"], 0) + request["added"]


def block(c: Config, plan: Plan, w: Weights, x_BLD: Tensor, request: Weights, shared: Tensors) -> Tensor:
    """A block of Wan."""
    return wan.block(c.wan, plan, w, x_BLD, request, shared)


def inject(c: Config, plan: Plan, w: Weights, x_BLD: Tensor, request: Weights, shared: Tensors) -> Tensor:
    """The tokens of the video attend to the sound of their latent frame."""
    if "shift" in request:
        shift, scale = (
            request[name].to(compute_dtype(x_BLD)).index_select(1, shared["frames"])
            for name in ("shift", "scale")
        )
        y = modulate(x_BLD, shift, scale, ADAIN_EPS)
    else:
        y = layer_norm(x_BLD, eps=INJECTOR_EPS)
    q = rms_norm_across(plan, linear(y, w / "q"), w / "norm_q", INJECTOR_EPS)
    # every rank holds the whole sound, and not every kernel of attention takes a mask
    alone = replace(without_sequence(plan), attention="sdpa")
    q, k = torch.unflatten(q, -1, (-1, c.dim // c.num_heads)), request["k"]
    of_frame = torch.arange(k.shape[1], device=k.device) // (c.num_audio_token + 1)
    y = attention(alone, q, k, request["v"], (shared["frames"][:, None] == of_frame)[None, None])
    y = x_BLD + linear_sum(plan, y.flatten(2), w / "o")
    return torch.where(shared["frozen"], x_BLD, y)


def blocks(c: Config) -> Stack:
    """The stack as rows (function, prefix): an injector follows some of Wan's blocks."""
    injectors = dict(zip(c.injected, _injectors(c), strict=True))
    stack: Stack = []
    for i in range(c.num_layers):
        stack.append((block, f"blocks.{i}"))
        if i in injectors:
            stack.append((inject, injectors[i]))
    return stack


def post(c: Config, plan: Plan, w: Weights, x_BLD: Tensor, request: Weights, step: Tensors) -> Tensor:
    """[B, L, D] -> velocity [B, L, P], meaningless where a token is not of the video."""
    return wan.post(c.wan, plan, w, x_BLD, request, step)


# --- what a pipeline needs of this family


def key_map(c: Config) -> KeyMap:
    """The released files have Wan's original names, which `models.layouts.wan` knows."""
    return KeyMap(LINES)


def must_fit(c: Config, nets: Mapping[str, Any], row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What this network's config must say to fit the components around it: (field, value, why)."""
    z = nets["vae"].z_dim
    for name in ("in_dim", "out_dim", "cond_dim"):
        yield name, z, "the vae's latents need"
    yield "text_dim", nets["text_encoder"].d_model, "the text encoder gives"
    yield "audio_dim", nets["audio_encoder"].hidden_size, "the audio encoder gives"
    yield "audio_states", nets["audio_encoder"].states, "the audio encoder gives"


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines={"WanSpeechToVideoPipeline": prepare},
    patch=lambda c: c.patch_size,
    heads=lambda c: c.num_heads,
    head_width=lambda c: c.dim // c.num_heads,
    must_fit=must_fit,
    extra_components=lambda c: ("audio_encoder",),
    keys=key_map,
    crops_images=True,
    hearing=HEARING,
)
