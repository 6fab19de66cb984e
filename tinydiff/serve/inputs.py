"""Images that requests give: as bytes, as data URIs, or as URLs on the public internet. No torch here.

Nothing about them is trusted: not where a name leads, nor what a header, a media type or an extension says of
the bytes.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinydiff.records import UserError, shown
from tinydiff.serve.fetch import FETCH_S, fetch, too_large
from tinydiff.serve.unpack import media_type

if TYPE_CHECKING:
    from tinydiff.serve.options import ServeOptions

ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""What a URI's escapes may stand for in base64."""
_ALPHABET = bytes.maketrans(b"-_", b"+/")

BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How images begin in base64."""

Get = Callable[[str, str, int, float], bytes]
"""(address, field, bytes at most, seconds) -> the bytes there. Raises UserError."""


def received(
    source: str | bytes, field: str, allow_urls: bool, limits: ServeOptions, get: Get = fetch
) -> bytes:
    """The bytes of a given image: a file's own, a data URI's, or those that `get` has from an address.

    They begin as one of the formats that are read does, whatever name or type they came with, and are at most
    `limits.max_body` MB. Nothing is unpacked yet. Raises UserError naming `field`.
    """
    most = int(limits.max_body * 1e6)
    data = source if isinstance(source, bytes) else _read(source, field, allow_urls, most, get)
    if len(data) > most:
        raise too_large(field, most)
    media_type(data, field)
    return data


def _read(source: str, field: str, allow_urls: bool, most: int, get: Get) -> bytes:
    """The bytes that a text stands for."""
    source = source.strip()
    scheme = source[: source.find(":")].lower() if ":" in source[:20] else ""
    if scheme == "data":
        return _data_uri(source, field, most)
    if scheme in ("http", "https"):
        if not allow_urls:
            how = "send the image as a file or a data URI, or start the server with --allow-url-inputs"
            raise UserError(field, f"{field}: is an address, and this server fetches none; {how}")
        return get(source, field, most, FETCH_S)
    if source.startswith(BASE64_STARTS) or (
        len(source) >= 256 and re.fullmatch(r"[A-Za-z0-9+/_\s-]+", source[:256])
    ):
        raise UserError(field, f"{field}: is base64 without its head; put data:image/png;base64, before it")
    address = " or an http(s) address" if allow_urls else ""
    raise UserError(
        field,
        f"{field}: {shown(source)} must be a file sent along, a data URI{address}; the server's own files are not read",
    )


def _data_uri(source: str, field: str, most: int) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(
            field, f"{field}: is a data URI without ;base64, ; the form is data:image/png;base64,..."
        )
    if len(body) > 6 * most:  # four letters are three bytes, and one written as %2B is three letters
        raise too_large(field, most)
    for code, letter in ESCAPED.items():
        body = body.replace(code, letter).replace(code.lower(), letter)
    try:
        text = body.encode("ascii").translate(_ALPHABET, delete=b" \t\r\n").rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(field, f"{field}: is a data URI whose base64 is broken") from None
