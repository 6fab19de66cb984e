"""Tiny random pipelines that tinydiff has no code for, as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
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


def stable_diffusion_xl(folder: Path) -> Path:
    """A Stable Diffusion XL: two text encoders beside a UNet, images of 16 x 16."""
    torch.manual_seed(0)
    tokenizer = _clip(folder)
    clip = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=16, **CLIP)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            **UNET,
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **DISCRETE),
    )
    pipe.save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    torch.manual_seed(0)
    text_encoder, tokenizer = _t5()
    pipe = PixArtAlphaPipeline(
        transformer=PixArtTransformer2DModel(
            **{"sample_size": 8, "num_layers": 1, "patch_size": 2, "num_attention_heads": 2},
            **{"attention_head_dim": 8, "caption_channels": 16, "cross_attention_dim": 16},
            **{"in_channels": 4, "out_channels": 8},
        ),
        vae=AutoencoderKL(**VAE),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipe.save_pretrained(folder)
    return folder


def sana(folder: Path) -> Path:
    torch.manual_seed(0)
    levels = {f"{side}coder_block_types": ("ResBlock", "EfficientViTBlock") for side in ("en", "de")}
    levels |= {f"{side}coder_block_out_channels": (8, 8) for side in ("en", "de")}
    levels |= {f"{side}coder_qkv_multiscales": ((), (5,)) for side in ("en", "de")}
    levels |= {f"{side}coder_layers_per_block": (1, 1) for side in ("en", "de")}
    gemma = Gemma2Config(
        **{"vocab_size": 142, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    )
    pipe = SanaPipeline(
        transformer=SanaTransformer2DModel(
            **{"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "sample_size": 32},
            **{"num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2},
            **{"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8},
        ),
        vae=AutoencoderDC(
            **{"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2, **levels},
            **{"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=Gemma2Model(gemma),
        tokenizer=_t5()[1],
    )
    pipe.save_pretrained(folder)
    return folder


def cogvideox(folder: Path) -> Path:
    torch.manual_seed(0)
    text_encoder, tokenizer = _t5()
    pipe = CogVideoXPipeline(
        transformer=CogVideoXTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4},
            **{"time_embed_dim": 2, "text_embed_dim": 16, "num_layers": 1, "patch_size": 2},
            **{"sample_width": 2, "sample_height": 2, "sample_frames": 9, "max_text_seq_length": 16},
        ),
        vae=AutoencoderKLCogVideoX(
            **{"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1},
            **{"norm_num_groups": 2, "temporal_compression_ratio": 4},
        ),
        scheduler=CogVideoXDDIMScheduler(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipe.save_pretrained(folder)
    return folder


CODE = '''
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
import torch


class TintPipeline(DiffusionPipeline):
    """Adds a tint to a predicted image; further arguments are added up."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, tint, generator=None, num_inference_steps=4, output_type="np", **more):
        side = self.unet.config.sample_size
        x = torch.randn(1, 3, side, side, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        x = (x.tanh() / 2 + 0.5) * tint + sum(more.values())
        return ImagePipelineOutput(images=x.permute(0, 2, 3, 1).clamp(0, 1).numpy())
'''


def custom(folder: Path) -> Path:
    """A pipeline whose class is in a file of the directory, and which takes no prompt."""
    from diffusers import DDPMPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        **{"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2},
        **{"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    )
    DDPMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    (folder / "tinting.py").write_text(CODE)
    edit(folder / "model_index.json", _class_name=["tinting", "TintPipeline"])
    return folder
