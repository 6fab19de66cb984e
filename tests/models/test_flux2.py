"""FLUX.2 against diffusers.Flux2Transformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models import flux2
from tinydiff.models.evaluate import predict
from tinydiff.ops.weights import Weights, leaves
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
    "another feed-forward, other values out": (replace(TINY, mlp_ratio=2.5, out_channels=5, eps=1e-3), (), None),
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
    tokens, text = draw(2, ids.shape[1], c.in_channels, seed=2), draw(2, LENGTH, c.joint_attention_dim, seed=3)
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
    seen = Recording(flat)
    close(predict(flux2, c, PLAN, Weights(seen), tokens, TIMES, inputs), expected)
    assert seen.read == set(flat)


@pytest.mark.parametrize("name", CASES)
def test_hoisted_rows_equal_single_evaluations(name):
    """What the loop does: hoist once for all timesteps, then each step with its row."""
    c, flat, _, _, tokens, inputs = _case(name)
    w, times = Weights(flat), torch.tensor([999, 640, 1])
    request, steps = flux2.hoist(c, PLAN, w, inputs, times)
    assert {len(rows) for rows in steps.values()} == {3}
    for i, t in enumerate(times):
        step = {key: rows[i] for key, rows in steps.items()}
        shared = step | {key: request[key] for key in flux2.SHARED}
        x = flux2.pre(c, PLAN, w, tokens, Weights(request), step)
        for fn, at in flux2.blocks(c):  # plain dicts, as they cross the boundary of a compiled region
            x = fn(c, PLAN, Weights(leaves(flat, at)), x, Weights(leaves(request, at)), shared)
        y = flux2.post(c, PLAN, w, x, Weights(request), step)
        close(y, predict(flux2, c, PLAN, w, tokens, t[None], inputs), 1e-12)


def test_a_block_returns_new_memory():
    c, flat, _, _, tokens, inputs = _case("dev with references and two scales")
    w = Weights(flat)
    request, steps = flux2.hoist(c, PLAN, w, inputs, TIMES[:1])
    step = {key: rows[0] for key, rows in steps.items()}
    shared = step | {key: request[key] for key in flux2.SHARED}
    streams = flux2.pre(c, PLAN, w, tokens, Weights(request), step)
    held = {t.untyped_storage().data_ptr() for t in (*streams, *flat.values(), *request.values(), *step.values())}
    before = [x.clone() for x in streams]
    for fn, at in flux2.blocks(c):
        made = {t.untyped_storage().data_ptr() for t in fn(c, PLAN, w / at, streams, Weights(request) / at, shared)}
        assert len(made) == 2 and not made & held
    assert all(map(torch.equal, streams, before)), "a block wrote into its input"


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, texts and latents: the distance to float64 is that of the reference, within a fifth.

    Times and scales are such as bfloat16 holds: the reference rounds them, and so do we, 999 to 1000.
    """
    c, flat, reference, known, tokens, inputs = _case("dev with references and two scales")
    times, known["timestep"] = torch.tensor([500, 250]), torch.tensor([0.5, 0.25])
    inputs["guidance"] = known["guidance"] = torch.tensor([2.0, 1.0])
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    exact = predict(flux2, c, PLAN, Weights({name: t.double() for name, t in rounded.items()}), tokens, times, inputs)
    ours = predict(flux2, c, PLAN, Weights(rounded), tokens.bfloat16(), times, inputs)
    assert ours.dtype == torch.bfloat16
    reference.load_state_dict(rounded)
    reference.bfloat16()
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        known[name] = known[name].bfloat16()
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, reference(**known).sample))
    assert error < 1.2 * allowed < 0.2


def test_the_dims_name_the_dimensions_that_run_over_tokens():
    c, flat, _, _, tokens, inputs = _case("klein with references")
    request, _ = flux2.hoist(c, PLAN, Weights(flat), inputs, TIMES)
    assert set(request) == set(flux2.TOKEN_DIMS) | set(flux2.TEXT_DIMS)
    assert {request[key].shape[dim] for key, dim in flux2.TOKEN_DIMS.items()} == {tokens.shape[1]}
    assert {request[key].shape[dim] for key, dim in flux2.TEXT_DIMS.items()} == {LENGTH}


def test_one_text_serves_all_images():
    c, flat, _, _, tokens, inputs = _case("dev")
    texts = inputs["text"][:1], inputs["text"][:1].repeat(2, 1, 1)
    y, expected = (predict(flux2, c, PLAN, Weights(flat), tokens, TIMES[:1], inputs | {"text": text}) for text in texts)
    close(y, expected, 1e-12)


def test_positions_are_those_of_the_reference_pipeline():
    for references in ((), REFERENCES):
        assert torch.equal(flux2.positions(SIZE, references), _ids(references)[0])


def test_float16_residuals_are_held_at_its_largest_number():
    """As in the reference: both streams near the limit, and a gate of 1000 on what the block adds last."""
    c, flat, _, _, tokens, inputs = _case("klein")
    flat = {name: tensor.half() for name, tensor in flat.items()}
    request, _ = flux2.hoist(c, PLAN, Weights(flat), inputs, TIMES[:1])
    gates = {"text_modulation": 6, "image_modulation": 6, "single_modulation": 3}
    gates = {name: torch.tensor([0.0] * (n - 1) + [1000]).half()[None, :, None].expand(1, n, c.width) for name, n in gates.items()}
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
