"""FLUX.1 against diffusers.FluxTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import flux
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = flux.Config(
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 4, 8),
)
SIZE, REFERENCES = (1, 6, 10), ((1, 4, 6),)  # latents: packed grids of 3 x 5 and 2 x 3
LENGTH = 7
TIMES = torch.tensor([999, 37])

CASES = {
    "schnell": (TINY, (), None),
    "other values out": (replace(TINY, out_channels=12), (), None),
    "dev": (replace(TINY, guidance_embeds=True), (), torch.tensor([4.0])),
    "Kontext": (replace(TINY, guidance_embeds=True), REFERENCES, torch.tensor([2.5, 1.0])),
}


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs."""
    c, references, guidance = CASES[name]
    reference = FluxTransformer2DModel(**asdict(c))
    flat = randomised(reference, 1)
    # diffusers embeds time in float32 whatever comes; `doubles` would widen that, were it not float32 before.
    embed = reference.time_text_embed.time_proj
    embed.register_forward_pre_hook(lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),))
    ids = flux.positions(SIZE, references)
    tokens = draw(2, len(ids), c.in_channels, seed=2)
    inputs = {
        "text": draw(2, LENGTH, c.joint_attention_dim, seed=3),
        "pooled": draw(2, c.pooled_projection_dim, seed=4),
        "positions": ids,
    }
    known = {
        "hidden_states": tokens,
        "encoder_hidden_states": inputs["text"],
        "pooled_projections": inputs["pooled"],
        "timestep": TIMES.double() / 1000,
        "img_ids": ids.double(),
        "txt_ids": torch.zeros(LENGTH, 3, dtype=torch.float64),
    }
    if guidance is not None:
        inputs["guidance"] = guidance
        known["guidance"] = guidance.expand(2)
    return c, flat, reference, known, tokens, inputs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(flux.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(flux.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(y.detach(), expected)
    assert unread(y, weights) == []


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """At timesteps and a guidance that bfloat16 holds: the distance to float64 is that of the reference,
    within a fifth.
    """
    c, flat, _, known, tokens, inputs = _case("dev")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    times = torch.tensor([640.0, 38.0])
    wide = {name: tensor.double() for name, tensor in rounded.items()}
    exact = predict(
        Network(flux.FAMILY, c, dtype=torch.float64), wide, tokens.bfloat16().double(), times, inputs
    )
    ours = predict(Network(flux.FAMILY, c, dtype=torch.bfloat16), rounded, tokens.bfloat16(), times, inputs)
    assert ours.dtype == torch.bfloat16
    reference = FluxTransformer2DModel(**asdict(c)).bfloat16()
    reference.load_state_dict(rounded)
    known = {key: value.bfloat16() for key, value in known.items()} | {"timestep": times.bfloat16() / 1000}
    theirs = reference(**known).sample
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


def test_half_types_round_timestep_and_guidance_as_the_reference():
    """The pipeline hands the network bfloat16(timestep) / 1000 and the guidance, and the network multiplies
    both by 1000.
    """
    c, flat, _, _, _, inputs = _case("dev")
    times, guidance = torch.tensor([987.3, 501.7, 37.1]), torch.tensor([3.3])
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    _, steps = flux.hoist(
        c,
        PLAN,
        Weights(rounded, dtype=torch.bfloat16),
        inputs | {"pooled": inputs["pooled"][:1], "guidance": guidance},
        times,
    )
    reference = FluxTransformer2DModel(**asdict(c)).bfloat16()
    reference.load_state_dict(rounded)
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
