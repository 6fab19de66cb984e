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

from tinydiff.keymap import AS_IS, KeyMap
from tinydiff.models.recipe import Context, LoopInputs, Patch
from tinydiff.models.registry import ReleasedModel
from tinydiff.ops.network import Block, Streams, Tensors
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Cond, Plan, Row
from tinydiff.records import Request

Config = Any
"""A family's own frozen dataclass. Its fields are the names in the checkpoint's config.json."""
Recipe = Callable[[Config, Context, Request], LoopInputs]
"""(config, the model's loaded parts, request) -> the request in the family's own terms."""
Keys = Callable[[Config], KeyMap]
"""config -> where the rows stand in the files of a component's directory."""
Read = Callable[[Mapping[str, Any], str], Config]
"""(entries of config.json, class name) -> config."""
HeadWidth = Callable[[Config], int]
Role = Literal["dit", "text_encoder", "image_encoder", "vae"]


def as_is(c: Config) -> KeyMap:
    """A network whose files have the names of its rows."""
    return AS_IS


def no_components(c: Config) -> tuple[str, ...]:
    """A family that needs no component beside the usual ones."""
    return ()


def no_shift(c: Config, tokens: int, steps: int, scheduler: Mapping[str, Any]) -> float | None:
    """A family whose schedule does not move with the size of the image."""
    return None


def one_frame(c: Config, options: Mapping[str, Any]) -> tuple[int, ...]:
    """A family whose videos start from one given frame."""
    return (1,)


def no_pads(tokens: int) -> int:
    """A family whose sequences may have any length."""
    return 0


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A family of denoisers: an `ops.network.Family`, and what a pipeline needs of it."""

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
    """Latents to a token along frames, height and width."""
    heads: Callable[[Config], int]
    """Heads of attention, for keys as for queries."""
    head_width: HeadWidth
    must_fit: Callable[[Config, Mapping[str, Any], ReleasedModel], Iterator[tuple[str, int, str]]]
    """(config, configs of the components by name, row) -> (field, the value that it must have, why)."""

    pooled: bool = False
    """Whether the prompt enters the tensors of a step."""
    guidance: str = "classifier_free"
    """How the velocities of two branches become one, a name in `sampling.guidance`."""
    needs: Callable[[Config], tuple[str, ...]] = no_components
    """Components needed beside transformer, vae, text_encoder, tokenizer and scheduler."""
    hidden_states: Mapping[str, tuple[int, ...] | Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """Language model -> the numbers of its hidden states that are read; negative numbers count from the end.

    By pipeline class where the pipelines differ.
    """
    mu: Callable[[Config, int, int, Mapping[str, Any]], float | None] = no_shift
    """(config, image tokens, steps, scheduler_config.json) -> dynamic shift of the schedule."""
    linear_grid: bool = False
    """Whether the pipeline hands its scheduler the sigmas 1, 1 - 1/S, ..., 1/S."""
    own_grid: tuple[str, ...] = ()
    """Pipeline classes that, from text, leave a scheduler with flow sigmas (UniPC) its own grid."""
    keys: Keys = as_is
    longest_side: Callable[[Config], int] | None = None
    """Most latent pixels along a side; None where there is no limit."""
    given_size: Callable[[int, int, int], tuple[int, int]] | None = None
    """(height and width of the input image, multiple of pixels) -> height and width of the output.

    None where the output's size does not follow an input image. Raises UserError for an unusable image.
    """
    given_frames: Callable[[Config, Mapping[str, Any]], tuple[int, ...]] = one_frame
    """(config, settings in model_index.json) -> the numbers of input frames a video may have.

    One is the first frame; two are the first and the last.
    """
    settles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Component -> fields of its config that the pipeline sets, whatever its config.json says."""
    pads: Callable[[int], int] = no_pads
    """Tokens of an image or text -> tokens that are added to fill the sequence."""
    texts_before: tuple[str, ...] = ()
    """Text encoders whose tokens stand before those that `text_tokens` counts."""

    role: ClassVar[Role] = "dit"
    biased: ClassVar[bool] = False
    read: ClassVar[Read | None] = None


@dataclass(frozen=True, eq=False)
class Encoder:
    """A network that reads a prompt or looks at an image; the recipes call its own functions.

    role: "text_encoder" or "image_encoder". config: what `read` makes of the entries of config.json.
    head_width: of attention. biased: whether its attention adds a bias or mask. keys: the spellings of released files.
    """

    role: Role
    config: type[Any]
    spec: Callable[[Config], Iterator[Row]]
    head_width: HeadWidth
    biased: bool
    keys: Keys = as_is
    read: Read | None = None
    longest: Callable[[Config], int] | None = None
    """Tokens of a text that it reads at most, where the network has places for no more."""
    preprocessor: tuple[str, Callable[[Mapping[str, Any], Config], dict[str, Any]]] | None = None
    """(component of the preprocessor's files, (their entries, config) -> fields of the config)."""


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder of images or video.

    encode: (config, weights, pixels [B, C, F, H, W] in [-1, 1], latent frames of a pass, side of a tile in
    pixels, plan) -> latents.
    decode: the same from latents to pixels. up_stages: the decoder's stages, where its memory is known.
    keys: the spellings of released files.
    runs: raises ValueError for a config that is enough to plan with and not to run.
    """

    config: type[Any]
    spec: Callable[[Config], Iterator[Row]]
    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    keys: Keys = as_is
    up_stages: Callable[[Config], Iterable[Any]] | None = None
    runs: Callable[[Config], None] = lambda c: None

    role: ClassVar[Role] = "vae"
    biased: ClassVar[bool] = False
    read: ClassVar[Read | None] = None
    head_width: ClassVar[HeadWidth | None] = None


Record = Denoiser | Encoder | Autoencoder
