"""Sound of audio and video files as one channel at a rate, or as two beside a video, and what has none."""

import re
import wave

import av
import numpy as np
import pytest

from tinydiff.io import audio
from tinydiff.io.video import write_video, write_wav
from tinydiff.records import Sound, UserError

RATE = 16_000


def tone(seconds, rate, hertz, channels=1, loud=0.5):
    time = np.arange(round(seconds * rate)) / rate
    wave_N = loud * np.sin(2 * np.pi * hertz * time)
    return Sound(np.stack([wave_N] * channels, 1).astype(np.float32), rate)


def strongest(samples, rate):
    """The frequency of the largest part of a sound, in Hz."""
    return np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_number_of_channels(tmp_path, rate, channels):
    write_wav(tmp_path / "a.wav", tone(0.5, rate, 440, channels))
    samples = audio.read_speech(tmp_path / "a.wav", RATE)
    assert samples.dtype == np.float32 and samples.shape == (RATE // 2,)
    assert strongest(samples, RATE) == 440
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)


def test_at_its_own_rate_every_sample_is_kept(tmp_path):
    sound = tone(0.1, RATE, 300)
    write_wav(tmp_path / "a.wav", sound)
    samples = audio.read_speech(tmp_path / "a.wav", RATE)
    assert np.abs(samples - sound.samples[:, 0]).max() < 1 / 32000


def test_of_two_channels_the_mean_counts(tmp_path):
    left = tone(0.25, RATE, 500).samples[:, 0]
    write_wav(tmp_path / "a.wav", Sound(np.stack([left, 0 * left], 1), RATE))
    samples = audio.read_speech(tmp_path / "a.wav", RATE)
    assert np.abs(samples - left / 2).max() < 1e-3


def test_silence_is_sound(tmp_path):
    write_wav(tmp_path / "a.wav", Sound(np.zeros((800, 1), np.float32), RATE))
    assert np.array_equal(audio.read_speech(tmp_path / "a.wav", RATE), np.zeros(800, np.float32))


@pytest.mark.parametrize("extension", [".mp4", ".webm"])
def test_a_video_with_sound(tmp_path, extension):
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    write_video(tmp_path / f"a{extension}", frames, extension, 24, sound=tone(0.5, 48000, 1000, 2))
    (tmp_path / f"a{extension}").rename(tmp_path / "misnamed.txt")  # the content decides
    samples = audio.read_speech(tmp_path / "misnamed.txt", RATE)
    assert abs(len(samples) - RATE // 2) < 0.1 * RATE
    assert strongest(samples, RATE) == pytest.approx(1000, abs=5)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 2), (6, 2)])
def test_the_channels_beside_a_video(tmp_path, channels, kept):
    write_wav(tmp_path / "a.wav", tone(0.25, 8000, 440, channels))
    sound = audio.read_sound(tmp_path / "a.wav")
    assert sound.rate == 48000 and sound.samples.shape == (12000, kept)
    assert strongest(sound.samples[:, -1], 48000) == 440


def fails(path, message, **options):
    with pytest.raises(UserError, match=f"^audio_path: {re.escape(message)}$") as error:
        audio.read_speech(path, RATE, **options)
    assert error.value.field == "audio_path"


def test_longer_than_allowed(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, tone(1.0, 8000, 440))
    assert len(audio.read_speech(path, RATE, longest=1.0)) == RATE
    fails(path, f"'{path}' is longer than 0.5 seconds, the most that is read; cut it", longest=0.5)


def test_a_long_file_is_not_decoded_to_its_end(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.wav", []
    write_wav(path, tone(4.0, 8000, 440))
    resampler = av.AudioResampler

    class Counting:
        def __init__(self, *args):
            self.inner = resampler(*args)

        def resample(self, frame):
            seen.append(0 if frame is None else frame.samples)
            return self.inner.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Counting)
    with pytest.raises(UserError):
        audio.read_speech(path, RATE, longest=0.5)
    assert sum(seen) < 2 * 8000


def test_a_file_without_sound(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((4, 32, 32, 3), np.uint8), ".mp4", 24)
    fails(path, f"'{path}' has no audio stream")


def test_a_stream_of_no_samples(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
    fails(path, f"'{path}' has an audio stream without any sound")


UNREADABLE = (
    "cannot be read as an audio file, or a video with sound (WAV, MP3, FLAC, Ogg, MP4, WebM, ... are)"
)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a media file\n", b"ffconcat version 1.0\nfile 'other.wav'\n",
     b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n"],
    ids=["empty", "text", "list of files", "playlist"],
)  # fmt: skip
def test_no_media_file(tmp_path, content):
    """Not even a list of files that has sound opens others."""
    write_wav(tmp_path / "other.wav", tone(0.1, RATE, 440))
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    fails(path, f"'{path}' {UNREADABLE}")


def test_samples_that_are_no_numbers(tmp_path):
    path = tmp_path / "a.wav"
    samples = np.full(100, np.nan, "<f4").tobytes()
    head = b"RIFF" + (36 + len(samples)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    form = b"".join(
        n.to_bytes(size, "little") for n, size in ((3, 2), (1, 2), (RATE, 4), (RATE * 4, 4), (4, 2), (32, 2))
    )
    path.write_bytes(head + form + b"data" + len(samples).to_bytes(4, "little") + samples)
    fails(path, f"'{path}' has samples that are no finite numbers")


def test_a_missing_file_and_a_directory(tmp_path):
    wanted = "it must be an audio file, or a video with sound"
    fails(tmp_path / "b.wav", f"'{tmp_path / 'b.wav'}' does not exist; {wanted}")
    fails(tmp_path, f"'{tmp_path}' is a directory; {wanted}")
