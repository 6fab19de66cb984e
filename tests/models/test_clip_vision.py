"""CLIP's vision tower against transformers in float64, and its preprocessing against the reference's image
processor.
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.encoders import clip_vision
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

TINY = clip_vision.Config(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=21,
    patch_size=7,
    layer_norm_eps=1e-3,
)


def _weights(c):
    reference = CLIPVisionModel(CLIPVisionConfig(**asdict(c)))
    flat = randomised(reference, 1)
    return reference, {
        clip_vision.key_map(clip_vision.Config()).row(name): tensor for name, tensor in flat.items()
    }


@pytest.mark.parametrize("act", clip_vision.ACTIVATIONS)
def test_equals_the_reference(act):
    c = replace(TINY, hidden_act=act)
    reference, flat = _weights(c)
    x = draw(2, 3, 21, 21)
    with doubles():
        expected = reference(x, output_hidden_states=True).hidden_states[-2]
    close(clip_vision.encode(c, Plan(), Weights(flat, dtype=torch.float64), x), expected)


def test_the_spec_names_every_weight_and_all_before_the_last_layer_are_read():
    _, flat = _weights(TINY)
    assert shapes(clip_vision.spec(TINY)) == shapes(flat)
    seen = Recording(flat)
    clip_vision.encode(TINY, Plan(), Weights(seen, dtype=torch.float64), draw(1, 3, 21, 21))
    unread = ("vision_model.encoder.layers.2.", "vision_model.post_layernorm.")
    assert seen.read == {name for name in flat if not name.startswith(unread)}


@pytest.mark.parametrize("size", [(224, 224), (333, 517), (517, 333), (90, 411), (480, 832), (225, 226)])
def test_pixels_equal_the_image_processor(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = CLIPImageProcessorPil()(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = clip_vision.pixels(clip_vision.Config(), image)
    assert ours.dtype == torch.float32 and ours.shape == (1, 3, 224, 224)
    assert torch.equal(ours, expected)


def test_names_of_both_generations_of_files():
    assert (
        clip_vision.key_map(clip_vision.Config()).row("pre_layrnorm.weight")
        == "vision_model.pre_layrnorm.weight"
    )
    assert (
        clip_vision.key_map(clip_vision.Config()).row("vision_model.pre_layrnorm.weight")
        == "vision_model.pre_layrnorm.weight"
    )
    assert clip_vision.key_map(clip_vision.Config()).row("vision_model.embeddings.position_ids") is None
    assert clip_vision.key_map(clip_vision.Config()).row("visual_projection.weight") is None


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"'selu'.*quick_gelu"):
        clip_vision.Config(hidden_act="selu")
