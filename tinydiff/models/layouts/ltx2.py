"""LTX-2's original layout, of its checkpoints and of its LoRAs: the transformer alone.

Source: the names of Lightricks' code, which diffusers' converters of checkpoints and of LoRAs list.
"""

from __future__ import annotations

from tinydiff.entries import Entries
from tinydiff.keymap import Line, moved, under, unread
from tinydiff.models import ltx2
from tinydiff.models.layouts.table import Layout, Sizes, by_rows
from tinydiff.models.ltx2_weights import KEYFRAMES

HEAD = 128
"""The width of a head of the video in every released model, which no shape tells."""
ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


def _norms(attention: str) -> tuple[Line, ...]:
    return tuple(moved(f"{attention}.{x}_norm", f"{attention}.norm_{x}") for x in "qk")


LINES = (
    moved("patchify_proj", "proj_in"),
    moved("audio_patchify_proj", "audio_proj_in"),
    moved("adaln_single", "time_embed"),
    moved("audio_adaln_single", "audio_time_embed"),
    moved("prompt_adaln_single", "prompt_adaln"),
    moved("audio_prompt_adaln_single", "audio_prompt_adaln"),
    moved("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    moved("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    moved("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    moved("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    *under(
        "transformer_blocks.*",
        "transformer_blocks.*",
        moved("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
        moved("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
        *(line for attention in ATTENTIONS for line in _norms(attention)),
    ),
    *unread("video_embeddings_connector", "audio_embeddings_connector"),
    *KEYFRAMES,
)


def entries(s: Sizes) -> Entries:
    """LTX-2.3 gates its attention, modulates the prompt, and leaves its projection to the connectors.

    LTX-2.5 has no biases in the feed-forward of the video.
    """
    width, sound = s("proj_in.weight"), s("audio_proj_in.weight")
    heads, gated = width // HEAD, s.has("transformer_blocks.0.attn1.to_gate_logits")
    modulated = s.has("transformer_blocks.0.prompt_scale_shift_table")
    found: Entries = {
        "in_channels": s("proj_in.weight", 1),
        "out_channels": s("proj_out.weight"),
        "num_attention_heads": heads,
        "attention_head_dim": HEAD,
        "cross_attention_dim": width,
        "audio_in_channels": s("audio_proj_in.weight", 1),
        "audio_out_channels": s("audio_proj_out.weight"),
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": sound // heads,
        "audio_cross_attention_dim": sound,
        "num_layers": s.count("transformer_blocks"),
        "gated_attn": gated,
        "audio_gated_attn": gated,
        "cross_attn_mod": modulated,
        "audio_cross_attn_mod": modulated,
        "use_prompt_embeddings": s.has("caption_projection"),
        "rope_type": "split",
        "ff_bias": s.has("transformer_blocks.0.ff.net.2.bias"),
        "audio_ff_bias": s.has("transformer_blocks.0.audio_ff.net.2.bias"),
        "use_prompt_adaln_single": s.has("prompt_adaln") or not modulated,
    }
    if s.has("caption_projection"):
        found["caption_channels"] = s("caption_projection.linear_1.weight", 1)
    return found


CLASS = "LTX2VideoTransformer3DModel"
LAYOUTS = (
    Layout(
        "original",
        CLASS,
        ("patchify_proj", "audio_patchify_proj", "av_ca_a2v_gate_adaln_single"),
        lambda c: LINES,
        by_rows(LINES, entries),
    ),
    Layout(
        "diffusers",
        CLASS,
        ("proj_in", "audio_proj_in", "av_cross_attn_video_a2v_gate"),
        lambda c: ltx2.FAMILY.keys(c).lines,
        entries,
    ),
)
