"""What an address says behind its question mark."""

from __future__ import annotations

from collections.abc import Sequence

import falcon

from tinydiff.records import UserError, nearest, shown
from tinydiff.serve.errors import Refusal


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


def whole_number(query: dict[str, str], name: str, least: int, most: int, default: int) -> int:
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
