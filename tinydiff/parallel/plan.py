"""The parallel plan: weight rows, placements, moves, and what is static about one process.

A family lists every weight once as a `Row`. The loader's check, random initialisation, sharding, memory
planning and FLOP counts all read these rows. Activations are resharded by named `Move`s, each a pair of
placements on one mesh axis. No torch here: `parallel/moves.py` carries out a move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import lcm, prod
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
    whatever the network's type is. stored: the type that it stays in, of 8 bits by torch's name, or one of
    `PACKED`, of which the row counts bytes. tied: a checkpoint may hold it under a second key too, or
    instead. head: width of the heads that lie along `split`, which are never cut.
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

    @property
    def stored_type(self) -> str | None:
        """Torch's name of the type that a weight stays in."""
        return "uint8" if self.stored in PACKED else self.stored


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
"""The leaf beside a weight that stays quantised: float32 [O, G], a scale for each of the G equal groups of a
row.
"""
PACKED = {
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34)},
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
    **{"IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17)},
    **{"NF4": (64, 36), "FP4": (64, 36), "NVFP4": (16, 9)},
}
"""Type whose values lie in blocks of a row -> values of a block, bytes of one (see `ops.packed`)."""
SCALED = ("NVFP4",)
"""Those with one more scale for a row in the leaf beside."""


def packed_leaf(stored: str) -> str:
    """The leaf in place of a weight in this packed type: its rows as bytes, uint8 [O, bytes of a row]."""
    return f"weight_{stored.lower()}"


def kept_rows(row: Row, stored: str, groups: int = 1) -> Iterator[Row]:
    """The rows of a weight [O, I] that stays in this type, torch's name of 8 bits or one of `PACKED`.

    Scales are divided over `tp` as the weight is; one scale of a row is the same for all its inputs.
    """
    if stored in PACKED:
        values, size = PACKED[stored]
        yield replace(
            _resized(row, values, size, lcm(row.head, values)),
            name=f"{row.name.removesuffix('weight')}{packed_leaf(stored)}",
            stored=stored,
        )
    else:
        yield replace(row, stored=stored)
    if stored in PACKED and stored not in SCALED:
        return
    scale = Row(scale_name(row.name), (row.shape[0], groups), float32=True)
    if row.split == 0:
        scale = replace(scale, split=0, parts=row.parts, head=row.head)
    elif row.split == 1 and groups > 1:
        width = row.shape[1] // groups
        parts = tuple(part // width for part in row.parts)
        scale = replace(scale, split=1, parts=parts, head=max(1, row.head // width))
    yield scale


def scale_name(weight: str) -> str:
    """The name of the scales of a weight."""
    return f"{weight.removesuffix('weight')}{WEIGHT_SCALE}"


def decoded_row(row: Row) -> Row:
    """The row of the weight that one in another type decodes to. A packed one has whole blocks for heads."""
    if row.stored is None:
        return row
    if row.stored not in PACKED:
        return replace(row, stored=None)
    values, size = PACKED[row.stored]
    name = f"{row.name.removesuffix(packed_leaf(row.stored))}weight"
    return replace(_resized(row, size, values, row.head), name=name, stored=None)


def _resized(row: Row, old: int, new: int, head: int) -> Row:
    """A matrix each of whose rows has `new` elements in place of each `old`. head: along the rows, in old
    elements.
    """
    made = replace(row, shape=(row.shape[0], row.shape[1] // old * new))
    if row.split != 1:
        return made
    return replace(made, parts=tuple(part // old * new for part in row.parts), head=head // old * new)


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
