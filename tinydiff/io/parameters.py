"""Generation parameters as the text that files hold, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_text(parameters: Mapping[str, Any]) -> str:
    """Parameters as JSON that UTF-8 can hold: readable, but where a text has half a character, all in ASCII."""
    text = json.dumps(dict(parameters), ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(dict(parameters), default=str)
    return text


def as_ascii(parameters: Mapping[str, Any], most: int | None = None) -> bytes:
    """Parameters as ASCII JSON; above `most` bytes every long text is cut, further and further, until they
    fit.
    """
    data = json.dumps(dict(parameters), default=str).encode("ascii")
    length = 4096
    while most is not None and len(data) > most and length:
        data = json.dumps(
            {name: _cut(value, length) for name, value in parameters.items()}, default=str
        ).encode("ascii")
        length //= 2
    return data


def read(text: str | bytes | None) -> dict[str, Any]:
    """The parameters in a text; {} where it is another program's."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _cut(value: Any, length: int) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= length else f"{text[:length]}..."
