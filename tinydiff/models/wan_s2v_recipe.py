"""Wan2.2 speech to video: from a sound, an image and past frames to the inputs of the loop.

A video is made in segments. Each hears its part of the sound and sees the last frames before it. Source: the
published code's `speech2video.py` and `audio_encoder.py`.

Shape letters: N samples, S states of the sound's encoder, C their width, T frames, B batch, P latent values
of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydiff.models import wan_s2v
from tinydiff.models.encoders import wav2vec2
from tinydiff.models.recipe import GivenTokens, LoopInputs, Net, latent_size, on_grid
from tinydiff.ops.patch import patchify
from tinydiff.records import Output, UserError

STATE_RATE = 50
"""Feature vectors of the encoder per second of sound, as the published code counts them."""
HEARD_RATE = 30
"""States per second between which those of the frames are chosen."""
UNSEEN = 3
"""Frames at the start of the first segment that are not shown."""


def states(net: Net[Any], sound_N: Tensor) -> Tensor:
    """Mono sound at 16 kHz -> all hidden states of its encoder, [S, C, T] at `HEARD_RATE`, float32 or wider.

    Raises UserError for a sound too short for one of them.
    """
    c = net.config
    vectors = c.vectors(len(sound_N))
    count = int(max(vectors, 0) / STATE_RATE * HEARD_RATE)
    if count < 1:
        seconds = len(sound_N) / wav2vec2.SAMPLE_RATE
        raise UserError("audio_path", f"audio_path: the sound has {seconds:.3f} seconds; give at least 0.1")
    heard = wav2vec2.encode(c, net.plan, net.w, wav2vec2.samples(c, sound_N))
    at_rate = torch.cat(heard).mT.to(torch.promote_types(heard[0].dtype, torch.float32))
    return F.interpolate(at_rate, size=count, mode="linear", align_corners=True)


def segments(heard: int, frames: int, fps: float) -> int:
    """How many segments of so many frames a sound of `heard` states has. What does not fill one gives one."""
    return int(heard / (frames * (HEARD_RATE / fps))) + 1


def of_frames(states_SCT: Tensor, frames: int, fps: float) -> list[Tensor]:
    """States at `HEARD_RATE` -> of each segment those of its frames, [1, S, C, frames]; zeros after the end.

    A frame hears the state nearest to its time.
    """
    import numpy as np

    heard = states_SCT.shape[2]
    count = segments(heard, frames, fps)
    total = max(heard, ceil(count * frames / fps * HEARD_RATE))
    times = np.linspace(0, count * frames / fps, count * frames, endpoint=False)
    chosen = np.clip(np.round(times * HEARD_RATE).astype(int), 0, total - 1).tolist()
    index = torch.tensor(chosen, dtype=torch.int64, device=states_SCT.device)
    found = states_SCT.index_select(2, index.clamp(max=heard - 1))
    return list(torch.split(found.masked_fill(index >= heard, 0)[None], frames, 3))


def with_past(c: wan_s2v.Config, states_BSCT: Tensor) -> Tensor:
    """The states of a segment's frames, with those of past frames before them: the first, repeated."""
    first = states_BSCT[..., :1].expand(*states_BSCT.shape[:3], c.motion_frames)
    return torch.cat([first, states_BSCT], 3)


def segment(
    c: wan_s2v.Config,
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
    places = wan_s2v.layout(c, size, past is not None)
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
