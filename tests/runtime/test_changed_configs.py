"""A directory with one entry of its JSON files changed makes an image, or is one sentence: never a traceback,
and never half a minute.
"""

import random

import numpy as np
import pytest
from diffusers import FluxPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from PIL import Image

from tests.runtime import (
    changes,
    folders,
    qwen_folders,
    test_ernie_pipelines,
    test_flux2_pipelines,
    test_flux_pipelines,
    test_ovis_pipelines,
    test_sd3_pipelines,
    test_z_image_pipelines,
)
from tests.runtime.changes import Subject, subject
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.models import qwen_image
from tinydiff.records import UserError

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
    "Qwen-Image that edits": lambda folder: subject(
        folder / "model",
        lambda at: qwen_folders.build(QwenImageEditPlusPipeline, at),
        SMALL | {"image_path": (picture(folder),)},
    ),
    "Ovis": lambda folder: subject(folder / "model", test_ovis_pipelines.build, SMALL),
    "ERNIE": lambda folder: subject(folder / "model", test_ernie_pipelines.build, SMALL),
}
"""Families -> how to make a tiny model of each in a directory, and what is asked of it."""

SAMPLE = 20
"""Changes of each family that are tried; all of them are several thousand."""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Images to edit are seen at a hundredth of their pixels: encoding them was nearly all of the time."""
    monkeypatch.setattr(qwen_image, "EDIT_PIXELS", 12288)
    monkeypatch.setattr(qwen_image, "LANGUAGE_MODEL_PIXELS", 6144)


@pytest.mark.slow
@pytest.mark.parametrize("family", SUBJECTS)
def test_each_change_makes_an_image_or_is_one_sentence(family, tmp_path):
    made: Subject = SUBJECTS[family](tmp_path)
    assert changes.made(made).frames[0].std() > 0
    tried = random.Random(family).sample(list(changes.changes(made.folder)), SAMPLE)
    said = {str(change): made.outcome(change) for change in tried}
    sentences = [sentence for sentence in said.values() if sentence is not None]
    assert all("\n" not in sentence and len(sentence) < 1500 for sentence in sentences)
    assert 0 < len(sentences) < SAMPLE


SEES, TURBO, EDITS = "Wan that sees", "Z-Image", "Qwen-Image that edits"
FOUND = [
    (
        SEES,
        "model_index.json",
        "transformer",
        [None, None],
        "has no transformer, which a WanImageToVideoPipeline needs",
    ),
    (
        SEES,
        "model_index.json",
        "expand_timesteps",
        "yes",
        "expand_timesteps is 'yes'; it must be true or false or null",
    ),
    (
        SEES,
        "vae/config.json",
        "latents_mean",
        [1, 2],
        "latents_mean has 2 values; it must have one for each of 4 channels",
    ),
    (
        SEES,
        "vae/config.json",
        "scale_factor_spatial",
        4,
        "scale_factor_spatial is 4, and its levels make another size of latents; with it no "
        "image can be given",
    ),
    (
        SEES,
        "transformer/config.json",
        "num_layers",
        10**9,
        "it must be an integer at least 1 and at most 1000",
    ),
    (
        SEES,
        "image_encoder/config.json",
        "num_attention_heads",
        3,
        "hidden_size is 10; it must divide by num_attention_heads, 3",
    ),
    (
        SEES,
        "image_processor/preprocessor_config.json",
        "do_normalize",
        False,
        "do_normalize is False; only True is supported",
    ),
    (
        SEES,
        "text_encoder/config.json",
        "relative_attention_max_distance",
        3,
        "relative_attention_num_buckets is 32",
    ),
    (
        SEES,
        "tokenizer/tokenizer_config.json",
        "eos_token",
        "new",
        "the vocabulary of text_encoder has 142; the two are not of one",
    ),
    (
        TURBO,
        "vae/config.json",
        "scaling_factor",
        0,
        "scaling_factor is 0; it must be a number at least 1e-06",
    ),
    (
        TURBO,
        "vae/config.json",
        "norm_num_groups",
        3,
        "norm_num_groups is 3, which a width of 8 does not divide by",
    ),
    (TURBO, "scheduler/scheduler_config.json", "_class_name", {}, "_class_name is {}; it must be a string"),
    (
        EDITS,
        "text_encoder/config.json",
        "text_config.rope_parameters.mrope_section",
        None,
        "mrope_section is missing; Qwen2.5-VL needs it",
    ),
    (
        "Wan with two experts",
        "vae/config.json",
        "patch_size",
        3,
        "in_channels is 3 and patch_size 3; there must be 3 or 4 channels for each pixel",
    ),
    (SEES, "model_index.json", "_class_name", "", "names no pipeline class (_class_name)"),
    (
        EDITS,
        "text_encoder/config.json",
        "text_config.hidden_size",
        3,
        "num_attention_heads is 4; it must be at most hidden_size, 3",
    ),
    (
        EDITS,
        "text_encoder/config.json",
        "vision_config.num_heads",
        changes.DROPPED,
        "num_heads is 16 and hidden_size 16; the width of a head must be a multiple of 4",
    ),
    (SEES, "tokenizer/tokenizer_config.json", "eos_token", 3, "eos_token has 3; a token is a string"),
    (SEES, "tokenizer/tokenizer_config.json", "unk_token", {"a": 1}, "unk_token has {'a': 1}; a token is"),
    (SEES, "tokenizer/tokenizer_config.json", "tokenizer_class", 1.5, "tokenizer_class is 1.5; it must be a"),
    (
        SEES,
        "tokenizer/tokenizer_config.json",
        "padding_side",
        "up",
        "padding_side is 'up'; it must be 'left' or",
    ),
    (
        "Wan with two experts",
        "transformer_2/config.json",
        "freq_dim",
        12,
        "freq_dim is 8 and 12 in transformer and transformer_2, which must have one config",
    ),
    (
        "FLUX.1",
        "scheduler/scheduler_config.json",
        "max_shift",
        10**12,
        "base_shift and max_shift make it -5e+10 here, no shift of a schedule",
    ),
]


@pytest.mark.parametrize(("family", "file", "field", "value", "sentence"), FOUND, ids=lambda x: str(x)[:30])
def test_what_once_was_a_traceback(family, file, field, value, sentence, unchanged):
    said = unchanged(family).outcome(changes.Change(file, tuple(field.split(".")), value))
    assert said is not None and sentence in said


@pytest.mark.parametrize(
    ("family", "file", "field", "value"),
    [
        (TURBO, "model_index.json", "feature_extractor", ["transformers", "CLIPImageProcessor"]),
        (TURBO, "transformer/config.json", "an_unknown_field", None),
        (TURBO, "scheduler/scheduler_config.json", "an_unknown_field", 3),
        (TURBO, "scheduler/scheduler_config.json", "use_dynamic_shifting", True),
        (SEES, "image_processor/preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5]),
        (SEES, "tokenizer/tokenizer_config.json", "tokenizer_class", None),
    ],
)
def test_what_the_reference_runs_is_run(family, file, field, value, unchanged):
    assert unchanged(family).outcome(changes.Change(file, (field,), value)) is None


@pytest.mark.parametrize(
    ("variant", "field", "value", "shape"),
    [
        ("T2V", "scale_factor_spatial", 4, (9, 64, 64, 3)),
        ("T2V", "scale_factor_spatial", 16, (9, 16, 16, 3)),
        ("T2V", "scale_factor_temporal", 2, (17, 32, 32, 3)),
        ("TI2V from an image", "scale_factor_temporal", 8, (5, 32, 32, 3)),
        ("TI2V from an image", "scale_factor_spatial", 8, None),
        ("I2V with two experts", "scale_factor_spatial", 16, None),
        ("I2V with two experts", "scale_factor_temporal", 2, None),
    ],
)
def test_strides_that_contradict_the_levels_are_refused_only_where_the_reference_fails(
    variant, field, value, shape, tmp_path
):
    """shape: of the video, None where both fail. Latents are as many as the field says."""
    pipe = folders.build(folders.VARIANTS[variant], tmp_path / "model")
    folders.edit(tmp_path / "model" / "vae" / "config.json", **{field: value})
    given = None if variant == "T2V" else picture(tmp_path)
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1}
    theirs = type(pipe).from_pretrained(tmp_path / "model")
    image = {} if given is None else {"image": Image.open(given)}
    asked = size | ({} if given is None else {"image_path": (given,)})
    ours = Subject(
        tmp_path / "model",
        SamplingOptions(prompt=("a red circle",), **asked),
        ModelOptions(model_path=str(tmp_path / "model")),
    )
    if shape is None:
        with pytest.raises(RuntimeError, match="size"):
            theirs(prompt="a red circle", **image, **size)
        with pytest.raises(UserError, match=f"{field} is {value}, and its levels make another size"):
            changes.made(ours)
    else:
        made = theirs(prompt="a red circle", output_type="np", **image, **size).frames[0]
        assert made.shape == changes.made(ours).frames[0].shape == shape


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """Family -> its folder, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = SUBJECTS[family](tmp_path_factory.mktemp("changed"))
        return made[family]

    return get
