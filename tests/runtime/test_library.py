"""The library: `tinydiff.load` and `tinydiff.generate`, what they return and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tinydiff
from tests.sources import PACKAGE
from tinydiff import config
from tinydiff.config import NoProgress
from tinydiff.models import registry
from tinydiff.records import Result, UserError
from tinydiff.runtime import library
from tinydiff.runtime.generate import generate

SMALL = {"height": 32, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def model():
    return tinydiff.load()


def refused(field, words, call, *args, **fields):
    with pytest.raises(UserError) as caught:
        call(*args, **fields)
    assert caught.value.field == field and words in str(caught.value), str(caught.value)


def test_a_result_holds_frames_latents_parameters_and_timings(model):
    made = tinydiff.generate(model, "a red circle", **SMALL, num_frames=5, num_outputs_per_prompt=2, seed=7)
    assert isinstance(made, Result) and made.seeds == (7, 8) and made.paths == ()
    assert [(clip.shape, clip.dtype) for clip in made.frames] == [((5, 32, 64, 3), np.uint8)] * 2
    assert [image.shape for image in made.images] == [(32, 64, 3)] * 2
    assert np.array_equal(made.images[1], made.frames[1][0])
    assert [(x.shape, x.dtype, x.device.type) for x in made.latents] == [
        ((16, 2, 4, 8), torch.float32, "cpu")
    ] * 2
    assert list(made.seconds) == ["encode", "denoise", "decode"] and all(
        value > 0 for value in made.seconds.values()
    )
    assert len(made.step_seconds) == 4 and sum(made.step_seconds) <= made.seconds["denoise"]


def test_parameters_are_those_that_took_effect(model):
    row = registry.named(registry.SHIPPED)
    made = tinydiff.generate(model, "a red circle", **SMALL, guidance_scale=3.0).parameters
    assert json.loads(json.dumps(made)) == {
        "model": "tinydiff/shapes", "prompt": "a red circle", "negative_prompt": "", "height": 32,
        "width": 64, "num_frames": 1,
        "fps": row.fps, "num_inference_steps": 2, "guidance_scale": 3.0, "flow_shift": row.flow_shift,
        "given_images": 0,
        "precision": {"transformer": "fp32", "vae": "fp32", "text_encoder": "fp32"},
        "tinydiff": tinydiff.__version__, "torch": torch.__version__,
    }  # fmt: skip
    assert (
        "negative_prompt"
        not in tinydiff.generate(model, "a red circle", **SMALL, guidance_scale=1.0).parameters
    )


def test_every_parameter_has_an_effect(model):
    plain = tinydiff.generate(model, "a red circle", **SMALL).latents[0]
    assert torch.equal(tinydiff.generate(model, "a red circle", **SMALL).latents[0], plain)
    for changed in (
        {"seed": 43}, {"guidance_scale": 2.0}, {"guidance_scale": 1.0}, {"negative_prompt": "blue"},
        {"flow_shift": 3.3},
        {"num_inference_steps": 3},
    ):  # fmt: skip
        assert not torch.equal(
            tinydiff.generate(model, "a red circle", **SMALL | changed).latents[0], plain
        ), changed
    assert not torch.equal(tinydiff.generate(model, "a blue circle", **SMALL).latents[0], plain)


def test_types_of_the_weights(model):
    low = tinydiff.load(dit_precision="bf16", component_precisions={"vae": "bf16"})
    assert low.nets["transformer"].weights["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert low.nets["transformer"].weights["blocks.0.scale_shift_table"].dtype == torch.float32
    made, exact = (tinydiff.generate(each, "a red circle", **SMALL) for each in (low, model))
    assert made.parameters["precision"] == {"transformer": "bf16", "vae": "bf16", "text_encoder": "fp32"}
    assert made.latents[0].dtype == torch.float32
    assert 0 < (made.latents[0] - exact.latents[0]).abs().mean() < 0.1 * exact.latents[0].std()


def test_tiles_change_large_images_only(model):
    tiled = tinydiff.load(vae_tiling=True)
    for width, equal in ((256, True), (320, False)):
        made = [
            tinydiff.generate(each, "a star", height=32, width=width, num_inference_steps=1)
            for each in (model, tiled)
        ]
        assert torch.equal(made[0].latents[0], made[1].latents[0])
        assert np.array_equal(made[0].frames[0], made[1].frames[0]) == equal
        assert made[0].frames[0].shape == made[1].frames[0].shape


def test_a_model_is_loaded_from_a_path_too(model):
    again = tinydiff.load(PACKAGE / "shapes")
    assert torch.equal(
        tinydiff.generate(again, "a star", **SMALL).latents[0],
        tinydiff.generate(model, "a star", **SMALL).latents[0],
    )


def test_every_watcher_is_notified(model):
    told = []

    class Watcher:
        def on_stage(self, name):
            told.append(name)

        def on_step(self, done, total):
            told.append((done, total))

    library.generate(model, "a star", SMALL | {"num_outputs_per_prompt": 2}, Watcher())
    assert told == ["encode", *["denoise", (1, 2), (2, 2), "decode"] * 2]


def test_a_long_prompt_is_cut_with_a_word(model, caplog):
    """Each text once, in the result, in the parameters that files hold, and in the log."""
    cut = "prompt: the last 29 of its tokens were cut, the model reads 32"
    result = tinydiff.generate(model, "a red circle " * 20, **SMALL)
    assert result.warnings == (cut,) and result.parameters["warnings"] == [cut]
    assert [record.getMessage() for record in caplog.records] == [cut]
    assert "warnings" not in tinydiff.generate(model, "a red circle", **SMALL).parameters


def test_a_long_negative_prompt_is_named(model):
    result = tinydiff.generate(
        model, "a red circle", **SMALL | {"guidance_scale": 2.0, "negative_prompt": "a blue square " * 20}
    )
    assert [said.split(":")[0] for said in result.warnings] == ["negative_prompt"]


def test_mistakes(model, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    refused("num_step", "num_step: unknown option", tinydiff.generate, model, "a", num_step=3)
    refused("heigth", "did you mean 'height'?", tinydiff.generate, model, "a", heigth=3)
    refused("output_path", "unknown option", tinydiff.generate, model, "a", output_path="x")
    refused("height", "'tall' is not an integer", tinydiff.generate, model, "a", height="tall")
    refused("height", "100 is not a multiple of 16", tinydiff.generate, model, "a", height=100)
    refused(
        "guidance_scale",
        "nan is not a finite number",
        tinydiff.generate,
        model,
        "a",
        guidance_scale=float("nan"),
    )
    refused("prompt", "must be one string, not a list", tinydiff.generate, model, ["a", "b"])
    refused(
        "strength",
        "ask for one image",
        tinydiff.generate,
        model,
        "a",
        image_path=str(tmp_path / "a.png"),
        strength=0.5,
    )
    refused("prompt", "unknown option", tinydiff.load, prompt="a")
    refused("dit_precision", "'fp8' is not one of fp32, fp16, bf16", tinydiff.load, dit_precision="fp8")
    refused("model_path", "has no model_index.json", tinydiff.load, tmp_path)


def test_import_is_light():
    code = (
        "import sys, tinydiff; print([name for name in ('torch', 'numpy', 'PIL', 'av', 'tyro') if "
        "name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_written_result_keeps_its_frames_only_where_asked(keep, tmp_path):
    options = config.options(
        {"prompt": ["a", "b"], "output_path": str(tmp_path), "return_frames": keep, **SMALL}
    )
    first, second = generate(options, NoProgress())
    assert (
        [len(result.frames) for result in (first, second)]
        == [len(result.latents) for result in (first, second)]
        == [keep, keep]
    )
    assert (
        list(first.seconds) == ["load", "encode", "denoise", "decode", "save"]
        and list(second.seconds) == list(first.seconds)[1:]
    )
    assert [result.parameters["prompt"] for result in (first, second)] == ["a", "b"]
    assert (
        len({path for result in (first, second) for path in result.paths})
        == len(list(tmp_path.iterdir()))
        == 2
    )
