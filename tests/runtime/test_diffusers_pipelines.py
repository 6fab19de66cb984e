"""Pipelines of several kinds through the diffusers backend: each makes what the user's own call makes."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from PIL import Image

import tinydiff
from tests.runtime import foreign_folders, test_ovis_pipelines
from tinydiff import cli
from tinydiff.io.output import read_parameters
from tinydiff.records import UserError


def called(folder, seed=42, attribute="images", **arguments):
    """The output of diffusers itself, uint8 [frames, H, W, 3]."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed), output_type="np")
    frames = np.asarray(getattr(made, attribute))
    return ((frames[0] if frames.ndim == 5 else frames) * 255).round().astype(np.uint8)


BINNED = {"use_resolution_binning": False, "clean_caption": False}


@pytest.mark.parametrize(
    ("build", "options", "arguments", "frames"),
    [
        (foreign_folders.stable_diffusion_xl, {"height": 16, "width": 24}, {}, 1),
        (foreign_folders.pixart, {"height": 16, "width": 24}, BINNED, 1),
        (foreign_folders.sana, {"height": 32, "width": 64}, {**BINNED, "max_sequence_length": 16}, 1),
        (
            foreign_folders.cogvideox,
            {"height": 16, "width": 32, "num_frames": 9},
            {"max_sequence_length": 16, "use_dynamic_cfg": True},
            9,
        ),
    ],
)
def test_a_pipeline_makes_what_it_makes_without_us(build, options, arguments, frames, tmp_path):
    folder = build(tmp_path / "model")
    given = {"num_inference_steps": 2, "guidance_scale": 2.5, "negative_prompt": "blurry", **options}
    model = tinydiff.load(folder)  # auto: none of these classes is ours
    heard = []

    class Watch:
        def on_stage(self, name):
            pass

        def on_step(self, done, total):
            heard.append((done, total))

    result = tinydiff.generate(model, "a red circle", **given, diffusers_kwargs=arguments, progress=Watch())
    expected = called(
        folder, attribute="frames" if frames > 1 else "images", prompt="a red circle", **given, **arguments
    )
    assert result.frames[0].shape == (frames, options["height"], options["width"], 3)
    assert (result.frames[0] == expected).all()
    told = result.parameters
    assert heard == [(1, 2), (2, 2)] and told["num_frames"] == frames and told["num_inference_steps"] == 2
    assert told["guidance_scale"] == 2.5 and told["negative_prompt"] == "blurry"
    assert arguments.items() <= told.items()


def test_a_video_is_written_as_one(tmp_path):
    folder = foreign_folders.cogvideox(tmp_path / "model")
    words = "generate --prompt x --num-inference-steps 1 --num-frames 9 --size 16x16 --fps 8"
    words += f" --model-path {folder} --output-file-path {tmp_path / 'a.mp4'}"
    assert cli.main([*words.split(), "--diffusers-kwargs.max-sequence-length", "16"]) == 0
    with av.open(tmp_path / "a.mp4") as file:
        assert len(list(file.decode(video=0))) == 9
    assert read_parameters(tmp_path / "a.mp4")["fps"] == 8


OVIS = (
    "generate --model-path MODEL --backend BACKEND --trust-remote-code --diffusers-attention-backend native "
    "--height 12 --width 20 --num-inference-steps 3 --save-output --output-path OUT "
    "--output-file-name ovis_garden.png"
)
"""The command of SGLang's page on a tiny checkpoint."""


def test_ovis_makes_one_image_through_diffusers_and_natively(tmp_path, capsys):
    test_ovis_pipelines.build(tmp_path / "model")
    prompt = ["--prompt", "A serene Japanese garden with cherry blossoms"]
    images = []
    for backend in ("diffusers", "sglang"):
        words = OVIS.replace("MODEL", str(tmp_path / "model")).replace("OUT", str(tmp_path / backend))
        if backend == "sglang":
            words = words.replace("--diffusers-attention-backend native ", "")
        argv = [*words.replace("BACKEND", backend).split(), *prompt]
        assert cli.main(argv) == 0, capsys.readouterr().err
        file = tmp_path / backend / "ovis_garden.png"
        images.append(np.asarray(Image.open(file)).astype(int))
        assert ("backend" in read_parameters(file)) == (backend == "diffusers")
    foreign, native = images
    assert native.std() > 1 and np.abs(foreign - native).max() <= 1  # of 255 levels: rounding of float32


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where diffusers copies the code of models."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_a_pipeline_of_the_models_own_code_runs_where_it_is_trusted(tmp_path, modules):
    folder = foreign_folders.custom(tmp_path / "model")
    with pytest.raises(UserError, match=r"^trust_remote_code: .* brings code of its own \(tinting.py\)"):
        tinydiff.load(folder, backend="diffusers")
    model = tinydiff.load(folder, backend="diffusers", trust_remote_code=True)
    assert model.blueprint.foreign.class_name == "TintPipeline"
    with pytest.raises(UserError, match=r"^diffusers_kwargs: TintPipeline needs the argument 'tint'"):
        tinydiff.generate(model, "")
    with pytest.raises(UserError, match=r"^diffusers_kwargs: TintPipeline refuses the request: .* index"):
        tinydiff.generate(model, "", diffusers_kwargs={"tint": "x"})
    dark = tinydiff.generate(model, "", num_inference_steps=2, diffusers_kwargs={"tint": 0.5})
    light = tinydiff.generate(model, "", num_inference_steps=2, diffusers_kwargs={"tint": 0.5, "more": 0.2})
    assert dark.parameters["tint"] == 0.5 and dark.images[0].shape == (16, 16, 3)
    assert np.abs(light.images[0].astype(int) - dark.images[0] - 51).max() <= 1


def test_a_component_of_the_models_own_code_is_refused_without_trust(tmp_path):
    folder = foreign_folders.custom(tmp_path / "model")
    (folder / "unet" / "mine.py").write_text("raise SystemExit('this must not run')")
    foreign_folders.edit(folder / "model_index.json", _class_name="DDPMPipeline", unet=["mine", "Mine"])
    with pytest.raises(UserError, match=r"^trust_remote_code: .* \(the component 'unet'\)"):
        tinydiff.load(folder, backend="diffusers")


def test_a_class_that_does_not_exist_is_answered_with_the_nearest(tmp_path):
    folder = foreign_folders.custom(tmp_path / "model")
    foreign_folders.edit(folder / "model_index.json", _class_name="StabelDiffusionPipeline")
    with pytest.raises(UserError, match=r"has no pipeline class .*; did you mean 'StableDiffusionPipeline'"):
        tinydiff.load(folder, backend="diffusers")


def test_another_class_runs_the_same_model_with_an_image(tmp_path):
    folder = foreign_folders.stable_diffusion(tmp_path / "model")
    Image.fromarray(np.full((16, 24, 3), 200, np.uint8)).save(tmp_path / "a.png")
    model = tinydiff.load(folder, pipeline_class_name="StableDiffusionImg2ImgPipeline", backend="diffusers")
    with pytest.raises(
        UserError, match=r"^prompt: StableDiffusionImg2ImgPipeline refuses the request: Input"
    ):
        tinydiff.generate(model, "x")
    given = {"num_inference_steps": 4, "strength": 0.5, "image_path": str(tmp_path / "a.png")}
    result = tinydiff.generate(model, "x", **given)
    assert result.images[0].shape == (16, 24, 3) and result.parameters["num_inference_steps"] == 2
    assert result.parameters["given_images"] == 1 and result.parameters["strength"] == 0.5


def test_a_repository_of_modular_blocks_runs(tmp_path):
    folder = foreign_folders.stable_diffusion_xl(tmp_path / "model")
    ModularPipeline.from_pretrained(str(folder)).save_pretrained(str(tmp_path / "blocks"))
    assert (tmp_path / "blocks" / "modular_model_index.json").is_file()
    given = {"num_inference_steps": 2, "height": 16, "width": 24}
    pipe = ModularPipeline.from_pretrained(str(tmp_path / "blocks"))
    pipe.load_components(dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(42)
    [expected] = pipe(prompt="x", **given, generator=generator, output_type="np", output="images")
    heard = []

    class Watch:
        def on_stage(self, name):
            pass

        def on_step(self, done, total):
            heard.append((done, total))

    model = tinydiff.load(tmp_path / "blocks")
    result = tinydiff.generate(model, "x", **given, progress=Watch())
    assert (result.images[0] == (expected * 255).round()).all() and heard == [(1, 2), (2, 2)]
    assert result.parameters["pipeline"] == "StableDiffusionXLModularPipeline"
    with pytest.raises(UserError, match=r"takes no num_frames; it takes"):
        tinydiff.generate(model, "x", num_frames=5)
    with pytest.raises(UserError, match=r"^pipeline_class_name: .* has modular blocks"):
        tinydiff.load(tmp_path / "blocks", backend="diffusers", pipeline_class_name="FluxPipeline")
    foreign_folders.edit(
        tmp_path / "blocks" / "modular_model_index.json", auto_map={"ModularPipeline": "a.B"}
    )
    with pytest.raises(UserError, match=r"^trust_remote_code: .* brings blocks of its own"):
        tinydiff.load(tmp_path / "blocks", backend="diffusers")
