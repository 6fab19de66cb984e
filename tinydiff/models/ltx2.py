"""LTX-2, LTX-2.3 and LTX-2.5: a transformer that makes video and sound together.

Two streams of tokens, video [B, L, D] and sound [B, A, C], go through every block side by side: each attends
to itself, to its own projection of the prompt, and to the other stream by positions in time alone. The loop
sees one tensor of tokens [B, L + A, P], video first. LTX-2.3 (`cross_attn_mod`, `gated_attn`) modulates the
prompt by the timestep too, and gates the heads of every attention; LTX-2.5 leaves out biases. Source: arXiv
2601.03233 and the LTX2VideoTransformer3DModel checkpoints.

Shape letters: B batch, L video tokens, A sound tokens, P latent values of a token, D width of the video
stream, C width of the sound stream, H heads, E head width, T text tokens, S steps.
"""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models import ltx2_recipe
from tinydiff.models.family import Denoiser
from tinydiff.models.joint import feed_forward
from tinydiff.models.ltx2_recipe import audio_positions as audio_positions
from tinydiff.models.ltx2_recipe import positions as positions
from tinydiff.models.ltx2_weights import CROSS, CROSS_TABLE, ROTATE, TO_SOUND, TO_VIDEO, Kind, key_map, spec
from tinydiff.models.ltx2_weights import Config as Config
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.attention import attention
from tinydiff.ops.embed import embedder, timestep_embedding
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.network import Stack
from tinydiff.ops.norm import modulate, rms_norm_across
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan
from tinydiff.parallel.sequence import keys, without_sequence

Tensors = dict[str, Tensor]
Streams = tuple[Tensor, Tensor]
"""Video and sound."""

# --- what is computed once, before the loop

GUIDANCE = ("pulls", "pulls_2", "rescale", "rescale_2")
"""What guidance reads of the request, and no block."""

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
    Cond("hears", shared=True),
    Cond("pulls", "image", dim=1),
    Cond("pulls_2", "audio", dim=1),
    Cond("rescale", "image", dim=1),
    Cond("rescale_2", "audio", dim=1),
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
    timestep 0. Of requests with further terms of guidance: `attends` [layers], 0 where a stream's attention
    to itself is left out, `hears` [1], 0 where the streams do not attend to each other, and what
    `sampling.guidance.several` reads. timesteps_S: sigma * 1000.
    """
    video, audio = c.video, c.audio
    t_S = timesteps_S * (c.timestep_scale_multiplier / 1000)
    request = _ropes(c, plan, video, inputs["positions"], (c.pos_embed_max_pos, c.base_height, c.base_width))
    request |= _ropes(c, plan, audio, inputs["audio_positions"], (c.audio_pos_embed_max_pos,))
    steps: Tensors = {}
    for kind in (video, audio):
        p = kind.prefix
        text = _caption(c, w, kind, inputs[f"{p}text"].to(w.dtype))
        if c.text_by_step:  # blocks make the keys
            request[f"{p}text"] = text
            steps[f"{p}prompt"] = _time(w, f"{p}prompt_adaln", t_S)[1][:, None]
        else:
            for _, at in blocks(c):
                own = text
                if c.cross_attn_mod:
                    shift, scale = w[f"{at}.{p}prompt_scale_shift_table"].to(text.dtype).unbind(0)
                    own = text * (1 + scale) + shift
                k, v = _text_keys(c, plan, w / at / f"{p}attn2", own, kind)
                request |= {f"{at}.{p}attn2.k": k, f"{at}.{p}attn2.v": v}
        steps |= {f"{p}{name}": rows[:, None] for name, rows in _times(c, w, kind, t_S).items()}
    if "frozen" in inputs:
        clean = _times(c, w, video, torch.zeros_like(t_S[:1]))
        request |= {"frozen": inputs["frozen"], "frozen_time": clean["time"]}
        request["frozen_modulation"] = clean["modulation"]
        if not c.cross_attn_mod:  # LTX-2.3 modulates what passes between streams by the noise level alone
            request["frozen_cross"] = clean["cross"]
    if "attends" in inputs:
        flags = inputs["attends"].to(w.dtype)[:, None, None, None, None]
        request |= {f"{at}.attends": flag for (_, at), flag in zip(blocks(c), flags, strict=True)}
        request["hears"] = inputs["hears"].to(w.dtype)[:, None, None]
    request |= {name: inputs[name] for name in GUIDANCE if name in inputs}
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


def _to_itself(
    c: Config, plan: Plan, w: Weights, x: Tensor, request: Weights, shared: Tensors, kind: Kind
) -> Tensor:
    q, k = (_rotated(c, _heads(c, plan, x, w, name, kind.head_width), shared, kind.prefix) for name in "qk")
    v = torch.unflatten(linear(x, w / "to_v"), -1, (-1, kind.head_width))
    y = attention(plan, q, k, v, keys=keys(plan, shared, kind.stream))
    return _projected(plan, w, x, torch.lerp(v, y, request["attends"]) if "attends" in request else y)


def _to_text(
    c: Config, plan: Plan, w: Weights, x: Tensor, request: Weights, shared: Tensors, kind: Kind
) -> Tensor:
    """Attention to the prompt, which every rank holds whole."""
    p = kind.prefix
    a = w / f"{p}attn2"
    if c.text_by_step:
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
        y = _to_itself(c, plan, w / f"{kind.prefix}attn1", _normed(c, x, *mod[:2]), request, shared, kind)
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
    if "hears" in shared:
        to_video, to_sound = to_video * shared["hears"], to_sound * shared["hears"]
    return video + of_video[4] * to_video, audio + of_audio[4] * to_sound


def _fed(c: Config, plan: Plan, w: Weights, x: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
    return x + feed_forward(plan, w, _normed(c, x, mod[3], mod[4]), gelu_tanh) * mod[5]


def blocks(c: Config) -> Stack:
    """The blocks in order, each as (function, prefix of its weights)."""
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
    denoised_streams=2,
    hoist=hoist,
    pre=pre,
    blocks=blocks,
    post=post,
    pipelines=dict.fromkeys(("LTX2Pipeline", "LTX2ImageToVideoPipeline"), ltx2_recipe.prepare),
    patch=lambda c: ltx2_recipe.PATCH,
    heads=lambda c: c.num_attention_heads,
    head_width=lambda c: c.attention_head_dim,
    must_fit=ltx2_recipe.must_fit,
    keys=key_map,
    extra_components=ltx2_recipe.extra_components,
    optional_components=ltx2_recipe.optional_components,
    keyframes=True,
    hidden_states={"text_encoder": (-1,)},
    mu=ltx2_recipe.mu,
    linear_grid=True,
)
