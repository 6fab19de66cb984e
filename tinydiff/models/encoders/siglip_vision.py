"""SigLIP's vision tower (so400m/14 at 384 pixels in HunyuanVideo-1.5 image to video): one token per patch.

Source: arXiv 2303.15343 and the SiglipVisionModel checkpoints. Its layers are CLIP's. All of them run, and a
norm after them; the pooling head is stored but never run.
Shape letters: B batch, S side in pixels, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinydiff.entries import Entries, mapping, typed
from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.encoders import preprocess
from tinydiff.models.encoders.clip_vision import check_layers, layer, layer_rows
from tinydiff.models.family import Encoder
from tinydiff.ops.conv import conv2d
from tinydiff.ops.norm import layer_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, under

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json. Fields that change no number are left out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Entries of the preprocessor's file, like the next two."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 3
    """Pillow's number of a filter: bicubic."""

    def __post_init__(self) -> None:
        check_layers(self)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a config.json, of a vision tower or of a whole SigLIP."""
    vision = mapping("vision_config", entries.get("vision_config", entries))
    return Config(**typed(Config, vision))


# --- weights


def _head_rows(c: Config) -> Iterator[Row]:
    d = c.hidden_size
    yield Row("probe", (1, 1, d))
    yield Row("attention.in_proj_weight", (3 * d, d))
    yield Row("attention.in_proj_bias", (3 * d,))
    yield from linear_rows("attention.out_proj", d, d)
    yield from norm_rows("layernorm", d, bias=True)
    yield from linear_rows("mlp.fc1", d, c.intermediate_size)
    yield from linear_rows("mlp.fc2", c.intermediate_size, d)


def _rows(c: Config) -> Iterator[Row]:
    d = c.hidden_size
    yield Row("embeddings.patch_embedding.weight", (d, c.num_channels, c.patch_size, c.patch_size))
    yield Row("embeddings.patch_embedding.bias", (d,))
    yield Row("embeddings.position_embedding.weight", (c.tokens, d))
    yield from repeat("encoder.layers", c.num_hidden_layers, layer_rows(c))
    yield from norm_rows("post_layernorm", d, bias=True)
    if c.vision_use_head:
        yield from under("head", _head_rows(c))


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, under the names of the released files."""
    yield from under("vision_model", _rows(c))


def key_map(c: Config) -> KeyMap:
    """The key map of SigLIP's files.

    Files of a whole SigLIP also hold its text half, which is not read. transformers 5 writes the tower
    without its prefix.
    """
    tower = ("embeddings", "encoder", "post_layernorm", "head")
    return KeyMap(
        (
            *unread("text_model", "logit_scale", "logit_bias"),
            *(also(name, f"vision_model.{name}") for name in tower),
        )
    )


# --- from image to tokens


def pixels(c: Config, image_HWC: np.ndarray) -> Tensor:
    """uint8 RGB image [H, W, 3] -> float32 [1, 3, S, S], resized to a square and normalised."""
    import numpy as np
    from PIL import Image

    square = (c.image_size, c.image_size)
    resized = np.asarray(Image.fromarray(image_HWC).resize(square, Image.Resampling(c.resample)))
    colours = torch.as_tensor(resized / 255.0).float()
    colours = (colours - torch.tensor(c.image_mean)) / torch.tensor(c.image_std)
    return colours.permute(2, 0, 1)[None].contiguous()


def encode(c: Config, plan: Plan, w: Weights, pixels_BCSS: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] from `pixels` -> tokens [B, N, D]: `last_hidden_state` of transformers."""
    w = w / "vision_model"
    e = w / "embeddings"
    patches = conv2d(pixels_BCSS.to(w.dtype), e / "patch_embedding", stride=c.patch_size).flatten(2).mT
    x = patches + e["position_embedding.weight"]
    for i in range(c.num_hidden_layers):
        x = layer(c, plan, w / "encoder" / "layers" / i, x)
    return layer_norm(x, w / "post_layernorm", c.layer_norm_eps)


FAMILY = Encoder(
    "image_encoder",
    Config,
    spec,
    head_width=lambda c: c.hidden_size // c.num_attention_heads,
    biased=False,
    keys=key_map,
    read=config_from,
    preprocessor=("feature_extractor", lambda entries, c: preprocess.siglip(entries, c.image_size)),
)
