"""Noise from (seed, image index) alone: drawn on the CPU at the global latent shape, so batch, layout and
device do not change it.

Shape letters: S steps, B images, C channels, F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinydiff.sampling.solvers import Table


def noise(seed: int, index: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    """Image `index` of seed `seed`: standard normal float32 [draws, *shape], from a CPU generator seeded seed
    + index.

    Draw 0 is the initial latents. A solver that renoises continues with draws 1, 2, ... in the order in which
    a diffusers pipeline with that generator would draw. Each draw is one call at `shape`, because torch fills
    a larger tensor with other values.
    """
    generator = torch.Generator().manual_seed((seed + index) % 2**64)
    return torch.stack([torch.randn(tuple(shape), generator=generator) for _ in range(draws)])


def latents(
    seed: int, indices: Sequence[int], shape: Sequence[int], table: Table
) -> tuple[Tensor, Tensor | None]:
    """Initial latents [B, C, F, H, W] of images `indices` and the fresh noise of every step [S, B, C, F, H,
    W].

    shape: one image's latents, (C, F, H, W). The second is None where the table never renoises; its rows are
    0 where a step does not.
    """
    rows = (table.n != 0).nonzero()[:, 0]
    drawn = torch.cat([noise(seed, index, (1, *shape), 1 + len(rows)) for index in indices], dim=1)
    if not table.renoises:
        return drawn[0], None
    fresh = drawn.new_zeros(table.steps, *drawn.shape[1:])
    fresh[rows] = drawn[1:]
    return drawn[0], fresh
