"""The tiny encoders and autoencoders, and what is compared of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydiff.entries import EntryDict
from tinydiff.models.autoencoders import hunyuan, hunyuan15, kl, tiny
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.encoders import (
    clip_text,
    clip_vision,
    decoder_lm,
    llava_vision,
    qwen_vision,
    siglip_vision,
    t5,
    wav2vec2,
)
from tinydiff.ops.network import Config
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.reference import Case, Foreign, built, draw, library

PLAN = Plan()

# --- encoders ---

_IDS = torch.tensor([[50, 3, 9, 7, 60, 60, 60, 60], [50, 9, 7, 5, 7, 11, 2, 60]])
_MASK = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
"""Two texts that end at 60; the first is padded with that."""


def _transformers(model: str, config: str, **fields: Any) -> nn.Module:
    found = library("transformers")
    return getattr(found, model)(getattr(found, config)(**fields))


def _t5(kind: str, prefix: str) -> Case:
    c = t5.Config(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4, model_type=kind)
    read = _MASK.bool()  # what stands where padding is means nothing

    def reference() -> nn.Module:
        fields = {
            key: value
            for key, value in asdict(c).items()
            if key not in ("dense_act_fn", "is_gated_act", "model_type")
        }
        return _transformers(
            f"{prefix}EncoderModel", f"{prefix}Config", **fields, feed_forward_proj="gated-gelu"
        )

    def theirs(module: nn.Module) -> dict[str, Tensor]:
        return {"last": module(_IDS, attention_mask=_MASK).last_hidden_state[read]}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "last", t5.encode(c, PLAN, w, _IDS, _MASK)[read]

    return Case(reference, lambda: t5.spec(c), t5.key_map(c).row, theirs, ours)


def _clip(projects: bool, act: str) -> Case:
    model = clip_text.WITH_PROJECTION if projects else "CLIPTextModel"
    fields: EntryDict = {
        "vocab_size": 61, "hidden_size": 24,
        "intermediate_size": 40, "projection_dim": 10,
        "num_hidden_layers": 3,
        "num_attention_heads": 3, "max_position_embeddings": 11, "hidden_act": act, "layer_norm_eps": 1e-3,
        "eos_token_id": 2,
    }  # fmt: skip
    c = clip_text.Config(**fields, architectures=(model,))

    def theirs(module: nn.Module) -> dict[str, Tensor]:
        out = module(_IDS, output_hidden_states=True)
        return _states(out.hidden_states) | {"pooled": out.text_embeds if projects else out.pooler_output}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        out = clip_text.encode(c, PLAN, w, _IDS)
        yield from _states(out.hidden_states).items()
        yield "pooled", out.pooled if out.projected is None else out.projected

    build = partial(_transformers, model, "CLIPTextConfig", **fields, bos_token_id=50)
    return Case(build, lambda: clip_text.spec(c), clip_text.key_map(c).row, theirs, ours)


def _states(states: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"embeddings" if i == 0 else f"layers.{i - 1}": state for i, state in enumerate(states)}


_TEXT: EntryDict = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 80, "rms_norm_eps": 1e-5, "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 2.0, "beta_slow": 0.5,
    "original_max_position_embeddin" "gs": 5,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

_GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _language(family: str, class_name: str, **changes: Any) -> Case:
    """family: as transformers begins its classes' names. known: the class that released models name."""
    fields = _TEXT | changes

    def settings() -> Foreign:
        return getattr(library("transformers"), f"{family}Config")(**fields)

    def config() -> decoder_lm.Config:
        return decoder_lm.config_from(settings().to_dict(), class_name)

    def theirs(module: nn.Module) -> dict[str, Tensor]:
        return _states(module(_IDS, attention_mask=_MASK, output_hidden_states=True).hidden_states)

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        c = config()
        yield from _states(
            decoder_lm.encode(c, PLAN, w, _IDS, _MASK, take=tuple(range(c.layers + 1)))
        ).items()

    build = partial(_transformers, f"{family}Model", f"{family}Config", **fields)
    return Case(
        build,
        lambda: decoder_lm.spec(config()),
        lambda key: decoder_lm.key_map(config()).row(key),
        theirs,
        ours,
    )


def _qwen_vision() -> Case:
    """Two images, whose windows are not all full."""
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 20, "num_heads": 2, "in_channels": 3,
        "out_hidden_size": 32, "patch_size": 2,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 12, "fullatt_block_indexes": [1],
    }  # fmt: skip
    c, grids = qwen_vision.config_from({"vision_config": vision}), [(6, 10), (14, 4)]
    patches = draw(sum(tall * wide for tall, wide in grids), 24, seed=3)

    def reference() -> nn.Module:
        text = _TEXT | {"rope_parameters": _MROPE}
        whole = _transformers("Qwen2_5_VLModel", "Qwen2_5_VLConfig", text_config=text, vision_config=vision)
        return whole.get_submodule("visual")

    def theirs(module: nn.Module) -> dict[str, Tensor]:
        return {"last": module(patches, torch.tensor([(1, *grid) for grid in grids])).pooler_output}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "last", qwen_vision.encode(c, PLAN, w, patches, grids)

    return Case(reference, lambda: qwen_vision.spec(c), qwen_vision.key_map(c).row, theirs, ours)


def _vision(name: str, module: Foreign) -> Case:
    """A tower of CLIP's layers. name: of its class in transformers, without its ending."""
    fields: EntryDict = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
        "image_size": 21, "patch_size": 7,
        "layer_norm_eps": 1e-3,
    }  # fmt: skip
    c, x = module.Config(**fields), draw(2, 3, 21, 21)

    def theirs(reference: nn.Module) -> dict[str, Tensor]:
        output = reference(x, output_hidden_states=True)
        return {"last": output.hidden_states[-2] if module is clip_vision else output.last_hidden_state}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "last", module.encode(c, PLAN, w, x)

    build = partial(_transformers, f"{name}Model", f"{name}Config", **fields, hidden_act=c.hidden_act)
    return Case(build, lambda: module.spec(c), module.key_map(c).row, theirs, ours)


def _speech() -> Case:
    c = wav2vec2.Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, layer_norm_eps=1e-3,
        feat_extract_norm="layer", conv_dim=(10, 12, 14), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2),
        conv_bias=True, num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=4, do_stable_layer_norm=True,
    )  # fmt: skip
    fields = {name: value for name, value in asdict(c).items() if name != "do_normalize"}
    fields |= {"vocab_size": 7, "layerdrop": 0.0, "attn_implementation": "eager"}
    x = draw(2, 333)

    def theirs(reference: Foreign) -> dict[str, Tensor]:
        output = reference.wav2vec2(x, output_hidden_states=True)
        states = (*output.hidden_states[:-1], output.last_hidden_state)
        return {f"states.{i}": state for i, state in enumerate(states)}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        for i, state in enumerate(wav2vec2.encode(c, PLAN, w, x)):
            yield f"states.{i}", state

    build = partial(_transformers, "Wav2Vec2ForCTC", "Wav2Vec2Config", **fields)
    return Case(build, lambda: wav2vec2.spec(c), wav2vec2.key_map(c).row, theirs, ours)


def _llava_vision() -> Case:
    eyes = {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
        "image_size": 21, "patch_size": 7,
    }  # fmt: skip
    words = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 30,
    }  # fmt: skip
    entries: EntryDict = {"vision_config": eyes, "text_config": words}
    c, x = llava_vision.config_from(entries, "LlavaForConditionalGeneration"), draw(2, 3, 21, 21)

    build = partial(_transformers, "LlavaModel", "LlavaConfig", **entries)

    def theirs(module: Foreign) -> dict[str, Tensor]:
        return {"last": torch.stack(list(module.get_image_features(x).pooler_output))}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "last", llava_vision.encode(c, PLAN, w, x)

    return Case(build, lambda: llava_vision.spec(c), llava_vision.key_map(c).row, theirs, ours)


ENCODERS: dict[str, tuple[str, Callable[[], Case]]] = {
    "UMT5": ("UMT5EncoderModel", partial(_t5, "umt5", "UMT5")),
    "T5": ("T5EncoderModel", partial(_t5, "t5", "T5")),
    "CLIP-L": ("CLIPTextModel", partial(_clip, False, "quick_gelu")),
    "CLIP-L, projected": (clip_text.WITH_PROJECTION, partial(_clip, True, "quick_gelu")),
    "CLIP-G": (clip_text.WITH_PROJECTION, partial(_clip, True, "gelu")),
    "CLIP ViT": ("CLIPVisionModel", partial(_vision, "CLIPVision", clip_vision)),
    "LLaVA vision": ("LlavaModel", _llava_vision),
    "SigLIP": ("SiglipVisionModel", partial(_vision, "SiglipVision", siglip_vision)),
    "wav2vec 2.0": ("Wav2Vec2ForCTC", _speech),
    "Qwen3": ("Qwen3Model", partial(_language, "Qwen3", "Qwen3Model", head_dim=16)),
    "Qwen2.5": (
        "Qwen2_5_VLTextModel",
        partial(_language, "Qwen2_5_VLText", "Qwen2_5_VLTextModel", rope_parameters=_MROPE),
    ),
    "Qwen2.5 vision": ("Qwen2_5_VLModel", _qwen_vision),
    "Llama": ("LlamaModel", partial(_language, "Llama", "LlamaModel", head_dim=12)),
    "Mistral": (
        "MistralModel",
        partial(_language, "Mistral", "MistralForCausalLM", head_dim=12, sliding_window=None),
    ),
    "Ministral 3": (
        "Ministral3Model",
        partial(_language, "Ministral3", "Ministral3ForCausalLM", head_dim=8, rope_parameters=_YARN),
    ),
    "Gemma 3": (
        "Gemma3TextModel",
        partial(
            _language,
            "Gemma3Text",
            "Gemma3TextModel",
            head_dim=12,
            num_hidden_layers=6,
            query_pre_attn_scalar=12,
            sliding_window=5,
            sliding_window_pattern=3,
            rope_parameters=_GEMMA_ROPE,
        ),
    ),
    "Gemma 4": (
        "Gemma4UnifiedTextModel",
        partial(
            _language,
            "Gemma4UnifiedText",
            "Gemma4UnifiedTextModel",
            head_dim=12,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            num_hidden_layers=6,
            sliding_window=5,
        ),
    ),
}
"""What is compared -> (class of transformers, case)."""

# --- autoencoders ---

_STATISTICS: EntryDict = {"latents_mean": (0.1, 0.2, -0.3, 0.4), "latents_std": (1.0, 2.0, 0.5, 0.7)}
_WAN = wan_vae.Config(base_dim=6, z_dim=4, num_res_blocks=2, **_STATISTICS)
_WAN22 = replace(
    _WAN,
    decoder_base_dim=8,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)
_LEVELS: EntryDict = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
_KL = kl.Config(
    block_out_channels=(4, 6, 8), layers_per_block=2, norm_num_groups=2, scaling_factor=0.3611,
    shift_factor=0.1159, **_LEVELS,
    use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
_KL2 = replace(
    _KL,
    scaling_factor=0.18215,
    shift_factor=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
    patch_size=(2, 2),
)
_TINY = tiny.Config(
    encoder_block_out_channels=(6,) * 3, decoder_block_out_channels=(5,) * 3, num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
    act_fn="silu", latent_channels=8,
)  # fmt: skip
_HUNYUAN = hunyuan.Config(
    latent_channels=2,
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    block_out_channels=(4, 6, 8),
    layers_per_block=1,
    norm_num_groups=2,
    spatial_compression_ratio=4,
)
_HUNYUAN15 = hunyuan15.Config(
    latent_channels=2, block_out_channels=(8, 16, 16), layers_per_block=1, spatial_compression_ratio=4
)


def _autoencoder(module: ModuleType, reference: str, c: Config, frames: int = 1, channels: int = 3) -> Case:
    """Images or a video to normalised latents, and other latents to pixels; the reference's own latents are
    the raw ones.
    """
    side, latent_frames = c.scale_factor_spatial, (frames - 1) // c.scale_factor_temporal + 1
    batch = 1 if module is hunyuan15 else 2  # the reference's attention mask fits one video only
    x = draw(batch, channels, frames, 3 * side, 5 * side, seed=7).clamp(-1, 1)
    z = draw(batch, c.z_dim, latent_frames, 3, 5)
    videos = module in (wan_vae, hunyuan, hunyuan15)
    pixels_given = x if videos else x[:, :, 0]

    def theirs(net: Foreign) -> dict[str, Tensor]:
        encoded = net.encode(pixels_given)
        latents = encoded.latents if module is tiny else encoded.latent_dist.mode()
        pixels = net.decode(_raw(c, net, z if videos else z[:, :, 0])).sample.clamp(-1, 1)
        computed = {"encode": _normalised(c, net, latents), "decode": pixels}
        return computed if videos else {name: values[:, :, None] for name, values in computed.items()}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "encode", module.encode(c, w, x)
        yield "decode", module.decode(c, w, z)

    def build() -> nn.Module:
        return built(getattr(library("diffusers"), reference), c)

    return Case(build, lambda: module.spec(c), module.FAMILY.keys(c).row, theirs, ours)


def _statistics(c: Config, net: Foreign, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the denoiser's latents, as the reference's pipelines take them."""
    if isinstance(c, tiny.Config):
        mean, std = like.new_zeros(1), like.new_ones(1)
    elif isinstance(c, kl.Config) and c.patch_size is not None:
        mean, std = net.bn.running_mean, (net.bn.running_var + c.batch_norm_eps).sqrt()
    elif isinstance(c, hunyuan.Config | hunyuan15.Config):
        mean, std = like.new_zeros(1), 1 / like.new_tensor([c.scaling_factor])
    elif isinstance(c, kl.Config):
        mean, std = like.new_tensor([c.shift_factor]), 1 / like.new_tensor([c.scaling_factor])
    else:
        mean, std = like.new_tensor(c.latents_mean), like.new_tensor(c.latents_std)
    shape = (1, -1, *[1] * (like.ndim - 2))
    return mean.view(shape), std.view(shape)


def _normalised(c: Config, net: Foreign, z: Tensor) -> Tensor:
    z = F.pixel_unshuffle(z, 2) if getattr(c, "patch_size", None) == (2, 2) else z
    mean, std = _statistics(c, net, z)
    return (z - mean) / std


def _raw(c: Config, net: Foreign, z: Tensor) -> Tensor:
    mean, std = _statistics(c, net, z)
    z = z * std + mean
    return F.pixel_shuffle(z, 2) if getattr(c, "patch_size", None) == (2, 2) else z


_WANS, _QWENS, _KLS, _KL2S, _HUNYUANS, _HUNYUAN15S, _TINIES = (
    "AutoencoderKLWan",
    "AutoencoderKLQwenImage",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderTiny",
)

AUTOENCODERS: dict[str, tuple[str, Callable[[], Case]]] = {
    "Wan2.1 autoencoder": (_WANS, partial(_autoencoder, wan_vae, _WANS, _WAN, 9)),
    "Wan2.2 autoencoder": (_WANS, partial(_autoencoder, wan_vae, _WANS, _WAN22, 9)),
    "Qwen-Image autoencoder": (
        _QWENS,
        partial(_autoencoder, wan_vae, _QWENS, replace(_WAN, input_channels=3)),
    ),
    "Qwen-Image autoencoder, RGBA": (
        _QWENS,
        partial(_autoencoder, wan_vae, _QWENS, replace(_WAN, input_channels=4), channels=4),
    ),
    "KL autoencoder": (_KLS, partial(_autoencoder, kl, _KLS, _KL)),
    "FLUX.2 autoencoder": (_KL2S, partial(_autoencoder, kl, _KL2S, _KL2)),
    "HunyuanVideo autoencoder": (
        _HUNYUANS,
        partial(_autoencoder, hunyuan, _HUNYUANS, _HUNYUAN, 21),
    ),
    "HunyuanVideo-1.5 autoencoder": (
        _HUNYUAN15S,
        partial(_autoencoder, hunyuan15, _HUNYUAN15S, _HUNYUAN15, 9),
    ),
    "tiny autoencoder": (_TINIES, partial(_autoencoder, tiny, _TINIES, _TINY)),
}
"""What is compared -> (class of diffusers, case)."""
