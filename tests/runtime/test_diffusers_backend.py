"""Models that tinydiff has no code for, run by diffusers behind the same commands, calls and records."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import tinydiff
from tests.runtime import foreign_folders
from tinydiff import cli, config
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.io.output import read_parameters
from tinydiff.records import UserError
from tinydiff.runtime import backends, diffusers_backend, launch
from tinydiff.runtime.components import SHIPPED


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return foreign_folders.stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny-sd")


def reference(folder, seed=42, **arguments):
    """What a user's own call of diffusers gives, uint8."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(**arguments, generator=generator, output_type="np")
    return (np.asarray(made[0][0]) * 255).round().astype(np.uint8)


def test_the_command_makes_diffusers_own_image_and_the_file_says_how(unet, tmp_path, capsys):
    words = "generate --backend diffusers --prompt x --num-inference-steps 2 --guidance-scale 3 --seed 5"
    argv = [*words.split(), "--model-path", str(unet), "--output-file-path", str(tmp_path / "a.png")]
    assert cli.main(argv) == 0, capsys.readouterr().err
    expected = reference(unet, 5, prompt="x", num_inference_steps=2, guidance_scale=3.0)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == expected).all()
    told = read_parameters(tmp_path / "a.png")
    assert told["backend"] == "diffusers" and told["pipeline"] == "StableDiffusionPipeline"
    assert (told["height"], told["width"], told["num_inference_steps"], told["seed"]) == (16, 16, 2, 5)
    assert told["guidance_scale"] == 3.0 and told["eta"] == 0.0


def test_the_library_loads_it_and_reports_every_step(unet):
    heard = []

    class Watch:
        def on_stage(self, name):
            heard.append(name)

        def on_step(self, done, total):
            heard.append((done, total))

    model = tinydiff.load(unet, backend="diffusers")
    result = tinydiff.generate(model, "x", num_inference_steps=2, num_outputs_per_prompt=2, progress=Watch())
    assert heard == ["denoise", (1, 2), (2, 2)] * 2
    assert result.seeds == (42, 43) and len(result.step_seconds) == 4
    for seed, image in zip(result.seeds, result.images, strict=True):
        assert (image == reference(unet, seed, prompt="x", num_inference_steps=2)).all()


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"num_frames": 5}, "num_frames", ["takes no num_frames; it takes", "num_inference_steps"]),
        ({"flow_shift": 3.0}, "flow_shift", ["StableDiffusionPipeline takes no flow_shift", "clip_skip"]),
        ({"image_path": "IMAGE"}, "image_path", ["takes no image; it takes"]),
        ({"diffusers_kwargs": {"clip_skp": 1}}, "diffusers_kwargs", ["did you mean 'clip_skip'?"]),
        (
            {"diffusers_kwargs": {"width": 8}, "width": 16},
            "diffusers_kwargs",
            ["cannot be set there; give width"],
        ),
        (
            {"diffusers_kwargs": {"guidance_scale": 2}, "guidance_scale": 3.0},
            "diffusers_kwargs",
            ["'guidance_scale' is given by guidance_scale too; give one of them"],
        ),
        ({"diffusers_kwargs": {"generator": 1}}, "diffusers_kwargs", ["cannot be set there; give seed"]),
        (
            {"diffusers_kwargs": {"output_type": "pil"}},
            "diffusers_kwargs",
            ["'output_type' cannot be set there"],
        ),
        ({"loras": {"ink": 1.0}}, "loras", ["no adapter is loaded"]),
        ({"sigmas": (0.5,)}, "sigmas", ["StableDiffusionPipeline refuses the request", "custom sigmas"]),
    ],
)
def test_what_the_pipeline_does_not_take_is_named_with_what_it_takes(
    options, field, words, unet, loaded, tmp_path
):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if "image_path" in options:
        options = {"image_path": str(tmp_path / "a.png")}
    if "sigmas" not in options:
        options["num_inference_steps"] = 1
    with pytest.raises(UserError) as mistake:
        tinydiff.generate(loaded, "x", **options)
    assert mistake.value.field == field and all(word in str(mistake.value) for word in words), mistake.value


@pytest.fixture(scope="module")
def loaded(unet):
    return tinydiff.load(unet, backend="diffusers")


def test_further_arguments_reach_the_pipeline_and_the_record(loaded, unet):
    result = tinydiff.generate(loaded, "x", num_inference_steps=2, diffusers_kwargs={"eta": 0.5})
    expected = reference(unet, prompt="x", num_inference_steps=2, eta=0.5)
    assert (result.images[0] == expected).all() and result.parameters["eta"] == 0.5
    assert not (expected == reference(unet, prompt="x", num_inference_steps=2)).all()


def test_further_arguments_come_from_a_config_file_and_from_words(tmp_path):
    (tmp_path / "a.yaml").write_text("diffusers_kwargs: {clip_skip: 1, eta: 0.5}\n")
    parsed = config.parse(["--config", str(tmp_path / "a.yaml"), "--diffusers-kwargs.clip-skip", "2"])
    assert parsed.sampling.diffusers_kwargs == {"clip_skip": 2, "eta": 0.5}
    words = ["--diffusers-kwargs", '{"a": [1], "b": null, "c": "x"}']
    assert config.parse(words).sampling.diffusers_kwargs == {"a": [1], "c": "x"}
    assert config.parse(["--diffusers-kwargs", "a=1,b=x,c=true"]).sampling.diffusers_kwargs == {
        **{"a": 1, "b": "x", "c": True}
    }


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        (
            {"pipeline_class_name": "StableDifusionPipeline"},
            "pipeline_class_name",
            "did you mean 'StableDiff",
        ),
        ({"attention_backend": "flash"}, "attention_backend", "'flash' is for tinydiff's own code"),
        ({"component_paths": {"transformer": "x"}}, "component_paths", "'transformer' is not one of"),
        ({"component_precisions": {"vea": "fp32"}}, "component_precisions", "did you mean 'vae'?"),
        ({"text_encoder_precisions": ("fp32", "fp16")}, "text_encoder_precisions", "text encoders: 1"),
        ({"diffusers_attention_backend": "flsh"}, "diffusers_attention_backend", "must be one of"),
        ({"diffusers_attention_backend": "flash"}, "diffusers_attention_backend", "cannot use"),
        (
            {"dit_cpu_offload": True, "layerwise_offload_components": ("vae",)},
            "dit_layerwise_offload",
            "not both; give one kind",
        ),
        ({"cpu_offload_components": ("unt",)}, "cpu_offload_components", "did you mean 'unet'?"),
        ({"variant": "fp16"}, "model_path", "fp16"),
        ({"revision": "main"}, "revision", "is a local directory, not a hub id"),
    ],
)
def test_a_model_option_that_cannot_be_is_refused(options, field, words, unet):
    with pytest.raises(UserError) as mistake:
        tinydiff.load(unet, backend="diffusers", **options)
    assert mistake.value.field == field and words in str(mistake.value), mistake.value


def test_auto_takes_diffusers_for_what_is_missing_and_says_so(unet, caplog):
    with caplog.at_level("WARNING", "tinydiff"):
        blueprint = backends.read(ModelOptions(model_path=str(unet)))
    assert blueprint.foreign is not None and blueprint.foreign.class_name == "StableDiffusionPipeline"
    assert caplog.messages == [f"diffusers runs {unet}: tinydiff has no code for StableDiffusionPipeline"]
    assert backends.read(ModelOptions()).foreign is None, "our own code stays the default"


def test_without_diffusers_the_refusal_says_how_to_install_it(unet, monkeypatch):
    monkeypatch.setattr(diffusers_backend, "installed", lambda: False)
    for backend in ("auto", "diffusers"):
        with pytest.raises(UserError, match=r"pip install 'tinydiff\[diffusers\]'"):
            backends.read(ModelOptions(model_path=str(unet), backend=backend))
    with pytest.raises(UserError) as mistake:
        backends.read(ModelOptions(model_path=str(unet), backend="sglang"))
    assert "has no transformer, which a StableDiffusionPipeline needs" in str(mistake.value)


def test_a_broken_model_of_ours_does_not_go_to_diffusers(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder)
    foreign_folders.edit(folder / "transformer" / "config.json", num_layers="x")
    with pytest.raises(UserError, match=r"num_layers"):
        backends.read(ModelOptions(model_path=str(folder)))


@pytest.mark.parametrize("name", backends.DIFFUSERS_ONLY)
def test_an_option_of_diffusers_is_refused_for_our_own_code(name):
    with pytest.raises(UserError, match=f"^{name}: .* has an effect with --backend diffusers only"):
        backends.read(ModelOptions(**{name: True if name == "vae_slicing" else "x"}))


def test_arguments_of_a_pipeline_are_refused_for_our_own_code():
    with pytest.raises(UserError, match=r"^diffusers_kwargs: .* give --backend diffusers as well"):
        backends.NATIVE.admit(
            backends.read(ModelOptions()), SamplingOptions(prompt=("x",), diffusers_kwargs={"a": 1})
        )


def test_several_ranks_are_refused(unet):
    with pytest.raises(UserError, match=r"^num_gpus: diffusers runs a model on one device"):
        launch.check_devices(backends.read(ModelOptions(model_path=str(unet))), 2)
