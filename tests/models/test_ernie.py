"""ERNIE-Image against diffusers.ErnieImageTransformer2DModel in float64, every parameter redrawn."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModel

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import ernie
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.patch import patchify, unpatchify
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
    weights = tracked(flat)
    with torch.enable_grad():
        y = predict(Network(ernie.FAMILY, c, dtype=torch.float64), weights, tokens, TIMES, inputs)
    close(unpatchify(y, (1, 1, 1), SIZE)[:, :, 0], expected)
    assert unread(y, weights) == []


def test_each_text_of_a_batch_is_as_if_alone():
    c, flat, _, _, tokens, inputs = _case("two lengths")
    both = predict(Network(ernie.FAMILY, c, dtype=torch.float64), flat, tokens, TIMES[:1], inputs)
    for i, length in enumerate((3, 7)):
        alone = {"text": inputs["text"][i : i + 1, :length], "positions": inputs["positions"]}
        close(
            both[i : i + 1],
            predict(Network(ernie.FAMILY, c, dtype=torch.float64), flat, tokens[i : i + 1], TIMES[:1], alone),
        )


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """Rounded weights, texts and latents: the error against float64 is the reference's, within a fifth."""
    c, flat, reference, known, tokens, inputs = _case("two lengths")
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    exact = predict(
        Network(ernie.FAMILY, c, dtype=torch.float64),
        {name: t.double() for name, t in rounded.items()},
        tokens,
        TIMES,
        inputs,
    )
    ours = predict(Network(ernie.FAMILY, c, dtype=torch.bfloat16), rounded, tokens.bfloat16(), TIMES, inputs)
    assert ours.dtype == torch.bfloat16
    reference.load_state_dict(rounded)
    reference.bfloat16()
    known |= {
        "hidden_states": known["hidden_states"].bfloat16(),
        "text_bth": known["text_bth"].bfloat16(),
        "timestep": TIMES.bfloat16(),
    }
    theirs = patchify(reference(**known).sample[:, :, None], (1, 1, 1))
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.2


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
