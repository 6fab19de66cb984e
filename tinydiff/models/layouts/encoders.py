"""Files of text and image encoders.

They have transformers' names, which ComfyUI keeps, open_clip's, llama.cpp's in GGUF files, or are Wan's
pickles.

What no shape tells is that of the one released model of the architecture: widths of heads, activations, the
base of a rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

from tinydiff.entries import Entries, EntryDict
from tinydiff.keymap import KeyMap, Line, fused, interleaved, moved, transposed, under, unread
from tinydiff.models import released
from tinydiff.models.encoders import clip_text, clip_vision, decoder_lm, siglip_vision, t5
from tinydiff.models.encoders.decoder_config import Config as DecoderConfig
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

TOKENIZERS = unread("spiece_model", "tekken_model", "logit_scale")
"""What ComfyUI's files hold beside the weights: the bytes of a tokenizer, and CLIP's temperature."""

# --- CLIP ---

_CLIP_LAYER = "text_model.encoder.layers.*"
_PARTS = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP = (
    moved("token_embedding", "text_model.embeddings.token_embedding"),
    moved("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *under(
        "transformer.resblocks.*",
        _CLIP_LAYER,
        *(
            fused(f"attn.in_proj_{leaf}", *(f"self_attn.{name}.{leaf}" for name in _PARTS))
            for leaf in ("weight", "bias")
        ),
        moved("attn.out_proj", "self_attn.out_proj"),
        moved("ln_1", "layer_norm1"),
        moved("ln_2", "layer_norm2"),
        moved("mlp.c_fc", "mlp.fc1"),
        moved("mlp.c_proj", "mlp.fc2"),
    ),
    moved("ln_final", "text_model.final_layer_norm"),
    transposed("text_projection", "text_projection.weight"),
    *unread("visual", "attn_mask"),
)

CLIP_HEAD = 64


def clip_entries(s: Sizes) -> Entries:
    """CLIP-L's activation is the quick one, that of the wider ones is exact."""
    width = s("text_model.embeddings.token_embedding.weight")
    vocabulary, width = s.shapes["text_model.embeddings.token_embedding.weight"]
    found: Entries = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": s("text_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": s.count("text_model.encoder.layers"),
        "num_attention_heads": width // CLIP_HEAD,
        "max_position_embeddings": s("text_model.embeddings.position_embedding.weight"),
        "hidden_act": "quick_gelu" if width <= 768 else "gelu",
    }
    if s.has("text_projection.weight"):
        found["projection_dim"] = s("text_projection.weight")
    return found


def _open_clip(s: Sizes) -> Entries:
    """The map into the joint space is stored the other way round."""
    found = by_rows(OPEN_CLIP, clip_entries)(s)
    joint = {"projection_dim": s("text_projection", 1)} if s.has("text_projection") else {}
    return {**found, **joint}


def _of_clip(class_name: str, signs: tuple[str, ...], lacks: tuple[str, ...]) -> tuple[Layout, ...]:
    return (
        Layout(
            "transformers",
            class_name,
            ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.embeddings", *signs),
            lambda c: (*TOKENIZERS, *clip_text.FAMILY.keys(c).lines),
            clip_entries,
            lacks,
        ),
        Layout(
            "open_clip",
            class_name,
            ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding", *signs),
            lambda c: (*TOKENIZERS, *(() if c.projects else unread("text_projection")), *OPEN_CLIP),
            _open_clip,
            lacks,
        ),
    )


WAN_CLIP = (
    *under(
        "visual",
        "vision_model",
        moved("patch_embedding", "embeddings.patch_embedding"),
        moved("cls_embedding", "embeddings.class_embedding", lead=2),
        moved("pos_embedding", "embeddings.position_embedding.weight", lead=1),
        moved("pre_norm", "pre_layrnorm"),
        moved("post_norm", "post_layernorm"),
        *under(
            "transformer.*",
            "encoder.layers.*",
            fused("attn.to_qkv", *(f"self_attn.{name}" for name in _PARTS)),
            moved("attn.proj", "self_attn.out_proj"),
            moved("norm1", "layer_norm1"),
            moved("norm2", "layer_norm2"),
            moved("mlp.0", "mlp.fc1"),
            moved("mlp.2", "mlp.fc2"),
        ),
    ),
    *unread("visual.head", "textual", "log_scale"),
)

VISION_HEADS = 16
WHOLE = {378: 384}
"""27 patches of 14 pixels are those of an image of 384, whose border is left out."""


def _tower_entries(s: Sizes, extra: int) -> EntryDict:
    """A vision tower. extra: tokens that are no patch."""
    e = "vision_model.embeddings"
    width, channels, side, _ = s.shapes[f"{e}.patch_embedding.weight"]
    *_, tokens, _ = s.shapes[f"{e}.position_embedding.weight"]
    pixels = side * isqrt(tokens - extra)
    return {
        "hidden_size": width,
        "intermediate_size": s("vision_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": s.count("vision_model.encoder.layers"),
        "num_attention_heads": VISION_HEADS,
        "num_channels": channels,
        "patch_size": side,
        "image_size": WHOLE.get(pixels, pixels),
    }


def vision_entries(s: Sizes) -> Entries:
    """The tower of Wan's image encoder."""
    return _tower_entries(s, extra=1)


def siglip_entries(s: Sizes) -> Entries:
    """The tower of HunyuanVideo-1.5's image encoder. The head is never run, and a file may lack it."""
    return {**_tower_entries(s, extra=0), "vision_use_head": s.has("vision_model.head")}


_VISION = clip_vision.FAMILY.keys(clip_vision.Config()).lines
_SIGLIP = siglip_vision.FAMILY.keys(siglip_vision.Config()).lines


def _tower_signs(prefix: str) -> tuple[str, ...]:
    return f"{prefix}encoder.layers.0.self_attn.q_proj", f"{prefix}embeddings.patch_embedding"


VISION = (
    *(
        Layout(
            "transformers",
            "CLIPVisionModel",
            (*_tower_signs(prefix), f"{prefix}embeddings.class_embedding"),
            lambda c: _VISION,
            by_rows(_VISION, vision_entries),
        )
        for prefix in ("vision_model.", "")
    ),
    *(
        Layout(
            "transformers",
            "SiglipVisionModel",
            (*_tower_signs(prefix), f"{prefix}embeddings.patch_embedding.bias"),
            lambda c: _SIGLIP,
            by_rows(_SIGLIP, siglip_entries),
            (f"{prefix}embeddings.class_embedding",),
        )
        for prefix in ("vision_model.", "")
    ),
    Layout(
        "original",
        "CLIPVisionModel",
        ("visual.transformer.0.attn.to_qkv", "visual.patch_embedding"),
        lambda c: WAN_CLIP,
        by_rows(WAN_CLIP, vision_entries),
    ),
)

# --- T5 ---

WAN_T5 = (
    moved("token_embedding", "shared"),
    *under(
        "blocks.*",
        "encoder.block.*",
        moved("norm1", "layer.0.layer_norm"),
        *(moved(f"attn.{name}", f"layer.0.SelfAttention.{name}") for name in "qkvo"),
        moved("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
        moved("norm2", "layer.1.layer_norm"),
        moved("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
        moved("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
        moved("ffn.fc2", "layer.1.DenseReluDense.wo"),
    ),
    moved("norm", "encoder.final_layer_norm"),
)

GGUF_T5 = (
    moved("token_embd", "shared"),
    *under(
        "enc.blk.*",
        "encoder.block.*",
        moved("attn_norm", "layer.0.layer_norm"),
        *(moved(f"attn_{name}", f"layer.0.SelfAttention.{name}") for name in "qkvo"),
        moved("attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"),
        moved("ffn_norm", "layer.1.layer_norm"),
        moved("ffn_gate", "layer.1.DenseReluDense.wi_0"),
        moved("ffn_up", "layer.1.DenseReluDense.wi_1"),
        moved("ffn_down", "layer.1.DenseReluDense.wo"),
    ),
    moved("enc.output_norm", "encoder.final_layer_norm"),
)


def t5_entries(s: Sizes) -> Entries:
    """An encoder with a gate."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = s.shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        "vocab_size": s("shared.weight"),
        "d_model": s("shared.weight", 1),
        "d_kv": s(f"{attention}.q.weight") // heads,
        "d_ff": s("encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
        "num_layers": s.count("encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


_T5_SIGNS = (
    "shared",
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.0.layer.1.DenseReluDense.wi_1",
)
_TABLE = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias"


def _t5_lines(c: t5.Config) -> tuple[Line, ...]:
    return (*TOKENIZERS, *t5.FAMILY.keys(c).lines)


T5 = (
    Layout("transformers", "T5EncoderModel", _T5_SIGNS, _t5_lines, t5_entries, (_TABLE.format(1),)),
    Layout("transformers", "UMT5EncoderModel", (*_T5_SIGNS, _TABLE.format(1)), _t5_lines, t5_entries),
    Layout(
        "original",
        "UMT5EncoderModel",
        ("token_embedding", "blocks.0.attn.q", "blocks.1.pos_embedding", "blocks.0.ffn.gate"),
        lambda c: WAN_T5,
        by_rows(WAN_T5, t5_entries),
    ),
    *(
        Layout(
            "llama.cpp",
            class_name,
            ("token_embd", "enc.blk.0.attn_q", "enc.blk.0.ffn_gate", *signs),
            lambda c: GGUF_T5,
            by_rows(GGUF_T5, t5_entries),
            lacks,
        )
        for class_name, signs, lacks in (
            ("T5EncoderModel", (), ("enc.blk.1.attn_rel_b",)),
            ("UMT5EncoderModel", ("enc.blk.1.attn_rel_b",), ()),
        )
    ),
)

# --- language models ---


def _decoder_entries(more: Callable[[int], Entries]) -> Callable[[Sizes], Entries]:
    """A language model's entries from its shapes.

    more: width -> what no shape tells. A file without the last norm is cut short: it has
    as many layers as are read, and the model has as many as the released one of its widths.
    """

    def ask(stored: Sizes) -> Entries:
        keys = KeyMap(_lines(DecoderConfig(lm_head=True)))
        named = {keys.row(key): shape for key, shape in stored.shapes.items()}
        s = Sizes({name: shape for name, shape in named.items() if name is not None})
        vocabulary, width = s.shapes["embed_tokens.weight"]
        attention, hidden, layers = "layers.0.self_attn", s("layers.0.mlp.up_proj.weight"), s.count("layers")
        head = s(f"{attention}.q_norm.weight") if s.has(f"{attention}.q_norm") else HEAD
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers if s.has("norm") else max(layers, _depth(width, hidden)),
            "num_attention_heads": s(f"{attention}.q_proj.weight") // head,
            "num_key_value_heads": s(f"{attention}.k_proj.weight") // head,
            "head_dim": head,
            "tie_word_embeddings": not s.has("lm_head"),
            **more(width),
        }

    return ask


HEAD = 128
MINISTRAL = 3072
"""The width of the one Ministral that a released model has; Mistral Small is 5120 wide."""


def _depth(width: int, hidden: int) -> int:
    shapes = (
        entries.get("text_config", entries)
        for parts in released.COMPONENTS.values()
        for _, entries in parts.values()
    )
    of = (
        each for each in shapes if (each.get("hidden_size"), each.get("intermediate_size")) == (width, hidden)
    )
    return max((each["num_hidden_layers"] for each in of), default=0)


def _mistral(width: int) -> Entries:
    if width == MINISTRAL:
        return {"model_type": "ministral3"}
    return {"model_type": "mistral", "rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None}


def _lines(c: DecoderConfig) -> tuple[Line, ...]:
    return (*TOKENIZERS, *decoder_lm.FAMILY.keys(c).lines)


_GEMMA = "layers.0.pre_feedforward_layernorm"
_KINDS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], Callable[[int], Entries]], ...] = (
    ("Qwen2_5_VLForConditionalGeneration", ("k_proj.bias",), ("q_norm",),
     lambda width: {"rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}),
    ("Qwen3ForCausalLM", ("q_norm",), ("k_proj.bias",),
     lambda width: {"rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    ("Mistral3ForConditionalGeneration", (), ("q_norm", "k_proj.bias"), _mistral),
)  # fmt: skip
"""Class, what its attention has, what it lacks, what no shape tells."""

LANGUAGE = tuple(
    Layout(
        "transformers",
        class_name,
        (f"{prefix}layers.0.self_attn.q_proj", f"{prefix}layers.0.mlp.up_proj",
         *(f"{prefix}layers.0.self_attn.{name}" for name in signs)),
        _lines,
        _decoder_entries(more),
        (*(f"{prefix}layers.0.self_attn.{name}" for name in lacks), prefix + _GEMMA),
    )
    for class_name, signs, lacks, more in _KINDS
    for prefix in decoder_lm.PREFIXES
)  # fmt: skip

GGUF_DECODER = (
    moved("token_embd", "embed_tokens"),
    *under(
        "blk.*",
        "layers.*",
        moved("attn_norm", "input_layernorm"),
        *(moved(f"attn_{name}", f"self_attn.{name}_proj") for name in "qkv"),
        moved("attn_output", "self_attn.o_proj"),
        *(moved(f"attn_{name}_norm", f"self_attn.{name}_norm") for name in "qk"),
        moved("ffn_norm", "post_attention_layernorm"),
        *(moved(f"ffn_{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down")),
    ),
    moved("output_norm", "norm"),
)
"""As Qwen's."""


def _gguf_turned(c: DecoderConfig) -> tuple[Line, ...]:
    """Llama's and Mistral's queries and keys are stored for a rotary embedding of neighbouring values.

    The config tells them, so that every layout that fits a file reads the same weights: Qwen's have biases or
    norms there.
    """
    if c.qkv_bias or c.qk_norm:
        return ()
    rows = ((f"attn_{name}", f"self_attn.{name}_proj") for name in "qk")
    return under("blk.*", "layers.*", *(interleaved(stored, row, c.head_dim) for stored, row in rows))


def _gguf_lines(c: DecoderConfig) -> tuple[Line, ...]:
    """Layers beyond those that are read, and what is after them, are left."""
    beyond = (f"blk.{i}" for i in range(c.layers, c.num_hidden_layers))
    left = unread(*beyond, "rope_freqs", *(() if c.final_norm else ("output_norm",)))
    head = moved("output", "lm_head") if c.lm_head else unread("output")[0]
    return (*left, head, *_gguf_turned(c), *GGUF_DECODER)


GGUF_LANGUAGE = tuple(
    Layout(
        "llama.cpp",
        class_name,
        ("token_embd", "blk.0.attn_q", "blk.0.ffn_up", *(f"blk.0.{name}" for name in signs)),
        _gguf_lines,
        by_rows(GGUF_DECODER, _decoder_entries(more)),
        (*(f"blk.0.{name}" for name in (*lacks, "post_ffw_norm")), _GEMMA),
    )
    for (class_name, _, _, more), signs, lacks in zip(
        _KINDS,
        (("attn_k.bias",), ("attn_q_norm",), ()),
        (("attn_q_norm",), ("attn_k.bias",), ("attn_q_norm", "attn_k.bias")),
        strict=True,
    )
)

LAYOUTS = (
    *_of_clip("CLIPTextModelWithProjection", ("text_projection",), ()),
    *_of_clip("CLIPTextModel", (), ("text_projection",)),
    *VISION,
    *T5,
    *LANGUAGE,
    *GGUF_LANGUAGE,
)
