"""Sound beside the frames of a video, and alone: lengths, start and what is heard, read back by PyAV."""

from __future__ import annotations

import wave

import av
import numpy as np
import pytest

from tinydiff.io.video import write_video, write_wav
from tinydiff.records import Sound

FPS = 24


def click(seconds, rate, at, channels=2):
    """Silence but for a short tone at one time."""
    time = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * 1000 * time) * (np.abs(time - at) < 0.02)
    return Sound(np.stack([tone] * channels, 1).astype(np.float32), rate)


def frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


def heard(path):
    """(samples [channels, N], rate) of a file's sound."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
        stream = container.streams.audio[0]
        return np.concatenate(parts, 1), stream.rate


@pytest.mark.parametrize(("extension", "codec"), [(".mp4", "aac"), (".webm", "opus")])
@pytest.mark.parametrize(("rate", "seconds"), [(24000, 1.0), (48000, 2.0)])
def test_streams_start_together_and_end_within_a_frame(tmp_path, extension, codec, rate, seconds):
    """Sound shorter than the video is filled with silence, longer sound is cut."""
    path, count = tmp_path / f"a{extension}", 37
    write_video(path, frames(count), extension, FPS, sound=click(seconds, rate, 0.5))
    with av.open(str(path)) as container:
        kinds = [(stream.type, stream.codec_context.name) for stream in container.streams]
        assert kinds == [("video", "h264" if extension == ".mp4" else "vp9"), ("audio", codec)]
        for stream in container.streams:
            assert abs(float((stream.start_time or 0) * stream.time_base)) < 1 / FPS / 2
        assert abs(container.duration / 1e6 - count / FPS) < 1 / FPS
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == count
    samples, own = heard(path)
    assert abs(samples.shape[1] / own - count / FPS) < 1 / FPS


@pytest.mark.parametrize("extension", [".mp4", ".webm"])
def test_what_is_heard_is_heard_at_its_time(tmp_path, extension):
    path = tmp_path / f"a{extension}"
    write_video(path, frames(24), extension, FPS, sound=click(1.0, 48000, 0.6))
    samples, rate = heard(path)
    loud = np.abs(samples[0])
    centre = (loud * np.arange(len(loud))).sum() / loud.sum() / rate
    assert centre == pytest.approx(0.6, abs=0.01)
    assert 0.8 < loud.max() < 1.2


def test_one_channel(tmp_path):
    write_video(tmp_path / "a.mp4", frames(8), ".mp4", FPS, sound=click(0.3, 24000, 0.1, channels=1))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.audio[0].layout.name == "mono"


def test_without_sound_a_video_has_one_stream(tmp_path):
    write_video(tmp_path / "a.mp4", frames(4), ".mp4", FPS)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_wav_holds_every_sample(tmp_path):
    sound = click(0.25, 24000, 0.1)
    write_wav(tmp_path / "a.wav", sound)
    with wave.open(str(tmp_path / "a.wav"), "rb") as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 24000, 2)
        stored = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    assert np.abs(stored / 32767 - sound.samples).max() < 1 / 32767


@pytest.mark.parametrize(("extension", "channels", "message"), [
    (".gif", 2, "a .gif holds no sound"), (".mp4", 6, "sound has 6 channels; files are written with 1 or 2"),
])  # fmt: skip
def test_what_a_file_cannot_hold(tmp_path, extension, channels, message):
    with pytest.raises(ValueError, match=message):
        write_video(
            tmp_path / f"a{extension}", frames(2), extension, FPS, sound=click(0.1, 24000, 0.05, channels)
        )
