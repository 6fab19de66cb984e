"""Every variant of Wan against diffusers' own pipeline: the latents after every step and the frames, from the
same start, in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.parity import close, draw
from tests.runtime import compare
from tests.runtime.compare import exact, ours, same_frames
from tests.runtime.folders import VARIANTS, build, load
from tinydiff.config import SamplingOptions
from tinydiff.runtime.admit import admit
from tinydiff.sampling.noise import noise

PROMPT, NEGATIVE, STEPS, FRAMES = "A red  circle &amp; a star", "blurry, left of", 4, 9
GUIDED = {"guidance_scale": 4.0}
CASES = {
    "T2V": ("T2V", 0, GUIDED),
    "T2V, an image": ("T2V", 0, GUIDED | {"num_frames": 1}),
    "T2V without guidance": ("T2V", 0, {"guidance_scale": 1.0}),
    "T2V with two experts": ("T2V with two experts", 0, GUIDED | {"guidance_scale_2": 2.5}),
    "the second expert below one": ("T2V with two experts", 0, GUIDED | {"guidance_scale_2": 0.4}),
    "the first expert at one": ("T2V with two experts", 0, {"guidance_scale": 1.0, "guidance_scale_2": 3.0}),
    "I2V with CLIP": ("I2V with CLIP", 1, GUIDED),
    "I2V with two experts": ("I2V with two experts", 1, GUIDED | {"guidance_scale_2": 2.5}),
    "I2V with two experts, first and last frame": ("I2V with two experts", 2, GUIDED),
    "first and last frame with CLIP": ("first and last frame with CLIP", 2, GUIDED),
    "TI2V": ("TI2V", 0, GUIDED),
    "TI2V from an image": ("TI2V from an image", 1, GUIDED),
}


@pytest.fixture
def pictures(tmp_path):
    """Two images of noise, of a size that is none of the model's, as files."""
    paths = [tmp_path / f"{name}.png" for name in ("first", "last")]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def request_for(model, pictures, fields):
    """An admitted request at a size that is not square."""
    stride = model.blueprint.nets["vae"].config.scale_factor_spatial
    asked = {
        "prompt": (PROMPT,),
        "negative_prompt": NEGATIVE,
        "num_frames": FRAMES,
        "image_path": tuple(pictures),
    }
    [request] = admit(
        model.blueprint, SamplingOptions(**asked | {"height": 4 * stride, "width": 6 * stride} | fields)
    )
    return request


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_frames_equal_diffusers(case, tmp_path, pictures):
    name, count, fields = CASES[case]
    variant = VARIANTS[name]
    pipe = build(variant, tmp_path / "model")
    model = load(tmp_path / "model")
    request = request_for(model, pictures[:count], fields | {"num_inference_steps": STEPS})
    size = ((request.output.num_frames - 1) // 4 + 1, 4, 6)
    start = draw(1, 4, *size, seed=9)

    theirs = []
    given = {
        **{
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "guidance_scale": fields["guidance_scale"],
            "latents": start,
        },
        **{
            "height": request.output.height,
            "width": request.output.width,
            "num_frames": request.output.num_frames,
            "num_inference_steps": STEPS,
        },
    }
    if variant.boundary_ratio is not None:
        given["guidance_scale_2"] = fields.get("guidance_scale_2")
    for field, picture in zip(("image", "last_image"), pictures[:count], strict=False):
        given[field] = Image.open(picture)
    with exact(pipe):
        # The callback hands over the latents before a given frame is put back into them, which the pipeline
        # does once, at the end.
        video = pipe(
            **given, callback_on_step_end=lambda pipe, i, t, kept: theirs.append(kept["latents"]) or {}
        ).frames
        final = pipe(**given, output_type="latent").frames

    latents, frames = ours(model, request, start)
    assert len(latents) == len(theirs) == STEPS
    if variant.expand_timesteps and count:
        theirs = [torch.cat([final[:, :, :1], x[:, :, 1:]], 2) for x in theirs]
    for got, expected in zip(latents, [*theirs[:-1], final], strict=True):
        close(got, expected)
    same_frames(frames, video)


def distilled(pipe, start, times, shift, text, fresh, frame=None):
    """FastVideo's loop (its DmdDenoisingStage): jump to the clean latents, renoise to the next timestep;
    sigmas by nearest timestep.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigma = {t: scheduler.sigmas[(scheduler.timesteps.double() - t).abs().argmin()].double() for t in times}
    x, steps = start, []
    for i, t in enumerate(times):
        seen, shown = x, torch.tensor([t])
        if frame is not None:  # the given frame is clean, at timestep 0
            seen = torch.cat([frame, x[:, :, 1:]], 2)
            moving = torch.ones(1, *x.shape[2:], dtype=torch.float32)
            moving[:, 0] = 0
            shown = (moving[:, :, ::2, ::2] * t).flatten(1)
        x = seen - sigma[t] * pipe.transformer(seen, shown, text).sample
        if i + 1 < len(times):
            x = (1 - sigma[times[i + 1]]) * x + sigma[times[i + 1]] * fresh[i]
        steps.append(x if frame is None else torch.cat([frame, x[:, :, 1:]], 2))
    return steps


@pytest.mark.parametrize("name", ["DMD", "DMD TI2V"])
def test_a_distilled_model_follows_fastvideo(name, tmp_path, pictures):
    pipe = build(VARIANTS[name], tmp_path / "model")
    model = load(tmp_path / "model")
    first = pictures[: int(name == "DMD TI2V")]
    request = request_for(model, first, {"flow_shift": 8.0, "dmd_denoising_steps": (1000, 757, 522)})
    assert not request.guidance.on
    start = draw(1, 4, 3, 4, 6, seed=9)
    fresh = noise(0, 0, (1, 4, 3, 4, 6), 3)[1:].double()
    with exact(pipe):
        text, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
        frame = None
        if first:
            picture = pipe.video_processor.preprocess(
                Image.open(first[0]), height=request.output.height, width=request.output.width
            )
            _, frame, _ = pipe.prepare_latents(
                picture,
                1,
                4,
                request.output.height,
                request.output.width,
                FRAMES,
                torch.float32,
                latents=start,
            )
        theirs = distilled(pipe, start, (1000, 757, 522), 8.0, text, fresh, frame)
    latents, frames = ours(model, request, start)
    compare.same_steps(latents, theirs)
    assert frames.shape == (FRAMES, request.output.height, request.output.width, 3)
