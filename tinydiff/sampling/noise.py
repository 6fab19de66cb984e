"""Noise from (seed, image index) alone.

It is drawn on the CPU at the global latent shape, so batch, layout and device do not change it. S in a shape
is the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinydiff.sampling.solvers import Table

Sizes = Sequence[Sequence[int]]
"""Size of one output's latents of each kind, without B."""


def drawn(seed: int, shapes: Sizes) -> list[Tensor]:
    """Standard normal float32 tensors, one after another from a CPU generator seeded `seed`.

    Each is one call at its shape: torch fills a larger tensor with other values.
    """
    generator = torch.Generator().manual_seed(seed % 2**64)
    return [torch.randn(tuple(shape), generator=generator) for shape in shapes]


def noise(seed: int, index: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    """Image `index` of seed `seed`: standard normal float32 [draws, *shape], the noise of seed + index."""
    return torch.stack(drawn(seed + index, [shape] * draws))


def order(sizes: Sizes, table: Table) -> list[tuple[int, ...]]:
    """Shapes of all that one loop draws, in the order in which a diffusers pipeline does.

    The kinds' initial latents come first, then their fresh noise, step by step.
    """
    return [(1, *size) for size in sizes] * (1 + int((table.n != 0).sum()))


def latents(
    seed: int, sizes: Sizes, table: Table, before: Sizes = ()
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Initial latents of each kind [1, *size], and their fresh noise of every step [S, 1, *size].

    before: shapes that the same generator draws first, for the earlier loops of a pipeline. The second is
    None where the table never renoises; its rows are 0 where a step does not.
    """
    every = drawn(seed, [*before, *order(sizes, table)])[len(before) :]
    start = every[: len(sizes)]
    if not table.renoises:
        return start, None
    renoising = (table.n != 0).nonzero()[:, 0]
    fresh = [x.new_zeros(table.steps, *x.shape) for x in start]
    for kind, x in enumerate(fresh):
        x[renoising] = torch.stack(every[kind :: len(sizes)][1:])
    return start, fresh
