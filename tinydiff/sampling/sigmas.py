"""Noise levels of flow matching.

These are grids of sigma from 1 (noise) towards 0 (clean), and the shifts applied to them.

Every function keeps its argument's dtype: float64 gives the exact grid, float32 the digits that diffusers
stores. Sources: arXiv 2403.03206 (shift), diffusers 0.42.1 `FlowMatchEulerDiscreteScheduler` and
`UniPCMultistepScheduler` (grids, order of steps). Shape letters: S steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRAIN_STEPS = 1000
"""Timesteps of the training schedule. The timestep of a step is `sigma * 1000`."""


def spaced(first: float, last: float, count: int) -> Tensor:
    """`count` evenly spaced values, float64 [count], both ends included.

    Rounded as numpy's linspace rounds. A timestep that is truncated to an integer depends on the last bit,
    where torch.linspace differs.
    """
    grid = torch.arange(count, dtype=torch.float64) * ((last - first) / max(count - 1, 1)) + first
    if count > 1:
        grid[-1] = last
    return grid


def linear_grid(steps: int) -> Tensor:
    """1, 1 - 1/S, ..., 1/S: the unshifted grid [S] that most image pipelines hand to their scheduler."""
    return spaced(1.0, 1 / steps, steps)


def unipc_grid(steps: int, train_steps: int = TRAIN_STEPS) -> Tensor:
    """The unshifted grid [S] of UniPC and DPM-Solver on flows.

    It is S + 1 values from 1 to 1 / train_steps, without the last one.
    """
    return spaced(1.0, 1 / train_steps, steps + 1)[:-1]


def scheduler_grid(steps: int, lowest: float, train_steps: int = TRAIN_STEPS) -> Tensor:
    """The grid [S] from 1 to `lowest` that FlowMatchEuler computes when the pipeline passes none.

    Wan and SD3 pass none.
    """
    return spaced(train_steps, lowest * train_steps, steps) / train_steps


def train_grid(shift: float = 1.0, train_steps: int = TRAIN_STEPS) -> Tensor:
    """The sigmas of the training schedule, float32 [train_steps], from 1 down, statically shifted."""
    return static_shift(torch.arange(train_steps, 0, -1, dtype=torch.float32) / train_steps, shift)


def static_shift(sigmas_S: Tensor, shift: float) -> Tensor:
    """s sigma / (1 + (s - 1) sigma): spends more steps at high noise for s > 1."""
    return shift * sigmas_S / (1 + (shift - 1) * sigmas_S)


def exponential_shift(sigmas_S: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1 / sigma - 1): a static shift of e^mu."""
    return linear_shift(sigmas_S, math.exp(mu))


def linear_shift(sigmas_S: Tensor, mu: float) -> Tensor:
    """mu / (mu + 1 / sigma - 1): a static shift of mu."""
    m = sigmas_S.new_tensor(
        mu
    )  # a tensor, because torch divides a Python number by a tensor as a product with the reciprocal
    return m / (m + (1 / sigmas_S - 1))


def stretch_to_terminal(sigmas_S: Tensor, terminal: float) -> Tensor:
    """Stretch 1 - sigma so that the last sigma is `terminal`.

    A grid whose last sigma is 1 cannot be stretched and yields NaN.
    """
    clean = 1 - sigmas_S
    return 1 - clean / (clean[-1] / (1 - terminal))


def below_one(sigmas_S: Tensor, margin: float = 1e-6) -> Tensor:
    """Lower a first sigma of 1 by `margin`: multistep solvers take the logarithm of 1 - sigma."""
    lowered = sigmas_S.clone()
    if abs(lowered[0].item() - 1) < margin:
        lowered[0] -= margin
    return lowered


def with_zero(sigmas_S: Tensor) -> Tensor:
    """Append the clean end: [S] -> [S + 1], the last value 0."""
    return torch.cat([sigmas_S, sigmas_S.new_zeros(1)])
