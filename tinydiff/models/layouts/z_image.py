"""Z-Image in ComfyUI's layout, whose attention is fused; the released files have diffusers' names."""

from __future__ import annotations

from tinydiff.entries import Entries
from tinydiff.keymap import Line, fused, moved, under, unread
from tinydiff.models import z_image
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

ATTENTION = (
    fused("qkv", "to_q", "to_k", "to_v"),
    moved("out", "to_out.0"),
    moved("q_norm", "norm_q"),
    moved("k_norm", "norm_k"),
)
PATCH = "2-1"
"""Pixels and frames of a patch, as names have them."""

LINES: tuple[Line, ...] = (
    *(
        line
        for stack in ("layers", "noise_refiner", "context_refiner")
        for line in under(f"{stack}.*.attention", f"{stack}.*.attention", *ATTENTION)
    ),
    moved("x_embedder", f"all_x_embedder.{PATCH}"),
    moved("final_layer", f"all_final_layer.{PATCH}"),
    *unread("norm_final"),
)


def entries(s: Sizes) -> Entries:
    """Queries, keys and values have as many heads."""
    embedder, head = f"all_x_embedder.{PATCH}.weight", s("layers.0.attention.norm_q.weight")
    return {
        "in_channels": s(embedder, 1) // 4,
        "dim": s(embedder),
        "n_layers": s.count("layers"),
        "n_refiner_layers": s.count("noise_refiner"),
        "n_heads": s(embedder) // head,
        "n_kv_heads": s(embedder) // head,
        "cap_feat_dim": s("cap_embedder.0.weight"),
    }


CLASS = "ZImageTransformer2DModel"
LAYOUTS = (
    Layout(
        "comfyui",
        CLASS,
        ("cap_embedder.1", "noise_refiner.0.attention", "x_pad_token", "x_embedder"),
        lambda c: LINES,
        by_rows(LINES, entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("cap_embedder.1", "noise_refiner.0.attention", "x_pad_token", "all_x_embedder"),
        lambda c: z_image.FAMILY.keys(c).lines,
        entries,
    ),
)
