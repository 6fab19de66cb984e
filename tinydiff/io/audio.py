"""Reading the sound of any audio or video: one channel for an encoder, one or two beside a video."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinydiff import paths
from tinydiff.io import given
from tinydiff.io.video import as_file
from tinydiff.records import Sound, Speech, UserError

if TYPE_CHECKING:
    import av
    import numpy as np
    from av.container import InputContainer

LONGEST = 600.0
"""Most seconds of sound that are read."""

VIDEO_RATE = 48_000
"""Samples per second of sound that is written beside a video: AAC and Opus both have this rate."""

FORMATS = (
    *("wav", "w64", "aiff", "au", "caf", "mp3", "flac", "ogg", "aac", "ac3", "amr", "asf"),
    *("mov", "mp4", "matroska", "webm", "avi", "flv", "mpeg", "mpegts", "gif"),
)
"""FFmpeg's names of the formats that are read. Others, such as playlists, would open other files and URLs."""


def read(
    source: str | Path | bytes, rate: int, field: str = "audio_path", longest: float = LONGEST
) -> Speech:
    """The sound of a file, to be heard at `rate` and to be written beside a video.

    source: a path, an http(s) URL, a data URI, or a file's bytes. Raises UserError.
    """
    if isinstance(source, str | Path) and not given.is_file(source):
        source = given.read_bytes(source, field)
    return Speech(read_speech(source, rate, field, longest), read_sound(source, field, longest))


def read_speech(
    source: str | Path | bytes, rate: int, field: str = "audio_path", longest: float = LONGEST
) -> np.ndarray:
    """The sound of a file as one channel, float32 [samples] in [-1, 1] with `rate` samples per second.

    Of several channels the mean counts, of several audio streams the first; the content decides the format,
    not the name. Raises UserError for a file that is missing, has no sound, is no media file or is longer
    than `longest` seconds.
    """
    return _read(source, rate, field, longest).mean(1)


def read_sound(source: str | Path | bytes, field: str = "audio_path", longest: float = LONGEST) -> Sound:
    """The sound of a file with one or two channels, to be written beside a video. Raises as `read_speech`."""
    return Sound(_read(source, VIDEO_RATE, field, longest), VIDEO_RATE)


def _read(source: str | Path | bytes, rate: int, field: str, longest: float) -> np.ndarray:
    """float32 [samples, 1 or 2 channels]."""
    import av
    import numpy as np
    from av.error import FFmpegError

    name, opened = _opened(source, field)
    most = round(longest * rate)
    try:
        # a limited list of formats, because FFmpeg would take some text files for lists of other files
        with av.open(opened, "r", options={"format_whitelist": ",".join(FORMATS)}) as container:
            parts = _decoded(container, rate, most) if container.streams.audio else None
    except (FFmpegError, ValueError) as error:
        known = "an audio file, or a video with sound (WAV, MP3, FLAC, Ogg, MP4, WebM, ... are)"
        raise UserError(field, f"{field}: {name} cannot be read as {known}") from error
    if parts is None:
        raise UserError(field, f"{field}: {name} has no audio stream")
    samples = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    if len(samples) == 0:
        raise UserError(field, f"{field}: {name} has an audio stream without any sound")
    if len(samples) > most:
        raise UserError(
            field, f"{field}: {name} is longer than {longest:g} seconds, the most that is read; cut it"
        )
    if not np.isfinite(samples).all():
        raise UserError(field, f"{field}: {name} has samples that are no finite numbers")
    return samples


def _opened(source: str | Path | bytes, field: str) -> tuple[str, str | IO[bytes]]:
    """(what errors call it, what PyAV opens)."""
    if isinstance(source, bytes):
        return "what is given", io.BytesIO(source)
    path = paths.path(source, field)
    if paths.kind(path) != "file":
        missing = "is a directory" if paths.kind(path) == "directory" else "does not exist"
        message = f"{str(path)!r} {missing}; it must be an audio file, or a video with sound"
        raise UserError(field, f"{field}: {message}")
    return repr(str(path)), as_file(path)


def _decoded(container: InputContainer, rate: int, most: int) -> list[np.ndarray]:
    """The first audio stream in parts, float32 [samples, channels]; it stops after more than `most` samples.

    One or two channels stay as they are, more become two.
    """
    import av

    stream = container.streams.audio[0]
    resampler = av.AudioResampler("flt", "stereo" if stream.channels > 2 else None, rate)
    parts: list[np.ndarray] = []
    for frame in container.decode(stream):
        frame.pts = None  # a gap is not filled, and a late start is not waited for
        parts += map(_samples, resampler.resample(frame))
        if sum(map(len, parts)) > most:
            return parts
    return [*parts, *map(_samples, resampler.resample(None))] if parts else parts


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Interleaved samples -> [samples, channels]."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
