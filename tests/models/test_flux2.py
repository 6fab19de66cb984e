"""FLUX.2 against diffusers.Flux2Transformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import flux2
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = flux2.Config(
    in_channels=6,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    timestep_guidance_channels=8,
    axes_dims_rope=(2, 4, 4, 6),
    guidance_embeds=False,
)
DEV = replace(TINY, guidance_embeds=True)
SIZE, REFERENCES = (1, 3, 5), ((1, 2, 3), (1, 5, 1))
LENGTH = 7
TIMES = torch.tensor([999, 37])

CASES = {
    "klein": (TINY, (), None),
    "klein with references": (TINY, REFERENCES, None),
    "dev": (DEV, (), torch.tensor([4.0])),
    "dev with references and two scales": (DEV, REFERENCES, torch.tensor([2.5, 1.0])),
    "another feed-forward, other values out": (
        replace(TINY, mlp_ratio=2.5, out_channels=5, eps=1e-3),
        (),
        None,
    ),
}


def _ids(references):
    """Positions as diffusers' pipeline makes them."""
    ids = Flux2Pipeline._prepare_latent_ids(torch.empty(1, 1, *SIZE[1:]))
    if references:
        given = Flux2Pipeline._prepare_image_ids([torch.empty(1, 1, *size[1:]) for size in references])
        ids = torch.cat([ids, given], 1)
    return ids


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs."""
    c, references, guidance = CASES[name]
    reference = Flux2Transformer2DModel(**asdict(c))
    flat = randomised(reference, 1)
    # diffusers embeds time in float32 whatever comes; `doubles` would widen that, were it not float32 before.
    embed = reference.time_guidance_embed.time_proj
    embed.register_forward_pre_hook(lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),))
    ids = _ids(references)
    tokens, text = (
        draw(2, ids.shape[1], c.in_channels, seed=2),
        draw(2, LENGTH, c.joint_attention_dim, seed=3),
    )
    inputs = {"text": text, "positions": flux2.positions(SIZE, references)}
    known = {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": TIMES.double() / 1000,
        "img_ids": ids.double(),
        "txt_ids": Flux2Pipeline._prepare_text_ids(text).double(),
    }
    if guidance is not None:
        inputs["guidance"] = guidance
        known["guidance"] = guidance.expand(2)
    return c, flat, reference, known, tokens, inputs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(flux2.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(flux2.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(y.detach(), expected)
    assert unread(y, weights) == []


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, texts and latents: the distance to float64 is that of the reference, within a fifth.

    Times and scales are such as bfloat16 holds: the reference rounds them, and so do we, 999 to 1000.
    """
    c, flat, reference, known, tokens, inputs = _case("dev with references and two scales")
    times, known["timestep"] = torch.tensor([500, 250]), torch.tensor([0.5, 0.25])
    inputs["guidance"] = known["guidance"] = torch.tensor([2.0, 1.0])
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    exact = predict(
        Network(flux2.FAMILY, c, dtype=torch.float64),
        {name: t.double() for name, t in rounded.items()},
        tokens,
        times,
        inputs,
    )
    ours = predict(Network(flux2.FAMILY, c, dtype=torch.bfloat16), rounded, tokens.bfloat16(), times, inputs)
    assert ours.dtype == torch.bfloat16
    reference.load_state_dict(rounded)
    reference.bfloat16()
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        known[name] = known[name].bfloat16()
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, reference(**known).sample))
    assert error < 1.2 * allowed < 0.2


def test_positions_are_those_of_the_reference_pipeline():
    for references in ((), REFERENCES):
        assert torch.equal(flux2.positions(SIZE, references), _ids(references)[0])


def test_float16_residuals_are_held_at_its_largest_number():
    """As in the reference: both streams near the limit, and a gate of 1000 on what the block adds last."""
    c, flat, _, _, tokens, inputs = _case("klein")
    flat = {name: tensor.half() for name, tensor in flat.items()}
    request, _ = flux2.hoist(c, PLAN, Weights(flat, dtype=torch.float16), inputs, TIMES[:1])
    gates = {"text_modulation": 6, "image_modulation": 6, "single_modulation": 3}
    gates = {
        name: torch.tensor([0.0] * (n - 1) + [1000]).half()[None, :, None].expand(1, n, c.width)
        for name, n in gates.items()
    }
    streams = tuple(65000 * draw(2, n, c.width).sign().half() for n in (LENGTH, tokens.shape[1]))
    for fn, at in flux2.blocks(c):
        for x in fn(c, PLAN, Weights(flat) / at, streams, Weights({}), request | gates):
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
