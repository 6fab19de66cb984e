"""Qwen-Image's pipelines against diffusers' own: the tokens after every step and the images, from the same
noise, in float64.

Beside the roundings that `compare` names, what `qwen_folders` puts right of the reference is taken out.
"""

from __future__ import annotations

import logging
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage,
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_img2img,
    pipeline_qwenimage_inpaint,
    pipeline_qwenimage_layered,
)
from PIL import Image

from tests.parity import draw
from tests.runtime import compare
from tests.runtime.compare import exact, same_frames, starting_from
from tests.runtime.folders import edit, load, released
from tests.runtime.qwen_folders import LAYERED, Z, build
from tinydiff import cli, config
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.io.output import read_parameters
from tinydiff.models import qwen_image, qwen_prompts
from tinydiff.models.recipe import fit_area
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.context import make_context
from tinydiff.sampling import noise
from tinydiff.sampling.sigmas import linear_grid

STEPS, HEIGHT, WIDTH = 4, 64, 96
PROMPT, NEGATIVE = "A red  circle & a Größe 円", "blurry, the left of"
EDIT_PIXELS, LANGUAGE_MODEL_PIXELS = 12288, 6144
"""Stand for 1024 x 1024 and 384 x 384 pixels: large enough that images of two aspects get two sizes."""


def _scaled(sizes):
    scaled = {1024 * 1024: EDIT_PIXELS, 640 * 640: EDIT_PIXELS}
    return lambda area, ratio: sizes(scaled.get(area, area), ratio)


@pytest.fixture
def small(monkeypatch):
    """Images to edit are seen at small sizes, by both sides."""
    plus = pipeline_qwenimage_edit_plus
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", LANGUAGE_MODEL_PIXELS)
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", EDIT_PIXELS)
    for module in (pipeline_qwenimage_edit, plus, pipeline_qwenimage_layered):
        monkeypatch.setattr(module, "calculate_dimensions", _scaled(module.calculate_dimensions))
    monkeypatch.setattr(qwen_image, "EDIT_PIXELS", EDIT_PIXELS)
    monkeypatch.setattr(qwen_image, "LANGUAGE_MODEL_PIXELS", LANGUAGE_MODEL_PIXELS)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Three of noise, wide, tall and square, with alpha."""
    paths = []
    for i, size in enumerate([(40, 56), (80, 40), (32, 32)]):
        paths.append(tmp_path / f"given{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 4), dtype=np.uint8)).save(paths[-1])
    return paths


def _opened(path: Path, mode: str = "RGB") -> Image.Image:
    """As the reference is given it: what has alpha stands before white."""
    picture = Image.open(path)
    return (
        picture
        if mode == "RGBA"
        else Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    )


# --- both sides ---


def _request(model, images=(), **fields):
    asked = {
        "prompt": (PROMPT,),
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "image_path": tuple(map(str, images)),
    }
    [request] = admit(model.blueprint, SamplingOptions(**asked | fields))
    return request


def _theirs(pipe, **given):
    """(tokens [1, L, P] after each step, images between 0 and 1)."""
    steps = []
    fields = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS} | given
    with exact(pipe):
        made = pipe(
            **fields,
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]) or {},
        )
    return steps, made.images


def _ours(model, request, start):
    """(tokens after each step, frames)."""
    conditioning = pipeline.condition(model, request)
    assert conditioning.stages[0].inputs.latents[0].size == tuple(start.shape[1:])
    steps = list(pipeline.denoise(model, conditioning, 0, [start]))
    return steps, pipeline.decode(
        model, request.output, conditioning.stages[0].inputs.latents[0].unpack(steps[-1])
    )


def _packed(start):
    """Noise [1, C, 1, H, W] as the reference packs it."""
    return qwen_image.patchify(start, (1, 2, 2))


def _same(ours, theirs, video):
    (steps, frames), (expected, made) = ours, theirs
    assert len(steps) == len(expected)
    compare.same_steps(steps, expected)
    same_frames(frames, [made] if video else made)


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_from_text(scale, tmp_path):
    pipe = build(diffusers.QwenImagePipeline, tmp_path / "model")
    model = load(tmp_path / "model")
    start = draw(1, Z, 1, HEIGHT // 8, WIDTH // 8, seed=9)
    theirs = _theirs(pipe, height=HEIGHT, width=WIDTH, true_cfg_scale=scale, latents=_packed(start))
    request = _request(model, height=HEIGHT, width=WIDTH, guidance_scale=scale)
    assert request.guidance.on == (scale > 1)
    _same(_ours(model, request, start), theirs, True)


@pytest.mark.parametrize("masked", [False, True])
def test_from_an_image(masked, tmp_path, pictures, monkeypatch):
    kind = diffusers.QwenImageInpaintPipeline if masked else diffusers.QwenImageImg2ImgPipeline
    pipe = kind(**build(diffusers.QwenImagePipeline, tmp_path / "model").components)
    pipe.set_progress_bar_config(disable=True)
    model = load(tmp_path / "model")
    start = draw(1, Z, 1, HEIGHT // 8, WIDTH // 8, seed=9)
    given = {
        "image": _opened(pictures[0]),
        "height": HEIGHT,
        "width": WIDTH,
        "strength": 0.8,
        "true_cfg_scale": 3.0,
    }
    asked = {"height": HEIGHT, "width": WIDTH, "strength": 0.8, "guidance_scale": 3.0}
    if masked:
        mask = np.zeros((40, 56), dtype=np.uint8)
        mask[5:29, 10:31] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        given["mask_image"] = Image.open(tmp_path / "mask.png")
        asked["mask_path"] = str(tmp_path / "mask.png")
    module = pipeline_qwenimage_inpaint if masked else pipeline_qwenimage_img2img
    starting_from(monkeypatch, module, start.transpose(1, 2))
    theirs = _theirs(pipe, **given)
    assert len(theirs[0]) == 4
    _same(_ours(model, _request(model, pictures[:1], **asked), start), theirs, True)


@pytest.mark.parametrize("size", [None, (HEIGHT, WIDTH)])
def test_edit(size, small, tmp_path, pictures):
    pipe = build(diffusers.QwenImageEditPipeline, tmp_path / "model")
    model = load(tmp_path / "model")
    height, width = size or (96, 128)
    start = draw(1, Z, 1, height // 8, width // 8, seed=9)
    asked = {} if size is None else {"height": height, "width": width}
    theirs = _theirs(pipe, image=_opened(pictures[0]), latents=_packed(start), **asked)
    request = _request(model, pictures[:1], height=height, width=width)
    _same(_ours(model, request, start), theirs, True)


@pytest.mark.parametrize(
    ("count", "still", "scale"), [(1, False, 4.0), (2, False, 4.0), (2, True, 4.0), (3, True, 1.0)]
)  # fmt: skip
def test_edit_of_several(count, still, scale, small, tmp_path, pictures):
    """-2509, and with `zero_cond_t` -2511. Images of different sizes, none square."""
    pipe = build(diffusers.QwenImageEditPlusPipeline, tmp_path / "model", zero_cond_t=still)
    model = load(tmp_path / "model")
    start = draw(1, Z, 1, HEIGHT // 8, WIDTH // 8, seed=9)
    given = {
        "image": [_opened(path) for path in pictures[:count]],
        "height": HEIGHT,
        "width": WIDTH,
        "true_cfg_scale": scale,
    }
    theirs = _theirs(pipe, latents=_packed(start), **given)
    request = _request(model, pictures[:count], height=HEIGHT, width=WIDTH, guidance_scale=scale)
    _same(_ours(model, request, start), theirs, True)


@pytest.mark.parametrize(
    ("prompt", "scale", "scheduler"),
    [
        (PROMPT, 4.0, {}),
        (PROMPT, 1.0, {"time_shift_type": "exponential"}),
        ("", 4.0, {"shift_terminal": 0.1, "time_shift_type": "exponential"}),
    ],
)
def test_layers(prompt, scale, scheduler, small, tmp_path, pictures, monkeypatch):
    pipe = build(diffusers.QwenImageLayeredPipeline, tmp_path / "model", **LAYERED)
    pipe.scheduler.register_to_config(**scheduler)
    edit(tmp_path / "model" / "scheduler" / "scheduler_config.json", **scheduler)
    generate = pipe.text_encoder.generate
    monkeypatch.setattr(
        pipe.text_encoder, "generate", lambda **given: generate(**given | {"max_new_tokens": 9})
    )
    monkeypatch.setattr(qwen_prompts, "CAPTION_TOKENS", 9)
    model = load(tmp_path / "model")
    layers, (height, width) = 2, (96, 128)
    start = draw(1, layers + 1, Z, height // 8, width // 8, seed=9)
    packed = pipe._pack_latents(start, 1, Z, height // 8, width // 8, layers + 1)
    given = {
        "image": _opened(pictures[0], "RGBA"),
        "layers": layers,
        "prompt": prompt,
        "true_cfg_scale": scale,
    }
    theirs = _theirs(pipe, latents=packed, **given)
    whole = np.asarray(_opened(pictures[0], "RGBA").resize((width, height), Image.Resampling.LANCZOS))
    assert len(qwen_prompts.caption(make_context(model, _request(model, pictures[:1])), whole)) > 3
    request = _request(
        model,
        pictures[:1],
        prompt=(prompt,),
        num_frames=layers,
        guidance_scale=scale,
        height=height,
        width=width,
    )
    assert (request.output.layers, request.output.num_frames) == (2, 1)
    ours = _ours(model, request, start)
    _same(ours, theirs, False)
    assert ours[1].shape == (layers, height, width, 4)


def test_the_grid_of_layers_is_that_of_all():
    """The reference counts it otherwise, to the same float32 numbers."""
    for steps in range(1, 101):
        counted = torch.from_numpy(np.linspace(1.0, 0, steps + 1)[:-1].astype(np.float32))
        assert torch.equal(counted, linear_grid(steps).float())


def test_noise_is_that_of_a_seeded_generator(tmp_path, small, pictures):
    """Layers' too, which the reference draws image after image."""
    for kind, module, options, more in (
        (diffusers.QwenImagePipeline, pipeline_qwenimage, {}, {}),
        (diffusers.QwenImageLayeredPipeline, pipeline_qwenimage_layered, LAYERED, {"num_frames": 3}),
    ):
        folder = tmp_path / module.__name__
        folder.mkdir()
        pipe = build(kind, folder / "model", **options)
        model = load(folder / "model")
        images = pictures[:1] if more else ()
        request = _request(model, images, height=HEIGHT, width=WIDTH, **more)
        prepared = pipeline.condition(model, request).stages[0].inputs
        table = pipeline.solver_table(model.blueprint, request)
        [drawn], _ = noise.latents(7, [prepared.latents[0].size], table)
        known = [None, 1, Z, HEIGHT, WIDTH, 3] if more else [1, Z, HEIGHT, WIDTH]
        made = pipe.prepare_latents(
            *known, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(7)
        )
        assert torch.equal(prepared.pack([drawn]), made[0] if more else made)


# --- admission ---

NAMES = [f"Qwen/Qwen-Image{tail}" for tail in ("", "-2512", "-Edit", "-Edit-2509", "-Edit-2511", "-Layered")]


def _read(name, folder):
    return blueprint.read(ModelOptions(model_path=str(released(name, folder))))


@pytest.mark.parametrize("name", NAMES)
def test_released_configs_are_read_and_known_by_their_shape(name, tmp_path):
    made = _read(name, tmp_path)
    assert made.row.name == name and made.named
    assert ("vision" in made.nets) == ("Edit" in name or "Layered" in name)
    assert made.nets["text_encoder"].config.lm_head == ("Layered" in name)
    assert made.nets["text_encoder"].config.layers == 28
    assert sum(row.numel for row in qwen_image.spec(made.nets["transformer"].config)) == made.row.params
    (tmp_path / name).rename(tmp_path / "mine")
    found = blueprint.read(ModelOptions(model_path=str(tmp_path / "mine"))).row
    assert found.name == name.removesuffix("-2512") and found.image_use == made.row.image_use


def test_sizes_are_those_of_the_reference():
    for area in (1024 * 1024, 640 * 640, 384 * 384):
        for height, width in [(1024, 1024), (1080, 1920), (333, 1000), (2000, 300), (7, 9), (4032, 3024)]:
            wide, tall = pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
            assert fit_area(area, height, width) == (tall, wide)
    with pytest.raises(UserError, match="20000x1 pixels, too long"):
        fit_area(384 * 384, 1, 20000)  # a side that the reference rounds to nothing


def test_the_inputs_and_outputs_of_an_edit(tmp_path, pictures):
    plan = _read("Qwen/Qwen-Image-Edit-2511", tmp_path)
    made = _request_of(plan, pictures)
    assert (made.output.height, made.output.width) == fit_area(1024 * 1024, 32, 32)  # the last one's aspect
    made = _request_of(plan, pictures[:2], width=512)
    assert (made.output.height, made.output.width) == (fit_area(1024 * 1024, 80, 40)[0], 512)
    assert [image.shape for image in made.images.originals] == [
        (40, 56, 3),
        (80, 40, 3),
    ] and made.images.resized == ()
    _refused(
        "image_path",
        "4 images are given; Qwen/Qwen-Image-Edit-2511 takes at most 3",
        plan,
        [*pictures, pictures[0]],
    )
    _refused("image_path", "edits an image; give one", plan, [])
    _refused("image_path", "2 images are given", _read("Qwen/Qwen-Image-Edit", tmp_path), pictures[:2])
    _refused("num_frames", "5 would be a video", _read("Qwen/Qwen-Image", tmp_path), [], num_frames=5)


def test_what_layers_are_made_of(tmp_path, pictures):
    plan = _read("Qwen/Qwen-Image-Layered", tmp_path)
    made = _request_of(plan, pictures[:1], prompt=())
    assert (made.output.layers, made.output.num_frames, made.text.prompt, made.text.negative_prompt) == (
        4,
        1,
        "",
        " ",
    )
    assert (made.output.height, made.output.width) == fit_area(640 * 640, 40, 56)
    assert np.array_equal(made.images.originals[0], np.asarray(Image.open(pictures[0])))
    assert _request_of(plan, pictures[:1], num_frames=7).output.layers == 7
    with pytest.raises(UserError, match="prompt: is missing"):
        cli._check_without_torch(config.parse(["--model-path", "Qwen/Qwen-Image-Edit", "--no-save-output"]))
    cli._check_without_torch(config.parse(["--model-path", "Qwen/Qwen-Image-Layered", "--no-save-output"]))


def test_one_step_is_not_stretched(tmp_path):
    plan = _read("Qwen/Qwen-Image", tmp_path)
    table = pipeline.solver_table(plan, _request_of(plan, [], num_inference_steps=1))
    assert table.sigmas.tolist() == [1.0] and table.c.tolist() == [-1.0]


def test_an_autoencoder_that_does_not_fit(tmp_path):
    path = released("Qwen/Qwen-Image-Layered", tmp_path)
    edit(path / "vae" / "config.json", input_channels=3)
    with pytest.raises(
        UserError, match="use_layer3d_rope is True, and a vae with 3 channels of pixels needs False"
    ):
        blueprint.read(ModelOptions(model_path=str(path)))
    edit(path / "vae" / "config.json", z_dim=48)
    with pytest.raises(UserError, match="in_channels is 64, and the vae's latents need 192"):
        blueprint.read(ModelOptions(model_path=str(path)))


def _request_of(plan, images, **fields):
    [made] = admit(
        plan, SamplingOptions(**{"prompt": ("a fox",), "image_path": tuple(map(str, images))} | fields)
    )
    return made


def _refused(field, words, plan, images, **fields):
    with pytest.raises(UserError, match=words) as caught:
        _request_of(plan, images, **fields)
    assert caught.value.field == field


# --- whole runs ---


def test_a_long_text_is_cut_and_said_so(tmp_path, caplog):
    build(diffusers.QwenImagePipeline, tmp_path / "model")
    model = load(tmp_path / "model")
    request = _request(model, prompt=("x " * 700,), guidance_scale=1.0, height=32, width=32)
    with caplog.at_level(logging.WARNING):
        prepared = pipeline.condition(model, request).stages[0].inputs
    assert prepared.branches[0]["text"].shape == (1, 512, 32)
    assert "tokens were cut" in caplog.text


def test_an_image_token_in_a_prompt_is_refused(small, tmp_path, pictures):
    build(diffusers.QwenImageEditPipeline, tmp_path / "model")
    model = load(tmp_path / "model")
    request = _request(model, pictures[:1], prompt=("look <|image_pad|>",), height=HEIGHT, width=WIDTH)
    with pytest.raises(UserError, match=r"prompt: .*cannot be in a text"):
        pipeline.condition(model, request)
    thin = tmp_path / "thin.png"
    Image.new("RGB", (6000, 20)).save(thin)
    request = _request(model, [thin], height=HEIGHT, width=WIDTH)
    with pytest.raises(UserError, match=r"image_path: .*too long for this model"):
        pipeline.condition(model, request)


@pytest.mark.parametrize(
    ("name", "files"), [("a.png", ["a_0.png", "a_1.png", "a_2.png", "a_3.png"]), ("a/", ["a_0", "a_1"])]
)
def test_layers_as_files(name, files, tmp_path, pictures, capsys):
    """One file each, numbered on through the outputs; or a directory for each output."""
    build(diffusers.QwenImageLayeredPipeline, tmp_path / "model", **LAYERED)
    out = tmp_path / "out"
    words = [
        "--model-path",
        tmp_path / "model",
        "--image-path",
        pictures[0],
        "--num-frames",
        2,
        "--num-outputs-per-prompt",
        2,
    ]
    words += [
        "--prompt",
        "a",
        "--height",
        HEIGHT,
        "--width",
        WIDTH,
        "--num-inference-steps",
        1,
        "--output-path",
        out,
    ]
    assert cli.main(["generate", *map(str, words), "--output-file-name", "a.jpg"]) == 2
    assert (
        "'a.jpg': layers have alpha, so they may be .png, .webp or a name ending in /"
        in capsys.readouterr().err
    )
    assert cli.main(["generate", *map(str, words), "--output-file-name", name]) == 0
    assert sorted(path.name for path in out.iterdir()) == files
    seeds = [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()[: len(files)]]
    assert seeds == ["seed 42"] * (len(files) // 2) + ["seed 43"] * (len(files) // 2)
    last = out / files[-1] if name == "a.png" else out / "a_1" / "00001.png"
    with Image.open(last) as layer:
        assert (layer.mode, layer.size) == ("RGBA", (WIDTH, HEIGHT))
        assert np.asarray(layer).std() > 1
    told = read_parameters(last)
    assert (told["seed"], told["layers"], told["given_images"]) == (43, 2, 1)
    assert told.get("layer") == (1 if name == "a.png" else None)
