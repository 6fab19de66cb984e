"""Adapters on a network in memory: merged into its weights, or beside them with a strength for each request.

Beside the weights, the low-rank differences of all adapters lie one behind the other in two leaves of each
layer (`ops.linear`). A request says how strong each adapter is, so requests with different adapters share a
batch, and changing the strengths neither copies a weight nor compiles anything again. The directions are
filled up to a multiple of `RANKS` with zeros, so that another adapter of about the same rank fits the
compiled graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tinydiff.io.lora import Difference, measured
from tinydiff.models.family import Record
from tinydiff.models.recipe import Net
from tinydiff.parallel.plan import decoded_row, low_rank_rows
from tinydiff.parallel.shards import shard_weights

RANKS = 64
"""The directions beside a network's weights are a multiple of this."""

ROUNDED_AWAY = 0.5
"""The share of a difference that rounding may lose when it is merged; above it an adapter stays beside."""


Differences = Mapping[str, Difference]
"""Name of a weight -> what an adapter does to it."""


def merged(net: Net[Record], differences: Differences, strength: float) -> Net[Record]:
    """The network with an adapter in its weights. What is not touched is shared with `net`.

    Weights that several ranks hold parts of are made whole one at a time, and each rank keeps its part.
    """
    differences = measured(differences, net.whole)
    changed = ((name, differences[name].apply(x, strength)) for name, x in net.whole(differences))
    return net.with_weights(changed)


def rounded_away(net: Net[Record], differences: Differences, strength: float) -> float:
    """The share of an adapter's differences that the type of the weights would lose.

    It lies between 0 and about 1.
    """
    lost = total = 0.0
    for name, weight in net.whole(differences):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        exact = differences[name].apply(wide, strength)
        lost += (exact.to(weight.dtype) - exact).square().sum().item()
        total += (exact - weight).square().sum().item()
    return (lost / total) ** 0.5 if total else 0.0


def beside(net: Net[Record], adapters: Mapping[str, Differences]) -> Net[Record]:
    """The network with these adapters beside its weights, in place of those that were there.

    Raises ValueError naming a weight whose difference is not low-rank.
    """
    rows = {row.name: row for row in map(decoded_row, net.family.spec(net.config))}
    parts = {name: dict(_low_rank(name, differences)) for name, differences in adapters.items()}
    ranks = {name: max((len(a) for a, _ in pairs.values()), default=0) for name, pairs in parts.items()}
    touched = [rows[name] for name in rows if any(name in pairs for pairs in parts.values())]
    base = {name: x for name, x in net.weights.items() if not name.endswith((".lora_a", ".lora_b"))}
    if not touched:
        return replace(net, weights=base, adapters=(), lora_scale=None)
    total = -(-sum(ranks.values()) // RANKS) * RANKS
    device, leaves = net.device, dict[str, Tensor]()
    for row in touched:
        down, up = low_rank_rows(row, total)
        wide = torch.promote_types(net.dtype, torch.float32) if row.float32 else net.dtype
        a, b = torch.zeros(down.shape, dtype=wide), torch.zeros(up.shape, dtype=wide)
        _fill(a, b, row.name, ranks, parts)
        local = shard_weights({down.name: a, up.name: b}, (down, up), net.plan.along("tp"))
        leaves |= {name: x.to(device) for name, x in local.items()}
    return replace(net, weights=base | leaves, adapters=tuple(ranks.items()), lora_scale=None)


def _low_rank(adapter: str, differences: Differences) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name, each in differences.items():
        pair = each.low_rank()
        if pair is None or not name.endswith("weight"):
            raise ValueError(
                f"the adapter {adapter!r} changes {name} by more than a low-rank product, so it "
                "can only be merged"
            )
        yield name, pair


def _fill(
    a: Tensor,
    b: Tensor,
    weight: str,
    ranks: Mapping[str, int],
    parts: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
) -> None:
    """Write the pairs of all adapters for one weight into its leaves, each from its own first
    direction on.
    """
    first = 0
    for name, rank in ranks.items():
        if weight in parts[name]:
            down, up = parts[name][weight]
            a[first : first + len(down)] = down.flatten(1)
            b[:, first : first + len(down)] = up
        first += rank


def with_strengths(net: Net[Record], strengths: Mapping[str, float]) -> Net[Record]:
    """The network as one request sees it: each adapter beside it at its strength, those not named at 0."""
    if not net.adapters:
        return net
    leaf = next(x for name, x in net.weights.items() if name.endswith(".lora_a"))
    scale = torch.zeros(1, len(leaf), dtype=torch.promote_types(net.dtype, torch.float32))
    first = 0
    for name, rank in net.adapters:
        scale[:, first : first + rank] = strengths.get(name, 0.0)
        first += rank
    return replace(net, lora_scale=scale.to(leaf.device))
