"""Wan's original layout, which ComfyUI keeps: 2.1 and 2.2, from text, from images, and the 5B model.

Source: the names of Wan-Video's reference code. Nothing is fused, and the affine norm of a block is its
third.
"""

from __future__ import annotations

from math import prod

from tinydiff.entries import Entries
from tinydiff.keymap import Line, moved, under
from tinydiff.models import wan
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

HEAD = 128
"""The width of a head in every released model, which no shape tells."""


def _attention(stored: str, row: str) -> tuple[Line, ...]:
    names = {
        **{"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"},
        **{"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"},
    }
    return under(stored, row, *(moved(old, new) for old, new in names.items()))


LINES = (
    *under(
        "",
        "condition_embedder",
        moved("time_embedding.0", "time_embedder.linear_1"),
        moved("time_embedding.2", "time_embedder.linear_2"),
        moved("text_embedding.0", "text_embedder.linear_1"),
        moved("text_embedding.2", "text_embedder.linear_2"),
        moved("time_projection.1", "time_proj"),
        moved("img_emb.proj.0", "image_embedder.norm1"),
        moved("img_emb.proj.1", "image_embedder.ff.net.0.proj"),
        moved("img_emb.proj.3", "image_embedder.ff.net.2"),
        moved("img_emb.proj.4", "image_embedder.norm2"),
        moved("img_emb.emb_pos", "image_embedder.pos_embed"),
    ),
    *under(
        "blocks.*",
        "blocks.*",
        *_attention("self_attn", "attn1"),
        *_attention("cross_attn", "attn2"),
        moved("norm3", "norm2"),
        moved("norm2", "norm3"),
        moved("ffn.0", "ffn.net.0.proj"),
        moved("ffn.2", "ffn.net.2"),
        moved("modulation", "scale_shift_table"),
    ),
    moved("head.modulation", "scale_shift_table"),
    moved("head.head", "proj_out"),
)


def entries(s: Sizes) -> Entries:
    """The models that look at an image have its embedder; 2.2's see it in their input alone."""
    width, patch = s("patch_embedding.weight"), s.shapes["patch_embedding.weight"][2:]
    embed = "condition_embedder"
    found: Entries = {
        "patch_size": list(patch),
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "in_channels": s("patch_embedding.weight", 1),
        "out_channels": s("proj_out.weight") // prod(patch),
        "text_dim": s(f"{embed}.text_embedder.linear_1.weight", 1),
        "freq_dim": s(f"{embed}.time_embedder.linear_1.weight", 1),
        "ffn_dim": s("blocks.0.ffn.net.0.proj.weight"),
        "num_layers": s.count("blocks"),
        "cross_attn_norm": s.has("blocks.0.norm2"),
    }
    if s.has(f"{embed}.image_embedder"):
        found["image_dim"] = s(f"{embed}.image_embedder.norm1.weight")
        found["added_kv_proj_dim"] = s("blocks.0.attn2.add_k_proj.weight", 1)
    if s.has(f"{embed}.image_embedder.pos_embed"):
        found["pos_embed_seq_len"] = s(f"{embed}.image_embedder.pos_embed", 1)
    return found


CLASS = "WanTransformer3DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("head.modulation", "patch_embedding", "blocks.0.cross_attn.q"),
        lambda c: (*LINES, *wan.FAMILY.keys(c).lines),
        by_rows(LINES, entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("scale_shift_table", "patch_embedding", "blocks.0.attn1.to_q", "condition_embedder.time_proj"),
        lambda c: wan.FAMILY.keys(c).lines,
        entries,
    ),
)
