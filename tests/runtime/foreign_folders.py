"""Tiny random pipelines that tinydiff has no code for, as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests import vocabularies
from tests.sources import PACKAGE

VAE = {
    **{"block_out_channels": (4, 8), "latent_channels": 4, "norm_num_groups": 2, "sample_size": 16},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
UNET = {
    **{"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 2},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4},
    **{"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DISCRETE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _clip(folder: Path) -> CLIPTokenizer:
    words = folder.with_name(f"{folder.name}-words")
    words.mkdir(parents=True)
    return CLIPTokenizer.from_pretrained(vocabularies.clip(words), model_max_length=77)


def _t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    config = T5Config(vocab_size=142, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), T5TokenizerFast.from_pretrained(PACKAGE / "shapes" / "tokenizer")


def stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion 1: a UNet, images of 16 x 16."""
    torch.manual_seed(0)
    tokenizer = _clip(folder)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **CLIP)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(cross_attention_dim=16, **UNET),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, **DISCRETE),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe.save_pretrained(folder)
    return folder


def edit(path: Path, **entries: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2))
