"""Grids and shifts against numpy and diffusers' own formulas."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tinydiff.sampling import sigmas


@pytest.mark.parametrize("count", [1, 2, 3, 9, 50, 61])
def test_spaced_rounds_as_numpy(count):
    assert torch.equal(sigmas.spaced(1.0, 1e-3, count), torch.from_numpy(np.linspace(1.0, 1e-3, count)))


def test_linear_grid_is_one_minus_i_over_n():
    assert torch.allclose(
        sigmas.linear_grid(8), 1 - torch.arange(8, dtype=torch.float64) / 8, atol=0, rtol=1e-15
    )
    assert sigmas.linear_grid(1).tolist() == [1.0]


def test_unipc_grid_stops_short_of_the_last():
    assert np.array_equal(sigmas.unipc_grid(20).numpy(), np.linspace(1, 1 / 1000, 21)[:-1])


def test_dynamic_shifts_are_static_shifts():
    grid = sigmas.linear_grid(12)
    assert torch.allclose(
        sigmas.exponential_shift(grid, 0.7), sigmas.static_shift(grid, np.exp(0.7)), rtol=1e-14
    )
    assert torch.allclose(sigmas.linear_shift(grid, 2.5), sigmas.static_shift(grid, 2.5), rtol=1e-14)


def test_stretch_ends_at_terminal_and_keeps_the_first():
    stretched = sigmas.stretch_to_terminal(sigmas.linear_grid(10), 0.1)
    assert stretched[0] == 1 and abs(stretched[-1].item() - 0.1) < 1e-15


def test_below_one_touches_only_a_first_sigma_of_one():
    grid = sigmas.linear_grid(4)
    assert sigmas.below_one(grid).tolist() == [1 - 1e-6, *grid[1:].tolist()]
    assert torch.equal(sigmas.below_one(grid * 0.9), grid * 0.9)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_train_grid_is_the_schedulers(shift):
    assert torch.equal(sigmas.train_grid(shift), FlowMatchEulerDiscreteScheduler(shift=shift).sigmas)
