"""The contract between a model family and the pipeline: `Context` in, `LoopInputs` out.

A family's record has a table `pipelines`: pipeline class of model_index.json -> prepare(config, context,
request) -> LoopInputs, or a `Stage` for each loop where the pipeline has several. So the runtime knows no
family by name. An output may have several kinds of `Latents`, such as video and sound. Shape letters: B
batch, C channels, F latent frames, H and W latent size, L tokens of the output, R tokens of references, P
latent values of a token, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import isqrt, prod, sqrt
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy
import torch
from torch import Tensor

from tinydiff import entries
from tinydiff.entries import Entries, EntryDict
from tinydiff.ops import store as stores
from tinydiff.ops.network import Config, Family, Network
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.dtensors import DTensor, Sharding, as_dtensors, full, replaced
from tinydiff.parallel.plan import Plan, Row
from tinydiff.records import Guidance, Output, Refinement, Request, Schedule, Sound, UserError

F = TypeVar("F")
"""A record of `models.family`."""
DENOISERS = ("transformer", "transformer_2")
"""Components that denoise, by the number of the expert in the table."""


@dataclass(frozen=True)
class Net(Generic[F]):
    """One network of a model in memory.

    family: its record (`models.family`). weights: flat, on their device, as this rank holds them. dtype: what
    it computes in.
    """

    family: F
    config: Config
    plan: Plan
    weights: dict[str, Tensor]
    dtype: torch.dtype
    generation: Entries = field(default_factory=EntryDict)
    """`generation_config.json`, of a language model that writes."""
    adapters: tuple[tuple[str, int], ...] = ()
    """(name, rank) of the adapters beside the weights, in their order along the low-rank leaves."""
    lora_scale: Tensor | None = None
    """[1, R]: one request's strength of each direction of those leaves."""
    sharding: Sharding | None = None
    """How the weights lie on several ranks; None where this process is alone."""
    store: stores.Store | None = None
    """Has the weights that are not on the device; in their place `weights` has meta tensors."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every weight of the checkpoint."""
        return tuple(cast(Any, self.family).spec(self.config))

    @property
    def dtensors(self) -> dict[str, DTensor]:
        """On several ranks: each weight by its own name, over the memory of `weights`."""
        if self.sharding is None:
            raise ValueError("the weights of one process alone are whole, not DTensors")
        return as_dtensors(self.weights, self.rows, self.plan, self.sharding)

    def whole(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Weights as a checkpoint has them, one at a time; all if none are named.

        All ranks run through this.
        """
        rows = [row for row in self.rows if names is None or row.name in names]
        if self.sharding is None:
            yield from ((row.name, self.weights[row.name]) for row in rows)
            return
        placed = self.dtensors
        for row in rows:
            yield row.name, full(placed[row.name], row, self.sharding)

    def with_weights(self, changed: Iterable[tuple[str, Tensor]]) -> Net[F]:
        """The network with other whole weights in place of some; what is not touched is shared."""
        if self.sharding is None:
            return replace(self, weights=self.weights | dict(changed))
        return replace(self, weights=replaced(self.weights, self.rows, self.plan, self.sharding, changed))

    @property
    def w(self) -> Weights:
        flat = stores.in_order(self.weights, self.store)
        return Weights(flat, dtype=self.dtype, lora_scale=self.lora_scale)

    @property
    def absent(self) -> bool:
        """Whether some of its weights are not on the device all the time."""
        return self.store is not None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(iter(self.weights.values())).device if self.store is None else self.store.device

    @property
    def network(self) -> Network:
        """A denoiser as the loop takes it."""
        return Network(cast(Family, self.family), self.config, self.plan, self.dtype)


class GivenTokens(NamedTuple):
    """Tokens with a known value: of the output (a first frame) or behind it (reference images)."""

    tokens: Tensor
    """[1, L or L + R, P]: the known values; arbitrary where a token is denoised."""
    denoised: Tensor
    """bool [1, L or L + R, 1], true for the tokens that the loop denoises."""


@dataclass(frozen=True)
class Context:
    """The parts of a loaded model that a recipe uses, for one request."""

    nets: Mapping[str, Net[Any]]
    tokens: Callable[..., tuple[Tensor, Tensor]]
    """(tokenizer's component name, texts, length or None, side, framed) -> ids and mask, int64 [B, T].

    side: where texts are padded to `length`, "left", "right" or None for what the tokenizer's files say;
    "none" pads to the longest text only. framed (default true): whether the tokens that open and close a
    text are added. The result is on the device.
    """
    tokenizers: Entries
    """Component name -> its tokenizer (`io.tokenizer.Tokenizer`), for ids by name and text of ids."""
    encode: Callable[[Tensor], Tensor]
    """Pixels [1, 3 or 4, N, height, width] in [-1, 1] -> the VAE's normalised latents [1, C, F, H, W]."""
    decode: Callable[[Tensor], Tensor]
    """Latents [N, C, F, H, W] -> pixels [N, 3 or 4, frames, height, width]."""
    resize: Callable[[numpy.ndarray, int, int], numpy.ndarray]
    """(uint8 image [height, width, 3 or 4], height, width) -> the image resized by Lanczos' filter."""
    options: Entries
    """The pipeline's own settings in model_index.json."""
    device: torch.device
    adapted: Callable[[Mapping[str, float]], Context]
    """Strengths of adapters -> the context of a stage that has these, or this one where they are the same."""

    def clip_tokens(self, net: str) -> int:
        """How many tokens of a text a CLIP reads: the first tokenizer's limit, at most the network's."""
        limit = self.nets[net].config.max_position_embeddings
        return min(self.tokenizers["tokenizer"].longest or limit, limit)

    def pixels(self, images: Sequence[numpy.ndarray]) -> Tensor:
        """uint8 images [height, width, C] of one size -> [1, C, N, height, width] in [-1, 1].

        The result has the autoencoder's type.
        """
        x = torch.as_tensor(numpy.stack(images)).to(self.device, self.nets["vae"].dtype)
        return (x / 127.5 - 1).permute(3, 0, 1, 2)[None]


def as_frames(pixels_CTHW: Tensor) -> numpy.ndarray:
    """Pixels in [-1, 1] -> frames uint8 [T, height, width, C] in the host's memory."""
    levels = ((pixels_CTHW.float() / 2 + 0.5) * 255).round()
    return levels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


@dataclass(frozen=True)
class Latents:
    """One kind of latents of an output, such as a video's or a sound's. The loop sees only their tokens."""

    size: tuple[int, ...]
    """Their size without B, in which noise is drawn: (C, F, H, W) of images and video.

    Another order of axes where the reference draws its noise in one.
    """
    pack: Callable[[Tensor], Tensor]
    """Latents [B, *size] -> tokens [B, L, P]."""
    unpack: Callable[[Tensor], Tensor]
    """Tokens [1, L, P] -> latents for the decoder; of video [N, C, F, H, W], where N images are layers."""
    decode: Callable[[Tensor], Sound] | None = None
    """Latents as `unpack` gives them -> sound. None: the autoencoder decodes them to frames."""

    @property
    def tokens(self) -> int:
        """How many tokens they have."""
        return self.pack(torch.empty(1, *self.size, device="meta")).shape[1]


@dataclass(frozen=True)
class LoopInputs:
    """The inputs of one denoising loop, except noise and the sampling table."""

    branches: tuple[dict[str, Tensor], ...]
    """Inputs of the family's `hoist`: for the prompt and, in a guided request, for the negative prompt."""
    latents: tuple[Latents, ...]
    """The kinds of latents of one output. The first is of its frames; noise is drawn in this order.

    In the loop the tokens of all kinds are one tensor [B, L, P], one kind after another. So all kinds have
    the same P, and `pre` and `post` of the family divide the tokens again where the kinds differ.
    """
    given_tokens: GivenTokens | None = None
    start: Tensor | None = None
    """Tokens [1, L, P] that the loop starts from, noised to the first sigma of its table."""
    mask: Tensor | None = None
    """[1, L, P], 1 where those tokens are inpainted, 0 where they stay."""
    guidance: str | None = None
    """A guidance rule by name, where the pipeline does not use its family's."""
    blended: tuple[Tensor, float] | None = None
    """(tokens [1, L, P], share): these tokens are this share of the noise that the loop starts from."""
    revised: str | None = None
    """The prompt as a language model rewrote or wrote it; None where none did."""
    frames: Callable[[Tensor], numpy.ndarray] | None = None
    """The first kind's latents -> all frames of the output, uint8 [frames, height, width, 3].

    None: the autoencoder decodes those latents, and they are the whole output.
    """
    carried: Any = None
    """What the recipe's next stage needs of this one beside its latents."""

    @property
    def kinds(self) -> tuple[int, ...]:
        """How many tokens each kind has, where there are several."""
        return tuple(kind.tokens for kind in self.latents) if len(self.latents) > 1 else ()

    def pack(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents of each kind [B, *size] -> tokens [B, L, P]."""
        tokens = [kind.pack(x) for kind, x in zip(self.latents, latents, strict=True)]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1)

    def unpack(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens [1, L, P] -> latents of each kind for its decoder."""
        ends = list(accumulate(kind.tokens for kind in self.latents[:-1]))
        parts = tokens.tensor_split(ends, 1)
        return tuple(kind.unpack(x) for kind, x in zip(self.latents, parts, strict=True))


@dataclass(frozen=True)
class Stage:
    """One denoising loop of a pipeline that has several.

    One may be at half the size before another, or each may make a part of a long video.
    """

    request: Request
    """What this loop is asked for. Size, schedule, guidance and strengths of adapters may be its own."""
    inputs: LoopInputs
    """As far as they are known before any loop has run. The kinds of latents are."""
    after: Callable[[LoopInputs, Sequence[Tensor]], LoopInputs] | None = None
    """Of a later stage: (inputs of the stage before, latents of each kind that it made) -> its own inputs.

    None: those above.
    """
    denoisers: tuple[str, ...] = DENOISERS
    """Components that denoise, by the number of the expert in the table."""


def half_size(context: Context, request: Request) -> Request:
    """What the first of two stages is asked for: half the height and width."""
    height, width = request.output.height // 2, request.output.width // 2
    images = tuple(context.resize(image, height, width) for image in request.images.originals)
    return replace(
        request,
        output=replace(request.output, height=height, width=width),
        images=replace(request.images, resized=images),
        refinement=None,
    )


def refined(request: Request, refinement: Refinement) -> Request:
    """What the second of two stages is asked for: the whole size, from the refinement's noise level on."""
    sigmas = refinement.sigmas
    return replace(
        request,
        schedule=Schedule(len(sigmas), sigmas, flow_shift=1.0),
        guidance=Guidance(),
        loras=refinement.loras,
        refinement=None,
    )


def latent_size(vae: Config, output: Output) -> tuple[int, int, int]:
    """The (F, H, W) of an output's latents. vae: the autoencoder's config."""
    stride = vae.scale_factor_spatial
    return (
        (output.num_frames - 1) // vae.scale_factor_temporal + 1,
        output.height // stride,
        output.width // stride,
    )


def frames_between(seconds: float, least: float, most: float, fps: float, stride: int) -> int:
    """The number of frames of a video of so many seconds, within bounds in seconds: stride * k + 1.

    Where no such number is within the bounds, it is the nearest one.
    """
    lowest, highest = max(1, round(least * fps)), round(most * fps)
    wanted = max(lowest, min(round(min(seconds, most) * fps), highest))
    below = (wanted - 1) // stride * stride + 1
    above = below + stride
    nearer = abs(above - wanted) < abs(below - wanted)
    return above if below < lowest and (above <= highest or nearer) else below


def rectangle_side(area: int, along: int, across: int) -> int:
    """One side of a rectangle of about `area` pixels and aspect along:across, in pixels.

    This is the integer nearest to sqrt(area * along / across), found among integers, since the
    floating-point root of 480 * 832 * 480 / 832 is 479.9999.
    """
    return (isqrt(4 * area * along // across) + 1) // 2


def fit_area(area: int, height: int, width: int, multiple: int = 32) -> tuple[int, int]:
    """The (height, width) of about `area` pixels nearest to an image's aspect, as multiples of `multiple`.

    Source: `calculate_dimensions` of diffusers' Qwen-Image pipelines. Raises UserError where a side would
    round to zero.
    """
    ratio = width / height
    wide = sqrt(area * ratio)
    sides = wide / ratio, wide
    if min(sides) < multiple / 2:
        raise too_elongated(height, width)
    tall, wide = (max(1, round(side / multiple)) * multiple for side in sides)
    return tall, wide


def too_elongated(height: int, width: int) -> UserError:
    """The error of an input image whose aspect no output of the model can have."""
    image = f"the input image is {width}x{height} pixels"
    return UserError(
        "image_path", f"image_path: {image}, too long for this model to keep its aspect; crop it"
    )


Patch = tuple[int, int, int]
"""Latents per token along frames, height and width."""


def token_count(vae: Config, output: Output, patch: Patch) -> int:
    """How many tokens an output's latents have."""
    return prod(n // p for n, p in zip(latent_size(vae, output), patch, strict=True))


def on_grid(
    branches: Sequence[dict[str, Tensor]],
    vae: Config,
    output: Output,
    patch: Patch,
    given_tokens: GivenTokens | None = None,
    blended: tuple[Tensor, float] | None = None,
) -> LoopInputs:
    """The inputs of a request whose tokens are the patches of its output's latents, packed by `ops.patch`."""
    size = latent_size(vae, output)
    return LoopInputs(
        branches=tuple(branches),
        latents=(
            Latents(
                size=(vae.z_dim, *size),
                pack=lambda x: patchify(x, patch),
                unpack=lambda x: unpatchify(x, patch, size),
            ),
        ),
        given_tokens=given_tokens,
        blended=blended,
    )


def first_frame(latents: Tensor, frames: int) -> Tensor:
    """Latents of an image [B, C, 1, H, W] -> [B, C, F, H, W], zeros in the other frames."""
    batch, channels, _, *size = latents.shape
    return torch.cat([latents, latents.new_zeros(batch, channels, frames - 1, *size)], 2)


def reference_tokens(output_tokens: int, references: Sequence[Tensor]) -> GivenTokens | None:
    """The reference images' tokens [1, R, P] behind the output's; None without references.

    output_tokens: how many tokens the output has.
    """
    if not references:
        return None
    behind = torch.cat(list(references), 1)
    tokens = torch.cat([behind.new_zeros(1, output_tokens, behind.shape[2]), behind], 1)
    denoised = torch.arange(tokens.shape[1], device=tokens.device) < output_tokens
    return GivenTokens(tokens, denoised[None, :, None])


def shift_by_tokens(tokens: int, scheduler: Entries, max_shift: float = 1.15) -> float:
    """mu of a dynamic shift by the number of image tokens: a line through two points of the config.

    scheduler: entries of scheduler_config.json. Source: `calculate_shift` of diffusers' pipelines, with
    its defaults. Raises UserError for points that make no line.
    """
    lengths = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    shifts = {"base_shift": 0.5, "max_shift": max_shift}
    try:
        fewest, most = (entries.value(name, int, scheduler.get(name, n)) for name, n in lengths.items())
        low, high = (entries.value(name, float, scheduler.get(name, value)) for name, value in shifts.items())
        if fewest == most:
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {most}; they must differ")
    except ValueError as error:
        raise UserError("scheduler", f"scheduler: {error}") from error
    slope = (high - low) / (most - fewest)
    return tokens * slope + (low - slope * fewest)
