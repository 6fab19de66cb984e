"""SigLIP's vision tower against transformers in float64, and its preprocessing against the reference's image
processor.
"""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.parity import Recording, close, doubles, draw, randomised, shapes
from tinydiff.models.encoders import preprocess, siglip_vision
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

TINY = siglip_vision.Config(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=23,  # no multiple of the patch, as 384 is none of 14
    patch_size=7,
    layer_norm_eps=1e-3,
)


@pytest.mark.parametrize("head", [True, False])
def test_equals_the_reference(head):
    c = siglip_vision.Config(**asdict(TINY) | {"vision_use_head": head})
    reference = SiglipVisionModel(SiglipVisionConfig(**asdict(c)))
    rename = siglip_vision.key_map(c).row
    flat = {rename(name): tensor for name, tensor in randomised(reference, 1).items()}
    assert shapes(siglip_vision.spec(c)) == shapes(flat)
    x, seen = draw(2, 3, 23, 23), Recording(flat)
    with doubles():
        expected = reference(x).last_hidden_state
    close(siglip_vision.encode(c, Plan(), Weights(seen, dtype=torch.float64), x), expected)
    assert seen.read == {name for name in flat if not name.startswith("vision_model.head.")}


@pytest.mark.parametrize("size", [(384, 384), (333, 517), (90, 411), (480, 848)])
def test_pixels_equal_the_image_processor(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    expected = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    c = siglip_vision.Config(image_size=384, patch_size=14)
    ours = siglip_vision.pixels(c, image)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    assert c.tokens == 729


def test_the_preprocessors_file_is_read():
    entries = SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3]).to_dict()
    assert preprocess.siglip(entries, 28)["image_mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError) as error:
        preprocess.siglip(entries, 32)
    assert str(error.value).endswith("; both must be image_size of the image encoder, 32")
    with pytest.raises(ValueError) as error:
        preprocess.siglip(entries | {"do_center_crop": True}, 28)
    assert str(error.value) == "do_center_crop is True; only False is supported"


def test_names_of_both_generations_of_files():
    row = siglip_vision.key_map(TINY).row
    assert row("post_layernorm.bias") == row("vision_model.post_layernorm.bias")
    assert row("logit_bias") is None and row("text_model.embeddings.token_embedding.weight") is None
