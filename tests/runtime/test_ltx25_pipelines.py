"""LTX-2.5 against diffusers' modular blocks: the latents of video and sound before and after every step, the
frames and the waveform, from the same start, in float64.

The blocks decode with the convolutional autoencoder, as they document it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.guiders import LTX2Guidance
from diffusers.modular_pipelines.ltx2 import before_denoise, decoders, denoise, encoders
from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2AutoDecoderStep
from diffusers.modular_pipelines.ltx2.modular_blocks_ltx25 import LTX25AutoBlocks
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image

from tests.parity import close
from tests.runtime import compare
from tests.runtime.compare import exact, same_frames, widened
from tests.runtime.folders import load
from tests.runtime.ltx2_folders import as_ever, build, copied
from tests.runtime.test_ltx2_pipelines import ours
from tinydiff.models import recipe, registry
from tinydiff.models.registry import DISTILLED_SIGMAS
from tinydiff.records import GuidanceTerms, UserError
from tinydiff.runtime import pipeline
from tinydiff.runtime.device import Device

PROMPT, TOKENS, SIZE, FRAMES, FPS = " A red circle and a star 日本 ", 16, (64, 96), 17, 24
ROW = replace(
    registry.named("Lightricks/LTX-2.5-Diffusers"), name="test/LTX-2.5", height=SIZE[0], width=SIZE[1],
    num_frames=FRAMES, text_tokens=TOKENS, shape={"ff_bias": False},
    terms=GuidanceTerms(spatio_temporal_guidance_blocks=(1,)),
)  # fmt: skip
request_for = partial(compare.request_for, prompt=PROMPT)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MODELS", (ROW, *registry.MODELS))
        folder = tmp_path_factory.mktemp("ltx25")
        pipe = build(folder, "LTX-2.5")
        yield modular(pipe), load(folder)


def modular(pipe):
    """The modular pipeline of the same components, without guidance."""
    blocks = LTX25AutoBlocks()
    blocks.sub_blocks["decode"] = LTX2AutoDecoderStep()
    made = blocks.init_pipeline()
    names = ("text_encoder", "tokenizer", "connectors", "duration_head", "vae", "transformer", "scheduler",
             "audio_vae", "vocoder")  # fmt: skip
    made.update_components(**{name: getattr(pipe, name) for name in names})
    made.update_components(guider=LTX2Guidance(), audio_guider=LTX2Guidance())
    return made


def reference(pipe, monkeypatch, start, **given):
    """(the tokens before each step, what the blocks make). start: as ours has it."""
    draws = {tuple(x.shape): x for kind, noise in start for x in (noise, kind.pack(noise))}
    for module in (before_denoise, denoise, encoders, decoders):
        widened(monkeypatch, module)
    monkeypatch.setattr(before_denoise, "copy", SimpleNamespace(deepcopy=copied))
    monkeypatch.setattr(before_denoise, "randn_tensor", lambda shape, **_: draws[tuple(shape)])
    seen = []

    def before(module, args, kwargs):
        seen.append(torch.cat([kwargs["hidden_states"], kwargs["audio_hidden_states"]], 1))

    hook = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    with exact(pipe):
        state = pipe(
            prompt=PROMPT, height=SIZE[0], width=SIZE[1], frame_rate=float(FPS), max_sequence_length=TOKENS,
            output_type="np", **given,
        )  # fmt: skip
    hook.remove()
    return seen, state


def same(made, tokens, seen, state):
    """The tokens of every step, the frames and the sound."""
    assert len(seen) == len(tokens)
    for x, theirs in zip(tokens[:-1], seen[1:], strict=True):
        close(x, theirs)
    same_frames(made.frames, state.get("videos"))
    heard = torch.as_tensor(np.asarray(state.get("audio")))[0].double()
    assert (torch.from_numpy(made.sound.samples).T.double() - heard).abs().max() < 1e-6 < heard.std()


def pictures(tmp_path, count):
    """So many images of noise, and their paths."""
    made = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        for i in range(count)
    ]
    for i, each in enumerate(made):
        each.save(tmp_path / f"{i}.png")
    return made, tuple(str(tmp_path / f"{i}.png") for i in range(count))


@pytest.mark.parametrize("case", ["text", "an image", "keyframes"])
def test_equals_the_blocks(both, monkeypatch, tmp_path, case):
    """By default eight steps at the sigmas that the weights are distilled for, without guidance."""
    pipe, model = both
    given, fields = {}, {}
    if case == "an image":
        [image], paths = pictures(tmp_path, 1)
        given, fields = {"image": image, "image_crf": 0}, {"image_path": paths}
    if case == "keyframes":  # number n of their latent frames begins at frame 8 n - 7
        images, paths = pictures(tmp_path, 3)
        places = zip(images, (0, 2, 1), strict=True)
        given = {"conditions": [LTX2VideoCondition(image, index, 1.0, crf=0) for image, index in places]}
        fields = {"image_path": paths, "image_frames": (0, 9, 1)}
        coords = before_denoise._prepare_keyframe_coords
        narrow = as_ever(lambda **given: coords(**given).float())  # as of the video
        monkeypatch.setattr(before_denoise, "_prepare_keyframe_coords", narrow)
    request = request_for(model, **fields)
    assert request.schedule.sigmas == DISTILLED_SIGMAS and request.schedule.steps == 8
    assert request.guidance.branches == 1 and request.output.num_frames == FRAMES
    start, tokens, made = ours(model, request)
    sigmas = list(DISTILLED_SIGMAS)
    seen, state = reference(pipe, monkeypatch, start, num_frames=FRAMES, sigmas=sigmas, **given)
    same(made, tokens, seen, state)


def test_the_prompt_decides_how_long_the_video_is(both, monkeypatch):
    """As many frames as the blocks make where they are told no number."""
    pipe, model = both
    bounds = {"auto_duration_min_seconds": 0.3, "auto_duration_max_seconds": 2.0}
    request = request_for(model, auto_duration=True, num_inference_steps=2, **bounds)
    assert request.output.num_frames == 41 and request.schedule.sigmas == ()
    conditioning = pipeline.condition(model, request)
    settled = conditioning.settled(request)
    start, tokens, made = ours(model, request)
    bounds = {"min_seconds": 0.3, "max_seconds": 2.0}
    seen, state = reference(pipe, monkeypatch, start, num_inference_steps=2, **bounds)
    assert settled.output.num_frames == state.get("num_frames") == len(made.frames) < 41
    assert settled.output == replace(request.output, num_frames=len(made.frames))
    same(made, tokens, seen, state)


def test_a_server_says_how_many_frames_the_prompt_asked_for(both):
    """A job's outputs and its parameters have them, whatever was planned for."""
    model = both[1]
    device = Device({"model": model.blueprint}, 1)
    device.load()
    bounds = {"auto_duration_min_seconds": 0.3, "auto_duration_max_seconds": 2.0}
    request = request_for(model, auto_duration=True, num_inference_steps=1, **bounds)
    settled = device.condition("job", request).settled(request)
    device.start("job", 0)
    while not (result := device.step()).done:
        assert result.error is None
    made, parameters = device.finish("job", 0)
    assert parameters["num_frames"] == settled.output.num_frames == len(made.frames) < 41


@pytest.mark.parametrize(
    ("seconds", "least", "most", "frames"),
    [
        (5.0, 1.0, 20.0, 113), (100.0, 1.0, 20.0, 473), (0.1, 1.0, 20.0, 25), (1.0, 1.0, 1.02, 25),
        (3.28125, 1.0, 20.0, 73), (0.9, 0.85, 0.9, 25), (0.9, 0.75, 0.8, 17),
    ],
)  # fmt: skip
def test_the_number_of_frames_is_that_of_the_reference(both, monkeypatch, seconds, least, most, frames):
    head = both[0].duration_head
    monkeypatch.setattr(head, "forward", lambda *args: torch.tensor([seconds]))
    theirs = head.predict_num_frames(
        frame_rate=24.0, temporal_compression_ratio=8, min_seconds=least, max_seconds=most
    )
    assert recipe.frames_between(seconds, least, most, 24.0, 8) == theirs == frames


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 17}, "num_frames: 17 is given, and auto_duration asks the model for it"),
        ({"auto_duration_min_seconds": 3.0, "auto_duration_max_seconds": 2.0},
         "auto_duration_min_seconds: 3 is not below auto_duration_max_seconds, 2"),
        ({"auto_duration": False, "auto_duration_max_seconds": 2.0},
         "auto_duration_max_seconds: 2 is a bound of auto_duration, which is not asked for"),
    ],
)  # fmt: skip
def test_how_a_length_cannot_be_asked_for(both, fields, message):
    with pytest.raises(UserError, match=message):
        request_for(both[1], **{"auto_duration": True} | fields)


def test_a_length_by_the_prompt_needs_the_head_and_no_later_keyframe(both, tmp_path):
    model, (_, paths) = both[1], pictures(tmp_path, 2)
    with pytest.raises(UserError, match="image_frames: only the first frame is known where the prompt"):
        request_for(model, auto_duration=True, image_path=paths)
    assert request_for(model, auto_duration=True, image_path=paths[:1]).images.frames == (0,)
    nets = {name: net for name, net in model.blueprint.nets.items() if name != "duration_head"}
    without = replace(model, blueprint=replace(model.blueprint, nets=nets))
    with pytest.raises(UserError, match=r"auto_duration: test/LTX-2\.5 has no duration_head, which tells"):
        request_for(without, auto_duration=True)


def test_guidance_that_is_asked_for_is_that_of_video_and_sound(both):
    """One scale serves both, as in diffusers; other numbers of steps take the scheduler's sigmas."""
    request = request_for(both[1], guidance_scale=3.0, num_inference_steps=4)
    assert (request.guidance.scale, request.guidance.branches, request.guidance.terms) == (3, 2, None)
    assert (request.schedule.steps, request.schedule.sigmas) == (4, ())
    assert request_for(both[1], guidance_scale=3.0, audio_guidance_scale=2.0).guidance.terms == replace(
        ROW.terms, audio_guidance_scale=2.0
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 16}, r"num_frames: 16 is not 8k \+ 1, .* the nearest: 9 and 17"),
        ({"width": 80}, r"width: 80 is not a multiple of 32, .* the nearest: 64 and 96"),
        ({"image_frames": (17,)}, "image_frames: 17 is beyond the 17 frames of the video, 0 to 16"),
        ({"num_frames": 1, "image_path": (), "audio": True}, "audio: an image has no sound; leave it out"),
    ],
)
def test_what_cannot_be_made(both, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        request_for(both[1], **{"image_path": pictures(tmp_path, 1)[1]} | fields)
