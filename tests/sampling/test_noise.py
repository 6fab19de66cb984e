"""Noise: what a diffusers pipeline draws, and independence of batch and table."""

import torch
from diffusers.utils.torch_utils import randn_tensor

from tinydiff.sampling.noise import latents, noise, order
from tinydiff.sampling.solvers import dmd, flow_euler

SHAPE = (4, 2, 3, 5)


def test_draws_go_on_as_one_diffusers_generator():
    generator = torch.Generator("cpu").manual_seed(7 + 2)
    want = [randn_tensor((1, *SHAPE), generator=generator, dtype=torch.float32) for _ in range(3)]
    assert torch.equal(noise(7, 2, (1, *SHAPE), draws=3), torch.stack(want))


def test_an_image_index_counts_on_from_the_seed():
    table = flow_euler(torch.tensor([1.0, 0.5, 0.0]))
    [alone], fresh = latents(12, [SHAPE], table)
    assert fresh is None and alone.dtype == torch.float32
    assert torch.equal(noise(11, 1, (1, *SHAPE))[0], alone) and not torch.equal(
        noise(11, 0, (1, *SHAPE))[0], alone
    )


def test_fresh_noise_lies_on_the_rows_that_renoise():
    [start], made = latents(8, [SHAPE], dmd([1000, 757, 522]))
    assert made is not None
    [fresh] = made
    assert fresh.shape == (3, 1, *SHAPE)
    assert torch.equal(torch.stack([start, fresh[0], fresh[1]]), noise(8, 0, (1, *SHAPE), draws=3))
    assert fresh[2].abs().sum() == 0


def test_kinds_of_latents_and_loops_draw_from_one_generator_in_turn():
    """Video and sound of a first loop that renoises once, then those of a second loop."""
    sound, table, again = (4, 7), dmd([1000, 522]), flow_euler(torch.tensor([0.5, 0.0]))
    generator = torch.Generator("cpu").manual_seed(7)
    want = [torch.randn(1, *shape, generator=generator) for shape in (SHAPE, sound) * 3]
    start, fresh = latents(7, [SHAPE, sound], table)
    assert fresh is not None
    assert all(torch.equal(x, y) for x, y in zip([*start, fresh[0][0], fresh[1][0]], want[:4], strict=True))
    later, nothing = latents(7, [SHAPE, sound], again, order([SHAPE, sound], table))
    assert nothing is None and all(torch.equal(x, y) for x, y in zip(later, want[4:], strict=True))


def test_largest_seed_wraps():
    assert torch.equal(noise(2**64 - 1, 1, SHAPE), noise(0, 0, SHAPE))
