"""CLIP's vision tower (ViT-H/14 in Wan2.1 image to video): one class token and one token per patch.

Source: arXiv 2103.00020 and the CLIPVisionModel checkpoints. Wan reads the hidden states before the last
layer, so that layer and the norm after it are stored but never run.
Shape letters: B batch, C colours, S side in pixels, N tokens (1 + patches), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries, mapping, typed
from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.encoders import preprocess
from tinydiff.models.family import Encoder
from tinydiff.ops.activations import Activation, gelu_tanh, quick_gelu
from tinydiff.ops.attention import attention
from tinydiff.ops.conv import conv2d
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.norm import layer_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, under

if TYPE_CHECKING:
    import numpy as np

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}


class Layers(Protocol):
    """What the layers read of a tower's config."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Red, green and blue of the training images, in [0, 1]."""


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json. Fields that change no number are left out."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = MEAN
    """Entries of the preprocessor's file, like the next three."""
    image_std: tuple[float, float, float] = STD
    resample: int = 3
    """Pillow's number of a filter: bicubic."""
    shortest_edge: int | None = None
    """To which an image is resized before its centre is cut out; None: image_size."""

    def __post_init__(self) -> None:
        check_layers(self)

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2


def check_layers(c: Layers) -> None:
    """Raises ValueError for layers that are not implemented."""
    if c.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {c.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(
            f"hidden_size is {c.hidden_size}; it must divide by num_attention_heads, {c.num_attention_heads}"
        )


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a config.json, of a vision tower or of a whole CLIP."""
    vision = mapping("vision_config", entries.get("vision_config", entries))
    return Config(**typed(Config, vision))


# --- weights


def layer_rows(c: Layers) -> Iterator[Row]:
    """The weights of a layer, in CLIP and in SigLIP."""
    d, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    for key in ("k_proj", "v_proj", "q_proj"):
        yield from linear_rows(f"self_attn.{key}", d, d, "out", head=head)
    yield from linear_rows("self_attn.out_proj", d, d, "in", head=head)
    yield from norm_rows("layer_norm1", d, bias=True)
    yield from linear_rows("mlp.fc1", d, c.intermediate_size, "out")
    yield from linear_rows("mlp.fc2", c.intermediate_size, d, "in")
    yield from norm_rows("layer_norm2", d, bias=True)


def _rows(c: Config) -> Iterator[Row]:
    d = c.hidden_size
    yield Row("embeddings.class_embedding", (d,))
    yield Row("embeddings.patch_embedding.weight", (d, c.num_channels, c.patch_size, c.patch_size))
    yield Row("embeddings.position_embedding.weight", (c.tokens, d))
    yield from norm_rows("pre_layrnorm", d, bias=True)  # spelt so in every checkpoint
    yield from repeat("encoder.layers", c.num_hidden_layers, layer_rows(c))
    yield from norm_rows("post_layernorm", d, bias=True)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, under the names of the released files."""
    yield from under("vision_model", _rows(c))


def key_map(c: Config) -> KeyMap:
    """Old files also hold a list of positions, and files of a whole CLIP its text half: unread.

    transformers 5 writes the tower without its prefix.
    """
    rest = ("visual_projection", "text_model", "text_projection", "logit_scale", "embeddings.position_ids")
    tower = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    return KeyMap(
        (
            *unread(*rest, "vision_model.embeddings.position_ids"),
            *(also(name, f"vision_model.{name}") for name in tower),
        )
    )


# --- from image to tokens


def pixels(c: Config, image_HWC: np.ndarray) -> Tensor:
    """uint8 RGB image [H, W, 3] -> float32 [1, 3, S, S], resized, centre-cropped and normalised."""
    import numpy as np
    from PIL import Image

    side, (height, width) = c.image_size, image_HWC.shape[:2]
    edge, short = c.shortest_edge or side, min(height, width)
    scaled = (edge * width // short, edge * height // short)
    resized = np.asarray(Image.fromarray(image_HWC).resize(scaled, Image.Resampling(c.resample)))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    colours = torch.as_tensor(resized[top : top + side, left : left + side] / 255.0).float()
    colours = (colours - torch.tensor(c.image_mean)) / torch.tensor(c.image_std)
    return colours.permute(2, 0, 1)[None].contiguous()


def encode(c: Config, plan: Plan, w: Weights, pixels_BCSS: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] from `pixels` -> tokens [B, N, D] after all layers but the last.

    These are `hidden_states[-2]` of transformers.
    """
    w = w / "vision_model"
    e = w / "embeddings"
    kernel = e / "patch_embedding"
    patches = conv2d(pixels_BCSS.to(w.dtype), kernel, stride=c.patch_size).flatten(2).mT
    first = e["class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], 1) + e["position_embedding.weight"]
    x = layer_norm(x, w / "pre_layrnorm", c.layer_norm_eps)
    for i in range(c.num_hidden_layers - 1):
        x = layer(c, plan, w / "encoder" / "layers" / i, x)
    return x


def layer(c: Layers, plan: Plan, w: Weights, x_BND: Tensor) -> Tensor:
    """Attention of all tokens to all, then a feed-forward, in CLIP and in SigLIP."""
    eps = c.layer_norm_eps
    x = x_BND + _attention(c, plan, w / "self_attn", layer_norm(x_BND, w / "layer_norm1", eps))
    y = linear(layer_norm(x, w / "layer_norm2", eps), w / "mlp" / "fc1")
    return x + linear_sum(plan, ACTIVATIONS[c.hidden_act](y), w / "mlp" / "fc2")


def _attention(c: Layers, plan: Plan, w: Weights, x: Tensor) -> Tensor:
    heads = (-1, c.hidden_size // c.num_attention_heads)
    q, k, v = (torch.unflatten(linear(x, w / name), -1, heads) for name in ("q_proj", "k_proj", "v_proj"))
    return linear_sum(plan, attention(plan, q, k, v).flatten(2), w / "out_proj")


FAMILY = Encoder(
    "image_encoder",
    Config,
    spec,
    head_width=lambda c: c.hidden_size // c.num_attention_heads,
    biased=False,
    keys=key_map,
    read=config_from,
    preprocessor=("image_processor", lambda entries, c: preprocess.clip(entries, c.image_size)),
)
