"""What `generate` and the server write of an output with sound: in the video, and beside it where asked."""

import wave
from types import SimpleNamespace

import av
import numpy as np
import pytest

from tests.io.test_sound import click, frames
from tests.serve.fake import service
from tinydiff import config
from tinydiff.config import NoProgress, OutputOptions
from tinydiff.models import registry
from tinydiff.records import Output, UserError
from tinydiff.runtime import blueprint, generate
from tinydiff.runtime.admit import admit
from tinydiff.serve import outputs
from tinydiff.serve.jobs import Job

FPS, COUNT = 24, 5
SOUND = click(COUNT / FPS, 24000, 0.1)


@pytest.fixture
def job():
    """A request for two seeds of a model with sound, which nothing runs."""
    output = Output(32, 48, COUNT, fps=FPS, sound=True)
    text = SimpleNamespace(prompt="a fox")
    request = SimpleNamespace(output=output, text=text, seeds=(3, 4))
    return generate.ReplicaJob(0, 0, 2, request)


def heard(path):
    """(samples [N, channels] between -1 and 1, rate) of a WAV file."""
    with wave.open(str(path)) as file:
        held = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return held / 32767, file.getframerate()


def run(monkeypatch, job, tmp_path, **options):
    """The files of an output with sound for each of two seeds."""
    asked = OutputOptions(output_path=str(tmp_path), output_file_name="fox.mp4", **options)

    def made(model, request, progress, save, keep):
        return [path for index in (0, 1) for path in save(index, frames(COUNT), SOUND, {"prompt": "a fox"})]

    monkeypatch.setattr(generate.backends, "of", lambda _: SimpleNamespace(run=made))
    destination = generate._destination(asked, job.request)
    return generate._run_job(SimpleNamespace(blueprint=None), job, destination, asked, NoProgress(), True)


def test_generate_writes_sound_into_the_video_and_beside_it(monkeypatch, job, tmp_path):
    paths = run(monkeypatch, job, tmp_path, save_audio=True)
    assert [path.name for path in paths] == ["fox_0.mp4", "fox_0.wav", "fox_1.mp4", "fox_1.wav"]
    for video, wav in (paths[:2], paths[2:]):
        with av.open(str(video)) as container:
            assert [stream.type for stream in container.streams] == ["video", "audio"]
        samples, rate = heard(wav)
        assert rate == 24000 and np.abs(samples - SOUND.samples).max() < 1e-4


def test_without_being_asked_no_wav_is_written(monkeypatch, job, tmp_path):
    assert [path.suffix for path in run(monkeypatch, job, tmp_path)] == [".mp4", ".mp4"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Output(32, 48, 5), "save_audio: this output has no sound that could be written; leave it out"),
        (Output(32, 48), "save_audio: an image has no sound that could be written; leave it out"),
    ],
)
def test_a_wav_of_no_sound_is_refused_before_anything_runs(job, tmp_path, output, message):
    job.request.output = output
    with pytest.raises(UserError, match=message):
        generate._destination(OutputOptions(output_path=str(tmp_path), save_audio=True), job.request)


def test_sound_asked_of_a_model_that_has_none_is_refused():
    plan = blueprint.read(config.ModelOptions())
    ask = config.options({"prompt": "a", "audio": True, "num_frames": 5}).sampling
    with pytest.raises(UserError, match=f"audio: {registry.SHIPPED} makes no sound; leave it out"):
        admit(plan, ask)
    without = config.parse(["--prompt", "a", "--no-audio"]).sampling
    assert without.audio is False and not admit(plan, without)[0].output.sound


def test_the_server_stores_a_wav_beside_the_video(tmp_path):
    made = service(tmp_path)
    try:
        request = SimpleNamespace(output=Output(32, 48, COUNT, fps=FPS, sound=True))
        job = Job("video_1", "video", 0.0, fields={"save_audio": True}, answer={"output_format": "mp4"})
        stored = outputs.save(job, request, made.files, frames(COUNT), 3, {"prompt": "a fox"}, SOUND)
        assert [each.variant for each in stored] == ["content", "audio", "thumbnail", "spritesheet"]
        assert stored[1].media_type == "audio/wav"
        samples, rate = heard(made.files.path(stored[1].file))
        assert rate == 24000 and len(samples) == len(SOUND.samples)
        plain = Job("video_2", "video", 0.0, answer={"output_format": "mp4"})
        assert "audio" not in [
            each.variant for each in outputs.save(plain, request, made.files, frames(COUNT), 3, {}, SOUND)
        ]
        silent = SimpleNamespace(output=Output(32, 48, COUNT, fps=FPS))
        with pytest.raises(UserError, match="save_audio: this output has no sound"):
            outputs.plan(job, silent, tmp_path)
    finally:
        made.scheduler.close()
