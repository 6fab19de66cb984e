"""Decodes input images and sounds with bounds on the work, in a process that does nothing else.

No torch here.

A few bytes of an image file may ask for any number of pixels, scans or entries. What can be counted is
counted before decoding. The process bounds the rest: `decoder` limits its time, it limits its own memory, and
it exits after a large image so that the memory is returned to the system.
"""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tinydiff.entries import EntryDict
from tinydiff.records import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFile

MAGIC = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/bmp": re.compile(rb"BM"),
    "image/avif": re.compile(rb"....ftyp(?:avif|avis|mif1|msf1|miaf)", re.DOTALL),
}
"""Media type -> the first bytes of such a file."""

FORMATS = {
    "image/png": ["PNG"], "image/jpeg": ["JPEG", "MPO"], "image/webp": ["WEBP"],
    "image/gif": ["GIF"], "image/bmp": ["BMP", "DIB"], "image/avif": ["AVIF"],
}  # fmt: skip
"""Media type -> Pillow's formats. MPO is a JPEG with more images behind it, as phones write it."""

SOUNDS = {
    "audio/wav": re.compile(rb"RIFF....WAVE", re.DOTALL),
    "audio/flac": re.compile(rb"fLaC"),
    "audio/ogg": re.compile(rb"OggS"),
    "audio/mpeg": re.compile(rb"ID3|\xff[\xe0-\xff]"),
    "video/mp4": re.compile(rb"....ftyp", re.DOTALL),
    "video/webm": re.compile(rb"\x1aE\xdf\xa3"),
}
"""Media type of a file with sound -> its first bytes. MP3 begins as raw AAC does, MP4 as M4A and MOV do."""
SHOWN_SOUNDS = "WAV, FLAC, Ogg, MP3, AAC, MP4, WebM"
SOUND_BYTES = 2**31
"""Memory for decoding a sound of the longest allowed time."""

SHOWN_FORMATS = "PNG, JPEG, WebP, GIF, BMP, AVIF"

MOST_MARKERS = 5000
"""Segments of a JPEG; a large colour profile and metadata need some hundreds."""
MOST_SCANS = 64
"""Scans of a progressive JPEG; encoders make about ten."""
MOST_PASSES = 16
"""All scans of a JPEG together may decode this many times the allowed number of pixels."""

BYTES_A_PIXEL, BYTES = 32, 2**28
"""Memory for decoding: bytes for each allowed pixel, and a constant."""
LARGE = 2**22
"""The process exits after an image with more pixels than this."""

_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_SCAN, _END, _ALONE = 0xDA, 0xD9, (0x01, 0xD8)


def media_type(data: bytes, field: str) -> str:
    """The media type of an image, from its first bytes. Raises UserError naming `field`."""
    for name, begins in MAGIC.items():
        if begins.match(data):
            return name
    raise UserError(field, f"{field}: is empty") if not data else unreadable(field)


def sound_type(data: bytes, field: str) -> str:
    """The media type of a file with sound, from its first bytes. Raises UserError naming `field`."""
    for name, begins in SOUNDS.items():
        if begins.match(data):
            return name
    if not data:
        raise UserError(field, f"{field}: is empty")
    raise UserError(field, f"{field}: is no sound in a supported format ({SHOWN_SOUNDS})")


def unreadable(field: str) -> UserError:
    """The mistake of a file that is not a whole image."""
    return UserError(field, f"{field}: is not a complete image in a supported format ({SHOWN_FORMATS})")


def pixels(
    data: bytes, field: str, most_pixels: float, with_alpha: bool = False, mask: bool = False
) -> np.ndarray:
    """The pixels of one whole image of `FORMATS`, upright, as sRGB uint8 [H, W, 3].

    With `alpha` they are RGBA [H, W, 4].

    mask: of a mask in OpenAI's form, which is transparent where the image is inpainted, in ours, white there;
    any other as it is. Raises UserError naming `field` for an animation, and for what has too many pixels or
    scans, counted before anything is unpacked.
    """
    from PIL import Image

    from tinydiff.io import decode

    kind = media_type(data, field)
    try:
        with _opened(data, kind) as opened:
            width, height = opened.size
            if width * height > most_pixels:
                allowed = f"at most {most_pixels:,.0f} are allowed"
                raise UserError(field, f"{field}: has {width}x{height} pixels; {allowed}")
            if kind == "image/jpeg":
                _count_scans(data, field, width * height, most_pixels)
            elif getattr(opened, "is_animated", False):
                raise UserError(field, f"{field}: is an animation; send a single image")
            opened.load()
            return _mask(opened, field) if mask else decode.srgb(opened, with_alpha, field)
    except UserError:
        raise
    except Image.DecompressionBombError:
        allowed = f"at most {most_pixels:,.0f} are allowed"
        raise UserError(field, f"{field}: has too many pixels; {allowed}") from None
    except MemoryError:
        raise UserError(
            field, f"{field}: needs more memory to decode than this server allows for one image"
        ) from None
    except decode.NoWhiteLevel as error:
        raise UserError(field, f"{field}: {error}") from None
    except Exception as error:  # decoders raise many kinds of errors for crafted files
        raise unreadable(field) from error


def _opened(data: bytes, kind: str) -> ImageFile.ImageFile:
    """The image of these bytes with only its header read. A JPEG's segments are counted before that."""
    from PIL import Image

    if kind == "image/jpeg" and sum(1 for _ in _segments(data)) > MOST_MARKERS:
        raise ValueError(f"more than {MOST_MARKERS} segments")
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS[kind] if name in Image.OPEN])


def _segments(data: bytes) -> list[int]:
    """The markers of a JPEG, up to one more than are allowed. Segments, such as a thumbnail, are skipped."""
    found: list[int] = []
    at = 2
    while len(found) <= MOST_MARKERS and (match := _MARKER.search(data, at)) is not None:
        marker, at = match[1][0], match.end()
        found.append(marker)
        if marker == _END:
            break
        if marker not in _ALONE and len(data) >= at + 2:
            at += int.from_bytes(data[at : at + 2], "big")
    return found


def _count_scans(data: bytes, field: str, pixels: int, most_pixels: float) -> None:
    """Raise UserError for a JPEG with too many scans for its size."""
    scans = _segments(data).count(_SCAN)
    if scans > MOST_SCANS or scans * pixels > MOST_PASSES * most_pixels:
        raise UserError(
            field, f"{field}: has {scans} scans, too many for its size; save it as a baseline JPEG or a PNG"
        )


def _mask(opened: ImageFile.ImageFile, field: str) -> np.ndarray:
    from tinydiff.io import decode

    image = decode.srgb(opened, True, field)
    alpha = image[..., 3:]
    return image[..., :3] if (alpha == 255).all() else (255 - alpha).repeat(3, axis=2)


# --- the process ---


def send(stream: IO[bytes], head: EntryDict, data: bytes | memoryview) -> None:
    """Write a message: JSON and bytes."""
    words = json.dumps(head).encode()
    stream.write(struct.pack(">II", len(words), len(data)) + words)
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[EntryDict, bytearray]:
    """Read a message. Raises EOFError where the other process has ended."""
    words, size = struct.unpack(">II", _exactly(stream, 8))
    return json.loads(_exactly(stream, words)), _exactly(stream, size)


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = stream.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise EOFError
        done += count
    return data


def main() -> None:
    """Answer messages until the input ends or an image was large."""
    from tinydiff.io import decode  # noqa: F401  imported before the memory is limited

    source, sink, bounded = sys.stdin.buffer, sys.stdout.buffer, False
    with suppress(EOFError):
        while True:
            ask, data = receive(source)
            answer = _sound if "rate" in ask else _image
            if not bounded:
                bounded = True
                _bound_memory(_allowed(ask))
            try:
                head, values = answer(bytes(data), ask)
            except UserError as error:
                send(sink, {"error": str(error)}, b"")
                continue
            send(sink, head, values)
            if head["last"]:
                return


def _allowed(ask: EntryDict) -> int:
    """Bytes of memory for what is asked."""
    if "rate" not in ask:
        return int(BYTES_A_PIXEL * float(ask["most_pixels"])) + BYTES
    import av  # noqa: F401  before the memory is limited

    return SOUND_BYTES


def _image(data: bytes, ask: EntryDict) -> tuple[EntryDict, memoryview]:
    import numpy as np

    image = np.ascontiguousarray(pixels(data, **ask))
    return {"shape": image.shape, "last": image.size > 3 * LARGE}, image.data.cast("B")


def _sound(data: bytes, ask: EntryDict) -> tuple[EntryDict, bytes]:
    """The samples that are heard, and behind them those of the sound that is kept."""
    from tinydiff.io import audio

    try:
        speech = audio.read(data, **ask)
    except MemoryError:
        field = ask["field"]
        message = f"{field}: needs more memory to decode than this server allows for one sound"
        raise UserError(field, message) from None
    sound = speech.sound
    head = {"heard": len(speech.samples), "shape": sound.samples.shape, "rate": sound.rate, "last": True}
    return head, speech.samples.tobytes() + sound.samples.tobytes()


def _bound_memory(more: int) -> None:
    """Limit this process to `more` bytes beyond what it has, where the system supports that."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
