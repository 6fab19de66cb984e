"""HunyuanVideo-1.5: inputs that are not there, what half types round, the words to be written, and configs
that are not implemented.
"""

import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

from tests.models.tiny import tiny
from tests.parity import close, draw
from tinydiff.models import hunyuan_video15
from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network


def test_what_is_masked_changes_nothing():
    """The pipeline hands 729 zeros for an image that is not there, and zeros for words that are not."""
    both = tiny("HunyuanVideo-1.5")
    c, text = both.network.config, both.asked.inputs["text"]
    known = {
        "encoder_hidden_states": torch.cat([text, draw(2, 4, c.text_embed_dim, seed=9)], 1),
        "encoder_attention_mask": torch.tensor([[1.0] * text.shape[1] + [0.0] * 4] * 2).double(),
        "encoder_hidden_states_2": torch.zeros(2, 6, c.text_embed_2_dim).double(),
        "encoder_attention_mask_2": torch.zeros(2, 6).double(),
        "image_embeds": torch.zeros(2, 5, c.image_embed_dim).double(),
    }
    close(both.predict(), both.expected(**known))


def test_half_types_round_the_timestep_first():
    """The reference's pipeline hands the network its timestep in the network's type."""
    both = tiny("HunyuanVideo-1.5, glyphs and an image")
    rounded = {name: tensor.bfloat16() for name, tensor in both.flat.items()}
    network = Network(hunyuan_video15.FAMILY, both.network.config, dtype=torch.bfloat16)

    def at(time):
        return predict(network, rounded, both.asked.tokens, torch.tensor([time]), both.asked.inputs)

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
