"""FLUX.1's original layout, which ComfyUI keeps; dev, schnell, Kontext, Fill and the control models alike.

Source: the names of black-forest-labs' reference code. Rows of `linear1` are those of queries, keys, values
and the MLP; the last modulation is shift, then scale.
"""

from __future__ import annotations

from tinydiff.entries import Entries
from tinydiff.keymap import Line, also, fused, moved, swapped, under
from tinydiff.models import flux
from tinydiff.models.layouts.table import Layout, Sizes, by_rows

TWO_LAYERS = (moved("in_layer", "linear_1"), moved("out_layer", "linear_2"))


def norms(stored: str, query: str, key: str) -> tuple[Line, ...]:
    """The norms of queries and keys; some files write `.weight` for `.scale`."""
    names = (("query_norm", query), ("key_norm", key))
    return tuple(
        line
        for name, row in names
        for line in (
            moved(f"{stored}.{name}.scale", f"{row}.weight"),
            also(f"{stored}.{name}.weight", f"{row}.weight"),
        )
    )


DOUBLE_ATTENTION = (
    fused("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    fused("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *norms("img_attn.norm", "attn.norm_q", "attn.norm_k"),
    *norms("txt_attn.norm", "attn.norm_added_q", "attn.norm_added_k"),
    moved("img_attn.proj", "attn.to_out.0"),
    moved("txt_attn.proj", "attn.to_add_out"),
)
"""A double block's attention, as FLUX.2 and Ovis have it too."""

MODULATION = (moved("img_mod.lin", "norm1.linear"), moved("txt_mod.lin", "norm1_context.linear"))

SINGLE = (
    moved("modulation.lin", "norm.linear"),
    fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    moved("linear2", "proj_out"),
    *norms("norm", "attn.norm_q", "attn.norm_k"),
)

FINAL = (
    moved("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)

LINES = (
    moved("img_in", "x_embedder"),
    moved("txt_in", "context_embedder"),
    *under("time_in", "time_text_embed.timestep_embedder", *TWO_LAYERS),
    *under("vector_in", "time_text_embed.text_embedder", *TWO_LAYERS),
    *under("guidance_in", "time_text_embed.guidance_embedder", *TWO_LAYERS),
    *under(
        "double_blocks.*",
        "transformer_blocks.*",
        *MODULATION,
        *DOUBLE_ATTENTION,
        moved("img_mlp.0", "ff.net.0.proj"),
        moved("img_mlp.2", "ff.net.2"),
        moved("txt_mlp.0", "ff_context.net.0.proj"),
        moved("txt_mlp.2", "ff_context.net.2"),
    ),
    *under("single_blocks.*", "single_transformer_blocks.*", *SINGLE),
    *FINAL,
)


def entries(s: Sizes) -> Entries:
    """Fill and the control models take more channels than they give."""
    width, taken, given = s("x_embedder.weight"), s("x_embedder.weight", 1), s("proj_out.weight")
    head = s("transformer_blocks.0.attn.norm_q.weight")
    return {
        "in_channels": taken,
        "out_channels": None if taken == given else given,
        "num_layers": s.count("transformer_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight", 1),
        "pooled_projection_dim": s("time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": s.has("time_text_embed.guidance_embedder"),
    }


CLASS = "FluxTransformer2DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("double_blocks.0.img_attn.norm.key_norm", "img_in", "vector_in", "double_blocks.0.img_mod"),
        lambda c: LINES,
        by_rows(LINES, entries),
        lacks=("distilled_guidance_layer", "double_blocks.0.img_mlp.gate_proj"),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("x_embedder", "transformer_blocks.0.attn.norm_added_k", "single_transformer_blocks.0.proj_mlp",
         "time_text_embed.text_embedder"),
        lambda c: flux.FAMILY.keys(c).lines,
        entries,
        lacks=("context_embedder.token_refiner",),
    ),
)  # fmt: skip
