"""Encoders as directories store them, whole models and halves of them, under old and new names: our states
are transformers' in float64.

What transformers loads of a directory is the reference: the class that model_index.json names, by
`from_pretrained`.
"""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from tests.parity import close, doubles, randomised
from tinydiff.io.sources import component
from tinydiff.io.weights import load_weights
from tinydiff.models.classes import RECORDS
from tinydiff.models.encoders import clip_text, clip_vision, decoder_lm, t5
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.runtime.component_config import read_config

IDS = torch.tensor([[5, 9, 33, 2, 47, 60], [8, 60, 1, 3, 4, 4]])
T5 = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_decoder_layers": 2,
}
TEXT = {
    **{
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 61,
    },
    **{
        "max_position_embeddings": 11,
        "eos_token_id": 60,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "projection_dim": 10,
    },
}
SEES = {
    **{
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 21,
        "patch_size": 7,
    },
    **{"projection_dim": 10, "hidden_act": "gelu"},
}
LM = {
    **{
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 80,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
QWEN_SEES = {
    **{
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 2,
    },
    **{"temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 12, "fullatt_block_indexes": [0]},
}
SIGLIP = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


def loaded(folder, class_name):
    """Our config and weights of a component's directory, as the runtime loads it."""
    family = RECORDS[class_name]
    c = read_config(family, component("text_encoder", folder, "transformers", class_name))
    flat = load_weights(folder, family.spec(c), torch.float64, keys=family.keys(c))
    return c, Weights(flat, dtype=torch.float64)


def reference(folder, class_name):
    return (
        getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).double()
    )  # rope tables stay float32 numbers


def saved(model, folder, tied=False):
    """A model saved with every parameter redrawn."""
    randomised(model, 1)
    if tied:
        model.tie_weights()
    model.float().save_pretrained(folder)
    return folder


def restored(folder, change):
    """The directory with other keys: change(tensors) -> tensors."""
    path = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file({key: tensor.contiguous() for key, tensor in change(tensors).items()}, path, {"format": "pt"})


# --- T5


def same_t5(folder, class_name):
    c, w = loaded(folder, class_name)
    with doubles():
        expected = reference(folder, class_name)(IDS).last_hidden_state
    close(t5.encode(c, Plan(), w, IDS), expected)


@pytest.mark.parametrize(
    "keys",
    [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")],
)
@pytest.mark.parametrize("act", ["gated-gelu", "relu", "gated-relu"])
def test_a_t5_has_its_embeddings_under_either_name(keys, act, tmp_path):
    saved(T5EncoderModel(T5Config(**T5, feed_forward_proj=act)), tmp_path)

    def under(tensors):
        [table] = [
            tensors.pop(key)
            for key in list(tensors)
            if key in ("shared.weight", "encoder.embed_tokens.weight")
        ]
        return tensors | {key: table.clone() for key in keys}

    restored(tmp_path, under)
    same_t5(tmp_path, "T5EncoderModel")


@pytest.mark.parametrize("act", ["gated-gelu", "relu"])
def test_a_whole_t5_is_its_encoder(act, tmp_path, caplog):
    saved(T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj=act)), tmp_path)
    with caplog.at_level(logging.INFO, "tinydiff"):
        same_t5(tmp_path, "T5EncoderModel")
    assert "stored weights are not needed and not read (decoder.block.0." in caplog.text


def test_a_whole_umt5_is_its_encoder(tmp_path):
    saved(UMT5ForConditionalGeneration(UMT5Config(**T5)), tmp_path)
    same_t5(tmp_path, "UMT5EncoderModel")


def test_an_older_config_names_the_activation_once(tmp_path):
    """As T5 v1.1's own: `feed_forward_proj` alone."""
    saved(T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")), tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {key: value for key, value in stored.items() if key not in ("dense_act_fn", "is_gated_act")}
        )
    )
    same_t5(tmp_path, "T5EncoderModel")


# --- CLIP


def same_clip(folder, class_name):
    c, w = loaded(folder, class_name)
    with doubles():
        expected = reference(folder, class_name)(IDS, output_hidden_states=True)
    ours = clip_text.encode(c, Plan(), w, IDS)
    for mine, theirs in zip(ours.hidden_states, expected.hidden_states, strict=True):
        close(mine, theirs)
    if class_name == "CLIPTextModel":
        close(ours.pooled, expected.pooler_output)
    else:
        close(ours.projected, expected.text_embeds)


def test_a_clip_with_a_projection_that_is_not_needed(tmp_path, caplog):
    saved(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), tmp_path)
    with caplog.at_level(logging.INFO, "tinydiff"):
        same_clip(tmp_path, "CLIPTextModel")
    assert "1 stored weights are not needed and not read (text_projection.weight)" in caplog.text
    same_clip(tmp_path, "CLIPTextModelWithProjection")


@pytest.mark.parametrize("class_name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_whole_clip_is_its_text_encoder(class_name, tmp_path, caplog):
    """Old files have lists of positions too."""
    saved(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SEES, projection_dim=10)), tmp_path)
    restored(
        tmp_path, lambda tensors: tensors | {"text_model.embeddings.position_ids": torch.arange(11)[None]}
    )
    with caplog.at_level(logging.INFO, "tinydiff"):
        same_clip(tmp_path, class_name)
    assert "(logit_scale, " in caplog.text and "position_ids" not in caplog.text


def test_a_whole_clip_is_its_vision_tower(tmp_path):
    saved(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SEES, projection_dim=10)), tmp_path)
    c, w = loaded(tmp_path, "CLIPVisionModel")
    x = torch.randn(2, 3, 21, 21, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with doubles():
        expected = reference(tmp_path, "CLIPVisionModel")(x, output_hidden_states=True).hidden_states[-2]
    close(clip_vision.encode(c, Plan(), w, x), expected)


# --- language models


def same_lm(folder, class_name, text_of=lambda model: model):
    c, w = loaded(folder, class_name)
    with doubles():
        expected = text_of(reference(folder, class_name))(IDS, output_hidden_states=True).hidden_states
    ours = decoder_lm.encode(c, Plan(), w, IDS, take=tuple(range(c.layers + 1)))
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(
    "keys",
    [("model.embed_tokens.weight",), ("lm_head.weight",), ("model.embed_tokens.weight", "lm_head.weight")],
)
def test_a_tied_language_model_has_its_embeddings_under_either_name(keys, tmp_path):
    saved(Qwen3ForCausalLM(Qwen3Config(**LM, head_dim=8, tie_word_embeddings=True)), tmp_path, tied=True)

    def under(tensors):
        table = tensors.pop("model.embed_tokens.weight")
        assert "lm_head.weight" not in tensors
        return tensors | {key: table.clone() for key in keys}

    restored(tmp_path, under)
    same_lm(tmp_path, "Qwen3ForCausalLM")


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("class_name", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_a_language_model_with_and_without_its_prefix(prefix, class_name, tmp_path):
    saved(Qwen3ForCausalLM(Qwen3Config(**LM, head_dim=8, tie_word_embeddings=False)), tmp_path)
    restored(
        tmp_path,
        lambda tensors: {
            key.replace("model.", prefix): x for key, x in tensors.items() if prefix or key[:2] == "mo"
        },
    )
    if prefix or class_name == "Qwen3Model":
        same_lm(tmp_path, class_name)
    else:  # transformers finds no output head there and makes one up; the states are the bare model's
        c, w = loaded(tmp_path, class_name)
        with doubles():
            expected = reference(tmp_path, "Qwen3Model")(IDS).last_hidden_state
        close(decoder_lm.encode(c, Plan(), w, IDS, take=(3,))[0], expected)


@pytest.mark.parametrize("layout", ["4", "5"])
def test_qwen_25_vl_of_either_layout(layout, tmp_path, caplog):
    """transformers 4 wrote `model.` and `visual.`, 5 has `model.language_model.` and `model.visual.`; the
    tower is not read for texts.
    """
    text = LM | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_SEES, tie_word_embeddings=False)
    saved(Qwen2_5_VLForConditionalGeneration(config), tmp_path)

    def under(tensors):
        new, old = ("model.language_model.", "model.visual."), ("model.", "visual.")
        written, wanted = (old, new) if any(key.startswith("visual.") for key in tensors) else (new, old)
        if (wanted is old) != (layout == "4"):
            return tensors

        def renamed(key):
            pairs = zip(written, wanted, strict=True)
            return next((to + key.removeprefix(start) for start, to in pairs if key.startswith(start)), key)

        return {renamed(key): tensor for key, tensor in tensors.items()}

    restored(tmp_path, under)
    assert any(
        key.startswith("visual." if layout == "4" else "model.visual.")
        for key in load_file(tmp_path / "model.safetensors")
    )
    with caplog.at_level(logging.INFO, "tinydiff"):
        same_lm(tmp_path, "Qwen2_5_VLForConditionalGeneration", lambda model: model.model.language_model)
    assert "not needed and not read (lm_head.weight, " in caplog.text


def test_gemma_3_with_a_tower_that_is_not_read(tmp_path):
    text = LM | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    config = Gemma3Config(
        text_config=text | {"sliding_window": 4}, vision_config=SIGLIP, mm_tokens_per_image=4
    )
    saved(Gemma3ForConditionalGeneration(config), tmp_path, tied=True)
    same_lm(tmp_path, "Gemma3ForConditionalGeneration", lambda model: model.model.language_model)


def test_gemma_4_with_embedders_that_are_not_read(tmp_path):
    text = LM | {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 4,
    }
    sees = {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 8, "mm_posemb_size": 6}
    config = Gemma4UnifiedConfig(
        text_config=text, vision_config=sees | {"output_proj_dims": 8}, audio_config={"audio_embed_dim": 6}
    )
    saved(Gemma4UnifiedForConditionalGeneration(config), tmp_path, tied=True)
    same_lm(tmp_path, "Gemma4UnifiedForConditionalGeneration", lambda model: model.model.language_model)
