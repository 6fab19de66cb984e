"""HunyuanVideo-1.5 against diffusers.HunyuanVideo15Transformer3DModel in float64, every parameter redrawn."""

from dataclasses import asdict

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

from tests.parity import close, doubles, draw, randomised, shapes, tracked, unread
from tinydiff.models import hunyuan_video15
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.parity.asked import TIME
from tinydiff.parity.denoisers import DENOISERS

VARIANTS = [name for name in DENOISERS if name.startswith("HunyuanVideo-1.5")]
PLAIN, WHOLE = "HunyuanVideo-1.5", "HunyuanVideo-1.5, glyphs and an image"


def _case(name):
    d = DENOISERS[name]
    reference = HunyuanVideo15Transformer3DModel(**asdict(d.config))
    d.prepare(reference)
    return d.config, randomised(reference, 1), reference, d.ask(d.config)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference(name):
    c, flat, reference, asked = _case(name)
    assert shapes(hunyuan_video15.spec(c)) == shapes(flat)
    with doubles():
        expected = asked.answer(reference(**asked.reference_inputs))
    weights = tracked(flat)
    with torch.enable_grad():
        network = Network(hunyuan_video15.FAMILY, c, dtype=torch.float64)
        y = predict(network, weights, asked.tokens, TIME, asked.inputs)
    close(y.detach(), expected)
    last = f"transformer_blocks.{c.num_layers - 1}"
    parts = {"context_embedder_2.": "glyphs", "image_embedder.": "image"}
    idle = [prefix for prefix, part in parts.items() if part not in asked.inputs]
    idle += [f"{last}.attn.to_add_out.", f"{last}.ff_context."]  # nothing reads the text of the last block
    assert [key for key in unread(y, weights) if not key.startswith(tuple(idle))] == []


def test_what_is_masked_changes_nothing():
    """The pipeline hands 729 zeros for an image that is not there, and zeros for words that are not."""
    c, flat, reference, asked = _case(PLAIN)
    text = asked.inputs["text"]
    known = asked.reference_inputs | {
        "encoder_hidden_states": torch.cat([text, draw(2, 4, c.text_embed_dim, seed=9)], 1),
        "encoder_attention_mask": torch.tensor([[1.0] * text.shape[1] + [0.0] * 4] * 2).double(),
        "encoder_hidden_states_2": torch.zeros(2, 6, c.text_embed_2_dim).double(),
        "encoder_attention_mask_2": torch.zeros(2, 6).double(),
        "image_embeds": torch.zeros(2, 5, c.image_embed_dim).double(),
    }
    with doubles():
        expected = asked.answer(reference(**known))
    network = Network(hunyuan_video15.FAMILY, c, dtype=torch.float64)
    close(predict(network, flat, asked.tokens, TIME, asked.inputs), expected)


def test_half_types_round_the_timestep_first():
    """The reference's pipeline hands the network its timestep in the network's type."""
    c, flat, _, asked = _case(WHOLE)
    rounded = {name: tensor.bfloat16() for name, tensor in flat.items()}
    network = Network(hunyuan_video15.FAMILY, c, dtype=torch.bfloat16)

    def at(time):
        return predict(network, rounded, asked.tokens, torch.tensor([time]), asked.inputs)

    assert torch.equal(at(987.3), at(torch.tensor(987.3).bfloat16().item()))
    assert not torch.equal(at(987.3), at(971.0))


@pytest.mark.parametrize(
    "prompt",
    [
        "no words",
        'a sign "open" and “closed”',
        '"a" "a" and "b"',
        'an empty "" one',
        'a "half',
        '"two\nlines"',
    ],
)
def test_the_words_to_be_written_are_those_that_the_reference_finds(prompt):
    assert hunyuan_video15.glyph_text(prompt) == extract_glyph_texts(prompt)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_norm", "layer_norm", "qk_norm is 'layer_norm'; queries and keys are normalised by 'rms_norm'"),
        ("rope_axes_dim", (4, 6, 4), "rope_axes_dim is (4, 6, 4); three axes must share the head width 128"),
        (
            "in_channels",
            64,
            "in_channels is 64; the noise, the first frame's latents and a mask make 65",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(field, value, message):
    with pytest.raises(ValueError) as error:
        hunyuan_video15.Config(**{field: value})
    assert str(error.value) == message
