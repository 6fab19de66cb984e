"""What a file is, told from keys and shapes, and what it is not: one sentence each."""

from dataclasses import replace

import pytest
import torch
from gguf import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import save_file

from tests.models.test_layouts import CONVERTED, drawn, same
from tests.models.test_released import config_of
from tinydiff.io import archive
from tinydiff.io.weights import exported, load_weights
from tinydiff.keymap import KeyMap, stored_rows
from tinydiff.models import flux, released
from tinydiff.models.classes import RECORDS
from tinydiff.models.layouts import recognise as module
from tinydiff.models.layouts.recognise import LAYOUTS, config_from, recognise
from tinydiff.records import UserError

FLUX = "black-forest-labs/FLUX.1-dev"


def original(name, part="transformer", layout="original", prefix=""):
    """The keys and shapes of a released model's component in another layout."""
    c = config_of(name, part)
    (record,) = {
        RECORDS[each.class_name] for each in LAYOUTS if isinstance(c, RECORDS[each.class_name].config)
    }
    rows = list(record.spec(c))
    for each in LAYOUTS:
        if RECORDS[each.class_name] is record and each.name == layout:
            shapes = stored_rows(KeyMap(each.lines(c), prefix), rows)
            if all(any(key.startswith(prefix + sign) for key in shapes) for sign in each.signs):
                return shapes
    raise AssertionError(layout)


def refused(shapes, metadata=None):
    with pytest.raises(UserError) as caught:
        recognise(shapes, metadata, "some.safetensors")
    message = str(caught.value)
    assert caught.value.field == "model_path" and "'some.safetensors'" in message and "\n" not in message
    return message


SEEN = {
    ("stabilityai/stable-diffusion-3.5-medium", "transformer", "original"): (
        "joint_blocks.0.context_block.adaLN_modulation.1.bias", "joint_blocks.0.x_block.attn2.qkv.weight",
        "joint_blocks.0.x_block.attn.ln_q.weight", "pos_embed", "y_embedder.mlp.2.weight",
        "x_embedder.proj.weight",
    ),
    (FLUX, "transformer", "original"): (
        "double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "guidance_in.in_layer.weight",
        "double_blocks.18.txt_mod.lin.bias", "single_blocks.37.linear1.weight",
        "single_blocks.0.norm.query_norm.scale",
        "final_layer.adaLN_modulation.1.bias", "vector_in.out_layer.weight", "double_blocks.0.txt_mlp.2.bias",
    ),
    ("black-forest-labs/FLUX.2-dev", "transformer", "original"): (
        "double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight",
        "double_blocks.7.img_mlp.0.weight",
        "single_blocks.47.linear2.weight", "double_blocks.0.img_attn.qkv.weight",
        "guidance_in.in_layer.weight",
    ),
    ("AIDC-AI/Ovis-Image-7B", "transformer", "original"): (
        "double_blocks.0.img_mlp.gate_proj.weight", "semantic_txt_in.weight", "semantic_txt_norm.weight",
        "double_blocks.0.img_mlp.down_proj.weight",
    ),
    ("Tongyi-MAI/Z-Image-Turbo", "transformer", "comfyui"): (
        "cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "layers.29.attention.out.weight",
        "x_pad_token",
        "final_layer.adaLN_modulation.1.weight", "layers.0.attention.q_norm.weight",
        "context_refiner.0.attention.qkv.weight",
    ),
    ("Tongyi-MAI/Z-Image-Turbo", "transformer", "diffusers"): ("layers.0.attention.to_q.weight",
    "all_x_embedder.2-1.weight"),
    ("Qwen/Qwen-Image", "transformer", "diffusers"): ("txt_norm.weight",
    "transformer_blocks.0.attn.add_q_proj.weight"),
    ("Qwen/Qwen-Image-Layered", "transformer", "diffusers"): ("time_text_embed.addition_t_embedding.weight",),
    ("baidu/ERNIE-Image", "transformer", "diffusers"): ("layers.0.mlp.linear_fc2.weight",
    "x_embedder.proj.weight"),
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "transformer", "original"): (
        "head.modulation", "img_emb.proj.0.bias", "blocks.0.cross_attn.norm_k_img.weight",
        "blocks.39.norm3.bias",
        "blocks.0.modulation", "time_projection.1.weight", "patch_embedding.weight", "blocks.0.ffn.2.bias",
        "head.head.weight",
        "text_embedding.0.weight", "blocks.0.self_attn.norm_q.weight",
    ),
    (FLUX, "vae", "original"): (
        "decoder.up.3.block.0.conv1.weight", "encoder.down.0.downsample.conv.weight",
        "decoder.mid.attn_1.proj_out.weight",
        "decoder.up.0.block.0.nin_shortcut.weight", "encoder.norm_out.weight",
        "decoder.up.3.upsample.conv.bias",
    ),
    ("black-forest-labs/FLUX.2-dev", "vae", "original"): ("bn.running_mean", "encoder.quant_conv.weight",
    "decoder.post_quant_conv.bias"),
    ("Qwen/Qwen-Image", "vae", "original"): (
        "decoder.middle.0.residual.0.gamma", "decoder.upsamples.14.residual.6.weight",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.3.resample.1.weight", "decoder.upsamples.7.time_conv.bias",
        "encoder.downsamples.8.time_conv.weight",
        "conv1.weight", "conv2.bias", "encoder.head.0.gamma", "decoder.head.2.weight",
        "encoder.middle.1.to_qkv.weight",
    ),
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae", "original"): (
        "decoder.upsamples.0.upsamples.0.residual.2.weight",
        "encoder.downsamples.0.downsamples.2.resample.1.weight",
        "decoder.upsamples.2.upsamples.3.resample.1.weight",
        "decoder.upsamples.0.upsamples.3.time_conv.weight",
    ),
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "text_encoder", "original"): (
        "token_embedding.weight", "blocks.23.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight",
        "norm.weight",
        "blocks.0.attn.o.weight", "blocks.0.norm2.weight", "blocks.0.ffn.fc1.weight",
        "blocks.0.ffn.fc2.weight",
    ),
    ("hunyuanvideo-community/HunyuanVideo", "transformer", "original"): (
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "img_in.proj.weight",
        "double_blocks.19.img_attn_qkv.weight", "single_blocks.39.linear1.bias",
        "single_blocks.0.modulation.linear.weight",
    ),
    ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", "transformer", "original"): (
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight", "byt5_in.fc3.bias",
        "double_blocks.53.img_attn_q.weight", "vision_in.proj.4.weight",
    ),
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "image_encoder", "original"): (
        "visual.cls_embedding", "visual.pos_embedding", "visual.transformer.31.attn.to_qkv.weight",
        "visual.pre_norm.weight",
        "visual.transformer.0.mlp.2.bias", "visual.post_norm.bias", "visual.patch_embedding.weight",
    ),
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "image_encoder", "transformers"): (
        "vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight",
        "vision_model.encoder.layers.30.layer_norm1.weight",
    ),
    ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v", "image_encoder", "transformers"): (
        "vision_model.embeddings.patch_embedding.bias", "vision_model.encoder.layers.22.layer_norm1.weight",
        "vision_model.post_layernorm.weight",
    ),
    ("hunyuanvideo-community/HunyuanVideo", "vae", "comfyui"): (
        "decoder.conv_in.conv.weight", "decoder.up.3.block.2.conv1.conv.weight",
        "decoder.mid.attn_1.q.weight", "encoder.mid.attn_1.norm.bias", "encoder.mid.attn_1.proj_out.weight",
        "decoder.up.1.block.0.nin_shortcut.conv.weight", "encoder.norm_out.bias", "post_quant_conv.weight",
        "encoder.down.0.downsample.conv.conv.weight",
    ),
    ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", "vae", "original"): (
        "decoder.conv_in.conv.weight", "decoder.up.0.upsample.conv.conv.weight", "encoder.norm_out.gamma",
        "decoder.up.4.block.2.conv2.conv.bias", "encoder.mid.attn_1.norm.gamma",
        "encoder.mid.attn_1.proj_out.weight", "encoder.down.3.downsample.conv.conv.weight",
    ),
    (FLUX, "text_encoder_2", "transformers"): ("encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
    "shared.weight"),
    ("stabilityai/stable-diffusion-3.5-large", "text_encoder_2", "open_clip"): (
        "transformer.resblocks.31.attn.in_proj_weight", "positional_embedding", "text_projection",
        "ln_final.weight",
        "transformer.resblocks.0.mlp.c_fc.bias",
    ),
}  # fmt: skip
"""(released model, component, layout) -> keys seen in its files."""


@pytest.mark.parametrize("file", SEEN, ids=lambda file: f"{file[0].split('/')[1]}-{file[1]}-{file[2]}")
def test_keys_of_released_files_are_in_the_table(file):
    shapes = original(*file)
    assert [key for key in SEEN[file] if key not in shapes] == []
    (found,) = recognise(shapes)
    assert file[0] in found.models and found.layout.name == file[2]


def test_siglip_without_its_head_is_that_of_384_pixels():
    """No shape tells the side: 384 is no multiple of a patch of 14 pixels. The head is never run."""
    name = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"
    shapes = {key: shape for key, shape in original(name, "image_encoder", "transformers").items()
              if ".head." not in key}  # fmt: skip
    (found,) = recognise(shapes)
    class_name, entries = released.COMPONENTS[name]["image_encoder"]
    assert found.class_name == class_name
    config = config_from(class_name, found.entries)
    assert config == replace(config_from(class_name, entries), vision_use_head=False)
    assert config.image_size == 384 and config.tokens == 729


def test_an_all_in_one_file_holds_several_components(tmp_path):
    """Each is loaded from it by its own map, and what belongs to none is left."""
    parts = {
        "model.diffusion_model.": "SD3.5 medium",
        "first_stage_model.": "KL",
        "text_encoders.clip_l.transformer.": "CLIP with projection",
    }
    stored = {"model_sampling.sigmas": torch.ones(2), "text_encoders.clip_l.logit_scale": torch.ones(())}
    for prefix, name in parts.items():
        layout, c, rows, weights = drawn(name)
        if name.startswith("CLIP"):
            layout = next(
                each
                for each in LAYOUTS
                if each.class_name == layout.class_name and each.name == "transformers"
            )
        stored |= exported(weights, rows, KeyMap(layout.lines(c), prefix))
    path = tmp_path / "all.safetensors"
    save_file(stored, path)
    found = recognise(*archive.header(path))
    assert [each.role for each in found] == ["dit", "text_encoder", "vae"]
    for each in found:
        _, c, rows, weights = drawn(parts[each.prefix])
        same(load_weights(path, rows, torch.float32, keys=each.keys(c)), weights)


@pytest.mark.parametrize("name", [name for name in CONVERTED if "VAE" in name or name.startswith("KL")])
def test_the_config_of_an_autoencoder_is_read_off_its_shapes(name):
    layout, c, rows, _ = drawn(name)
    (found,) = recognise(stored_rows(KeyMap(layout.lines(c)), rows))
    mine = config_from(found.class_name, found.entries)
    shapes = {row.name: row.shape for row in rows}
    assert {row.name: row.shape for row in RECORDS[found.class_name].spec(mine)} == shapes


def test_what_shapes_tell_of_flux():
    shapes = original(FLUX)
    (found,) = recognise(shapes)
    assert found.entries["guidance_embeds"] and found.models == (FLUX, "black-forest-labs/FLUX.1-Kontext-dev")
    (schnell,) = recognise({key: shape for key, shape in shapes.items() if "guidance_in" not in key})
    assert schnell.models == ("black-forest-labs/FLUX.1-schnell",)
    (fill,) = recognise(shapes | {"img_in.weight": (3072, 384)})
    assert (fill.entries["in_channels"], fill.entries["out_channels"], fill.models) == (384, 64, ())
    pruned = {
        key: shape
        for key, shape in shapes.items()
        if not key.startswith(("double_blocks.18.", "single_blocks.37."))
    }
    assert (
        recognise(pruned)[0].entries["num_layers"] == 18
        and recognise(pruned)[0].entries["num_single_layers"] == 37
    )


def test_norms_may_be_called_weight():
    c = flux.Config(num_layers=1, num_single_layers=1)
    rows = list(flux.spec(c))
    shapes = stored_rows(KeyMap(module.flux.LINES), rows)
    renamed = {key.replace("_norm.scale", "_norm.weight"): shape for key, shape in shapes.items()}
    (found,) = recognise(renamed)
    keys = found.keys(c)
    assert {name for key in renamed for name in keys.of_key(key).rows} == {row.name for row in rows}


def test_the_marker_of_qwen_image_edit_is_read():
    shapes = original("Qwen/Qwen-Image", layout="diffusers")
    (found,) = recognise(shapes)
    assert "Qwen/Qwen-Image" in found.models and not found.entries["zero_cond_t"]
    (edit,) = recognise(shapes | {"__index_timestep_zero__": (1,)})
    assert edit.models == ("Qwen/Qwen-Image-Edit-2511",)


def test_a_language_model_cut_short_has_the_depth_of_the_released_one():
    """ComfyUI's file for FLUX.2 has the 30 layers that are read, and no last norm."""
    name = "black-forest-labs/FLUX.2-dev"
    whole = original(name, "text_encoder", "transformers")
    cut = {
        f"model.{key}": shape
        for key, shape in whole.items()
        if key not in ("norm.weight", "lm_head.weight")
        and int(key.split(".")[1] if key.startswith("layers") else 0) < 30
    }
    (found,) = recognise(cut | {"tekken_model": (19399895,)})
    assert found.entries["num_hidden_layers"] == 40 and name in found.models


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (
            {"double_blocks.0.img_attn.qkv.lora_A.weight": (16, 3072)},
            "is a LoRA of 1 layer, not weights; --lora-path takes it",
        ),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, "is a LoRA"),
        ({"blocks.0.diff_m": (1, 6, 5120), "blocks.0.self_attn.q.diff": (1, 1)}, "is a LoRA of 2 layers"),
        ({"scaled_fp8": (2,)}, "is quantised (scaled_fp8), which is not read"),
        ({"model.diffusion_model.x.weight_scale": ()}, "is quantised (model.diffusion_model.x.weight_scale)"),
        (
            {"distilled_guidance_layer.in_proj.weight": (5120, 64)},
            "is of Chroma, whose single files are not read",
        ),
    ],
)
def test_what_is_no_plain_model_is_reported(add, words):
    assert words in refused(original(FLUX) | add)


@pytest.mark.parametrize("name", module.REFUSED)
def test_every_architecture_that_is_not_run_is_named(name):
    assert f"is of {name}, whose single files are not read" in refused(
        {f"model.diffusion_model.{module.REFUSED[name]}.weight": (1,)}
    )


def test_unknown_files_and_files_of_two_families():
    assert "holds no tensors" in refused({})
    said = refused({f"trunk.{i}.weight": (2, 2) for i in range(9)})
    assert (
        "has a layout that is not known (9 keys: trunk.0.weight, " in said
        and "known are FluxTransformer2DModel" in said
    )
    both = original(FLUX) | original("black-forest-labs/FLUX.2-dev")
    said = refused(both)
    assert (
        "could be a FluxTransformer2DModel (original layout) or a Flux2Transformer2DModel (original layout)"
        in said
    )


def test_shapes_that_make_no_network_are_reported():
    shapes = original(FLUX)
    said = refused({key: shape for key, shape in shapes.items() if key != "txt_in.weight"})
    assert "looks like a FluxTransformer2DModel, but lacks 'context_embedder.weight'" in said
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    assert "its shapes make no such network: axes_dims_rope is (16, 56, 56)" in refused(shapes | {key: (96,)})
    assert "its shapes make no such network" in refused(shapes | {key: (0,)})
    assert "its shapes make no such network" in refused(shapes | {"img_in.weight": (3072,)})
    huge = refused(shapes | {"single_blocks.99999999999.linear1.weight": (2, 2)})
    assert "single_transformer_blocks.99999999999 is there, and there are fewer weights than that" in huge


def test_metadata_may_tell_a_lora():
    assert "is a LoRA" in refused({"x.weight": (1,)}, {"ss_network_module": "networks.lora_flux"})


@pytest.mark.parametrize(
    ("arch", "name", "part", "before"),
    [
        ("T5ENCODER", FLUX, "text_encoder_2", ""),
        ("T5ENCODER", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "text_encoder", ""),
        ("QWEN3", "Tongyi-MAI/Z-Image-Turbo", "text_encoder", "model."),
        ("QWEN2VL", "Qwen/Qwen-Image", "text_encoder", "model."),
        ("LLAMA", "black-forest-labs/FLUX.2-dev", "text_encoder", "model."),
        ("MISTRAL3", "black-forest-labs/FLUX.2-dev", "text_encoder", "model."),
    ],
)
def test_names_of_gguf_text_encoders_are_those_of_the_gguf_package(arch, name, part, before):
    c, theirs = config_of(name, part), get_tensor_name_map(MODEL_ARCH[arch], 100)
    shapes = original(name, part, "llama.cpp")
    (found,) = recognise(shapes)
    rows = [row.name for row in RECORDS[found.class_name].spec(c)]
    names = {row: found.keys(c).of_row(row).keys for row in rows}
    expected = {}
    for row in rows:
        stem, _, leaf = row.rpartition(".")
        expected[row] = (f"{theirs.get_name(before + stem)}.{leaf}",)
    assert len(rows) > 100 and names == expected
