"""Paths, URLs and text files that a user names. No torch here."""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

from tinydiff.records import UserError

URL_SCHEMES = ("http", "https", "data")
"""Schemes of URLs that are accepted in place of a file."""

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

UNQUOTED = "%/:=&?~+!$,;'@()*[]"
"""Characters of a URL's path and query that stay: they have a meaning there, or quote others."""


def path(text: str | Path, field: str) -> Path:
    """The value of the option `field` as a path, with "~" and "~name" expanded to a home directory.

    If there is no such home directory, the literal file or directory is meant; UserError if there is none.
    """
    literal = Path(text)
    try:
        return literal.expanduser()
    except RuntimeError:
        if kind(literal):
            return literal
        home = literal.parts[0]
        message = f"no home directory is known for {home!r}; write the full path, or './{text}' for a file"
        raise UserError(field, f"{field}: {str(text)!r} does not exist: {message} of that name") from None


def kind(path: Path) -> Literal["file", "directory", "other", ""]:
    """What is at a path, links followed. "" for nothing, also if the path is too long or forbidden."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"


def scheme(text: str) -> str:
    """The scheme of a URL in lower case, one of `URL_SCHEMES`; "" for a path."""
    match = re.match(r"(https?)://|(data):", text, re.IGNORECASE)
    return (match[1] or match[2]).lower() if match else ""


def ascii_url(url: str) -> str:
    """An http(s) URL in ASCII: the host in IDNA, other characters percent-encoded, without the fragment.

    What is encoded already stays. Raises ValueError for a URL that cannot be parsed.
    """
    parts = urlsplit(url.strip())
    port, host = parts.port, parts.hostname or ""
    if not host:
        raise ValueError("it names no host")
    host = host if host.isascii() else host.encode("idna").decode()
    login, at, _ = parts.netloc.rpartition("@")
    host = f"[{host}]" if ":" in host else host
    netloc = quote(login, safe=UNQUOTED) + at + host + ("" if port is None else f":{port}")
    path, query = (quote(part, safe=UNQUOTED) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def read_text(name: str | Path, field: str) -> str:
    """The text of a UTF-8 file, without a byte order mark, its line ends unchanged. Raises UserError."""
    file, subject = path(name, field), f"{field}: {str(name)!r}"
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(field, f"{subject} cannot be read ({reason})") from error
    if data.startswith(UTF16):
        raise UserError(field, f"{subject} is not text in UTF-8 but in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(field, f"{subject} is not text in UTF-8 (byte {error.start} is not)") from error
    if "\0" in text:
        raise UserError(field, f"{subject} is not text: it holds zero bytes")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text, ended by LF, CR LF or CR alone. A form feed or U+2028 does not end a line."""
    return re.split(r"\r\n|\n|\r", text)
