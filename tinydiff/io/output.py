"""Output files: the output options of a request, checked before any work, and writing the frames."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tinydiff import paths
from tinydiff.entries import Entries, EntryDict
from tinydiff.io.atomic import write_new
from tinydiff.io.images import ALPHA_EXTENSIONS, IMAGE_EXTENSIONS, encode_image, read_image_parameters
from tinydiff.io.video import (
    CODECS,
    VIDEO_EXTENSIONS,
    X264_PRESETS,
    check_encoder,
    read_video_parameters,
    write_video,
    write_wav,
)
from tinydiff.records import Frames, Sound, UserError, nearest

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

FRAMES = "/"
"""Stands for the extension of a directory of PNG frames."""

QUALITIES = {"maximum": 100, "high": 90, "medium": 55, "low": 35, "default": None}

LONGEST_NAME = 200
"""Most bytes of a file name, with room for a number (file systems allow 255)."""


LONGEST_SIDE = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535, ".mp4": 16_384}
"""Extension -> the most pixels of height or width that the format or its encoder allows."""


@dataclass(frozen=True)
class Target:
    """Where the outputs of a prompt go.

    extension: one of `IMAGE_EXTENSIONS`, `VIDEO_EXTENSIONS` or `FRAMES`, spelled as the user did.
    """

    directory: Path
    stem: str
    extension: str

    def path(self, index: int, count: int) -> Path:
        """The name of output `index` of `count`: several are numbered `_0`, `_1`, ..."""
        number = f"_{index}" if count > 1 else ""
        return self.directory / f"{self.stem}{number}{'' if self.extension == FRAMES else self.extension}"


@dataclass(frozen=True)
class Encoding:
    """How frames are encoded. quality: 0 to 100, None for the format's default. preset: of x264."""

    fps: float = 16.0
    quality: int | None = None
    preset: str = "fast"


def names_video(name: str | None) -> bool:
    """Whether a file name has an extension of videos."""
    return name is not None and (name.endswith("/") or _extension(name).lower() in VIDEO_EXTENSIONS)


def plan_target(
    output_path: str | Path,
    output_file_name: str | None,
    *,
    video: bool,
    with_alpha: bool = False,
    prompt: str = "",
    seed: int = 0,
    now: datetime | None = None,
) -> Target:
    """Where the outputs of one prompt go. Without a file name, one is made of prompt, seed and time.

    The extension selects the format. video: whether the request makes several frames. A video whose name ends
    in "/" or has no extension becomes a directory of PNG frames; an image without extension is a PNG.
    with_alpha: whether the images have alpha, as layers do. Raises UserError for an extension that is unknown
    or does not fit.
    """
    directory = paths.path(output_path, "output_path")
    if output_file_name is None:
        stem = _default_stem(prompt, seed, now or datetime.now())
        return Target(directory, stem, ".mp4" if video else ".png")
    name = output_file_name.removesuffix("/")
    if not name or name in (".", "..") or "/" in name or "\0" in name or not 0 < _bytes(name) <= LONGEST_NAME:
        rule = f"a file name of 1 to {LONGEST_NAME} bytes without '/' (the directory is output_path)"
        raise UserError("output_file_name", f"output_file_name: {output_file_name!r} must be {rule}")
    if name != output_file_name:
        return Target(directory, name, FRAMES)
    extension = _extension(name)
    if not extension:
        return Target(directory, name, FRAMES if video else ".png")
    if reason := _unfit(extension.lower(), video, with_alpha):
        raise UserError("output_file_name", f"output_file_name: {output_file_name!r}: {reason}")
    return Target(directory, name.removesuffix(extension), extension)


def _unfit(extension: str, video: bool, with_alpha: bool) -> str:
    """Why an extension does not fit the request; "" if it does."""
    allowed, other = IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
    if video:
        allowed, other = other, allowed
    if extension not in allowed:
        kind, directory = (
            ("a video", " or a name ending in / for a directory of frames") if video else ("an image", "")
        )
        choices = f"{kind} may be {', '.join(allowed)}{directory}"
        if extension in other:
            return f"this request makes {kind}; {choices}"
        return f"{extension!r} is not a known extension; {choices}{nearest(extension, allowed)}"
    if with_alpha and extension not in ALPHA_EXTENSIONS:
        choices = f"{', '.join(ALPHA_EXTENSIONS)} or a name ending in / for a directory of them"
        return f"layers have alpha, so they may be {choices}"
    return ""


def plan_encoding(
    target: Target,
    fps: float = 16.0,
    output_quality: str = "default",
    output_compression: int | None = None,
    x264_preset: str | None = None,
) -> Encoding:
    """The encoding options, checked. Quality is a name of `QUALITIES`, or `output_compression` from 0 to 100.

    PNG, and so a directory of frames, is lossless and accepts every quality. Raises UserError for a value out
    of range and for an option that does not apply to the format.
    """
    extension = target.extension.lower()
    quality = _quality(extension, output_quality, output_compression)
    if x264_preset is not None:
        _check_preset(x264_preset, target.extension)
    most = 50 if extension == ".gif" else 1000
    if not (math.isfinite(fps) and 0 < fps <= most):
        where = " in a GIF" if extension == ".gif" else ""
        raise UserError("fps", f"fps: {fps} must be above 0 and at most {most}{where}")
    check_encoder(extension)
    return Encoding(float(fps), quality, x264_preset or "fast")


def _quality(extension: str, name: str, number: int | None) -> int | None:
    """0 to 100, None for the format's default. name, number: output_quality, output_compression."""
    if name not in QUALITIES:
        choices = f"{', '.join(QUALITIES)}{nearest(name, QUALITIES)}"
        raise UserError("output_quality", f"output_quality: {name!r} is not one of {choices}")
    field = "output_quality" if number is None else "output_compression"
    if number is not None and name != "default":
        raise UserError(field, f"{field}: give either output_compression or output_quality, not both")
    if number is not None and not 0 <= number <= 100:
        raise UserError(field, f"{field}: {number} must be from 0 to 100")
    quality = QUALITIES[name] if number is None else number
    if quality is not None and extension == ".gif":
        raise UserError(field, f"{field}: a GIF has no quality; leave it out or choose .mp4 or .webm")
    return quality


def _check_preset(preset: str, extension: str) -> None:
    if extension.lower() != ".mp4":
        message = f"{preset!r} applies to .mp4 only, and the output is {extension!r}"
        raise UserError("x264_preset", f"x264_preset: {message}")
    if preset not in X264_PRESETS:
        choices = f"{', '.join(X264_PRESETS)}{nearest(preset, X264_PRESETS)}"
        raise UserError("x264_preset", f"x264_preset: {preset!r} is not one of {choices}")


def check_size(target: Target, height: int, width: int) -> None:
    """Raise UserError for a size that the target's format does not allow."""
    extension = target.extension.lower()
    kinds = IMAGE_EXTENSIONS if extension in IMAGE_EXTENSIONS else VIDEO_EXTENSIONS
    most = LONGEST_SIDE.get(extension, math.inf)
    for field, pixels in (("height", height), ("width", width)):
        if pixels > most:
            others = ", ".join(other for other in kinds if pixels <= LONGEST_SIDE.get(other, math.inf))
            message = f"{pixels} is more than the {most} pixels that {extension} allows; choose {others}"
            raise UserError(field, f"{field}: {message}")


def check_writable(directory: Path, name: str = "", field: str = "output_path") -> None:
    """Prove that a file `name` can be made in `directory`, which may not exist yet. Leaves nothing behind.

    Raises UserError.
    """
    existing, missing = directory.absolute(), []
    while not os.path.lexists(existing) and existing != existing.parent:
        missing.insert(0, existing.name)
        existing = existing.parent
    if paths.kind(existing) != "directory":
        message = f"{str(directory)!r} cannot be a directory: {str(existing)!r} is a file"
        raise UserError(field, f"{field}: {message}")
    try:
        # try the real names, because not every file system takes all of them
        with tempfile.TemporaryDirectory(prefix=".", dir=existing) as trial:
            inside = Path(trial, *missing)
            inside.mkdir(parents=True, exist_ok=True)
            if name:
                (inside / name).touch(exist_ok=False)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(field, f"{field}: {str(directory / name)!r} cannot be written ({reason})") from error


def save(
    target: Target,
    frames: np.ndarray | Frames,
    encoding: Encoding,
    parameters: Entries | None = None,
    index: int = 0,
    count: int = 1,
    sound: Sound | None = None,
) -> Path:
    """Write output `index` of `count`, uint8 frames [T, H, W, 3 or 4] (T = 1 for an image). Returns its path.

    If the name exists, the next free number is added: `name-1.png`. Nothing is overwritten, and no partial
    file is left. Raises UserError if the disk is full or refuses.
    """
    return write_new(
        target.path(index, count),
        lambda path: write(path, target.extension, frames, encoding, parameters, sound),
    )


def check_sound(video: bool, sound: bool) -> None:
    """Raises UserError where sound is to be written and there is none. video: whether there are frames."""
    if not sound:
        why = "this output has no sound" if video else "an image has no sound"
        raise UserError("save_audio", f"save_audio: {why} that could be written; leave it out")


def save_sound(video: Path, sound: Sound) -> Path:
    """Write sound as a WAV file beside its video. Returns its path; see `save` for names and errors."""
    return write_new(video.with_suffix(".wav"), lambda path: write_wav(path, sound))


def write(
    path: Path,
    extension: str,
    frames: np.ndarray | Frames,
    encoding: Encoding,
    parameters: Entries | None = None,
    sound: Sound | None = None,
) -> None:
    """Write frames as those of `save` to a new `path`: a file of that format, or a directory of frames.

    sound: goes into an MP4 or WebM. A warning says where a format holds none.
    """
    extension = extension.lower()
    if sound is not None and extension not in CODECS:
        log.warning("%s: the sound is left out, only %s hold any", path.name, " and ".join(CODECS))
    channels = (3, 4) if extension in (*ALPHA_EXTENSIONS, FRAMES) else (3,)
    kind = "uint8" if isinstance(frames, Frames) else str(frames.dtype)
    if len(frames.shape) != 4 or frames.shape[3] not in channels or kind != "uint8":
        allowed = " or ".join(map(str, channels))
        raise ValueError(f"frames are uint8 [T, H, W, {allowed}], not {kind} {list(frames.shape)}")
    if extension == FRAMES:
        path.mkdir()
        for number, frame in enumerate(frames):
            (path / f"{number:05d}.png").write_bytes(encode_image(frame, ".png", None, parameters))
    elif extension in IMAGE_EXTENSIONS:
        if len(frames) != 1:
            raise ValueError(f"{extension} holds one frame, not {len(frames)}")
        [frame] = frames
        path.write_bytes(encode_image(frame, extension, encoding.quality, parameters))
    else:
        write_video(
            path,
            frames,
            extension,
            encoding.fps,
            encoding.quality,
            encoding.preset,
            parameters,
            sound if extension in CODECS else None,
        )


def read_parameters(path: Path) -> EntryDict:
    """The generation parameters that `save` stored in a file or directory of frames, {} if there are none."""
    if path.is_dir():
        return read_parameters(path / "00000.png")
    is_video = path.suffix.lower() in (".mp4", ".webm")
    return read_video_parameters(path) if is_video else read_image_parameters(path)


def _extension(name: str) -> str:
    """A file name's extension, case kept: `.png` of "a.png", "" of "v1.5" and "take"."""
    match = re.search(r"(?<=.)\.[A-Za-z][A-Za-z0-9]{1,4}$", name)
    return match.group() if match else ""


def _bytes(name: str) -> int:
    """Length of a name in the file system's encoding; 0 if it cannot be encoded."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        return 0


def _default_stem(prompt: str, seed: int, now: datetime) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.lower())
    encoding = sys.getfilesystemencoding()
    short = words.encode(encoding, "ignore")[:80].decode(encoding, "ignore").strip("-") or "untitled"
    return f"{short}-{seed}-{now:%Y%m%d-%H%M%S}"
