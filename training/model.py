"""The shipped model's three networks."""

from __future__ import annotations

from tinydiff.models import wan
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import t5

LATENT = 16
TEXT_TOKENS = 32
"""Prompts are padded to this length; the denoiser attends to the padding too, as Wan does."""

AUTOENCODER = wan_vae.Config(
    base_dim=40,
    decoder_base_dim=40,
    z_dim=LATENT,
    dim_mult=(1, 1, 1),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.0,) * LATENT,
    latents_std=(1.0,) * LATENT,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
)
"""Its latents' mean and deviation are measured once it is trained."""

TRANSFORMER = wan.Config(
    num_attention_heads=5,
    attention_head_dim=32,
    in_channels=LATENT,
    out_channels=LATENT,
    text_dim=96,
    ffn_dim=480,
    num_layers=6,
)


def text_encoder(vocab_size: int) -> t5.Config:
    return t5.Config(
        vocab_size=vocab_size, d_model=TRANSFORMER.text_dim, d_kv=24, d_ff=192, num_layers=2, num_heads=4
    )
