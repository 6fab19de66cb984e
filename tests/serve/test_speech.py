"""A sound that is given over HTTP: read in a process of its own, kept among the files, never a path."""

import base64
import io
from dataclasses import replace

import av
import numpy as np
import pytest
from falcon import testing

from tests.runtime import s2v
from tests.serve import fake
from tests.serve.fake import form, picture, service
from tinydiff.config import ModelOptions
from tinydiff.io import audio
from tinydiff.io.video import write_video, write_wav
from tinydiff.records import Sound, UserError
from tinydiff.runtime import blueprint
from tinydiff.serve import admission, unpack, warmup
from tinydiff.serve.app import make_app
from tinydiff.serve.decoder import Decoder

VIDEOS = "/v1/videos"
FORM = {"Host": "localhost", "Content-Type": "multipart/form-data; boundary=B"}
SMALL = (("prompt", "a person talks"), ("num_frames", "8"), ("size", "64x64"), ("num_inference_steps", "1"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """The bytes of half a second of a WAV file with two channels."""
    path = tmp_path_factory.mktemp("sound") / "a.wav"
    tone = np.sin(np.arange(4000) / 9)[:, None].repeat(2, 1)
    write_wav(path, Sound(tone.astype(np.float32), 8000))
    return path.read_bytes()


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "s2v"
    s2v.build(folder)
    return blueprint.read(ModelOptions(model_path=str(folder)))


@pytest.fixture
def made(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(fake, "blueprint", lambda: plan)
    found = service(tmp_path)
    yield found
    found.scheduler.close()


def post(made, *parts):
    client = testing.TestClient(make_app(made), FORM)
    return client.simulate_post(VIDEOS, body=form(*SMALL, ("input_reference", picture()), *parts))


def test_a_sound_is_decoded_in_a_process_of_its_own(speech):
    own = Decoder()
    got, expected = own.sound(speech, "audio_path", 16000), audio.read(speech, 16000)
    assert np.array_equal(got.samples, expected.samples) and own._idle == []
    assert np.array_equal(got.sound.samples, expected.sound.samples) and got.sound.rate == 48000
    with pytest.raises(UserError, match=r"^audio_path: what is given cannot be read as an audio file"):
        own.sound(b"RIFF0000WAVE", "audio_path", 16000)


def test_a_video_to_a_sound(made, speech):
    answer = post(made, ("audio_path", speech))
    assert answer.status_code == 200, answer.text
    assert answer.json["seconds"] == "0.3125"
    job = made.store.get(answer.json["id"])
    [id] = job.inputs["audio_path"]
    assert made.files.path(id).read_bytes() == speech and made.files.media_type(id) == "audio/wav"
    uri = f"data:audio/wav;base64,{base64.b64encode(speech).decode()}"
    body = {name: int(value) if value.isdigit() else value for name, value in SMALL}
    body |= {"input_reference": f"data:image/png;base64,{base64.b64encode(picture()).decode()}"}
    client = testing.TestClient(make_app(made), {"Host": "localhost"})
    for given in (uri, {"file_id": id}):
        answer = client.simulate_post(VIDEOS, json=body | {"audio_path": given})
        assert answer.status_code == 200 and answer.json["seconds"] == "0.3125", answer.text


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "audio_path: Wan-AI/Wan2.2-S2V-14B makes a video to a sound; give one with audio_path"),
        ([("audio_path", "/etc/passwd")], "audio_path: '/etc/passwd' must be a file or a data URI"),
        ([("audio_path", picture())], "audio_path: is no sound in a supported format (WAV, FLAC, Ogg, MP3"),
        ([("audio_path", b"")], "audio_path: is empty"),
        ([("audio_path", b"RIFF....WAVE")], "audio_path: what is given cannot be read as an audio file"),
        ([("audio_path", b"a"), ("audio_path", b"b")], "audio_path: has 2 sounds; at most one sound may be"),
        ([("audio_path", "https://example.org/a.wav")], "send the sound as a file or a data URI"),
    ],
)
def test_sounds_that_are_refused(made, parts, message):
    answer = post(made, *parts)
    assert answer.status_code == 400 and message in answer.json["error"]["message"], answer.text
    assert answer.json["error"]["param"] == "audio_path" and list(made.files.folder.glob("*")) == []


def test_the_sound_decides_the_length(made, speech):
    parts = (("prompt", "a"), ("seconds", "4"), ("audio_path", speech), ("input_reference", picture()))
    answer = testing.TestClient(make_app(made), FORM).simulate_post(VIDEOS, body=form(*parts))
    assert answer.status_code == 400
    assert "is as long as its sound; leave it out" in answer.json["error"]["message"]


def test_a_model_that_hears_nothing(tmp_path, speech):
    made = service(tmp_path)
    client = testing.TestClient(make_app(made), FORM)
    answer = client.simulate_post(VIDEOS, body=form(("prompt", "a"), ("audio_path", speech)))
    assert answer.status_code == 400
    assert "makes no video to a given sound" in answer.json["error"]["message"]
    made.scheduler.close()


@pytest.mark.parametrize("container", ["wav", "flac", "ogg", "mp3", "adts", "mp4", "webm"])
def test_the_first_bytes_tell_what_holds_sound(container):
    held, codec = io.BytesIO(), {"wav": "pcm_s16le", "ogg": "libopus", "webm": "libopus", "mp3": "mp3"}
    with av.open(held, "w", format=container) as out:
        stream = out.add_stream(codec.get(container, "flac" if container == "flac" else "aac"), rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), "s16", "mono")
        frame.rate = 48000
        for each in (frame, None):
            out.mux(stream.encode(each))
    assert unpack.sound_type(held.getvalue(), "audio_path").split("/")[0] in ("audio", "video")


def test_a_video_holds_sound(tmp_path, speech):
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((8, 32, 32, 3), np.uint8), ".mp4", 16, sound=audio.read_sound(speech))
    assert unpack.sound_type(path.read_bytes(), "audio_path") == "video/mp4"


def test_the_warm_up_has_the_image_and_the_sound_that_the_model_needs(made):
    [job] = warmup.jobs(made.options, made.models[0])
    request = admission.admitted(made.models[0].adapters, made.files, made.options, job)
    assert len(request.images.originals) == 1 and request.output.length == 4
    assert (request.output.height, request.output.width) == (704, 1024)
    assert not request.speech.samples.any()


@pytest.mark.parametrize("use", ["frames", "references"])
def test_the_warm_up_of_a_model_that_needs_images(tmp_path, use):
    made = service(tmp_path, row={"images": (1, 2), "image_use": use})
    kind = "video" if use == "frames" else "image"
    jobs = warmup.jobs(replace(made.options, warmup_num_frames=17 if use == "frames" else 1), made.models[0])
    [request] = [admission.admitted(made.models[0].adapters, made.files, made.options, job) for job in jobs]
    assert [job.kind for job in jobs] == [kind] and len(request.images.originals) == 1
    made.scheduler.close()
