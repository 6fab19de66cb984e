"""A network's weights on several ranks as DTensors.

They know the whole weight, and lie over the memory that this rank holds.

Whatever runs outside the loop goes through them: merging adapters, saving, comparing. The loop and the
encoders run on the local tensors, since a DTensor does not pass through torch's loop operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import tensor
from torch.distributed.device_mesh import DeviceMesh as DeviceMesh
from torch.distributed.tensor import DTensor

from tinydiff.parallel.placements import WeightMesh, placements
from tinydiff.parallel.plan import Partial, Placement, Plan, Row, Shard
from tinydiff.parallel.shards import LocalWeight, local_weights, shard_range


def real(placement: Placement) -> tensor.Placement:
    """Torch's own placement of the same name."""
    if isinstance(placement, Shard):
        return tensor.Shard(placement.dim)
    return tensor.Partial() if isinstance(placement, Partial) else tensor.Replicate()


@dataclass(frozen=True)
class Sharding:
    """How a network's weights lie on several ranks.

    mesh: torch's mesh of the dimensions `where.axes`. blocks: prefixes of the blocks that `where.blocks`
    shards.
    """

    mesh: DeviceMesh
    where: WeightMesh
    blocks: frozenset[str] = frozenset()

    @property
    def split(self) -> int:
        """Ranks that share a row along its split."""
        return 1 if self.where.split is None else self.mesh.size(self.where.axes.index(self.where.split))


def as_dtensors(
    weights: Mapping[str, Tensor], rows: Iterable[Row], plan: Plan, sharding: Sharding
) -> dict[str, DTensor]:
    """What this rank holds of a network's weights -> each weight by its own name, over the same memory.

    The DTensor of a fused weight has its slices in the order of the ranks: see `fused_order`.
    """
    held = local_weights(rows, plan, sharding.blocks)
    return {each.row.name: _dtensor(each, weights, plan, sharding) for each in held}


def _dtensor(each: LocalWeight, weights: Mapping[str, Tensor], plan: Plan, sharding: Sharding) -> DTensor:
    row, local, shard = each.row, each.of(weights), plan.group("shard")
    if each.tensor != row.name:  # in a pack, where the last shares are padded
        width = row.shape[0] // (sharding.split if row.split == 0 else 1)
        local = local[: shard_range(width, shard.size, shard.rank)[2]]
    placed = placements([row], sharding.where, sharding.blocks)[row.name]
    stride = torch.empty(row.shape, device="meta").stride()
    return DTensor.from_local(
        local, sharding.mesh, [real(each) for each in placed], shape=torch.Size(row.shape), stride=stride
    )


def fused_order(row: Row, ranks: int) -> Tensor | None:
    """For each slice of a weight along its split, where it lies in the DTensor.

    A DTensor shards evenly, and every part of a fused weight is sharded on its own. So the DTensor has what
    the first rank holds of all parts, then what the second holds, and so on. None for any other weight.
    """
    if row.split is None or not row.parts or ranks == 1:
        return None
    whole = torch.split(torch.arange(row.shape[row.split]), list(row.parts))
    return torch.cat([part.chunk(ranks)[rank] for rank in range(ranks) for part in whole]).argsort()


def full(weight: DTensor, row: Row, sharding: Sharding) -> Tensor:
    """The weight as a checkpoint has it, on every rank. All ranks call this."""
    order, whole = fused_order(row, sharding.split), weight.full_tensor()
    return whole if order is None else whole.index_select(row.split or 0, order.to(whole.device))


def replaced(
    weights: Mapping[str, Tensor],
    rows: Iterable[Row],
    plan: Plan,
    sharding: Sharding,
    changed: Iterable[tuple[str, Tensor]],
) -> dict[str, Tensor]:
    """This rank's weights after whole weights, the same on every rank, took the place of some.

    What is not touched is shared.
    """
    changed_weights, new = dict(weights), set[str]()
    local = {each.row.name: each for each in local_weights(rows, plan, sharding.blocks)}
    for name, value in changed:
        if (key := local[name].tensor) not in new:
            changed_weights[key] = changed_weights[key].clone()
            new.add(key)
        target = _dtensor(local[name], changed_weights, plan, sharding)
        if (order := fused_order(local[name].row, sharding.split)) is not None:
            value = value.index_select(local[name].row.split or 0, order.argsort().to(value.device))
        everywhere = DTensor.from_local(value, sharding.mesh, [tensor.Replicate()] * sharding.mesh.ndim)
        target.to_local().copy_(everywhere.redistribute(placements=target.placements).to_local())
    return changed_weights
