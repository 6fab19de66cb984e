"""HunyuanVideo's and HunyuanVideo-1.5's original layouts, in which ComfyUI reads them.

Source: the names of Tencent's reference code, and diffusers' converters. HunyuanVideo fuses queries, keys and
values, and 1.5 does so in its token refiner alone; the last modulation is shift, then scale.
"""

from __future__ import annotations

from math import prod

from tinydiff.entries import Entries
from tinydiff.keymap import Line, fused, moved, swapped, under
from tinydiff.models import hunyuan_video, hunyuan_video15
from tinydiff.models.layouts.table import Layout, Sizes, by_rows


def _embedder(stored: str, row: str) -> tuple[Line, ...]:
    return moved(f"{stored}.0", f"{row}.linear_1"), moved(f"{stored}.2", f"{row}.linear_2")


def _feed_forward(stored: str, row: str) -> tuple[Line, ...]:
    return moved(f"{stored}.fc1", f"{row}.net.0.proj"), moved(f"{stored}.fc2", f"{row}.net.2")


REFINER = under(
    "txt_in",
    "context_embedder",
    *_embedder("t_embedder.mlp", "time_text_embed.timestep_embedder"),
    moved("c_embedder", "time_text_embed.text_embedder"),
    moved("input_embedder", "proj_in"),
    *under(
        "individual_token_refiner.blocks.*",
        "token_refiner.refiner_blocks.*",
        fused("self_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        moved("self_attn_proj", "attn.to_out.0"),
        *_feed_forward("mlp", "ff"),
        moved("adaLN_modulation.1", "norm_out.linear"),
    ),
)
DOUBLE = (
    moved("img_mod.linear", "norm1.linear"),
    moved("txt_mod.linear", "norm1_context.linear"),
    moved("img_attn_q_norm", "attn.norm_q"),
    moved("img_attn_k_norm", "attn.norm_k"),
    moved("txt_attn_q_norm", "attn.norm_added_q"),
    moved("txt_attn_k_norm", "attn.norm_added_k"),
    moved("img_attn_proj", "attn.to_out.0"),
    moved("txt_attn_proj", "attn.to_add_out"),
    *_feed_forward("img_mlp", "ff"),
    *_feed_forward("txt_mlp", "ff_context"),
)
ENDS = (
    moved("img_in", "x_embedder"),
    moved("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
LINES = (
    *ENDS,
    *REFINER,
    *_embedder("time_in.mlp", "time_text_embed.timestep_embedder"),
    *_embedder("guidance_in.mlp", "time_text_embed.guidance_embedder"),
    moved("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    moved("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    *under(
        "double_blocks.*",
        "transformer_blocks.*",
        fused("img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        fused("txt_attn_qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        *DOUBLE,
    ),
    *under(
        "single_blocks.*",
        "single_transformer_blocks.*",
        fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        moved("linear2", "proj_out"),
        moved("q_norm", "attn.norm_q"),
        moved("k_norm", "attn.norm_k"),
        moved("modulation.linear", "norm.linear"),
    ),
)
LINES_15 = (
    *ENDS,
    *REFINER,
    *_embedder("time_in.mlp", "time_embed.timestep_embedder"),
    *_embedder("time_r_in.mlp", "time_embed.timestep_embedder_r"),
    moved("byt5_in.layernorm", "context_embedder_2.norm"),
    *(moved(f"byt5_in.fc{i}", f"context_embedder_2.linear_{i}") for i in (1, 2, 3)),
    moved("vision_in.proj.0", "image_embedder.norm_in"),
    moved("vision_in.proj.1", "image_embedder.linear_1"),
    moved("vision_in.proj.3", "image_embedder.linear_2"),
    moved("vision_in.proj.4", "image_embedder.norm_out"),
    moved("cond_type_embedding", "cond_type_embed"),
    *under(
        "double_blocks.*",
        "transformer_blocks.*",
        *DOUBLE,
        *(moved(f"img_attn_{each}", f"attn.to_{each}") for each in "qkv"),
        *(moved(f"txt_attn_{each}", f"attn.add_{each}_proj") for each in "qkv"),
    ),
)


def _shared(s: Sizes) -> Entries:
    """What both networks have. Which task 1.5 was trained for is in no shape."""
    time, side, _ = patch = s.shapes["x_embedder.proj.weight"][2:]
    head = s("transformer_blocks.0.attn.norm_q.weight")
    return {
        "in_channels": s("x_embedder.proj.weight", 1),
        "out_channels": s("proj_out.weight") // prod(patch),
        "num_attention_heads": s("x_embedder.proj.weight") // head,
        "attention_head_dim": head,
        "num_layers": s.count("transformer_blocks"),
        "num_refiner_layers": s.count("context_embedder.token_refiner.refiner_blocks"),
        "patch_size": side,
        "patch_size_t": time,
        "text_embed_dim": s("context_embedder.proj_in.weight", 1),
    }


def entries(s: Sizes) -> Entries:
    """A network with channels beside its latents has an image there; one that keeps an image has no sign."""
    found = _shared(s)
    beside = found["in_channels"] > found["out_channels"]
    return {
        **found,
        "num_single_layers": s.count("single_transformer_blocks"),
        "guidance_embeds": s.has("time_text_embed.guidance_embedder"),
        "pooled_projection_dim": s("time_text_embed.text_embedder.linear_1.weight", 1),
        "image_condition_type": hunyuan_video.LATENT_CONCAT if beside else None,
    }


def entries_15(s: Sizes) -> Entries:
    """Of HunyuanVideo-1.5."""
    return {
        **_shared(s),
        "text_embed_2_dim": s("context_embedder_2.linear_1.weight", 1),
        "image_embed_dim": s("image_embedder.linear_1.weight", 1),
        "use_meanflow": s.has("time_embed.timestep_embedder_r"),
    }


CLASS, CLASS_15 = "HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("txt_in.individual_token_refiner", "double_blocks.0.img_attn_qkv", "vector_in"),
        lambda c: LINES,
        by_rows(LINES, entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("context_embedder.token_refiner", "time_text_embed.text_embedder"),
        lambda c: hunyuan_video.FAMILY.keys(c).lines,
        entries,
    ),
    Layout(
        "original",
        CLASS_15,
        ("txt_in.individual_token_refiner", "double_blocks.0.img_attn_q", "byt5_in"),
        lambda c: LINES_15,
        by_rows(LINES_15, entries_15),
    ),
    Layout(
        "diffusers",
        CLASS_15,
        ("context_embedder.token_refiner", "context_embedder_2", "cond_type_embed"),
        lambda c: hunyuan_video15.FAMILY.keys(c).lines,
        entries_15,
    ),
)
