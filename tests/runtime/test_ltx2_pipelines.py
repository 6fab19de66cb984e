"""LTX-2 and LTX-2.3 against diffusers' own pipelines: the latents of video and sound after every step, the
frames and the waveform, from the same start, in float64.

Beside the roundings of `compare`, timesteps of tokens stay float32 as those of images do, and rope tables
are made in float32, as ours are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ConditionPipeline, LTX2ImageToVideoPipeline
from diffusers.pipelines.ltx2 import (
    pipeline_ltx2,
    pipeline_ltx2_condition,
    pipeline_ltx2_image2video,
    pipeline_ltx2_latent_upsample,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image
from safetensors.torch import save_file

from tests.parity import close
from tests.runtime import compare
from tests.runtime.compare import exact, same_frames, widened
from tests.runtime.folders import load
from tests.runtime.ltx2_folders import as_ever, build, copied
from tinydiff import config
from tinydiff.config import ModelOptions
from tinydiff.models import registry
from tinydiff.models.registry import ReleasedModel
from tinydiff.records import GuidanceTerms, UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.parameters import parameters
from tinydiff.sampling import noise

PROMPT, NEGATIVE, STEPS, TOKENS = " A red circle and a star 日本 ", "blurry, left of", 3, 16
SIZE, FRAMES, FPS = (64, 96), 17, 24
ROW = ReleasedModel(
    "test/LTX-2", "ltx2", "LTX2Pipeline", 64, 96, 4, 4.0, 1, {}, num_frames=17, fps=24, text_tokens=TOKENS,
    refine_sigmas=(0.909375, 0.725, 0.421875), sound=True,
    terms=GuidanceTerms(spatio_temporal_guidance_blocks=(0,)),
    size_multiple=32, frame_multiple=8, images=(0, 16), negative_prompt=NEGATIVE,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MODELS", (*registry.MODELS, ROW))
        yield


@pytest.fixture(scope="module", params=["LTX-2", "LTX-2.3"])
def both(request, tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("ltx2")
    pipe = build(folder, request.param)
    return pipe, load(folder, component_paths={"spatial_upsampler": str(folder)}), request.param


def pipe_folder(model):
    """Where the model lies."""
    return model.blueprint.nets["transformer"].component.files.parent


def told(model, request):
    """The parameters beside an output, but for the precisions, which float64 is none of."""
    return parameters(replace(model, nets={}), request)


def one_stage(model):
    """The model without its upsampler."""
    nets = {name: net for name, net in model.blueprint.nets.items() if name != "spatial_upsampler"}
    return replace(model, blueprint=replace(model.blueprint, nets=nets))


request_for = partial(
    compare.request_for,
    prompt=PROMPT,
    num_frames=FRAMES,
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=STEPS,
)


TERMS = {
    "all terms": {
        "guidance_scale": 3.0, "audio_guidance_scale": 7.0, "stg_scale": 1.0, "audio_stg_scale": 0.5,
        "modality_scale": 3.0, "audio_modality_scale": 2.0, "guidance_rescale": 0.7,
        "audio_guidance_rescale": 0.6,
    },
    "sound guided alone": {"guidance_scale": 1.0, "audio_guidance_scale": 4.0, "audio_modality_scale": 2.0},
    "a pass without attention alone": {
        "guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 1.0,
    },
}  # fmt: skip
"""Terms of guidance; those that are not named are off."""
OFF = {
    "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0,
}  # fmt: skip


def theirs_of(terms):
    """The terms as the reference is told them: 0 for the sound would be the value of the video."""
    return {
        name: value or (1e-300 if terms[name.removeprefix("audio_")] else 0.0)
        for name, value in terms.items()
    }


def ours(model, request):
    """(what the request starts from, the tokens after each step, what is made)."""
    conditioning = pipeline.condition(model, request)
    inputs = conditioning.stages[0].inputs
    drawn = noise.drawn(5, [(1, *kind.size) for kind in inputs.latents])
    start = [(kind, x.double()) for kind, x in zip(inputs.latents, drawn, strict=True)]
    steps = pipeline.denoise(model, conditioning, 0, [x for _, x in start])
    tokens = [x[:, : sum(inputs.kinds)] for x in steps]
    return start, tokens, pipeline.finish(model, request, conditioning.stages[-1].inputs, tokens[-1])


def reference(pipe, monkeypatch, name, start, terms, **given):
    """(the tokens after each step, what the reference makes). start: as ours has it."""
    draws = {tuple(x.shape): x for kind, noise in start for x in (noise, kind.pack(noise))}
    for module in (pipeline_ltx2, pipeline_ltx2_image2video, pipeline_ltx2_condition):
        widened(monkeypatch, module)
        monkeypatch.setattr(module, "copy", SimpleNamespace(deepcopy=copied))
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: draws[tuple(shape)])
    pipe.set_progress_bar_config(disable=True)
    names, seen = ["latents", "audio_latents"], []
    monkeypatch.setattr(pipe, "_callback_tensor_inputs", names)
    with exact(pipe):
        made = pipe(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=SIZE[0], width=SIZE[1], num_frames=FRAMES,
            frame_rate=float(FPS), spatio_temporal_guidance_blocks=[1], max_sequence_length=TOKENS,
            use_cross_timestep=name != "LTX-2", output_type="np", callback_on_step_end_tensor_inputs=names,
            callback_on_step_end=lambda pipe, i, t, kept: seen.append(kept) or {}, **theirs_of(terms),
            **given,
        )  # fmt: skip
    return seen, made


def same_tokens(tokens, seen, steps):
    """After every step, those of the video and then those of the sound."""
    assert len(seen) == len(tokens) == steps
    for ours, theirs in zip(tokens, seen, strict=True):
        close(ours, torch.cat([theirs["latents"], theirs["audio_latents"]], 1))


@pytest.mark.parametrize("case", ["text", "text without guidance", "a first frame", *TERMS])
def test_equals_the_reference(both, monkeypatch, tmp_path, case):
    pipe, model, name = both
    model = one_stage(model)
    scale = 1.0 if case == "text without guidance" else 4.0
    terms = OFF | {"guidance_scale": scale, "audio_guidance_scale": scale} | TERMS.get(case, {})
    given, fields = {}, {}
    if case == "a first frame":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        picture.save(tmp_path / "first.png")
        fields, given = {"image_path": (str(tmp_path / "first.png"),)}, {"image": picture, "image_crf": 0}
        pipe = LTX2ImageToVideoPipeline(**pipe.components)
    request = request_for(model, spatio_temporal_guidance_blocks=(1,), **terms, **fields)

    start, tokens, made = ours(model, request)
    seen, expected = reference(pipe, monkeypatch, name, start, terms, num_inference_steps=STEPS, **given)
    same_tokens(tokens, seen, STEPS)
    same_frames(made.frames, expected.frames)
    heard = torch.as_tensor(np.asarray(expected.audio))[0].double()
    assert made.sound.rate == 24000 and made.sound.samples.shape == tuple(heard.T.shape)
    assert (torch.from_numpy(made.sound.samples).T.double() - heard).abs().max() < 1e-6 < heard.std()


def test_without_audio_the_video_is_the_same_and_no_sound_is_decoded(both):
    """The two are denoised together, so only decoding is left out."""
    model = one_stage(both[1])
    request = request_for(model, guidance_scale=1.0, num_inference_steps=1)
    conditioning = pipeline.condition(model, request)
    [tokens] = pipeline.denoise(model, conditioning, 3)
    silent = request_for(model, guidance_scale=1.0, num_inference_steps=1, audio=False)
    nets = {name: net for name, net in model.nets.items() if name != "vocoder"}
    quiet = pipeline.finish(replace(model, nets=nets), silent, conditioning.stages[-1].inputs, tokens)
    made = pipeline.finish(model, request, conditioning.stages[-1].inputs, tokens)
    assert quiet.sound is None and made.sound is not None and np.array_equal(quiet.frames, made.frames)
    assert told(model, silent)["audio"] is False and told(model, request)["audio"] is True


def test_a_single_image_has_no_sound(both):
    model = one_stage(both[1])
    assert not request_for(model, num_frames=1).output.sound
    with pytest.raises(UserError, match="audio: an image has no sound; leave it out"):
        request_for(model, num_frames=1, audio=True)


DISTILLED, REFINING = (1.0, 0.99375, 0.725, 0.421875), (0.909375, 0.725, 0.421875)


def called(pipe, monkeypatch, seen, **given):
    """The reference without guidance, its sigmas as they are; latents after each step are put into `seen`."""
    scheduler = pipe.scheduler
    plain = FlowMatchEulerDiscreteScheduler.from_config(
        scheduler.config, use_dynamic_shifting=False, shift_terminal=None
    )
    monkeypatch.setattr(pipe, "scheduler", plain)
    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "audio_latents"]
    with exact(pipe):
        return pipe(
            prompt=PROMPT, num_frames=FRAMES, frame_rate=float(FPS), guidance_scale=1.0, stg_scale=0.0,
            modality_scale=1.0, guidance_rescale=0.0, audio_guidance_scale=1.0, audio_stg_scale=0.0,
            audio_modality_scale=1.0, audio_guidance_rescale=0.0, max_sequence_length=TOKENS,
            callback_on_step_end_tensor_inputs=["latents", "audio_latents"],
            callback_on_step_end=lambda pipe, i, t, kept: seen.append(kept) or {}, **given,
        )  # fmt: skip


def test_two_stages_equal_the_reference(both, monkeypatch):
    """Half the size by explicit sigmas, the latent upsampler, then the whole size from what was made."""
    pipe, model, name = both
    size = {"height": 2 * SIZE[0], "width": 2 * SIZE[1]}
    request = request_for(
        model, sigmas=DISTILLED, flow_shift=1.0, num_inference_steps=None, guidance_scale=1.0, **size
    )
    assert request.refinement.sigmas == REFINING  # the default
    wide = noise.drawn
    monkeypatch.setattr(noise, "drawn", lambda *args: [x.double() for x in wide(*args)])
    conditioning = pipeline.condition(model, request)
    sizes = [size for stage in conditioning.stages for size in stage.sizes]
    drawn = noise.drawn(0, [(1, *size) for size in sizes])
    steps = list(pipeline.denoise(model, conditioning, 0))
    made = pipeline.finish(model, request, conditioning.stages[-1].inputs, steps[-1])

    for module in (pipeline_ltx2, pipeline_ltx2_latent_upsample):
        widened(monkeypatch, module)
    monkeypatch.setattr(pipeline_ltx2, "copy", SimpleNamespace(deepcopy=copied))
    packed = [
        x.double()
        for x in (
            *drawn[:2],
            *conditioning.stages[1].inputs.pack(drawn[2:]).split(conditioning.stages[1].inputs.kinds, 1),
        )
    ]
    monkeypatch.setattr(pipeline_ltx2, "randn_tensor", lambda shape, **_: packed.pop(0))
    first = conditioning.stages[1].table.sigmas[0].item()  # in float32, as the scheduler has it
    seen, cross = [], {"use_cross_timestep": name == "LTX-2.3"}
    video, audio = called(
        pipe, monkeypatch, seen, height=SIZE[0], width=SIZE[1], sigmas=list(DISTILLED), output_type="latent",
        return_dict=False, **cross,
    )  # fmt: skip
    with torch.no_grad():
        [large] = pipe.upsampler(latents=video, output_type="latent", return_dict=False)
    expected = called(
        pipe, monkeypatch, seen, latents=large, audio_latents=audio, noise_scale=first,
        sigmas=list(REFINING), output_type="np", **size, **cross,
    )  # fmt: skip
    assert len(seen) == len(steps) == len(DISTILLED) + len(REFINING) and not packed
    for ours, theirs in zip(steps, seen, strict=True):
        close(ours, torch.cat([theirs["latents"], theirs["audio_latents"]], 1))
    same_frames(made.frames, expected.frames)
    heard = torch.as_tensor(np.asarray(expected.audio))[0].double()
    assert (torch.from_numpy(made.sound.samples).T.double() - heard).abs().max() < 1e-6 < heard.std()


def latents(model, **fields):
    """The tokens after each step of a request in two stages."""
    request = request_for(
        model, height=2 * SIZE[0], width=2 * SIZE[1], guidance_scale=1.0, num_inference_steps=1,
        refine_sigmas=(0.8,), **fields,
    )  # fmt: skip
    return list(pipeline.denoise(model, pipeline.condition(model, request), 0)), request


def pictures(tmp_path, count, size=SIZE):
    """So many images of noise, and their paths."""
    made = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        made.append(Image.fromarray(noise))
        made[-1].save(tmp_path / f"{i}.png")
    return made, tuple(str(tmp_path / f"{i}.png") for i in range(count))


@pytest.mark.parametrize("indices", [(0, 2), (2,), (1, 0, 2)], ids=str)
def test_keyframes_equal_the_reference(both, monkeypatch, tmp_path, indices):
    """Images at any frame; the reference counts latent frames, of which number n begins at frame 8 n - 7."""
    pipe, model, name = both
    model, steps, terms = one_stage(model), 2, OFF | TERMS["all terms"]
    images, paths = pictures(tmp_path, len(indices))
    frames = tuple(max(0, 8 * index - 7) for index in indices)
    request = request_for(
        model, image_path=paths, image_frames=frames, spatio_temporal_guidance_blocks=(1,),
        num_inference_steps=steps, **terms,
    )  # fmt: skip
    start, tokens, made = ours(model, request)

    pipe = LTX2ConditionPipeline(**pipe.components)
    coords = pipe._prepare_keyframe_coords
    pipe._prepare_keyframe_coords = as_ever(lambda **given: coords(**given).float())  # as of the video
    conditions = [
        LTX2VideoCondition(image, index, 1.0, crf=0) for image, index in zip(images, indices, strict=True)
    ]
    given = {"conditions": conditions, "num_inference_steps": steps}
    seen, expected = reference(pipe, monkeypatch, name, start, terms, **given)
    same_tokens(tokens, seen, steps)
    same_frames(made.frames, expected.frames)


@pytest.mark.parametrize(
    ("count", "fields", "message"),
    [
        (1, {"image_frames": (17,)}, "image_frames: 17 is beyond the 17 frames of the video, 0 to 16"),
        (1, {"image_frames": (-18,)}, "image_frames: -18 is beyond the 17 frames of the video, 0 to 16"),
        (2, {"image_frames": (3,)}, "image_frames: 1 are given for 2 input images; give one for each"),
        (3, {}, "image_frames: 3 input images are given; say at which frame each of them stands"),
        (2, {"image_frames": (16, -1)}, "image_frames: two images stand at frame 16; one can"),
    ],
)
def test_where_an_image_cannot_stand(both, tmp_path, count, fields, message):
    with pytest.raises(UserError, match=message):
        request_for(one_stage(both[1]), image_path=pictures(tmp_path, count)[1], **fields)


def test_one_image_is_the_first_frame_and_two_are_the_first_and_the_last(both, tmp_path):
    model, (_, paths) = one_stage(both[1]), pictures(tmp_path, 2)
    assert request_for(model, image_path=paths[:1]).images.frames == (0,)
    assert request_for(model, image_path=paths).images.frames == (0, FRAMES - 1)
    asked = config.parse(["--prompt", "a", "--image-frames", "8", "-1"]).sampling.image_frames
    assert request_for(model, image_path=paths, image_frames=asked).images.frames == (8, FRAMES - 1)


def test_the_distilled_lora_changes_the_second_stage_alone(both, tmp_path):
    """It changes the transformer and what reads the prompt, under the authors' names; strengths of each stage
    say the same.
    """
    plain = both[1]
    generator = torch.Generator().manual_seed(0)
    block = "diffusion_model.transformer_blocks.0"
    keys = {f"{block}.attn1.to_q": (40, 40), "diffusion_model.patchify_proj": (40, 8)}
    if both[2] == "LTX-2":
        keys["text_embedding_projection.aggregate_embed"] = (24, 96)
    pair = {
        f"{key}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for key, (rows, columns) in keys.items()
        for side, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    save_file(pair, tmp_path / "lora.safetensors")
    folder, lora = pipe_folder(plain), str(tmp_path / "lora.safetensors")
    upsampler = {"spatial_upsampler": str(folder)}
    distilled = load(folder, component_paths=upsampler, distilled_lora_path=lora)
    changed = distilled.adapters["distilled"].layers
    assert changed == {"transformer": 2} | ({"connectors": 1} if both[2] == "LTX-2" else {})
    named = load(folder, component_paths=upsampler, lora_path=(lora,))
    without, _ = latents(plain)
    with_it, request = latents(distilled)
    assert torch.equal(with_it[0], without[0]) and not torch.allclose(with_it[1], without[1])
    again, _ = latents(named, loras={"default": 0.0}, refine_loras={"default": 1.0})
    assert torch.equal(again[0], without[0]) and torch.equal(again[1], with_it[1])
    both_stages, _ = latents(named)
    assert not torch.allclose(both_stages[0], without[0])
    written = told(distilled, request)
    assert written["refine_loras"] == {"distilled": 1.0} and "loras" not in written
    with pytest.raises(UserError, match="lora_merge_mode: 'distilled' changes the second stage alone"):
        load(folder, component_paths=upsampler, distilled_lora_path=lora, lora_merge_mode="merge")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refine_sigmas": (0.5, 0.7)}, "refine_sigmas: 0.7 follows 0.5; each must be below the one before"),
        ({"refine_loras": {"ink": 1.0}}, "refine_loras: 'ink' is no adapter of this model; none is loaded"),
        ({"height": 96}, r"height: 96 is not a multiple of 64, .* the nearest: 64 and 128"),
    ],
)
def test_what_a_second_stage_cannot_be(both, fields, message):
    with pytest.raises(UserError, match=message):
        request_for(both[1], **{"height": 128, "width": 128} | fields)


def test_a_second_stage_needs_an_upsampler(both):
    message = "refine_sigmas: test/LTX-2 is loaded without an upsampler, so there is no second stage"
    with pytest.raises(UserError, match=message):
        request_for(one_stage(both[1]), refine_sigmas=(0.5,))
    with pytest.raises(UserError, match="there is none; name an upsampler with --spat"):
        blueprint.read(ModelOptions(distilled_lora_path="a.safetensors"))


def test_an_image_is_not_all_of_a_video_with_sound(both, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match="num_frames: 1 leaves no frame to generate after the given first frame"
    ):
        request_for(one_stage(both[1]), num_frames=1, image_path=(str(tmp_path / "a.png"),))


def test_frames_that_are_not_8k_and_1_and_sizes_that_are_no_multiple_of_32(both):
    model = one_stage(both[1])
    with pytest.raises(UserError, match=r"num_frames: 16 is not 8k \+ 1, .* the nearest: 9 and 17"):
        request_for(model, num_frames=16)
    with pytest.raises(UserError, match=r"height: 48 is not a multiple of 32, .* the nearest: 32 and 64"):
        request_for(model, height=48)
