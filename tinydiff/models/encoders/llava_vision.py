"""LLaVA's eyes: CLIP's vision tower (ViT-L/14 at 336 pixels) and two layers that lead to a language model.

Source: arXiv 2304.08485 and the LlavaForConditionalGeneration checkpoints. The class token is left out.
Shape letters: B batch, S side in pixels, N patches, C width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from tinydiff.entries import Entries, EntryDict, mapping, value
from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.encoders import clip_vision, preprocess
from tinydiff.models.encoders.clip_vision import ACTIVATIONS
from tinydiff.models.family import Encoder
from tinydiff.ops.linear import linear, linear_sum
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, under

if TYPE_CHECKING:
    import numpy as np

ALWAYS = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
}
"""What config.json must say, which is the default."""


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json where it has them."""

    tower: clip_vision.Config = field(default_factory=clip_vision.Config)
    width: int = 4096
    """Of the language model."""
    projector_hidden_act: str = "gelu"
    image_token_index: int = 32000
    """The id that stands for an image among those of words."""

    def __post_init__(self) -> None:
        if self.projector_hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"projector_hidden_act is {self.projector_hidden_act!r}; known are {', '.join(ACTIVATIONS)}"
            )

    @property
    def tokens(self) -> int:
        """How many tokens of the language model an image becomes."""
        return self.tower.tokens - 1


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a config.json. Raises ValueError, one sentence, for what is not implemented."""
    for name, always in ALWAYS.items():
        if entries.get(name, always) != always:
            raise ValueError(f"{name} is {entries[name]!r}; only {always!r} is implemented")
    text = mapping("text_config", entries.get("text_config"))
    known = {"projector_hidden_act": str, "image_token_index": int}
    return Config(
        tower=clip_vision.config_from(mapping("vision_config", entries.get("vision_config")), class_name),
        width=value("text_config.hidden_size", int, text.get("hidden_size", 4096)),
        **{name: value(name, kind, entries[name]) for name, kind in known.items() if name in entries},
    )


def preprocessed(entries: Entries, c: Config) -> EntryDict:
    """Fields of the Config from the preprocessor's file. Raises ValueError, one sentence."""
    return {"tower": replace(c.tower, **preprocess.clip(entries, c.tower.image_size))}


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, under the names of the released files."""
    yield from under("vision_tower", clip_vision.spec(c.tower))
    yield from linear_rows("multi_modal_projector.linear_1", c.tower.hidden_size, c.width, "out")
    yield from linear_rows("multi_modal_projector.linear_2", c.width, c.width, "in")


def key_map(c: Config) -> KeyMap:
    """transformers 5 writes the tower without its own prefix, and may write `model.` before each part.

    The language model is read by its own record.
    """
    tower = "vision_tower.vision_model"
    inside = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    positions = f"{tower}.embeddings.position_ids"
    return KeyMap(
        (
            *unread(positions, f"model.{positions}", "language_model", "model.language_model", "lm_head"),
            also(f"model.{tower}", tower),
            *(
                also(f"{outer}vision_tower.{name}", f"{tower}.{name}")
                for outer in ("model.", "")
                for name in inside
            ),
            also("model.multi_modal_projector", "multi_modal_projector"),
        )
    )


def pixels(c: Config, image_HWC: np.ndarray) -> Tensor:
    """uint8 RGB image [H, W, 3] -> float32 [1, 3, S, S], as CLIP sees it."""
    return clip_vision.pixels(c.tower, image_HWC)


def encode(c: Config, plan: Plan, w: Weights, pixels_BCSS: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] from `pixels` -> tokens [B, N, C] of the language model."""
    patches = clip_vision.encode(c.tower, plan, w / "vision_tower", pixels_BCSS)[:, 1:]
    w = w / "multi_modal_projector"
    y = ACTIVATIONS[c.projector_hidden_act](linear(patches, w / "linear_1"))
    return linear_sum(plan, y, w / "linear_2")


FAMILY = Encoder(
    "image_encoder",
    Config,
    spec,
    head_width=lambda c: c.tower.hidden_size // c.tower.num_attention_heads,
    biased=False,
    keys=key_map,
    read=config_from,
    preprocessor=("image_processor", preprocessed),
)
