"""Ovis-Image against diffusers.OvisImageTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import OvisImageTransformer2DModel
from diffusers.pipelines.ovis_image.pipeline_ovis_image import OvisImagePipeline

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import ovis
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = ovis.Config(
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    axes_dims_rope=(4, 4, 8),
)
SIZE = (1, 6, 10)  # latents: a packed grid of 3 x 5
LENGTH = 7
TIMES = torch.tensor([999, 37])

CASES = {"as released": TINY, "other values out": replace(TINY, out_channels=12)}


def _case(c):
    """Weights, the reference, its keyword arguments, and our tokens and inputs."""
    reference = OvisImageTransformer2DModel(**asdict(c))
    flat = randomised(reference, 1)
    # diffusers embeds time in float32 whatever comes; `doubles` would widen that, were it not float32 before.
    reference.time_proj.register_forward_pre_hook(
        lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),)
    )
    ids = ovis.positions(SIZE)
    tokens, text = draw(2, len(ids), c.in_channels, seed=2), draw(2, LENGTH, c.joint_attention_dim, seed=3)
    known = {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": TIMES.double() / 1000,
        "img_ids": ids.double(),
        "txt_ids": torch.tensor([[0, i, i] for i in range(LENGTH)]).double(),
    }
    return flat, reference, known, tokens, {"text": text, "positions": ids}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c = CASES[name]
    flat, reference, known, tokens, inputs = _case(c)
    assert shapes(ovis.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(ovis.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(y.detach(), expected)
    assert unread(y, weights) == []


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """At timesteps that bfloat16 holds: the distance to float64 is that of the reference, within a fifth."""
    flat, _, known, tokens, inputs = _case(TINY)
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    times = torch.tensor([640.0, 38.0])
    wide = {name: tensor.double() for name, tensor in rounded.items()}
    exact = predict(
        Network(ovis.FAMILY, TINY, dtype=torch.float64), wide, tokens.bfloat16().double(), times, inputs
    )
    ours = predict(
        Network(ovis.FAMILY, TINY, dtype=torch.bfloat16), rounded, tokens.bfloat16(), times, inputs
    )
    assert ours.dtype == torch.bfloat16
    reference = OvisImageTransformer2DModel(**asdict(TINY)).bfloat16()
    reference.load_state_dict(rounded)
    theirs = reference(
        **{key: value.bfloat16() for key, value in known.items()} | {"timestep": times.bfloat16() / 1000}
    ).sample
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


def test_half_types_round_the_timestep_as_the_reference():
    """The pipeline hands the network bfloat16(timestep) / 1000, and the network multiplies it by 1000."""
    flat, _, _, _, inputs = _case(TINY)
    times = torch.tensor([987.3, 501.7, 37.1])
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    _, steps = ovis.hoist(TINY, PLAN, Weights(rounded, dtype=torch.bfloat16), inputs, times)
    reference = OvisImageTransformer2DModel(**asdict(TINY)).bfloat16()
    reference.load_state_dict(rounded)
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
