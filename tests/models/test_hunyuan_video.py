"""HunyuanVideo against diffusers.HunyuanVideoTransformer3DModel, every parameter redrawn."""

from dataclasses import asdict

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import hunyuan_video
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.denoisers import DENOISERS, TIME

VARIANTS = [name for name in DENOISERS if name.partition(",")[0] == "HunyuanVideo"]
PLAIN = "HunyuanVideo"


def _case(name):
    d = DENOISERS[name]
    reference = HunyuanVideoTransformer3DModel(**asdict(d.config))
    return d.config, randomised(reference, 1), reference, d.ask(d.config)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference_and_reads_every_weight(name):
    c, flat, reference, asked = _case(name)
    assert shapes(hunyuan_video.spec(c)) == shapes(flat)
    with doubles():
        expected = asked.answer(reference(**asked.reference_inputs))
    weights = tracked(flat)
    with torch.enable_grad():
        network = Network(hunyuan_video.FAMILY, c, dtype=torch.float64)
        y = predict(network, weights, asked.tokens, TIME, asked.inputs)
    close(y.detach(), expected)
    assert unread(y, weights) == []


def test_padding_of_the_text_changes_nothing():
    """The reference pads a text to 256 tokens and masks the padding; here a text has its own length."""
    c, flat, reference, asked = _case(PLAIN)
    text = asked.inputs["text"]
    padded = torch.cat([text, draw(2, 5, c.text_embed_dim, seed=9)], 1)
    mask = torch.tensor([[1.0] * text.shape[1] + [0.0] * 5] * 2, dtype=torch.float64)
    with doubles():
        known = asked.reference_inputs | {"encoder_hidden_states": padded, "encoder_attention_mask": mask}
        expected = asked.answer(reference(**known))
    network = Network(hunyuan_video.FAMILY, c, dtype=torch.float64)
    close(predict(network, flat, asked.tokens, TIME, asked.inputs), expected)


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    """At a guidance that bfloat16 holds a thousandfold: the distance to float64 is that of the reference,
    within a fifth.
    """
    c, flat, reference, asked = _case(PLAIN)
    asked.inputs["guidance"] = torch.tensor([2.0, 4.0])
    asked.reference_inputs["guidance"] = asked.inputs["guidance"] * 1000
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    inputs = {name: x.bfloat16().double() if x.is_floating_point() else x for name, x in asked.inputs.items()}
    tokens = asked.tokens.bfloat16()
    wide = {name: tensor.double() for name, tensor in rounded.items()}
    double, half = (
        Network(hunyuan_video.FAMILY, c, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    exact = predict(double, wide, tokens.double(), TIME, inputs)
    ours = predict(half, rounded, tokens, TIME, inputs)
    assert ours.dtype == torch.bfloat16
    reference = HunyuanVideoTransformer3DModel(**asdict(c)).bfloat16()
    reference.load_state_dict(rounded)
    known = {name: x.bfloat16() for name, x in asked.reference_inputs.items()} | {"timestep": TIME.expand(2)}
    theirs = asked.answer(reference(**known))
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (ours, theirs))
    assert error < 1.2 * allowed < 0.1


def test_half_types_round_the_guidance_before_its_thousandfold():
    c, flat, _, asked = _case(PLAIN)
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}

    def row(guidance):
        inputs = asked.inputs | {"guidance": torch.tensor([guidance])}
        w = Weights(rounded, dtype=torch.bfloat16)
        return hunyuan_video.hoist(c, Plan(), w, inputs, TIME)[1]["norm_out"]

    assert torch.equal(row(3.3), row(torch.tensor(3.3).bfloat16().item()))
    assert not torch.equal(row(3.3), row(3.4))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_norm", "layer_norm", "qk_norm is 'layer_norm'; queries and keys are normalised by 'rms_norm'"),
        ("rope_axes_dim", (4, 6, 4), "rope_axes_dim is (4, 6, 4); three axes must share the head width 128"),
        (
            "image_condition_type",
            "token",
            "image_condition_type is 'token'; it must be 'latent_concat', 'token_replace' or null",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(field, value, message):
    with pytest.raises(ValueError) as error:
        hunyuan_video.Config(**{field: value})
    assert str(error.value) == message
