"""A request's body, JSON or a form, as one dict of names and values; parts that are files are bytes in it.

What the official client sends as a form is undone: repeated names, `name[]` and `name[0]` become lists,
`name[key]` becomes a dict, and a list of dicts, which it sends column by column, becomes that again. Every
length is checked before anything walks over it, and every walk is linear.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import falcon

from tinydiff.records import UserError, nearest, shown
from tinydiff.serve.errors import Refusal

MOST_PARTS = 512
"""Fields of a form."""
MOST_DEPTH = 32
"""Nested lists and dicts."""
MOST_VALUES = 20_000
"""Values of a JSON text. Its commas and brackets are counted for it, those inside strings too; a long prompt
has fewer.
"""
MOST_CONTENT_TYPE = 1024
"""Characters of the header Content-Type."""
MOST_PART_HEADERS = 4096
"""Bytes of the headers of a form's part."""

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_PARAMETER = re.compile(r'\s*;\s*(?:([^\s;="]++)\s*=\s*("(?:[^"\\]|\\.)*+"|[^\s;"]*+))?', re.DOTALL)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_PLAIN_ENCODINGS = (b"binary", b"8bit", b"7bit")


def read_body(req: falcon.Request, most: int) -> tuple[dict[str, Any], bool]:
    """(names and values, whether they came as a form, where every value is a string). most: bytes.

    Raises Refusal for another kind of body (415) or one above `most` (413), and UserError for what cannot be
    read.
    """
    given = req.content_type or ""
    if len(given) > MOST_CONTENT_TYPE:
        raise UserError(
            "Content-Type", f"Content-Type: has {len(given)} characters; {MOST_CONTENT_TYPE} are the most"
        )
    kind, said = _header("Content-Type", given)
    charset = said.get("charset", "utf-8").lower()
    if kind not in ("application/json", "multipart/form-data"):
        named = f"not {kind[:80]!r}" if kind else "and none is named"
        message = f"Content-Type: the body is application/json or multipart/form-data, {named}"
        raise Refusal(415, "unsupported_media_type", message)
    if charset not in ("utf-8", "utf8"):
        message = f"Content-Type: the body is text in UTF-8, not in {charset[:80]!r}"
        raise Refusal(415, "unsupported_media_type", message)
    data, form = read_bytes(req, most), kind == "multipart/form-data"
    found = _form(data, said.get("boundary", "")) if form else _json(data)
    _sound("body", found)
    return found, form


def read_bytes(req: falcon.Request, most: int) -> bytes:
    """The body as it came. Raises Refusal above `most` bytes, which counts where no length was announced."""
    chunked = req.content_length is None and req.env.get("wsgi.input_terminated")
    data = (req.stream if chunked else req.bounded_stream).read(most + 1)
    if len(data) > most:
        raise too_large(most)
    return data


def too_large(most: int) -> Refusal:
    message = f"the body is larger than {most / 1e6:g} MB, the most that this server reads"
    return Refusal(413, "request_too_large", message)


def fingerprint(body: Any) -> str:
    """The same for bodies that say the same, whatever form's boundary stands between their parts."""

    def short(data: bytes) -> str:
        return f"bytes:{hashlib.sha256(data).hexdigest()}"

    return hashlib.sha256(json.dumps(body, sort_keys=True, default=short).encode()).hexdigest()


def parse_json(text: str | bytes, field: str) -> Any:
    """JSON without NaN and without a name given twice. Raises UserError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(name[:80], f"{name[:80]}: is given twice")
            found[name] = value
        return found

    def never(word: str) -> Any:
        raise ValueError(f"{word} is no number")

    try:
        text = text.decode() if isinstance(text, bytes) else text  # json itself would take UTF-16 too
        if sum(map(text.count, ",[{")) > MOST_VALUES:
            raise UserError(field, f"{field}: holds more than {MOST_VALUES:,} values, the most that are read")
        return json.loads(text, object_pairs_hook=once, parse_constant=never)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(field, f"{field}: is not JSON ({why})") from error


def _json(data: bytes) -> dict[str, Any]:
    found = parse_json(data, "body")
    if not isinstance(found, dict):
        raise UserError("body", f"body: is a JSON {_kind(found)}; it must be an object of names and values")
    return found


def _form(data: bytes, boundary: str) -> dict[str, Any]:
    parts: dict[str, list[tuple[list[str], Any]]] = {}
    for head, value in _parts(data, boundary):
        spelled, file = _headed(head)
        name, path = _path(spelled)
        parts.setdefault(name, []).append((path, value if file else _text(name, value)))
    return {name: _joined(name, given) for name, given in parts.items()}


def _parts(data: bytes, boundary: str) -> Iterator[tuple[bytes, bytes]]:
    """(headers, content) of each part of a form (RFC 7578)."""
    if not (1 <= len(boundary) <= 70 and boundary.isascii()):
        raise _no_form("Content-Type names no boundary of 1 to 70 characters")
    line = b"--" + boundary.encode()
    at = 0 if data.startswith(line) else data.find(b"\r\n" + line) + 2
    if at == 1:
        raise _no_form("its boundary is not in it")
    for _ in range(MOST_PARTS + 1):
        at += len(line)
        if data.startswith(b"--", at):
            return
        begin = data.find(b"\r\n", at, at + 80)  # blanks may follow a boundary
        end = data.find(b"\r\n" + line, begin) if begin >= 0 and not data[at:begin].strip() else -1
        if end < 0:
            raise _no_form("a part does not end")
        blank = data.find(b"\r\n\r\n", begin, min(end, begin + MOST_PART_HEADERS))
        if blank < 0:
            raise _no_form(f"the headers of a part do not end within {MOST_PART_HEADERS} bytes")
        yield data[begin + 2 : blank], data[blank + 4 : end]
        at = end + 2
    raise _no_form(f"it has more than {MOST_PARTS} parts")


def _headed(head: bytes) -> tuple[str, bool]:
    """(name of a part, whether it is a file), as its headers say. What the file is called is of no use here."""
    lines = [line.partition(b":") for line in head.split(b"\r\n")]
    headers = {name.strip().lower(): value.strip() for name, _, value in lines}
    if headers.get(b"content-transfer-encoding", b"binary").lower() not in _PLAIN_ENCODINGS:
        raise _no_form("Content-Transfer-Encoding is not supported; send the bytes as they are")
    kind, said = _header("Content-Disposition", headers.get(b"content-disposition", b"").decode("latin-1"))
    if kind != "form-data":
        raise _no_form("a part has no Content-Disposition: form-data")
    try:
        name = said.get("name", "").encode("latin-1").decode()
    except UnicodeDecodeError:
        raise UserError("body", "body: the name of a field of the form is not text in UTF-8") from None
    return name, "filename" in said or "filename*" in said


def _header(name: str, text: str) -> tuple[str, dict[str, str]]:
    """A header's value, and its parameters by their names in lower case. Raises UserError."""
    kind, at = text.partition(";")[0], text.find(";")
    found: dict[str, str] = {}
    while at >= 0 and text[at:].strip():
        match = _PARAMETER.match(text, at)
        key = ((match and match[1]) or "").lower()
        if match is None or key in found:
            raise UserError(name, f"{name}: {shown(text)} is not a value and parameters, such as a/b; c=d")
        if key:
            word = match[2]
            found[key] = (
                re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL) if word.startswith('"') else word
            )
        at = match.end()
    return kind.strip().lower(), found


def _no_form(why: str) -> UserError:
    return UserError("body", f"body: is not a form that can be read: {why}")


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UserError(
            name[:80], f"{name[:80]}: is not text in UTF-8; a file's part has a filename"
        ) from None


def _path(spelled: str) -> tuple[str, list[str]]:
    """`a[][key]` as ("a", ["", "key"])."""
    match = _NAME.fullmatch(spelled)
    keys = re.findall(r"\[([^\[\]]*)\]", match[2]) if match else []
    if match is None or len(keys) > MOST_DEPTH:
        allowed = "name, name[], name[0] and name[key]"
        raise UserError("body", f"body: {spelled[:80]!r} is not the name of a field; the forms are {allowed}")
    return match[1], keys


def _joined(name: str, parts: list[tuple[list[str], Any]]) -> Any:
    """The value that parts of one name make, each with the keys that are left of its path."""
    if not any(path for path, _ in parts):
        values = [value for _, value in parts]
        return values[0] if len(values) == 1 else values
    below: dict[str, list[tuple[list[str], Any]]] = {}
    for path, value in parts:
        below.setdefault(path[0] if path else "?", []).append((path[1:], value))
    numbered = all(re.fullmatch("[0-9]{1,4}", key) for key in below)
    if not all(path for path, _ in parts) or ("" in below and len(below) > 1):
        allowed = "name, name[], name[0] and name[key]"
        raise UserError(name[:80], f"{name[:80]}: is given in two forms at once; the forms are {allowed}")
    found = {key: _joined(name, inner) for key, inner in below.items()}
    if numbered:
        if twice := next(
            (key for key, inner in below.items() if sum(not path for path, _ in inner) > 1), None
        ):
            raise UserError(name[:80], f"{name[:80]}[{twice}]: is given twice")
        return [found[key] for key in sorted(found, key=int)]
    if "" not in found:
        return found
    listed = found[""]
    if isinstance(listed, dict):
        return _rows(name, listed)
    return listed if isinstance(listed, list) else [listed]


def _rows(name: str, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """{"path": [x, y], "scale": [1, 2]} as [{"path": x, "scale": 1}, {"path": y, "scale": 2}]."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in columns.items()}
    if len({len(values) for values in lists.values()}) > 1:
        message = (
            "not every entry has the same keys, which a form cannot tell apart; give the list as JSON text"
        )
        raise UserError(name[:80], f"{name[:80]}: {message}")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _sound(name: str, value: Any, depth: int = 0) -> None:
    """Raise UserError for what no text can hold, and for nesting without end."""
    name = name[:80]
    if depth > MOST_DEPTH:
        raise UserError(name, f"{name}: is nested deeper than {MOST_DEPTH}")
    if isinstance(value, str) and ("\0" in value or not (value.isascii() or _NO_TEXT.search(value) is None)):
        raise UserError(
            name, f"{name}: holds a character that no text has (NUL, or half of a surrogate pair)"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _sound("body", key)
            _sound(name if depth else key, inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _sound(name, inner, depth + 1)


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def parameters(req: falcon.Request, names: Sequence[str]) -> dict[str, str]:
    """The query's parameters. Raises Refusal for one that means nothing here, UserError for one given twice."""
    found: dict[str, str] = {}
    for name, value in req.params.items():
        if name not in names:
            known = (
                f"{nearest(name, names)}; the parameters are {', '.join(names)}"
                if names
                else "; there are none"
            )
            raise Refusal(
                400, "unknown_parameter", f"{name[:80]}: no such parameter of this address{known}", name[:80]
            )
        if not isinstance(value, str):
            raise UserError(name, f"{name}: is given twice")
        found[name] = value
    return found


def integer(query: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    """An integer of the query. Raises UserError."""
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(name, f"{name}: {shown(text)} is not an integer from {least} to {most}")
    return int(text)


def switch(query: dict[str, str], name: str) -> bool:
    """Whether the query says true; false where it says nothing. Raises UserError."""
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise UserError(name, f"{name}: {text[:80]!r} is not true or false")
    return text == "true"
