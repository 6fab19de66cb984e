"""A sequence sharded over ranks: equal shards of its tokens, and which of the gathered tokens are real.

Image and text tokens are sharded separately. So every rank holds a part of both, and the code of a block is
the same as on one rank. Shards differ by at most one token, and all are padded to the longest. The ranks are
those of the axes `ring` (outer) and `ulysses` (inner). Padding enters no sum over tokens: attention selects
the real keys by index (`keys`), and everything else works token by token. Shape letters: L image tokens, T
text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tinydiff.parallel.moves import reshard
from tinydiff.parallel.plan import Cond, Partial, Placement, Plan, Replicate, Shard

STREAMS = {"image": ("image",), "audio": ("audio",), "joint": ("text", "image")}
"""What attention in the loop runs over: the image or the sound alone, or text and image, with the text first
on each rank.
"""
KEYS = "keys."
"""Prefix of the names of the index tensors."""


class TensorsByName(Protocol):
    """Tensors by name: a dict, or a view of weights."""

    def __getitem__(self, name: str, /) -> Tensor: ...


def sequence_ranks(plan: Plan) -> tuple[int, int]:
    """(how many ranks share a sequence, which of them this is)."""
    ring, ulysses = plan.group("ring"), plan.group("ulysses")
    return ring.size * ulysses.size, ring.rank * ulysses.size + ulysses.rank


def without_sequence(plan: Plan) -> Plan:
    """The plan for what runs on all tokens on every rank."""
    return plan.without("ring", "ulysses")


def shard_sizes(tokens: int, shards: int) -> list[int]:
    """Tokens in each of the shards."""
    return [tokens // shards + (i < tokens % shards) for i in range(shards)]


def padded_size(sizes: list[int]) -> int:
    """The length of every padded shard: that of the longest, and at least 2.

    A graph is compiled again for a length of 1.
    """
    return max(2, *sizes)


def shard(plan: Plan, x: Tensor, dim: int, kinds: Sequence[int] = ()) -> Tensor:
    """This rank's shard of the tokens along `dim`, padded with zeros; x itself where nothing is sharded.

    kinds: the number of tokens of each kind, in order, where there are several kinds, such as video and
    sound. Each kind is sharded separately.
    """
    shards, index = sequence_ranks(plan)
    if shards == 1:
        return x
    if len(kinds) > 1:
        return torch.cat([shard(plan, part, dim) for part in torch.split(x, list(kinds), dim)], dim)
    sizes = shard_sizes(x.shape[dim], shards)
    padded = x.new_zeros(*x.shape[:dim], padded_size(sizes), *x.shape[dim + 1 :])
    padded.narrow(dim, 0, sizes[index]).copy_(x.narrow(dim, sum(sizes[:index]), sizes[index]))
    return padded


def gather(plan: Plan, x: Tensor, dim: int, tokens: int, kinds: Sequence[int] = ()) -> Tensor:
    """The shards of all ranks along `dim` -> all tokens, without padding. The inverse of `shard`."""
    shards, _ = sequence_ranks(plan)
    if shards == 1:
        return x
    if len(kinds) > 1:
        parts = torch.split(x, [padded_size(shard_sizes(n, shards)) for n in kinds], dim)
        return torch.cat([gather(plan, part, dim, n) for part, n in zip(parts, kinds, strict=True)], dim)
    x = _replicate(plan, x, Shard(dim))
    if x.shape[dim] == tokens:
        return x
    real = torch.arange(x.shape[dim] // shards) < torch.tensor(shard_sizes(tokens, shards))[:, None]
    return x.index_select(dim, real.flatten().nonzero()[:, 0].to(x.device))


def sum_over_tokens(plan: Plan, x: Tensor) -> Tensor:
    """Sums over this rank's tokens -> sums over all tokens."""
    return _replicate(plan, x, Partial())


def _replicate(plan: Plan, x: Tensor, source: Placement) -> Tensor:
    """x, placed as `source` says over the ranks of the sequence -> x whole on each of them."""
    for axis in ("ulysses", "ring"):
        if (group := plan.group(axis)).size > 1:
            x = reshard(x, source, Replicate(), group)
    return x


def token_dims(conds: Iterable[Cond]) -> dict[str, int]:
    """Name of a request's tensor -> its dimension that runs over tokens. Tensors without one are left out."""
    return {cond.name: cond.dim for cond in conds if cond.stream is not None}


def shard_request(plan: Plan, conds: Sequence[Cond], request: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a request's tensors, and the index tensors of `keys`. conds: the family's."""
    if sequence_ranks(plan)[0] == 1:
        return dict(request)
    lengths = {stream: _length(request, conds, stream) for stream in ("image", "text", "audio")}
    dims = token_dims(conds)
    device = next(iter(request.values())).device
    shards = {name: shard(plan, x, dims[name]) if name in dims else x for name, x in request.items()}
    return shards | {
        name: torch.tensor(index, dtype=torch.int64, device=device)
        for name, index in _real_token_indices(plan, lengths).items()
    }


def shard_steps(plan: Plan, conds: Sequence[Cond], steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the steps [S, ...] as this rank holds them.

    A `Cond` counts dimensions after that of the steps.
    """
    dims = token_dims(conds)
    return {name: shard(plan, x, dims[name] + 1) if name in dims else x for name, x in steps.items()}


def keys(plan: Plan, tensors: TensorsByName, stream: str) -> tuple[Tensor, ...]:
    """The indices of the real keys for `ops.attention`, int64 [real].

    There is one tensor for each part of the ring, in the order in which this rank meets the parts.

    tensors: the request's tensors that belong to no block. stream: one of `STREAMS`. Empty where the sequence
    is not sharded.
    """
    return (
        tuple(tensors[f"{KEYS}{stream}.{turn}"] for turn in range(plan.group("ring").size))
        if sequence_ranks(plan)[0] > 1
        else ()
    )


def _real_token_indices(plan: Plan, lengths: Mapping[str, int]) -> dict[str, list[int]]:
    """Name -> indices of the real tokens among those that `ulysses` gathers, for each stream and turn of the
    ring. lengths: tokens of each stream.
    """
    ring, ulysses = plan.group("ring"), plan.group("ulysses")
    shards = ring.size * ulysses.size
    sizes = {stream: shard_sizes(tokens, shards) for stream, tokens in lengths.items()}
    found: dict[str, list[int]] = {}
    for stream, parts in STREAMS.items():
        if stream == "audio" and not lengths[stream]:
            continue
        for turn in range(ring.size):
            first = (ring.rank + turn) % ring.size * ulysses.size
            indices, start = list[int](), 0
            for rank in range(first, first + ulysses.size):
                for part in parts:
                    indices += range(start, start + sizes[part][rank])
                    start += padded_size(sizes[part]) if sum(sizes[part]) else 0
            found[f"{KEYS}{stream}.{turn}"] = indices
    return found


def _length(request: Mapping[str, Tensor], conds: Sequence[Cond], stream: str) -> int:
    found = (
        request[cond.name].shape[cond.dim] for cond in conds if cond.stream == stream and cond.name in request
    )
    return next(found, 0)
