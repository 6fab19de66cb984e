"""ERNIE-Image against diffusers.ErnieImageTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModel

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models import ernie
from tinydiff.models.evaluate import predict
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.weights import Weights, leaves
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = ernie.Config(
    hidden_size=32,
    num_attention_heads=2,
    num_layers=2,
    ffn_hidden_size=40,
    in_channels=6,
    out_channels=6,
    text_in_dim=20,
    rope_axes_dim=(4, 6, 6),
)
SIZE, LENGTH = (1, 3, 5), 7
TIMES = torch.tensor([999, 37])

CASES = {
    "one length": (TINY, None),
    "two lengths": (TINY, (3, 7)),
    "other values out": (replace(TINY, out_channels=5, eps=1e-3), None),
}


def _case(name):
    """Config, weights, the reference, its keyword arguments, and our tokens and inputs."""
    c, lengths = CASES[name]
    reference = ErnieImageTransformer2DModel(**asdict(c))
    flat = randomised(reference, 1)
    x, text = draw(2, c.in_channels, *SIZE, seed=2), draw(2, LENGTH, c.text_in_dim, seed=3)
    inputs = {"text": text, "positions": ernie.positions(SIZE)}
    ends = torch.tensor(lengths or (LENGTH, LENGTH))
    if lengths:
        inputs["mask"] = (torch.arange(LENGTH) < ends[:, None]).long()
    known = {"hidden_states": x[:, :, 0], "timestep": TIMES, "text_bth": text, "text_lens": ends}
    return c, flat, reference, known, patchify(x, (1, 1, 1)), inputs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(ernie.spec(c)) == shapes(flat)
    with doubles():
        expected = reference(**known).sample
    seen = Recording(flat)
    y = predict(ernie, c, PLAN, Weights(seen), tokens, TIMES, inputs)
    close(unpatchify(y, (1, 1, 1), SIZE)[:, :, 0], expected)
    assert seen.read == set(flat)


def test_each_text_of_a_batch_is_as_if_alone():
    c, flat, _, _, tokens, inputs = _case("two lengths")
    both = predict(ernie, c, PLAN, Weights(flat), tokens, TIMES[:1], inputs)
    for i, length in enumerate((3, 7)):
        alone = {"text": inputs["text"][i : i + 1, :length], "positions": inputs["positions"]}
        close(both[i : i + 1], predict(ernie, c, PLAN, Weights(flat), tokens[i : i + 1], TIMES[:1], alone))


@pytest.mark.parametrize("name", CASES)
def test_hoisted_rows_equal_single_evaluations(name):
    """What the loop does: hoist once for all timesteps, then each step with its row."""
    c, flat, _, _, tokens, inputs = _case(name)
    w, times = Weights(flat), torch.tensor([999, 640, 1])
    request, steps = ernie.hoist(c, PLAN, w, inputs, times)
    assert {len(rows) for rows in steps.values()} == {3}
    for i, t in enumerate(times):
        step = {key: rows[i] for key, rows in steps.items()}
        shared = step | {key: request[key] for key in ernie.SHARED if key in request}
        x = ernie.pre(c, PLAN, w, tokens, Weights(request), step)
        for fn, at in ernie.blocks(c):  # plain dicts, as they cross the boundary of a compiled region
            x = fn(c, PLAN, Weights(leaves(flat, at)), x, Weights(leaves(request, at)), shared)
        y = ernie.post(c, PLAN, w, x, Weights(request), step)
        close(y, predict(ernie, c, PLAN, w, tokens, t[None], inputs), 1e-12)


def test_a_block_returns_new_memory():
    c, flat, _, _, tokens, inputs = _case("two lengths")
    w = Weights(flat)
    request, steps = ernie.hoist(c, PLAN, w, inputs, TIMES[:1])
    step = {key: rows[0] for key, rows in steps.items()}
    shared = step | {key: request[key] for key in ernie.SHARED}
    streams = ernie.pre(c, PLAN, w, tokens, Weights(request), step)
    held = {t.untyped_storage().data_ptr() for t in (*streams, *flat.values(), *request.values(), *step.values())}
    before = [x.clone() for x in streams]
    for fn, at in ernie.blocks(c):
        made = {t.untyped_storage().data_ptr() for t in fn(c, PLAN, w / at, streams, Weights(request) / at, shared)}
        assert len(made) == 2 and not made & held
    assert all(map(torch.equal, streams, before)), "a block wrote into its input"


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, texts and latents: the distance to float64 is that of the reference, within a fifth."""
    c, flat, reference, known, tokens, inputs = _case("two lengths")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    exact = predict(ernie, c, PLAN, Weights({name: t.double() for name, t in rounded.items()}), tokens, TIMES, inputs)
    ours = predict(ernie, c, PLAN, Weights(rounded), tokens.bfloat16(), TIMES, inputs)
    assert ours.dtype == torch.bfloat16
    reference.load_state_dict(rounded)
    reference.bfloat16()
    known |= {"hidden_states": known["hidden_states"].bfloat16(), "text_bth": known["text_bth"].bfloat16(), "timestep": TIMES.bfloat16()}
    theirs = patchify(reference(**known).sample[:, :, None], (1, 1, 1))
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.2


def test_the_dims_name_the_dimensions_that_run_over_tokens():
    c, flat, _, _, tokens, inputs = _case("two lengths")
    request, _ = ernie.hoist(c, PLAN, Weights(flat), inputs, TIMES)
    assert set(request) == set(ernie.TOKEN_DIMS) | set(ernie.TEXT_DIMS)
    assert {request[key].shape[dim] for key, dim in ernie.TOKEN_DIMS.items()} == {tokens.shape[1]}
    assert {request[key].shape[dim] for key, dim in ernie.TEXT_DIMS.items()} == {LENGTH}


def test_one_text_serves_all_images():
    c, flat, _, _, tokens, inputs = _case("one length")
    texts = inputs["text"][:1], inputs["text"][:1].repeat(2, 1, 1)
    y, expected = (predict(ernie, c, PLAN, Weights(flat), tokens, TIMES[:1], inputs | {"text": text}) for text in texts)
    close(y, expected, 1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, r"patch_size is 2; .*\(1\)"),
        ({"qk_layernorm": False}, "qk_layernorm is false"),
        ({"text_in_dim": 32}, r"text_in_dim is hidden_size \(32\)"),
        ({"rope_axes_dim": (4, 6, 8)}, r"rope_axes_dim is \(4, 6, 8\); .* 16"),
        ({"rope_axes_dim": (5, 5, 6)}, r"rope_axes_dim is \(5, 5, 6\)"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
