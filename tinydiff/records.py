"""The frozen records that flow from request to result, and the one error a user's mistake raises. No torch
here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch


LONGEST = 200
"""Characters of a user's value that are compared with other names or shown in an error."""
MOST_SAID = 2000
"""Characters of an error's sentence."""


class UserError(ValueError):
    """A mistake of the user: one sentence that names the field, the value and what is allowed. `field` is the
    option's name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(
            field[:LONGEST], _one_line(message)
        )  # pickling and copying call the class with these again
        self.field = field[:LONGEST]

    def __str__(self) -> str:
        return self.args[1]


class RankError(RuntimeError):
    """What ended a job of several ranks where no user's mistake did: one sentence that names the rank."""


def _one_line(message: str) -> str:
    """A sentence without line breaks and other control characters; of one that is too long the middle is left
    out.
    """
    if len(message) > MOST_SAID:
        message = f"{message[: MOST_SAID - LONGEST]} … {message[-LONGEST:]}"
    return "".join(letter if letter.isprintable() else " " for letter in message)


def shown(value: Any) -> str:
    """A user's value as an error shows it: what Python writes for it, of a long one the beginning and the
    end.
    """
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return f"an integer of more than {LONGEST} digits"
    try:
        text = _brief.repr(value)
    except (
        ValueError
    ):  # Python does not write integers of more than 4,300 digits, these stand inside a list or a mapping
        return f"a {type(value).__name__} with an integer of more than {LONGEST} digits"
    return text if len(text) <= LONGEST + 2 else f"{text[:LONGEST]}…"


_brief = Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = LONGEST
_brief.maxlist = _brief.maxtuple = _brief.maxdict = 10


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint "; did you mean 'x'?" with the closest of `names`, or nothing when none is close."""
    found = difflib.get_close_matches(name[:LONGEST], list(names), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


@dataclass(frozen=True)
class Request:
    """One prompt with every parameter resolved and checked. Sizes in pixels; one image or video is made per
    seed.
    """

    prompt: str
    negative_prompt: str
    images: tuple[numpy.ndarray, ...]
    """Given frames, or the image to start from, uint8 [height, width, 3], already at the request's size."""
    originals: tuple[numpy.ndarray, ...]
    """The given images at their own sizes, for networks that have a size of their own; with alpha [H, W,
    4] where layers are made.
    """
    mask: numpy.ndarray | None
    """Where the given image is inpainted: uint8 [height, width], 255 there and 0 elsewhere. None:
    everywhere.
    """
    starts: bool
    """Whether the loop starts from the given image, made noisy; else the network is told of it."""
    strength: float
    """How much noise an image to start from gets, above 0 (it stays) to 1 (nothing of it is left)."""
    height: int
    width: int
    num_frames: int
    layers: int
    """Images with alpha that an image is taken apart into; 0 where it is made whole."""
    fps: int
    num_inference_steps: int
    guidance_scale: float
    """Of prompt against negative prompt; 1 does without."""
    embedded_guidance: float | None
    """What a network that learnt guidance is told of it."""
    cfg_normalization: float
    """How many times as long as the prompt's own prediction the guided one may be; 0 does not ask."""
    guidance_scale_2: float | None
    """The same for the second expert; read only where `guidance_scale` is above 1."""
    boundary_ratio: float | None
    flow_shift: float | None
    """None: what the scheduler says."""
    dmd_timesteps: tuple[int, ...]
    text_tokens: int
    """How many tokens of text the model reads at most."""
    seeds: tuple[int, ...]
    use_pe: bool = False
    """Whether the model's own language model rewrites the prompt before it is read."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its value came from, or why it is without effect, where that may surprise."""

    @property
    def guided(self) -> bool:
        """Whether a negative prompt takes part."""
        return self.guidance_scale > 1

    @property
    def texts(self) -> list[str]:
        """The prompt and, where it takes part, the negative prompt."""
        return [self.prompt, self.negative_prompt] if self.guided else [self.prompt]


@dataclass(frozen=True)
class Result:
    """What one request made."""

    frames: tuple[numpy.ndarray, ...]
    """Per seed: uint8 [frames, height, width, 3], or layers with alpha [layers, height, width, 4]."""
    latents: tuple[torch.Tensor, ...]
    """Per seed: the denoised latents [C, F, H, W] as the autoencoder takes them (F counts layers where there
    are), float32 on the CPU.
    """
    parameters: Mapping[str, Any]
    """Every effective parameter, JSON-able."""
    seeds: tuple[int, ...]
    seconds: Mapping[str, float]
    """Stage -> seconds, in order."""
    step_seconds: tuple[float, ...]
    """Seconds of each denoising step."""
    paths: tuple[Path, ...] = field(default=())
    """Files written, in the order of the seeds, and of the layers of each; empty when nothing was saved."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the request had no effect, a sentence each, such as how many tokens of the prompt were cut."""
        return tuple(self.parameters.get("warnings", ()))

    @property
    def images(self) -> tuple[numpy.ndarray, ...]:
        """The first frame of each output, uint8 [height, width, 3], or its first layer [height, width, 4]."""
        return tuple(clip[0] for clip in self.frames)
