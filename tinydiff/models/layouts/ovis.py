"""Ovis-Image's original layout and ComfyUI's, which differ in the names of the text's norm and projection.

Source: the names of AIDC-AI's reference code. Of a gated MLP the value's half stands before the gate's.
"""

from __future__ import annotations

from tinydiff.entries import Entries
from tinydiff.keymap import Line, also, joined, moved, under
from tinydiff.models import ovis
from tinydiff.models.layouts.flux import DOUBLE_ATTENTION, FINAL, MODULATION, SINGLE, TWO_LAYERS
from tinydiff.models.layouts.table import Layout, Sizes, by_rows


def _dotted(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    """FLUX.1's lines with the norms' usual spelling the other one: files here write `.weight`."""
    return tuple(
        line
        if not line.stored[0].endswith("_norm.scale") and not line.alias
        else line._replace(alias=not line.alias)
        for line in lines
    )


def _gated(stored: str, row: str) -> tuple[Line, ...]:
    return (
        joined((f"{stored}.up_proj", f"{stored}.gate_proj"), f"{row}.net.0.proj"),
        moved(f"{stored}.down_proj", f"{row}.net.2"),
    )


LINES = (
    moved("img_in", "x_embedder"),
    moved("semantic_txt_norm", "context_embedder_norm"),
    moved("semantic_txt_in", "context_embedder"),
    also("txt_norm", "context_embedder_norm"),
    also("txt_in", "context_embedder"),
    *under("time_in", "timestep_embedder", *TWO_LAYERS),
    *under(
        "double_blocks.*",
        "transformer_blocks.*",
        *MODULATION,
        *_dotted(DOUBLE_ATTENTION),
        *_gated("img_mlp", "ff"),
        *_gated("txt_mlp", "ff_context"),
    ),
    *under("single_blocks.*", "single_transformer_blocks.*", *_dotted(SINGLE)),
    *FINAL,
)


def entries(s: Sizes) -> Entries:
    """Every size of the released config that a shape tells."""
    width, head = s("x_embedder.weight"), s("transformer_blocks.0.attn.norm_q.weight")
    return {
        "in_channels": s("x_embedder.weight", 1),
        "out_channels": s("proj_out.weight"),
        "num_layers": s.count("transformer_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s("context_embedder.weight", 1),
    }


CLASS = "OvisImageTransformer2DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("double_blocks.0.img_mlp.gate_proj", "img_in", "double_blocks.0.img_mod"),
        lambda c: LINES,
        by_rows(LINES, entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("context_embedder_norm", "x_embedder", "transformer_blocks.0.ff.net.0.proj"),
        lambda c: ovis.FAMILY.keys(c).lines,
        entries,
    ),
)
