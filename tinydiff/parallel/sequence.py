"""A sequence dealt to ranks: equal shares of its tokens, and which of the gathered ones are real.

Image and text tokens are dealt apart, so that every rank holds a share of both and a block's code stays what
it is on one rank. The shares differ by one token at most; all are padded to the longest. What stands in for
the mesh of a sequence are the axes `ring` (outer) and `ulysses` (inner). Padding enters no sum over tokens:
attention picks the real keys by index (`keys`), everything else works token by token. Shape letters: L image
tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tinydiff.parallel.moves import reshard
from tinydiff.parallel.plan import Cond, Partial, Placement, Plan, Replicate, Shard

STREAMS = {"image": ("image",), "audio": ("audio",), "joint": ("text", "image")}
"""What attention in the loop runs over: the image or the sound alone, or text and image, text first on each
rank.
"""
KEYS = "keys."
"""How the names of the index tensors begin."""


class TensorsByName(Protocol):
    """Tensors by name: a dict, or a view of weights."""

    def __getitem__(self, name: str, /) -> Tensor: ...


def sequence_ranks(plan: Plan) -> tuple[int, int]:
    """(how many ranks share a sequence, which of them this is)."""
    ring, ulysses = plan.group("ring"), plan.group("ulysses")
    return ring.size * ulysses.size, ring.rank * ulysses.size + ulysses.rank


def without_sequence(plan: Plan) -> Plan:
    """The plan of what runs on all tokens on every rank."""
    return plan.along(*(axis for axis, _ in plan.groups if axis not in ("ring", "ulysses")))


def shard_sizes(tokens: int, shares: int) -> list[int]:
    """How many of the tokens each share holds."""
    return [tokens // shares + (i < tokens % shares) for i in range(shares)]


def padded_size(sizes: list[int]) -> int:
    """Of the padded shares: that of the longest, and at least 2, as a graph is compiled anew for a length of
    1.
    """
    return max(2, *sizes)


def shard(plan: Plan, x: Tensor, dim: int, kinds: Sequence[int] = ()) -> Tensor:
    """This rank's share of the tokens along `dim`, padded with zeros; x itself where nothing is dealt.

    kinds: how many tokens of each kind follow each other there, where there are several, such as video and
    sound. Each kind is dealt on its own.
    """
    shares, index = sequence_ranks(plan)
    if shares == 1:
        return x
    if len(kinds) > 1:
        return torch.cat([shard(plan, part, dim) for part in x.split(list(kinds), dim)], dim)
    sizes = shard_sizes(x.shape[dim], shares)
    padded = x.new_zeros(*x.shape[:dim], padded_size(sizes), *x.shape[dim + 1 :])
    padded.narrow(dim, 0, sizes[index]).copy_(x.narrow(dim, sum(sizes[:index]), sizes[index]))
    return padded


def gather(plan: Plan, x: Tensor, dim: int, tokens: int, kinds: Sequence[int] = ()) -> Tensor:
    """The shares of all ranks along `dim` -> all tokens, without padding. The opposite of `share`."""
    shares, _ = sequence_ranks(plan)
    if shares == 1:
        return x
    if len(kinds) > 1:
        parts = x.split([padded_size(shard_sizes(n, shares)) for n in kinds], dim)
        return torch.cat([gather(plan, part, dim, n) for part, n in zip(parts, kinds, strict=True)], dim)
    x = _replicate(plan, x, Shard(dim))
    if x.shape[dim] == tokens:
        return x
    real = torch.arange(x.shape[dim] // shares) < torch.tensor(shard_sizes(tokens, shares))[:, None]
    return x.index_select(dim, real.flatten().nonzero()[:, 0].to(x.device))


def sum_over_tokens(plan: Plan, x: Tensor) -> Tensor:
    """Sums over this rank's tokens -> sums over all tokens."""
    return _replicate(plan, x, Partial())


def _replicate(plan: Plan, x: Tensor, source: Placement) -> Tensor:
    """x, divided as `source` says over the ranks of the sequence, on all of them."""
    for axis in ("ulysses", "ring"):
        if (group := plan.group(axis)).size > 1:
            x = reshard(x, source, Replicate(), group)
    return x


def token_dims(conds: Iterable[Cond]) -> dict[str, int]:
    """Name of a request's tensor -> its dimension that runs over tokens, of those that have one."""
    return {cond.name: cond.dim for cond in conds if cond.stream is not None}


def shard_request(plan: Plan, conds: Sequence[Cond], request: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A request's tensors as this rank holds them, and the index tensors of `keys` beside them. conds: the
    family's.
    """
    if sequence_ranks(plan)[0] == 1:
        return dict(request)
    lengths = {stream: _length(request, conds, stream) for stream in ("image", "text", "audio")}
    dims = token_dims(conds)
    device = next(iter(request.values())).device
    shares = {name: shard(plan, x, dims[name]) if name in dims else x for name, x in request.items()}
    return shares | {
        name: torch.tensor(index, dtype=torch.int64, device=device)
        for name, index in _real_token_indices(plan, lengths).items()
    }


def keys(plan: Plan, tensors: TensorsByName, stream: str) -> tuple[Tensor, ...]:
    """For `ops.attention`: which keys are real, of each part of the ring in the order in which this rank
    meets them, int64 [real].

    known: the request's tensors that belong to no block. stream: one of `STREAMS`. Empty where the sequence
    is not dealt.
    """
    return (
        tuple(tensors[f"{KEYS}{stream}.{turn}"] for turn in range(plan.group("ring").size))
        if sequence_ranks(plan)[0] > 1
        else ()
    )


def _real_token_indices(plan: Plan, lengths: Mapping[str, int]) -> dict[str, list[int]]:
    """Name -> places of the real tokens among those that `ulysses` gathers, for each stream and turn of the
    ring. lengths: how many tokens each stream has.
    """
    ring, ulysses = plan.group("ring"), plan.group("ulysses")
    shares = ring.size * ulysses.size
    sizes = {stream: shard_sizes(tokens, shares) for stream, tokens in lengths.items()}
    found = {}
    for stream, parts in STREAMS.items():
        if stream == "audio" and not lengths[stream]:
            continue
        for turn in range(ring.size):
            first = (ring.rank + turn) % ring.size * ulysses.size
            indices, start = [], 0
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
