"""Adapters on whole models: diffusers' merged weights, real keys, text encoders, and Wan's two denoisers."""

import functools
import re

import pytest
import torch

from tests.io.lora_files import added, dotted, equal, factors, kohya, randn, read, stored
from tests.models.test_layouts import CLIP, PROJECTS, UMT5, narrow
from tests.models.test_released import class_of, config_of
from tinydiff.io.lora import Component
from tinydiff.io.lora.keys import parse
from tinydiff.models.classes import RECORDS
from tinydiff.models.encoders import clip_text, decoder_lm, t5
from tinydiff.models.encoders.decoder_config import Config as DecoderConfig
from tinydiff.models.encoders.decoder_config import Rope
from tinydiff.models.layouts.recognise import key_maps
from tinydiff.parity.denoiser_case import case
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.parity.reference import randomised


def component_of(record, c, cut=narrow):
    return Component(record.role, {row.name: row for row in cut(record.spec(c))}, key_maps(record, c))


@pytest.mark.parametrize(
    "name",
    [
        "Wan, a frame beside the noise and CLIP",
        "Z-Image",
        "Qwen-Image",
        "FLUX.1, guidance",
        "FLUX.2, guidance and references",
        "Ovis-Image",
        "ERNIE-Image",
        "SD3, norms and dual attention",
    ],
)
def test_diffusers_merges_the_same_weights(tmp_path, name):
    """load_lora_adapter and fuse_lora, with ranks that differ from layer to layer."""
    given = DENOISERS[name]
    model = case(given).reference()
    randomised(model)
    model = model.double()
    component = component_of(given.family, given.config, list)
    before = {key: x.detach().clone() for key, x in model.state_dict().items()}
    linear = {key for key, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    pairs = {key: pair for key, pair in factors(stored(component)).items() if key in linear}
    for i, key in enumerate([*pairs][::3]):
        (out, into), rank = component.rows[f"{key}.weight"].shape, 1 + i % 3
        pairs[key] = randn(rank, into, seed=i), randn(out, rank, seed=i + 1)
    tensors = dotted(pairs, "transformer.", alpha=False)
    differences = read(tmp_path, tensors, component).targets["transformer"]
    model.load_lora_adapter({key: x.clone() for key, x in tensors.items()}, prefix="transformer")
    model.fuse_lora(lora_scale=0.75)
    model.unload_lora()
    after = model.state_dict()
    ours = {key: each.apply(before[key], 0.75) for key, each in differences.items()}
    equal(ours, {key: after[key] for key in ours})
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(ours)


# --- keys of released files

FLUX, FLUX2, WAN = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-dev",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
)
QWEN, Z, SD3, ERNIE = (
    "Qwen/Qwen-Image",
    "Tongyi-MAI/Z-Image-Turbo",
    "stabilityai/stable-diffusion-3.5-medium",
    "baidu/ERNIE-Image",
)
SINGLE, DOUBLE = "single_transformer_blocks.0", "transformer_blocks.0"
QKV = tuple(f"{DOUBLE}.attn.{name}.weight" for name in ("to_q", "to_k", "to_v"))
KEYS = (
    (FLUX, "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", f"{SINGLE}.attn.to_k.weight"),
    (FLUX, "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight", f"{SINGLE}.proj_mlp.weight"),
    (
        FLUX,
        "base_model.model.single_transformer_blocks.10.proj_mlp.lora_B.weight",
        "single_transformer_blocks.10.proj_mlp.weight",
    ),
    (FLUX, "lora_unet_double_blocks_0_img_attn_proj.alpha", f"{DOUBLE}.attn.to_out.0.weight"),
    (FLUX, "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", QKV),
    (
        FLUX,
        "lora_unet_single_blocks_0_linear1.lora_up.weight",
        (*(f"{SINGLE}.attn.{name}.weight" for name in ("to_q", "to_k", "to_v")), f"{SINGLE}.proj_mlp.weight"),
    ),
    (FLUX, "lora_unet_double_blocks_0_txt_mod_lin.lora_up.weight", f"{DOUBLE}.norm1_context.linear.weight"),
    (FLUX, "diffusion_model.double_blocks.0.img_attn.proj.lokr_w1", f"{DOUBLE}.attn.to_out.0.weight"),
    (FLUX, "lora_transformer_single_transformer_blocks_0_attn_to_k.dora_scale", f"{SINGLE}.attn.to_k.weight"),
    (FLUX, "transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight", f"{DOUBLE}.attn.to_q.weight"),
    (FLUX, "transformer.single_blocks.0.linear1.3.lora_down.weight", f"{SINGLE}.proj_mlp.weight"),
    (FLUX, "double_blocks.0.processor.qkv_lora1.down.weight", QKV),
    (FLUX, "double_blocks.0.processor.proj_lora2.up.weight", f"{DOUBLE}.attn.to_add_out.weight"),
    (
        FLUX,
        "single_blocks.0.processor.qkv_lora.down.weight",
        tuple(f"{SINGLE}.attn.{x}.weight" for x in ("to_q", "to_k", "to_v")),
    ),
    (FLUX, "single_blocks.0.processor.proj_lora.up.weight", f"{SINGLE}.proj_out.weight"),
    (FLUX, "double_blocks.0.txt_mlp.2.lora_B.bias", f"{DOUBLE}.ff_context.net.2.weight"),
    (FLUX, "double_blocks.0.img_attn.norm.key_norm.scale", f"{DOUBLE}.attn.norm_k.weight"),
    (FLUX, "final_layer.adaLN_modulation.1.lora_A.weight", "norm_out.linear.weight"),
    (FLUX, "base_model.model.double_blocks.0.img_mod.lin.lora_A.weight", f"{DOUBLE}.norm1.linear.weight"),
    (
        FLUX2,
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight",
        f"{SINGLE}.attn.to_qkv_mlp_proj.weight",
    ),
    (FLUX2, "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", QKV),
    (FLUX2, "diffusion_model.single_blocks.0.linear1.lokr_w1", f"{SINGLE}.attn.to_qkv_mlp_proj.weight"),
    (FLUX2, "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", QKV),
    (FLUX2, "lycoris_transformer_blocks_0_attn_to_q.lokr_w1", f"{DOUBLE}.attn.to_q.weight"),
    (QWEN, "transformer_blocks.0.attn.to_k.lora_down.weight", f"{DOUBLE}.attn.to_k.weight"),
    (QWEN, "lora_unet_transformer_blocks_0_attn_to_k.lokr_w1", f"{DOUBLE}.attn.to_k.weight"),
    (
        QWEN,
        "lora_unet_transformer_blocks_0_img_mlp_net_0_proj.lora_down.weight",
        f"{DOUBLE}.img_mlp.net.0.proj.weight",
    ),
    (QWEN, "transformer_blocks.0.attn.to_k.lora_A.default.weight", f"{DOUBLE}.attn.to_k.weight"),
    (Z, "diffusion_model.layers.0.attention.to_q.lora_A.weight", "layers.0.attention.to_q.weight"),
    (Z, "lora_unet_layers_0_attention_to_q.lora_down.weight", "layers.0.attention.to_q.weight"),
    (
        Z,
        "lora_unet_layers_0_attention_qkv.lora_up.weight",
        tuple(f"layers.0.attention.to_{x}.weight" for x in "qkv"),
    ),
    (Z, "lora_unet_layers_0_attention_out.lora_up.weight", "layers.0.attention.to_out.0.weight"),
    (Z, "lora_unet__layers_0_attention_to_k.alpha", "layers.0.attention.to_k.weight"),
    (Z, "diffusion_model.layers.0.attention.to.q.lora.down.weight", "layers.0.attention.to_q.weight"),
    (SD3, "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", QKV),
    (SD3, "lora_unet_joint_blocks_0_context_block_mlp_fc1.alpha", f"{DOUBLE}.ff_context.net.0.proj.weight"),
    (
        ERNIE,
        "transformer.layers.29.self_attention.to_out.0.lora_down.weight",
        "layers.29.self_attention.to_out.0.weight",
    ),
    (ERNIE, "transformer.layers.3.mlp.gate_proj.lora_up.weight", "layers.3.mlp.gate_proj.weight"),
    (WAN, "diffusion_model.blocks.0.self_attn.q.lora_A.weight", "blocks.0.attn1.to_q.weight"),
    (WAN, "diffusion_model.blocks.0.cross_attn.v_img.lora_B.weight", "blocks.0.attn2.add_v_proj.weight"),
    (WAN, "diffusion_model.blocks.0.ffn.0.lora_A.weight", "blocks.0.ffn.net.0.proj.weight"),
    (WAN, "lora_unet__blocks_0_cross_attn_k.lora_down.weight", "blocks.0.attn2.to_k.weight"),
    (WAN, "diffusion_model.blocks.0.cross_attn.norm_k_img.diff", "blocks.0.attn2.norm_added_k.weight"),
    (WAN, "diffusion_model.blocks.0.norm3.diff", "blocks.0.norm2.weight"),
    (WAN, "diffusion_model.head.head.diff", "proj_out.weight"),
    (WAN, "diffusion_model.time_projection.1.diff_b", "condition_embedder.time_proj.weight"),
    (
        WAN,
        "diffusion_model.img_emb.proj.1.lora_down.weight",
        "condition_embedder.image_embedder.ff.net.0.proj.weight",
    ),
    (
        WAN,
        "diffusion_model.text_embedding.0.lora_down.weight",
        "condition_embedder.text_embedder.linear_1.weight",
    ),
    (WAN, "diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
)
"""Keys that released files have -> the weights that they are for."""


@functools.cache
def released(model):
    return component_of(RECORDS[class_of(model, "transformer")], config_of(model, "transformer"))


@pytest.mark.parametrize(("model", "key", "rows"), KEYS, ids=lambda value: str(value)[-60:])
def test_a_key_of_a_released_file(model, key, rows):
    found = released(model).find(parse(key).stem)["weight"]
    assert tuple(found.runs) == ((rows,) if isinstance(rows, str) else rows)


def test_the_modulation_of_wan():
    """Of a block, and of the head."""
    for key, row in (("blocks.0.diff_m", "blocks.0.scale_shift_table"), ("head.diff_m", "scale_shift_table")):
        assert tuple(released(WAN).find(parse(f"diffusion_model.{key}").stem)["modulation"].runs) == (row,)


# --- text encoders

CLIP_G = clip_text.Config(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=128,
    projection_dim=64,
    num_hidden_layers=3,
    num_attention_heads=1,
    architectures=("CLIPTextModelWithProjection",),
)
LANGUAGE = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rope_parameters=Rope(1e6),
    layers=2,
    layer_types=("full_attention",) * 2,
)


def encoder(record, c):
    return component_of(record, c, list)


def projections(component):
    """Factors of the products of an encoder's layers."""
    pairs = factors(stored(component))
    return {
        key: pair for key, pair in pairs.items() if re.search(r"layers?\.\d", key) and "relative" not in key
    }


MODELS = {
    "FLUX.1": {"text_encoder": (clip_text.FAMILY, CLIP), "text_encoder_2": (t5.FAMILY, UMT5)},
    "SD3": {
        "text_encoder": (clip_text.FAMILY, PROJECTS),
        "text_encoder_2": (clip_text.FAMILY, CLIP_G),
        "text_encoder_3": (t5.FAMILY, UMT5),
    },
    "Qwen-Image": {"text_encoder": (decoder_lm.FAMILY, LANGUAGE)},
}
PREFIXES = {
    ("FLUX.1", "text_encoder"): (
        "text_encoder.",
        "lora_te1_",
        "lora_te_",
        "text_encoders.clip_l.transformer.",
    ),
    ("FLUX.1", "text_encoder_2"): (
        "text_encoder_2.",
        "lora_te2_",
        "lora_te3_",
        "text_encoders.t5xxl.transformer.",
    ),
    ("SD3", "text_encoder"): ("text_encoder.", "lora_te1_", "text_encoders.clip_l.transformer."),
    ("SD3", "text_encoder_2"): ("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
    ("SD3", "text_encoder_3"): ("text_encoder_3.", "lora_te3_", "text_encoders.t5xxl.transformer."),
    ("Qwen-Image", "text_encoder"): (
        "text_encoder.",
        "lora_te_",
        "lora_te1_",
        "text_encoders.qwen25_7b.transformer.model.",
        "text_encoder.model.",
        "text_encoder.model.language_model.",
        "lora_te_model_",
    ),
}
"""(model, component) -> what stands before its names."""


@pytest.mark.parametrize(
    ("model", "name", "prefix"), [(*place, prefix) for place, each in PREFIXES.items() for prefix in each]
)
def test_a_text_encoder(tmp_path, model, name, prefix):
    components = {part: encoder(*each) for part, each in MODELS[model].items()}
    components["transformer"] = released(FLUX)
    pairs = projections(components[name])
    tensors = kohya(pairs, prefix) if prefix.endswith("_") else dotted(pairs, prefix)
    adapter = read(tmp_path, tensors, components)
    assert [*adapter.targets] == [name]
    expected = {}
    for i, (key, (a, b)) in enumerate(pairs.items()):
        expected[f"{key}.weight"] = (1 + i % 3) / len(a) * (b @ a)
    equal(added(components[name], adapter.targets[name]), expected)


# --- several components

SMALL = DENOISERS["Wan, text"]


def two_denoisers():
    component = component_of(SMALL.family, SMALL.config, list)
    return {"transformer": component, "transformer_2": component}


def some(prefix, seed):
    width = two_denoisers()["transformer"].rows["blocks.0.attn1.to_q.weight"].shape[0]
    pair = randn(2, width, seed=seed), randn(width, 2, seed=seed + 1)
    return dotted({"blocks.0.attn1.to_q": pair}, prefix, alpha=False)


def test_a_file_for_both_denoisers_of_wan(tmp_path):
    """Without the second's name, its layers are for both; the caller's target chooses one."""
    for prefix in ("transformer.", "diffusion_model."):
        tensors = some(prefix, 0)
        assert [*read(tmp_path, tensors, two_denoisers()).targets] == ["transformer", "transformer_2"]
        for target in ("transformer", "transformer_2"):
            assert [*read(tmp_path, tensors, two_denoisers(), targets=[target]).targets] == [target]


def test_a_file_with_the_names_of_both_denoisers(tmp_path):
    tensors = some("transformer.", 0) | some("transformer_2.", 5)
    targets = read(tmp_path, tensors, two_denoisers()).targets
    assert [*targets] == ["transformer", "transformer_2"]
    for name, seed in (("transformer", 0), ("transformer_2", 5)):
        a, _ = targets[name]["blocks.0.attn1.to_q.weight"].low_rank()
        assert torch.equal(a, randn(*a.shape, seed=seed))
    adapter = read(tmp_path, tensors, two_denoisers(), targets=["transformer_2"])
    assert [*adapter.targets] == ["transformer_2"]
    assert adapter.others == tuple(sorted(some("transformer.", 0)))


def test_what_matched_is_said(tmp_path):
    tensors = some("transformer.", 0) | {"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(1.0)}
    adapter = read(tmp_path, tensors, two_denoisers(), targets=["transformer"])
    assert adapter.summary() == "LoRA (diffusers): 1 weights of transformer, rank 2, scale 0.5"
