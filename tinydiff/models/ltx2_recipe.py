"""LTX-2's pipelines: text, or text and a first frame, to video with sound.

Gemma's states of the prompt go through the connectors to the prompts of both streams. The loop's tokens are
those of the video, then those of the sound, for as long as the video runs. Shape letters: B batch, L video
tokens, A sound tokens, P latent values of a token, T text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinydiff.models import vocoder
from tinydiff.models.autoencoders import ltx2_audio
from tinydiff.models.encoders import decoder_lm, ltx2_connectors
from tinydiff.models.recipe import (
    Context,
    GivenTokens,
    Latents,
    LoopInputs,
    latent_size,
    shift_by_tokens,
)
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.rope import grid_positions
from tinydiff.records import Output, Request, Sound

Tensors = dict[str, Tensor]
PATCH = (1, 1, 1)


def positions(
    c: Any, size: tuple[int, int, int], fps: float, device: torch.device | str | None = None
) -> Tensor:
    """Positions [L, 3] of the tokens of latents (frames, height, width): the middle of each in seconds and
    pixels, float32.

    The first latent frame holds one frame, each other one `vae_scale_factors[0]`.
    """
    grid = grid_positions(*size, device=device).float()
    strides = torch.tensor(c.vae_scale_factors, device=device)

    def edges(grid: Tensor) -> Tensor:
        pixels = grid * strides
        time = (pixels[:, 0] + c.causal_offset - c.vae_scale_factors[0]).clamp(min=0) / fps
        return torch.cat([time[:, None], pixels[:, 1:]], 1)

    return (edges(grid) + edges(grid + 1)) / 2.0


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


def prepare(c: Any, context: Context, request: Request) -> LoopInputs:
    """Loop inputs of video and sound. The tokens of a given first frame stay clean, at timestep 0."""
    vae, audio_vae = (context.nets[name].config for name in ("vae", "audio_vae"))
    size, device = latent_size(vae, request.output), context.device
    count = audio_tokens(audio_vae, request.output)
    places = positions(c, size, request.output.fps, device)
    shared = {"positions": places, "audio_positions": audio_positions(c, count, device)}
    given_tokens = None
    if request.images.resized:
        first = patchify(context.encode(context.pixels(request.images.resized)), PATCH)
        rest = first.new_zeros(1, len(places) + count - first.shape[1], first.shape[2])
        made = torch.arange(len(places) + count, device=device) >= first.shape[1]
        given_tokens = GivenTokens(torch.cat([first, rest], 1), made[None, :, None])
        shared["frozen"] = ~made[None, : len(places), None]
    video = Latents(
        size=(vae.z_dim, *size),
        pack=lambda x: patchify(x, PATCH),
        unpack=lambda x: unpatchify(x, PATCH, size),
    )
    sound = Latents(
        size=(audio_vae.latent_channels, count, audio_vae.latent_bins),
        pack=ltx2_audio.pack,
        unpack=partial(ltx2_audio.unpack, audio_vae),
        decode=partial(_sound, context),
    )
    branches = tuple(prompt | shared for prompt in _prompts(context, request))
    return LoopInputs(branches=branches, latents=(video, sound), given_tokens=given_tokens)


def mu(c: Any, tokens: int, steps: int, scheduler: Mapping[str, Any]) -> float | None:
    """Dynamic shift by the number of video tokens."""
    return shift_by_tokens(tokens, scheduler)


def extra_components(c: Any) -> tuple[str, ...]:
    """Components needed beside transformer, vae, text_encoder, tokenizer and scheduler."""
    return "connectors", "audio_vae", "vocoder"


def must_fit(c: Any, nets: Mapping[str, Any], row: ReleasedModel) -> Iterator[tuple[str, int, str]]:
    """What the transformer's config must say to fit the components around it: (field, value, why)."""
    yield "in_channels", nets["vae"].z_dim, "the vae's latents need"
    yield "audio_in_channels", nets["audio_vae"].values, "the audio_vae's latents need"
    yield "caption_channels", nets["text_encoder"].hidden_size, "the text encoder gives"
    if not c.use_prompt_embeddings:
        video, audio = nets["connectors"].sides
        yield "cross_attention_dim", video.width, "the connectors give"
        yield "audio_cross_attention_dim", audio.width, "the connectors give"
