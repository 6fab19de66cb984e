"""From frames to named files: what a request's output options mean, checked before any work, and the file
written whole.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydiff import paths
from tinydiff.io.atomic import write_new
from tinydiff.io.images import ALPHA_EXTENSIONS, IMAGE_EXTENSIONS, encode_image, read_image_parameters
from tinydiff.io.video import (
    VIDEO_EXTENSIONS,
    X264_PRESETS,
    check_encoder,
    read_video_parameters,
    write_video,
)
from tinydiff.records import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

FRAMES = "/"
"""The extension of a directory of PNG frames."""

QUALITIES = {"maximum": 100, "high": 90, "medium": 55, "low": 35, "default": None}

LONGEST_NAME = 200
"""Bytes of a file name, leaving room for the numbers that follow it (file systems end at 255)."""


LONGEST_SIDE = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535, ".mp4": 16_384}
"""Pixels of height and of width that formats, or their encoders here, can hold."""


@dataclass(frozen=True)
class Target:
    """Where outputs go: `directory / stem` with `extension`, one of `IMAGE_EXTENSIONS`, `VIDEO_EXTENSIONS` or `FRAMES`,
    spelled as the user did.
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
    """How frames are encoded. fps: frames a second. quality: 0 to 100, None for the format's default. preset:
    of x264.
    """

    fps: float = 16.0
    quality: int | None = None
    preset: str = "fast"


def names_video(name: str | None) -> bool:
    """Whether a file name has an extension that only videos have."""
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
    """Where the outputs of one prompt go. The name's extension decides the format; without a name one is made of
    prompt, seed and time.

    video: whether the request makes several frames. A video whose name ends in "/" or in no extension becomes a
    directory of PNG frames; an image without extension is a PNG. alpha: whether the images are layers, which
    not every format holds. Raises UserError for an extension that is unknown or of the other kind.
    """
    directory = paths.path(output_path, "output_path")
    if output_file_name is None:
        return Target(
            directory, _default_stem(prompt, seed, now or datetime.now()), ".mp4" if video else ".png"
        )
    name = output_file_name.removesuffix("/")
    if not name or name in (".", "..") or "/" in name or "\0" in name or not 0 < _bytes(name) <= LONGEST_NAME:
        rule = f"a file name of 1 to {LONGEST_NAME} bytes without '/' (the directory is output_path)"
        raise UserError("output_file_name", f"output_file_name: {output_file_name!r} must be {rule}")
    if name != output_file_name:
        return Target(directory, name, FRAMES)
    extension = _extension(name)
    allowed, other = (VIDEO_EXTENSIONS, IMAGE_EXTENSIONS) if video else (IMAGE_EXTENSIONS, VIDEO_EXTENSIONS)
    if not extension:
        return Target(directory, name, FRAMES if video else ".png")
    if extension.lower() not in allowed:
        kind = "a video" if video else "an image"
        choices = f"{', '.join(allowed)}{' or a name ending in / for a directory of frames' if video else ''}"
        wrong = (
            f"this request makes {kind}"
            if extension.lower() in other
            else f"{extension!r} is not a known extension"
        )
        hint = "" if extension.lower() in other else nearest(extension.lower(), allowed)
        raise UserError(
            "output_file_name",
            f"output_file_name: {output_file_name!r}: {wrong}; {kind} may be {choices}{hint}",
        )
    if with_alpha and extension.lower() not in ALPHA_EXTENSIONS:
        choices = f"{', '.join(ALPHA_EXTENSIONS)} or a name ending in / for a directory of them"
        raise UserError(
            "output_file_name",
            f"output_file_name: {output_file_name!r}: layers have alpha, so they may be {choices}",
        )
    return Target(directory, name.removesuffix(extension), extension)


def plan_encoding(
    target: Target,
    fps: float = 16.0,
    output_quality: str = "default",
    output_compression: int | None = None,
    x264_preset: str | None = None,
) -> Encoding:
    """Check and join the encoding options. Quality is a preset's name (`QUALITIES`) or `output_compression`,
    0 to 100.

    PNG, and so a directory of frames, is lossless and meets every quality. Raises UserError for a value out
    of range and for an option that the target's format has no use for.
    """
    extension = target.extension.lower()
    if output_quality not in QUALITIES:
        choices = ", ".join(QUALITIES)
        raise UserError(
            "output_quality",
            f"output_quality: {output_quality!r} is not one of {choices}{nearest(output_quality, QUALITIES)}",
        )
    if output_compression is not None and output_quality != "default":
        raise UserError(
            "output_compression",
            "output_compression: give either output_compression or output_quality, not both",
        )
    if output_compression is not None and not 0 <= output_compression <= 100:
        raise UserError(
            "output_compression", f"output_compression: {output_compression} must be from 0 to 100"
        )
    quality = QUALITIES[output_quality] if output_compression is None else output_compression
    if quality is not None and extension == ".gif":
        field = "output_quality" if output_compression is None else "output_compression"
        raise UserError(
            field, f"{field}: a GIF has no quality to choose; leave it out or choose .mp4 or .webm"
        )
    if x264_preset is not None and extension != ".mp4":
        raise UserError(
            "x264_preset",
            f"x264_preset: {x264_preset!r} applies to .mp4 only, and the output is {target.extension!r}",
        )
    if x264_preset is not None and x264_preset not in X264_PRESETS:
        hint = nearest(x264_preset, X264_PRESETS)
        raise UserError(
            "x264_preset", f"x264_preset: {x264_preset!r} is not one of {', '.join(X264_PRESETS)}{hint}"
        )
    most = 50 if extension == ".gif" else 1000
    if not (math.isfinite(fps) and 0 < fps <= most):
        raise UserError(
            "fps", f"fps: {fps} must be above 0 and at most {most}{' in a GIF' if most == 50 else ''}"
        )
    check_encoder(extension)
    return Encoding(float(fps), quality, x264_preset or "fast")


def check_size(target: Target, height: int, width: int) -> None:
    """Raise UserError for a size that the target's format cannot hold."""
    extension = target.extension.lower()
    most = LONGEST_SIDE.get(extension, math.inf)
    for field, pixels in (("height", height), ("width", width)):
        if pixels > most:
            others = ", ".join(
                other
                for other in (IMAGE_EXTENSIONS if extension in IMAGE_EXTENSIONS else VIDEO_EXTENSIONS)
                if _fits(other, pixels)
            )
            raise UserError(
                field,
                f"{field}: {pixels} is more than the {most} pixels that {extension} can hold; choose {others}",
            )


def _fits(extension: str, pixels: int) -> bool:
    return pixels <= LONGEST_SIDE.get(extension, math.inf)


def check_writable(directory: Path, name: str = "", field: str = "output_path") -> None:
    """Prove that a file `name` can be made in `directory`, which need not exist yet, leaving nothing behind.
    Raises UserError.
    """
    place, missing = directory.absolute(), []
    while not os.path.lexists(place) and place != place.parent:
        missing.insert(0, place.name)
        place = place.parent
    if paths.kind(place) != "directory":
        raise UserError(field, f"{field}: {str(directory)!r} cannot be a directory: {str(place)!r} is a file")
    try:
        with tempfile.TemporaryDirectory(
            prefix=".", dir=place
        ) as trial:  # the names as they will be: not every file system takes all
            inside = Path(trial, *missing)
            inside.mkdir(parents=True, exist_ok=True)
            if name:
                (inside / name).touch(exist_ok=False)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(field, f"{field}: {str(directory / name)!r} cannot be written ({reason})") from error


def save(
    target: Target,
    frames: np.ndarray,
    encoding: Encoding,
    parameters: Mapping[str, Any] | None = None,
    index: int = 0,
    count: int = 1,
) -> Path:
    """Write output `index` of `count`, uint8 frames [T, H, W, 3 or 4] (T = 1 for an image), and return the
    path it got.

    A name already taken gets the next free number, `name-1.png`; nothing is overwritten and nothing
    half-written is left. Raises UserError when the disk is full or refuses.
    """
    return write_new(
        target.path(index, count), lambda path: write(path, target.extension, frames, encoding, parameters)
    )


def write(
    path: Path,
    extension: str,
    frames: np.ndarray,
    encoding: Encoding,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Write frames as `save` takes them to `path`, which nobody else may see yet: a file with that extension, or a
    directory of frames.
    """
    extension = extension.lower()
    channels = (3, 4) if extension in (*ALPHA_EXTENSIONS, FRAMES) else (3,)
    if frames.ndim != 4 or frames.shape[3] not in channels or str(frames.dtype) != "uint8":
        raise ValueError(
            f"frames are uint8 [T, H, W, {' or '.join(map(str, channels))}], not {frames.dtype} {list(frames.shape)}"
        )
    if extension == FRAMES:
        path.mkdir()
        for number, frame in enumerate(frames):
            (path / f"{number:05d}.png").write_bytes(encode_image(frame, ".png", None, parameters))
    elif extension in IMAGE_EXTENSIONS:
        if len(frames) != 1:
            raise ValueError(f"{extension} holds one frame, not {len(frames)}")
        path.write_bytes(encode_image(frames[0], extension, encoding.quality, parameters))
    else:
        write_video(path, frames, extension, encoding.fps, encoding.quality, encoding.preset, parameters)


def read_parameters(path: Path) -> dict[str, Any]:
    """The generation parameters stored in a file (or a directory of frames) by `save`; {} if it holds none."""
    if path.is_dir():
        return read_parameters(path / "00000.png")
    return (read_video_parameters if path.suffix.lower() in (".mp4", ".webm") else read_image_parameters)(
        path
    )


def _extension(name: str) -> str:
    """What looks like a file extension, case kept: `.png` of "a.png", nothing of "v1.5" or "take"."""
    found = re.search(r"(?<=.)\.[A-Za-z][A-Za-z0-9]{1,4}$", name)
    return found.group() if found else ""


def _bytes(name: str) -> int:
    """How long the file system finds a name; 0 for one that it cannot spell."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        return 0


def _default_stem(prompt: str, seed: int, now: datetime) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.lower())
    encoding = sys.getfilesystemencoding()
    short = words.encode(encoding, "ignore")[:80].decode(encoding, "ignore").strip("-") or "untitled"
    return f"{short}-{seed}-{now:%Y%m%d-%H%M%S}"
