"""One value of an option: how it is read, as what type, and in which bounds. No torch here.

A value is a word of a command line, or what a JSON or YAML file or a Python program holds. None means that it
is not given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tinydiff import unsupported
from tinydiff.records import UserError, nearest, shown

Precision = Literal["fp32", "fp16", "bf16"]
Attention = Literal["sdpa", "flash", "cudnn", "efficient", "math"]

SAME_ATTENTION = {
    "torch_sdpa": "sdpa",
    "native": "sdpa",
    "fa": "flash",
    "fa2": "flash",
    "torch_cudnn_sdpa": "cudnn",
}
"""SGLang's names of the kernels that torch has."""

SHOWN_AS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

MOST_VALUES = 100_000
"""Numbers that one option takes."""
MOST_DIGITS = 400
"""Characters of a number; the largest float has 309 digits."""

Record = TypeVar("Record")


def within(
    default: Any = None, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> Any:
    """A field whose numbers lie in [least, most] and above `above`."""
    return field(default=default, metadata={"least": least, "most": most, "above": above})


_hints = cache(get_type_hints)


def filled(group: type[Record], entries: Mapping[str, Any]) -> Record:
    """A record of options with those of `entries` that are its own, read and in range. Raises UserError.

    None, and an empty list where the default is one, mean that an option is not given.
    """
    found, hints = {}, _hints(group)
    for entry in fields(cast(Any, group)):
        given = of_python(entries.get(entry.name))
        if given is not None and not (entry.default == () and isinstance(given, list | tuple) and not given):
            found[entry.name] = within_limits(entry.name, hints[entry.name], given, entry.metadata)
    return group(**found)


def within_limits(name: str, kind: Any, value: Any, limits: Mapping[str, float]) -> Any:
    """`value` as the annotated type `kind`, its numbers in the bounds that `within` names. Raises UserError."""
    made = read(name, kind, value)
    for number in made if isinstance(made, tuple) else (made,):
        _in_range(name, number, limits)
    return made


def read(name: str, kind: Any, value: Any) -> Any:
    """`value` as the annotated type `kind`. Raises UserError."""
    origin, inner = get_origin(kind), get_args(kind)
    value = of_python(value)
    if origin in (Union, UnionType):
        return None if value is None else read(name, next(k for k in inner if k is not NoneType), value)
    if origin is tuple:
        return _several(name, inner[0], value)
    if origin is not None and origin is not Literal:
        return {key: read(f"{name}.{key}", inner[1], word) for key, word in value.items() if word is not None}
    if isinstance(value, list | tuple):
        if len(value) != 1:
            words = " ".join(map(shown, value[:20])) or "none"
            raise UserError(
                name, f"{name}: takes one value and was given {words}; a text with spaces needs quotes"
            )
        value = of_python(value[0])
    if value is True and kind is not bool:
        raise UserError(name, f"{name}: takes {_allowed(kind)} and was given no value")
    return _choice(name, inner, value) if origin is Literal else _plain(name, kind, value)


def of_python(value: Any) -> Any:
    """A number or a list of numbers of NumPy, and of whatever else has arrays, as Python has it; a range as a
    list.
    """
    if isinstance(value, range):
        return list(value[: MOST_VALUES + 1])
    if type(getattr(value, "ndim", None)) is int and value.ndim <= 1 and hasattr(value, "tolist"):
        return value[: MOST_VALUES + 1].tolist() if value.ndim else value.tolist()
    return value


def _several(name: str, kind: Any, value: Any) -> tuple[Any, ...]:
    """The values of an option that takes any number of them; numbers of a text stand between commas or
    spaces.
    """
    words = list(value) if isinstance(value, list | tuple) else [value]
    if kind is not str:
        if len(words) > MOST_VALUES or any(
            isinstance(word, str) and len(word) > MOST_VALUES * 20 for word in words
        ):
            raise UserError(name, f"{name}: takes at most {MOST_VALUES} values and was given more")
        words = [
            part
            for word in words
            for part in (word.replace(",", " ").split() if isinstance(word, str) else [word])
        ]
    if not words or words[0] is True:
        raise UserError(name, f"{name}: takes one value or more and was given none")
    return tuple(read(name, kind, word) for word in words)


def _plain(name: str, kind: type, value: Any) -> Any:
    """One bool, int, float or str."""
    if kind is bool:
        truth = {"true": True, "false": False}.get(value[:6].lower()) if isinstance(value, str) else value
        if not isinstance(truth, bool):
            raise _wrong(name, kind, value)
        return truth
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
            raise _wrong(name, kind, value)
        try:
            text = str(value)
        except ValueError:  # an integer of more digits than Python writes
            raise _wrong(name, kind, value) from None
        return _encodable(name, text)
    if isinstance(value, str):
        return _number(name, kind, value)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise _wrong(name, kind, value)
    try:
        return kind(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf


_NAMES_FILE = re.compile(r".*_(path|file|file_name|dir)|component_paths\..*")
"""Options whose text is a path: it may hold bytes that are not UTF-8, as file names do."""


def _encodable(name: str, text: str) -> str:
    """A text that can be written again: no halves of characters and, but in paths, no bytes that are not
    UTF-8.
    """
    try:
        text.encode("utf-8", "surrogateescape" if _NAMES_FILE.fullmatch(name) else "strict")
    except UnicodeEncodeError:
        raise UserError(
            name, f"{name}: {shown(text)} holds bytes that are not UTF-8, or half a character"
        ) from None
    return text


_FORMS = {
    int: re.compile(r"\s*[+-]?[0-9]+\s*"),
    float: re.compile(
        r"\s*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity|nan)\s*", re.IGNORECASE
    ),
}
"""How numbers are written. Python would also read 1_0 as ten, and the digits of every script."""


def _number(name: str, kind: type, text: str) -> Any:
    if len(text) > MOST_DIGITS:
        raise UserError(name, f"{name}: {shown(text)} has too many digits")
    if not _FORMS[kind].fullmatch(text):
        raise _wrong(name, kind, text)
    return kind(text)


def _wrong(name: str, kind: type, value: Any) -> UserError:
    return UserError(name, f"{name}: {shown(value)} is not {_allowed(kind)}")


def _choice(name: str, choices: Sequence[str], value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(name, f"{name}: {shown(value)} is not one of {', '.join(choices)}")
    text = SAME_ATTENTION.get(value, value) if tuple(choices) == get_args(Attention) else value
    if text in unsupported.CHOICES.get(name.partition(".")[0], ()):
        raise UserError(name, f"{name}: {text!r} is not supported yet; choose one of {', '.join(choices)}")
    if text not in choices:
        raise UserError(
            name, f"{name}: {shown(text)} is not one of {', '.join(choices)}{nearest(text, choices)}"
        )
    return text


def _allowed(kind: Any) -> str:
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else SHOWN_AS[kind]


def _in_range(name: str, value: Any, limits: Mapping[str, float]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(name, f"{name}: {value} is not a finite number")
    least, most, above = (
        limits.get(key, bound)
        for key, bound in (("least", -math.inf), ("most", math.inf), ("above", -math.inf))
    )
    if least <= value <= most and value > above:
        return
    low = f"at least {least}" if least > -math.inf else f"above {above}"
    raise UserError(
        name, f"{name}: {shown(value)} must be {low}{f' and at most {most}' if most < math.inf else ''}"
    )
