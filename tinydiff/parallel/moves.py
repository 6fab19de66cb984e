"""Carrying out the plan's moves on activations: local tensors in and out, functional collectives between.

Inside the compiled loop no tensor is a DTensor (it cannot be traced there); DTensor's eager `redistribute` is
the oracle of every move. The operators are those that torch's own functional collectives emit: they take part
in graphs, and start before they are waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinydiff.parallel.plan import MOVES, Group, Partial, Placement, Plan, Replicate, Shard

_ops = torch.ops._c10d_functional


def move(plan: Plan, name: str, x: Tensor) -> Tensor:
    """Perform the move `name` of `plan.MOVES` on x; the identity where this rank has the move's axis to
    itself.
    """
    step = MOVES[name]
    group = plan.group(step.axis)
    return x if group.size == 1 else reshard(x, step.source, step.target, group)


def reshard(x: Tensor, source: Placement, target: Placement, group: Group) -> Tensor:
    """This rank's part of placement `source` -> its part of placement `target`. A dimension that is divided
    must be so evenly.
    """
    match source, target:
        case Partial(), Replicate():
            return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group.name))
        case Shard(dim), Replicate():
            gathered = wait(start_gather(x.contiguous(), group))
            return (
                torch.unflatten(gathered, 0, (group.size, -1))
                .movedim(0, dim % x.ndim)
                .flatten(dim % x.ndim, dim % x.ndim + 1)
            )
        case Replicate(), Shard(dim):
            return x.chunk(group.size, dim)[group.rank]
        case Shard(before), Shard(after):
            before, after = before % x.ndim, after % x.ndim
            parts = torch.unflatten(x, after, (group.size, -1)).movedim(after, 0).contiguous()
            sizes: list[int] = [parts.shape[0] // group.size] * group.size
            got = _ops.wait_tensor(_ops.all_to_all_single(parts, sizes, sizes, group.name))
            return got.movedim(0, before).flatten(before, before + 1)
    raise ValueError(f"no move from {source} to {target}")


def rotate(x: Tensor, group: Group) -> Tensor:
    """x [...] of the next rank of the group, whose own goes to the one before; started, and to be waited for
    with `wait`.
    """
    flat, ranks = x.contiguous().view(-1), range(group.size)
    there, here = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    sent = [flat.shape[0] if rank == there else 0 for rank in ranks]
    got = [flat.shape[0] if rank == here else 0 for rank in ranks]
    return _ops.all_to_all_single(flat, got, sent, group.name)


def start_gather(x: Tensor, group: Group) -> Tensor:
    """x [N, ...] of every rank, one behind the other along the first dimension; started, and to be waited for
    with `wait`.
    """
    return _ops.all_gather_into_tensor(x, group.size, group.name)


def wait(x: Tensor) -> Tensor:
    """What a started collective brings."""
    return _ops.wait_tensor(x)
