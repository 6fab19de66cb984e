"""A directory with one entry of its JSON files changed makes an image, or is one sentence: never a traceback,
and never half a minute.
"""

import random

import numpy as np
import pytest
from diffusers import FluxPipeline, QwenImagePipeline
from PIL import Image

from tests.runtime import (
    changes,
    folders,
    qwen_folders,
    test_ernie_pipelines,
    test_flux2_pipelines,
    test_flux_pipelines,
    test_sd3_pipelines,
    test_z_image_pipelines,
)
from tests.runtime.changes import Subject, subject

SMALL = {"prompt": ("a red </s> circle",), "num_inference_steps": 1, "height": 32, "width": 32}


def picture(folder):
    path = folder / "given.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(path)
    return str(path)


SUBJECTS = {
    "Wan that sees": lambda folder: subject(
        folder / "model",
        lambda at: folders.build(folders.VARIANTS["I2V with CLIP"], at),
        SMALL | {"num_frames": 5, "image_path": (picture(folder),)},
    ),
    "Wan with two experts": lambda folder: subject(
        folder / "model",
        lambda at: folders.build(folders.VARIANTS["T2V with two experts"], at),
        SMALL | {"num_frames": 1},
    ),
    "FLUX.1": lambda folder: subject(
        folder / "model", lambda at: test_flux_pipelines.build(at, FluxPipeline), SMALL
    ),
    "FLUX.2 klein": lambda folder: subject(
        folder / "model", lambda at: test_flux2_pipelines.klein(at, True), SMALL
    ),
    "SD3": lambda folder: subject(
        folder / "model",
        lambda at: test_sd3_pipelines.build("3.5 medium", at),
        SMALL | {"height": 16, "width": 16},
    ),
    "Z-Image": lambda folder: subject(folder / "model", test_z_image_pipelines.build, SMALL),
    "Qwen-Image": lambda folder: subject(
        folder / "model", lambda at: qwen_folders.build(QwenImagePipeline, at), SMALL
    ),
    "ERNIE": lambda folder: subject(folder / "model", test_ernie_pipelines.build, SMALL),
}
"""Families -> how to make a tiny model of each in a directory, and what is asked of it."""

SAMPLE = 40
"""Changes of each family that are tried; all of them are several thousand."""


@pytest.mark.parametrize("family", SUBJECTS)
def test_each_change_makes_an_image_or_is_one_sentence(family, tmp_path):
    made: Subject = SUBJECTS[family](tmp_path)
    assert changes.made(made).frames[0].std() > 0
    tried = random.Random(family).sample(list(changes.changes(made.folder)), SAMPLE)
    said = {str(change): made.outcome(change) for change in tried}
    sentences = [sentence for sentence in said.values() if sentence is not None]
    assert all("\n" not in sentence and len(sentence) < 1000 for sentence in sentences)
    assert 0 < len(sentences) < SAMPLE
