"""FLUX.2's original layout, which ComfyUI keeps: dev and klein. A single block's projections stay fused."""

from __future__ import annotations

from tinydiff.entries import Entries
from tinydiff.keymap import moved, under
from tinydiff.models import flux2
from tinydiff.models.layouts.flux import DOUBLE_ATTENTION, FINAL, TWO_LAYERS, norms
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

LINES = (
    moved("img_in", "x_embedder"),
    moved("txt_in", "context_embedder"),
    *under("time_in", "time_guidance_embed.timestep_embedder", *TWO_LAYERS),
    *under("guidance_in", "time_guidance_embed.guidance_embedder", *TWO_LAYERS),
    *(
        moved(f"{name}.lin", f"{name}.linear")
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ),
    *under(
        "double_blocks.*",
        "transformer_blocks.*",
        *DOUBLE_ATTENTION,
        moved("img_mlp.0", "ff.linear_in"),
        moved("img_mlp.2", "ff.linear_out"),
        moved("txt_mlp.0", "ff_context.linear_in"),
        moved("txt_mlp.2", "ff_context.linear_out"),
    ),
    *under(
        "single_blocks.*",
        "single_transformer_blocks.*",
        moved("linear1", "attn.to_qkv_mlp_proj"),
        moved("linear2", "attn.to_out"),
        *norms("norm", "attn.norm_q", "attn.norm_k"),
    ),
    *FINAL,
)


def entries(s: Sizes) -> Entries:
    """klein has no embedder of the guidance scale."""
    width, head = s("x_embedder.weight"), s("transformer_blocks.0.attn.norm_q.weight")
    taken, given = s("x_embedder.weight", 1), s("proj_out.weight")
    return {
        "in_channels": taken,
        "out_channels": None if taken == given else given,
        "num_layers": s.count("transformer_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight", 1),
        "timestep_guidance_channels": s("time_guidance_embed.timestep_embedder.linear_1.weight", 1),
        "mlp_ratio": s("transformer_blocks.0.ff.linear_out.weight", 1) / width,
        "guidance_embeds": s.has("time_guidance_embed.guidance_embedder"),
    }


CLASS = "Flux2Transformer2DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("double_stream_modulation_img.lin", "img_in", "double_blocks.0.img_attn.qkv"),
        lambda c: LINES,
        by_rows(LINES, entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("double_stream_modulation_img.linear", "x_embedder", "transformer_blocks.0.attn.to_q"),
        lambda c: flux2.FAMILY.keys(c).lines,
        entries,
    ),
)
