"""The frozen records that flow from request to result, and the one error a user's mistake raises. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch


class UserError(ValueError):
    """A mistake of the user: one sentence that names the field, the value and what is allowed. `field` is the option's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint "; did you mean 'x'?" with the closest of `names`, or nothing when none is close."""
    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


@dataclass(frozen=True)
class Request:
    """One prompt with every parameter resolved and checked. Sizes in pixels; one picture or clip is made per seed."""

    prompt: str
    negative_prompt: str
    images: tuple[numpy.ndarray, ...]
    """Given frames, uint8 [height, width, 3], already at the request's size: none, the first, or the first and the last."""
    originals: tuple[numpy.ndarray, ...]
    """The same pictures at their own sizes, for encoders that have a size of their own."""
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    flow_shift: float
    dmd_timesteps: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def guided(self) -> bool:
        """Whether a negative prompt takes part."""
        return max(self.guidance_scale, self.guidance_scale_2 or 0.0) > 1


@dataclass(frozen=True)
class Result:
    """What one request made."""

    frames: tuple[numpy.ndarray, ...]
    """Per seed: uint8 [frames, height, width, 3]."""
    latents: tuple[torch.Tensor, ...]
    """Per seed: the denoised latents [C, F, H, W] as the autoencoder takes them, float32 on the CPU."""
    parameters: Mapping[str, Any]
    """Every effective parameter, JSON-able."""
    seeds: tuple[int, ...]
    seconds: Mapping[str, float]
    """Stage -> seconds, in order."""
    step_seconds: tuple[float, ...]
    """Seconds of each denoising step."""
    paths: tuple[Path, ...] = field(default=())
    """Files written, in the order of the seeds; empty when nothing was saved."""

    @property
    def images(self) -> tuple[numpy.ndarray, ...]:
        """The first frame of each output, uint8 [height, width, 3]."""
        return tuple(clip[0] for clip in self.frames)
