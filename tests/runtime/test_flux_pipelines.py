"""FLUX.1 against diffusers' own pipelines: from text, from images to edit, from an image to start from,
and inpainting.

Latents after every step and the last pixels, from the same start, in float64. Starting from an image is the
shared floor's, and proved here for every family.
"""

from __future__ import annotations

import logging
from functools import partial

import diffusers.pipelines.flux.pipeline_flux_img2img as img2img
import diffusers.pipelines.flux.pipeline_flux_inpaint as inpaint
import diffusers.pipelines.flux.pipeline_flux_kontext as kontext
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests import vocabularies
from tests.io import profiles
from tests.parity import close, draw
from tests.runtime import compare
from tests.runtime.compare import ours, recorded, same_frames, starting_from
from tests.runtime.folders import load, saved
from tests.sources import PACKAGE
from tinydiff.config import ModelOptions
from tinydiff.io.images import read_image
from tinydiff.models import flux
from tinydiff.ops.patch import patchify
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.sampling import noise

PROMPT, NEGATIVE, STEPS = "A red  circle &amp; a star", "blurry, left of", 4
HEIGHT, WIDTH = 12, 20  # latents of 6 x 10, tokens of 3 x 5
TRANSFORMER = {
    **{
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    },
    **{"joint_attention_dim": 20, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)},
}
VAE = {
    **{
        "block_out_channels": (4, 8),
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    **{"use_quant_conv": False, "use_post_quant_conv": False},
}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
TRUE_CFG = {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}
LONG = {"prompt": "a large red circle on a white background " * 60}


def build(folder, kind=FluxPipeline, guided=True):
    """The reference's pipeline in float64, saved in float32 to `directory`; guided: of dev, which embeds its
    guidance, else of schnell.
    """
    folder.mkdir()
    clip = {
        "vocab_size": 914,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    large = {
        "vocab_size": 142,
        "d_model": 20,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    networks = {
        "transformer": FluxTransformer2DModel(**TRANSFORMER, guidance_embeds=guided),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**clip, bos_token_id=0, eos_token_id=2, pad_token_id=1)),
        "text_encoder_2": T5EncoderModel(T5Config(**large)),
    }
    files = {
        "tokenizer": CLIPTokenizer.from_pretrained(vocabularies.clip(folder, model_max_length=77)),
        "tokenizer_2": T5TokenizerFast.from_pretrained(PACKAGE / "shapes" / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC if guided else {"shift": 1.0}),
    }
    pipe = saved(kind, folder, networks, **files)
    # diffusers embeds time in float32 whatever comes; `doubles` would widen that, were it not float32 before.
    embed = networks["transformer"].time_text_embed.time_proj
    embed.register_forward_pre_hook(lambda _, args: (torch.tensor(args[0].tolist(), dtype=torch.float32),))
    return pipe


def other(kind, pipe):
    """The same components in another of the reference's pipelines."""
    pipe = kind(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


request_for = partial(
    compare.request_for, prompt=PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS
)


def same(model, request, start, theirs, images):
    """tinydiff's latents after every step and its pixels are the reference's."""
    latents, frames = ours(model, request, start)
    assert len(latents) == len(theirs)
    for got, expected in zip(latents, theirs, strict=True):
        close(patchify(got, flux.PATCH), expected)
    same_frames(frames, images[None])


@pytest.fixture
def pictures(tmp_path):
    """Two images of noise, of different sizes that are none of the model's, as files."""
    paths = [tmp_path / f"{name}.png" for name in ("first", "second")]
    for seed, (path, size) in enumerate(zip(paths, [(40, 56, 3), (57, 30, 3)], strict=True)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def mask(tmp_path):
    """A grey ramp with a hole, of the first image's size, as a file."""
    y, x = np.mgrid[:40, :56]
    Image.fromarray(np.where((x - 20) ** 2 + (y - 12) ** 2 < 60, 0, x * 4).astype(np.uint8)).save(
        tmp_path / "mask.png"
    )
    return str(tmp_path / "mask.png")


# --- from text ---


@pytest.mark.parametrize(
    ("guided", "fields"),
    [
        (True, {"guidance_scale": 3.5}),
        (True, {"guidance_scale": 2.0} | TRUE_CFG),
        (True, {"true_cfg_scale": 2.6}),
        (True, {"true_cfg_scale": 2.6, "negative_prompt": ""}),
        (False, {}),
        (False, TRUE_CFG),
        (False, {"guidance_scale": 3.0, "negative_prompt": NEGATIVE}),
        (False, LONG),
    ],
    ids=[
        "dev", "dev with true CFG", "dev without a negative prompt", "dev with an empty one", "schnell",
        "schnell with true CFG",
        "schnell is told no guidance", "schnell, more text than both encoders read",
    ],
)  # fmt: skip
def test_every_step_and_the_pixels_equal_diffusers(guided, fields, tmp_path):
    pipe = build(tmp_path / "model", guided=guided)
    model = load(tmp_path / "model")
    assert model.blueprint.row.name.endswith("dev" if guided else "schnell")
    request = request_for(model, **fields)
    assert request.guidance.embedded == (fields.get("guidance_scale", 3.5) if guided else None)
    assert request.guidance.on == ({"true_cfg_scale", "negative_prompt"} <= fields.keys())
    start = draw(1, 4, 1, 6, 10, seed=9)
    given = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **fields}
    length = {"max_sequence_length": 512 if guided else 256}
    theirs, images = recorded(pipe, **given, **length, latents=patchify(start, flux.PATCH))
    same(model, request, start, theirs, images)


def test_what_is_cut_of_a_long_text_is_said(tmp_path, caplog):
    build(tmp_path / "model", guided=False)
    model = load(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "tinydiff"):
        pipeline.condition(model, request_for(model, **LONG))
    lengths = [len(tokenizer.encode(LONG["prompt"]).ids) for tokenizer in model.tokenizers.values()]
    assert caplog.messages == [
        f"prompt: the last {length - read} of its tokens were cut, the model reads {read}"
        for length, read in zip(lengths, (77, 256), strict=True)
    ]


def test_noise_is_what_the_reference_draws(tmp_path):
    pipe = build(tmp_path / "model")
    drawn, ids = pipe.prepare_latents(
        1, 4, HEIGHT, WIDTH, torch.float32, "cpu", torch.Generator().manual_seed(5)
    )
    [made] = noise.noise(5, 0, (1, 4, 1, 6, 10))
    assert torch.equal(patchify(made, flux.PATCH), drawn) and torch.equal(
        flux.positions((1, 6, 10)), ids.long()
    )


# --- images to edit ---


@pytest.fixture
def small_sizes(monkeypatch):
    """Kontext's sizes are of a million pixels; here they are of some hundred."""
    sizes = ((8, 24), (12, 20), (16, 16), (20, 12), (24, 8))
    monkeypatch.setattr(flux, "KONTEXT_SIZES", sizes)
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", list(sizes))


def several(pipe, paths):
    """Kontext's pipeline takes one image. More of them, as tinydiff's extension has it: their tokens in
    order, numbered 1, 2, ...
    """
    prepare_latents = pipe.prepare_latents

    def prepared(image, *args):
        made, tokens, ids, at = prepare_latents(image, *args)
        for number, path in enumerate(paths[1:], 2):
            picture = Image.open(path)
            height, width = flux.reference_size(picture.height, picture.width, 4)
            _, more, _, there = prepare_latents(
                pipe.image_processor.preprocess(picture, height, width), *args
            )
            there[:, 0] = number
            tokens, at = torch.cat([tokens, more], 1), torch.cat([at, there])
        return made, tokens, ids, at

    pipe.prepare_latents = prepared


@pytest.mark.parametrize(
    ("count", "fields"),
    [(1, {}), (2, {"guidance_scale": 2.0}), (1, TRUE_CFG)],
    ids=["one", "two", "true CFG"],
)
def test_editing_equals_diffusers(count, fields, tmp_path, pictures, small_sizes):
    pipe = build(tmp_path / "model", FluxKontextPipeline)
    model = load(tmp_path / "model")
    request = request_for(model, image_path=tuple(pictures[:count]), **fields)
    assert len(request.images.originals) == count and not request.images.resized
    several(pipe, pictures[:count])
    start = draw(1, 4, 1, 6, 10, seed=9)
    given = {
        "image": Image.open(pictures[0]),
        "prompt": PROMPT,
        "guidance_scale": 2.5,
        "num_inference_steps": STEPS,
        **fields,
    }
    size = {"height": HEIGHT, "width": WIDTH, "max_area": HEIGHT * WIDTH}
    theirs, images = recorded(pipe, **given, **size, latents=patchify(start, flux.PATCH))
    same(model, request, start, theirs, images)


def test_an_image_to_edit_is_brought_to_the_size_that_the_reference_prefers():
    assert sorted(flux.KONTEXT_SIZES) == sorted(kontext.PREFERRED_KONTEXT_RESOLUTIONS)
    sizes = np.random.default_rng(0).integers(16, 3000, (300, 2)).tolist()
    for height, width in sizes:
        aspect = (width - width % 16) / (height - height % 16)
        _, w, h = min((abs(aspect - w / h), w, h) for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS)
        assert flux.reference_size(height, width) == (h, w)
    assert flux.reference_size(1, 1) == (1024, 1024)
    assert len({flux.reference_size(*size) for size in sizes}) == len(flux.KONTEXT_SIZES)


# --- an image to start from ---


@pytest.mark.parametrize(
    ("strength", "fields"),
    [(0.6, {}), (0.3, TRUE_CFG), (1.0, {}), (0.05, {})],
    ids=["0.6", "0.3 with true CFG", "1", "0.05"],
)
def test_image_to_image_equals_diffusers(strength, fields, tmp_path, pictures, monkeypatch):
    pipe = other(FluxImg2ImgPipeline, build(tmp_path / "model"))
    model = load(tmp_path / "model")
    request = request_for(
        model, image_path=(pictures[0],), **fields | ({} if strength == 0.6 else {"strength": strength})
    )
    start = draw(1, 4, 1, 6, 10, seed=9)
    starting_from(monkeypatch, img2img, start[:, :, 0])
    given = {
        "prompt": PROMPT,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        **fields,
    }
    theirs, images = recorded(pipe, **given, image=Image.open(pictures[0]), strength=strength)
    assert len(theirs) == {0.6: 3, 0.3: 2, 1.0: 4, 0.05: 1}[strength]
    same(model, request, start, theirs, images)


@pytest.mark.parametrize(("strength", "fields"), [(1.0, {}), (0.7, TRUE_CFG)], ids=["1", "0.7 with true CFG"])
def test_inpainting_equals_diffusers(strength, fields, tmp_path, pictures, mask, monkeypatch):
    pipe = other(FluxInpaintPipeline, build(tmp_path / "model"))
    model = load(tmp_path / "model")
    asked = fields | ({} if strength == 1 else {"strength": strength})
    request = request_for(model, image_path=(pictures[0],), mask_path=mask, **asked)
    assert set(np.unique(request.images.mask)) == {0, 255} and request.images.mask.shape == (HEIGHT, WIDTH)
    start = draw(1, 4, 1, 6, 10, seed=9)
    starting_from(monkeypatch, inpaint, start[:, :, 0])
    given = {
        "prompt": PROMPT,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        **fields,
    }
    theirs, images = recorded(
        pipe, **given, image=Image.open(pictures[0]), mask_image=Image.open(mask), strength=strength
    )
    same(model, request, start, theirs, images)


def test_what_the_mask_keeps_stays(tmp_path, pictures):
    """Of a whole run: the given pixels stay where no white is within twice the seam, the new ones are where
    it is white.
    """
    build(tmp_path / "model")
    model, side = blueprint.load(blueprint.read(ModelOptions(model_path=str(tmp_path / "model")))), 64
    pixels = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures[0], icc_profile=profiles.rgb(profiles.P3))
    given = read_image(pictures[0])
    white = np.zeros((side, side), np.uint8)
    white[:9, :13], white[60, 60] = 255, 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    request = request_for(
        model, height=side, width=side, image_path=(pictures[0],), mask_path=str(tmp_path / "mask.png")
    )
    steps = list(pipeline.denoise(model, (told := pipeline.condition(model, request)), request.seeds[0]))
    made = pipeline.decode(model, request.output, told.stages[0].inputs.latents[0].unpack(steps[-1]))[0]
    [[shown]] = pipeline.run(model, request, Silent()).frames
    y, x = np.nonzero(white)
    far = np.maximum(abs(np.arange(side)[:, None, None] - y), abs(np.arange(side)[None, :, None] - x)).min(-1)
    assert np.array_equal(shown[far == 0], made[far == 0])
    kept = far > 2 * pipeline.FEATHER
    assert np.array_equal(shown[kept], given[kept]) and kept.mean() > 0.2
    assert (given[kept] != pixels[kept]).mean() > 0.5  # converted from the profile that the file holds
    seam = (far > 0) & ~kept
    low, high = np.minimum(made, request.images.resized[0]), np.maximum(made, request.images.resized[0])
    assert (
        ((shown >= low) & (shown <= high))[seam].all()
        and (shown != made)[seam].any()
        and (shown != request.images.resized[0])[seam].any()
    )


class Silent:
    def on_stage(self, name):
        pass

    def on_step(self, done, total):
        pass


def test_components_that_do_not_fit(tmp_path):
    build(tmp_path / "model", guided=False)
    message = r"guidance_embeds is False, and the guidance of black-forest-labs/FLUX.1-dev needs True"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model", model_id="FLUX.1-dev")
