"""Writing MP4, WebM and GIF that play everywhere, with the generation parameters inside; and sound."""

from __future__ import annotations

import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tinydiff.io.parameters import as_ascii, as_text, read
from tinydiff.records import Frames, Sound, UserError

if TYPE_CHECKING:
    import av
    import numpy as np
    from av.container import OutputContainer
    from PIL import Image

VIDEO_EXTENSIONS = (".mp4", ".webm", ".gif")

X264_PRESETS = tuple("ultrafast superfast veryfast faster fast medium slow slower veryslow placebo".split())

DEFAULT_QUALITY = 65
"""For H.264 this is CRF 18: no visible loss."""

BT709 = 1
"""FFmpeg's number of BT.709 as matrix, primaries and transfer. Limited range is 1 as well."""


LAYOUTS = {1: "mono", 2: "stereo"}
"""Channels of sound -> FFmpeg's name for them."""

EBML = b"\x1a\x45\xdf\xa3"
"""The first bytes of a WebM."""


@dataclass(frozen=True)
class Codec:
    """A video format. coarsest, finest: the CRF at quality 0 and 100. muxing: options of the container.
    sound: the encoder of sound.
    """

    encoder: str
    container: str
    coarsest: int
    finest: int
    options: tuple[tuple[str, str], ...] = ()
    muxing: tuple[tuple[str, str], ...] = ()
    sound: str = "aac"

    def crf(self, quality: int) -> int:
        """The constant rate factor (CRF) of a quality from 0 to 100."""
        return max(self.finest, round((1 - quality / 100) * self.coarsest))


CODECS = {
    # H.264 at CRF 0 would be lossless, in a profile that browsers cannot play
    ".mp4": Codec("libx264", "mp4", 51, 1, muxing=(("movflags", "+faststart"),)),
    ".webm": Codec(
        "libvpx-vp9",
        "webm",
        63,
        0,
        (("b:v", "0"), ("deadline", "good"), ("cpu-used", "4"), ("row-mt", "1")),
        sound="libopus",
    ),
}


def write_video(
    path: Path,
    frames: np.ndarray | Frames,
    extension: str,
    fps: float,
    quality: int | None = None,
    preset: str = "fast",
    parameters: Mapping[str, object] | None = None,
    sound: Sound | None = None,
) -> None:
    """Write uint8 RGB frames [T, H, W, 3] as a video, with `parameters` as JSON in its comment.

    MP4 is H.264, WebM is VP9, both yuv420p with BT.709 colours; an odd height or width is padded by repeating
    the last row or column. quality: 0 to 100, None for 65. preset: of x264, MP4 only. A GIF has one palette
    for all frames, exact for up to 256 colours, and no quality. Its durations are in 1/100 s, rounded so that
    the video keeps its length. sound: written beside the frames, AAC in an MP4 and Opus in a WebM, cut or
    filled with silence to the length of the video; a GIF holds none. Only a GIF holds all frames in memory.
    """
    if extension == ".gif":
        if sound is not None:
            raise ValueError("a .gif holds no sound")
        _write_gif(path, frames.array() if isinstance(frames, Frames) else frames, fps, parameters)
    else:
        quality = DEFAULT_QUALITY if quality is None else quality
        _write_coded(path, frames, CODECS[extension], fps, quality, preset, parameters, sound)


def check_encoder(extension: str) -> None:
    """Raise UserError if the installed PyAV cannot write this format: some builds lack libx264."""
    import av

    if extension in CODECS and CODECS[extension].encoder not in av.codecs_available:
        others = ", ".join(other for other in VIDEO_EXTENSIONS if other != extension)
        missing = f"the installed PyAV has no {CODECS[extension].encoder} to write {extension}"
        raise UserError("output_file_name", f"output_file_name: {missing}; choose {others}")


def read_video_parameters(path: Path) -> dict[str, object]:
    """The parameters that `write_video` stored in an MP4 or WebM, {} if there are none."""
    import av

    with open(path, "rb") as file:
        extension = ".webm" if file.read(len(EBML)) == EBML else ".mp4"
    # name the format, because FFmpeg would take some text files for lists of other files
    with av.open(as_file(path), format=CODECS[extension].container, metadata_errors="replace") as container:
        tags = {name.lower(): text for name, text in container.metadata.items()}
    return read(tags.get("comment"))


def as_file(path: Path) -> str:
    """A path for FFmpeg, which would read names such as "http:", "pipe:1" and "concat:a|b" as URLs."""
    return f"file:{path}"


def _write_coded(
    path: Path,
    frames: np.ndarray | Frames,
    codec: Codec,
    fps: float,
    quality: int,
    preset: str,
    parameters: Mapping[str, object] | None,
    sound: Sound | None,
) -> None:
    import av
    import numpy as np
    from av.video.reformatter import ColorRange, Colorspace

    below, right = (side % 2 for side in frames.shape[1:3])
    rate = Fraction(fps).limit_denominator(1001)
    options = {"crf": str(codec.crf(quality)), **dict(codec.options)}
    if codec.encoder == "libx264":
        options["preset"] = preset
    with av.open(as_file(path), "w", format=codec.container, options=dict(codec.muxing)) as container:
        if parameters is not None:
            container.metadata["comment"] = as_text(parameters)
        stream = cast("av.VideoStream", container.add_stream(codec.encoder, rate=rate, options=options))
        stream.height, stream.width = frames.shape[1] + below, frames.shape[2] + right
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / rate
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        track = None if sound is None else _Track(container, codec, sound, len(frames) / rate)
        for index, pixels in enumerate(frames):
            even = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            frame = rgb.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
            if track is not None:  # beside its frames, so that a player need not seek
                track.write_until((index + 1) / rate)
        container.mux(stream.encode(None))
        if track is not None:
            track.close()


class _Track:
    """The sound of a file that is being written."""

    def __init__(self, container: OutputContainer, codec: Codec, sound: Sound, seconds: Fraction) -> None:
        import av
        import numpy as np

        channels = sound.samples.shape[1]
        if channels not in LAYOUTS:
            raise ValueError(f"sound has {channels} channels; files are written with 1 or 2")
        length = round(seconds * sound.rate)
        held = sound.samples[:length].T.astype(np.float32)
        self.samples = np.pad(held, ((0, 0), (0, length - held.shape[1])))
        self.rate, self.layout, self.at = sound.rate, LAYOUTS[channels], 0
        self.container = container
        self.stream = cast("av.AudioStream", container.add_stream(codec.sound, rate=sound.rate))
        self.stream.layout = self.layout
        self.resampler = av.AudioResampler(self.stream.format, self.layout, sound.rate)

    def write_until(self, seconds: Fraction) -> None:
        import av
        import numpy as np

        end = min(round(seconds * self.rate), self.samples.shape[1])
        if end > self.at:
            part = np.ascontiguousarray(self.samples[:, self.at : end])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self.layout)
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self.at, Fraction(1, self.rate)
            self.at = end
            for each in self.resampler.resample(frame):
                self.container.mux(self.stream.encode(each))

    def close(self) -> None:
        for each in self.resampler.resample(None):
            self.container.mux(self.stream.encode(each))
        self.container.mux(self.stream.encode(None))


def write_wav(path: Path, sound: Sound) -> None:
    """Write sound as 16-bit PCM."""
    import numpy as np

    whole = (np.clip(sound.samples, -1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(whole.shape[1])
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(whole.tobytes())


def _write_gif(path: Path, frames: np.ndarray, fps: float, parameters: Mapping[str, object] | None) -> None:
    first, *rest = _paletted(frames)
    ends = [round(100 * index / fps) for index in range(len(frames) + 1)]
    comment = b"" if parameters is None else as_ascii(parameters)
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    timing = {"duration": durations, "loop": 0, "disposal": 1}
    first.save(path, "GIF", save_all=True, append_images=rest, comment=comment, **timing)


def _paletted(frames: np.ndarray) -> Iterator[Image.Image]:
    """Frames with one palette: of all their colours, or if these are too many, of similar ones, dithered."""
    import numpy as np
    from PIL import Image

    from tinydiff.io import palette

    exact = palette.few(frames)
    if exact is None:
        chosen = palette.of_many(frames)
        holder = Image.new("P", (1, 1))
        holder.putpalette(chosen.tobytes())
        for pixels in frames:
            yield Image.fromarray(pixels).quantize(palette=holder, dither=Image.Dither.FLOYDSTEINBERG)
        return
    colours = np.stack([exact >> 16, exact >> 8 & 255, exact & 255], 1).astype(np.uint8)
    for pixels in frames:
        image = Image.fromarray(np.searchsorted(exact, palette.packed(pixels)).astype(np.uint8))
        image.putpalette(colours.tobytes())
        yield image
