"""Generation parameters as JSON in files, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping


def as_text(parameters: Mapping[str, object]) -> str:
    """Parameters as JSON that can be encoded: readable UTF-8, or ASCII if a string has a lone surrogate."""
    text = json.dumps(dict(parameters), ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(dict(parameters), default=str)
    return text


def as_ascii(parameters: Mapping[str, object], most: int | None = None) -> bytes:
    """Parameters as ASCII JSON of at most `most` bytes: long strings are cut until it fits."""
    text, length = json.dumps(dict(parameters), default=str), 4096
    while most is not None and len(text) > most and length:
        cut = {name: _cut(value, length) for name, value in parameters.items()}
        text, length = json.dumps(cut, default=str), length // 2
    return text.encode("ascii")


def read(text: str | bytes | None) -> dict[str, object]:
    """The parameters in a text; {} if another program wrote it."""
    try:
        parameters = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return parameters if isinstance(parameters, dict) else {}


def _cut(value: object, length: int) -> object:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= length else f"{text[:length]}..."
