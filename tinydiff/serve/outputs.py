"""Encodes a job's frames as files, with thumbnails and contact sheets of videos."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tinydiff.entries import Entries
from tinydiff.io import output
from tinydiff.records import Frames
from tinydiff.serve.jobs import Job, Output

if TYPE_CHECKING:
    import numpy

    from tinydiff.records import Request, Sound
    from tinydiff.serve.files import Files

MEDIA_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
    ".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif",
}  # fmt: skip
"""Extension -> media type."""


WAV = "audio/wav"
"""Media type of sound beside a video."""
THUMBNAIL = 512
"""Pixels of the longest side of a thumbnail; a smaller frame keeps its size."""
TILE = 256
"""Pixels of the longest side of a frame on a sheet."""
TILES = 16
"""Frames on a sheet at most."""


def plan(job: Job, request: Request, folder: Path) -> tuple[output.Target, output.Encoding]:
    """How each output of a job is written. Raises UserError for an impossible format or quality."""
    is_video = request.output.num_frames > 1
    extension = job.answer.get("output_format") or ("mp4" if is_video else "png")
    target = output.plan_target(
        folder, f"{job.id}.{extension}", video=is_video, with_alpha=request.output.layers > 0
    )
    output.check_size(target, *request.output.saved_size)
    if job.fields.get("save_audio"):
        output.check_sound(is_video, request.output.sound)
    chosen = {
        name: job.fields[name]
        for name in ("output_quality", "output_compression", "x264_preset")
        if name in job.fields
    }
    return target, output.plan_encoding(target, request.output.saved_fps, **chosen)


def save(
    job: Job,
    request: Request,
    files: Files,
    frames: numpy.ndarray | Frames,
    seed: int,
    parameters: Entries,
    sound: Sound | None = None,
) -> list[Output]:
    """Encode one output of a job, uint8 [T, H, W, 3 or 4] with its sound, and store its files.

    A video also gets a thumbnail and a contact sheet, of its frames as they were decoded, and a WAV file of
    its sound where that is asked for. Layers are stored one by one.
    """
    with tempfile.TemporaryDirectory() as folder:
        target, encoding = plan(job, request, Path(folder))
        media_type = MEDIA_TYPES[target.extension.lower()]
        layers = [layer[None] for layer in frames] if request.output.layers else [frames]
        outputs = []
        for index, part in enumerate(layers):
            path = target.path(index, len(layers))
            output.write(
                path,
                target.extension,
                part,
                encoding,
                {**parameters, "seed": seed, **({"layer": index} if request.output.layers else {})},
                sound,
            )
            size = path.stat().st_size
            outputs.append(Output(files.put(path, media_type, path.name, job.owner), media_type, size, seed))
        if job.fields.get("save_audio") and sound is not None:
            path = output.save_sound(target.path(0, 1), sound)
            size = path.stat().st_size
            outputs.append(Output(files.put(path, WAV, path.name, job.owner), WAV, size, seed, "audio"))
    if request.output.num_frames > 1:
        for variant, draw in (("thumbnail", thumbnail), ("spritesheet", spritesheet)):
            data = draw(frames.decoded if isinstance(frames, Frames) else frames)
            id = files.put(data, "image/webp", f"{job.id}-{variant}.webp", job.owner)
            outputs.append(Output(id, "image/webp", len(data), seed, variant))
    return outputs


def remove(outputs: Iterable[Output], files: Files) -> None:
    """Delete the files of outputs that belong to no job."""
    for each in outputs:
        files.delete(each.file)


def thumbnail(frames: numpy.ndarray) -> bytes:
    """The first of the frames, uint8 [T, H, W, 3], as WebP."""
    from tinydiff.io.images import encode_image

    return encode_image(_fitted(frames[0], THUMBNAIL), ".webp")


def spritesheet(frames: numpy.ndarray) -> bytes:
    """A contact sheet as WebP: up to `TILES` frames, uint8 [T, H, W, 3], at even distances, row by row."""
    import numpy as np

    from tinydiff.io.images import encode_image

    count = min(TILES, len(frames))
    tiles = [_fitted(frames[round(place)], TILE) for place in np.linspace(0, len(frames) - 1, count)]
    columns = math.ceil(math.sqrt(count))
    tiles += [np.zeros_like(tiles[0])] * (-count % columns)
    rows = [np.concatenate(tiles[start : start + columns], axis=1) for start in range(0, len(tiles), columns)]
    return encode_image(np.concatenate(rows), ".webp")


def _fitted(frame: numpy.ndarray, longest: int) -> numpy.ndarray:
    """The frame, scaled down so that no side is longer than `longest`."""
    from tinydiff.io.images import resize

    height, width = frame.shape[:2]
    scale = min(1.0, longest / max(height, width))
    return frame if scale == 1 else resize(frame, max(1, round(height * scale)), max(1, round(width * scale)))
