"""The plan's moves carried out on activations: local tensors in and out, functional collectives between.

No tensor in the compiled loop is a DTensor, which cannot be traced there. DTensor's eager `redistribute` is
the reference that tests compare every move with. The operators are those that torch's own functional
collectives emit: they can be part of graphs, and they start before they are waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinydiff.parallel.plan import MOVES, Group, Partial, Placement, Plan, Replicate, Shard

_ops = torch.ops._c10d_functional


def move(plan: Plan, name: str, x: Tensor) -> Tensor:
    """Perform the move `name` of `plan.MOVES` on x. It is the identity where the axis has one rank."""
    step = MOVES[name]
    group = plan.group(step.axis)
    return x if group.size == 1 else reshard(x, step.source, step.target, group)


def reshard(x: Tensor, source: Placement, target: Placement, group: Group) -> Tensor:
    """This rank's part of x as placed by `source` -> its part as placed by `target`.

    Sharded dimensions must divide evenly.
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
        case _:
            raise ValueError(f"no move from {source} to {target}")


def rotate(x: Tensor, group: Group) -> Tensor:
    """Receive x [...] from the next rank of the group, and send this rank's to the previous one.

    Started; `wait` for the result.
    """
    flat, ranks = x.contiguous().view(-1), range(group.size)
    there, here = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    sent = [flat.shape[0] if rank == there else 0 for rank in ranks]
    got = [flat.shape[0] if rank == here else 0 for rank in ranks]
    return _ops.all_to_all_single(flat, got, sent, group.name)


def start_gather(x: Tensor, group: Group) -> Tensor:
    """x [N, ...] of every rank, concatenated along the first dimension. Started; `wait` for the result."""
    return _ops.all_gather_into_tensor(x, group.size, group.name)


def wait(x: Tensor) -> Tensor:
    """The result of a started collective."""
    return _ops.wait_tensor(x)
