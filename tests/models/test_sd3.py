"""The transformer of Stable Diffusion 3 and 3.5 against diffusers.SD3Transformer2DModel in float64, every
parameter redrawn.
"""

from dataclasses import asdict

import pytest
import torch
from diffusers import SD3Transformer2DModel

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import sd3
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = sd3.Config(
    sample_size=8,
    in_channels=3,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    caption_projection_dim=32,
    pooled_projection_dim=12,
    out_channels=5,
    pos_embed_max_size=9,
)  # fmt: skip
SIZE = (1, 6, 10)  # latents: a patch grid of 3 x 5
TIMES = torch.tensor([988.5, 37.25])


def _configs(**changes):
    return sd3.Config(**asdict(TINY) | changes)


CASES = {
    "3 medium": TINY,
    "3.5 large": _configs(qk_norm="rms_norm"),
    "3.5 medium": _configs(qk_norm="rms_norm", dual_attention_layers=(0, 1), num_layers=4),
    "dual attention to the end": _configs(dual_attention_layers=(1, 2), patch_size=1, pos_embed_max_size=10),
}


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs."""
    c = CASES[name]
    reference = SD3Transformer2DModel(**asdict(c))
    flat = randomised(reference, 1)
    x, text, pooled = (
        draw(2, c.in_channels, *SIZE, seed=2),
        draw(2, 7, c.joint_attention_dim, seed=3),
        draw(2, c.pooled_projection_dim, seed=4),
    )
    known = {
        "hidden_states": x[:, :, 0],
        "timestep": TIMES,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }
    inputs = {"text": text, "pooled": pooled, "positions": sd3.positions(c, SIZE)}
    return c, flat, reference, known, patchify(x, (1, c.patch_size, c.patch_size)), inputs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(sd3.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(sd3.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(unpatchify(y, (1, c.patch_size, c.patch_size), SIZE)[:, :, 0], expected)
    assert unread(y, weights) == []


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """The distance to float64 with the same rounded weights is that of the reference, within a fifth."""
    c, flat, reference, known, tokens, inputs = _case("3.5 medium")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    exact = predict(
        Network(sd3.FAMILY, c, dtype=torch.float64),
        {name: t.double() for name, t in rounded.items()},
        tokens,
        TIMES,
        inputs,
    )
    ours = predict(Network(sd3.FAMILY, c, dtype=torch.bfloat16), rounded, tokens.bfloat16(), TIMES, inputs)
    assert ours.dtype == torch.bfloat16
    halves = {name: value.bfloat16() for name, value in known.items() if name != "timestep"}
    theirs = patchify(reference.bfloat16()(**known | halves).sample[:, :, None], (1, 2, 2))
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


def test_an_image_larger_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match=r"10 x 3 patches.*9 x 9"):
        sd3.positions(TINY, (1, 20, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'.*'rms_norm'"),
        (
            {"caption_projection_dim": 30},
            "caption_projection_dim is 30; it must be the width of the network, 32",
        ),
        (
            {"dual_attention_layers": (0, 3)},
            r"dual_attention_layers is \(0, 3\); the network has layers 0 to 2",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _configs(**changes)
