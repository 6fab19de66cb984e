"""The Config that `decoder_lm` runs, and how a released config.json is read into it.

transformers writes two layouts (4: `rope_theta` with `rope_scaling`; 5: `rope_parameters`, one or one per
kind of layer), nests the text model of a multimodal model in `text_config`, and leaves out what equals its
class's defaults, so those defaults are listed here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch.nn.functional as F

from tinydiff.entries import Entries, EntryDict, is_object, mapping, typed
from tinydiff.ops.activations import Activation, gelu_tanh

FULL, SLIDING = "full_attention", "sliding_attention"

ACTIVATIONS: dict[str, Activation] = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": gelu_tanh}

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer, under the names of `rope_parameters`.

    mrope_section: channel pairs turned by the temporal, the vertical and the horizontal position; empty where
    a position is one number.
    partial_rotary_factor: the share of a head's channel pairs that turns, in a rope of type "proportional".
    llama_4_scaling_beta: queries grow by 1 + beta log(1 + position // original_max_position_embeddings).
    """

    rope_theta: float = 1e4
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    mrope_section: tuple[int, ...] = ()
    llama_4_scaling_beta: float = 0.0
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r}; known are {', '.join(ROPE_TYPES)}")
        needs_length = self.rope_type in ("llama3", "yarn") or self.llama_4_scaling_beta
        if needs_length and self.original_max_position_embeddings <= 0:
            raise ValueError(
                f"rope_type {self.rope_type!r} needs original_max_position_embeddings, the length trained on"
            )
        if self.low_freq_factor == self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor and high_freq_factor are both {self.low_freq_factor:g}; they must differ"
            )


class Heads(NamedTuple):
    """Heads of one kind of layer.

    width: of a head. keys: how many heads keys and values have. keys_are_values: values are the keys before
    their norm, and have no projection.
    """

    width: int
    keys: int
    keys_are_values: bool


@dataclass(frozen=True)
class Config:
    """Field names are those of the text part of config.json; defaults are Qwen2.5-VL 7B's.

    qkv_bias, o_bias, mlp_bias: which linear layers have a bias. qk_norm: queries and keys are normalised
    per head. norm_plus_one: norms multiply by 1 + weight. sandwich_norms: the output of attention and of
    the MLP is normalised too. scale_embeddings: embeddings are multiplied by the root of the width.
    layer_types: the kind of each layer. local_rope_parameters: the rope of sliding layers where it
    differs from that of the others. global_head_dim, num_global_key_value_heads: of the other layers, where
    they differ from those of sliding ones. attention_k_eq_v: in these layers the values are the keys.
    value_norm: values are normalised per head, without a weight. layer_scalars: each layer's output is
    multiplied by a number. layers: how many layers are built and run, counted from the first.
    lm_head: whether the output head is built, to generate text.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    layer_types: tuple[str, ...] = (FULL,) * 28
    sliding_window: int | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_parameters: Rope = Rope(1e6, mrope_section=(16, 24, 24))
    local_rope_parameters: Rope | None = None
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    scale_embeddings: bool = False
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    value_norm: bool = False
    layer_scalars: bool = False
    layers: int = 28
    lm_head: bool = False

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            count: int | None = getattr(self, name)
            if count and self.num_attention_heads % count:
                heads = f"num_attention_heads is {self.num_attention_heads}"
                raise ValueError(f"{heads}; it must be a multiple of {name}, {count}")
        if len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= {FULL, SLIDING}:
            raise ValueError(
                f"layer_types is {self.layer_types}; it must name {FULL} or {SLIDING} for each of "
                f"{self.num_hidden_layers} layers"
            )
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ValueError(f"sliding_window is {self.sliding_window!r}, but layer_types has {SLIDING}")
        sections = self.rope_parameters.mrope_section
        if sections and (len(sections) != 3 or sum(sections) != self.head_dim // 2):
            raise ValueError(
                f"mrope_section is {sections}; it divides the {self.head_dim // 2} channel pairs of a head "
                "over three axes"
            )
        if not 1 <= self.layers <= self.num_hidden_layers:
            raise ValueError(f"layers is {self.layers}; the model has 1 to {self.num_hidden_layers}")
        if self.lm_head and not self.final_norm:
            raise ValueError(f"lm_head needs all {self.num_hidden_layers} layers; layers is {self.layers}")

    def heads(self, kind: str) -> Heads:
        """Heads of the layers of a kind."""
        if kind == SLIDING:
            return Heads(self.head_dim, self.num_key_value_heads, False)
        keys = self.num_global_key_value_heads or self.num_key_value_heads
        return Heads(self.global_head_dim or self.head_dim, keys, self.attention_k_eq_v)

    @property
    def final_norm(self) -> bool:
        """Whether the last state is normalised: only that of the model's last layer is."""
        return self.layers == self.num_hidden_layers


_GEMMA = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rope_theta": 1e4,
    "sliding_window": 4096, "tie_word_embeddings": True, "norm_plus_one": True, "sandwich_norms": True,
    "scale_embeddings": True,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rope_theta": 1e4,
}  # fmt: skip

KINDS: dict[str, EntryDict] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "ministral3": _LLAMA | {
        "vocab_size": 131072, "intermediate_size": 14336, "num_hidden_layers": 34, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "rope_theta": 1e6,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2_5_vl_text": _LLAMA | {
        "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "max_window_layers": 80, "sliding_window": 4096,
        "use_sliding_window": False, "qkv_bias": True,
    },
    "qwen3": _LLAMA | {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096,
        "use_sliding_window": False, "qk_norm": True,
    },
    "gemma2": _GEMMA | {
        "max_position_embeddings": 8192, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6, "qk_norm": True,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
    "gemma4_unified_text": _GEMMA | {
        "vocab_size": 262144, "num_hidden_layers": 30, "max_position_embeddings": 262144,
        "sliding_window": 1024, "sliding_window_pattern": 6, "global_head_dim": 512, "qk_norm": True,
        "norm_plus_one": False, "value_norm": True, "layer_scalars": True, "query_pre_attn_scalar": 1,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
    },
}  # fmt: skip
"""model_type of the text part -> entries that its config.json may omit, and the flags of Config."""


@dataclass(frozen=True)
class _Stored:
    """Types of the entries that a config.json is read by before they become a Config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rope_theta: float
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    max_window_layers: int | None = None
    sliding_window_pattern: int | None = None
    rope_local_base_freq: float | None = None
    layer_types: tuple[str, ...] | None = None
    rope_scaling: Entries | None = None
    rope_parameters: Entries | None = None
    per_layer_config: Entries | None = None
    use_bidirectional_attention: bool | str | None = None


CLASSES = {
    "LlamaModel": ("llama",),
    "LlamaForCausalLM": ("llama",),
    "LlavaForConditionalGeneration": ("llama",),
    "MistralForCausalLM": ("mistral",),
    "Mistral3Model": ("mistral", "ministral3"),
    "Mistral3ForConditionalGeneration": ("mistral", "ministral3"),
    "Ministral3ForCausalLM": ("ministral3",),
    "Qwen2_5_VLTextModel": ("qwen2_5_vl_text",),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl_text",),
    "Qwen3Model": ("qwen3",),
    "Qwen3ForCausalLM": ("qwen3",),
    "Gemma2Model": ("gemma2",),
    "Gemma2ForCausalLM": ("gemma2",),
    "Gemma3TextModel": ("gemma3_text",),
    "Gemma3ForCausalLM": ("gemma3_text",),
    "Gemma3ForConditionalGeneration": ("gemma3_text",),
    "Gemma4UnifiedTextModel": ("gemma4_unified_text",),
    "Gemma4UnifiedForCausalLM": ("gemma4_unified_text",),
    "Gemma4UnifiedForConditionalGeneration": ("gemma4_unified_text",),
}
"""Class named in model_index.json: the model_types its text part may have."""

_WHOLE = {"qwen2_5_vl": "qwen2_5_vl_text", "gemma3": "gemma3_text"}
"""model_type of a whole multimodal model whose older files hold the text part's fields beside it."""


def config_from(entries: Entries, class_name: str) -> Config:
    """The Config of a released config.json, with all layers and no output head.

    `dataclasses.replace` sets `layers` and `lm_head`. class_name: the class in model_index.json. Raises
    ValueError, one sentence, for what is not implemented.
    """
    if class_name not in CLASSES:
        raise ValueError(f"{class_name!r} is no known language model; known are {', '.join(CLASSES)}")
    text = mapping("text_config", entries.get("text_config") or entries)
    kind = str(text.get("model_type", CLASSES[class_name][0]))
    kind = _WHOLE.get(kind, kind)
    if kind not in CLASSES[class_name]:
        raise ValueError(f"model_type is {kind!r}; {class_name} holds {' or '.join(CLASSES[class_name])}")
    v = KINDS[kind] | dict(text)
    v |= typed(_Stored, v)
    if v.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise ValueError("use_bidirectional_attention is set; only causal attention is implemented")
    if v.get("num_kv_shared_layers"):
        raise ValueError(
            f"num_kv_shared_layers is {v['num_kv_shared_layers']}; only layers with keys of their own are "
            "implemented"
        )
    heads, layers = v["num_attention_heads"], v["num_hidden_layers"]
    if not v.get("head_dim") and v["hidden_size"] < heads:
        raise ValueError(
            f"num_attention_heads is {heads}; it must be at most hidden_size, {v['hidden_size']}"
        )
    bias = bool(v.get("attention_bias"))
    # Newer files have this entry outside the text part.
    ties: list[bool] = [
        part["tie_word_embeddings"] for part in (text, entries) if "tie_word_embeddings" in part
    ]
    rope, local_rope = _ropes(v)
    if kind == "qwen2_5_vl_text" and not all(each.mrope_section for each in (rope, local_rope or rope)):
        raise ValueError("mrope_section is missing; Qwen2.5-VL needs it among its rope parameters")
    window = v.get("sliding_window") if v.get("use_sliding_window", True) else None
    types = _layer_types(v) if window else (FULL,) * layers
    activation = v["hidden_act"]
    if "gemma" in kind:
        activation = v.get("hidden_activation", KINDS[kind]["hidden_act"])
    derived = {
        "head_dim": v.get("head_dim") or v["hidden_size"] // heads,
        "num_key_value_heads": v.get("num_key_value_heads") or heads,
        "hidden_act": activation,
        "tie_word_embeddings": any(ties) if ties else KINDS[kind].get("tie_word_embeddings", False),
        "sliding_window": window,
        "layer_types": types,
        "rope_parameters": rope,
        "local_rope_parameters": local_rope,
        "qkv_bias": bias or v.get("qkv_bias", False),
        "o_bias": bias,
        "layers": layers,
        "lm_head": False,
    }
    if "global_head_dim" in KINDS[kind]:
        derived |= _global_heads(v, types)
    present = {name: value for name, value in (v | derived).items() if value is not None}
    return Config(**typed(Config, present))


def _layer_types(v: Entries) -> tuple[str, ...]:
    """As listed; else layers slide from `max_window_layers` on, but for every `sliding_window_pattern`-th."""
    if v.get("layer_types"):
        return tuple(v["layer_types"])
    first, pattern = v.get("max_window_layers") or 0, v.get("sliding_window_pattern")
    slides = (i >= first and not (pattern and (i + 1) % pattern == 0) for i in range(v["num_hidden_layers"]))
    return tuple(SLIDING if yes else FULL for yes in slides)


def _global_heads(v: Entries, types: tuple[str, ...]) -> EntryDict:
    """The heads of layers that do not slide. Newer files list what differs by layer (`per_layer_config`)."""
    listed = v.get("per_layer_config")
    if listed is None:
        keys = v.get("num_global_key_value_heads") if v.get("attention_k_eq_v") else None
        return {"num_global_key_value_heads": keys}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    own = {i: mapping(f"per_layer_config.{i}", each) for i, each in listed.items()}
    whole = [str(i) for i, kind in enumerate(types) if kind == FULL]
    wide: EntryDict = dict(own[whole[0]]) if whole and whole[0] in own else {}
    if not set(wide) <= set(names) or own != (dict.fromkeys(whole, wide) if wide else {}):
        raise ValueError(
            f"per_layer_config is {dict(listed)}; it must give every layer of {FULL} the same "
            f"{' and '.join(names)}, and no other layer any"
        )
    return {theirs: wide.get(name) for name, theirs in names.items()}


def _ropes(v: Entries) -> tuple[Rope, Rope | None]:
    """The rope of full layers and that of sliding ones, None where it is the same."""
    parameters: Entries = v.get("rope_scaling") or v.get("rope_parameters") or {}
    if FULL in parameters:
        full: object = parameters[FULL]
        sliding: object = parameters.get(SLIDING)
        if not is_object(full) or not (sliding is None or is_object(sliding)):
            raise ValueError(
                f"rope_parameters is {dict(parameters)}; it must have an object for each kind of layer"
            )
        local = None if sliding is None else _rope(v, sliding)
        return _rope(v, full), local
    local = v.get("rope_local_base_freq")
    return _rope(v, parameters), None if local is None else Rope(local)


def _rope(v: Entries, parameters: Entries) -> Rope:
    """v: entries of the text model. parameters: those of one kind of layer's rope."""
    kind = parameters.get("rope_type") or parameters.get("type", "default")
    kind = "default" if kind == "mrope" else kind
    entries: EntryDict = {"rope_theta": v["rope_theta"]} | dict(parameters) | {"rope_type": kind}
    if kind in ("llama3", "yarn"):
        entries.setdefault("original_max_position_embeddings", v["max_position_embeddings"])
    if kind != "proportional" and entries.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ValueError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']}; only heads rotated whole are "
            "implemented"
        )
    names = {field.name for field in fields(Rope)}
    unknown = sorted(set(entries) - names - {"type", "max_position_embeddings"})
    if unknown and kind in ROPE_TYPES:
        raise ValueError(f"rope parameter {unknown[0]!r} is not known; known are {', '.join(sorted(names))}")
    entries["mrope_section"] = parameters.get("mrope_section") or ()
    return Rope(**typed(Rope, {name: value for name, value in entries.items() if value is not None}))
