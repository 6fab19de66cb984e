"""The tiny components of LTX-2 to LTX-2.5 around the transformer, and what is compared of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinydiff.models import ltx2_upsampler, vocoder
from tinydiff.models.autoencoders import ltx2_audio, ltx2_video
from tinydiff.models.encoders import ltx2_connectors, ltx2_duration
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.reference import Case, built, draw, library

_MASK = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
"""Two prompts; the first is padded on the left, as Gemma's tokenizer pads."""


def _connectors(c: ltx2_connectors.Config) -> Case:
    states = draw(2, 8, c.caption_channels, c.text_proj_in_factor, seed=3)

    def reference() -> nn.Module:
        module: Any = built(_of_pipeline("LTX2TextConnectors"), c)
        for rope in (module.video_connector.rope, module.audio_connector.rope):
            tables = rope(2, 8, "cpu")  # float32, as the model was trained
            rope.register_forward_hook(lambda _module, _args, _output, tables=tables: tables)
        return module

    def theirs(module: Any) -> dict[str, Tensor]:
        video, audio, mask = module(states, _MASK)
        assert mask.bool().all(), "registers stand where padding was"
        return {"video": video, "audio": audio}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield from zip(("video", "audio"), ltx2_connectors.encode(c, Plan(), w, states, _MASK), strict=True)

    return Case(reference, lambda: ltx2_connectors.spec(c), lambda key: key, theirs, ours)


def _duration(c: ltx2_duration.Config) -> Case:
    video = draw(2, 9, c.video_cross_attention_dim, seed=3)
    audio = draw(2, 7, c.audio_cross_attention_dim, seed=4)

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "seconds", ltx2_duration.seconds(c, Plan(), w, video, audio)

    return Case(
        lambda: built(_of_pipeline("LTX2DurationHead"), c),
        lambda: ltx2_duration.spec(c),
        lambda key: key,
        lambda head: {"seconds": head(video, audio)},
        ours,
    )


def _video(c: ltx2_video.Config) -> Case:
    x, z = draw(1, 3, 17, 64, 96, seed=7).clamp(-1, 1), draw(1, c.z_dim, 3, 2, 3)

    def theirs(net: Any) -> dict[str, Tensor]:
        mean, std = (each.view(1, -1, 1, 1, 1) for each in (net.latents_mean, net.latents_std))
        return {
            "encode": (net.encode(x).latent_dist.mode() - mean) / std,
            "decode": net.decode(z * std + mean).sample.clamp(-1, 1),
        }

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "encode", ltx2_video.encode(c, w, x)
        yield "decode", ltx2_video.decode(c, w, z)

    return Case(_builder(_VIDEO_CLASS, c), lambda: ltx2_video.spec(c), lambda key: key, theirs, ours)


def _audio(c: ltx2_audio.Config) -> Case:
    x, z = draw(2, c.in_channels, 21, c.mel_bins, seed=7), draw(2, c.latent_channels, 6, c.latent_bins)

    def theirs(net: Any) -> dict[str, Tensor]:
        mean, std = net.latents_mean, net.latents_std
        latents = ltx2_audio.pack(net.encode(x).latent_dist.mode())
        raw = ltx2_audio.unpack(c, ltx2_audio.pack(z) * std + mean)
        return {
            "encode": ltx2_audio.unpack(c, (latents - mean) / std),
            "decode": net.decode(raw).sample,
        }

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "encode", ltx2_audio.encode(c, w, x)
        yield "decode", ltx2_audio.decode(c, w, z)

    return Case(_builder(_AUDIO_CLASS, c), lambda: ltx2_audio.spec(c), lambda key: key, theirs, ours)


def _vocoder(c: vocoder.Config) -> Case:
    mel = draw(2, 2, 7, c.generator.in_channels // 2, seed=7)

    def reference() -> nn.Module:
        found = vars(c.generator) | {
            name: value for name, value in vars(c).items() if name not in ("generator", "extension")
        }
        if c.extension is not None:
            found |= {f"bwe_{name}": value for name, value in vars(c.extension).items()}
            return _of_pipeline(vocoder.BWE)(**found)
        del found["input_sampling_rate"]
        for name in ("filter_length", "hop_length", "window_length", "num_mel_channels"):
            del found[name]
        return _of_pipeline("LTX2Vocoder")(**found)

    def theirs(net: Any) -> dict[str, Tensor]:
        return {"waveform": net(mel)}

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "waveform", vocoder.waveform(c, w, mel)

    return Case(reference, lambda: vocoder.spec(c), vocoder.key_map(c).row, theirs, ours)


def _upsampler(c: ltx2_upsampler.Config) -> Case:
    z = draw(2, c.in_channels, 2, 3, 5, seed=7)

    def ours(w: Weights) -> Iterator[tuple[str, Tensor]]:
        yield "latents", ltx2_upsampler.upsample(c, w, z)

    return Case(
        lambda: built(_of_pipeline("LTX2LatentUpsamplerModel"), c),
        lambda: ltx2_upsampler.spec(c),
        ltx2_upsampler.key_map(c).row,
        lambda net: {"latents": net(z)},
        ours,
    )


def _of_pipeline(name: str) -> Any:
    """A class that diffusers keeps beside its pipelines."""
    library("diffusers")
    from diffusers.pipelines.ltx2 import connectors, duration_head, latent_upsampler
    from diffusers.pipelines.ltx2 import vocoder as vocoders

    modules = connectors, vocoders, latent_upsampler, duration_head
    found = (getattr(module, name, None) for module in modules)
    return next(each for each in found if each is not None)


def _builder(name: str, c: Any) -> Callable[[], nn.Module]:
    return lambda: built(getattr(library("diffusers"), name), c)


_VIDEO_CLASS, _AUDIO_CLASS = "AutoencoderKLLTX2Video", "AutoencoderKLLTX2Audio"

_CONNECTORS = ltx2_connectors.Config(
    caption_channels=24,
    text_proj_in_factor=3,
    video_connector_num_attention_heads=2,
    video_connector_attention_head_dim=12,
    video_connector_num_learnable_registers=4,
    audio_connector_num_attention_heads=3,
    audio_connector_attention_head_dim=8,
    audio_connector_num_layers=1,
    audio_connector_num_learnable_registers=2,
)
_CONNECTORS23 = replace(
    _CONNECTORS,
    video_connector_attention_head_dim=16,
    video_gated_attn=True,
    audio_gated_attn=True,
    audio_connector_num_attention_heads=2,
    rope_type="split",
    per_modality_projections=True,
    video_hidden_dim=32,
    audio_hidden_dim=16,
    proj_bias=True,
)
_DURATION = ltx2_duration.Config(
    video_cross_attention_dim=32,
    audio_cross_attention_dim=16,
    pooler_hidden_dim=12,
    num_queries=2,
    num_pooler_heads=3,
    mlp_hidden_dim=10,
)
_VIDEO = ltx2_video.Config(
    latent_channels=8,
    block_out_channels=(16, 32, 64, 64),
    decoder_block_out_channels=(16, 32, 64),
    layers_per_block=(1, 1, 2, 1, 1),
    decoder_layers_per_block=(1, 1, 2, 1),
    decoder_causal=False,
    spatial_compression_ratio=32,
    temporal_compression_ratio=8,
)
_VIDEO23 = replace(
    _VIDEO,
    decoder_block_out_channels=(16, 32, 32, 64),
    decoder_layers_per_block=(1, 1, 2, 1, 1),
    decoder_spatio_temporal_scaling=(True,) * 4,
    decoder_inject_noise=(False,) * 5,
    upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    upsample_residual=(False,) * 4,
    upsample_factor=(2, 2, 1, 2),
    decoder_spatial_padding_mode="zeros",
)
_AUDIO = ltx2_audio.Config(base_channels=16, latent_channels=4, mel_bins=16, num_res_blocks=1)
_VOCODER = vocoder.Config(
    vocoder.Generator(
        in_channels=12,
        hidden_channels=32,
        upsample_kernel_sizes=(7, 4),
        upsample_factors=(3, 2),
        resnet_kernel_sizes=(3, 7),
        resnet_dilations=((1, 3), (1, 3)),
    )
)
_PERIODIC = replace(
    _VOCODER.generator,
    upsample_kernel_sizes=(10, 4),
    upsample_factors=(5, 2),
    act_fn="snakebeta",
    antialias=True,
    final_act_fn=None,
    final_bias=False,
)
_VOCODER23 = vocoder.Config(
    _PERIODIC,
    replace(_PERIODIC, upsample_factors=(5, 3), upsample_kernel_sizes=(11, 5)),
    input_sampling_rate=16000,
    output_sampling_rate=48000,
    filter_length=16,
    hop_length=5,
    window_length=16,
    num_mel_channels=6,
)

_UPSAMPLER = ltx2_upsampler.Config(in_channels=6, mid_channels=32, num_blocks_per_stage=1)

COMPONENTS: dict[str, tuple[str, Callable[[], Case]]] = {
    "LTX-2 connectors": ("LTX2TextConnectors", partial(_connectors, _CONNECTORS)),
    "LTX-2.3 connectors": ("LTX2TextConnectors", partial(_connectors, _CONNECTORS23)),
    "LTX-2.5 duration head": ("LTX2DurationHead", partial(_duration, _DURATION)),
    "LTX-2 video autoencoder": (_VIDEO_CLASS, partial(_video, _VIDEO)),
    "LTX-2.3 video autoencoder": (_VIDEO_CLASS, partial(_video, _VIDEO23)),
    "LTX-2 audio autoencoder": (_AUDIO_CLASS, partial(_audio, _AUDIO)),
    "LTX-2 vocoder": ("LTX2Vocoder", partial(_vocoder, _VOCODER)),
    "LTX-2.3 vocoder": (vocoder.BWE, partial(_vocoder, _VOCODER23)),
    "LTX-2 upsampler": ("LTX2LatentUpsamplerModel", partial(_upsampler, _UPSAMPLER)),
    "LTX-2.3 upsampler": (
        "LTX2LatentUpsamplerModel",
        partial(_upsampler, replace(_UPSAMPLER, use_rational_resampler=False)),
    ),
}
"""What is compared -> (class of diffusers, case)."""
