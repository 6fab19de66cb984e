"""A step cache: a step much like an earlier one reuses its result.

Where the first blocks change their input much as in the earlier step, what the other blocks changed then is
added again, and they do not run.

The decision is made at every step, from the prompt's branch, and holds for all branches. The state between
steps is tensors, so that one compiled graph serves every threshold. Source: DBCache of the package cache-dit,
whose decisions these are. Shape letters: B images, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.ops.network import (
    RESIDENT,
    Calls,
    Hoisted,
    Hooks,
    Network,
    Streams,
    Walk,
    of_step,
    plain,
    walk,
)
from tinydiff.parallel.plan import Plan
from tinydiff.parallel.sequence import sum_over_tokens

Memory = dict[str, Tensor]
"""Tensors that pass from step to step. Each keeps its shape, dtype and strides."""
Tensors = Callable[[], tuple[Tensor, ...]]
Choose = Callable[[Tensor, Tensors, Tensors], tuple[Tensor, ...]]
"""(bool [], function if true, function if false) -> the result of one of them."""


class Reuse(NamedTuple):
    """How a network with a step cache is built."""

    first_blocks: int
    """Blocks that run at every step, and whose change is compared."""
    choose: Choose


class Limits(NamedTuple):
    """When a step may take over another's result. Each is a 0-d tensor."""

    threshold: Tensor
    """float32. The first blocks' change may differ by less than this part of the earlier step's."""
    warmup: Tensor
    """int64. So many steps at the beginning run all blocks."""
    most: Tensor
    """int64. So many steps one after another take over at most."""


def choose_now(condition: Tensor, if_true: Tensors, if_false: Tensors) -> tuple[Tensor, ...]:
    """A `Choose` that reads the condition from the device."""
    return if_true() if condition.item() else if_false()


def choose_in_graph(condition: Tensor, if_true: Tensors, if_false: Tensors) -> tuple[Tensor, ...]:
    """A `Choose` within a compiled graph."""
    return torch.cond(condition, if_true, if_false, ())  # pyright: ignore[reportUnknownMemberType]


def memory(network: Network, hoisted: Hoisted, x_BLP: Tensor) -> Memory:
    """The cache before the first step, of the shapes that the tokens [B, L, P] have in the blocks.

    `done`: steps so far. `reused`: those among them that took over. `run`: those since the last that did not.
    `first.J`: what the first blocks changed in stream J. `rest.B.J`: what the others changed, of branch B.
    """
    number = torch.zeros(1, dtype=torch.int64, device=x_BLP.device)
    at_first = [of_step(branch, number) for branch in hoisted.branches]
    entered: list[Streams] = []

    def note(run: Walk, streams: list[Streams]) -> list[Streams]:
        entered.extend(streams)
        return streams

    calls = {block: plain(network, block) for block, _ in network.family.blocks(network.config)}
    walk(network, [calls] * len(at_first), hoisted.weights, x_BLP, at_first, Hooks(RESIDENT, note))
    streams = [_denoised(network, each) for each in entered]
    counts = {name: torch.zeros(1, dtype=torch.int64, device=x_BLP.device) for name in COUNTS}
    first = {f"first.{j}": torch.zeros_like(x) for j, x in enumerate(streams[0])}
    rest = {
        f"rest.{b}.{j}": torch.zeros_like(x) for b, each in enumerate(streams) for j, x in enumerate(each)
    }
    return counts | first | rest


COUNTS = ("done", "reused", "run")


def restarted(held: Memory) -> Memory:
    """The cache before the first step of another network of the same shapes."""
    return {name: x if name == "reused" else torch.zeros_like(x) for name, x in held.items()}


def stack(
    network: Network,
    cache: Reuse,
    calls: Sequence[Calls],
    limits: Limits,
    held: Memory,
    kept: Memory,
) -> Callable[[Walk, list[Streams]], list[Streams]]:
    """The hook over the whole stack (`network.Hooks.stack`).

    It reads `held`, and fills `kept` with the memory after the step. calls: those of each branch for the
    blocks that may be left out.
    """

    def run_or_reuse(run: Walk, entered: list[Streams]) -> list[Streams]:
        before = [_denoised(network, streams) for streams in entered]
        streams = run(entered, 0, cache.first_blocks)
        after = [_denoised(network, each) for each in streams]
        change = [a - b for a, b in zip(after[0], before[0], strict=True)]
        first = [held[f"first.{j}"] for j in range(len(change))]
        reuse = _alike(network.plan, first, change, limits, held)
        names = [f"rest.{b}.{j}" for b, each in enumerate(after) for j in range(len(each))]
        flat = [x for each in after for x in each]

        def compute() -> tuple[Tensor, ...]:
            ends = run(streams, cache.first_blocks, None, calls)
            last = [x for each in ends for x in _denoised(network, each)]
            rest = (x - y for x, y in zip(last, flat, strict=True))
            return *(x.contiguous() for x in last), *(x.contiguous() for x in rest)

        def take_over() -> tuple[Tensor, ...]:
            rest = [held[name] for name in names]
            return *(x + y for x, y in zip(flat, rest, strict=True)), *(x.clone() for x in rest)

        results = cache.choose(reuse, take_over, compute)
        last, rest = list(results[: len(flat)]), results[len(flat) :]
        count = reuse.to(torch.int64).view(1)
        new = {"done": held["done"] + 1, "reused": held["reused"] + count, "run": (held["run"] + 1) * count}
        new |= {
            f"first.{j}": torch.where(reuse, x, y) for j, (x, y) in enumerate(zip(first, change, strict=True))
        }
        new |= zip(names, rest, strict=True)
        kept.update({name: new[name] for name in held})  # the loop operator asks for one order
        return [_replaced(each, [last.pop(0) for _ in own]) for each, own in zip(streams, after, strict=True)]

    return run_or_reuse


def _alike(plan: Plan, old: list[Tensor], new: list[Tensor], limits: Limits, held: Memory) -> Tensor:
    """Whether the step may take over: bool []. All zeros, as before the first step, are like nothing."""
    difference, size = (
        sum_over_tokens(plan, torch.stack([x.abs().sum(dtype=torch.float32) for x in each]).sum())
        for each in ([a - b for a, b in zip(old, new, strict=True)], old)
    )
    near = difference < limits.threshold * size
    return near & (held["done"][0] >= limits.warmup) & (held["run"][0] < limits.most)


def _denoised(network: Network, streams: Streams) -> tuple[Tensor, ...]:
    """The streams whose tokens are denoised."""
    return streams[-network.family.denoised_streams :] if isinstance(streams, tuple) else (streams,)


def _replaced(streams: Streams, last: Sequence[Tensor]) -> Streams:
    """The streams with others in the place of those whose tokens are denoised."""
    return (*streams[: -len(last)], *last) if isinstance(streams, tuple) else last[0]
