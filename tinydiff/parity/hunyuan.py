"""What tiny HunyuanVideo and HunyuanVideo-1.5 are asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinydiff.models import hunyuan_video, hunyuan_video15
from tinydiff.ops.patch import patchify
from tinydiff.parity.asked import TIME, WORDS, Asked
from tinydiff.parity.reference import draw

CONFIG = hunyuan_video.Config(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    text_embed_dim=20,
    pooled_projection_dim=12,
    rope_axes_dim=(4, 6, 6),
)
CONFIG_15 = hunyuan_video15.Config(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    text_embed_dim=20,
    text_embed_2_dim=12,
    image_embed_dim=10,
    rope_axes_dim=(4, 6, 6),
    task_type="t2v",
)
GLYPHS, VIEWS = 5, 3
"""Tokens of the words to be written and of the first frame."""


def asked(c: hunyuan_video.Config) -> Asked:
    """With `token_replace` the first frame is given, with `latent_concat` channels beside the noise."""
    size, channels = (3, 6, 10), c.out_channels
    x, text = draw(2, c.in_channels, *size, seed=2), draw(2, WORDS, c.text_embed_dim, seed=3)
    patch_size, guidance = hunyuan_video.patch(c), torch.tensor([2.0, 4.0])
    inputs = {"text": text, "positions": hunyuan_video.positions(c, size), "guidance": guidance}
    inputs["pooled"] = draw(2, c.pooled_projection_dim, seed=4)
    theirs = {
        "hidden_states": x,
        "timestep": TIME.expand(2),
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(2, WORDS, dtype=torch.float64),
        "pooled_projections": inputs["pooled"],
        "guidance": guidance * 1000 if c.guidance_embeds else None,
    }
    if c.in_channels > channels:
        inputs["concat"] = patchify(x[:, channels:], patch_size)
    if c.image_condition_type == hunyuan_video.TOKEN_REPLACE:
        inputs["frozen"] = (inputs["positions"][:, 0] == 0)[None, :, None]
    return Asked(
        patchify(x[:, :channels], patch_size),
        inputs,
        theirs,
        lambda output: patchify(output.sample, patch_size),
    )


def asked_15(c: hunyuan_video15.Config, parts: Sequence[str] = ()) -> Asked:
    """Inputs of HunyuanVideo-1.5 and of its reference.

    parts: "glyphs" and "image" where the text stream has them, "ends" where a step knows its end; the
    reference gets no others.
    """
    size, channels, patch_size = (3, 4, 6), c.out_channels, hunyuan_video15.patch(c)
    x, text = draw(2, c.in_channels, *size, seed=2), draw(2, WORDS, c.text_embed_dim, seed=3)
    inputs = {"text": text, "positions": hunyuan_video15.positions(c, size)}
    inputs["concat"] = patchify(x[:, channels:], patch_size)
    lengths = {name: n if name in parts else 0 for name, n in (("glyphs", GLYPHS), ("image", VIEWS))}
    glyphs = draw(2, GLYPHS, c.text_embed_2_dim, seed=4)[:, : lengths["glyphs"]]
    image = draw(2, VIEWS, c.image_embed_dim, seed=5)[:, : lengths["image"]]
    inputs |= {name: values for name, values in (("glyphs", glyphs), ("image", image)) if name in parts}
    theirs = {
        "hidden_states": x,
        "timestep": TIME.double().expand(2),
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(2, WORDS, dtype=torch.float64),
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": torch.ones(glyphs.shape[:2], dtype=torch.float64),
        "image_embeds": image,
    }
    if "ends" in parts:
        inputs["ends"] = TIME / 2
        theirs["timestep_r"] = inputs["ends"].double().expand(2)
    tokens = patchify(x[:, :channels], patch_size)
    return Asked(tokens, inputs, theirs, lambda output: patchify(output.sample, patch_size))
