"""Wan2.2 speech to video from image, prompt and sound to frames, against the published loop over segments
with transformers' and diffusers' networks and the network's arithmetic written a second time, in float64.
"""

import base64
import math
import re
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from PIL import Image

import tinydiff
from tests.parity import close, doubles, draw
from tests.runtime import s2v
from tests.runtime.compare import same_frames
from tests.runtime.folders import load
from tinydiff import cli
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.io import audio
from tinydiff.io.video import write_video, write_wav
from tinydiff.records import Sound, UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.continuous import Continuous, make_slot
from tinydiff.sampling import noise

SECONDS, FRAMES, SIDE = 0.6, 8, 64
ASKED = {"prompt": ("a person talks",), "num_frames": FRAMES, "height": SIDE, "width": SIDE}
ASKED |= {"num_inference_steps": 3, "seed": (5,), "negative_prompt": "blurred"}


def speech(seconds=SECONDS, rate=16000, channels=1, frequency=300):
    """A tone that grows louder, the same in all channels."""
    times = np.arange(round(seconds * rate)) / rate
    tone = times / times.max() * np.sin(2 * np.pi * frequency * times) * 0.5
    return Sound(np.stack([tone] * channels, 1).astype(np.float32), rate)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the model's directory, the reference's networks, ours in float64)."""
    folder = tmp_path_factory.mktemp("s2v")
    networks = s2v.build(folder / "model")
    write_wav(folder / "speech.wav", speech())
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "face.png")
    return folder, networks, load(folder / "model")


def asked(folder, **fields):
    given = {"image_path": (str(folder / "face.png"),), "audio_path": str(folder / "speech.wav")}
    return SamplingOptions(**ASKED | given | fields)


def request_of(made, **fields):
    [request] = admit(made[2].blueprint, asked(made[0], **fields))
    return request


def scales(vae):
    """Mean and deviation of its latents."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    return (torch.tensor(each, dtype=torch.float64).view(1, -1, 1, 1, 1) for each in values)


def coded(vae, pixels):
    mean, std = scales(vae)
    return (vae.encode(pixels).latent_dist.mode() - mean) / std


def shown(vae, latents):
    mean, std = scales(vae)
    return vae.decode(latents * std + mean).sample


def states_of_frames(encoder, samples, count, fps):
    """Hidden states [S, C, frames] that the frames of all segments hear."""
    x = torch.from_numpy(samples).double()
    x = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
    output = encoder.wav2vec2(x[None], output_hidden_states=True)
    states = torch.cat([*output.hidden_states[:-1], output.last_hidden_state]).mT
    heard = int(states.shape[2] / 50 * 30)
    at_thirty = F.interpolate(states, size=heard, mode="linear", align_corners=True)
    chosen = [round(frame / fps * 30) for frame in range(count * FRAMES)]
    zeros = torch.zeros_like(at_thirty[..., 0])
    return torch.stack([at_thirty[..., i] if i < heard else zeros for i in chosen], -1)


@torch.no_grad()
def reference(networks, model, request, noises):
    """(latents after each step of each segment, pixels of each segment)."""
    c, output = s2v.CONFIG, request.output
    ids = [model.tokenizers["tokenizer"].encode(text) for text in request.texts]
    texts = []
    for each in ids:
        hidden = networks.text_encoder(torch.tensor([each.ids])).last_hidden_state[0]
        texts.append(F.pad(hidden, (0, 0, 0, 512 - len(hidden))))
    heard = states_of_frames(networks.audio_encoder, request.speech.samples, len(noises), output.fps)
    image = torch.tensor(request.images.resized[0]).double().permute(2, 0, 1)[None, :, None] / 127.5 - 1
    face = coded(networks.vae, image)
    last = torch.zeros(1, 3, c.motion_frames, SIDE, SIDE).double()
    past, steps, segments = None, [], []
    for number, x in enumerate(noises):
        scheduler = UniPCMultistepScheduler.from_config(dict(model.blueprint.scheduler))
        with torch._C.DisableTorchFunction():
            scheduler.set_timesteps(request.schedule.steps)
        scheduler.sigmas = scheduler.sigmas.double()
        own = heard[..., number * FRAMES : (number + 1) * FRAMES]
        for t in scheduler.timesteps:
            prompt, negative = (
                networks.transformer(
                    x[0], t[None], text, face[0], None if past is None else past[0],
                    torch.zeros_like(x[0]), sound, (c.motion_frames, (c.motion_frames + 3) // 4),
                )
                for text, sound in zip(texts, (own, 0 * own), strict=True)
            )  # fmt: skip
            v = negative + request.guidance.scale * (prompt - negative)
            x = scheduler.step(v[None], t, x, return_dict=False)[0]
            steps.append(x)
        pixels = shown(networks.vae, torch.cat([face if past is None else past, x], 2))[:, :, -FRAMES:]
        pixels = pixels[:, :, 3:] if past is None else pixels
        last = torch.cat([last, pixels], 2)[:, :, -c.motion_frames :]
        past = coded(networks.vae, last)
        segments.append(pixels)
    return steps, segments


def test_segments_equal_the_reference(made, monkeypatch):
    _, networks, model = made
    request = request_of(made)
    wide = replace(request.speech, samples=request.speech.samples.astype(np.float64))
    request = replace(request, speech=wide)
    assert request.guidance.scale == 4.5 and request.schedule.flow_shift == 3.0
    told = pipeline.condition(model, request)
    drawn = [draw(1, *stage.sizes[0], seed=9 + i) for i, stage in enumerate(told.stages)]
    monkeypatch.setattr(noise, "drawn", lambda seed, shapes: drawn[: len(shapes)])
    steps = list(pipeline._steps(model, told, 5))
    with doubles():
        expected, segments = reference(networks, model, request, drawn)
    assert len(told.stages) == 2 and len(steps) == len(expected) == told.steps == 6
    for (inputs, tokens), theirs in zip(steps, expected, strict=True):
        close(inputs.unpack(tokens)[0], theirs)
    frames = pipeline.finish(model, request, *steps[-1]).frames
    whole = torch.cat(segments, 2)[0].permute(1, 2, 3, 0) / 2 + 0.5
    assert len(whole) == 2 * FRAMES - 3 and len(frames) == math.ceil(SECONDS * 16) == 10
    same_frames(frames, whole[None, :10])


def test_the_video_has_the_sound_that_was_given(made, tmp_path):
    folder, video = made[0], tmp_path / "a.mp4"
    write_wav(tmp_path / "a.wav", speech(0.6, 44100, 2))
    given = {"image_path": str(folder / "face.png"), "audio_path": str(tmp_path / "a.wav"), "num_frames": 8}
    given |= {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "prompt": "a person talks"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    model = str(folder / "model")
    assert cli.main(["generate", "--model-path", model, *words, "--output-file-path", str(video)]) == 0
    with av.open(str(video)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert sum(1 for _ in container.decode(video=0)) == 10
    heard = audio.read_speech(video, 16000)
    assert abs(len(heard) / 16000 - 10 / 16) < 0.05
    assert np.argmax(np.abs(np.fft.rfft(heard[:9600]))) * 16000 / 9600 == pytest.approx(300, abs=4)

    loaded = tinydiff.load(model)
    result, quiet = (tinydiff.generate(loaded, **given, audio=audio_too) for audio_too in (True, False))
    [sound] = result.sounds
    assert sound.rate == 48000 and sound.samples.shape == (28800, 2)
    assert result.parameters["num_frames"] == 8 and result.parameters["video_frames"] == 10
    assert quiet.sounds == () and np.array_equal(quiet.frames[0], result.frames[0])


def test_outputs_of_segments_share_the_loop_of_a_server(made):
    model = made[2]
    request = replace(request_of(made), seeds=(5, 6))
    told, together = pipeline.condition(model, request), Continuous()
    slots = [make_slot(model, request, told, "job", i) for i in range(2)]
    done = []
    for slot in slots:
        together.add(slot)
    while together.slots:
        stepped = together.step(2)
        assert stepped.error is None
        done += stepped.done
    assert done == slots
    for slot in slots:
        *_, (inputs, tokens) = pipeline._steps(model, told, slot.seed)
        alone = pipeline.finish(model, request, inputs, tokens)
        last = slot.to_image_tokens(slot.denoising.state.x)
        assert (pipeline.finish(model, request, slot.inputs, last).latents - alone.latents).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("rate", "channels", "extension"),
    [(16000, 2, ".wav"), (8000, 1, ".wav"), (44100, 2, ".mp4"), (48000, 1, ".webm")],
)
def test_any_sound_that_can_be_read_gives_the_same_length(made, tmp_path, rate, channels, extension):
    path = tmp_path / f"a{extension}"
    if extension == ".wav":
        write_wav(path, speech(0.7, rate, channels))
    else:  # a video with sound
        write_video(
            path, np.zeros((12, 32, 32, 3), np.uint8), extension, 16, sound=speech(0.7, rate, channels)
        )
    request = request_of(made, audio_path=str(path))
    assert abs(len(request.speech.samples) - 11200) < 1100 and request.speech.sound.rate == 48000
    assert request.output.length in (11, 12, 13) and request.output.num_frames == 8 and request.output.sound


def test_silence_makes_a_video(made, tmp_path):
    write_wav(tmp_path / "a.wav", Sound(np.zeros((3200, 1), np.float32), 16000))
    model, request = made[2], request_of(made, audio_path=str(tmp_path / "a.wav"))
    *_, (inputs, tokens) = pipeline._steps(model, pipeline.condition(model, request), 1)
    assert pipeline.finish(model, request, inputs, tokens).frames.shape == (4, SIDE, SIDE, 3)


def test_sounds_that_cannot_be(made, tmp_path):
    write_wav(tmp_path / "short.wav", speech(0.02))
    write_wav(tmp_path / "long.wav", speech(601, 1000))
    write_video(tmp_path / "mute.mp4", np.zeros((4, 32, 32, 3), np.uint8), ".mp4", 16)
    for fields, message in (
        ({"audio_path": None}, "Wan-AI/Wan2.2-S2V-14B makes a video to a sound; give one with --audio-path"),
        ({"audio_path": str(tmp_path / "short.wav")}, "the sound has 0.020 seconds; give at least 0.1"),
        (
            {"audio_path": str(tmp_path / "long.wav")},
            "is longer than 600 seconds, the most that is read; cut it",
        ),
        ({"audio_path": str(tmp_path / "mute.mp4")}, "has no audio stream"),
        ({"audio_path": str(made[0] / "face.png")}, "cannot be read as an audio file, or a video with sound"),
        ({"audio_path": str(tmp_path / "none.wav")}, "does not exist; it must be an audio file"),
    ):
        with pytest.raises(UserError, match=f"^audio_path: .*{re.escape(message)}"):
            request_of(made, **fields)


def test_a_segment_has_a_multiple_of_four_frames(made):
    why = "81 is not a multiple of 4, which a segment of Wan-AI/Wan2.2-S2V-14B has; the nearest: 80 and 84"
    message = f"num_frames: {why}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        request_of(made, num_frames=81)


def test_no_image(made):
    with pytest.raises(UserError, match=r"^image_path: Wan-AI/Wan2.2-S2V-14B starts from an image"):
        request_of(made, image_path=())


def test_a_model_that_hears_nothing(tmp_path):
    write_wav(tmp_path / "a.wav", speech())
    plan = blueprint.read(ModelOptions())
    message = "audio_path: tinydiff/shapes makes no video to a given sound; leave it out"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        admit(plan, SamplingOptions(prompt=("a",), audio_path=str(tmp_path / "a.wav")))


def test_a_sound_from_a_data_uri(made):
    data = base64.b64encode((made[0] / "speech.wav").read_bytes()).decode()
    request = request_of(made, audio_path=f"data:audio/wav;base64,{data}")
    assert np.array_equal(request.speech.samples, request_of(made).speech.samples)
    with pytest.raises(UserError, match=r"^audio_path: what is given cannot be read as an audio file"):
        request_of(made, audio_path="data:audio/wav;base64,YWJj")
