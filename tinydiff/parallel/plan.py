"""The parallel plan: weight rows, placements, moves, and what is static about one process.

A family lists every weight once as a `Row`. The loader's check, random initialisation, sharding, memory
planning and FLOP counts all read these rows. Activations are resharded by named `Move`s, each a pair of
placements on one mesh axis. No torch here: `parallel/moves.py` carries out a move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

Input = Literal["image", "text", "joint", "audio", "context", "steps", "prompt", "prompt_steps", "views"]
"""What passes through a weight of a denoiser.

At every step the tokens of a stream: "image" (or video), "text", "joint" for both, "audio" for sound beside a
video; or "context", the prompt's tokens, all of them on every rank. Once per request: "steps", one row
per step; "prompt", the prompt's tokens; "prompt_steps", these for each step; "views", an image encoder's
tokens of the input images.
"""
STREAMS = ("image", "text", "joint", "audio", "context")
"""The inputs of weights that every step reads."""


@dataclass(frozen=True)
class Row:
    """One weight of a checkpoint.

    name: the checkpoint's own key. shape: its full shape. split: the dimension divided over the `tp` axis,
    None when replicated.
    parts: widths of the blocks concatenated along `split`, each divided on its own. float32: stays float32
    whatever the network's type is. stored: torch's name of the 8-bit type that it stays in, with its scales
    in a row beside it. tied: a checkpoint may hold it under a second key too, or instead. head:
    width of the heads that lie along `split`, which are never cut.
    input: what passes through a denoiser's weight; None where costs neglect it. attends: of an attention's
    output projection, the tokens of its queries and of its keys.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    parts: tuple[int, ...] = ()
    float32: bool = False
    stored: str | None = None
    tied: bool = False
    head: int = 1
    input: Input | None = None
    attends: tuple[Input, Input] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Cond:
    """One tensor of a request, as a family's `hoist` returns it beside those that belong to a block.

    name: its key. stream: the tokens along its dimension `dim`, "image" or "text"; None where no dimension
    runs over tokens.
    shared: every block reads it.
    """

    name: str
    stream: str | None = None
    dim: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True)
class Shard:
    """Each rank holds an equal slice along `dim`."""

    dim: int


@dataclass(frozen=True)
class Partial:
    """Each rank holds a summand of the tensor."""


Placement = Replicate | Shard | Partial


@dataclass(frozen=True)
class Move:
    """Reshard an activation on mesh axis `axis` from one placement to another."""

    axis: str
    source: Placement
    target: Placement


MOVES: dict[str, Move] = {
    "heads": Move("ulysses", Shard(-3), Shard(-2)),
    "tokens": Move("ulysses", Shard(-2), Shard(-3)),
    "mask": Move("ulysses", Shard(-1), Replicate()),
    "sum": Move("tp", Partial(), Replicate()),
    "branches": Move("cfg", Shard(0), Replicate()),
}
"""The moves inside a transformer, on heads [..., L, H, E] (tokens L, heads H), masks [..., L] and branches of
guidance [N, ...].
"""


@dataclass(frozen=True)
class Group:
    """The ranks along one axis, from the view of one of them.

    name: torch.distributed's name of the process group.
    """

    name: str
    size: int
    rank: int


ALONE = Group("", 1, 0)


@dataclass(frozen=True)
class Plan:
    """What is static about how this process runs a network.

    The default is one device, where every move is the identity.

    attention: the backend's name, a key of `ops.attention.BACKENDS`. groups: the axes that more than one rank
    shares.
    """

    attention: str = "sdpa"
    groups: tuple[tuple[str, Group], ...] = ()

    def group(self, axis: str) -> Group:
        """This rank's group along an axis."""
        return dict(self.groups).get(axis, ALONE)

    def along(self, *axes: str) -> Plan:
        """The plan with these axes only."""
        return replace(self, groups=tuple((axis, group) for axis, group in self.groups if axis in axes))

    def without(self, *axes: str) -> Plan:
        """The plan without these axes."""
        return self.along(*(axis for axis, _ in self.groups if axis not in axes))


SINGLE = Plan()
"""The plan of one device."""


def linear_rows(
    name: str,
    fan_in: int,
    fan_out: int,
    split: str | None = None,
    *,
    bias: bool = True,
    parts: tuple[int, ...] = (),
    float32: bool = False,
    head: int = 1,
    attends: tuple[Input, Input] | None = None,
) -> Iterator[Row]:
    """Rows of a linear layer, weight [fan_out, fan_in] and bias [fan_out].

    split: "out" divides the outputs over `tp` (column parallel), "in" the inputs (row parallel).
    """
    dim = {"out": 0, "in": 1, None: None}[split]
    shape = (fan_out, fan_in)
    yield Row(f"{name}.weight", shape, dim, parts, float32, head=head, attends=attends)
    if bias:
        columns = split == "out"
        yield Row(
            f"{name}.bias", (fan_out,), 0 if columns else None, parts if columns else (), float32, head=head
        )


LORA_A, LORA_B, LORA_SCALE = "lora_a", "lora_b", "lora_scale"
"""The low-rank leaves beside a weight, and the strengths of their directions among a request's tensors."""


def low_rank_rows(row: Row, rank: int) -> Iterator[Row]:
    """Rows of the leaves beside a weight [O, ...]: lora_a [rank, I] and lora_b [O, rank].

    They are divided over `tp` as the weight is: lora_b by its outputs, or lora_a by its inputs.
    """
    stem, split = row.name.removesuffix("weight"), row.split
    down = Row(f"{stem}{LORA_A}", (rank, prod(row.shape[1:])), float32=row.float32)
    up = Row(f"{stem}{LORA_B}", (row.shape[0], rank), float32=row.float32)
    yield replace(down, split=1, parts=row.parts, head=row.head) if split == 1 else down
    yield replace(up, split=0, parts=row.parts, head=row.head) if split == 0 else up


WEIGHT_SCALE = "weight_scale"
"""The leaf beside a weight of 8 bits: float32 [O, G], a scale for each of the G equal groups of a row."""


def eight_bit_rows(row: Row, stored: str, groups: int = 1) -> Iterator[Row]:
    """A weight [O, I] that stays in this type of 8 bits, and the row of its scales.

    Scales are divided over `tp` as the weight is; one scale of a row is the same for all its inputs.
    """
    yield replace(row, stored=stored)
    scale = Row(f"{row.name.removesuffix('weight')}{WEIGHT_SCALE}", (row.shape[0], groups), float32=True)
    if row.split == 0:
        scale = replace(scale, split=0, parts=row.parts, head=row.head)
    elif row.split == 1 and groups > 1:
        width = row.shape[1] // groups
        parts = tuple(part // width for part in row.parts)
        scale = replace(scale, split=1, parts=parts, head=max(1, row.head // width))
    yield scale


def conv_rows(name: str, channels_in: int, channels_out: int, kernel: tuple[int, ...]) -> Iterator[Row]:
    """Rows of a convolution, weight [channels_out, channels_in, *kernel] and its bias."""
    yield Row(f"{name}.weight", (channels_out, channels_in, *kernel))
    yield Row(f"{name}.bias", (channels_out,))


def norm_rows(
    name: str, width: int, *, bias: bool = False, split: int | None = None, float32: bool = False
) -> Iterator[Row]:
    """Rows of a norm over `width`: its weight and, if asked, its bias."""
    yield Row(f"{name}.weight", (width,), split, float32=float32)
    if bias:
        yield Row(f"{name}.bias", (width,), split, float32=float32)


def through(tokens: Input, *groups: Iterable[Row]) -> Iterator[Row]:
    """The rows of all groups; `tokens` pass through each weight that does not say its input itself."""
    for rows in groups:
        for row in rows:
            unsaid = row.input is None and row.name.endswith("weight")
            yield replace(row, input=tokens) if unsaid else row


def under(prefix: str, *groups: Iterable[Row]) -> Iterator[Row]:
    """The rows of all groups, each name below `prefix`."""
    for rows in groups:
        for row in rows:
            yield replace(row, name=f"{prefix}.{row.name}")


def repeat(prefix: str, count: int, *groups: Iterable[Row]) -> Iterator[Row]:
    """The rows of all groups below `prefix.0` to `prefix.{count - 1}`."""
    rows = [row for group in groups for row in group]
    for index in range(count):
        yield from under(f"{prefix}.{index}", rows)
