"""Ovis-Image: what half types round, its tokens and positions, and configs that cannot be."""

from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.ovis_image.pipeline_ovis_image import OvisImagePipeline

from tests.models.tiny import tiny
from tests.parity import close, draw
from tinydiff.models import ovis
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.denoisers import DENOISERS

TINY = DENOISERS["Ovis-Image"].config
SIZE = (1, 6, 10)  # latents: a packed grid of 3 x 5


def test_half_types_round_the_timestep_as_the_reference():
    """The pipeline hands the network bfloat16(timestep) / 1000, and the network multiplies it by 1000."""
    both = tiny("Ovis-Image")
    times = torch.tensor([987.3, 501.7, 37.1])
    rounded = {name: tensor.bfloat16() for name, tensor in both.flat.items()}
    _, steps = ovis.hoist(TINY, Plan(), Weights(rounded, dtype=torch.bfloat16), both.asked.inputs, times)
    reference = both.reference.bfloat16()
    time = reference.timestep_embedder(reference.time_proj((times.bfloat16() / 1000) * 1000).bfloat16())
    expected = reference.norm_out.linear(reference.norm_out.silu(time))
    close(steps["norm_out"][:, 0].flatten(1), expected, 1e-2)


def test_tokens_and_positions_are_those_of_the_pipeline():
    latents = draw(2, 4, 6, 10)
    assert torch.equal(
        patchify(latents[:, :, None], ovis.PATCH), OvisImagePipeline._pack_latents(latents, 2, 4, 6, 10)
    )
    assert torch.equal(
        ovis.positions(SIZE), OvisImagePipeline._prepare_latent_image_ids(1, 3, 5, None, torch.int64)
    )


def test_each_half_of_a_fused_weight_is_split_on_its_own():
    parts = {row.name.split(".", 2)[2]: (row.parts, row.split) for row in ovis.spec(TINY) if row.parts}
    gated = ("ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")
    assert parts == {f"{name}.{leaf}": ((128, 128), 0) for name in gated for leaf in ("weight", "bias")} | {
        "proj_out.weight": ((32, 128), 1)
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch_size": 2}, r"patch_size is 2; .*1"),
        ({"axes_dims_rope": (4, 4, 4)}, r"axes_dims_rope is \(4, 4, 4\); .*16"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, **changes)
