"""What a user names: paths, URLs, and text files that any editor wrote. No torch here."""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

from tinydiff.records import UserError

URL_SCHEMES = ("http", "https", "data")
"""Schemes of the URLs that may stand where a file is given."""

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

AS_IT_IS = "%/:=&?~+!$,;'@()*[]"
"""What is not quoted in a URL's path and query: it is quoted already, or has a meaning there."""


def path(given: str | Path, field: str) -> Path:
    """A path that a user gave for the option `field`, with "~" and "~name" expanded to a home directory.

    Where there is no such home directory, a file or directory of exactly that name is meant. Raises UserError
    where there is none.
    """
    literal = Path(given)
    try:
        return literal.expanduser()
    except RuntimeError:
        if kind(literal):
            return literal
        home = literal.parts[0]
        message = f"no home directory is known for {home!r}; write the path out, or './{given}' for a file of that name"
        raise UserError(field, f"{field}: {str(given)!r} does not exist: {message}") from None


def kind(path: Path) -> Literal["file", "directory", "other", ""]:
    """What has this path, links followed. "" where nothing has: also where nothing can, because the path is
    too long or forbidden.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"


def scheme(text: str) -> str:
    """The scheme of a URL in lower case, one of `URL_SCHEMES`; "" for what is a path."""
    found = re.match(r"(https?)://|(data):", text, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def ascii_url(url: str) -> str:
    """An http(s) URL as it is sent: the host in IDNA, in the path and query what is not ASCII, and spaces,
    quoted; no fragment.

    What is quoted already stays. Raises ValueError for a URL that cannot be taken apart.
    """
    parts = urlsplit(url.strip())
    port, host = parts.port, parts.hostname or ""
    if not host:
        raise ValueError("it names no host")
    host = host if host.isascii() else host.encode("idna").decode()
    login, at, _ = parts.netloc.rpartition("@")
    netloc = (
        quote(login, safe=AS_IT_IS)
        + at
        + (f"[{host}]" if ":" in host else host)
        + ("" if port is None else f":{port}")
    )
    return urlunsplit(
        (parts.scheme, netloc, quote(parts.path, safe=AS_IT_IS), quote(parts.query, safe=AS_IT_IS), "")
    )


def read_text(given: str | Path, field: str) -> str:
    """The text of a UTF-8 file, without a byte order mark, its line ends untouched. Raises UserError."""
    file, shown = path(given, field), f"{field}: {str(given)!r}"
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(field, f"{shown} cannot be read ({reason})") from error
    if data.startswith(UTF16):
        raise UserError(field, f"{shown} is not text in UTF-8 but in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(field, f"{shown} is not text in UTF-8 (byte {error.start} is not)") from error
    if "\0" in text:
        raise UserError(field, f"{shown} is not text: it holds zero bytes")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text, ended by LF, CR LF or CR alone; other separators, such as a form feed or U+2028,
    stand inside a line.
    """
    return re.split(r"\r\n|\n|\r", text)
