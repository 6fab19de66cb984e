"""Files in other layouts give the very weights that diffusers' converters make of them.

Random weights of a network with few blocks and narrow columns are written in a layout by our table read
backwards, and converted by the reference's code: what comes must be the weights, bit for bit. Columns are cut
to two, because the reference's converters know the widths of the released models by heart.
"""

import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file

from tests.models.test_released import ALONE, COMPONENTS, class_of, config_of
from tests.parallel.pool import on_ranks
from tinydiff.io import weights as weights_module
from tinydiff.io.weights import exported, load_weights
from tinydiff.keymap import KeyMap, stored_rows
from tinydiff.models import (
    ernie,
    flux,
    flux2,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    ovis,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from tinydiff.models.autoencoders import hunyuan, hunyuan15, kl
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.classes import RECORDS
from tinydiff.models.encoders import clip_text, clip_vision, t5
from tinydiff.models.layouts import flux as flux_layout
from tinydiff.models.layouts.recognise import LAYOUTS, config_from, recognise
from tinydiff.models.layouts.table import Sizes
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.ranks import make_ranks
from tinydiff.records import UserError

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


def narrow(rows):
    """The rows with two columns at most."""
    return [replace(row, shape=(*row.shape[:1], *(min(2, size) for size in row.shape[1:]))) for row in rows]


def draw(rows):
    generator = torch.Generator().manual_seed(3)
    return {row.name: torch.randn(row.shape, generator=generator) for row in rows}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def renamed(stored, *rules):
    """The tensors under names to which the rules, (pattern, what it becomes), were applied in turn."""
    out = {}
    for key, tensor in stored.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        assert key not in out, key
        out[key] = tensor
    return out


def thirds(stored, pattern, *names):
    """Each fused tensor as its thirds, under the names with which they end in place of the pattern."""
    out = {}
    for key, tensor in stored.items():
        if re.search(pattern, key):
            out |= {
                re.sub(pattern, f".{name}.", key): part
                for name, part in zip(names, tensor.chunk(3), strict=True)
            }
        else:
            out[key] = tensor
    return out


def by_hand_ovis(stored, c):
    """As the model's conversion script in diffusers does."""
    out = {}
    for key, tensor in stored.items():
        if ".gate_proj." in key:
            continue
        if ".up_proj." in key:
            out[key.replace(".up_proj.", ".net.0.proj.")] = torch.cat(
                [tensor, stored[key.replace(".up_", ".gate_")]]
            )
        elif ".linear1." in key:
            d = c.num_attention_heads * c.attention_head_dim
            parts = tensor.split([d, d, d, len(tensor) - 3 * d])
            for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), parts, strict=True):
                out[key.replace("linear1", name)] = part
        elif key.startswith("final_layer.adaLN"):
            out[key.replace("final_layer.adaLN_modulation.1", "norm_out.linear")] = torch.cat(
                tensor.chunk(2)[::-1]
            )
        else:
            out[key] = tensor
    out = thirds(out, r"\.img_attn\.qkv\.", "attn.to_q", "attn.to_k", "attn.to_v")
    out = thirds(out, r"\.txt_attn\.qkv\.", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    return renamed(
        out,
        ("^time_in.in_layer", "timestep_embedder.linear_1"), ("^time_in.out_layer",
        "timestep_embedder.linear_2"),
        ("^semantic_txt_norm", "context_embedder_norm"), ("^semantic_txt_in", "context_embedder"),
        ("^img_in", "x_embedder"), ("^final_layer.linear", "proj_out"),
        ("img_mod.lin", "norm1.linear"), ("txt_mod.lin", "norm1_context.linear"),
        ("img_attn.norm.query_norm.weight", "attn.norm_q.weight"), ("img_attn.norm.key_norm.weight",
        "attn.norm_k.weight"),
        ("txt_attn.norm.query_norm.weight", "attn.norm_added_q.weight"),
        ("txt_attn.norm.key_norm.weight", "attn.norm_added_k.weight"),
        ("img_attn.proj", "attn.to_out.0"), ("txt_attn.proj", "attn.to_add_out"),
        ("img_mlp.net", "ff.net"), ("txt_mlp.net", "ff_context.net"),
        ("img_mlp.down_proj", "ff.net.2"), ("txt_mlp.down_proj", "ff_context.net.2"),
        ("modulation.lin", "norm.linear"), ("linear2", "proj_out"),
        (r"^(single_blocks\.\d+)\.norm.query_norm.weight", r"\1.attn.norm_q.weight"),
        (r"^(single_blocks\.\d+)\.norm.key_norm.weight", r"\1.attn.norm_k.weight"),
        ("^double_blocks", "transformer_blocks"), ("^single_blocks", "single_transformer_blocks"),
    )  # fmt: skip


RESIDUAL = (("residual.0.gamma", "norm1.gamma"), (r"residual\.2\.", "conv1."), ("residual.3.gamma",
"norm2.gamma"),
            (r"residual\.6\.", "conv2."), (r"\.shortcut\.", ".conv_shortcut."))  # fmt: skip


def by_hand_wan22_vae(stored, c):
    """As `convert_vae_22` of the conversion script in diffusers does, whose table has every name."""
    return renamed(
        stored,
        *RESIDUAL,
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."), (r"^conv1\.", "quant_conv."), (r"^conv2\.",
        "post_quant_conv."),
        (r"middle\.0\.", "mid_block.resnets.0."), (r"middle\.1\.", "mid_block.attentions.0."),
        (r"middle\.2\.", "mid_block.resnets.1."), ("head.0.gamma", "norm_out.gamma"), (r"head\.2\.",
        "conv_out."),
        (r"^encoder\.downsamples\.(\d)\.downsamples\.2\.", r"encoder.down_blocks.\1.downsampler."),
        (r"^encoder\.downsamples\.(\d)\.downsamples\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^decoder\.upsamples\.(\d)\.upsamples\.3\.", r"decoder.up_blocks.\1.upsampler."),
        (r"^decoder\.upsamples\.(\d)\.upsamples\.(\d)\.", r"decoder.up_blocks.\1.resnets.\2."),
    )  # fmt: skip


MIDDLE = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.([qkv])\.", r".attentions.0.to_\1."),
)
STAGES = (
    (r"^encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
)


def by_hand_hunyuan15_vae(stored, c):
    """As the model's conversion script in diffusers does: stages keep their numbers."""
    assert not any("_block" in key for key in stored)
    return renamed(stored, *STAGES, *MIDDLE)


def by_hand_hunyuan_vae(stored, c):
    """The inverse of ComfyUI's conversion: the decoder's stages are counted from the last, and the linear
    layers of the attention are convolutions of one pixel of one frame.
    """
    assert not any("_block" in key or "to_" in key for key in stored)
    last = len(c.block_out_channels) - 1
    out = renamed(
        stored,
        *((rf"^decoder\.up\.{i}\.", f"decoder.UP.{last - i}.") for i in range(last + 1)),
        (r"^decoder\.UP\.", "decoder.up."),
        *STAGES,
        *MIDDLE,
        (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
        (r"\.attentions\.0\.proj_out\.", ".attentions.0.to_out.0."),
    )  # fmt: skip
    return {
        key: tensor[..., 0, 0, 0] if ".attentions." in key and tensor.dim() == 5 else tensor
        for key, tensor in out.items()
    }


def with_quant_convs(stored, c):
    """FLUX.2's are inside the halves, and the batch norm is kept."""
    out = theirs.convert_ldm_vae_checkpoint(
        dict(stored), {"down_block_types": c.down_block_types, "up_block_types": c.up_block_types}
    )
    moved = {
        "encoder.quant_conv.": "quant_conv.",
        "decoder.post_quant_conv.": "post_quant_conv.",
        "bn.": "bn.",
    }
    for old, new in moved.items():
        out |= {new + key.removeprefix(old): tensor for key, tensor in stored.items() if key.startswith(old)}
    return out


def by_hand_umt5(stored, c):
    """The names of Wan's encoder, one by one."""
    return renamed(
        stored,
        (r"^token_embedding\.", "shared."), (r"^norm\.", "encoder.final_layer_norm."), (r"^blocks\.",
        "encoder.block."),
        (r"\.norm1\.", ".layer.0.layer_norm."), (r"\.norm2\.", ".layer.1.layer_norm."),
        (r"\.attn\.([qkvo])\.", r".layer.0.SelfAttention.\1."),
        (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."), (r"\.ffn\.fc1\.",
        ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
    )  # fmt: skip


def by_hand_vision(stored, c):
    """The names of Wan's image encoder, one by one; its embeddings have dimensions of one before theirs."""
    out = thirds(stored, r"\.attn\.to_qkv\.", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out["visual.cls_embedding"] = out["visual.cls_embedding"][0, 0]
    out["visual.pos_embedding"] = out["visual.pos_embedding"][0]
    return renamed(
        out,
        ("^visual.cls_embedding", "vision_model.embeddings.class_embedding"),
        ("^visual.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("^visual.patch_embedding", "vision_model.embeddings.patch_embedding"),
        ("^visual.pre_norm", "vision_model.pre_layrnorm"), ("^visual.post_norm",
        "vision_model.post_layernorm"),
        ("^visual.transformer", "vision_model.encoder.layers"), (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.norm([12])\.", r".layer_norm\1."), (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.2\.", ".mlp.fc2."),
    )  # fmt: skip


def by_hand_hunyuan15(stored, c):
    """As the model's conversion script in diffusers does."""
    out = thirds(stored, r"\.self_attn_qkv\.", "attn.to_q", "attn.to_k", "attn.to_v")
    for end in ("weight", "bias"):
        last = out.pop(f"final_layer.adaLN_modulation.1.{end}")
        out[f"norm_out.linear.{end}"] = torch.cat(last.chunk(2)[::-1])
    return renamed(
        out,
        ("^time_in.mlp.0", "time_embed.timestep_embedder.linear_1"),
        ("^time_in.mlp.2", "time_embed.timestep_embedder.linear_2"),
        ("^time_r_in.mlp.0", "time_embed.timestep_embedder_r.linear_1"),
        ("^time_r_in.mlp.2", "time_embed.timestep_embedder_r.linear_2"),
        ("^txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
        ("^txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
        ("^txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder"),
        ("^txt_in.input_embedder", "context_embedder.proj_in"),
        ("^txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks"),
        (r"\.self_attn_proj\.", ".attn.to_out.0."), (r"\.adaLN_modulation\.1\.", ".norm_out.linear."),
        ("^byt5_in.layernorm", "context_embedder_2.norm"), (r"^byt5_in\.fc", "context_embedder_2.linear_"),
        ("^vision_in.proj.0", "image_embedder.norm_in"), ("^vision_in.proj.1", "image_embedder.linear_1"),
        ("^vision_in.proj.3", "image_embedder.linear_2"), ("^vision_in.proj.4", "image_embedder.norm_out"),
        ("^img_in", "x_embedder"), ("^cond_type_embedding", "cond_type_embed"),
        ("^final_layer.linear", "proj_out"), ("^double_blocks", "transformer_blocks"),
        ("img_mod.linear", "norm1.linear"), ("txt_mod.linear", "norm1_context.linear"),
        ("img_attn_([qk])_norm", r"attn.norm_\1"), ("txt_attn_([qk])_norm", r"attn.norm_added_\1"),
        ("img_attn_proj", "attn.to_out.0"), ("txt_attn_proj", "attn.to_add_out"),
        ("img_attn_([qkv])", r"attn.to_\1"), ("txt_attn_([qkv])", r"attn.add_\1_proj"),
        (r"\.(img_)?mlp\.", ".ff."), (r"\.txt_mlp\.", ".ff_context."),
        (r"\.fc1\.", ".net.0.proj."), (r"\.fc2\.", ".net.2."),
    )  # fmt: skip


def open_clip(stored, c):
    like = SimpleNamespace(config=SimpleNamespace(hidden_size=c.hidden_size))
    return theirs.convert_open_clip_checkpoint(like, dict(stored), prefix="")


def diffusers(name):
    """A converter of a denoiser or of Wan's autoencoder by its name."""
    return lambda stored, c: getattr(theirs, f"convert_{name}")(dict(stored))


def newer_ltx2(stored, c):
    """LTX-2.3 has two names more, which diffusers' converter of its LoRAs has."""
    renamed = {key.replace("prompt_adaln_single", "prompt_adaln"): x for key, x in stored.items()}
    return theirs.convert_ltx2_transformer_to_diffusers(renamed)


LTX2 = ltx2.Config(
    num_layers=2, num_attention_heads=1, cross_attention_dim=128, audio_num_attention_heads=1,
    audio_cross_attention_dim=64, caption_channels=20,
)  # fmt: skip
FLUX = flux.Config(num_layers=2, num_single_layers=2)
FLUX2 = flux2.Config(num_layers=2, num_single_layers=2, num_attention_heads=1)
SD3 = sd3.Config(num_layers=3, num_attention_heads=2, caption_projection_dim=128, pos_embed_max_size=4)
WAN = wan.Config(num_attention_heads=1, ffn_dim=24, num_layers=2, text_dim=20)
KL = kl.Config(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(32, 64, 96),
    layers_per_block=2, latent_channels=4, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
HUNYUAN_VAE = hunyuan.Config(
    down_block_types=("HunyuanVideoDownBlock3D",) * 3, up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4, spatial_compression_ratio=4,
)  # fmt: skip
HUNYUAN15_VAE = hunyuan15.Config(
    block_out_channels=(8, 16, 32, 32), layers_per_block=1, latent_channels=4, spatial_compression_ratio=8
)
HUNYUAN = hunyuan_video.Config(num_layers=2, num_single_layers=2)
CLIP = clip_text.Config(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=96,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=1,
)
PROJECTS = replace(CLIP, architectures=("CLIPTextModelWithProjection",))
VISION = clip_vision.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, image_size=28)
UMT5 = t5.Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
CONVERTED = {
    "FLUX.1-schnell": ("FluxTransformer2DModel", "original", FLUX,
    diffusers("flux_transformer_checkpoint_to_diffusers")),
    "FLUX.1-dev": (
        "FluxTransformer2DModel", "original", replace(FLUX, guidance_embeds=True),
        diffusers("flux_transformer_checkpoint_to_diffusers"),
    ),
    "FLUX.1 Fill": (
        "FluxTransformer2DModel", "original", replace(FLUX, guidance_embeds=True, in_channels=384,
        out_channels=64),
        diffusers("flux_transformer_checkpoint_to_diffusers"),
    ),
    "FLUX.2 klein": (
        "Flux2Transformer2DModel", "original", replace(FLUX2, guidance_embeds=False),
        diffusers("flux2_transformer_checkpoint_to_diffusers"),
    ),
    "FLUX.2 dev": ("Flux2Transformer2DModel", "original", FLUX2,
    diffusers("flux2_transformer_checkpoint_to_diffusers")),
    "Ovis": (
        "OvisImageTransformer2DModel", "original", ovis.Config(num_layers=2, num_single_layers=2,
        num_attention_heads=1),
        by_hand_ovis,
    ),
    "SD3 medium": ("SD3Transformer2DModel", "original", SD3,
    diffusers("sd3_transformer_checkpoint_to_diffusers")),
    "SD3.5 medium": (
        "SD3Transformer2DModel", "original", replace(SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        diffusers("sd3_transformer_checkpoint_to_diffusers"),
    ),
    "Z-Image": (
        "ZImageTransformer2DModel", "comfyui", z_image.Config(dim=128, n_layers=2, n_refiner_layers=1,
        n_heads=1, n_kv_heads=1),
        diffusers("z_image_transformer_checkpoint_to_diffusers"),
    ),
    "ERNIE-Image": (
        "ErnieImageTransformer2DModel", "diffusers",
        ernie.Config(hidden_size=128, num_attention_heads=1, num_layers=2, ffn_hidden_size=24),
        diffusers("ernie_image_transformer_checkpoint_to_diffusers"),
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel", "diffusers", qwen_image.Config(num_layers=2, num_attention_heads=1),
        lambda stored, c: stored,
    ),
    "Wan T2V": ("WanTransformer3DModel", "original", WAN, diffusers("wan_transformer_to_diffusers")),
    "Wan I2V": (
        "WanTransformer3DModel", "original", replace(WAN, in_channels=36, image_dim=12,
        added_kv_proj_dim=128),
        diffusers("wan_transformer_to_diffusers"),
    ),
    "Wan 5B": (
        "WanTransformer3DModel", "original", replace(WAN, in_channels=48, out_channels=48),
        diffusers("wan_transformer_to_diffusers"),
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel", "original", HUNYUAN,
        diffusers("hunyuan_video_transformer_to_diffusers"),
    ),
    "HunyuanVideo-I2V-33ch": (
        "HunyuanVideoTransformer3DModel", "original",
        replace(HUNYUAN, in_channels=33, guidance_embeds=False, image_condition_type="latent_concat"),
        diffusers("hunyuan_video_transformer_to_diffusers"),
    ),
    "HunyuanVideo-1.5": (
        "HunyuanVideo15Transformer3DModel", "original",
        hunyuan_video15.Config(num_layers=2, num_attention_heads=1, use_meanflow=True), by_hand_hunyuan15,
    ),
    "LTX-2": ("LTX2VideoTransformer3DModel", "original", LTX2,
    diffusers("ltx2_transformer_to_diffusers")),
    "LTX-2.3": (
        "LTX2VideoTransformer3DModel", "original", replace(LTX2, gated_attn=True, audio_gated_attn=True,
        cross_attn_mod=True, audio_cross_attn_mod=True, use_prompt_embeddings=False), newer_ltx2,
    ),
    "LTX-2.5": (
        "LTX2VideoTransformer3DModel", "original", replace(LTX2, gated_attn=True, audio_gated_attn=True,
        cross_attn_mod=True, audio_cross_attn_mod=True, use_prompt_embeddings=False, ff_bias=False),
        newer_ltx2,
    ),
    "KL": ("AutoencoderKL", "original", KL, with_quant_convs),
    "KL FLUX.2": (
        "AutoencoderKLFlux2", "original", replace(KL, patch_size=(2, 2), use_quant_conv=True,
        use_post_quant_conv=True),
        with_quant_convs,
    ),
    "Wan 2.1 VAE": ("AutoencoderKLWan", "original", wan_vae.Config(base_dim=8),
    diffusers("wan_vae_to_diffusers")),
    "Qwen-Image-Layered VAE": (
        "AutoencoderKLQwenImage", "original", wan_vae.Config(base_dim=8, input_channels=4),
        diffusers("wan_vae_to_diffusers"),
    ),
    "Wan 2.2 VAE": (
        "AutoencoderKLWan", "original",
        wan_vae.Config(base_dim=8, decoder_base_dim=12, z_dim=6, is_residual=True, in_channels=12,
        out_channels=12, patch_size=2),
        by_hand_wan22_vae,
    ),
    "HunyuanVideo VAE": ("AutoencoderKLHunyuanVideo", "comfyui", HUNYUAN_VAE, by_hand_hunyuan_vae),
    "HunyuanVideo-1.5 VAE": (
        "AutoencoderKLHunyuanVideo15", "original", HUNYUAN15_VAE, by_hand_hunyuan15_vae,
    ),
    "CLIP": ("CLIPTextModel", "open_clip", CLIP, open_clip),
    "CLIP with projection": ("CLIPTextModelWithProjection", "open_clip", PROJECTS, open_clip),
    "CLIP vision": ("CLIPVisionModel", "original", VISION, by_hand_vision),
    "UMT5": ("UMT5EncoderModel", "original", UMT5, by_hand_umt5),
}  # fmt: skip
"""Name -> (class, layout, config, what makes diffusers' names of stored ones)."""


def written(layout, c, rows):
    """Whether the files that the layout's table writes have its signs; some tables are of another kind of
    network.
    """
    return all(map(Sizes(stored_rows(KeyMap(layout.lines(c)), rows)).has, layout.signs))


@cache
def drawn(name):
    """(a layout that fits, config, rows, weights): those of the denoisers cut narrow."""
    class_name, layout, c, _ = CONVERTED[name]
    record = RECORDS[class_name]
    rows = list(record.spec(c))
    if record.role == "dit":
        rows = narrow(rows)
    for each in LAYOUTS:
        if RECORDS[each.class_name] is record and each.name == layout and written(each, c, rows):
            return each, c, rows, draw(rows)
    raise AssertionError(f"no layout {layout} of {class_name}")


@pytest.mark.parametrize("name", CONVERTED)
def test_a_file_gives_what_the_reference_makes_of_it(tmp_path, name):
    layout, c, rows, weights = drawn(name)
    stored = exported(weights, rows, KeyMap(layout.lines(c)))
    same(CONVERTED[name][3](dict(stored), c), weights)
    for prefix in PREFIXES if RECORDS[layout.class_name].role == "dit" else ("", "first_stage_model."):
        keys = KeyMap(layout.lines(c), prefix)
        save_file(exported(weights, rows, keys), tmp_path / "one.safetensors")
        same(load_weights(tmp_path / "one.safetensors", rows, torch.float32, keys=keys), weights)
        torch.save(exported(weights, rows, keys), tmp_path / "one.pth")
        same(load_weights(tmp_path / "one.pth", rows, torch.float32, keys=keys), weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_weights_of_another_type_are_cast_on_their_way(tmp_path, monkeypatch, name):
    """In pieces that are smaller than the largest tensor."""
    layout, c, rows, weights = drawn(name)
    monkeypatch.setattr(weights_module, "BUDGET", 4 * max(row.numel for row in rows) // 3)
    keys = KeyMap(layout.lines(c))
    save_file(exported(weights, rows, keys), tmp_path / "one.safetensors")
    loaded = load_weights(tmp_path / "one.safetensors", rows, torch.bfloat16, keys=keys)
    types = {row.name: torch.float32 if row.float32 else torch.bfloat16 for row in rows}
    same(loaded, {key: tensor.to(types[key]) for key, tensor in weights.items()})


SMALL = flux.Config(
    num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=12,
    pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
)  # fmt: skip
RANKS = {"tp": Layout(tp=2), "fsdp": Layout(ulysses=2, fsdp=True), "both": Layout(ring=2, tp=2, fsdp=True)}


def _of_a_rank(folder, layout):
    """What this rank loads from a file of the original layout and from one of diffusers' layout."""
    groups = make_ranks(layout, 60).groups
    plan = Plan(groups=tuple((axis, groups[axis]) for axis in (("shard", "tp") if layout.fsdp else ("tp",))))
    blocks = {at for _, at in flux.FAMILY.blocks(SMALL)} if layout.fsdp else ()
    given = {"plan": plan, "replicas": groups["dp" if layout.fsdp else "peers"], "blocks": blocks}
    rows, maps = (
        list(flux.spec(SMALL)),
        {"original": KeyMap(flux_layout.LINES, "model.diffusion_model."), "split": KeyMap()},
    )
    paths = {name: folder / f"{name}.safetensors" for name in maps}
    fused, split = (
        load_weights(paths[name], rows, torch.bfloat16, keys=keys, **given) for name, keys in maps.items()
    )
    same(fused, split)
    return sum(tensor.numel() for tensor in fused.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_ranks_hold_the_same_shards_from_a_fused_file(tmp_path, name):
    rows = list(flux.spec(SMALL))
    weights = draw(rows)
    save_file(weights, tmp_path / "split.safetensors")
    keys = KeyMap(flux_layout.LINES, "model.diffusion_model.")
    save_file(exported(weights, rows, keys), tmp_path / "original.safetensors")
    held = on_ranks(RANKS[name].size, _of_a_rank, tmp_path, RANKS[name])
    assert max(held) < 0.8 * sum(tensor.numel() for tensor in weights.values())


NAMES = {
    "transformer": {"original", "diffusers"},
    "ZImageTransformer2DModel": {"comfyui", "diffusers"},
    "QwenImageTransformer2DModel": {"diffusers"},
    "ErnieImageTransformer2DModel": {"diffusers"},
    "vae": {"original", "diffusers"},
    "AutoencoderKLHunyuanVideo": {"comfyui", "diffusers"},
    "Flux2TinyAutoEncoder": {"its own"},
    "T5EncoderModel": {"transformers", "llama.cpp"},
    "UMT5EncoderModel": {"transformers", "original", "llama.cpp"},
    "Qwen3Model": {"transformers", "llama.cpp"},
    "Qwen3ForCausalLM": {"transformers", "llama.cpp"},
    "Qwen2_5_VLTextModel": {"transformers", "llama.cpp"},
    "Qwen2_5_VLForConditionalGeneration": {"transformers", "llama.cpp"},
    "CLIPTextModel": {"transformers", "open_clip"},
    "CLIPTextModelWithProjection": {"transformers", "open_clip"},
    "CLIPVisionModel": {"transformers", "original"},
    "SiglipVisionModel": {"transformers"},
    "language": {"transformers", "llama.cpp"},
    # Directories alone: single files of these are not read.
    "LTX2VideoTransformer3DModel": {"original", "diffusers"},
    "AutoencoderKLLTX2Video": set(),
    "AutoencoderKLLTX2Audio": set(),
    "LTX2TextConnectors": set(),
    "LTX2Vocoder": set(),
    "LTX2VocoderWithBWE": set(),
    "Gemma3ForConditionalGeneration": set(),
    "Gemma4UnifiedForConditionalGeneration": set(),
    "LTX2DurationHead": set(),
    "WanS2VTransformer3DModel": set(),
    "Wav2Vec2ForCTC": set(),
}
"""Class, or kind of component, of the released models -> the layouts in which its files are read."""


def layouts_of(class_name, c):
    """(name of a layout, models that are recognised from it) for each file in which these weights may come.

    The config that is read from keys and shapes alone has the shapes of the given one.
    """
    record, rows, seen = RECORDS[class_name], list(RECORDS[class_name].spec(c)), []
    for layout in LAYOUTS:
        for prefix in PREFIXES if record.role == "dit" else ("",):
            if RECORDS[layout.class_name] is not record or not written(layout, c, rows):
                continue
            keys = KeyMap(layout.lines(c), prefix)
            if NAMES.get(class_name) == set():
                with pytest.raises(UserError, match="has a layout that is not known"):
                    recognise(stored_rows(keys, rows))
                continue
            (found,) = recognise(stored_rows(keys, rows))
            assert RECORDS[found.class_name] is record and found.prefix == prefix
            mine = config_from(found.class_name, found.entries)
            assert {row.name: row.shape for row in record.spec(mine)} == {row.name: row.shape for row in rows}
            assert stored_rows(found.keys(mine), rows) == stored_rows(keys, rows)
            seen.append((found.layout.name, found.models))
    return seen


_layouts: dict[tuple[str, str], list] = {}
"""What `layouts_of` gave: most released models share the configs of their components with others."""


@pytest.mark.parametrize(("name", "part"), COMPONENTS, ids=lambda value: value.split("/")[-1])
def test_every_released_model_is_recognised_in_every_layout(name, part):
    class_name, c = class_of(name, part), config_of(name, part)
    key = class_name, repr(c)
    if key not in _layouts:
        _layouts[key] = layouts_of(class_name, c)
    seen, role = _layouts[key], RECORDS[class_name].role
    assert all(name in models or name == ALONE for _, models in seen)
    kind = "vae" if role == "vae" else "transformer" if role == "dit" else "language"
    assert {layout for layout, _ in seen} == NAMES.get(class_name, NAMES[kind])
