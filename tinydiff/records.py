"""The frozen records of a request and its result, and the error of a user's mistake. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING

from tinydiff.entries import Entries, EntryDict

if TYPE_CHECKING:
    import numpy
    import torch


LONGEST = 200
"""Characters of a user's value that are compared with names and shown in an error."""
LONGEST_MESSAGE = 2000
"""Characters of an error message."""


class UserError(ValueError):
    """A mistake of the user: one sentence that names the field, the value and what is allowed.

    field: the option's name.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field[:LONGEST]
        super().__init__(self.field, _one_line(message))  # pickle and copy call the class with these again

    def __str__(self) -> str:
        return self.args[1]


class RankError(RuntimeError):
    """A run on several ranks failed, not by a user's mistake: one sentence that names the rank."""


def _one_line(message: str) -> str:
    """A message without line breaks and control characters; the middle of a long one is left out."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE - LONGEST]} … {message[-LONGEST:]}"
    return "".join(letter if letter.isprintable() else " " for letter in message)


def brief(value: object) -> str:
    """A user's value as an error message shows it: its repr, shortened if it is long."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return f"an integer of more than {LONGEST} digits"
    try:
        text = _brief.repr(value)
    except ValueError:  # a list or dict contains an integer of over 4,300 digits, which has no repr
        return f"a {type(value).__name__} with an integer of more than {LONGEST} digits"
    return text if len(text) <= LONGEST + 2 else f"{text[:LONGEST]}…"


_brief = Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = LONGEST
_brief.maxlist = _brief.maxtuple = _brief.maxdict = 10


def nearest(name: str, names: Iterable[str]) -> str:
    """The hint "; did you mean 'x'?" with the closest of `names`; "" if none is close."""
    matches = difflib.get_close_matches(name[:LONGEST], list(names), 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_known(field: str, name: str, names: Collection[str]) -> None:
    """Raises UserError, with the nearest of `names`, where `name` is none of them."""
    if name not in names:
        raise UserError(field, f"{field}: {name!r} is not one of {', '.join(names)}{nearest(name, names)}")


@dataclass(frozen=True)
class Text:
    """What the model reads."""

    prompt: str
    negative_prompt: str
    max_tokens: int
    """Most tokens of text that the model reads."""
    rewrite: bool = False
    """Whether the model's own language model rewrites the prompt."""


@dataclass(frozen=True)
class GuidanceTerms:
    """Further terms of guidance of a video and its sound, under diffusers' names.

    A scale of 1 is off, but 0 of `stg` and `rescale`.

    stg: against a pass in which attention to themselves is left out in some blocks (spatio-temporal
    guidance). modality: against a pass in which video and sound do not attend to each other. rescale: how far
    the guided prediction is brought back to the deviation of the prompt's own.
    """

    audio_guidance_scale: float = 1.0
    stg_scale: float = 0.0
    audio_stg_scale: float = 0.0
    modality_scale: float = 1.0
    audio_modality_scale: float = 1.0
    guidance_rescale: float = 0.0
    audio_guidance_rescale: float = 0.0
    spatio_temporal_guidance_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt steers."""

    scale: float = 1.0
    """Classifier-free guidance scale; 1 is no guidance."""
    scale_2: float | None = None
    """Guidance scale of the second expert; read only if `scale` is above 1."""
    embedded: float | None = None
    """Guidance scale that is an input of the network (guidance-distilled models)."""
    normalization: float = 0.0
    """Upper bound on the norm ratio guided / conditional; 0 is no bound."""
    terms: GuidanceTerms | None = None
    """None: classifier-free guidance alone, with one scale."""

    @property
    def on(self) -> bool:
        """Whether classifier-free guidance is on: the negative prompt is a second branch."""
        return self.scale > 1 or (self.terms is not None and self.terms.audio_guidance_scale > 1)

    @property
    def perturbed(self) -> bool:
        """Whether a branch leaves out attention in some blocks."""
        return self.terms is not None and max(self.terms.stg_scale, self.terms.audio_stg_scale) > 0

    @property
    def isolated(self) -> bool:
        """Whether video and sound do not attend to each other in a branch."""
        return self.terms is not None and max(self.terms.modality_scale, self.terms.audio_modality_scale) > 1

    @property
    def branches(self) -> int:
        """How many times the network is evaluated in a step."""
        return 1 + self.on + self.perturbed + self.isolated


@dataclass(frozen=True)
class Schedule:
    """The steps of a denoising loop."""

    steps: int
    sigmas: tuple[float, ...] = ()
    """Noise level of each step before the shift; empty where the model's own grid is used."""
    dmd_timesteps: tuple[int, ...] = ()
    """Timesteps of a distilled model; empty for the scheduler's."""
    flow_shift: float | None = None
    """None: that of the scheduler."""
    boundary_ratio: float | None = None
    """Where the second expert takes over, as a part of the training timesteps; None: never."""
    strength: float = 1.0
    """The part of the schedule that is run, from its end: near 0 what the loop starts from hardly changes."""

    @property
    def skipped(self) -> int:
        """How many steps at the beginning are left out."""
        return int(self.steps - self.steps * self.strength)


@dataclass(frozen=True)
class StepCache:
    """When a step takes over what most blocks changed in an earlier step, and does not run them."""

    first_blocks: int = 1
    """Blocks that run at every step. Their change is compared."""
    warmup: int = 4
    """Steps at the beginning that run all blocks."""
    threshold: float = 0.24
    """The change of the first blocks may differ by less than this part of the earlier step's."""
    most: int = 3
    """Steps one after another that take over at most; -1 sets no limit."""


@dataclass(frozen=True)
class Refinement:
    """A second denoising loop at the whole size, without guidance; the first makes half the height and width.

    An upsampler stands between the two.
    """

    sigmas: tuple[float, ...]
    """Noise level of each of its steps, taken as it is. The enlarged latents are noised to the first."""
    loras: Mapping[str, float] = field(default_factory=dict[str, float])
    """Adapter -> its strength in this loop; empty where each has the strength it was loaded with."""


@dataclass(frozen=True)
class InputImages:
    """The images of a request."""

    resized: tuple[numpy.ndarray, ...] = ()
    """Input frames, or the image to start from, uint8 [height, width, 3] at the output's size."""
    originals: tuple[numpy.ndarray, ...] = ()
    """The same at their own sizes, for networks that resize them; [H, W, 4] with alpha for layers."""
    mask: numpy.ndarray | None = None
    """Inpainting mask, uint8 [height, width]: 255 is inpainted, 0 is kept. None: no inpainting."""
    frames: tuple[int, ...] = ()
    """Of keyframes: the frame of the video at which each image stands, from 0."""
    start: bool = False
    """Whether the loop starts from the noised image; otherwise the images condition the network."""


@dataclass(frozen=True)
class Upscaling:
    """How the frames are enlarged. model: the file of the network. scale: of height and width."""

    model: Path
    scale: int


@dataclass(frozen=True)
class Interpolation:
    """How frames are added between those of a video."""

    model: Path
    """The file of the network."""
    exp: int
    """Each frame becomes 2 to the power of `exp` frames."""
    scale: float
    """Of the frames in which the network looks for motion."""
    scene_threshold: float
    """How far two frames differ at least where a scene ends, between which nothing is blended."""

    @property
    def factor(self) -> int:
        """Frames in the place of each."""
        return 2**self.exp


@dataclass(frozen=True)
class Frames:
    """Frames that are made one by one whenever they are iterated over, so that they need not all be held."""

    decoded: numpy.ndarray
    """What they are made from, uint8 [frames, height, width, 3 or 4]."""
    shape: tuple[int, int, int, int]
    """Of all of them together."""
    make: Callable[[], Iterator[numpy.ndarray]]
    seconds: Mapping[str, float]
    """Stage -> seconds spent in it so far."""

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[numpy.ndarray]:
        return self.make()

    def array(self) -> numpy.ndarray:
        """All of them in memory."""
        import numpy

        held = numpy.empty(self.shape, numpy.uint8)
        for index, frame in enumerate(self):
            held[index] = frame
        return held


@dataclass(frozen=True)
class Output:
    """What one seed gives: an image, a video or layers."""

    height: int
    width: int
    num_frames: int = 1
    layers: int = 0
    """Number of layers with alpha that the image is split into; 0 for an ordinary image."""
    fps: int = 16
    upscaling: Upscaling | None = None
    sound: bool = False
    """Whether the video has sound."""
    length: int | None = None
    """Frames of a video that is made in segments of `num_frames`; None: it is made at once."""
    seconds: tuple[float, float] | None = None
    """Least and most seconds of a video whose length follows from the prompt; `num_frames` is then the most
    frames until the prompt is read. None: the number of frames is given."""
    interpolation: Interpolation | None = None

    @property
    def factor(self) -> int:
        """Frames that are returned for each that is decoded; the rate grows as much, and the length stays."""
        return 1 if self.interpolation is None else self.interpolation.factor

    @property
    def decoded_frames(self) -> int:
        """Frames that the autoencoder makes and that are shown."""
        return self.num_frames if self.length is None else self.length

    @property
    def saved_frames(self) -> int:
        """Frames that are returned, after any interpolation."""
        return self.decoded_frames * self.factor

    @property
    def saved_fps(self) -> int:
        """Frames per second that are returned, after any interpolation."""
        return self.fps * self.factor

    @property
    def saved_size(self) -> tuple[int, int]:
        """Height and width of the frames that are returned, after any upscaling."""
        scale = 1 if self.upscaling is None else self.upscaling.scale
        return self.height * scale, self.width * scale


@dataclass(frozen=True)
class Sound:
    """The sound of an output."""

    samples: numpy.ndarray
    """float32 [samples, channels], in [-1, 1]."""
    rate: int
    """Samples per second."""


@dataclass(frozen=True)
class Speech:
    """A sound that a video is made to."""

    samples: numpy.ndarray
    """What the model hears: float32 [samples] in [-1, 1], at its own rate."""
    sound: Sound
    """What the video has."""


@dataclass(frozen=True)
class Request:
    """One prompt with every parameter resolved and checked. Each seed gives one output."""

    text: Text
    guidance: Guidance
    schedule: Schedule
    images: InputImages
    output: Output
    seeds: tuple[int, ...]
    loras: Mapping[str, float] = field(default_factory=dict[str, float])
    """Adapter -> its strength for this request; empty where each has the strength it was loaded with."""
    speech: Speech | None = None
    """None where no sound is given."""
    refinement: Refinement | None = None
    """None: one loop makes the output at once."""
    step_cache: StepCache | None = None
    """None: every step runs every block."""
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Option -> where its value came from, or why it has no effect, where that may surprise."""
    arguments: Entries = field(default_factory=EntryDict)
    """Arguments of the pipeline that runs it, where another library does."""

    @property
    def texts(self) -> list[str]:
        """The prompt and, with guidance, the negative prompt."""
        return [self.text.prompt, *([self.text.negative_prompt] if self.guidance.on else [])]


@dataclass(frozen=True)
class Result:
    """The outputs of one request."""

    frames: tuple[numpy.ndarray, ...]
    """For each seed: uint8 [frames, height, width, 3], or layers with alpha [layers, height, width, 4]."""
    latents: tuple[torch.Tensor, ...]
    """For each seed: the latents that the autoencoder decodes, [C, frames or layers, H, W], float32, CPU."""
    parameters: Entries
    """Every effective parameter, as JSON values."""
    seeds: tuple[int, ...]
    seconds: Mapping[str, float]
    """Stage -> seconds, in order."""
    step_seconds: tuple[float, ...]
    """Seconds of each denoising step."""
    paths: tuple[Path, ...] = field(default=())
    """Files written, by seed and layer, a WAV file behind its video; empty if nothing was saved."""
    sounds: tuple[Sound, ...] = ()
    """For each seed its sound; empty where none is made."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each part of the request without effect, such as cut tokens of the prompt."""
        return tuple(self.parameters.get("warnings", ()))

    @property
    def images(self) -> tuple[numpy.ndarray, ...]:
        """The first frame of each output, uint8 [height, width, 3], or its first layer [height, width, 4]."""
        return tuple(frames[0] for frames in self.frames)
