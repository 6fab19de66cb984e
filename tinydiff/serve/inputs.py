"""Pictures that requests give: as bytes, as data URIs, or as addresses on the public internet. No torch here.

Nothing about them is trusted: not where a name leads, nor what a header, a media type or an ending says of the bytes.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinydiff.records import UserError, shown
from tinydiff.serve.fetch import FETCH_S, fetch, too_large

if TYPE_CHECKING:
    from PIL import Image

    from tinydiff.serve.options import ServeOptions

FORMATS = {
    "PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp",
    "AVIF": "image/avif",
}  # fmt: skip
"""Pillow's names of the formats that are read -> media type. MPO is what phones make of a JPEG by putting more pictures behind it."""

SHOWN_FORMATS = "PNG, JPEG, WebP, GIF, BMP or AVIF"

ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""What a URI's escapes may stand for in base64."""
_ALPHABET = bytes.maketrans(b"-_", b"+/")

BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How pictures begin in base64."""

Get = Callable[[str, str, int, float], bytes]
"""(address, field, bytes at most, seconds) -> the bytes there. Raises UserError."""


def decoded(source: str | bytes, field: str, allow_urls: bool, limits: ServeOptions, get: Get = fetch) -> bytes:
    """The bytes of a given picture: a file's own, a data URI's, or those that `get` has from an address.

    They are a whole picture of `FORMATS` and no animation, whatever name or type they came with, of at most `limits.max_body` MB and
    `limits.max_input_pixels`, counted from its header before anything is unpacked. Raises UserError naming `field`.
    """
    most = int(limits.max_body * 1e6)
    data = source if isinstance(source, bytes) else _read(source, field, allow_urls, most, get)
    if len(data) > most:
        raise too_large(field, most)
    _check(data, field, limits.max_input_pixels)
    return data


def media_type(data: bytes) -> str:
    """What the bytes of a checked picture are."""
    with _opened(data) as picture:
        return FORMATS[picture.format or ""]


def _read(source: str, field: str, allow_urls: bool, most: int, get: Get) -> bytes:
    """The bytes that a text stands for."""
    source = source.strip()
    scheme = source[: source.find(":")].lower() if ":" in source[:20] else ""
    if scheme == "data":
        return _data_uri(source, field, most)
    if scheme in ("http", "https"):
        if not allow_urls:
            how = "send the picture as a file or a data URI, or start the server with --allow-url-inputs"
            raise UserError(field, f"{field}: is an address, and this server fetches none; {how}")
        return get(source, field, most, FETCH_S)
    if source.startswith(BASE64_STARTS) or (len(source) >= 256 and re.fullmatch(r"[A-Za-z0-9+/_\s-]+", source[:256])):
        raise UserError(field, f"{field}: is base64 without its head; put data:image/png;base64, before it")
    address = " or an http(s) address" if allow_urls else ""
    raise UserError(field, f"{field}: {shown(source)} must be a file sent along, a data URI{address}; the server's own files are not read")


def _data_uri(source: str, field: str, most: int) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(field, f"{field}: is a data URI without ;base64, ; the form is data:image/png;base64,...")
    if len(body) > 6 * most:  # four letters are three bytes, and one written as %2B is three letters
        raise too_large(field, most)
    for code, letter in ESCAPED.items():
        body = body.replace(code, letter).replace(code.lower(), letter)
    try:
        text = body.encode("ascii").translate(_ALPHABET, delete=b" \t\r\n").rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(field, f"{field}: is a data URI whose base64 is broken") from None


def _check(data: bytes, field: str, most_pixels: float) -> None:
    """Raise UserError unless the bytes are one whole picture of at most so many pixels."""
    from PIL import Image

    if not data:
        raise UserError(field, f"{field}: is empty")
    try:
        with _opened(data) as picture:
            width, height = picture.size
            if width * height > most_pixels:
                message = f"{field}: has {width}x{height} pixels; {most_pixels:,.0f} are the most that this server takes"
                raise UserError(field, message)
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                raise UserError(field, f"{field}: is an animation; give one picture")
            picture.load()
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(field, f"{field}: has more pixels than any picture may have; {most_pixels:,.0f} are the most here") from None
    except Exception as error:  # decoders fail in many ways on what somebody made up
        raise UserError(field, f"{field}: is not a whole picture that can be read; it may be {SHOWN_FORMATS}") from error


def _opened(data: bytes) -> Image.Image:
    """The picture of these bytes, only its header read."""
    from PIL import Image

    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
