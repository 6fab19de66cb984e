"""The bytes of a file that a user names by its path, http(s) URL or data URI."""

from __future__ import annotations

from pathlib import Path

from tinydiff import paths
from tinydiff.records import UserError

MOST_BYTES = 64 * 2**20
"""Most bytes of what is downloaded from a URL."""


def name(source: str | Path) -> str:
    """How errors call it: a long URL is cut."""
    return repr(str(source) if len(str(source)) < 120 else f"{str(source)[:80]}...")


def is_file(source: str | Path) -> bool:
    """Whether it is a path, and neither a URL nor a data URI."""
    return not paths.scheme(str(source))


def read_bytes(source: str | Path, field: str) -> bytes:
    """All bytes. Raises UserError naming `field` where they cannot be read, or a download is too large."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    scheme, source_name = paths.scheme(str(source)), name(source)
    file = None if scheme else paths.path(source, field)
    try:
        if file is not None:
            return file.read_bytes()
        url = str(source) if scheme == "data" else paths.ascii_url(str(source))
        with urlopen(Request(url, headers={"User-Agent": "tinydiff"}), timeout=30) as answer:
            data = answer.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(field, f"{field}: {source_name} does not exist") from None
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise UserError(field, f"{field}: {source_name} cannot be read ({reason})") from error
    if len(data) > MOST_BYTES:
        raise UserError(field, f"{field}: {source_name} is larger than {MOST_BYTES // 2**20} MiB")
    return data
