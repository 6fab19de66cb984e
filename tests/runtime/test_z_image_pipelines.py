"""Z-Image against diffusers' own pipelines: the latents after every step and the image, from the same
start, in float64.

An image to start from is coded as the middle of its distribution, not as a sample of it; the other roundings
are in `compare`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image import pipeline_z_image, pipeline_z_image_img2img, pipeline_z_image_inpaint
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests import vocabularies
from tests.parity import close, draw
from tests.runtime import compare
from tests.runtime.compare import ours, recorded, same_frames, starting_from, widened
from tests.runtime.folders import edit, load, released, saved
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.models.registry import named
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.pipeline import Conditioning
from tinydiff.sampling.noise import noise

PROMPT, NEGATIVE, STEPS, Z, STRIDE = "A red circle {and} a star 日本", "blurry, left of", 4, 4, 2
SIZE = (12, 20)  # 15 tokens and 17 pads
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% "
    "endif %}{% endif %}"
)
"""What Qwen3's own template makes of turns without a system prompt, tools or earlier answers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("z_image")


def build(folder, **scheduler):
    """The reference's pipeline, saved to `directory`."""
    (folder / "words").mkdir(parents=True)
    tokenizer = Qwen2Tokenizer.from_pretrained(vocabularies.qwen(folder / "words", chat_template=CHAT))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=28, num_hidden_layers=3, **heads
    )
    levels = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    blocks = {"n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    networks = {
        "transformer": ZImageTransformer2DModel(
            in_channels=Z, dim=32, **blocks, cap_feat_dim=20, axes_dims=[4, 6, 6]
        ),
        "vae": AutoencoderKL(**levels, **vae, latent_channels=Z, norm_num_groups=4),
        "text_encoder": Qwen3Model(text),
    }
    return saved(
        ZImagePipeline,
        folder,
        networks,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 6.0} | scheduler),
    )


@pytest.fixture(scope="module")
def pipe(folder):
    return build(folder)


@pytest.fixture(scope="module")
def model(pipe, folder):
    return load(folder)


@pytest.fixture
def picture(tmp_path):
    """An image of noise, of the request's size, and a mask of it, as files."""
    random = np.random.default_rng(0)
    mask = np.zeros(SIZE, np.uint8)
    mask[2:7, 5:16] = 255
    for name, pixels in (("picture", random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


request_for = partial(
    compare.request_for,
    prompt=PROMPT,
    negative_prompt=NEGATIVE,
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=STEPS,
)


def start_for(request):
    return draw(1, Z, 1, request.output.height // STRIDE, request.output.width // STRIDE, seed=9)


def same(made, expected):
    """Our (latents, frames) and the reference's."""
    (latents, frames), (theirs, images) = made, expected
    for got, want in zip(latents, theirs, strict=True):
        close(got[:, :, 0], want)
    same_frames(frames, [images])


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 4.0},
        {"guidance_scale": 0.5, "negative_prompt": ""},
        {"guidance_scale": 0.0},
        {"guidance_scale": 4.0, "cfg_normalization": 0.9},
        {"guidance_scale": 4.0, "cfg_normalization": 50.0},
        {"guidance_scale": 2.0, "height": 32, "width": 16},  # 32 tokens, no pads
        {"guidance_scale": 2.0, "prompt": ("a red circle " * 120,)},  # the end of the template is cut too
    ],
    ids=[
        "guided",
        "hardly guided",
        "not guided",
        "clamped",
        "clamped too high to matter",
        "no pads",
        "a long prompt",
    ],
)
def test_text_to_image_equals_diffusers(fields, pipe, model, monkeypatch, caplog):
    request = request_for(model, **fields)
    start = start_for(request)
    widened(monkeypatch, pipeline_z_image)
    theirs = recorded(
        pipe, prompt=request.text.prompt, negative_prompt=request.text.negative_prompt,
        guidance_scale=fields["guidance_scale"],
        height=request.output.height, width=request.output.width, num_inference_steps=STEPS, latents=start[:,
        :, 0],
        cfg_normalization=fields.get("cfg_normalization", False),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "tinydiff"):
        made = ours(model, request, start)
    same(made, theirs)
    assert len(theirs[0]) == STEPS and request.guidance.on == (fields["guidance_scale"] > 0)
    assert ("tokens were cut, the model reads 512" in caplog.text) == ("prompt" in fields)


@pytest.mark.parametrize(
    "stored", [{}, {"base_shift": 0.3, "max_shift": 0.9, "base_image_seq_len": 4, "max_image_seq_len": 64}]
)
def test_a_scheduler_that_asks_for_a_dynamic_shift_gets_the_pipelines(stored, tmp_path, monkeypatch):
    pipe = build(tmp_path / "model", use_dynamic_shifting=True, **stored)
    model = load(tmp_path / "model")
    request = request_for(model, guidance_scale=4.0)
    start = start_for(request)
    widened(monkeypatch, pipeline_z_image)
    theirs = recorded(
        pipe, prompt=request.text.prompt, negative_prompt=request.text.negative_prompt, guidance_scale=4.0,
        height=request.output.height,
        width=request.output.width, num_inference_steps=STEPS, latents=start[:, :, 0],
    )  # fmt: skip
    same(ours(model, request, start), theirs)


def test_points_of_a_dynamic_shift_that_are_null_are_one_sentence(tmp_path):
    """The reference's pipeline ends in a TypeError of None and a number."""
    build(tmp_path / "model", use_dynamic_shifting=True)
    edit(tmp_path / "model" / "scheduler" / "scheduler_config.json", base_shift=None)
    with pytest.raises(UserError, match="scheduler: base_shift is None; it must be a number"):
        request_for(load(tmp_path / "model"))
    edit(tmp_path / "model" / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False)
    assert request_for(load(tmp_path / "model")).schedule.steps == STEPS


@pytest.mark.parametrize("guidance", [4.0, 0.0])
def test_image_to_image_equals_diffusers(guidance, pipe, model, picture, monkeypatch):
    path = picture / "picture.png"
    request = request_for(model, guidance_scale=guidance, image_path=(str(path),), strength=0.6)
    start = start_for(request)
    widened(monkeypatch, pipeline_z_image_img2img)
    starting_from(monkeypatch, pipeline_z_image_img2img, start[:, :, 0])
    theirs = recorded(
        ZImageImg2ImgPipeline(**pipe.components), prompt=PROMPT, negative_prompt=NEGATIVE,
        guidance_scale=guidance,
        image=Image.open(path), strength=0.6, num_inference_steps=STEPS,
    )  # fmt: skip
    same(ours(model, request, start), theirs)
    assert len(theirs[0]) == 3


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_equals_diffusers(strength, pipe, model, picture, monkeypatch):
    paths = picture / "picture.png", picture / "mask.png"
    request = request_for(
        model, guidance_scale=4.0, image_path=(str(paths[0]),), mask_path=str(paths[1]), strength=strength
    )
    start = start_for(request)
    widened(monkeypatch, pipeline_z_image_inpaint)
    starting_from(monkeypatch, pipeline_z_image_inpaint, start[:, :, 0])
    theirs = recorded(
        ZImageInpaintPipeline(**pipe.components), prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0,
        strength=strength,
        image=Image.open(paths[0]), mask_image=Image.open(paths[1]), num_inference_steps=STEPS,
    )  # fmt: skip
    same(ours(model, request, start), theirs)
    assert len(theirs[0]) == STEPS * strength


def test_the_noise_of_a_seed_is_the_references(pipe):
    theirs = pipe.prepare_latents(1, Z, *SIZE, torch.float32, "cpu", torch.Generator().manual_seed(7))
    assert torch.equal(noise(7, 0, (1, Z, 1, SIZE[0] // STRIDE, SIZE[1] // STRIDE))[0][:, :, 0], theirs)


@pytest.mark.parametrize("steps", [8, 50])
def test_the_schedule_is_the_references_to_the_last_digits(steps, model):
    """The reference spaces its grid in float32, one rounding more; in a timestep it may be two of the last
    digit.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=pipeline_z_image.get_default_z_image_sigmas(steps))
    rows = pipeline.solver_table(model.blueprint, request_for(model, num_inference_steps=steps))
    assert (rows.sigmas - scheduler.sigmas[:-1]).abs().max() <= 2**-23
    assert (rows.timesteps - scheduler.timesteps).abs().max() <= 2**-13


def test_what_the_pads_hold_is_never_read(model):
    """The latents of an image are the same whatever stands behind its tokens."""
    request = request_for(model, guidance_scale=4.0)
    conditioning = pipeline.condition(model, request)
    [prepared] = conditioning.stages
    [kind] = prepared.inputs.latents
    noisy = replace(kind, pack=lambda x: torch.cat([kind.pack(x)[:, :15], draw(1, 17, 16, seed=3)], 1))
    plain, other = (
        list(pipeline.denoise(model, Conditioning((changed(prepared, each),)), 0, [start_for(request)]))
        for each in (kind, noisy)
    )
    assert plain[-1].shape[1] == 32 and not torch.equal(plain[-1], other[-1])
    assert torch.equal(kind.unpack(plain[-1]), kind.unpack(other[-1]))


def changed(prepared, kind):
    """A stage with other latents."""
    stage = prepared.stage
    return prepared._replace(stage=replace(stage, inputs=replace(stage.inputs, latents=(kind,))))


def test_the_record_says_the_scale_that_was_asked_for(pipe, folder):
    model = blueprint.load(blueprint.read(ModelOptions(model_path=str(folder))))
    asked = request_for(model, guidance_scale=4.0)
    assert asked.guidance.scale == 5.0 and pipeline.parameters(model, asked)["guidance_scale"] == 4.0
    off = pipeline.parameters(model, request_for(model, guidance_scale=0.0))
    assert off["guidance_scale"] == 0.0 and "negative_prompt" not in off


@pytest.mark.parametrize(
    ("name", "steps", "guided", "shift"), [("Z-Image", 50, True, 6.0), ("Z-Image-Turbo", 8, False, 3.0)]
)
def test_the_released_models_defaults(name, steps, guided, shift, tmp_path):
    path = released(f"Tongyi-MAI/{name}", tmp_path)
    plan = blueprint.read(ModelOptions(model_path=str(path)))
    [request] = admit(plan, SamplingOptions(prompt=("a fox",)))
    rows = pipeline.solver_table(plan, request)
    assert plan.row is named(f"Tongyi-MAI/{name}") and plan.nets["text_encoder"].config.layers == 35
    assert (rows.steps, request.guidance.on, (request.output.height, request.output.width)) == (
        steps,
        guided,
        (1024, 1024),
    )
    x = 1 - 1 / steps
    assert rows.sigmas[:2].tolist() == pytest.approx([1.0, shift * x / (1 + (shift - 1) * x)], abs=1e-7)
    with pytest.raises(
        UserError, match="width: 8208 is more than 8192 pixels, the longest side that Tongyi-MAI"
    ):
        admit(plan, SamplingOptions(prompt=("a fox",), width=8208))


@pytest.mark.parametrize(
    ("component", "field", "words"),
    [
        (
            "text_encoder",
            {"hidden_size": 24},
            "the transformer's cap_feat_dim is 20, and the text encoder gives 24",
        ),
        ("vae", {"latent_channels": 8}, "the transformer's in_channels is 4, and the vae's latents need 8"),
    ],
)
def test_components_that_do_not_fit_are_refused(component, field, words, pipe, folder, tmp_path):
    for part in folder.glob("*"):
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / component).unlink()
    (tmp_path / component).mkdir()
    config = tmp_path / component / "config.json"
    config.write_text((folder / component / "config.json").read_text())
    edit(config, **field)
    with pytest.raises(UserError, match=words):
        blueprint.read(ModelOptions(model_path=str(tmp_path)))
