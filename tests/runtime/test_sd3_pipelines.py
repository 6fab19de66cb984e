"""Stable Diffusion 3 against diffusers' own pipelines: the latents after every step and the image, from the
same start, in float64.

An image to start from is coded as the middle of its distribution, not as a sample of it; the other roundings
are in `compare`.
"""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3 import (
    pipeline_stable_diffusion_3_img2img,
    pipeline_stable_diffusion_3_inpaint,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests import vocabularies
from tests.parity import close, draw
from tests.runtime import compare
from tests.runtime.compare import exact, ours, recorded, same_frames, starting_from
from tests.runtime.folders import edit, load, released, saved
from tests.sources import PACKAGE
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.models.registry import named
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.sampling.noise import noise

PROMPT, NEGATIVE, STEPS, Z, STRIDE, TOKENS = "A red circle & a star 日本", "blurry, left of", 4, 16, 2, 24
SIZE = (12, 20)
VARIANTS = {
    "3 medium": {},
    "3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
    "3.5 medium without T5": {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
}


def build(name, folder, **scheduler):
    """The reference's pipeline, saved to `directory`."""
    words = [folder / "words-l", folder / "words-g"]
    for path, pad in zip(words, ("<|endoftext|>", "!"), strict=True):
        path.mkdir(parents=True)
        vocabularies.clip(path, pad, model_max_length=TOKENS)
    tokenizers = [CLIPTokenizer.from_pretrained(path) for path in words]
    sizes = {
        "vocab_size": len(tokenizers[0]),
        "max_position_embeddings": TOKENS,
        "num_hidden_layers": 3,
        "eos_token_id": 2,
    }
    clips = [
        CLIPTextConfig(
            **sizes,
            hidden_size=8,
            intermediate_size=12,
            projection_dim=6,
            num_attention_heads=2,
            hidden_act="quick_gelu",
        ),
        CLIPTextConfig(
            **sizes,
            hidden_size=12,
            intermediate_size=20,
            projection_dim=5,
            num_attention_heads=3,
            hidden_act="gelu",
        ),
    ]
    t5 = T5Config(
        vocab_size=142, d_model=24, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    levels = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = {
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "num_layers": 3}
    widths = {"in_channels": Z, "out_channels": Z, "joint_attention_dim": 24, "pooled_projection_dim": 11}
    networks = {
        "transformer": SD3Transformer2DModel(
            sample_size=8, pos_embed_max_size=12, **heads, **widths, **VARIANTS[name]
        ),
        "vae": AutoencoderKL(**levels, **vae, latent_channels=Z, norm_num_groups=4),
        "text_encoder": CLIPTextModelWithProjection(clips[0]),
        "text_encoder_2": CLIPTextModelWithProjection(clips[1]),
    }
    others = {
        **{
            "tokenizer": tokenizers[0],
            "tokenizer_2": tokenizers[1],
            "tokenizer_3": None,
            "text_encoder_3": None,
        },
        "scheduler": FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
    }
    if name != "3.5 medium without T5":
        networks["text_encoder_3"] = T5EncoderModel(t5)
        others |= {"tokenizer_3": T5TokenizerFast.from_pretrained(PACKAGE / "shapes" / "tokenizer")}
        del others["text_encoder_3"]
    return saved(StableDiffusion3Pipeline, folder, networks, **others)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Variant -> (the reference's pipeline, the directory that holds it, tinydiff's model of that directory),
    made once.
    """
    made = {}

    def get(name="3.5 medium"):
        if name not in made:
            folder = tmp_path_factory.mktemp("sd3") / "model"
            pipe = build(name, folder)
            made[name] = pipe, folder, load(folder)
        return made[name]

    return get


@pytest.fixture
def picture(tmp_path):
    """An image of noise of another size than the request's, another of that size, and a mask of it, as
    files.
    """
    random = np.random.default_rng(0)
    mask = np.zeros(SIZE, np.uint8)
    mask[2:7, 5:16] = 255
    noisy = {
        name: random.integers(0, 256, (*size, 3), dtype=np.uint8)
        for name, size in (("large", (30, 42)), ("picture", SIZE))
    }
    for name, pixels in (noisy | {"mask": mask}).items():
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


def given(request):
    """The reference's arguments for a request."""
    return {
        "prompt": request.text.prompt,
        "negative_prompt": request.text.negative_prompt,
        "guidance_scale": request.guidance.scale,
        "height": request.output.height,
        "width": request.output.width,
        "num_inference_steps": request.schedule.steps,
    }


START = draw(1, Z, 1, SIZE[0] // STRIDE, SIZE[1] // STRIDE, seed=9)


def same_latents(latents, theirs):
    for got, want in zip(latents, theirs, strict=True):
        close(got[:, :, 0], want)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("3 medium", {"guidance_scale": 5.0}),
        ("3 medium", {"guidance_scale": 1.0}),
        ("3.5 medium", {"guidance_scale": 5.0}),
        ("3.5 medium", {"guidance_scale": 2.0, "negative_prompt": ""}),
        (
            "3.5 medium",
            {"guidance_scale": 2.0, "prompt": ("a red circle " * 120,)},
        ),  # longer than either text encoder reads
        ("3.5 medium without T5", {"guidance_scale": 5.0}),
    ],
    ids=["3", "3 not guided", "3.5", "3.5 guided from nothing", "3.5 a long prompt", "3.5 without T5"],
)
def test_text_to_image_equals_diffusers(name, fields, both, caplog):
    pipe, _, model = both(name)
    request = request_for(model, **fields)
    theirs, images = recorded(pipe, **given(request), latents=START[:, :, 0])
    with caplog.at_level(logging.WARNING, "tinydiff"):
        latents, frames = ours(model, request, START)
    same_latents(latents, theirs)
    same_frames(frames, [images])
    assert len(theirs) == STEPS and request.guidance.on == (fields["guidance_scale"] > 1)
    for length in (TOKENS, 256):
        assert (f"tokens were cut, the model reads {length}" in caplog.text) == ("prompt" in fields)


def test_a_scheduler_that_asks_for_a_dynamic_shift_gets_the_pipelines(tmp_path):
    pipe = build(
        "3.5 medium without T5",
        tmp_path / "model",
        use_dynamic_shifting=True,
        base_image_seq_len=4,
        max_image_seq_len=64,
    )
    model = load(tmp_path / "model")
    request = request_for(model, guidance_scale=5.0)
    theirs, images = recorded(pipe, **given(request), latents=START[:, :, 0])
    latents, frames = ours(model, request, START)
    same_latents(latents, theirs)
    same_frames(frames, [images])


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_image_to_image_equals_diffusers(guidance, both, picture, monkeypatch):
    pipe, _, model = both()
    request = request_for(
        model, guidance_scale=guidance, image_path=(str(picture / "large.png"),), strength=0.6
    )
    starting_from(monkeypatch, pipeline_stable_diffusion_3_img2img, START[:, :, 0])
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    theirs, images = recorded(other, **given(request), image=Image.open(picture / "large.png"), strength=0.6)
    latents, frames = ours(model, request, START)
    same_latents(latents, theirs)
    same_frames(frames, [images])
    assert len(theirs) == 3


@pytest.mark.parametrize(("strength", "guidance"), [(1.0, 5.0), (0.5, 5.0), (0.5, 1.0)])
def test_inpainting_equals_diffusers(strength, guidance, both, picture, monkeypatch):
    """But for the image at the end, where the reference forgets the autoencoder's shift."""
    pipe, _, model = both()
    paths = {"image": picture / "picture.png", "mask_image": picture / "mask.png"}
    request = request_for(
        model,
        guidance_scale=guidance,
        image_path=(str(paths["image"]),),
        mask_path=str(paths["mask_image"]),
        strength=strength,
    )
    starting_from(monkeypatch, pipeline_stable_diffusion_3_inpaint, START[:, :, 0])
    other = StableDiffusion3InpaintPipeline(**pipe.components)
    pictures = {name: Image.open(path) for name, path in paths.items()}
    theirs, images = recorded(other, **given(request), **pictures, strength=strength)
    latents, frames = ours(model, request, START)
    same_latents(latents, theirs)
    assert len(theirs) == STEPS * strength
    with exact(other):
        whole = pipe.vae.decode(theirs[-1] / 1.5305 + 0.0609).sample
    whole = other.image_processor.postprocess(whole, output_type="np")
    same_frames(frames, [whole])
    assert np.abs(whole - images).max() > 1e-3


def test_the_noise_of_a_seed_is_the_references(both):
    pipe, _, _ = both()
    theirs = pipe.prepare_latents(1, Z, *SIZE, torch.float32, "cpu", torch.Generator().manual_seed(7))
    assert torch.equal(noise(7, 0, START.shape)[0][:, :, 0], theirs)


@pytest.mark.parametrize("steps", [28, 40, 50])
def test_the_schedule_is_shifted_twice(steps, both):
    """Its grid ends at the lowest sigma of training, which is shifted, and is then shifted again."""
    _, _, model = both()
    rows = pipeline.solver_table(model.blueprint, request_for(model, num_inference_steps=steps))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    assert torch.equal(rows.sigmas, scheduler.sigmas[:-1].double()) and torch.equal(
        rows.timesteps, scheduler.timesteps.double()
    )
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert rows.sigmas[-1].item() == pytest.approx(3 * once / (1 + 2 * once), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "longest"),
    [
        ("stable-diffusion-3-medium-diffusers", 28, 7.0, 3072),
        ("stable-diffusion-3.5-medium", 40, 4.5, 6144),
        ("stable-diffusion-3.5-large", 28, 3.5, 3072),
    ],
)
def test_the_released_models_defaults(name, steps, guidance, longest, tmp_path):
    path = released(f"stabilityai/{name}", tmp_path)
    plan = blueprint.read(ModelOptions(model_path=str(path)))
    [request] = admit(plan, SamplingOptions(prompt=("a fox",)))
    assert plan.row is named(f"stabilityai/{name}")
    assert (request.schedule.steps, request.guidance.scale, request.text.max_tokens) == (
        steps,
        guidance,
        256,
    )
    assert (request.output.height, request.output.width, request.text.negative_prompt) == (1024, 1024, "")
    path.rename(tmp_path / "renamed")
    assert blueprint.read(ModelOptions(model_path=str(tmp_path / "renamed"))).row is plan.row
    assert admit(plan, SamplingOptions(prompt=("a fox",), height=longest))[0].output.height == longest
    with pytest.raises(UserError) as caught:
        admit(plan, SamplingOptions(prompt=("a fox",), height=longest + 16))
    sentence = (
        f"height: {longest + 16} is more than {longest} pixels, the longest side that "
        f"stabilityai/{name} has positions for"
    )
    assert (caught.value.field, str(caught.value)) == ("height", sentence)


@pytest.mark.parametrize(
    ("component", "fields", "words"),
    [
        (
            "text_encoder",
            {"projection_dim": 8},
            "the transformer's pooled_projection_dim is 11, and the two CLIPs give 13",
        ),
        (
            "text_encoder_3",
            {"d_model": 32},
            "the transformer's joint_attention_dim is 24, and text_encoder_3 gives 32",
        ),
        ("vae", {"latent_channels": 4}, "the transformer's in_channels is 16, and the vae's latents need 4"),
    ],
)
def test_components_that_do_not_fit_are_refused(component, fields, words, both, tmp_path):
    _, folder, _ = both()
    for part in folder.glob("*"):
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / component).unlink()
    (tmp_path / component).mkdir()
    config = tmp_path / component / "config.json"
    config.write_text((folder / component / "config.json").read_text())
    edit(config, **fields)
    with pytest.raises(UserError, match=words):
        blueprint.read(ModelOptions(model_path=str(tmp_path)))


def test_the_class_in_the_index_says_whether_a_clip_projects(both, tmp_path):
    _, folder, _ = both()
    for part in folder.glob("*"):
        (tmp_path / part.name).symlink_to(part)
    index = (folder / "model_index.json").read_text()
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(index)
    edit(tmp_path / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    with pytest.raises(
        UserError, match="the transformer's pooled_projection_dim is 11, and the two CLIPs give 6"
    ):
        blueprint.read(ModelOptions(model_path=str(tmp_path)))
