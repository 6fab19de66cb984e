"""The model in the package: diffusers loads its directory and makes the same, and `tinydiff generate` needs
nothing but a prompt.

Nothing here depends on how good its images are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

import tinydiff
from tests.sources import PACKAGE, ROOT
from tinydiff import cli
from tinydiff.io.images import read_image
from tinydiff.io.output import read_parameters
from tinydiff.models import registry

SHIPPED = PACKAGE / "shapes"
PROMPT, STEPS = "a large red circle on a white background, moving right", 4


@pytest.fixture(scope="module")
def model():
    return tinydiff.load()


@pytest.fixture(scope="module")
def reference():
    return _quiet(WanPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32))


@pytest.fixture
def picture(tmp_path) -> str:
    """A red disc on grey, as a file."""
    y, x = np.mgrid[:96, :96]
    disc = (x - 40) ** 2 + (y - 50) ** 2 < 900
    Image.fromarray(np.where(disc[..., None], (220, 30, 30), (120, 120, 120)).astype(np.uint8)).save(
        tmp_path / "first.png"
    )
    return str(tmp_path / "first.png")


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(made, pipe, **fields):
    """A result of seed 3 equals the pipeline's, from the same seed's noise: latents to 1e-4, frames to one
    level of 256.
    """
    asked = fields | {
        "prompt": PROMPT,
        "negative_prompt": "",
        "num_inference_steps": STEPS,
        "guidance_scale": registry.named(registry.SHIPPED).guidance,
        "max_sequence_length": 32,
    }
    latents, video = (
        pipe(**asked, generator=torch.Generator().manual_seed(3), output_type=kind).frames[0]
        for kind in ("latent", "np")
    )
    assert made.latents[0].shape == latents.shape
    assert (made.latents[0] - latents).abs().max() <= 1e-4 * max(1, latents.abs().max().item())
    expected = (video * 255).round()
    assert made.frames[0].shape == expected.shape and expected.std() > 1
    assert np.abs(made.frames[0] - expected).max() <= 1


@pytest.mark.parametrize(
    "fields", [{}, {"num_frames": 17, "height": 64, "width": 96}], ids=["picture", "clip"]
)
def test_diffusers_makes_the_same(fields, model, reference):
    made = tinydiff.generate(model, PROMPT, seed=3, num_inference_steps=STEPS, **fields)
    same(made, reference, **{"height": 128, "width": 128, "num_frames": 1} | fields)


def test_one_image_starts_from_the_input(model, picture):
    """The less strength, the fewer steps and the nearer to the given image."""
    given, far, steps = read_image(picture).astype(int), [], []
    for strength in (0.05, 0.5, 1.0):
        fields = {"strength": strength, "num_inference_steps": 20, "height": 96, "width": 96}
        made = tinydiff.generate(model, "a blue star", image_path=picture, num_frames=1, **fields)
        far.append(np.abs(made.images[0] - given).mean())
        steps.append(len(made.step_seconds))
    assert steps == [1, 10, 20] and far == sorted(far)


def test_a_mask_keeps_what_is_black_in_it(model, picture, tmp_path):
    given, mask = read_image(picture), np.zeros((96, 96, 3), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = {
        "image_path": picture,
        "mask_path": str(tmp_path / "mask.png"),
        "num_frames": 1,
        "height": 96,
        "width": 96,
    }
    made = tinydiff.generate(model, "a green square", num_inference_steps=4, **asked).images[0]
    assert (made[:, 58:] == given[:, 58:]).all() and (made[:, :32] != given[:, :32]).any()


def test_diffusers_makes_the_same_from_a_first_frame(model, picture):
    pipe = _quiet(WanImageToVideoPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32))
    size = {"height": 64, "width": 64, "num_frames": 9}
    made = tinydiff.generate(model, PROMPT, seed=3, num_inference_steps=STEPS, image_path=picture, **size)
    same(made, pipe, image=Image.open(picture), **size)


def test_a_video_starts_with_the_input_image(model, picture):
    """Its first latent frame is the image's own, and so its first frame is what the autoencoder makes of
    the image.
    """
    made = tinydiff.generate(
        model, PROMPT, num_inference_steps=2, image_path=picture, height=96, width=96, num_frames=5
    )
    vae = model.nets["vae"]
    pixels = torch.from_numpy(read_image(picture).copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    coded = vae.family.encode(vae.config, vae.w, pixels)
    assert torch.allclose(made.latents[0][:, :1], coded[0], atol=1e-5)
    again = vae.family.decode(vae.config, vae.w, coded)[0, :, 0].permute(1, 2, 0)
    assert np.abs(made.images[0] - ((again / 2 + 0.5) * 255).numpy()).max() <= 1


def test_the_directory_is_small():
    files = list(SHIPPED.glob("[!l]*/*.safetensors"))
    assert len(files) == 3 and sum(file.stat().st_size for file in files) <= 8_000_000
    styles = list((SHIPPED / "loras").iterdir())
    assert {*SHIPPED.rglob("*.safetensors")} == {*files, *styles}
    assert all(file.stat().st_size < 150_000 for file in styles)


def test_outputs_of_a_seed_are_the_images_of_the_seeds_that_follow(model):
    fields = {"num_inference_steps": 3, "height": 64, "width": 64}
    together = tinydiff.generate(model, PROMPT, seed=11, num_outputs_per_prompt=3, **fields)
    assert together.seeds == (11, 12, 13)
    for seed, frames, latents in zip(together.seeds, together.frames, together.latents, strict=True):
        alone = tinydiff.generate(model, PROMPT, seed=seed, **fields)
        assert np.array_equal(alone.frames[0], frames) and torch.equal(alone.latents[0], latents)
    assert not np.array_equal(together.frames[0], together.frames[1])


def test_a_prompt_is_enough(tmp_path):
    """From a fresh process in an empty directory: one PNG, its parameters inside, its name and
    seed printed.
    """
    command = [sys.executable, "-m", "tinydiff.cli", "generate", "--prompt", "a red circle"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    [path] = (tmp_path / "outputs").iterdir()
    assert path.suffix == ".png" and path.name.startswith("a-red-circle-42-")
    assert done.stdout.splitlines()[0] == f"outputs/{path.name}  seed 42"
    assert read_image(path).shape == (128, 128, 3)
    kept = read_parameters(path)
    assert (kept["prompt"], kept["seed"], kept["num_inference_steps"], kept["num_frames"]) == (
        "a red circle",
        42,
        30,
        1,
    )
    assert kept["model"] == "tinydiff/shapes" and kept["tinydiff"] == tinydiff.__version__


def generated(tmp_path: Path, *words: str) -> Path:
    """The one file that `generate` writes."""
    out = tmp_path / "out"
    argv = [
        "generate",
        "--prompt",
        PROMPT,
        "--num-inference-steps",
        "2",
        "--height",
        "64",
        "--width",
        "64",
        "--output-path",
        str(out),
    ]
    assert cli.main([*argv, *words]) == 0
    [path] = out.iterdir()
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as opened:
        return [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]


def test_a_videos_name_makes_a_video(tmp_path):
    path = generated(tmp_path, "--output-file-name", "clip.mp4")
    assert path.name == "clip.mp4" and [frame.shape for frame in frames_of(path)] == [(64, 64, 3)] * 17
    assert read_parameters(path)["num_frames"] == 17


def test_an_image_makes_a_video_that_starts_with_it(tmp_path, picture, model):
    path = generated(tmp_path, "--image-path", picture)
    clip = frames_of(path)
    assert path.suffix == ".mp4" and len(clip) == 17 and read_parameters(path)["given_images"] == 1
    made = tinydiff.generate(model, PROMPT, num_inference_steps=2, height=64, width=64, image_path=picture)
    assert np.abs(clip[0].astype(int) - made.images[0]).mean() < 8  # as far as H.264 keeps it


def test_several_prompts_and_outputs_become_files(tmp_path):
    argv = [
        "generate",
        "--prompt",
        "a star",
        "a ring",
        "--num-outputs-per-prompt",
        "2",
        "--num-inference-steps",
        "1",
        "--height",
        "32",
    ]
    assert cli.main([*argv, "--width", "32", "--output-path", str(tmp_path)]) == 0
    kept = sorted((entry["prompt"], entry["seed"]) for entry in map(read_parameters, tmp_path.iterdir()))
    assert kept == [("a ring", 42), ("a ring", 43), ("a star", 42), ("a star", 43)]
