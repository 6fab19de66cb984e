"""What a rank holds of a network's weights.

It holds slices over "tp" as the rows' `split` says, and shards over "shard" of the weights that a block
needs.

Full sharding packs the weights of a block. Each weight is cut along its first dimension into equal shards,
the last ones padded with zeros. A rank's shards lie one after another in one flat tensor, `{block}.pack`,
`{block}.pack32` for rows that stay float32, one for each type of 8 bits and one of bytes. One collective
gathers each when the block is entered. All of this follows from the rows, so every rank knows what any other
rank holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.parallel.moves import start_gather, wait
from tinydiff.parallel.placements import block_of
from tinydiff.parallel.plan import ALONE, PACKED, Group, Plan, Row

# --- slices over tp ---


def why_indivisible(rows: Iterable[Row], ranks: int) -> str | None:
    """Why these weights cannot be divided over this many ranks; None if they can.

    It names the first weight that does not divide.
    """
    for row in rows:
        for width in _widths(row):
            if width % (ranks * row.head):
                return f"{row.name} has {_shared(row, width)}, which {ranks} ranks cannot share evenly"
    return None


def _shared(row: Row, width: int) -> str:
    """What ranks share of a row, in words."""
    if row.stored in PACKED and row.split == 1:
        values, size = PACKED[row.stored]
        count = f"{width // row.head} groups of {row.head // size * values} values in {row.stored}"
        return f"{count} (--quantization none decodes them)"
    return f"{width // row.head} heads" if row.head > 1 else f"a width of {width}"


def local_rows(rows: Iterable[Row], plan: Plan, blocks: Collection[str] = ()) -> Iterator[Row]:
    """The rows of the tensors that this rank holds, with packs in place of the weights below `blocks`.
    ValueError where tp does not divide.
    """
    rows = list(rows)
    packs = packing(rows, plan, blocks)
    tensors = {_pack_name(row, blocks) or row.name: None for row in rows}
    whole = {row.name: row for row in rows}
    for name in tensors:
        if pack := packs.get(name):
            yield Row(name, (pack.numel,), float32=name.endswith(".pack32"), stored=pack.stored)
        else:
            yield _local(whole[name], plan.group("tp"))


def _local(row: Row, tp: Group) -> Row:
    if why := why_indivisible([row], tp.size):
        raise ValueError(why)
    shape = tuple(size // tp.size if dim == row.split else size for dim, size in enumerate(row.shape))
    return replace(row, shape=shape, split=None, parts=(), head=1)


def _widths(row: Row) -> tuple[int, ...]:
    return () if row.split is None else row.parts or (row.shape[row.split],)


class Box(NamedTuple):
    """A part of a weight.

    It is its start along each dimension in the whole weight and in this rank's tensor, and its shape.
    """

    global_start: tuple[int, ...]
    local_start: tuple[int, ...]
    shape: tuple[int, ...]

    def narrow(self, dim: int, start: int, size: int) -> Box:
        """`size` indices along `dim`, from `start` of this box on."""
        global_start, local_start = (
            _with(place, dim, place[dim] + start) for place in (self.global_start, self.local_start)
        )
        return Box(global_start, local_start, _with(self.shape, dim, size))

    @property
    def source(self) -> tuple[slice, ...]:
        """Index into the whole weight."""
        return tuple(
            slice(start, start + size) for start, size in zip(self.global_start, self.shape, strict=True)
        )

    @property
    def target(self) -> tuple[slice, ...]:
        """Index into this rank's tensor."""
        return tuple(
            slice(start, start + size) for start, size in zip(self.local_start, self.shape, strict=True)
        )


def _with(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _boxes(row: Row, tp: Group) -> list[Box]:
    """The boxes of a weight on this rank: its slice of every part, in order."""
    origin = (0,) * len(row.shape)
    if row.split is None or tp.size == 1:
        return [Box(origin, origin, row.shape)]
    boxes: list[Box] = []
    for width, end in zip(_widths(row), accumulate(_widths(row)), strict=True):
        mine, start = width // tp.size, end - width
        global_start, local_start = (
            _with(origin, row.split, start + tp.rank * mine),
            _with(origin, row.split, start // tp.size),
        )
        boxes.append(Box(global_start, local_start, _with(row.shape, row.split, mine)))
    return boxes


def shard_range(size: int, ranks: int, rank: int = 0) -> tuple[int, int, int]:
    """One of the equal shards of a dimension, of which the last are padded.

    Returns (width of a shard, start of this rank's, how many of its indices are real).
    """
    width = -(-size // ranks)
    start = min(rank * width, size)
    return width, start, min(width, size - start)


# --- packs over shard ---


class PackedWeight(NamedTuple):
    """A weight in a pack.

    name: below its block. shape: of the gathered weight. width: first dimension of a shard. offset: of the
    shard in the pack, in elements.
    """

    name: str
    shape: tuple[int, ...]
    width: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements of a shard."""
        return self.width * prod(self.shape[1:])


@dataclass(frozen=True)
class Pack:
    """The layout of a block's weights in a flat tensor of `numel` elements per rank.

    Blocks of one shape have equal packs. stored: its type of 8 bits or of bytes, by torch's name.
    """

    parts: tuple[PackedWeight, ...]
    stored: str | None = None

    @property
    def numel(self) -> int:
        last = self.parts[-1]
        return last.offset + last.numel


def packing(rows: Iterable[Row], plan: Plan, blocks: Collection[str]) -> dict[str, Pack]:
    """The packs of the blocks with these prefixes, by the names of their tensors.

    ValueError for a row that cannot be in one.
    """
    tp, ranks = plan.group("tp"), plan.group("shard").size
    found: dict[str, list[PackedWeight]] = {}
    stored: dict[str, str | None] = {}
    for row in rows:
        if tensor := _pack_name(row, blocks):
            if not row.shape:
                raise ValueError(f"{row.name} cannot be in a pack: it is a single number")
            shape = _local(row, tp).shape
            parts, stored[tensor] = found.setdefault(tensor, []), row.stored_type
            name = row.name.removeprefix(f"{tensor.rpartition('.')[0]}.")
            parts.append(
                PackedWeight(
                    name,
                    shape,
                    shard_range(shape[0], ranks)[0],
                    parts[-1].offset + parts[-1].numel if parts else 0,
                )
            )
    return {tensor: Pack(tuple(parts), stored[tensor]) for tensor, parts in found.items()}


def _packed_weights(packs: Mapping[str, Pack]) -> dict[str, tuple[str, PackedWeight]]:
    """Full name of each packed weight -> (the name of its pack, its place there)."""
    return {
        f"{tensor.rpartition('.')[0]}.{part.name}": (tensor, part)
        for tensor, pack in packs.items()
        for part in pack.parts
    }


def _pack_name(row: Row, blocks: Collection[str]) -> str | None:
    """The name of the pack that has this weight, or None."""
    prefix = block_of(row, blocks)
    kind = f"_{row.stored_type}" if row.stored else "32" if row.float32 else ""
    return None if prefix is None else f"{prefix}.pack{kind}"


def start(shares: Tensor, group: Group) -> Tensor:
    """Begin to gather x [N, ...] of every rank along the first dimension.

    Read it only after `finish` or `wait`. Values of 8 bits travel as bytes, since not every backend knows
    float8.
    """
    if group.size == 1:
        return shares
    return start_gather(shares.view(torch.uint8) if shares.dtype.itemsize == 1 else shares, group)


def finish(pending: Tensor, pack: Pack) -> dict[str, Tensor]:
    """A started gather of a pack -> the weights of the block, by their names below it."""
    whole = wait(pending).view(-1, pack.numel)
    return unpack(whole if pack.stored is None else whole.view(getattr(torch, pack.stored)), pack)


def unpack(shares: Tensor, pack: Pack) -> dict[str, Tensor]:
    """The packs of all ranks [ranks, numel] -> the weights of the block, by their names below it."""
    return {
        part.name: shares[:, part.offset : part.offset + part.numel].reshape(-1, *part.shape[1:])[
            : part.shape[0]
        ]
        for part in pack.parts
    }


def gather(x: Tensor, *groups: Group) -> Tensor:
    """x [N, ...] of all ranks along these axes, outermost first, concatenated along the first dimension."""
    for group in reversed(groups):
        x = x if group.size == 1 else wait(start(x, group)).view(x.dtype)
    return x


class GatherOnRead(Mapping[str, Tensor]):
    """All weights by their own names.

    A packed one is gathered when it is read, so every rank must read the same weights in the same order.
    """

    def __init__(self, weights: Mapping[str, Tensor], packs: Mapping[str, Pack], plan: Plan) -> None:
        self.weights = weights
        self.group = plan.group("shard")
        self.parts = _packed_weights(packs)
        self.stored = {tensor: pack.stored for tensor, pack in packs.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.parts:
            return self.weights[name]
        tensor, part = self.parts[name]
        own = self.weights[tensor][part.offset : part.offset + part.numel]
        alone = Pack((part._replace(offset=0),), self.stored[tensor])
        return finish(start(own, self.group), alone)[part.name]

    def __contains__(self, name: object) -> bool:
        return name in self.parts or name in self.weights

    def __iter__(self) -> Iterator[str]:
        packs = {tensor for tensor, _ in self.parts.values()}
        yield from (name for name in self.weights if name not in packs)
        yield from self.parts

    def __len__(self) -> int:
        return sum(1 for _ in self)


# --- both together ---


class LocalWeight(NamedTuple):
    """What this rank holds of a weight.

    row: of the whole weight. boxes: its parts on this rank. tensor, offset, shape: the name of this rank's
    tensor that has it, the first element there, and the shape. replicated_over: the axes, outermost first,
    along which ranks hold the same part.
    """

    row: Row
    boxes: list[Box]
    tensor: str
    offset: int
    shape: tuple[int, ...]
    replicated_over: tuple[Group, ...]

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """This rank's part, as a view of the tensor that has it."""
        return weights[self.tensor].view(-1)[self.offset : self.offset + prod(self.shape)].view(self.shape)


def local_weights(
    rows: Iterable[Row], plan: Plan, blocks: Collection[str] = (), replicas: Group = ALONE
) -> Iterator[LocalWeight]:
    """What this rank holds of each weight, in the order of the rows, which is the same on all ranks.

    blocks: prefixes of the blocks whose weights are packed over "shard". replicas: ranks on no axis of the
    plan that hold the same parts of all weights. ValueError where tp does not divide.
    """
    rows, tp, ranks = list(rows), plan.group("tp"), plan.group("shard")
    parts = _packed_weights(packing(rows, plan, blocks))
    for row in rows:
        shape, boxes = _local(row, tp).shape, _boxes(row, tp)
        axes = (replicas, *([] if row.name in parts else [ranks]), *([tp] if row.split is None else []))
        replicated_over = tuple(group for group in axes if group.size > 1)
        if row.name in parts:
            tensor, part = parts[row.name]
            yield LocalWeight(
                row,
                list(_boxes_in_shard(boxes, shape[0], ranks)),
                tensor,
                part.offset,
                (part.width, *shape[1:]),
                replicated_over,
            )
        else:
            yield LocalWeight(row, boxes, row.name, 0, shape, replicated_over)


def _boxes_in_shard(boxes: Iterable[Box], size: int, group: Group) -> Iterator[Box]:
    """The parts of the boxes in this rank's shard of the first dimension, counted from the start of the
    shard.
    """
    _, first, count = shard_range(size, group.size, group.rank)
    for box in boxes:
        low, high = max(first, box.local_start[0]), min(first + count, box.local_start[0] + box.shape[0])
        if low < high:
            kept = box.narrow(0, low - box.local_start[0], high - low)
            yield kept._replace(local_start=_with(kept.local_start, 0, low - first))


def shard_weights(
    weights: Mapping[str, Tensor], rows: Iterable[Row], plan: Plan, blocks: Collection[str] = ()
) -> dict[str, Tensor]:
    """This rank's tensors, new, from whole weights in memory. Missing weights are left out."""
    rows = [row for row in rows if row.name in weights]
    like = {local.tensor: weights[local.row.name] for local in local_weights(rows, plan, blocks)}
    mine = {row.name: like[row.name].new_zeros(row.shape) for row in local_rows(rows, plan, blocks)}
    for each in local_weights(rows, plan, blocks):
        for box in each.boxes:
            each.of(mine)[box.target] = weights[each.row.name][box.source]
    return mine
