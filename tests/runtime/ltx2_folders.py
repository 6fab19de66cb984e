"""Complete models of LTX-2, LTX-2.3 and LTX-2.5 in diffusers layout, tiny and random: the reference's
pipeline and the directory that it saved.

Rope tables and timesteps of the reference stay float32, as ours are.
"""

from __future__ import annotations

from functools import wraps

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2LatentUpsamplePipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedTextModel,
    Qwen2Tokenizer,
)

from tests import vocabularies
from tests.parity import randomised
from tests.runtime.folders import saved

SCHEDULER = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
    "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip
NEWER = {
    "transformer": {
        "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
    },
    "connectors": {
        "video_gated_attn": True, "audio_gated_attn": True, "per_modality_projections": True,
        "video_hidden_dim": 40, "audio_hidden_dim": 28, "proj_bias": True,
        "video_connector_attention_head_dim": 20, "audio_connector_attention_head_dim": 14,
    },
}  # fmt: skip
"""What LTX-2.3 has otherwise."""


NEWEST = NEWER | {
    "transformer": NEWER["transformer"] | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
}
"""What LTX-2.5 has otherwise."""
CHANGES = {"LTX-2": {"transformer": {}, "connectors": {}}, "LTX-2.3": NEWER, "LTX-2.5": NEWEST}


def text_encoder(vocabulary, name):
    """Gemma 3, or Gemma 4 of LTX-2.5."""
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
    }  # fmt: skip
    if name != "LTX-2.5":
        return Gemma3TextModel(Gemma3TextConfig(**sizes, query_pre_attn_scalar=8))
    types = ["sliding_attention", "full_attention", "full_attention"]
    return Gemma4UnifiedTextModel(
        Gemma4UnifiedTextConfig(
            **sizes,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            layer_types=types,
        )
    )


def build(folder, name):
    """The reference's pipeline, saved to `folder`."""
    (folder / "words").mkdir(parents=True)
    words = vocabularies.qwen(folder / "words")
    tokenizer = Qwen2Tokenizer.from_pretrained(words, padding_side="left")  # as Gemma's is
    changes = CHANGES[name]
    networks = {
        "transformer": LTX2VideoTransformer3DModel(
            **{
                "in_channels": 8, "out_channels": 8, "audio_in_channels": 8, "audio_out_channels": 8,
                "num_attention_heads": 2, "attention_head_dim": 20, "cross_attention_dim": 40,
                "audio_num_attention_heads": 2, "audio_attention_head_dim": 14,
                "audio_cross_attention_dim": 28, "caption_channels": 24, "num_layers": 2,
                "rope_type": "split", "perturbed_attn": True,
            } | changes["transformer"]
        ),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), decoder_causal=False,
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=8, latent_channels=2, mel_bins=16, num_res_blocks=1,
        ),
        "connectors": LTX2TextConnectors(
            **{
                "caption_channels": 24, "text_proj_in_factor": 4, "video_connector_num_attention_heads": 2,
                "video_connector_attention_head_dim": 12, "video_connector_num_layers": 1,
                "video_connector_num_learnable_registers": 4, "audio_connector_num_attention_heads": 2,
                "audio_connector_attention_head_dim": 12, "audio_connector_num_layers": 1,
                "audio_connector_num_learnable_registers": 8, "rope_type": "split",
            } | changes["connectors"]
        ),
        "vocoder": LTX2Vocoder(
            in_channels=32, hidden_channels=16, upsample_kernel_sizes=[7, 4], upsample_factors=[3, 2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]],
        ),
        "text_encoder": text_encoder(len(tokenizer), name),
    }  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    if name == "LTX-2.5":
        scheduler = FlowMatchEulerDiscreteScheduler()
        networks["duration_head"] = LTX2DurationHead(
            video_cross_attention_dim=40, audio_cross_attention_dim=28, pooler_hidden_dim=12, num_queries=2,
            num_pooler_heads=3, mlp_hidden_dim=10,
        )  # fmt: skip
    pipe = saved(LTX2Pipeline, folder, networks, tokenizer=tokenizer, scheduler=scheduler)
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=1, use_rational_resampler=name == "LTX-2"
    )
    randomised(upsampler, 9)
    upsampler.float().save_pretrained(folder / "latent_upsampler")
    pipe.upsampler = LTX2LatentUpsamplePipeline(pipe.vae, upsampler.double())
    transformer, connectors = networks["transformer"], networks["connectors"]
    ropes = [transformer.rope, transformer.audio_rope]
    ropes += [transformer.cross_attn_rope, transformer.cross_attn_audio_rope]
    for rope in (*ropes, connectors.video_connector.rope, connectors.audio_connector.rope):
        rope.forward = as_ever(rope.forward)
    connectors.forward = with_usual_constants(connectors.forward)
    for name, module in transformer.named_modules():
        if name.endswith("time_proj"):
            module.forward = in_float32(module.forward)
    return pipe


def as_ever(forward):
    """The function outside `doubles`: tables stay float32."""

    def call(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return call


def with_usual_constants(forward):
    """The function where torch makes constants in float32: the connectors add 1e-6 to a count of tokens."""

    def call(*args, **kwargs):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return call


def copied(scheduler):
    """A second scheduler, for the sound, that steps with sigmas in float64, as the first does."""
    made = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    set_timesteps = made.set_timesteps

    @wraps(set_timesteps)
    def upcast(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            set_timesteps(*args, **kwargs)
        made.sigmas = made.sigmas.double()

    made.set_timesteps = upcast
    return made


def in_float32(forward):
    return as_ever(lambda timesteps: forward(timesteps.to(torch.float32)))
