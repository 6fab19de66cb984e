"""FLUX.2: its positions and shift, float16, and configs that cannot be."""

from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu

from tests.models.tiny import tiny
from tests.parity import draw
from tinydiff.models import flux2
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.asked import TIME
from tinydiff.parity.denoisers import DENOISERS

TINY = DENOISERS["FLUX.2, references"].config
SIZE, REFERENCES = (1, 3, 5), ((1, 2, 3), (1, 5, 1))


def _ids(references):
    """Positions as diffusers' pipeline makes them."""
    ids = Flux2Pipeline._prepare_latent_ids(torch.empty(1, 1, *SIZE[1:]))
    if references:
        given = Flux2Pipeline._prepare_image_ids([torch.empty(1, 1, *size[1:]) for size in references])
        ids = torch.cat([ids, given], 1)
    return ids


def test_positions_are_those_of_the_reference_pipeline():
    for references in ((), REFERENCES):
        assert torch.equal(flux2.positions(SIZE, references), _ids(references)[0])


def test_float16_residuals_are_held_at_its_largest_number():
    """As in the reference: both streams near the limit, and a gate of 1000 on what the block adds last."""
    both, plan = tiny("FLUX.2, references"), Plan()
    c, inputs = both.network.config, both.asked.inputs
    flat = {name: tensor.half() for name, tensor in both.flat.items()}
    request, _ = flux2.hoist(c, plan, Weights(flat, dtype=torch.float16), inputs, TIME)
    gates = {"text_modulation": 6, "image_modulation": 6, "single_modulation": 3}
    gates = {
        name: torch.tensor([0.0] * (n - 1) + [1000]).half()[None, :, None].expand(1, n, c.width)
        for name, n in gates.items()
    }
    streams = tuple(
        65000 * draw(2, n, c.width).sign().half() for n in (inputs["text"].shape[1], len(inputs["positions"]))
    )
    for fn, at in flux2.blocks(c):
        for x in fn(c, plan, Weights(flat) / at, streams, Weights({}), request | gates):
            assert x.isfinite().all() and x.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, r"patch_size is 2; .*\(1\)"),
        ({"axes_dims_rope": (4, 4, 8)}, r"axes_dims_rope is \(4, 4, 8\); .*\(16\)"),
        ({"axes_dims_rope": (3, 3, 4, 6)}, r"axes_dims_rope is \(3, 3, 4, 6\)"),
        ({"attention_head_dim": 32}, r"axes_dims_rope is \(2, 4, 4, 6\); .*\(32\)"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize("tokens", [16, 256, 4096, 4300, 4301, 8160])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_the_shift_is_the_pipelines(tokens, steps):
    assert abs(flux2.mu(flux2.Config(), tokens, steps, {}) - compute_empirical_mu(tokens, steps)) < 1e-14
