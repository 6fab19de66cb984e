"""The plan of a network's weights in DTensor's terms.

It is a mesh of ranks, and a placement of every weight on each of its dimensions. No torch;
`parallel/dtensors.py` makes torch's own objects of this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from tinydiff.parallel.layout import AXES, COMBINED_AXES, Layout, rank_groups
from tinydiff.parallel.plan import Placement, Replicate, Row, Shard

Role = Literal["dit", "text_encoder", "image_encoder", "vae"]


@dataclass(frozen=True)
class WeightMesh:
    """The mesh on which a network's weights lie.

    axes: its dimensions, outermost first, each an axis of the layout or a group of `COMBINED_AXES`; together
    they have every axis once. DTensor shards along outer dimensions first.
    split: the dimension that shards each row along its `split`. blocks: the dimension that shards every
    weight of a block along its first dimension. None: no weight is sharded so.
    same: the axis or group of the ranks that hold the same part of every weight.
    """

    axes: tuple[str, ...]
    split: str | None = None
    blocks: str | None = None
    same: str = "world"


def weight_mesh(layout: Layout, role: Role, whole: bool = False) -> WeightMesh:
    """The mesh for the weights of a network of this role.

    whole: the ranks cannot share its weights evenly, so each holds all of them.
    """
    if role == "vae" or whole:
        return WeightMesh(AXES)
    if role == "dit":
        return (
            WeightMesh(("dp", "tp", "shard"), "tp", "shard", "dp")
            if layout.fsdp
            else WeightMesh(AXES, "tp", same="peers")
        )
    return (
        WeightMesh(("dp", "replica"), "replica", same="dp")
        if layout.encoders
        else WeightMesh(AXES, "tp", same="peers")
    )


def size(layout: Layout, axis: str) -> int:
    """Ranks along an axis of the layout or in a group of `COMBINED_AXES`."""
    return len(rank_groups(layout, axis)[0])


def order(mesh: WeightMesh) -> tuple[str, ...]:
    """All axes of the layout in the order of the mesh's dimensions."""
    return tuple(chain.from_iterable(COMBINED_AXES.get(axis, (axis,)) for axis in mesh.axes))


def placements(
    rows: Iterable[Row], mesh: WeightMesh, blocks: Collection[str] = ()
) -> dict[str, tuple[Placement, ...]]:
    """Name of each weight -> its placement on each dimension of the mesh.

    blocks: prefixes of the blocks. A row with `parts` is the concatenation of weights that are each sharded
    on their own: a rank's shard is its slice of the first part, then its slice of the second, and so on.
    """
    return {row.name: tuple(_placement(row, axis, mesh, blocks) for axis in mesh.axes) for row in rows}


def _placement(row: Row, axis: str, mesh: WeightMesh, blocks: Collection[str]) -> Placement:
    if axis == mesh.split and row.split is not None:
        return Shard(row.split)
    if axis == mesh.blocks and block_of(row, blocks) is not None:
        return Shard(0)
    return Replicate()


def block_of(row: Row, blocks: Collection[str]) -> str | None:
    """The prefix of the block that a weight belongs to, None if it belongs to none."""
    cuts = (i for i, letter in enumerate(row.name) if letter == ".")
    return next((row.name[:cut] for cut in cuts if row.name[:cut] in blocks), None)
