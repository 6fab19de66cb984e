"""A request's body, JSON or a form, as one dict of names and values; parts that are files are bytes in it.

What the official client sends as a form is undone: repeated names and `name[]` become lists, `name[key]` becomes a dict, and a list of
dicts, which it sends column by column, becomes that again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from typing import Any

import falcon
from falcon.media import MultipartFormHandler
from falcon.media.multipart import BodyPart, MultipartParseOptions

from tinydiff.records import UserError
from tinydiff.serve.errors import Refusal

MOST_PARTS = 512
"""Fields of a form."""
MOST_DEPTH = 32
"""Nested lists and dicts."""

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


def read_body(req: falcon.Request, most: int) -> tuple[dict[str, Any], bool]:
    """(names and values, whether they came as a form, where every value is a text). most: bytes.

    Raises Refusal for another kind of body (415) or one above `most` (413), and UserError for what cannot be read.
    """
    kind, said = falcon.parse_header(req.content_type or "")
    kind, charset = kind.strip().lower(), said.get("charset", "utf-8").lower()
    if kind not in ("application/json", "multipart/form-data"):
        given = f"not {kind[:80]!r}" if kind else "and none is named"
        raise Refusal(415, "unsupported_media_type", f"Content-Type: the body is application/json or multipart/form-data, {given}")
    if charset not in ("utf-8", "utf8"):
        raise Refusal(415, "unsupported_media_type", f"Content-Type: the body is text in UTF-8, not in {charset[:80]!r}")
    data = read_bytes(req, most)
    form = kind == "multipart/form-data"
    found = _form(data, req.content_type or "", most) if form else _json(data)
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
    return Refusal(413, "request_too_large", f"the body is larger than {most / 1e6:g} MB, the most that this server reads")


def fingerprint(body: Any) -> str:
    """The same for bodies that say the same, whatever form's boundary stands between their parts."""

    def short(data: bytes) -> str:
        return f"bytes:{hashlib.sha256(data).hexdigest()}"

    return hashlib.sha256(json.dumps(body, sort_keys=True, default=short).encode()).hexdigest()


def parse_json(text: str | bytes, field: str) -> Any:
    """JSON without NaN and without a name given twice. Raises UserError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(twice, f"{twice}: is given twice")
        return found

    def never(word: str) -> Any:
        raise ValueError(f"{word} is no number")

    try:
        text = text.decode() if isinstance(text, bytes) else text  # json itself would take UTF-16 too
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


def _form(data: bytes, content_type: str, most: int) -> dict[str, Any]:
    options = MultipartParseOptions()
    options.max_body_part_count, options.max_body_part_buffer_size = MOST_PARTS, most
    parts: dict[str, list[tuple[list[str], Any]]] = {}
    try:
        for part in MultipartFormHandler(options).deserialize(io.BytesIO(data), content_type, len(data)):
            spelled, file = _headed(part)
            name, path = _path(spelled)
            value = part.get_data()
            parts.setdefault(name, []).append((path, value if file else _text(name, value)))
    except (falcon.MediaMalformedError, falcon.HTTPInvalidHeader) as error:
        raise UserError("body", f"body: is not a form that can be read ({error.description or error.title})") from error
    return {name: _joined(name, given) for name, given in parts.items()}


def _headed(part: BodyPart) -> tuple[str, bool]:
    """(name of a part, whether it is a file), as its header says."""
    try:
        return part.name or "", part.filename is not None
    except (UnicodeDecodeError, LookupError):
        raise UserError("body", "body: the header of a part of the form is not text in UTF-8") from None


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UserError(name, f"{name}: is not text in UTF-8; a file's part has a filename") from None


def _path(spelled: str) -> tuple[str, list[str]]:
    """`a[][key]` as ("a", ["", "key"])."""
    match = _NAME.fullmatch(spelled)
    keys = re.findall(r"\[([^\[\]]*)\]", match[2]) if match else []
    if match is None or len(keys) > MOST_DEPTH:
        raise UserError("body", f"body: {spelled[:80]!r} is not the name of a field; the forms are name, name[] and name[key]")
    return match[1], keys


def _joined(name: str, parts: list[tuple[list[str], Any]]) -> Any:
    """The value that parts of one name make, each with the keys that are left of its path."""
    if not any(path for path, _ in parts):
        values = [value for _, value in parts]
        return values[0] if len(values) == 1 else values
    below: dict[str, list[tuple[list[str], Any]]] = {}
    for path, value in parts:
        if not path or ("" in below and path[0] != "") or (below and "" not in below and path[0] == ""):
            raise UserError(name, f"{name}: is given in two forms at once; the forms are name, name[] and name[key]")
        below.setdefault(path[0], []).append((path[1:], value))
    found = {key: _joined(name, inner) for key, inner in below.items()}
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
        raise UserError(name, f"{name}: not every entry has the same keys, which a form cannot tell apart; give the list as JSON text")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _sound(name: str, value: Any, depth: int = 0) -> None:
    """Raise UserError for what no text can hold, and for nesting without end."""
    if depth > MOST_DEPTH:
        raise UserError(name, f"{name}: is nested deeper than {MOST_DEPTH}")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise UserError(name, f"{name}: holds a character that no text has (NUL, or half of a surrogate pair)")
    if isinstance(value, dict):
        for key, inner in value.items():
            _sound("body", key)
            _sound(name if depth else key, inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _sound(name, inner, depth + 1)


def _kind(value: Any) -> str:
    return {list: "list", str: "text", bool: "truth value", type(None): "null"}.get(type(value), "number")
