"""The network shapes of the released models, so that a model is planned without its files. No torch.

Entries are those of config.json that bear on a shape and differ from the defaults of the network's `Config`
(of a language model: of its class in transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Component = tuple[str, Mapping[str, Any]]
"""(class named in model_index.json, entries of config.json)."""


def _lm(class_name: str, width: int, hidden: int, layers: int, heads: int = 32, **more: Any) -> Component:
    """A language model with 8 heads of keys and values."""
    shape = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return class_name, shape | {"num_key_value_heads": 8, "head_dim": 128} | more


def _wan(**more: Any) -> Component:
    return "WanTransformer3DModel", more


_WAN_SMALL = _wan(num_attention_heads=12, ffn_dim=8960, num_layers=30)
_WAN_5B = _wan(num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30)
_WAN_SEES = _wan(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
_UMT5: Component = ("UMT5EncoderModel", {})
_T5: Component = ("T5EncoderModel", {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"})
_WAN_VAE: Component = ("AutoencoderKLWan", {})
_WAN_5B_VAE: Component = (
    "AutoencoderKLWan",
    {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    },
)  # fmt: skip
_CLIP_SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_attention_heads": 12,
}
_CLIP: Component = ("CLIPTextModel", _CLIP_SHAPE)
_CLIP_L: Component = (
    "CLIPTextModelWithProjection",
    _CLIP_SHAPE | {"architectures": ["CLIPTextModelWithProjection"]},
)
_CLIP_G: Component = (
    "CLIPTextModelWithProjection",
    {
        "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
        "num_attention_heads": 20, "hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"],
    },
)  # fmt: skip
_LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
}  # fmt: skip
_KL: Component = (
    "AutoencoderKL",
    _LEVELS | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
)
_FLUX2_VAE: Component = ("AutoencoderKLFlux2", _LEVELS | {"latent_channels": 32, "patch_size": [2, 2]})
_QWEN_VAE: Component = ("AutoencoderKLQwenImage", {})
_QWEN_VL: Component = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
        "vision_config": {},
    },
)  # fmt: skip
_MINISTRAL = _lm("Mistral3Model", 3072, 9216, 26, model_type="ministral3", tie_word_embeddings=True)


def _parts(
    transformer: Component, vae: Component, *encoders: Component, **more: Component
) -> dict[str, Component]:
    """encoders: the text encoders in the order of their components."""
    names = ["text_encoder" if i == 0 else f"text_encoder_{i + 1}" for i in range(len(encoders))]
    return {"transformer": transformer, **more, **dict(zip(names, encoders, strict=True)), "vae": vae}


def _qwen(**more: Any) -> dict[str, Component]:
    return _parts(("QwenImageTransformer2DModel", more), _QWEN_VAE, _QWEN_VL)


def _klein(width: int, hidden: int, tied: bool, **more: Any) -> dict[str, Component]:
    """width, hidden: of the language model."""
    net = ("Flux2Transformer2DModel", {"joint_attention_dim": 3 * width, "guidance_embeds": False} | more)
    return _parts(net, _FLUX2_VAE, _lm("Qwen3ForCausalLM", width, hidden, 36, tie_word_embeddings=tied))


def _sd3(**more: Any) -> dict[str, Component]:
    return _parts(("SD3Transformer2DModel", more), _KL, _CLIP_L, _CLIP_G, _T5)


_TEXT, _SEES = (
    _parts(_wan(), _WAN_VAE, _UMT5),
    _parts(_WAN_SEES, _WAN_VAE, _UMT5, image_encoder=("CLIPVisionModel", {})),
)
_SMALL, _5B = _parts(_WAN_SMALL, _WAN_VAE, _UMT5), _parts(_WAN_5B, _WAN_5B_VAE, _UMT5)
_FLUX = _parts(("FluxTransformer2DModel", {"guidance_embeds": True}), _KL, _CLIP, _T5)
_Z_IMAGE = _parts(
    ("ZImageTransformer2DModel", {}), _KL, _lm("Qwen3Model", 2560, 9728, 36, tie_word_embeddings=True)
)
_ERNIE = _parts(
    ("ErnieImageTransformer2DModel", {}), _FLUX2_VAE, _MINISTRAL, pe=("Ministral3ForCausalLM", _MINISTRAL[1])
)
_KLEIN_4B = _klein(2560, 9728, True, num_layers=5, num_single_layers=20, num_attention_heads=24)
_KLEIN_9B = _klein(4096, 12288, False, num_single_layers=24, num_attention_heads=32)

COMPONENTS: dict[str, dict[str, Component]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _SMALL,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _TEXT,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _SEES,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _SEES,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _TEXT | {"transformer_2": _wan()},
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _TEXT
    | dict.fromkeys(("transformer", "transformer_2"), _wan(in_channels=36)),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _5B,
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": _SMALL,
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": _5B,
    "black-forest-labs/FLUX.1-dev": _FLUX,
    "black-forest-labs/FLUX.1-schnell": _FLUX | {"transformer": ("FluxTransformer2DModel", {})},
    "black-forest-labs/FLUX.1-Kontext-dev": _FLUX,
    "AIDC-AI/Ovis-Image-7B": _parts(
        ("OvisImageTransformer2DModel", {}),
        _KL,
        _lm("Qwen3Model", 2048, 6144, 28, 16, tie_word_embeddings=True),
    ),
    "Tongyi-MAI/Z-Image-Turbo": _Z_IMAGE,
    "Tongyi-MAI/Z-Image": _Z_IMAGE,
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        pos_embed_max_size=384, dual_attention_layers=list(range(13)), qk_norm="rms_norm"
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
    "Qwen/Qwen-Image": _qwen(),
    "Qwen/Qwen-Image-2512": _qwen(),
    "Qwen/Qwen-Image-Edit": _qwen(),
    "Qwen/Qwen-Image-Edit-2511": _qwen(zero_cond_t=True),
    "Qwen/Qwen-Image-Edit-2509": _qwen(),
    "Qwen/Qwen-Image-Layered": _qwen(use_additional_t_cond=True, use_layer3d_rope=True)
    | {"vae": ("AutoencoderKLQwenImage", {"input_channels": 4})},
    "black-forest-labs/FLUX.2-dev": _parts(
        ("Flux2Transformer2DModel", {}),
        _FLUX2_VAE,
        _lm("Mistral3ForConditionalGeneration", 5120, 32768, 40, vocab_size=131072),
    ),
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "baidu/ERNIE-Image": _ERNIE,
    "baidu/ERNIE-Image-Turbo": _ERNIE,
}
"""Name in the registry -> component -> what it is. The model in the package is not here: its files are."""
