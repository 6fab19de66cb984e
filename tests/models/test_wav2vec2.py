"""wav2vec 2.0 against transformers in float64, both variants, all hidden states, and its preprocessing."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.classes import RECORDS
from tinydiff.models.encoders import wav2vec2
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

LARGE = wav2vec2.Config(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    layer_norm_eps=1e-3,
    feat_extract_norm="layer",
    conv_dim=(10, 12, 14),
    conv_stride=(5, 2, 2),
    conv_kernel=(10, 3, 2),
    conv_bias=True,
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=4,
    do_stable_layer_norm=True,
)
BASE = replace(
    LARGE,
    feat_extract_norm="group",
    conv_bias=False,
    do_stable_layer_norm=False,
    num_conv_pos_embeddings=5,
)


def reference(c, kind=Wav2Vec2ForCTC):
    fields = {name: value for name, value in asdict(c).items() if name != "do_normalize"}
    return kind(Wav2Vec2Config(**fields, vocab_size=7, layerdrop=0.0, attn_implementation="eager"))


@pytest.mark.parametrize("kind", [Wav2Vec2ForCTC, Wav2Vec2Model])
@pytest.mark.parametrize("c", [LARGE, BASE], ids=["layer norms", "group norm"])
def test_all_hidden_states_equal_the_reference(c, kind):
    model = reference(c, kind)
    rename = wav2vec2.key_map(c).row
    flat = {row: tensor for name, tensor in randomised(model, 1).items() if (row := rename(name)) is not None}
    assert shapes(wav2vec2.spec(c)) == shapes(flat)
    x, seen = draw(2, 333), Recording(flat)
    with doubles(), torch.no_grad():
        output = getattr(model, "wav2vec2", model)(x, output_hidden_states=True)
    # transformers 4, which the network was trained with, has the last state behind the last norm; 5 before it
    expected = (*output.hidden_states[:-1], output.last_hidden_state)
    states = wav2vec2.encode(c, Plan(), Weights(seen, dtype=torch.float64), x)
    assert len(states) == len(expected) == c.states
    for ours, theirs in zip(states, expected, strict=True):
        close(ours, theirs)
    assert seen.read == set(flat) and states[0].shape[1] == c.vectors(333)


def test_names_of_old_and_new_files():
    row = wav2vec2.key_map(LARGE).row
    kernel = "encoder.pos_conv_embed.conv"
    for name, factor in (("original0", "weight_g"), ("original1", "weight_v")):
        for at in ("", "wav2vec2."):
            assert row(f"{at}{kernel}.parametrizations.weight.{name}") == f"wav2vec2.{kernel}.{factor}"
    assert row("wav2vec2.encoder.layers.1.layer_norm.bias") == "wav2vec2.encoder.layers.1.layer_norm.bias"
    for name in ("lm_head.weight", "lm_head.bias", "wav2vec2.masked_spec_embed"):
        assert row(name) is None


@pytest.mark.parametrize("normalises", [True, False])
def test_samples_equal_the_feature_extractor(normalises):
    sound = (0.2 * draw(1000) + 0.05).float()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalises)
    expected = extractor(sound.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    c = replace(LARGE, **wav2vec2.preprocessing(extractor.to_dict(), LARGE))
    assert c.do_normalize is normalises
    torch.testing.assert_close(wav2vec2.samples(c, sound), expected, rtol=0, atol=2e-6)


def test_silence_is_finite():
    assert torch.equal(wav2vec2.samples(LARGE, torch.zeros(50)), torch.zeros(1, 50))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch'; it must be 'group' or 'layer'"),
        ({"conv_dim": [4, 4]}, "conv_dim, conv_stride and conv_kernel differ in length, or are empty"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; known are gelu, quick_gelu, gelu_pytorch_tanh"),
        ({"add_adapter": True}, "add_adapter is True; an adapter behind the layers is not supported"),
        ({"num_attention_heads": 5}, "hidden_size is 768; it must divide by num_attention_heads, 5"),
    ],
)
def test_a_config_that_does_not_run_is_one_sentence(entries, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wav2vec2.config_from(entries, "Wav2Vec2ForCTC")


def test_another_sample_rate_is_one_sentence():
    with pytest.raises(ValueError, match=r"^sampling_rate is 8000; only 16000 is supported$"):
        wav2vec2.preprocessing({"sampling_rate": 8000}, LARGE)


def test_its_classes_are_known():
    assert RECORDS["Wav2Vec2ForCTC"] is RECORDS["Wav2Vec2Model"] is wav2vec2.FAMILY


RELEASED = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True, "vocab_size": 33,
    "layer_norm_eps": 1e-5, "apply_spec_augment": True, "final_dropout": 0.0,
}  # fmt: skip
"""Of wav2vec2-large-xlsr-53-english, which Wan2.2 speech to video reads."""


def test_every_key_of_the_released_encoder_is_a_row_or_known_as_unread():
    c = wav2vec2.config_from(RELEASED, "Wav2Vec2ForCTC")
    with torch.device("meta"):
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**RELEASED))
    row = wav2vec2.key_map(c).row
    rows = {row(key): tuple(x.shape) for key, x in model.state_dict().items()}
    assert {name: shape for name, shape in rows.items() if name} == shapes(wav2vec2.spec(c))
    idle = {key for key in model.state_dict() if row(key) is None}
    assert idle == {"lm_head.weight", "lm_head.bias", "wav2vec2.masked_spec_embed"}
    assert c.states == 25 and c.vectors(16000) == 49
