"""HunyuanVideo: padding of the text, what half types round, and configs that are not implemented."""

import pytest
import torch

from tests.models.tiny import tiny
from tests.parity import close, draw
from tinydiff.models import hunyuan_video
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan
from tinydiff.parity.asked import TIME


def test_padding_of_the_text_changes_nothing():
    """The reference pads a text to 256 tokens and masks the padding; here a text has its own length."""
    both = tiny("HunyuanVideo")
    text = both.asked.inputs["text"]
    padded = torch.cat([text, draw(2, 5, text.shape[2], seed=9)], 1)
    mask = torch.tensor([[1.0] * text.shape[1] + [0.0] * 5] * 2, dtype=torch.float64)
    close(both.predict(), both.expected(encoder_hidden_states=padded, encoder_attention_mask=mask))


def test_half_types_round_the_guidance_before_its_thousandfold():
    both = tiny("HunyuanVideo")
    rounded = {name: tensor.bfloat16() for name, tensor in both.flat.items()}

    def row(guidance):
        inputs = both.asked.inputs | {"guidance": torch.tensor([guidance])}
        w = Weights(rounded, dtype=torch.bfloat16)
        return hunyuan_video.hoist(both.network.config, Plan(), w, inputs, TIME)[1]["norm_out"]

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
