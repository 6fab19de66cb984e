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


class Known(Protocol):
    """Tensors by name: a dict, or a view of weights."""

    def __getitem__(self, name: str, /) -> Tensor: ...


def ranks(plan: Plan) -> tuple[int, int]:
    """(how many ranks share a sequence, which of them this is)."""
    ring, ulysses = plan.group("ring"), plan.group("ulysses")
    return ring.size * ulysses.size, ring.rank * ulysses.size + ulysses.rank


def whole(plan: Plan) -> Plan:
    """The plan of what runs on all tokens on every rank."""
    return plan.along(*(axis for axis, _ in plan.groups if axis not in ("ring", "ulysses")))


def counts(tokens: int, shares: int) -> list[int]:
    """How many of the tokens each share holds."""
    return [tokens // shares + (i < tokens % shares) for i in range(shares)]


def width(held: list[int]) -> int:
    """Of the padded shares: that of the longest, and at least 2, as a graph is compiled anew for a length of
    1.
    """
    return max(2, *held)


def share(plan: Plan, x: Tensor, dim: int, kinds: Sequence[int] = ()) -> Tensor:
    """This rank's share of the tokens along `dim`, padded with zeros; x itself where nothing is dealt.

    kinds: how many tokens of each kind follow each other there, where there are several, such as video and
    sound. Each kind is dealt on its own.
    """
    shares, index = ranks(plan)
    if shares == 1:
        return x
    if len(kinds) > 1:
        return torch.cat([share(plan, part, dim) for part in x.split(list(kinds), dim)], dim)
    held = counts(x.shape[dim], shares)
    padded = x.new_zeros(*x.shape[:dim], width(held), *x.shape[dim + 1 :])
    padded.narrow(dim, 0, held[index]).copy_(x.narrow(dim, sum(held[:index]), held[index]))
    return padded


def gathered(plan: Plan, x: Tensor, dim: int, tokens: int, kinds: Sequence[int] = ()) -> Tensor:
    """The shares of all ranks along `dim` -> all tokens, without padding. The opposite of `share`."""
    shares, _ = ranks(plan)
    if shares == 1:
        return x
    if len(kinds) > 1:
        parts = x.split([width(counts(n, shares)) for n in kinds], dim)
        return torch.cat([gathered(plan, part, dim, n) for part, n in zip(parts, kinds, strict=True)], dim)
    x = _everywhere(plan, x, Shard(dim))
    if x.shape[dim] == tokens:
        return x
    real = torch.arange(x.shape[dim] // shares) < torch.tensor(counts(tokens, shares))[:, None]
    return x.index_select(dim, real.flatten().nonzero()[:, 0].to(x.device))


def total(plan: Plan, x: Tensor) -> Tensor:
    """Sums over this rank's tokens -> sums over all tokens."""
    return _everywhere(plan, x, Partial())


def _everywhere(plan: Plan, x: Tensor, source: Placement) -> Tensor:
    """x, divided as `source` says over the ranks of the sequence, on all of them."""
    for axis in ("ulysses", "ring"):
        if (group := plan.group(axis)).size > 1:
            x = reshard(x, source, Replicate(), group)
    return x


def token_dims(conds: Iterable[Cond]) -> dict[str, int]:
    """Name of a request's tensor -> its dimension that runs over tokens, of those that have one."""
    return {cond.name: cond.dim for cond in conds if cond.stream is not None}


def dealt(plan: Plan, conds: Sequence[Cond], request: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A request's tensors as this rank holds them, and the index tensors of `keys` beside them. conds: the
    family's.
    """
    if ranks(plan)[0] == 1:
        return dict(request)
    lengths = {stream: _length(request, conds, stream) for stream in ("image", "text", "audio")}
    dims = token_dims(conds)
    device = next(iter(request.values())).device
    shares = {name: share(plan, x, dims[name]) if name in dims else x for name, x in request.items()}
    return shares | {
        name: torch.tensor(index, dtype=torch.int64, device=device)
        for name, index in _real(plan, lengths).items()
    }


def keys(plan: Plan, known: Known, stream: str) -> tuple[Tensor, ...]:
    """For `ops.attention`: which keys are real, of each part of the ring in the order in which this rank
    meets them, int64 [real].

    known: the request's tensors that belong to no block. stream: one of `STREAMS`. Empty where the sequence
    is not dealt.
    """
    return (
        tuple(known[f"{KEYS}{stream}.{turn}"] for turn in range(plan.group("ring").size))
        if ranks(plan)[0] > 1
        else ()
    )


def _real(plan: Plan, lengths: Mapping[str, int]) -> dict[str, list[int]]:
    """Name -> places of the real tokens among those that `ulysses` gathers, for each stream and turn of the
    ring. lengths: how many tokens each stream has.
    """
    ring, ulysses = plan.group("ring"), plan.group("ulysses")
    shares = ring.size * ulysses.size
    held = {stream: counts(tokens, shares) for stream, tokens in lengths.items()}
    found = {}
    for stream, parts in STREAMS.items():
        if stream == "audio" and not lengths[stream]:
            continue
        for turn in range(ring.size):
            first = (ring.rank + turn) % ring.size * ulysses.size
            places, start = [], 0
            for rank in range(first, first + ulysses.size):
                for part in parts:
                    places += range(start, start + held[part][rank])
                    start += width(held[part]) if sum(held[part]) else 0
            found[f"{KEYS}{stream}.{turn}"] = places
    return found


def _length(request: Mapping[str, Tensor], conds: Sequence[Cond], stream: str) -> int:
    found = (
        request[cond.name].shape[cond.dim] for cond in conds if cond.stream == stream and cond.name in request
    )
    return next(found, 0)
