"""FLUX.1: what half types round, its tokens and positions, and configs that cannot be."""

from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from tests.models.tiny import tiny
from tests.parity import close, draw
from tinydiff.models import flux
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.denoisers import DENOISERS

TINY = DENOISERS["FLUX.1"].config
SIZE, REFERENCES = (1, 6, 10), ((1, 4, 6),)  # latents: packed grids of 3 x 5 and 2 x 3


def test_half_types_round_timestep_and_guidance_as_the_reference():
    """The pipeline hands the network bfloat16(timestep) / 1000 and the guidance, and the network multiplies
    both by 1000.
    """
    both = tiny("FLUX.1, guidance")
    inputs = both.asked.inputs
    times, guidance = torch.tensor([987.3, 501.7, 37.1]), torch.tensor([3.3])
    rounded = {name: tensor.bfloat16() for name, tensor in both.flat.items()}
    _, steps = flux.hoist(
        both.network.config,
        Plan(),
        Weights(rounded, dtype=torch.bfloat16),
        inputs | {"pooled": inputs["pooled"][:1], "guidance": guidance},
        times,
    )
    reference = both.reference.bfloat16()
    t, g = (times.bfloat16() / 1000) * 1000, guidance.bfloat16() * 1000
    time = reference.time_text_embed(t, g.expand(3), inputs["pooled"][:1].bfloat16().expand(3, -1))
    expected = reference.norm_out.linear(reference.norm_out.silu(time))
    close(steps["norm_out"][:, 0].flatten(1), expected, 1e-2)


def test_tokens_and_positions_are_those_of_the_pipeline():
    latents = draw(2, 4, 6, 10)
    assert torch.equal(
        patchify(latents[:, :, None], flux.PATCH), FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    )
    made, given = (
        FluxPipeline._prepare_latent_image_ids(1, h // 2, w // 2, None, torch.int64)
        for _, h, w in (SIZE, *REFERENCES)
    )
    given[:, 0] = 1  # as the pipeline of Kontext numbers its image
    assert torch.equal(flux.positions(SIZE, REFERENCES), torch.cat([made, given]))
    assert flux.positions(SIZE, REFERENCES * 3)[:, 0].unique().tolist() == [0, 1, 2, 3]


def test_each_half_of_a_fused_input_is_split_on_its_own():
    rows = {row.name: row for row in flux.spec(TINY)}
    assert {name.split(".", 2)[2]: row.parts for name, row in rows.items() if row.parts} == {
        "proj_out.weight": (32, 128)
    }
    assert rows["single_transformer_blocks.0.proj_out.weight"].split == 1


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
