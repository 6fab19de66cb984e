"""The contract between a model's files and the rest: one record per network.

A record has every function and fact that anything outside the family's file may ask for. A family's file ends
with its record, and `models.classes` maps a checkpoint's class names to records. Generic code reads records;
it never reads a field of one family's config and never compares names of families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from tinydiff.entries import Entries, EntryDict
from tinydiff.keymap import AS_IS, KeyMap
from tinydiff.models.recipe import Context, LoopInputs, Patch, Stage
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.network import Block, Config, Streams, Tensors
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row
from tinydiff.records import Request

Recipe = Callable[[Config, Context, Request], LoopInputs | tuple[Stage, ...]]
"""(config, context of the loaded model, request) -> the loop's inputs, or the stages of several loops."""
Keys = Callable[[Config], KeyMap]
"""config -> the map between rows and keys in a component's files."""
Read = Callable[[Entries, str], Config]
"""(entries of config.json, class name) -> config."""
States = tuple[int, ...] | Mapping[str, tuple[int, ...]]
"""Numbers of hidden states, or pipeline class -> those."""
HeadWidth = Callable[[Config], int]
Role = Literal["dit", "text_encoder", "image_encoder", "vae"]


def as_is(c: Config) -> KeyMap:
    """The map of files whose keys are the names of the rows."""
    return AS_IS


def no_components(c: Config) -> tuple[str, ...]:
    """No extra components."""
    return ()


def no_options(c: Config) -> Mapping[str, tuple[str, Entries]]:
    """No components that a user may add."""
    return {}


def no_shift(c: Config, tokens: int, steps: int, scheduler: Entries) -> float | None:
    """No dynamic shift of the schedule."""
    return None


def one_frame(c: Config, options: Entries) -> tuple[int, ...]:
    """A video may start from one input frame."""
    return (1,)


def no_tokens(c: Config, configs: Entries) -> int:
    """No tokens before those of the prompt."""
    return 0


def no_frames(c: Config) -> int:
    """All frames are shown."""
    return 0


def no_padding(tokens: int) -> int:
    """No pad tokens, whatever the number of tokens."""
    return 0


@dataclass(frozen=True)
class Hearing:
    """How a video is made to a given sound, in segments."""

    rate: int
    """Samples per second that are heard."""
    length: Callable[[Mapping[str, Any], int, int, int], int]
    """(configs of the components by name, samples, frames of a segment, frames per second) -> frames of the
    video. Raises UserError for a sound that is too short.
    """


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A family of denoisers: an `ops.network.Family` and everything that a pipeline asks for."""

    config: type[Any]
    """Reads config.json. An unknown field is an error at load."""
    spec: Callable[[Config], Iterator[Row]]
    """Every weight once."""
    conds: tuple[Cond, ...]
    """The tensors of a request that belong to no block."""
    hoist: Callable[[Config, Plan, Weights, Tensors, Tensor], tuple[Tensors, Tensors]]
    pre: Callable[[Config, Plan, Weights, Tensor, Weights, Tensors], Streams]
    blocks: Callable[[Config], Sequence[tuple[Block, str]]]
    post: Callable[[Config, Plan, Weights, Any, Weights, Tensors], Tensor]

    pipelines: Mapping[str, Recipe]
    """Pipeline class of model_index.json -> recipe."""
    patch: Callable[[Config], Patch]
    """Latents per token along frames, height and width."""
    heads: Callable[[Config], int]
    """Heads of attention, for keys as for queries."""
    head_width: HeadWidth
    must_fit: Callable[[Config, Entries, ReleasedModel], Iterator[tuple[str, int, str]]]
    """(config, configs of the components by name, row) -> (field, the value that it must have, why)."""

    pooled: bool = False
    """Whether the prompt enters the tensors of a step."""
    denoised_streams: int = 1
    """How many of the blocks' streams, counted from the last, are tokens that are denoised."""
    guidance: str = "classifier_free"
    """The rule that combines the velocities of two branches, a name in `sampling.guidance`."""
    extra_components: Callable[[Config], tuple[str, ...]] = no_components
    """Components that it needs beside transformer, vae, text_encoder, tokenizer and scheduler."""
    optional_components: Callable[[Config], Mapping[str, tuple[str, Entries]]] = no_options
    """Components that a user may add to the model: name -> (class, entries of its released config.json)."""
    hidden_states: Mapping[str, States] = field(default_factory=dict[str, States])
    """Language model -> the numbers of its hidden states that are read; negative numbers count from the end.

    By pipeline class where the pipelines differ.
    """
    mu: Callable[[Config, int, int, Entries], float | None] = no_shift
    """(config, image tokens, steps, scheduler_config.json) -> dynamic shift of the schedule."""
    linear_grid: bool = False
    """Whether the pipeline gives its scheduler the sigmas 1, 1 - 1/S, ..., 1/S."""
    own_grid: tuple[str, ...] = ()
    """Pipeline classes whose text to image uses the own sigmas of a scheduler with flow sigmas (UniPC)."""
    keys: Keys = as_is
    longest_side: Callable[[Config], int] | None = None
    """Most latents along height or width; None without a limit."""
    size_from_image: Callable[[Config, int, int, int], tuple[int, int]] | None = None
    """(config, height and width of the input image, multiple of pixels) -> height and width of the output.

    None where the output's size does not follow an input image. Raises UserError for an unusable image.
    """
    crops_images: bool = False
    """Whether an input image keeps its aspect: it is resized to cover the output and cut at its centre."""
    input_frames: Callable[[Config, Entries], tuple[int, ...]] = one_frame
    """(config, settings in model_index.json) -> the numbers of input frames a video may have.

    One is the first frame; two are the first and the last.
    """
    keyframes: bool = False
    """Whether an input image may stand at any frame of a video; `input_frames` does not count then."""
    config_overrides: Mapping[str, Entries] = field(default_factory=dict[str, Entries])
    """Component -> fields of its config that the pipeline sets, in place of those in config.json."""
    pad_tokens: Callable[[int], int] = no_padding
    """Tokens of an image or text -> pad tokens behind them."""
    leading_tokens: Callable[[Config, Entries], int] = no_tokens
    """(config, configs of the components by name) -> tokens of the text stream before those of the prompt."""
    unshown_frames: Callable[[Config], int] = no_frames
    """Frames at the start of a decoded video that are left out."""
    hearing: Hearing | None = None
    """None where a video is not made to a given sound."""

    role: ClassVar[Role] = "dit"
    biased: ClassVar[bool] = False
    read: ClassVar[Read | None] = None


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text, image or audio encoder. Recipes call the functions of its module.

    config: the type that `read` returns. head_width: of attention. biased: whether attention adds a bias or a
    mask. keys: where the rows stand in released files.
    """

    role: Role
    config: type[Any]
    spec: Callable[[Config], Iterator[Row]]
    head_width: HeadWidth
    biased: bool
    keys: Keys = as_is
    read: Read | None = None
    preprocessor: tuple[str, Callable[[Entries, Config], EntryDict]] | None = None
    """(component of the preprocessor's files, (their entries, config) -> fields of the config)."""


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder of images or video.

    encode: (config, weights, pixels [B, C, F, H, W] in [-1, 1], latent frames per pass, side of a tile in
    pixels, plan) -> latents. decode: the same from latents to pixels. up_stages: the decoder's stages, for
    estimates of its memory. keys: where the rows stand in released files. check_runnable: raises ValueError
    for a config that is enough to plan with but not to run.
    """

    config: type[Any]
    spec: Callable[[Config], Iterator[Row]]
    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    keys: Keys = as_is
    up_stages: Callable[[Config], Iterable[Any]] | None = None
    check_runnable: Callable[[Config], None] = lambda c: None
    peak: Callable[[Config, int, int, int], int] | None = None
    """(config, frames, height, width of the output) -> values alive at the peak of decoding it at once, for
    an autoencoder that `up_stages` does not describe. Every rank decodes it whole.
    """
    frames_per_pass: Callable[[Config], int] | None = None
    """Latent frames of a pass, where the result depends on them; None where the memory decides."""
    wide_norms: bool = False
    """Whether the norms of half types are computed in float32."""

    role: ClassVar[Role] = "vae"
    biased: ClassVar[bool] = False
    read: ClassVar[Read | None] = None
    head_width: ClassVar[HeadWidth | None] = None


@dataclass(frozen=True, eq=False)
class Vocoder:
    """What makes a waveform of a spectrogram.

    waveform: (config, weights, log-mel spectrogram [B, C, T, M]) -> waveform [B, C, N] at the config's
    `sampling_rate`. It has the type of the autoencoders.
    """

    config: type[Any]
    spec: Callable[[Config], Iterator[Row]]
    waveform: Callable[[Config, Weights, Tensor], Tensor]
    read: Read | None = None
    keys: Keys = as_is

    role: ClassVar[Role] = "vae"
    biased: ClassVar[bool] = False
    head_width: ClassVar[HeadWidth | None] = None


@dataclass(frozen=True, eq=False)
class Upsampler:
    """What makes the latents of a larger output of those of a smaller one, between two stages.

    It has the type of the autoencoders.
    """

    config: type[Any]
    spec: Callable[[Config], Iterator[Row]]
    keys: Keys = as_is

    role: ClassVar[Role] = "vae"
    biased: ClassVar[bool] = False
    read: ClassVar[Read | None] = None
    head_width: ClassVar[HeadWidth | None] = None


Record = Denoiser | Encoder | Autoencoder | Vocoder | Upsampler
