"""Stable Diffusion 3's original layout, which ComfyUI keeps: 3 medium, 3.5 medium and 3.5 large.

Source: the names of Stability AI's reference code. The last block's text stream ends in its attention, and
its modulation has two parts, shift and scale.
"""

from __future__ import annotations

from math import isqrt

from tinydiff.entries import Entries
from tinydiff.keymap import Line, fused, moved, swapped, under
from tinydiff.models import sd3
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

MLP = (moved("mlp.fc1", "net.0.proj"), moved("mlp.fc2", "net.2"))


def _attention(stored: str, row: str) -> tuple[Line, ...]:
    """The image's own attention, of which some blocks have two."""
    return under(
        stored,
        row,
        fused("qkv", "to_q", "to_k", "to_v"),
        moved("proj", "to_out.0"),
        moved("ln_q", "norm_q"),
        moved("ln_k", "norm_k"),
    )


def lines(c: sd3.Config) -> tuple[Line, ...]:
    """The last block is told by its number."""
    last, modulation = c.num_layers - 1, "context_block.adaLN_modulation.1"
    return (
        moved("pos_embed", "pos_embed.pos_embed"),
        moved("x_embedder.proj", "pos_embed.proj"),
        *(
            moved(f"{stored}.mlp.{i}", f"time_text_embed.{row}.linear_{j}")
            for stored, row in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for i, j in ((0, 1), (2, 2))
        ),
        swapped(f"joint_blocks.{last}.{modulation}", f"transformer_blocks.{last}.norm1_context.linear"),
        *under(
            "joint_blocks.*",
            "transformer_blocks.*",
            *_attention("x_block.attn", "attn"),
            *_attention("x_block.attn2", "attn2"),
            *under(
                "context_block.attn",
                "attn",
                fused("qkv", "add_q_proj", "add_k_proj", "add_v_proj"),
                moved("proj", "to_add_out"),
                moved("ln_q", "norm_added_q"),
                moved("ln_k", "norm_added_k"),
            ),
            moved("x_block.adaLN_modulation.1", "norm1.linear"),
            moved(modulation, "norm1_context.linear"),
            *under("x_block", "ff", *MLP),
            *under("context_block", "ff_context", *MLP),
        ),
        moved("final_layer.linear", "proj_out"),
        swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )


HEAD = 64
"""The width of a head in every released model; 3 medium has no norm that tells it."""


def entries(s: Sizes) -> Entries:
    """3.5 normalises queries and keys; 3.5 medium has a second attention in its first blocks."""
    width, patch, count = (
        s("pos_embed.proj.weight"),
        s("pos_embed.proj.weight", 2),
        s.count("transformer_blocks"),
    )
    normed = s.has("transformer_blocks.0.attn.norm_q")
    head = s("transformer_blocks.0.attn.norm_q.weight") if normed else HEAD
    return {
        "patch_size": patch,
        "in_channels": s("pos_embed.proj.weight", 1),
        "out_channels": s("proj_out.weight") // patch**2,
        "num_layers": count,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight", 1),
        "caption_projection_dim": s("context_embedder.weight"),
        "pooled_projection_dim": s("time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": isqrt(s("pos_embed.pos_embed", 1)),
        "dual_attention_layers": [i for i in range(count) if s.has(f"transformer_blocks.{i}.attn2")],
        "qk_norm": "rms_norm" if normed else None,
    }


CLASS = "SD3Transformer2DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("joint_blocks.0.context_block.adaLN_modulation.1", "x_embedder.proj", "pos_embed"),
        lines,
        by_rows(lines(sd3.Config()), entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("pos_embed.pos_embed", "pos_embed.proj", "transformer_blocks.0.attn.add_q_proj"),
        lambda c: sd3.FAMILY.keys(c).lines,
        entries,
    ),
)
