"""Reading images from any source; writing PNG, JPEG and WebP with the generation parameters inside."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tinydiff.io import given
from tinydiff.io.parameters import as_ascii, as_text, read
from tinydiff.records import UserError

if TYPE_CHECKING:
    import numpy as np

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")

ALPHA_EXTENSIONS = (".png", ".webp")
"""Extensions of the formats that support alpha."""

DEFAULT_QUALITY = {".jpg": 95, ".jpeg": 95, ".webp": 90}

PROGRAMS = ("EPS",)
"""Formats that are programs, which Pillow would run in Ghostscript: they are not read."""

JPEG_COMMENT = 60_000
"""Most bytes of parameters in a JPEG, whose segments end at 65,535."""

USER_COMMENT, EXIF_IFD, ASCII = 0x9286, 0x8769, b"ASCII\0\0\0"
"""EXIF: the tag of the comment, its directory, and the prefix that names its character set."""


def read_image(source: str | Path, field: str = "image_path", with_alpha: bool = False) -> np.ndarray:
    """The image at a path, http(s) URL or data URI as uint8 sRGB [H, W, 3], or [H, W, 4] with alpha.

    The EXIF orientation and an embedded colour profile are applied, transparency is composited on white or
    kept, deeper samples become 8 bits, and of an animation the first frame counts. The content decides the
    format, not the name. Raises UserError if it is missing, too large or not an image.
    """
    from PIL import Image

    from tinydiff.io import decode

    source_name, data = given.name(source), given.read_bytes(source, field)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as opened:
            return decode.srgb(opened, with_alpha, f"{field}: {source_name}")
    except decode.NoWhiteLevel as error:
        raise UserError(field, f"{field}: {source_name} {error}") from error
    except Image.DecompressionBombError as error:
        raise UserError(field, f"{field}: {source_name} is too large an image ({error})") from error
    except Exception as error:  # decoders fail in many ways on malformed files
        message = f"{source_name} is not an image that can be read (PNG, JPEG, WebP, GIF, ... are)"
        raise UserError(field, f"{field}: {message}") from error


def _formats() -> list[str]:
    """The formats that Pillow reads without another program."""
    from PIL import Image

    Image.init()
    return [name for name in Image.OPEN if name not in PROGRAMS]


def resize(image: np.ndarray, height: int, width: int, method: str = "lanczos") -> np.ndarray:
    """uint8 [H, W, C] resized by Pillow: "lanczos" (diffusers' default), "bicubic", "bilinear", "nearest"."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[method.upper()]))


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] resized to cover the size with its aspect kept, then cut at its centre."""
    tall, wide = image.shape[:2]
    if width * tall > wide * height:
        tall, wide = tall * width // wide, width
    else:
        tall, wide = height, wide * height // tall
    top, left = tall // 2 - height // 2, wide // 2 - width // 2
    return resize(image, tall, wide)[top : top + height, left : left + width]


def encode_image(
    image: np.ndarray,
    extension: str,
    quality: int | None = None,
    parameters: Mapping[str, object] | None = None,
) -> bytes:
    """The bytes of an image file, with `parameters` as JSON in its metadata.

    image: uint8 [H, W, 3], or [H, W, 4] with alpha for `ALPHA_EXTENSIONS`. quality: 0 to 100, None for the
    format's default; PNG is always lossless, WebP at 100. The JSON is PNG's text "parameters" or EXIF's
    UserComment. A JPEG has room for 60 kB: longer strings are cut and end with "...".
    """
    from PIL import Image, PngImagePlugin

    encoder, out = Image.fromarray(image), io.BytesIO()
    if extension == ".png":
        text = PngImagePlugin.PngInfo()
        if parameters is not None:
            text.add_text("parameters", as_text(parameters))
        encoder.save(out, "PNG", pnginfo=text)
        return out.getvalue()
    quality = DEFAULT_QUALITY[extension] if quality is None else quality
    exif = Image.Exif()
    if parameters is not None:
        most = None if extension == ".webp" else JPEG_COMMENT
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + as_ascii(parameters, most)
    if extension == ".webp":
        encoder.save(out, "WEBP", quality=quality, lossless=quality == 100, exact=quality == 100, exif=exif)
    else:
        encoder.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, exif=exif)
    return out.getvalue()


def read_image_parameters(path: Path) -> dict[str, object]:
    """The parameters that `encode_image` stored in an image (or a GIF's comment), {} if there are none."""
    from PIL import Image

    with Image.open(path) as opened:
        text = opened.info.get("parameters") or opened.info.get("comment")
        comment = opened.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(ASCII):
        text = comment[len(ASCII) :]
    return read(text)
