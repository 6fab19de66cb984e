"""LTX-2 and LTX-2.3: a transformer that makes video and sound together.

Two streams of tokens, video [B, L, D] and sound [B, A, C], go through every block side by side: each attends
to itself, to its own projection of the prompt, and to the other stream by positions in time alone. The loop
sees one tensor of tokens [B, L + A, P], video first. LTX-2.3 (`cross_attn_mod`, `gated_attn`) modulates the
prompt by the timestep too, and gates the heads of every attention. Source: arXiv 2601.03233 and the
LTX2VideoTransformer3DModel checkpoints.

Shape letters: B batch, L video tokens, A sound tokens, P latent values of a token, D width of the video
stream, C width of the sound stream, H heads, E head width, T text tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models import ltx2_recipe
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import feed_forward
from tinydiff.models.ltx2_recipe import audio_positions as audio_positions
from tinydiff.models.ltx2_recipe import positions as positions
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import modulate, rms_norm_across
from tinydiff.ops.rope import rotate_half, rotate_interleaved
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Input, Plan, Row, linear_rows, norm_rows, repeat, through
from tinydiff.parallel.sequence import keys, without_sequence

Tensors = dict[str, Tensor]
Streams = tuple[Tensor, Tensor]
"""Video and sound."""


class Kind(NamedTuple):
    """One of the two streams. prefix: how the names of its weights begin. text: width of the
    prompt it reads.
    """

    prefix: str
    stream: Input
    heads: int
    head_width: int
    channels: int
    text: int
    modulated: bool
    gated: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    in_channels: int = 128
    out_channels: int = 128
    patch_size: int = 1
    patch_size_t: int = 1
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    cross_attention_dim: int = 4096
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)
    pos_embed_max_pos: int = 20
    base_height: int = 2048
    base_width: int = 2048
    gated_attn: bool = False
    cross_attn_mod: bool = False
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    audio_patch_size: int = 1
    audio_patch_size_t: int = 1
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_cross_attention_dim: int = 2048
    audio_scale_factor: int = 4
    audio_pos_embed_max_pos: int = 20
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    audio_gated_attn: bool = False
    audio_cross_attn_mod: bool = False
    num_layers: int = 48
    activation_fn: str = "gelu-approximate"
    qk_norm: str = "rms_norm_across_heads"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int = 3840
    attention_bias: bool = True
    attention_out_bias: bool = True
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_offset: int = 1
    timestep_scale_multiplier: int = 1000
    cross_attn_timestep_scale_multiplier: int = 1000
    rope_type: str = "interleaved"
    use_prompt_embeddings: bool = True
    perturbed_attn: bool = False
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_prompt_adaln_single: bool = True
    use_keyframes_abs_pos_embedding: bool = False

    def __post_init__(self) -> None:
        fixed = {
            "patch_size": 1, "patch_size_t": 1, "audio_patch_size": 1, "audio_patch_size_t": 1,
            "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads",
            "norm_elementwise_affine": False, "attention_bias": True, "attention_out_bias": True,
            "ff_bias": True,
            "audio_ff_bias": True, "use_prompt_adaln_single": True, "use_keyframes_abs_pos_embedding": False,
            "cross_attn_mod": self.audio_cross_attn_mod, "audio_in_channels": self.in_channels,
            "audio_out_channels": self.out_channels, "audio_num_attention_heads": self.num_attention_heads,
            "cross_attention_dim": self.width,
            "audio_cross_attention_dim": self.audio_num_attention_heads * self.audio_attention_head_dim,
        }  # fmt: skip
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; LTX-2 and LTX-2.3 run with {value!r}")
        if self.rope_type not in ROTATE:
            raise ValueError(f"rope_type is {self.rope_type!r}; it must be one of {', '.join(ROTATE)}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def video(self) -> Kind:
        return Kind(
            "", "image", self.num_attention_heads, self.attention_head_dim, self.in_channels,
            self.cross_attention_dim, self.cross_attn_mod, self.gated_attn,
        )  # fmt: skip

    @property
    def audio(self) -> Kind:
        return Kind(
            "audio_", "audio", self.audio_num_attention_heads, self.audio_attention_head_dim,
            self.audio_in_channels, self.audio_cross_attention_dim, self.audio_cross_attn_mod,
            self.audio_gated_attn,
        )  # fmt: skip


ROTATE = {"interleaved": rotate_interleaved, "split": rotate_half}
"""How the pairs of a head that rope rotates lie: side by side, or one in each half."""
CROSS = {"": ("av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate"),
         "audio_": ("av_cross_attn_audio_scale_shift", "av_cross_attn_audio_v2a_gate")}  # fmt: skip
"""Prefix of a stream -> the layers of its scales and shifts in the attention between streams, and of its
gate.
"""
CROSS_TABLE = {
    "": "video_a2v_cross_attn_scale_shift_table",
    "audio_": "audio_a2v_cross_attn_scale_shift_table",
}
TO_VIDEO, TO_SOUND = "audio_to_video_attn", "video_to_audio_attn"

# --- weights


def _attention_rows(
    name: str, queries: Kind, keys: tuple[int, Input], inner: Kind, gated: bool, attends: Input
) -> Iterator[Row]:
    """keys: the width of what is attended to, and what passes through its projections. inner: whose heads."""
    d = inner.width
    yield from through(queries.stream, linear_rows(f"{name}.to_q", queries.width, d, "out"))
    for key in ("to_k", "to_v"):
        yield from through(keys[1], linear_rows(f"{name}.{key}", keys[0], d, "out"))
    out = linear_rows(f"{name}.to_out.0", d, queries.width, "in", attends=(queries.stream, attends))
    yield from through(queries.stream, out, norm_rows(f"{name}.norm_q", d, split=0))
    yield from through(keys[1], norm_rows(f"{name}.norm_k", d, split=0))
    if gated:
        yield from through(
            queries.stream, linear_rows(f"{name}.to_gate_logits", queries.width, inner.heads, "out")
        )


def _stream_rows(c: Config, kind: Kind) -> Iterator[Row]:
    """What a block has for one stream alone."""
    d, prefix = kind.width, kind.prefix
    yield Row(f"{prefix}scale_shift_table", (9 if kind.modulated else 6, d))
    if c.cross_attn_mod:
        yield Row(f"{prefix}prompt_scale_shift_table", (2, d))
    yield Row(CROSS_TABLE[prefix], (5, d))
    yield from _attention_rows(f"{prefix}attn1", kind, (d, kind.stream), kind, kind.gated, kind.stream)
    text: Input = "context" if c.cross_attn_mod else "prompt"
    yield from _attention_rows(f"{prefix}attn2", kind, (kind.text, text), kind, kind.gated, "prompt")
    yield from through(
        kind.stream,
        linear_rows(f"{prefix}ff.net.0.proj", d, 4 * d, "out"),
        linear_rows(f"{prefix}ff.net.2", 4 * d, d, "in"),
    )


def _block_rows(c: Config) -> Iterator[Row]:
    video, audio = c.video, c.audio
    yield from _stream_rows(c, video)
    yield from _stream_rows(c, audio)
    for name, queries, others in ((TO_VIDEO, video, audio), (TO_SOUND, audio, video)):
        attended = (others.width, others.stream)
        yield from _attention_rows(name, queries, attended, audio, queries.gated, others.stream)


def _time_rows(name: str, d: int, count: int) -> Iterator[Row]:
    yield from linear_rows(f"{name}.emb.timestep_embedder.linear_1", 256, d)
    yield from linear_rows(f"{name}.emb.timestep_embedder.linear_2", d, d)
    yield from through("steps", linear_rows(f"{name}.linear", d, count * d))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape, tensor-parallel split, and what passes through it."""
    yield from repeat("transformer_blocks", c.num_layers, _block_rows(c))
    for kind in (c.audio, c.video):  # the last row that the video passes through is the loop's last
        d, prefix = kind.width, kind.prefix
        yield Row(f"{prefix}scale_shift_table", (2, d))
        yield from through(kind.stream, linear_rows(f"{prefix}proj_in", kind.channels, d))
        if c.use_prompt_embeddings:
            yield from linear_rows(f"{prefix}caption_projection.linear_1", c.caption_channels, d)
            yield from linear_rows(f"{prefix}caption_projection.linear_2", d, d)
        yield from _time_rows(f"{prefix}time_embed", d, 9 if kind.modulated else 6)
        if c.cross_attn_mod:
            yield from _time_rows(f"{prefix}prompt_adaln", d, 2)
        for layer, count in zip(CROSS[prefix], (4, 1), strict=True):
            yield from _time_rows(layer, d, count)
        yield from through(kind.stream, linear_rows(f"{prefix}proj_out", d, c.out_channels))


# --- what is computed once, before the loop

CONDS = (
    Cond("cos", "image", shared=True),
    Cond("sin", "image", shared=True),
    Cond("cross_cos", "image", shared=True),
    Cond("cross_sin", "image", shared=True),
    Cond("audio_cos", "audio", shared=True),
    Cond("audio_sin", "audio", shared=True),
    Cond("audio_cross_cos", "audio", shared=True),
    Cond("audio_cross_sin", "audio", shared=True),
    Cond("text", shared=True),
    Cond("audio_text", shared=True),
    Cond("frozen", "image", dim=1, shared=True),
    Cond("frozen_modulation", shared=True),
    Cond("frozen_cross", shared=True),
    Cond("frozen_time"),
)
"""The tensors of a request that belong to no block."""


def _time(w: Weights, name: str, t_S: Tensor) -> Streams:
    """Timesteps [S] -> their embedding [S, D] and the modulations made of it [S, n, D]."""
    w = w / name
    time = embedder(timestep_embedding(t_S, 256).to(w.dtype), w / "emb" / "timestep_embedder")
    return time, torch.unflatten(linear(F.silu(time), w / "linear"), -1, (-1, time.shape[-1]))


def _times(c: Config, w: Weights, kind: Kind, t_S: Tensor) -> Tensors:
    """A stream's tensors of the steps: `time` [S, D], `modulation` [S, 6 or 9, D] and `cross` [S, 5, D]."""
    scale_shift, gate = CROSS[kind.prefix]
    ratio = c.cross_attn_timestep_scale_multiplier / c.timestep_scale_multiplier
    cross = _time(w, scale_shift, t_S)[1], _time(w, gate, t_S * ratio)[1]
    time, modulation = _time(w, f"{kind.prefix}time_embed", t_S)
    return {"time": time, "modulation": modulation, "cross": torch.cat(cross, 1)}


def _rope(
    c: Config, plan: Plan, positions_LA: Tensor, base: tuple[int, ...], width: int, heads: int
) -> Streams:
    """Cosines and sines [L, H, E / 2] of positions on some axes, as this rank's heads read them.

    All heads share one spectrum of `width` / 2 angles; what the axes leave over comes first and turns
    nothing. The angles are float32 as in the reference: the model was trained with their rounding.
    """
    count = width // (2 * len(base))
    dtype = torch.float64 if c.rope_double_precision else torch.float32
    spread = torch.linspace(0.0, 1.0, count, dtype=dtype, device=positions_LA.device)
    frequencies = (torch.pow(c.rope_theta, spread) * pi / 2.0).float()
    places = torch.stack([positions_LA[:, axis] / most for axis, most in enumerate(base)], -1)
    angle = ((places[..., None] * 2 - 1) * frequencies).transpose(1, 2).flatten(1)
    angle = torch.unflatten(F.pad(angle, (width // 2 - angle.shape[1], 0)), 1, (heads, -1))
    tp = plan.group("tp")
    angle = angle.narrow(1, tp.rank * (heads // tp.size), heads // tp.size)
    return angle.cos(), angle.sin()


def _ropes(c: Config, plan: Plan, kind: Kind, positions: Tensor, base: tuple[int, ...]) -> Tensors:
    """A stream's tables for attention to itself, and those in time alone for attention between streams."""
    own = _rope(c, plan, positions, base, kind.width, kind.heads)
    longest = max(c.pos_embed_max_pos, c.audio_pos_embed_max_pos)
    cross = _rope(c, plan, positions[:, :1], (longest,), c.audio.width, c.audio.heads)
    names = ("cos", "sin", "cross_cos", "cross_sin")
    return {f"{kind.prefix}{name}": table for name, table in zip(names, own + cross, strict=True)}


def _caption(c: Config, w: Weights, kind: Kind, text: Tensor) -> Tensor:
    if not c.use_prompt_embeddings:
        return text
    w = w / f"{kind.prefix}caption_projection"
    return linear(gelu_tanh(linear(text, w / "linear_1")), w / "linear_2")


def hoist(c: Config, plan: Plan, w: Weights, inputs: Tensors, timesteps_S: Tensor) -> tuple[Tensors, Tensors]:
    """Everything that depends only on the request and the table -> (request's tensors, steps' tensors).

    inputs: `text` [B, T, Q] and `audio_text` [B, T, R], the prompt as the connectors give it for each stream;
    `positions` [L, 3] of the video tokens (seconds and pixels) and `audio_positions` [A, 1] of the sound
    tokens (seconds), see `ltx2_recipe`; and `frozen` [1, L, 1] bool, where tokens of given frames stand at
    timestep 0. timesteps_S: sigma * 1000.
    """
    video, audio = c.video, c.audio
    t_S = timesteps_S * (c.timestep_scale_multiplier / 1000)
    request = _ropes(c, plan, video, inputs["positions"], (c.pos_embed_max_pos, c.base_height, c.base_width))
    request |= _ropes(c, plan, audio, inputs["audio_positions"], (c.audio_pos_embed_max_pos,))
    steps: Tensors = {}
    for kind in (video, audio):
        p = kind.prefix
        text = _caption(c, w, kind, inputs[f"{p}text"].to(w.dtype))
        if c.cross_attn_mod:  # the keys depend on the step: blocks make them
            request[f"{p}text"] = text
            steps[f"{p}prompt"] = _time(w, f"{p}prompt_adaln", t_S)[1][:, None]
        else:
            for _, at in blocks(c):
                k, v = _text_keys(c, plan, w / at / f"{p}attn2", text, kind)
                request |= {f"{at}.{p}attn2.k": k, f"{at}.{p}attn2.v": v}
        steps |= {f"{p}{name}": rows[:, None] for name, rows in _times(c, w, kind, t_S).items()}
    if "frozen" in inputs:
        clean = _times(c, w, video, torch.zeros_like(t_S[:1]))
        request |= {"frozen": inputs["frozen"], "frozen_time": clean["time"]}
        request["frozen_modulation"] = clean["modulation"]
        if not c.cross_attn_mod:  # LTX-2.3 modulates what passes between streams by the noise level alone
            request["frozen_cross"] = clean["cross"]
    return request, steps


# --- the network


def pre(c: Config, plan: Plan, w: Weights, x_BLP: Tensor, request: Weights, step: Tensors) -> Streams:
    """Tokens of both kinds [B, L + A, P] -> video [B, L, D] and sound [B, A, C]."""
    x, video, audio = x_BLP.to(w.dtype), request["cos"].shape[0], request["audio_cos"].shape[0]
    return (
        linear(x.narrow(1, 0, video), w / "proj_in"),
        linear(x.narrow(1, video, audio), w / "audio_proj_in"),
    )


def _modulations(
    table: Tensor, step: Tensor, shared: Tensors | None = None, name: str = ""
) -> tuple[Tensor, ...]:
    """table [n, D] + step [B, n, D] -> n tensors [B, 1, D], or [B, L, D] where tokens are frozen.

    shared: of the video, with `frozen` and, under `name`, the modulation [1, n, D] of timestep 0.
    """
    moving = (table + step).unsqueeze(2).unbind(1)
    if shared is None or name not in shared or "frozen" not in shared:
        return moving
    fixed = (table + shared[name]).unsqueeze(2).unbind(1)
    return tuple(torch.where(shared["frozen"], a, b) for a, b in zip(fixed, moving, strict=True))


def _normed(c: Config, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """RMSNorm without weights, modulated where shift and scale are given."""
    y = F.rms_norm(x, x.shape[-1:], None, c.norm_eps)
    return y if shift is None or scale is None else y * (1 + scale) + shift


def _heads(c: Config, plan: Plan, x: Tensor, w: Weights, name: str, width: int) -> Tensor:
    """Queries (`name` "q") or keys ("k") [B, L, H, width], normalised over all heads."""
    y = rms_norm_across(plan, linear(x, w / f"to_{name}"), w / f"norm_{name}", c.norm_eps)
    return torch.unflatten(y, -1, (-1, width))


def _rotated(c: Config, x_BLHE: Tensor, shared: Tensors, name: str) -> Tensor:
    """x rotated by the tables `name`cos and `name`sin [L, H, E / 2], which differ from head to head."""
    cos, sin = shared[f"{name}cos"], shared[f"{name}sin"]
    return ROTATE[c.rope_type](x_BLHE.unsqueeze(-2), cos, sin).squeeze(-2)


def _text_keys(c: Config, plan: Plan, w: Weights, text: Tensor, kind: Kind) -> Streams:
    """Keys and values [B, T, H, E] of the prompt."""
    value = torch.unflatten(linear(text, w / "to_v"), -1, (-1, kind.head_width))
    return _heads(c, plan, text, w, "k", kind.head_width), value


def _projected(plan: Plan, w: Weights, asked: Tensor, y_BLHE: Tensor) -> Tensor:
    """What the heads found, gated by what asked [B, L, D] where the model has gates, through the
    last linear.
    """
    if "to_gate_logits.weight" in w:
        y_BLHE = y_BLHE * (2 * torch.sigmoid(linear(asked, w / "to_gate_logits")))[..., None]
    return linear_sum(plan, y_BLHE.flatten(2), w / "to_out" / 0)


def _to_itself(c: Config, plan: Plan, w: Weights, x: Tensor, shared: Tensors, kind: Kind) -> Tensor:
    q, k = (_rotated(c, _heads(c, plan, x, w, name, kind.head_width), shared, kind.prefix) for name in "qk")
    v = torch.unflatten(linear(x, w / "to_v"), -1, (-1, kind.head_width))
    return _projected(plan, w, x, attention(plan, q, k, v, keys=keys(plan, shared, kind.stream)))


def _to_text(
    c: Config, plan: Plan, w: Weights, x: Tensor, request: Weights, shared: Tensors, kind: Kind
) -> Tensor:
    """Attention to the prompt, which every rank holds whole."""
    p = kind.prefix
    a = w / f"{p}attn2"
    if c.cross_attn_mod:
        shift, scale = _modulations(w[f"{p}prompt_scale_shift_table"], shared[f"{p}prompt"])
        k, v = _text_keys(c, plan, a, shared[f"{p}text"] * (1 + scale) + shift, kind)
    else:
        k, v = request[f"{p}attn2.k"], request[f"{p}attn2.v"]
    q = _heads(c, plan, x, a, "q", kind.head_width)
    return _projected(plan, a, x, attention(without_sequence(plan), q, k, v))


def _to_other(
    c: Config, plan: Plan, w: Weights, x: Tensor, other: Tensor, shared: Tensors, kind: Kind, others: Kind
) -> Tensor:
    """Attention of one stream to the other; the heads are as wide as those of sound."""
    width = c.audio.head_width
    q = _rotated(c, _heads(c, plan, x, w, "q", width), shared, f"{kind.prefix}cross_")
    k = _rotated(c, _heads(c, plan, other, w, "k", width), shared, f"{others.prefix}cross_")
    v = torch.unflatten(linear(other, w / "to_v"), -1, (-1, width))
    return _projected(plan, w, x, attention(plan, q, k, v, keys=keys(plan, shared, others.stream)))


def block(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, shared: Tensors) -> Streams:
    """Each stream attends to itself and to the prompt, then to the other; a feed-forward ends it."""
    kinds = c.video, c.audio
    mods = [
        _modulations(
            w[f"{kind.prefix}scale_shift_table"],
            shared[f"{kind.prefix}modulation"],
            shared if kind.prefix == "" else None,
            "frozen_modulation",
        )
        for kind in kinds
    ]
    alone: list[Tensor] = []
    for kind, x, mod in zip(kinds, streams, mods, strict=True):
        y = _to_itself(c, plan, w / f"{kind.prefix}attn1", _normed(c, x, *mod[:2]), shared, kind)
        x = x + y * mod[2]
        y = _to_text(c, plan, w, _normed(c, x, *mod[6:8]), request, shared, kind)
        alone.append(x + (y * mod[8] if kind.modulated else y))

    video, audio = _exchanged(c, plan, w, (alone[0], alone[1]), shared)
    return (
        _fed(c, plan, w / "ff", video, mods[0]),
        _fed(c, plan, w / "audio_ff", audio, mods[1]),
    )


def _exchanged(c: Config, plan: Plan, w: Weights, streams: Streams, shared: Tensors) -> Streams:
    """Both streams after each has attended to the other, as it was before."""
    video, audio = streams
    of_video = _modulations(w[CROSS_TABLE[""]], shared["cross"], shared, "frozen_cross")
    of_audio = _modulations(w[CROSS_TABLE["audio_"]], shared["audio_cross"])
    seen, heard = _normed(c, video), _normed(c, audio)

    def shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x * (1 + scale) + shift

    to_video = _to_other(
        c,
        plan,
        w / TO_VIDEO,
        shifted(seen, *of_video[:2]),
        shifted(heard, *of_audio[:2]),
        shared,
        c.video,
        c.audio,
    )
    to_sound = _to_other(
        c,
        plan,
        w / TO_SOUND,
        shifted(heard, *of_audio[2:4]),
        shifted(seen, *of_video[2:4]),
        shared,
        c.audio,
        c.video,
    )
    return video + of_video[4] * to_video, audio + of_audio[4] * to_sound


def _fed(c: Config, plan: Plan, w: Weights, x: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
    return x + feed_forward(plan, w, _normed(c, x, mod[3], mod[4]), gelu_tanh) * mod[5]


def blocks(c: Config) -> Stack:
    """The stack as rows (function, prefix)."""
    return [(block, f"transformer_blocks.{i}") for i in range(c.num_layers)]


def post(c: Config, plan: Plan, w: Weights, streams: Streams, request: Weights, step: Tensors) -> Tensor:
    """Video [B, L, D] and sound [B, A, C] -> predicted velocity of each token [B, L + A, P]."""
    made: list[Tensor] = []
    for kind, x in zip((c.video, c.audio), streams, strict=True):
        twice = step[f"{kind.prefix}time"][:, None].expand(-1, 2, -1)
        given = None
        if kind.prefix == "" and "frozen" in request:
            given = {"frozen": request["frozen"], "time": request["frozen_time"][:, None].expand(-1, 2, -1)}
        shift, scale = _modulations(w[f"{kind.prefix}scale_shift_table"], twice, given, "time")
        made.append(linear(modulate(x, shift, scale), w / f"{kind.prefix}proj_out"))
    return torch.cat(made, 1)


FAMILY = Denoiser(
    config=Config,
    spec=spec,
    conds=CONDS,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines=dict.fromkeys(("LTX2Pipeline", "LTX2ImageToVideoPipeline"), ltx2_recipe.prepare),
    patch=lambda c: ltx2_recipe.PATCH,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=ltx2_recipe.must_fit,
    extra_components=ltx2_recipe.extra_components,
    hidden_states={"text_encoder": (-1,)},
    mu=ltx2_recipe.mu,
    linear_grid=True,
)
