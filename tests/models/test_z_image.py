"""The Z-Image transformer against diffusers.ZImageTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import z_image
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TINY = z_image.Config(
    in_channels=4,
    dim=32,
    n_layers=2,
    n_refiner_layers=2,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-4,
    cap_feat_dim=20,
    axes_dims=(4, 6, 6),
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
    "thick patches": (
        _configs(all_patch_size=(1,), all_f_patch_size=(2,), in_channels=3, t_scale=700.0),
        (4, 3, 5),
        (3, 40),
        40,
    ),
}


def _case(name):
    """Config, weights, the reference, its arguments, and our tokens and inputs; what is not to be read is
    noise.
    """
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
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(z_image.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(_picture(c, CASES[name][1], y), expected)
    assert unread(y, weights) == []


def test_only_captions_that_differ_when_filled_up_are_masked():
    masked = {name for name in CASES if "mask" in z_image.hoist(*_hoisting(name))[0]}
    assert masked == {"captions of different lengths", "thick patches"}
    request = z_image.hoist(*_hoisting("captions filled up to one length"))[0]
    assert request["text"].shape[1] == 32 and len(request["cos"]) == 1


def _hoisting(name):
    c, flat, _, _, _, inputs = _case(name)
    return c, PLAN, Weights(flat, dtype=torch.float64), inputs, TIMES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)},
            r"all_patch_size is \(2, 4\).*one patch size",
        ),
        ({"n_kv_heads": 1}, "n_kv_heads is 1; it must be n_heads, which is 2"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"siglip_feat_dim": 8}, "siglip_feat_dim is 8"),
        ({"axes_dims": (8, 6, 6)}, r"axes_dims is \(8, 6, 6\); its sum must be the width of a head, 16"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _configs(**changes)
