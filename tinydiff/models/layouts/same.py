"""Qwen-Image and ERNIE-Image: files of every kind have the released names, below a prefix or not."""

from __future__ import annotations

from tinydiff.entries import Entries
from tinydiff.keymap import unread
from tinydiff.models import ernie, qwen_image
from tinydiff.models.layouts.table import Layout, Sizes

EDIT = "__index_timestep_zero__"
"""A marker that ComfyUI's files of Edit-2511 hold: given images are at timestep 0."""


def qwen_entries(s: Sizes) -> Entries:
    """Layered embeds the kind of an image.

    Nothing in a diffusers file tells Edit-2511; ComfyUI's has a marker.
    """
    width, head = s("img_in.weight"), s("transformer_blocks.0.attn.norm_q.weight")
    layered = s.has("time_text_embed.addition_t_embedding")
    return {
        "in_channels": s("img_in.weight", 1),
        "out_channels": s("proj_out.weight") // 4,
        "num_layers": s.count("transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("txt_norm.weight"),
        "zero_cond_t": s.has(EDIT),
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def ernie_entries(s: Sizes) -> Entries:
    """Every size of the released config that a shape tells."""
    width = s("x_embedder.proj.weight")
    return {
        "hidden_size": width,
        "num_attention_heads": width // s("layers.0.self_attention.norm_q.weight"),
        "num_layers": s.count("layers"),
        "ffn_hidden_size": s("layers.0.mlp.linear_fc2.weight", 1),
        "in_channels": s("x_embedder.proj.weight", 1),
        "out_channels": s("final_linear.weight"),
        "text_in_dim": s("text_proj.weight", 1),
    }


LAYOUTS = (
    Layout(
        "diffusers",
        "QwenImageTransformer2DModel",
        ("txt_norm", "img_in", "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mod.1"),
        lambda c: (*unread(EDIT), *qwen_image.FAMILY.keys(c).lines),
        qwen_entries,
    ),
    Layout(
        "diffusers",
        "ErnieImageTransformer2DModel",
        ("layers.0.mlp.linear_fc2", "x_embedder.proj", "text_proj"),
        lambda c: ernie.FAMILY.keys(c).lines,
        ernie_entries,
    ),
)
