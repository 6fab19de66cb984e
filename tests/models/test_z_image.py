"""The Z-Image transformer against diffusers.ZImageTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models import z_image
from tinydiff.models.evaluate import predict
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.weights import Weights, leaves
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = z_image.Config(
    in_channels=4, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, norm_eps=1e-4, cap_feat_dim=20, axes_dims=(4, 6, 6)
)
TIMES = torch.tensor([988.5, 37.25])


def _configs(**changes):
    return z_image.Config(**asdict(TINY) | changes)


# Config, latent size, lengths of the two captions, and rows of the text given, more than a caption fills.
CASES = {
    "captions of one length": (TINY, (1, 14, 10), (5, 5), 5),
    "captions filled up to one length": (TINY, (1, 14, 10), (9, 31), 40),
    "captions of different lengths": (TINY, (1, 14, 10), (70, 32), 110),
    "no pads": (TINY, (1, 8, 16), (64, 64), 64),
    "thick patches": (_configs(all_patch_size=(1,), all_f_patch_size=(2,), in_channels=3, t_scale=700.0), (4, 3, 5), (3, 40), 40),
}


def _case(name):
    """Config, weights, the reference, its arguments, and our tokens and inputs; what is not to be read is noise."""
    c, size, lengths, rows = CASES[name]
    reference = ZImageTransformer2DModel(**asdict(c))
    flat = randomised(reference, 1)
    x, text = draw(2, c.in_channels, *size, seed=2), draw(2, rows, c.cap_feat_dim, seed=3)
    known = {
        "x": list(x),
        "t": (1000 - TIMES) / 1000,
        "cap_feats": [caption[:length] for caption, length in zip(text, lengths, strict=True)],
        "patch_size": c.all_patch_size[0],
        "f_patch_size": c.all_f_patch_size[0],
    }
    inputs = {"text": text, "positions": z_image.positions(c, size), "real": z_image.real(c, size)}
    if set(lengths) != {rows}:
        inputs["mask"] = (torch.arange(rows) < torch.tensor(lengths)[:, None]).long()
    tokens = patchify(x, c.patch_size)
    pads = z_image.pad_tokens(tokens.shape[1])
    return c, flat, reference, known, torch.cat([tokens, draw(2, pads, tokens.shape[2], seed=4)], 1), inputs


def _picture(c, size, y):
    return unpatchify(y[:, : y.shape[1] - int((~z_image.real(c, size)).sum())], c.patch_size, size)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, known, tokens, inputs = _case(name)
    assert shapes(z_image.spec(c)) == shapes(flat)
    with doubles():
        expected = -torch.stack(reference(**known).sample)
    seen = Recording(flat)
    y = predict(z_image, c, PLAN, Weights(seen), tokens, TIMES, inputs)
    close(_picture(c, CASES[name][1], y), expected)
    assert seen.read == set(flat)


@pytest.mark.parametrize("name", CASES)
def test_hoisted_rows_equal_single_evaluations(name):
    """What the loop does: hoist once for all timesteps, then each step with its row."""
    c, flat, _, _, tokens, inputs = _case(name)
    w, times = Weights(flat), torch.tensor([999.0, 640.0, 1.0])
    request, steps = z_image.hoist(c, PLAN, w, inputs, times)
    assert {len(rows) for rows in steps.values()} == {3}
    for i, t in enumerate(times):
        step = {key: rows[i] for key, rows in steps.items()}
        shared = {key: request[key] for key in z_image.SHARED if key in request}
        x = z_image.pre(c, PLAN, w, tokens, Weights(request), step)
        for fn, at in z_image.blocks(c):  # plain dicts, as they cross the boundary of a compiled region
            x = fn(c, PLAN, Weights(leaves(flat, at)), x, Weights(leaves(request, at) | leaves(step, at)), shared)
        y = z_image.post(c, PLAN, w, x, Weights(request), step)
        close(y, predict(z_image, c, PLAN, w, tokens, t[None], inputs), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_block_returns_new_memory(name):
    c, flat, _, _, tokens, inputs = _case(name)
    w = Weights(flat)
    request, steps = z_image.hoist(c, PLAN, w, inputs, TIMES[:1])
    step = {key: rows[0] for key, rows in steps.items()}
    x = z_image.pre(c, PLAN, w, tokens, Weights(request), step)
    held = {t.untyped_storage().data_ptr() for t in (*x, *flat.values(), *request.values(), *step.values())}
    before = [stream.clone() for stream in x]
    for fn, at in z_image.blocks(c):
        y = fn(c, PLAN, w / at, x, Weights(request | step) / at, request)
        memory = {stream.untyped_storage().data_ptr() for stream in y}
        assert len(memory) == 2 and not memory & held
        assert [(stream.shape, stream.is_contiguous()) for stream in y] == [(stream.shape, True) for stream in x]
    assert all(map(torch.equal, x, before)), "a block wrote into its input"


def test_the_dims_name_the_dimensions_that_run_over_tokens():
    """Between two requests exactly the named dimensions of the request's tensors change."""
    c, flat, _, _, _, inputs = _case("captions of different lengths")
    size = (1, 18, 22)
    more = inputs | {"positions": z_image.positions(c, size), "real": z_image.real(c, size)}
    longer = inputs | {"text": draw(2, 140, c.cap_feat_dim), "mask": F.pad(inputs["mask"], (30, 0), value=1)}
    request, image, text = (z_image.hoist(c, PLAN, Weights(flat), each, TIMES)[0] for each in (inputs, more, longer))
    assert set(z_image.SHARED) < set(request)
    for other, dims in ((image, z_image.TOKEN_DIMS), (text, z_image.TEXT_DIMS)):
        changed = {key: [d for d, n in enumerate(value.shape) if other[key].shape[d] != n] for key, value in request.items()}
        assert {key: d for key, d in changed.items() if d} == {key: [dim] for key, dim in dims.items()}


def test_only_captions_that_differ_when_filled_up_are_masked():
    masked = {name for name in CASES if "mask" in z_image.hoist(*_hoisting(name))[0]}
    assert masked == {"captions of different lengths", "thick patches"}
    request = z_image.hoist(*_hoisting("captions filled up to one length"))[0]
    assert request["text"].shape[1] == 32 and len(request["cos"]) == 1


def _hoisting(name):
    c, flat, _, _, _, inputs = _case(name)
    return c, PLAN, Weights(flat), inputs, TIMES


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """The distance to float64 with the same rounded weights is that of the reference, within a fifth."""
    c, flat, reference, known, tokens, inputs = _case("captions of different lengths")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    exact = predict(z_image, c, PLAN, Weights({name: t.double() for name, t in rounded.items()}), tokens, TIMES, inputs)
    ours = predict(z_image, c, PLAN, Weights(rounded), tokens.bfloat16(), TIMES, inputs)
    assert ours.dtype == torch.bfloat16
    lists = {name: [t.bfloat16() for t in known[name]] for name in ("x", "cap_feats")}
    theirs = -torch.stack(reference.bfloat16()(**known | lists).sample)
    exact, ours = (_picture(c, CASES["captions of different lengths"][1], y) for y in (exact, ours))
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)}, r"all_patch_size is \(2, 4\).*one patch size"),
        ({"n_kv_heads": 1}, "n_kv_heads is 1; it must be n_heads, which is 2"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"siglip_feat_dim": 8}, "siglip_feat_dim is 8"),
        ({"axes_dims": (8, 6, 6)}, r"axes_dims is \(8, 6, 6\); its sum must be the width of a head, 16"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _configs(**changes)
