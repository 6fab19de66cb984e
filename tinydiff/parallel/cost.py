"""The cost of a layout for one of its ranks, by arithmetic alone.

It is bytes of weights and activations, operations, bytes sent, and seconds of a step.

Names: B images, E head width, b bytes of a value, U ranks of ulysses, R ranks of ring; n tokens of a stream
on one rank (text and image tokens are each sharded over R U ranks, rounded up). D is the width of all heads
on one rank after tp, their number padded to a multiple of U. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from tinydiff.parallel.layout import Layout
from tinydiff.parallel.plan import PACKED, STREAMS, Input, Row, decoded_row


@dataclass(frozen=True)
class CostModel:
    """What the cost of a denoiser depends on.

    rows: every weight; `Row.input` says what passes through it. blocks: the weights of each block. values: of
    the velocity of one token. pooled: whether text enters the per-step tensors, so that each branch has its
    own.
    """

    rows: tuple[Row, ...]
    blocks: tuple[tuple[Row, ...], ...]
    heads: int
    head_width: int
    values: int
    pooled: bool = False

    @cached_property
    def inputs(self) -> dict[str, Input]:
        """Name of each weight that multiplies its input -> that input."""
        return {row.name: row.input for row in self.layers if row.input is not None and len(row.shape) > 1}

    @cached_property
    def layers(self) -> list[Row]:
        """The weights as they are multiplied, decoded where they stay quantised."""
        return [decoded_row(row) for row in self.rows]

    @property
    def norms(self) -> list[Input]:
        """The inputs of norms over all heads that every step computes, whose squares tp sums."""
        rows = (row for row in self.rows if len(row.shape) == 1 and row.split == 0)
        return [row.input for row in rows if row.input in STREAMS]

    @cached_property
    def attends(self) -> list[tuple[Input, Input, int]]:
        """The queries and the keys of each attention, and the width of all its heads.

        Every rank holds all of "prompt" and "views".
        """
        return [(*row.attends, _attended_width(row)) for row in self.layers if row.attends is not None]

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @cached_property
    def streamed(self) -> list[tuple[str, str]]:
        """The weights that every step reads, with their streams."""
        return [(name, stream) for name, stream in self.inputs.items() if stream in STREAMS]

    @property
    def carried(self) -> str:
        """The stream that blocks pass on."""
        return "joint" if {"joint", "text"} & {stream for _, stream in self.streamed} else "image"


@dataclass(frozen=True)
class Work:
    """The size of a request. image: image tokens, with those of references. text: tokens of a prompt. views:
    tokens of an image that its own encoder reads. audio: tokens of sound beside a video. images: images of a
    batch. branches: branches of guidance. steps: steps of the whole request.
    """

    image: int
    text: int
    views: int = 0
    images: int = 1
    branches: int = 1
    steps: int = 1
    audio: int = 0

    def local_tokens(self, stream: str, layout: Layout) -> int:
        """Tokens of a stream on one rank."""
        if stream == "joint":
            return self.local_tokens("text", layout) + self.local_tokens("image", layout)
        if stream == "context":
            return self.text
        return ceil(getattr(self, stream) / layout.sequence)

    def keys(self, stream: str) -> int:
        """Tokens that a query attends to."""
        return {
            "image": self.image,
            "joint": self.image + self.text,
            "audio": self.audio,
            "prompt": self.text,
            "views": self.views,
        }[stream]

    def evaluations(self, layout: Layout) -> int:
        """Branches that one rank evaluates in a step."""
        return ceil(self.branches / layout.cfg)


@dataclass(frozen=True)
class Machine:
    """What a layout runs on.

    tflops: 10^12 operations per second that a rank reaches. link, net: 10^9 bytes per second that a rank
    sends to ranks of its own machine, and to ranks of another. ranks: of one machine.
    """

    tflops: float = 400.0
    link: float = 300.0
    net: float = 25.0
    ranks: int = 8


# --- weights ---


def numel(row: Row, tp: int = 1) -> int:
    """Values of a weight on one of `tp` ranks."""
    return row.numel if row.split is None else ceil(row.numel / tp)


def itemsize(row: Row, b: int) -> int:
    """Bytes of a value of a weight. b: those of the network's type."""
    return 1 if row.stored else 4 if row.float32 else b


def weight_bytes(rows: Iterable[Row], b: int, tp: int = 1) -> int:
    """Bytes of weights on one rank. Optional weights are not counted."""
    return sum(numel(row, tp) * itemsize(row, b) for row in rows)


def decoded_bytes(rows: Iterable[Row], tp: int = 1) -> int:
    """Bytes of the largest quantised weight while it is decoded.

    Its values are there twice in float32, before and after the last operation, beside the codes of a packed
    one.
    """
    sizes = ((9 if row.stored in PACKED else 8) * numel(decoded_row(row), tp) for row in rows if row.stored)
    return max(sizes, default=0)


def shard_count(layout: Layout) -> int:
    """Ranks that shard the weights of a block under full sharding."""
    return layout.cfg * layout.sequence if layout.fsdp else 1


def shard_bytes(rows: Iterable[Row], layout: Layout, b: int) -> int:
    """Bytes of a block's weights that one rank keeps under full sharding.

    Each weight is sharded along its first dimension, rounded up.
    """
    total = 0
    for row in rows:
        first = row.shape[0] // layout.tp if row.split == 0 else row.shape[0]
        total += ceil(first / shard_count(layout)) * (numel(row, layout.tp) // first) * itemsize(row, b)
    return total


def denoiser_bytes(net: CostModel, layout: Layout, b: int, experts: int = 1) -> int:
    """Bytes of weights on one rank, for one network or several of the same shape.

    Under full sharding: this rank's shards, and two whole blocks, the one that computes and the one being
    fetched.
    """
    if shard_count(layout) == 1:
        return experts * weight_bytes(net.rows, b, layout.tp)
    packed = {row.name for rows in net.blocks for row in rows}
    rest = weight_bytes((row for row in net.rows if row.name not in packed), b, layout.tp)
    kept = rest + sum(shard_bytes(rows, layout, b) for rows in net.blocks)
    return experts * kept + 2 * max(weight_bytes(rows, b, layout.tp) for rows in net.blocks)


# --- activations ---


def activation_bytes(net: CostModel, layout: Layout, work: Work, b: int) -> int:
    """Bytes that a step needs beside weights and hoisted tensors, approximately.

    They are the streams of all branches that are evaluated side by side, n (heads E) b each; for one block of
    one branch, six more of these (a norm and its modulation, computed in float32) and the outputs of its
    column-parallel layers, n out / tp b; and of the latents, the two previous clean ones and the velocities,
    4 bytes a value.
    """
    streamed = dict(net.streamed)
    one = work.local_tokens(net.carried, layout) * net.width * b
    given = max(
        sum(
            work.local_tokens(streamed[row.name], layout) * output_values(row, layout.tp) * b
            for row in map(decoded_row, rows)
            if row.split == 0 and row.name in streamed
        )
        for rows in net.blocks
    )
    latents = work.local_tokens("image", layout) * net.values * 4 * (3 + work.branches)
    return work.images * ((work.evaluations(layout) + 6) * one + given + latents)


def hoisted_bytes(net: CostModel, layout: Layout, work: Work, b: int) -> int:
    """Bytes of what is computed once before the loop.

    A row per step from each "steps" layer, once for all branches unless text enters them; the results of
    "prompt" and "views" layers for each branch, those of "prompt_steps" for each step too; the rope tables, 4
    bytes a value.
    """
    each = work.evaluations(layout)
    rows = {row.name: row for row in net.layers}
    values = dict.fromkeys(("steps", "prompt", "prompt_steps", "views"), 0)
    for name, kind in net.inputs.items():
        if kind in values:
            values[kind] += output_values(rows[name], layout.tp)
    tables = work.steps * values["steps"] * (each if net.pooled else 1)
    texts = values["prompt"] + work.steps * values["prompt_steps"]
    kept = each * (work.text * texts + work.views * values["views"])
    return (tables + kept) * b + each * work.local_tokens(net.carried, layout) * net.head_width * 4


def output_values(row: Row, tp: int) -> int:
    """Output values of a layer for one token, on one of `tp` ranks."""
    return row.shape[0] // tp if row.split == 0 else row.shape[0]


# --- work and exchange of a step ---


def step_flops(net: CostModel, layout: Layout, work: Work) -> int:
    """Floating point operations of one rank in one step, of its branches together:

    2 n (values of the weight that it holds) for every linear, 4 n (keys) D for every attention.
    """
    rows = {row.name: row for row in net.layers}
    linear = sum(
        2 * work.local_tokens(stream, layout) * numel(rows[name], layout.tp) for name, stream in net.streamed
    )
    return work.evaluations(layout) * work.images * (linear + attention_flops(net, layout, work))


def attention_flops(net: CostModel, layout: Layout, work: Work) -> int:
    """The part of `step_flops` that attention takes, for one branch of one image."""
    return sum(
        4 * work.local_tokens(queries, layout) * work.keys(keys) * local_width(net, layout, width, keys)
        for queries, keys, width in net.attends
    )


def local_width(net: CostModel, layout: Layout, width: int, keys: str = "image") -> int:
    """D: what a token's heads on one rank take, of an attention whose heads are `width` together.

    Attention to what every rank holds whole trades no heads, and fills none up.
    """
    heads = ceil(net.heads / layout.tp)
    fill = 1 if keys in ("prompt", "views") else layout.ulysses
    return ceil(heads / fill) * fill * (width // net.heads)


def _attended_width(row: Row) -> int:
    """Of all heads of the attention that a row stands for: what its output projection reads, or what its keys
    are.
    """
    if row.split != 1:
        return row.shape[0]
    return row.parts[0] if row.parts else row.shape[1]


def step_bytes(net: CostModel, layout: Layout, work: Work, b: int = 2) -> dict[str, int]:
    """Bytes that one rank hands to collectives in one step, by axis, axes that exchange nothing left out.

    For each branch that it walks:

    ulysses: for each attention of streams to streams all-to-alls of queries and result, 2 B n D b, and of
    keys and values, 2 B n D b, n those of the stream that is attended to.
    ring: for each of these attentions R - 1 rotations of the keys and values that ulysses left it, 2 B (n U)
    (D / U) b.
    tp: for each row-split linear one sum of its result, B n out b; for each norm over all heads one sum of
    squares, 4 B n.

    And for all branches together:

    cfg: one gather of the velocities of its branches, B n (values of a token) b each.
    fsdp: one gather of every block's weights, of which the rank holds a share (`share_bytes`).
    """
    rows = {row.name: row for row in net.layers}
    streams = [each for each in net.attends if each[1] in ("image", "joint", "audio")]
    asked = sum(
        work.local_tokens(queries, layout) * local_width(net, layout, width) for queries, _, width in streams
    )
    attended = sum(
        work.local_tokens(keys, layout) * local_width(net, layout, width) for _, keys, width in streams
    )
    summed = sum(work.local_tokens(stream, layout) * 4 for stream in net.norms)
    summed += sum(
        work.local_tokens(stream, layout) * rows[name].shape[0] * b
        for name, stream in net.streamed
        if rows[name].split == 1
    )
    each = work.evaluations(layout) * work.images
    found = {
        "cfg": (layout.cfg > 1) * each * work.local_tokens("image", layout) * net.values * b,
        "ring": (layout.ring - 1) * each * 2 * attended * b,
        "ulysses": (layout.ulysses > 1) * each * 2 * (asked + attended) * b,
        "tp": (layout.tp > 1) * each * summed,
        "fsdp": (shard_count(layout) > 1) * sum(shard_bytes(rows, layout, b) for rows in net.blocks),
    }
    return {axis: size for axis, size in found.items() if size}


# --- time ---

SENT: dict[str, Callable[[int], float]] = {
    "cfg": lambda n: n - 1,
    "ring": lambda n: 1,
    "ulysses": lambda n: (n - 1) / n,
    "tp": lambda n: 2 * (n - 1) / n,
    "fsdp": lambda n: n - 1,
}
"""Of n ranks, how many times the bytes that a rank gives to a collective leave it. Gathers and sums go around
a ring; an all-to-all keeps the rank's own part.
"""


def crosses_machines(layout: Layout, axis: str, machine: Machine) -> bool:
    """Whether the ranks of an axis lie in more than one machine.

    Ranks are counted with tp innermost, then ulysses, ring and cfg.
    """
    sizes = {"tp": layout.tp, "ulysses": layout.ulysses, "ring": layout.ring, "cfg": layout.cfg}
    inner = list(sizes)[: list(sizes).index("cfg" if axis == "fsdp" else axis) + 1]
    return prod(sizes[name] for name in inner) > machine.ranks


def step_seconds(net: CostModel, layout: Layout, work: Work, machine: Machine, b: int = 2) -> float:
    """Seconds of a step.

    The operations take the machine's rate, and the exchanges follow one after another at its bandwidths.

    Only gathering the weights of a block is assumed to overlap with computing. Rings are not, although
    attention computes on one part while the next is on its way. Kernel launches, waiting for the slowest rank
    and reading memory are not counted.
    """
    ranks = {
        "cfg": layout.cfg,
        "ring": layout.ring,
        "ulysses": layout.ulysses,
        "tp": layout.tp,
        "fsdp": shard_count(layout),
    }
    sending = dict.fromkeys(ranks, 0.0)
    for axis, size in step_bytes(net, layout, work, b).items():
        bandwidth = machine.net if crosses_machines(layout, axis, machine) else machine.link
        sending[axis] = size * SENT[axis](ranks[axis]) / (bandwidth * 1e9)
    gathering = sending.pop("fsdp")
    return max(step_flops(net, layout, work) / (machine.tflops * 1e12) + sum(sending.values()), gathering)
