"""Noise: what a diffusers pipeline draws, and independence of batch and table."""

import torch
from diffusers.utils.torch_utils import randn_tensor

from tinydiff.sampling.noise import latents, noise
from tinydiff.sampling.solvers import dmd, flow_euler

SHAPE = (4, 2, 3, 5)


def test_draws_go_on_as_one_diffusers_generator():
    generator = torch.Generator("cpu").manual_seed(7 + 2)
    want = [randn_tensor((1, *SHAPE), generator=generator, dtype=torch.float32) for _ in range(3)]
    assert torch.equal(noise(7, 2, (1, *SHAPE), draws=3), torch.stack(want))


def test_images_do_not_depend_on_their_batch():
    table = flow_euler(torch.tensor([1.0, 0.5, 0.0]))
    batch, fresh = latents(11, [0, 1, 2], SHAPE, table)
    alone, _ = latents(12, [0], SHAPE, table)
    assert fresh is None and batch.dtype == torch.float32
    assert torch.equal(batch[1:2], alone) and not torch.equal(batch[0], batch[1])


def test_fresh_noise_lies_on_the_rows_that_renoise():
    table = dmd([1000, 757, 522])
    start, fresh = latents(5, [0, 3], SHAPE, table)
    assert fresh is not None and fresh.shape == (3, 2, *SHAPE)
    for column, index in enumerate((0, 3)):
        drawn = noise(5, index, (1, *SHAPE), draws=3)[:, 0]
        assert torch.equal(torch.stack([start[column], fresh[0, column], fresh[1, column]]), drawn)
    assert fresh[2].abs().sum() == 0


def test_largest_seed_wraps():
    assert torch.equal(noise(2**64 - 1, 1, SHAPE), noise(0, 0, SHAPE))
