"""LTX-2's text connectors: all hidden states of Gemma 3 to the prompts that video and sound attend to.

Each state is normalised and all of a token's are projected to one vector; a small transformer for each
stream then reads the real tokens at the front and learned registers behind them, so nothing is masked.
LTX-2.0 normalises each layer over the whole prompt and shares one projection; LTX-2.3
(`per_modality_projections`) normalises each token and projects for each stream. Source: the
LTX2TextConnectors checkpoints.

Shape letters: B batch, T text tokens, N states of a token, D width of the language model, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.keymap import KeyMap, also
from tinydiff.models.family import Encoder
from tinydiff.models.joint import feed_forward
from tinydiff.ops.activations import gelu_tanh
from tinydiff.ops.attention import attention
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import compute_dtype, rms_norm_across
from tinydiff.ops.rope import rotate_half, rotate_interleaved
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, under

EPS = 1e-6


class Side(NamedTuple):
    """The transformer of one stream. name: of its weights, "video" or "audio"."""

    name: str
    heads: int
    head_width: int
    layers: int
    registers: int
    gated: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json."""

    caption_channels: int = 3840
    text_proj_in_factor: int = 49
    video_connector_num_attention_heads: int = 30
    video_connector_attention_head_dim: int = 128
    video_connector_num_layers: int = 2
    video_connector_num_learnable_registers: int = 128
    video_gated_attn: bool = False
    audio_connector_num_attention_heads: int = 30
    audio_connector_attention_head_dim: int = 128
    audio_connector_num_layers: int = 2
    audio_connector_num_learnable_registers: int = 128
    audio_gated_attn: bool = False
    connector_rope_base_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_temporal_positioning: bool = False
    """Not read: the reference keeps it and reads it nowhere."""
    rope_type: str = "interleaved"
    per_modality_projections: bool = False
    video_hidden_dim: int = 4096
    audio_hidden_dim: int = 2048
    proj_bias: bool = False

    def __post_init__(self) -> None:
        if self.rope_type not in ROTATE:
            raise ValueError(f"rope_type is {self.rope_type!r}; it must be one of {', '.join(ROTATE)}")
        for side in self.sides:
            name = f"{side.name}_hidden_dim" if self.per_modality_projections else "caption_channels"
            if getattr(self, name) != side.width:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; the {side.name} connector is {side.width} wide"
                )

    @property
    def sides(self) -> tuple[Side, Side]:
        """Of video and of sound."""
        video = Side(
            "video",
            self.video_connector_num_attention_heads,
            self.video_connector_attention_head_dim,
            self.video_connector_num_layers,
            self.video_connector_num_learnable_registers,
            self.video_gated_attn,
        )
        audio = Side(
            "audio",
            self.audio_connector_num_attention_heads,
            self.audio_connector_attention_head_dim,
            self.audio_connector_num_layers,
            self.audio_connector_num_learnable_registers,
            self.audio_gated_attn,
        )
        return video, audio

    @property
    def hidden_size(self) -> int:
        return self.caption_channels


ROTATE = {"interleaved": rotate_interleaved, "split": rotate_half}


def _layer_rows(side: Side) -> Iterator[Row]:
    d = side.width
    for name in ("to_q", "to_k", "to_v"):
        yield from linear_rows(f"attn1.{name}", d, d, "out")
    yield from linear_rows("attn1.to_out.0", d, d, "in")
    for name in ("norm_q", "norm_k"):
        yield from norm_rows(f"attn1.{name}", d, split=0)
    if side.gated:
        yield from linear_rows("attn1.to_gate_logits", d, side.heads, "out")
    yield from linear_rows("ff.net.0.proj", d, 4 * d, "out")
    yield from linear_rows("ff.net.2", 4 * d, d, "in")


def spec(c: Config) -> Iterator[Row]:
    """Every weight once: name, shape and tensor-parallel split."""
    states = c.caption_channels * c.text_proj_in_factor
    if c.per_modality_projections:
        for side in c.sides:
            yield from linear_rows(f"{side.name}_text_proj_in", states, side.width, bias=c.proj_bias)
    else:
        yield from linear_rows("text_proj_in", states, c.caption_channels, bias=c.proj_bias)
    for side in c.sides:
        registers = Row("learnable_registers", (side.registers, side.width))
        layers = repeat("transformer_blocks", side.layers, _layer_rows(side))
        yield from under(f"{side.name}_connector", [registers], layers)


def _normed_layers(states_BTDN: Tensor, mask_BT11: Tensor) -> Tensor:
    """Each layer of a prompt less its mean, over its range, times 8; over the real tokens."""
    x, real = states_BTDN, mask_BT11
    count = real.sum((1, 2, 3), keepdim=True) * x.shape[2]
    mean = x.masked_fill(~real, 0.0).sum((1, 2), keepdim=True) / (count + EPS)
    low = x.masked_fill(~real, torch.inf).amin((1, 2), keepdim=True)
    high = x.masked_fill(~real, -torch.inf).amax((1, 2), keepdim=True)
    return (x - mean) / (high - low + EPS) * 8


def _rope(c: Config, plan: Plan, side: Side, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, H, E / 2]. Angles are float32, as the model was trained."""
    dtype = torch.float64 if c.rope_double_precision else torch.float32
    spread = torch.linspace(0.0, 1.0, side.width // 2, dtype=dtype, device=device)
    frequencies = (torch.pow(c.rope_theta, spread) * pi / 2.0).float()
    place = torch.arange(tokens, dtype=torch.float32, device=device) / c.connector_rope_base_seq_len
    tp = plan.group("tp")
    angle = torch.unflatten((place[:, None] * 2 - 1) * frequencies, 1, (side.heads, -1))
    angle = angle.narrow(1, tp.rank * (side.heads // tp.size), side.heads // tp.size)
    return angle.cos(), angle.sin()


def _front(text_BTD: Tensor, mask_BT: Tensor, registers: Tensor) -> Tensor:
    """The real tokens first, in their order, and registers in the places that are left."""
    real = mask_BT.bool()
    order = torch.argsort((~real).int(), dim=1, stable=True)
    moved = torch.gather(text_BTD, 1, order[..., None].expand_as(text_BTD))
    tokens = text_BTD.shape[1]
    is_text = torch.arange(tokens, device=real.device) < real.sum(1, keepdim=True)
    learned = registers.to(moved.dtype).repeat(tokens // len(registers), 1)
    return torch.where(is_text[..., None], moved, learned)


def _layer(c: Config, plan: Plan, side: Side, x: Tensor, w: Weights, rope: tuple[Tensor, Tensor]) -> Tensor:
    def split(y: Tensor) -> Tensor:
        return torch.unflatten(y, -1, (-1, side.head_width))

    def rotated(name: str) -> Tensor:
        heads = split(rms_norm_across(plan, linear(y, a / f"to_{name}"), a / f"norm_{name}", EPS))
        return ROTATE[c.rope_type](heads.unsqueeze(-2), *rope).squeeze(-2)

    a, y = w / "attn1", F.rms_norm(x, x.shape[-1:], None, EPS)
    found = attention(plan, rotated("q"), rotated("k"), split(linear(y, a / "to_v")))
    if side.gated:
        found = found * (2 * torch.sigmoid(linear(y, a / "to_gate_logits")))[..., None]
    x = x + linear_sum(plan, found.flatten(2), a / "to_out" / 0)
    return x + feed_forward(plan, w / "ff", F.rms_norm(x, x.shape[-1:], None, EPS), gelu_tanh)


def encode(c: Config, plan: Plan, w: Weights, states_BTDN: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """All states of a language model's tokens -> the prompts of video and of sound, each [B, T, its width].

    mask_BT: 1 where a token is real. Raises ValueError where T is no multiple of the registers.
    """
    real, tokens = mask_BT.bool()[:, :, None, None], mask_BT.shape[1]
    x = states_BTDN.to(compute_dtype(states_BTDN))
    if c.per_modality_projections:
        x = x * torch.rsqrt(x.square().mean(2, keepdim=True) + EPS)
    else:
        x = _normed_layers(x, real)
    x = x.masked_fill(~real, 0.0).flatten(2).to(w.dtype)
    made: list[Tensor] = []
    for side in c.sides:
        if tokens % side.registers:
            count = f"{side.name}_connector_num_learnable_registers, {side.registers}"
            raise ValueError(f"the prompt has {tokens} tokens; their number must be a multiple of {count}")
        if c.per_modality_projections:
            scale = sqrt(side.width / c.caption_channels)
            y = linear(x * scale, w / f"{side.name}_text_proj_in")
        else:
            y = linear(x, w / "text_proj_in")
        own = w / f"{side.name}_connector"
        y = _front(y, mask_BT, own["learnable_registers"])
        rope = _rope(c, plan, side, tokens, y.device)
        for i in range(side.layers):
            y = _layer(c, plan, side, y, own / "transformer_blocks" / i, rope)
        made.append(F.rms_norm(y, y.shape[-1:], None, EPS))
    return made[0], made[1]


ORIGINAL = tuple(
    also(f"text_embedding_projection.{side}aggregate_embed", f"{side}text_proj_in")
    for side in ("", "video_", "audio_")
)
"""How the authors' LoRAs name the projections; diffusers' begin with the component's name."""
OF_LORAS = (*ORIGINAL, *(also(f"connectors.{line.rows[0]}", line.rows[0]) for line in ORIGINAL))

FAMILY = Encoder(
    keys=lambda c: KeyMap(OF_LORAS),
    role="text_encoder",
    config=Config,
    spec=spec,
    head_width=lambda c: c.video_connector_attention_head_dim,
    biased=False,
)
