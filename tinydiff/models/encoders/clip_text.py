"""CLIP's text encoder: CLIP-L (FLUX.1, SD3) and CLIP-G (SD3).

Source: arXiv 2103.00020 and the CLIPTextModel checkpoints. A causal transformer with learned positions. The
state of the end token, which has seen everything before it, represents the whole text.
Shape letters: B batch, T tokens, D width, P width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.entries import Entries, mapping, typed
from tinydiff.keymap import KeyMap, also, unread
from tinydiff.models.family import Encoder
from tinydiff.ops.activations import Activation, quick_gelu
from tinydiff.ops.attention import attention
from tinydiff.ops.linear import embedding, linear, linear_sum
from tinydiff.ops.norm import layer_norm
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan, Row, linear_rows, norm_rows, repeat, under

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "quick_gelu": quick_gelu}

WITH_PROJECTION = "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class Config:
    """Field names are those of the checkpoint's config.json. Fields that change no number are left out.

    architectures: the class that runs it.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    architectures: tuple[str, ...] = ("CLIPTextModel",)

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must divide by num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        if len(self.architectures) != 1 or self.architectures[0] not in ("CLIPTextModel", WITH_PROJECTION):
            raise ValueError(
                f"architectures is {list(self.architectures)}; known are CLIPTextModel and {WITH_PROJECTION}"
            )

    @property
    def projects(self) -> bool:
        """Whether the checkpoint has the map into CLIP's joint space."""
        return self.architectures == (WITH_PROJECTION,)


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a config.json, of a text encoder or of a whole CLIP.

    class_name: CLIPTextModelWithProjection has a projection into the joint space, CLIPTextModel has none.
    """
    text = mapping("text_config", entries.get("text_config", entries))
    return Config(**typed(Config, {**text, "architectures": [class_name]}))


class Encoded(NamedTuple):
    """CLIP's hidden states and pooled vectors of texts."""

    hidden_states: tuple[Tensor, ...]
    """The embeddings [B, T, D], then the states after each layer; the last is not normalised yet."""
    pooled: Tensor
    """The normalised last state of the end token [B, D]."""
    projected: Tensor | None
    """`pooled` in CLIP's joint space [B, P]; None where the checkpoint has no such map."""


# --- weights


def _layer_rows(c: Config) -> Iterator[Row]:
    d, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    for key in ("k_proj", "v_proj", "q_proj"):
        yield from linear_rows(f"self_attn.{key}", d, d, "out", head=head)
    yield from linear_rows("self_attn.out_proj", d, d, "in", head=head)
    yield from norm_rows("layer_norm1", d, bias=True)
    yield from linear_rows("mlp.fc1", d, c.intermediate_size, "out")
    yield from linear_rows("mlp.fc2", c.intermediate_size, d, "in")
    yield from norm_rows("layer_norm2", d, bias=True)


def _rows(c: Config) -> Iterator[Row]:
    yield Row("embeddings.token_embedding.weight", (c.vocab_size, c.hidden_size))
    yield Row("embeddings.position_embedding.weight", (c.max_position_embeddings, c.hidden_size))
    yield from repeat("encoder.layers", c.num_hidden_layers, _layer_rows(c))
    yield from norm_rows("final_layer_norm", c.hidden_size, bias=True)


def spec(c: Config) -> Iterator[Row]:
    """Every weight once, under the names of the released files."""
    yield from under("text_model", _rows(c))
    if c.projects:
        yield from linear_rows("text_projection", c.hidden_size, c.projection_dim, bias=False)


def key_map(c: Config) -> KeyMap:
    """Old files also hold a list of positions, and files of a whole CLIP its vision half: unread.

    transformers 5 writes an encoder without projection without its prefix.
    """
    rest = ("vision_model", "visual_projection", "logit_scale", "embeddings.position_ids")
    return KeyMap(
        (
            *unread(*rest, "text_model.embeddings.position_ids"),
            *(() if c.projects else unread("text_projection")),
            *(also(name, f"text_model.{name}") for name in ("embeddings", "encoder", "final_layer_norm")),
        )
    )


# --- from tokens to states


def encode(c: Config, plan: Plan, w: Weights, ids_BT: Tensor) -> Encoded:
    """Token ids [B, T] int64 -> `Encoded`. T is at most `max_position_embeddings`.

    Padding after the end token changes nothing before it.
    """
    text, eps, length = w / "text_model", c.layer_norm_eps, ids_BT.shape[1]
    e = text / "embeddings"
    positions = torch.arange(length, device=ids_BT.device)[None]
    x = embedding(ids_BT, e / "token_embedding") + embedding(positions, e / "position_embedding")
    later = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    states = [x]
    for i in range(c.num_hidden_layers):
        layer = text / "encoder" / "layers" / i
        x = x + _attention(c, plan, layer / "self_attn", layer_norm(x, layer / "layer_norm1", eps), later)
        y = linear(layer_norm(x, layer / "layer_norm2", eps), layer / "mlp" / "fc1")
        y = ACTIVATIONS[c.hidden_act](y)
        x = x + linear_sum(plan, y, layer / "mlp" / "fc2")
        states.append(x)
    end = x[torch.arange(len(x), device=x.device), end_token(c, ids_BT)]
    pooled = layer_norm(end, text / "final_layer_norm", eps)
    return Encoded(tuple(states), pooled, linear(pooled, w / "text_projection") if c.projects else None)


def end_token(c: Config, ids_BT: Tensor) -> Tensor:
    """Index of each text's first end token [B].

    Old configs say that the end token is 2, which is wrong for every tokenizer. With them the end token is
    the largest id of the text, as it is in the vocabulary.
    """
    return (ids_BT if c.eos_token_id == 2 else (ids_BT == c.eos_token_id).int()).argmax(1)


def _attention(c: Config, plan: Plan, w: Weights, x: Tensor, later: Tensor) -> Tensor:
    heads = (-1, c.hidden_size // c.num_attention_heads)
    q, k, v = (torch.unflatten(linear(x, w / name), -1, heads) for name in ("q_proj", "k_proj", "v_proj"))
    return linear_sum(plan, attention(plan, q, k, v, later).flatten(2), w / "out_proj")


FAMILY = Encoder(
    "text_encoder",
    Config,
    spec,
    head_width=lambda c: c.hidden_size // c.num_attention_heads,
    biased=True,
    keys=key_map,
    read=config_from,
)
