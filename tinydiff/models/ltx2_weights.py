"""What LTX-2's transformer is made of: its config, its two streams, and every weight.

Shape letters: D width of the video stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tinydiff.keymap import KeyMap, unread
from tinydiff.ops.rope import rotate_half, rotate_interleaved
from tinydiff.parallel.plan import Input, Row, linear_rows, norm_rows, repeat, through


class Kind(NamedTuple):
    """One of the two streams.

    prefix: how the names of its weights begin. text: width of the prompt it reads. biased: whether its
    feed-forward has biases.
    """

    prefix: str
    stream: Input
    heads: int
    head_width: int
    channels: int
    text: int
    modulated: bool
    gated: bool
    biased: bool

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
    """Whether files have the mark of frames that only pipelines with generated keyframes read."""

    def __post_init__(self) -> None:
        fixed = {
            "patch_size": 1, "patch_size_t": 1, "audio_patch_size": 1, "audio_patch_size_t": 1,
            "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads",
            "norm_elementwise_affine": False, "attention_bias": True, "attention_out_bias": True,
            "cross_attn_mod": self.audio_cross_attn_mod, "audio_in_channels": self.in_channels,
            "audio_out_channels": self.out_channels, "audio_num_attention_heads": self.num_attention_heads,
            "cross_attention_dim": self.width,
            "audio_cross_attention_dim": self.audio_num_attention_heads * self.audio_attention_head_dim,
        }  # fmt: skip
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; LTX-2 to LTX-2.5 run with {value!r}")
        if self.rope_type not in ROTATE:
            raise ValueError(f"rope_type is {self.rope_type!r}; it must be one of {', '.join(ROTATE)}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_by_step(self) -> bool:
        """Whether the keys of the prompt differ from step to step."""
        return self.cross_attn_mod and self.use_prompt_adaln_single

    @property
    def video(self) -> Kind:
        return Kind(
            "", "image", self.num_attention_heads, self.attention_head_dim, self.in_channels,
            self.cross_attention_dim, self.cross_attn_mod, self.gated_attn, self.ff_bias,
        )  # fmt: skip

    @property
    def audio(self) -> Kind:
        return Kind(
            "audio_", "audio", self.audio_num_attention_heads, self.audio_attention_head_dim,
            self.audio_in_channels, self.audio_cross_attention_dim, self.audio_cross_attn_mod,
            self.audio_gated_attn, self.audio_ff_bias,
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
    text: Input = "context" if c.text_by_step else "prompt"
    yield from _attention_rows(f"{prefix}attn2", kind, (kind.text, text), kind, kind.gated, "prompt")
    yield from through(
        kind.stream,
        linear_rows(f"{prefix}ff.net.0.proj", d, 4 * d, "out", bias=kind.biased),
        linear_rows(f"{prefix}ff.net.2", 4 * d, d, "in", bias=kind.biased),
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


KEYFRAMES = unread("keyframes_abs_pos_embedding")
"""LTX-2.5's mark of frames that stand alone, which no pipeline reads here."""


def key_map(c: Config) -> KeyMap:
    """The rows' names, and what files have beside them."""
    return KeyMap(KEYFRAMES)


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
        if c.text_by_step:
            yield from _time_rows(f"{prefix}prompt_adaln", d, 2)
        for layer, count in zip(CROSS[prefix], (4, 1), strict=True):
            yield from _time_rows(layer, d, count)
        yield from through(kind.stream, linear_rows(f"{prefix}proj_out", d, c.out_channels))
