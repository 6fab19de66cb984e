"""LTX-2's pipelines: text, or text and images at any frame, to video with sound.

Gemma's states of the prompt go through the connectors to the prompts of both streams. The loop's tokens are
those of the video, then those of the sound, for as long as the video runs. Shape letters: B batch, L video
tokens, A sound tokens, P latent values of a token, T text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinydiff.models import ltx2_upsampler, vocoder
from tinydiff.models.autoencoders import ltx2_audio, ltx2_video
from tinydiff.models.encoders import decoder_lm, ltx2_connectors, ltx2_duration
from tinydiff.models.recipe import (
    Context,
    GivenTokens,
    Latents,
    LoopInputs,
    Stage,
    frames_between,
    half_size,
    latent_size,
    refined,
    shift_by_tokens,
)
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.rope import grid_positions
from tinydiff.records import Guidance, GuidanceTerms, Output, Request, Sound

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
PATCH = (1, 1, 1)


def positions(
    c: Any, size: tuple[int, int, int], fps: float, device: torch.device | str | None = None
) -> Tensor:
    """Positions [L, 3] of the tokens of latents (frames, height, width), float32.

    Each is the middle of a token, in seconds and pixels.

    The first latent frame holds one frame, each other one `vae_scale_factors[0]`.
    """
    grid = grid_positions(*size, device=device).float()
    strides = torch.tensor(c.vae_scale_factors, device=device)

    def edges(grid: Tensor) -> Tensor:
        pixels = grid * strides
        time = (pixels[:, 0] + c.causal_offset - c.vae_scale_factors[0]).clamp(min=0) / fps
        return torch.cat([time[:, None], pixels[:, 1:]], 1)

    return (edges(grid) + edges(grid + 1)) / 2.0


def keyframe_positions(
    c: Any, frame: int, size: tuple[int, int, int], fps: float, device: torch.device | str | None = None
) -> Tensor:
    """Positions [H W, 3] of the tokens of one image that stands at a frame of the video."""
    places = positions(c, (1, *size[1:]), fps, device)
    edges = torch.tensor([frame, frame + 1], dtype=torch.float32, device=device) / fps
    places[:, 0] = edges.sum() / 2.0  # of the edges, as elsewhere, for the same rounding
    return places


def audio_positions(c: Any, tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Positions [A, 1] of the sound tokens: the middle of each in seconds, float32."""
    grid = torch.arange(tokens, dtype=torch.float32, device=device)[:, None]

    def edges(grid: Tensor) -> Tensor:
        windows = (grid * c.audio_scale_factor + c.causal_offset - c.audio_scale_factor).clip(min=0)
        return windows * c.audio_hop_length / c.audio_sampling_rate

    return (edges(grid) + edges(grid + 1)) / 2.0


def audio_tokens(audio_vae: Any, output: Output) -> int:
    """How many tokens the sound of an output has. audio_vae: the autoencoder's config."""
    return round(output.num_frames / output.fps * audio_vae.latents_per_second)


def _prompts(context: Context, request: Request) -> Iterator[Tensors]:
    """`text` and `audio_text` [1, T, width] of the prompt and, with guidance, of the negative prompt."""
    encoder, connectors = context.nets["text_encoder"], context.nets["connectors"]
    texts = [text.strip() for text in request.texts]
    ids, mask = context.tokens("tokenizer", texts, request.text.max_tokens, side="left")
    every = tuple(range(encoder.config.layers + 1))
    for i in range(len(texts)):  # one by one: all states of a text are large
        own = slice(i, i + 1)
        states = decoder_lm.encode(encoder.config, encoder.plan, encoder.w, ids[own], mask[own], take=every)
        stacked = torch.stack(states, -1).to(connectors.dtype)
        video, audio = ltx2_connectors.encode(
            connectors.config, connectors.plan, connectors.w, stacked, mask[own]
        )
        yield {"text": video, "audio_text": audio}


def _sound(context: Context, latents: Tensor) -> Sound:
    """Latents [1, Z, A, bins] -> what is heard."""
    vae, speaker = context.nets["audio_vae"], context.nets["vocoder"]
    mel = ltx2_audio.decode(vae.config, vae.w, latents.to(vae.dtype))
    wave = vocoder.waveform(speaker.config, speaker.w, mel.to(speaker.dtype))[0]
    return Sound(wave.clamp(-1, 1).float().T.cpu().numpy(), speaker.config.sampling_rate)


def _as_long(context: Context, request: Request, prompt: Tensors) -> Request:
    """The request with as many frames as the duration head gives the prompt, where it is asked."""
    output = request.output
    if output.seconds is None:
        return request
    head, stride = context.nets["duration_head"], context.nets["vae"].config.scale_factor_temporal
    seconds = ltx2_duration.seconds(head.config, head.plan, head.w, prompt["text"], prompt["audio_text"])
    frames = frames_between(seconds.item(), *output.seconds, output.fps, stride)
    log.info("the prompt's %.2f seconds become %d frames", seconds.item(), frames)
    return replace(request, output=replace(output, num_frames=frames))


def prepare(c: Any, context: Context, request: Request) -> tuple[Stage, ...]:
    """The loop of video and sound, or two where the second refines what the first made."""
    texts = tuple(_prompts(context, request))
    request = _as_long(context, request, texts[0])
    if request.refinement is None:
        return (Stage(request, _inputs(c, context, request, texts)),)
    coarse, fine = half_size(context, request), refined(request, request.refinement)
    second = context.adapted(fine.loras)
    again = texts[:1] if second is context else tuple(_prompts(second, fine))
    inputs = _inputs(c, second, fine, again)
    return (
        Stage(coarse, _inputs(c, context, coarse, texts)),
        Stage(fine, inputs, partial(_started, context, inputs)),
    )


def _started(context: Context, inputs: LoopInputs, _: LoopInputs, kinds: Sequence[Tensor]) -> LoopInputs:
    """The inputs of the second loop, which starts from what the first one made."""
    return replace(inputs, start=inputs.pack(_enlarged(context, kinds)))


def _enlarged(context: Context, kinds: Sequence[Tensor]) -> Sequence[Tensor]:
    """Normalised latents of video and sound -> those of a video twice as high and wide, and the same sound.

    The upsampler reads raw latents.
    """
    video, sound = kinds
    upsampler, vae = context.nets["spatial_upsampler"], context.nets["vae"]
    mean, std = ltx2_video.statistics(vae.config, vae.w, video)
    raw = (video * std + mean).to(upsampler.dtype)
    large = ltx2_upsampler.upsample(upsampler.config, upsampler.w, raw)
    return (large.to(video.dtype) - mean) / std, sound


def _inputs(c: Any, context: Context, request: Request, prompts: Sequence[Tensors]) -> LoopInputs:
    """Loop inputs of video and sound.

    The tokens of given frames stay clean, at timestep 0: a first frame is the first latent frame; those of
    any other frame stand behind the tokens of the video.
    """
    vae, audio_vae = (context.nets[name].config for name in ("vae", "audio_vae"))
    size, device, fps = latent_size(vae, request.output), context.device, request.output.fps
    count, places = audio_tokens(audio_vae, request.output), positions(c, size, fps, device)
    given = {
        frame: patchify(context.encode(context.pixels([image])), PATCH)
        for frame, image in zip(request.images.frames, request.images.resized, strict=True)
    }
    first, others = given.pop(0, None), torch.cat([places.new_zeros(1, 0, vae.z_dim), *given.values()], 1)
    behind = [keyframe_positions(c, frame, size, fps, device) for frame in given]
    shared = {"audio_positions": audio_positions(c, count, device)}
    shared["positions"] = torch.cat([places, *behind])
    given_tokens = None
    if request.images.frames:
        head = others[:, :0] if first is None else first
        made = others.new_zeros(1, len(places) - head.shape[1], others.shape[2])
        tokens = torch.cat([head, made, others, others.new_zeros(1, count, others.shape[2])], 1)
        spans = head.shape[1], made.shape[1], others.shape[1], count
        denoised = torch.tensor([False, True, False, True], device=device)
        denoised = denoised.repeat_interleave(torch.tensor(spans, device=device))
        given_tokens = GivenTokens(tokens, denoised[None, :, None])
        shared["frozen"] = ~denoised[None, :-count, None]

    def pack(x: Tensor) -> Tensor:
        return torch.cat([patchify(x, PATCH), others.to(x).expand(len(x), -1, -1)], 1)

    video = Latents(
        size=(vae.z_dim, *size),
        pack=pack,
        unpack=lambda x: unpatchify(x[:, : len(places)], PATCH, size),
    )
    sound = Latents(
        size=(audio_vae.latent_channels, count, audio_vae.latent_bins),
        pack=ltx2_audio.pack,
        unpack=partial(ltx2_audio.unpack, audio_vae),
        decode=partial(_sound, context),
    )
    branches = tuple(prompt | shared for prompt in prompts)
    if request.guidance.terms is None or request.guidance.branches == 1:
        return LoopInputs(branches, (video, sound), given_tokens)
    branches = guided_branches(
        c, request.guidance, request.guidance.terms, branches, (len(shared["positions"]), count)
    )
    return LoopInputs(branches, (video, sound), given_tokens, guidance="several")


def guided_branches(
    c: Any,
    guidance: Guidance,
    terms: GuidanceTerms,
    prompts: Sequence[Tensors],
    counts: tuple[int, int],
) -> tuple[Tensors, ...]:
    """The branches of a request with further terms of guidance, the prompt's first.

    counts: tokens of video and of sound.
    """
    device, layers = prompts[0]["positions"].device, c.num_layers
    whole = {"attends": torch.ones(layers, device=device), "hears": torch.ones(1, device=device)}
    made, pulls = [each | whole for each in prompts], list[tuple[float, float]]()
    if guidance.on:
        pulls.append((guidance.scale - 1, terms.audio_guidance_scale - 1))
    if guidance.perturbed:
        pulls.append((terms.stg_scale, terms.audio_stg_scale))
        left_out = torch.tensor(terms.spatio_temporal_guidance_blocks, device=device)
        made.append(made[0] | {"attends": whole["attends"].index_fill(0, left_out, 0)})
    if guidance.isolated:
        pulls.append((terms.modality_scale - 1, terms.audio_modality_scale - 1))
        made.append(made[0] | {"hears": torch.zeros(1, device=device)})
    shares = (terms.guidance_rescale, 1.0), (terms.audio_guidance_rescale, 1.0)
    read: Tensors = {}
    for kind, count, pull, share in zip(("", "_2"), counts, zip(*pulls, strict=True), shares, strict=True):
        read[f"pulls{kind}"] = torch.tensor(pull, dtype=torch.float64, device=device).repeat(1, count, 1)
        read[f"rescale{kind}"] = torch.tensor(share, dtype=torch.float64, device=device).repeat(1, count, 1)
    return tuple(each | read for each in made)


def mu(c: Any, tokens: int, steps: int, scheduler: Mapping[str, Any]) -> float | None:
    """Dynamic shift by the number of video tokens."""
    return shift_by_tokens(tokens, scheduler)


def extra_components(c: Any) -> tuple[str, ...]:
    """Components needed beside transformer, vae, text_encoder, tokenizer and scheduler."""
    return "connectors", "audio_vae", "vocoder"


def optional_components(c: Any) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """The latent upsampler, with which a request has two stages, and the head that tells how long a video is.

    The upsampler of LTX-2 has a plain layer more than the newer ones.
    """
    upsampler = {"use_rational_resampler": not c.gated_attn}
    return {
        "spatial_upsampler": ("LTX2LatentUpsamplerModel", upsampler),
        "duration_head": ("LTX2DurationHead", {}),
    }


def must_fit(c: Any, nets: Mapping[str, Any], row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What the transformer's config must say to fit the components around it: (field, value, why)."""
    yield "in_channels", nets["vae"].z_dim, "the vae's latents need"
    yield "audio_in_channels", nets["audio_vae"].values, "the audio_vae's latents need"
    if "spatial_upsampler" in nets:
        yield "in_channels", nets["spatial_upsampler"].in_channels, "the spatial_upsampler reads"
    yield "caption_channels", nets["text_encoder"].hidden_size, "the text encoder gives"
    if "duration_head" in nets:
        yield (
            "cross_attention_dim",
            nets["duration_head"].video_cross_attention_dim,
            "the duration_head reads",
        )
    if not c.use_prompt_embeddings:
        video, audio = nets["connectors"].sides
        yield "cross_attention_dim", video.width, "the connectors give"
        yield "audio_cross_attention_dim", audio.width, "the connectors give"
