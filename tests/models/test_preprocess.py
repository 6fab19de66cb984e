"""What preprocessor files say: pixels are those of transformers' processors with the same entries, or one
sentence refuses them.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tinydiff.models.encoders import clip_vision, preprocess, qwen_vision

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
TOWER = clip_vision.Config(image_size=28, patch_size=7)
EYE = qwen_vision.Config(patch_size=4, window_size=24)


def image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(40, 61), (70, 33), (20, 20)])
@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"image_mean": MEAN, "image_std": STD},
        {"size": {"shortest_edge": 37}},
        {"size": {"shortest_edge": 28}, "resample": 2},
        {"resample": 0},
        {"resample": 1, "do_resize": True, "rescale_factor": 1 / 255},
    ],
)
def test_clip(entries, shape):
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    expected = CLIPImageProcessorPil(**sizes | entries)(image(*shape), return_tensors="pt")["pixel_values"]
    ours = clip_vision.pixels(replace(TOWER, **preprocess.clip(sizes | entries, 28)), image(*shape))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"do_center_crop": False}, "do_center_crop is False; only True is supported"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0; only 1/255 is supported"),
        (
            {"crop_size": {"height": 28, "width": 21}},
            "must be image_size of the image encoder, 28, both ways",
        ),
        ({"crop_size": 21}, "crop_size is 21; it must be image_size of the image encoder, 28"),
        (
            {"size": {"shortest_edge": 20}},
            "its shortest_edge must be at least the 28 pixels that are cut out",
        ),
        ({"size": {"height": 28, "width": 28}}, "it must be an object with shortest_edge"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]; it must be a list of 3, each a number"),
        ({"image_std": [0.5, 0.0, 0.5]}, "each a number at least 1e-12"),
        ({"resample": 7}, "resample is 7; it must be an integer at least 0 and at most 5"),
    ],
)
def test_clip_refuses(entries, sentence):
    with pytest.raises(ValueError) as caught:
        preprocess.clip(entries, 28)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("shape", [(40, 61), (8, 300), (200, 190)])
@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"image_mean": MEAN, "image_std": STD, "resample": 2},
        {"min_pixels": 3000, "max_pixels": 6000},
        {"size": {"shortest_edge": 2000, "longest_edge": 9000}},
        {"size": {"shortest_edge": 2000, "longest_edge": 9000}, "min_pixels": None, "max_pixels": 5000},
    ],
)
def test_qwen(entries, shape):
    expected = Qwen2VLImageProcessorPil(patch_size=4, **entries)(image(*shape), return_tensors="pt")
    c = replace(EYE, **preprocess.qwen({"patch_size": 4} | entries, EYE.tiling))
    patches, grid = qwen_vision.pixels(c, image(*shape))
    assert expected["image_grid_thw"].tolist() == [[1, *grid]] and torch.equal(
        patches, expected["pixel_values"]
    )


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"patch_size": 14}, "patch_size is 14, and that of the vision tower is 4"),
        ({"min_pixels": 9000, "max_pixels": 5000}, "min_pixels is 9000; it must be at most max_pixels, 5000"),
        ({"size": {"shortest_edge": 56}}, "it must be an object with shortest_edge and longest_edge"),
        ({"max_pixels": "many"}, "max_pixels is 'many'; it must be an integer"),
    ],
)
def test_qwen_refuses(entries, sentence):
    with pytest.raises(ValueError) as caught:
        preprocess.qwen(entries, EYE.tiling)
    assert sentence in str(caught.value)
