"""Wan2.2 speech to video: from a sound, an image and past frames to the inputs of the loop.

A video is made in segments. Each hears its part of the sound and sees the last frames before it. Source: the
published code's `speech2video.py` and `audio_encoder.py`.

Shape letters: N samples, S states of the sound's encoder, C their width, T frames, B batch, P latent values
of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models import wan
from tinydiff.models.encoders import wav2vec2
from tinydiff.models.family import Hearing
from tinydiff.models.recipe import (
    Context,
    GivenTokens,
    LoopInputs,
    Net,
    Stage,
    as_frames,
    latent_size,
    on_grid,
)
from tinydiff.ops.patch import patchify
from tinydiff.ops.rope import grid_positions
from tinydiff.records import Output, Request, UserError

BUCKETS = ((1, (1, 2, 2), "proj"), (2, (2, 4, 4), "proj_2x"), (16, (4, 8, 8), "proj_4x"))
"""Past latent frames from the newest to the oldest: how many, their patch, and the layer that embeds it."""
PAST = sum(frames for frames, _, _ in BUCKETS)
"""Latent frames of the past that are read."""
REFERENCE_FRAME = 30
"""Where the reference image stands in time."""
STATE_RATE = 50
"""Feature vectors of the encoder per second of sound, as the published code counts them."""
HEARD_RATE = 30
"""States per second between which those of the frames are chosen."""
UNSEEN = 3
"""Frames at the start of the first segment that are not shown."""


def heard_states(c: wav2vec2.Config, samples: int) -> int:
    """How many states at `HEARD_RATE` a sound has. Raises UserError for one too short for any."""
    count = int(max(c.vectors(samples), 0) / STATE_RATE * HEARD_RATE)
    if count < 1:
        seconds = samples / wav2vec2.SAMPLE_RATE
        raise UserError("audio_path", f"audio_path: the sound has {seconds:.3f} seconds; give at least 0.1")
    return count


def states(net: Net[Any], sound_N: Tensor) -> Tensor:
    """Mono sound at 16 kHz -> all hidden states of its encoder, [S, C, T] at `HEARD_RATE`, float32 or wider.

    Raises UserError for a sound too short for one of them.
    """
    c = net.config
    count = heard_states(c, len(sound_N))
    heard = wav2vec2.encode(c, net.plan, net.w, wav2vec2.samples(c, sound_N))
    at_rate = torch.cat(heard).mT.to(torch.promote_types(heard[0].dtype, torch.float32))
    return F.interpolate(at_rate, size=count, mode="linear", align_corners=True)


def segments(heard: int, frames: int, fps: float) -> int:
    """How many segments of so many frames a sound of `heard` states has. What does not fill one gives one."""
    return int(heard / (frames * (HEARD_RATE / fps))) + 1


def length(configs: Mapping[str, Any], samples: int, frames: int, fps: int) -> int:
    """Frames of the video that is made to a sound. configs: of the components. frames: of a segment.

    It ends with the sound, or with the last segment where that is a little shorter.
    """
    count = segments(heard_states(configs["audio_encoder"], samples), frames, fps)
    return min(count * frames - UNSEEN, ceil(samples / wav2vec2.SAMPLE_RATE * fps))


HEARING = Hearing(wav2vec2.SAMPLE_RATE, length)


def of_frames(states_SCT: Tensor, frames: int, fps: float) -> list[Tensor]:
    """States at `HEARD_RATE` -> of each segment those of its frames, [1, S, C, frames]; zeros after the end.

    A frame hears the state nearest to its time.
    """
    heard = states_SCT.shape[2]
    count = segments(heard, frames, fps)
    total = max(heard, ceil(count * frames / fps * HEARD_RATE))
    times = numpy.linspace(0, count * frames / fps, count * frames, endpoint=False)
    chosen = numpy.clip(numpy.round(times * HEARD_RATE).astype(int), 0, total - 1).tolist()
    index = torch.tensor(chosen, dtype=torch.int64, device=states_SCT.device)
    found = states_SCT.index_select(2, index.clamp(max=heard - 1))
    return list(torch.split(found.masked_fill(index >= heard, 0)[None], frames, 3))


def with_past(c: Any, states_BSCT: Tensor) -> Tensor:
    """The states of a segment's frames, with those of past frames before them: the first, repeated."""
    first = states_BSCT[..., :1].expand(*states_BSCT.shape[:3], c.motion_frames)
    return torch.cat([first, states_BSCT], 3)


def layout(c: Any, size: tuple[int, int, int], past: bool) -> dict[str, Tensor]:
    """`positions`, `frozen` and `frames` of all tokens, inputs of `hoist`.

    size: (frames, height, width) of the video's latents. past: whether past frames stand behind the reference
    image. Theirs are negative times, and rows and columns of the video, evenly chosen.
    """
    frames, height, width = (n // p for n, p in zip(size, c.patch_size, strict=True))
    video = grid_positions(frames, height, width)
    behind = [grid_positions(1, height, width) + torch.tensor([REFERENCE_FRAME, 0, 0])]
    age = 0
    for count, patch, _ in BUCKETS if past else ():
        age += count
        axes = (
            -_spread(age, age - count + 1, count // patch[0]),
            _spread(0, height - 1, size[1] // patch[1]),
            _spread(0, width - 1, size[2] // patch[2]),
        )
        behind.append(torch.cartesian_prod(*axes))
    positions = torch.cat([video, *behind])
    frozen = torch.arange(len(positions)) >= len(video)
    return {
        "positions": positions,
        "frozen": frozen[None, :, None],
        "frames": torch.where(frozen, 0, positions[:, 0]),
    }


def _spread(first: int, last: int, count: int) -> Tensor:
    """`count` integers from `first` to `last`, rounded towards 0 as the reference does."""
    return torch.tensor(numpy.linspace(first, last, count).astype(int).tolist(), dtype=torch.int64)


def segment(
    c: Any,
    vae: Any,
    output: Output,
    texts: Sequence[Tensor],
    states_BSCT: Tensor,
    reference: Tensor,
    past: Tensor | None = None,
    pose: Tensor | None = None,
) -> LoopInputs:
    """The inputs of one segment's loop. With two texts, the second branch hears zeros.

    vae: the autoencoder's config. output: of one segment. texts: what the text encoder gives [1, T, width] of
    the prompt and the negative prompt. reference, past, pose: latents [1, C, F, H, W] of the image, of the
    past frames (None for the first segment) and of a pose video as long as the segment.
    """
    size, device = latent_size(vae, output), reference.device
    places = layout(c, size, past is not None)
    shared = {name: x.to(device) for name, x in places.items()}
    shared["reference"] = patchify(reference, c.patch_size)
    if past is not None:
        shared["motion"] = past
    if pose is not None:
        shared["pose"] = patchify(pose, c.patch_size)
    sound = with_past(c, states_BSCT)
    frozen = shared["frozen"]
    latents = shared["reference"].new_zeros(1, frozen.shape[1], shared["reference"].shape[2])
    branches = [
        shared | {"text": text, "audio": sound if i == 0 else torch.zeros_like(sound)}
        for i, text in enumerate(texts)
    ]
    return on_grid(branches, vae, output, c.patch_size, GivenTokens(latents, frozen.logical_not()))


def shown(reference: Tensor, latents: Tensor, past: Tensor | None) -> Tensor:
    """The latents [1, C, F, H, W] to decode for a segment's: behind those of the past, or of the image.

    Of what they decode to, the last frames are the segment's: `UNSEEN` fewer for the first one.
    """
    return torch.cat([reference if past is None else past, latents], 2)


def moved_on(past_BCTHW: Tensor, frames_BCTHW: Tensor) -> Tensor:
    """The pixels of the past frames after a segment whose frames these are: as many, the newest last."""
    return torch.cat([past_BCTHW, frames_BCTHW], 2)[:, :, -past_BCTHW.shape[2] :]


# --- the pipeline


@dataclass(frozen=True)
class Past:
    """What a segment continues."""

    pixels: Tensor
    """[1, 3, T, height, width] of the last frames."""
    latents: Tensor | None = None
    """Those of these frames; None before the first segment."""
    frames: tuple[numpy.ndarray, ...] = ()
    """Of each segment before, uint8."""


def prepare(c: Any, context: Context, request: Request) -> tuple[Stage, ...]:
    """A loop for each segment. All but the first continue what the one before made."""
    assert request.speech is not None, "admitted with a sound"
    vae, output = context.nets["vae"].config, request.output
    texts = [text[None] for text in wan.encode_texts(context, request)]
    sound = torch.as_tensor(request.speech.samples).to(context.device)
    heard = of_frames(states(context.nets["audio_encoder"], sound), output.num_frames, output.fps)
    image = context.pixels(request.images.resized)
    reference = context.encode(image)

    def inputs(states: Tensor, past: Past) -> LoopInputs:
        made = segment(c, vae, output, texts, states, reference, past.latents)
        return replace(made, frames=partial(frames, past), carried=past)

    def pixels(past: Past, latents: Tensor) -> Tensor:
        made = context.decode(shown(reference, latents, past.latents))[:, :, -output.num_frames :]
        return made[:, :, UNSEEN:] if past.latents is None else made

    def frames(past: Past, latents: Tensor) -> numpy.ndarray:
        return numpy.concatenate([*past.frames, as_frames(pixels(past, latents)[0])])[: output.length]

    def after(states: Tensor, before: LoopInputs, kinds: Sequence[Tensor]) -> LoopInputs:
        past, made = before.carried, pixels(before.carried, kinds[0])
        last = moved_on(past.pixels, made)
        return inputs(states, Past(last, context.encode(last), (*past.frames, as_frames(made[0]))))

    nothing = Past(image.new_zeros(1, 3, c.motion_frames, output.height, output.width))
    later = on_grid([], vae, output, c.patch_size)
    return (
        Stage(request, inputs(heard[0], nothing)),
        *(Stage(request, later, partial(after, states)) for states in heard[1:]),
    )
