"""The shipped model's three networks, as the field names of their config.json."""

from __future__ import annotations

from tinydiff.models import wan
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import t5

LATENT = 32
TEXT_TOKENS = 32
"""Prompts are padded to this length; the denoiser attends to the padding too, as Wan does."""

AUTOENCODER = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": LATENT,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [0.0] * LATENT,
    "latents_std": [1.0] * LATENT,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}


def autoencoder() -> wan_vae.Config:
    return wan_vae.Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in AUTOENCODER.items()})


TEXT_ENCODER = {
    "model_type": "umt5",
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}

TRANSFORMER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "in_channels": LATENT,
    "out_channels": LATENT,
    "text_dim": TEXT_ENCODER["d_model"],
    "freq_dim": 256,
    "ffn_dim": 480,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}


def text_encoder(vocab_size: int) -> t5.Config:
    return t5.Config(vocab_size=vocab_size, **TEXT_ENCODER)


def transformer() -> wan.Config:
    return wan.Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in TRANSFORMER.items()})
