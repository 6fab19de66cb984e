"""Reads a request's body, JSON or a form, as one dict of names and values; a file is bytes in it.

A form of the official client is decoded: repeated names, `name[]` and `name[0]` become lists, `name[key]`
becomes a dict, and a list of dicts, which the client sends column by column, becomes that list again. Every
length is checked before the data is read, and every pass over the data is linear.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import falcon

from tinydiff.records import UserError, brief, nearest
from tinydiff.serve.errors import Refusal

MOST_PARTS = 512
"""Parts of a form."""
MOST_DEPTH = 32
"""Levels of nested lists and dicts."""
MOST_VALUES = 20_000
"""Values of a JSON document, estimated by its commas and brackets, those inside strings included."""
MOST_CONTENT_TYPE = 1024
"""Characters of the Content-Type header."""
MOST_PART_HEADERS = 4096
"""Bytes of the headers of one part of a form."""

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_PARAMETER = re.compile(r'\s*;\s*(?:([^\s;="]++)\s*=\s*("(?:[^"\\]|\\.)*+"|[^\s;"]*+))?', re.DOTALL)
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_PLAIN_ENCODINGS = (b"binary", b"8bit", b"7bit")


def read_body(req: falcon.Request, most: int) -> tuple[dict[str, object], bool]:
    """(names and values, whether the body is a form). In a form every value is a string or bytes.

    Raises Refusal for another media type (415) and for more than `most` bytes (413), UserError for a body
    that is malformed.
    """
    header = req.content_type or ""
    if len(header) > MOST_CONTENT_TYPE:
        message = f"Content-Type: has {len(header)} characters; at most {MOST_CONTENT_TYPE} are allowed"
        raise UserError("Content-Type", message)
    kind, parameters = _header("Content-Type", header)
    charset = parameters.get("charset", "utf-8").lower()
    if kind not in ("application/json", "multipart/form-data"):
        sent = f"not {kind[:80]!r}" if kind else "but the request has no Content-Type"
        message = f"Content-Type: must be application/json or multipart/form-data, {sent}"
        raise Refusal(415, "unsupported_media_type", message)
    if charset not in ("utf-8", "utf8"):
        message = f"Content-Type: the charset must be utf-8, not {charset[:80]!r}"
        raise Refusal(415, "unsupported_media_type", message)
    data, form = read_bytes(req, most), kind == "multipart/form-data"
    body = _form(data, parameters.get("boundary", "")) if form else _json(data)
    _check_values("body", body)
    return body, form


def read_bytes(req: falcon.Request, most: int) -> bytes:
    """The bytes of the body. Raises Refusal above `most` bytes, with or without a Content-Length."""
    chunked = req.content_length is None and req.env.get("wsgi.input_terminated")
    data = (req.stream if chunked else req.bounded_stream).read(most + 1)
    if len(data) > most:
        raise too_large(most)
    return data


def too_large(most: int) -> Refusal:
    """The refusal of a body of more than `most` bytes."""
    message = f"the body is larger than {most / 1e6:g} MB, the limit of this server"
    return Refusal(413, "request_too_large", message)


def fingerprint(body: object) -> str:
    """A hash of the body's names and values; the boundary of a form does not change it."""

    def short(data: bytes) -> str:
        return f"bytes:{hashlib.sha256(data).hexdigest()}"

    return hashlib.sha256(json.dumps(body, sort_keys=True, default=short).encode()).hexdigest()


def parse_json(text: str | bytes, field: str) -> Any:
    """Parse JSON without NaN and without repeated names. Raises UserError naming `field`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, object]:
        members: dict[str, object] = {}
        for name, value in pairs:
            if name in members:
                raise UserError(name[:80], f"{name[:80]}: is given twice")
            members[name] = value
        return members

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not a number")

    try:
        text = text.decode() if isinstance(text, bytes) else text  # json.loads would accept UTF-16 too
        if sum(map(text.count, ",[{")) > MOST_VALUES:
            raise UserError(field, f"{field}: has more than {MOST_VALUES:,} values, the limit")
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(field, f"{field}: is not JSON ({why})") from error


def _json(data: bytes) -> dict[str, object]:
    body = parse_json(data, "body")
    if not isinstance(body, dict):
        raise UserError("body", f"body: is a JSON {_kind(body)}; it must be an object")
    return body


def _form(data: bytes, boundary: str) -> dict[str, object]:
    parts: dict[str, list[tuple[list[str], Any]]] = {}
    for head, value in _parts(data, boundary):
        spelled, file = _part_name(head)
        name, path = _path(spelled)
        parts.setdefault(name, []).append((path, value if file else _text(name, value)))
    return {name: _value(name, same) for name, same in parts.items()}


def _parts(data: bytes, boundary: str) -> Iterator[tuple[bytes, bytes]]:
    """(headers, content) of each part of a form (RFC 7578)."""
    if not (1 <= len(boundary) <= 70 and boundary.isascii()):
        raise _malformed("Content-Type has no boundary of 1 to 70 characters")
    line = b"--" + boundary.encode()
    at = 0 if data.startswith(line) else data.find(b"\r\n" + line) + 2
    if at == 1:
        raise _malformed("the boundary of Content-Type is not in the body")
    for _ in range(MOST_PARTS + 1):
        at += len(line)
        if data.startswith(b"--", at):
            return
        begin = data.find(b"\r\n", at, at + 80)  # spaces may follow a boundary
        end = data.find(b"\r\n" + line, begin) if begin >= 0 and not data[at:begin].strip() else -1
        if end < 0:
            raise _malformed("a part has no end")
        blank = data.find(b"\r\n\r\n", begin, min(end, begin + MOST_PART_HEADERS))
        if blank < 0:
            raise _malformed(f"the headers of a part are longer than {MOST_PART_HEADERS} bytes")
        yield data[begin + 2 : blank], data[blank + 4 : end]
        at = end + 2
    raise _malformed(f"it has more than {MOST_PARTS} parts")


def _part_name(head: bytes) -> tuple[str, bool]:
    """(name of a part, whether it is a file), from its headers. The file's name is ignored."""
    lines = [line.partition(b":") for line in head.split(b"\r\n")]
    headers = {name.strip().lower(): value.strip() for name, _, value in lines}
    if headers.get(b"content-transfer-encoding", b"binary").lower() not in _PLAIN_ENCODINGS:
        raise _malformed("Content-Transfer-Encoding is not supported; send the bytes as they are")
    kind, parameters = _header(
        "Content-Disposition", headers.get(b"content-disposition", b"").decode("latin-1")
    )
    if kind != "form-data":
        raise _malformed("a part has no Content-Disposition: form-data")
    try:
        name = parameters.get("name", "").encode("latin-1").decode()
    except UnicodeDecodeError:
        raise UserError("body", "body: the name of a form field is not valid UTF-8") from None
    return name, "filename" in parameters or "filename*" in parameters


def _header(name: str, text: str) -> tuple[str, dict[str, str]]:
    """(value, parameters) of a header; the names of parameters in lower case. Raises UserError."""
    kind, at = text.partition(";")[0], text.find(";")
    parameters: dict[str, str] = {}
    while at >= 0 and text[at:].strip():
        match = _PARAMETER.match(text, at)
        key = ((match and match[1]) or "").lower()
        if match is None or key in parameters:
            raise UserError(name, f"{name}: {brief(text)} is not a value with parameters, such as a/b; c=d")
        if key:
            word = match[2]
            quoted = word.startswith('"')
            parameters[key] = re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL) if quoted else word
        at = match.end()
    return kind.strip().lower(), parameters


def _malformed(why: str) -> UserError:
    return UserError("body", f"body: is a malformed form: {why}")


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        message = f"{name[:80]}: is not valid UTF-8; a part with a file needs a filename"
        raise UserError(name[:80], message) from None


def _path(spelled: str) -> tuple[str, list[str]]:
    """`a[][key]` as ("a", ["", "key"])."""
    match = _NAME.fullmatch(spelled)
    keys = re.findall(r"\[([^\[\]]*)\]", match[2]) if match else []
    if match is None or len(keys) > MOST_DEPTH:
        allowed = "name, name[], name[0] and name[key]"
        raise UserError(
            "body", f"body: {spelled[:80]!r} is not a field name; the allowed forms are {allowed}"
        )
    return match[1], keys


def _value(name: str, parts: list[tuple[list[str], Any]]) -> Any:
    """The value that all parts of one name make. parts: (the rest of the path, the value) of each."""
    if not any(path for path, _ in parts):
        values = [value for _, value in parts]
        return values[0] if len(values) == 1 else values
    below: dict[str, list[tuple[list[str], Any]]] = {}
    for path, value in parts:
        below.setdefault(path[0] if path else "?", []).append((path[1:], value))
    numbered = all(re.fullmatch("[0-9]{1,4}", key) for key in below)
    if not all(path for path, _ in parts) or ("" in below and len(below) > 1):
        allowed = "name, name[], name[0] and name[key]"
        raise UserError(name[:80], f"{name[:80]}: is given in two forms at once; use one of {allowed}")
    values = {key: _value(name, inner) for key, inner in below.items()}
    if numbered:
        for key, inner in below.items():
            if sum(not path for path, _ in inner) > 1:
                raise UserError(name[:80], f"{name[:80]}[{key}]: is given twice")
        return [values[key] for key in sorted(values, key=int)]
    if "" not in values:
        return values
    listed = values[""]
    if isinstance(listed, dict):
        return _transposed(name, listed)
    return listed if isinstance(listed, list) else [listed]


def _transposed(name: str, columns: dict[str, object]) -> list[dict[str, object]]:
    """{"path": [x, y], "scale": [1, 2]} as [{"path": x, "scale": 1}, {"path": y, "scale": 2}]."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in columns.items()}
    if len({len(values) for values in lists.values()}) > 1:
        message = "the entries must all have the same keys in a form; send the list as JSON"
        raise UserError(name[:80], f"{name[:80]}: {message}")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _check_values(name: str, value: object, depth: int = 0) -> None:
    """Raise UserError for NUL, half a surrogate pair, and nesting deeper than MOST_DEPTH."""
    name = name[:80]
    if depth > MOST_DEPTH:
        raise UserError(name, f"{name}: is nested deeper than {MOST_DEPTH} levels")
    if isinstance(value, str) and ("\0" in value or not (value.isascii() or _NOT_TEXT.search(value) is None)):
        raise UserError(name, f"{name}: contains a NUL character or half of a surrogate pair")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_values("body", key)
            _check_values(name if depth else key, inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_values(name, inner, depth + 1)


def _kind(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def parameters(req: falcon.Request, names: Sequence[str]) -> dict[str, str]:
    """The parameters of the query string. Raises Refusal for an unknown one, UserError for a repeated one."""
    query: dict[str, str] = {}
    for name, value in req.params.items():
        if name not in names:
            allowed = f"{nearest(name, names)}; the parameters are {', '.join(names)}"
            message = (
                f"{name[:80]}: this route has no such parameter{allowed if names else ', and no others'}"
            )
            raise Refusal(400, "unknown_parameter", message, name[:80])
        if not isinstance(value, str):
            raise UserError(name, f"{name}: is given twice")
        query[name] = value
    return query


def integer(query: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    """An integer parameter of the query. Raises UserError."""
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(name, f"{name}: {brief(text)} is not an integer from {least} to {most}")
    return int(text)


def switch(query: dict[str, str], name: str) -> bool:
    """A boolean parameter of the query, false by default. Raises UserError."""
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise UserError(name, f"{name}: {text[:80]!r} must be true or false")
    return text == "true"
