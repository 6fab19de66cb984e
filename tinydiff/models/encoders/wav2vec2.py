"""wav2vec 2.0, an encoder of speech (XLSR-53 large in Wan2.2 speech to video): all its hidden states.

Source: arXiv 2006.11477 and the Wav2Vec2 checkpoints of transformers. Convolutions make about 50 feature
vectors of a second of sound, a grouped convolution adds their position, and transformer layers follow. Base
models normalise the first convolution over time and each layer's results; large ones normalise every
convolution over its channels and each layer's inputs.

Shape letters: B batch, N samples, T feature vectors, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries, EntryDict, typed, value
from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.encoders.clip_vision import ACTIVATIONS
from tinydiff.models.family import Encoder
from tinydiff.ops.attention import attention
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import group_norm, layer_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, under

SAMPLE_RATE = 16_000
"""Samples of a second of the sound that it reads."""
CONV_EPS = 1e-5
"""Of the norms between its convolutions, which the config does not name."""


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json. Fields that change no number are left out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    do_normalize: bool = True
    """Entry of the preprocessor's file: whether the sound is brought to mean 0 and variance 1."""

    def __post_init__(self) -> None:
        for name in ("hidden_act", "feat_extract_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {known}")
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(
                f"feat_extract_norm is {self.feat_extract_norm!r}; it must be 'group' or 'layer'"
            )
        if not len(self.conv_dim) == len(self.conv_stride) == len(self.conv_kernel) > 0:
            raise ValueError("conv_dim, conv_stride and conv_kernel differ in length, or are empty")
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"hidden_size is {self.hidden_size}; it must divide by {name}, {getattr(self, name)}"
                )

    @property
    def states(self) -> int:
        """How many hidden states it has: before the layers, and after each."""
        return self.num_hidden_layers + 1

    def vectors(self, samples: int) -> int:
        """How many feature vectors a sound has; 0 or less where it is too short."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a config.json. Raises ValueError for an adapter behind the layers."""
    if value("add_adapter", bool, entries.get("add_adapter", False)):
        raise ValueError("add_adapter is True; an adapter behind the layers is not supported")
    return Config(**typed(Config, entries))


def preprocessing(entries: Entries, c: Config) -> EntryDict:
    """Fields of the config that preprocessor_config.json has. Raises ValueError for another sample rate."""
    rate = value("sampling_rate", int, entries.get("sampling_rate", SAMPLE_RATE))
    if rate != SAMPLE_RATE:
        raise ValueError(f"sampling_rate is {rate}; only {SAMPLE_RATE} is supported")
    return {"do_normalize": value("do_normalize", bool, entries.get("do_normalize", True))}


# --- weights


def _conv_rows(c: Config) -> Iterator[Row]:
    channels = (1, *c.conv_dim)
    for i, kernel in enumerate(c.conv_kernel):
        yield Row(f"conv_layers.{i}.conv.weight", (channels[i + 1], channels[i], kernel))
        if c.conv_bias:
            yield Row(f"conv_layers.{i}.conv.bias", (channels[i + 1],))
        if c.feat_extract_norm == "layer" or i == 0:
            yield from norm_rows(f"conv_layers.{i}.layer_norm", channels[i + 1], bias=True)


def _layer_rows(c: Config) -> Iterator[Row]:
    d, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    for key in ("k_proj", "v_proj", "q_proj"):
        yield from linear_rows(f"attention.{key}", d, d, "out", head=head)
    yield from linear_rows("attention.out_proj", d, d, "in", head=head)
    yield from norm_rows("layer_norm", d, bias=True)
    yield from linear_rows("feed_forward.intermediate_dense", d, c.intermediate_size, "out")
    yield from linear_rows("feed_forward.output_dense", c.intermediate_size, d, "in")
    yield from norm_rows("final_layer_norm", d, bias=True)


def _rows(c: Config) -> Iterator[Row]:
    d, positions = c.hidden_size, "encoder.pos_conv_embed.conv"
    yield from under("feature_extractor", _conv_rows(c))
    yield from norm_rows("feature_projection.layer_norm", c.conv_dim[-1], bias=True)
    yield from linear_rows("feature_projection.projection", c.conv_dim[-1], d)
    yield Row(f"{positions}.weight_g", (1, 1, c.num_conv_pos_embeddings))
    yield Row(f"{positions}.weight_v", (d, d // c.num_conv_pos_embedding_groups, c.num_conv_pos_embeddings))
    yield Row(f"{positions}.bias", (d,))
    yield from norm_rows("encoder.layer_norm", d, bias=True)
    yield from repeat("encoder.layers", c.num_hidden_layers, _layer_rows(c))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, under the names of the released files."""
    yield from under("wav2vec2", _rows(c))


def key_map(c: Config) -> KeyMap:
    """Files also hold what only training and transcribing read: the embedding of masked features and a head.

    Newer ones name the two factors of the position kernel as torch's parametrisations, and those of the bare
    encoder have no prefix.
    """
    heads = ("lm_head", "quantizer", "project_q", "project_hid")
    kernel = "encoder.pos_conv_embed.conv"
    factors = {
        f"{kernel}.parametrizations.weight.original{i}": f"{kernel}.weight_{x}" for i, x in enumerate("gv")
    }
    bare = ("feature_extractor", "feature_projection", "encoder")
    return KeyMap(
        (
            *unread(*heads, "masked_spec_embed", "wav2vec2.masked_spec_embed"),
            *(
                also(f"{at}{name}", f"wav2vec2.{row}")
                for at in ("wav2vec2.", "")
                for name, row in factors.items()
            ),
            *(also(name, f"wav2vec2.{name}") for name in bare),
        )
    )


# --- from sound to hidden states


def samples(c: Config, sound_N: Tensor) -> Tensor:
    """Mono sound [N] at 16 kHz -> [1, N] as the encoder reads it."""
    x = sound_N.to(torch.promote_types(sound_N.dtype, torch.float32))
    if c.do_normalize:
        x = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
    return x[None]


def encode(c: Config, plan: Plan, w: Weights, samples_BN: Tensor) -> list[Tensor]:
    """Sound from `samples` -> `hidden_states` of transformers 4, 1 + layers tensors [B, T, D].

    The last one is behind the last norm; in transformers 5 it is before it.
    """
    w = w / "wav2vec2"
    eps, encoder, projection = c.layer_norm_eps, w / "encoder", w / "feature_projection"
    features = _features(c, w / "feature_extractor", samples_BN.to(w.dtype))
    x = linear(layer_norm(features, projection / "layer_norm", eps), projection / "projection")
    x = x + _positions(c, encoder / "pos_conv_embed" / "conv", x)
    if not c.do_stable_layer_norm:
        x = layer_norm(x, encoder / "layer_norm", eps)
    states = [x]
    layer = _stable_layer if c.do_stable_layer_norm else _layer
    for i in range(c.num_hidden_layers):
        states.append(layer(c, plan, encoder / "layers" / i, states[-1]))
    if c.do_stable_layer_norm:
        states[-1] = layer_norm(states[-1], encoder / "layer_norm", eps)
    return states


def _features(c: Config, w: Weights, x_BN: Tensor) -> Tensor:
    """Samples -> features of the convolutions [B, T, C]."""
    x, activation = x_BN[:, None], ACTIVATIONS[c.feat_extract_activation]
    for i, stride in enumerate(c.conv_stride):
        at = w / "conv_layers" / i
        x = F.conv1d(x, at["conv.weight"], at.get("conv.bias"), stride)
        if c.feat_extract_norm == "layer":
            x = layer_norm(x.mT, at / "layer_norm", CONV_EPS).mT
        elif i == 0:
            x = group_norm(x, at / "layer_norm", x.shape[1], CONV_EPS)
        x = activation(x)
    return x.mT


def _positions(c: Config, w: Weights, x_BTD: Tensor) -> Tensor:
    """What says where each vector stands: a convolution whose kernel is stored as length and direction."""
    direction = w["weight_v"]
    length = direction.square().sum((0, 1), keepdim=True).sqrt()
    size = c.num_conv_pos_embeddings
    y = F.conv1d(
        x_BTD.mT,
        direction * (w["weight_g"] / length),
        w["bias"],
        padding=size // 2,
        groups=c.num_conv_pos_embedding_groups,
    )
    y = y[..., : x_BTD.shape[1]]  # a kernel of even size makes one too many
    return ACTIVATIONS[c.feat_extract_activation](y).mT


def _stable_layer(c: Config, plan: Plan, w: Weights, x_BTD: Tensor) -> Tensor:
    """A layer that normalises its inputs."""
    eps = c.layer_norm_eps
    x = x_BTD + _attention(c, plan, w / "attention", layer_norm(x_BTD, w / "layer_norm", eps))
    return x + _feed_forward(c, plan, w / "feed_forward", layer_norm(x, w / "final_layer_norm", eps))


def _layer(c: Config, plan: Plan, w: Weights, x_BTD: Tensor) -> Tensor:
    """A layer that normalises its results."""
    eps = c.layer_norm_eps
    x = layer_norm(x_BTD + _attention(c, plan, w / "attention", x_BTD), w / "layer_norm", eps)
    return layer_norm(x + _feed_forward(c, plan, w / "feed_forward", x), w / "final_layer_norm", eps)


def _attention(c: Config, plan: Plan, w: Weights, x: Tensor) -> Tensor:
    heads = (-1, c.hidden_size // c.num_attention_heads)
    q, k, v = (torch.unflatten(linear(x, w / name), -1, heads) for name in ("q_proj", "k_proj", "v_proj"))
    return linear_sum(plan, attention(plan, q, k, v).flatten(2), w / "out_proj")


def _feed_forward(c: Config, plan: Plan, w: Weights, x: Tensor) -> Tensor:
    y = ACTIVATIONS[c.hidden_act](linear(x, w / "intermediate_dense"))
    return linear_sum(plan, y, w / "output_dense")


FAMILY = Encoder(
    "image_encoder",
    Config,
    spec,
    head_width=lambda c: c.hidden_size // c.num_attention_heads,
    biased=False,
    keys=key_map,
    read=config_from,
    preprocessor=("audio_processor", preprocessing),
)
