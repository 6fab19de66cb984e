"""The values of options: their types and bounds, and how they are read. No torch here.

A value is a word of a command line, or a value of a JSON or YAML file or of a Python program. None means that
the option is not given.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tinydiff import unsupported
from tinydiff.entries import Entries
from tinydiff.records import UserError, brief, nearest

Precision = Literal["fp32", "fp16", "bf16"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
Attention = Literal["sdpa", "flash", "cudnn", "efficient", "math"]

SAME_ATTENTION = {
    "torch_sdpa": "sdpa",
    "native": "sdpa",
    "fa": "flash",
    "fa2": "flash",
    "torch_cudnn_sdpa": "cudnn",
}
"""SGLang's names for attention kernels of torch."""

TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

MOST_VALUES = 100_000
"""Most numbers of one option."""
MOST_DIGITS = 400
"""Most characters of a number. The largest float has 309 digits."""

Record = TypeVar("Record")


def within(
    default: Any = None,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    units: Mapping[str, float] | None = None,
) -> Any:
    """A dataclass field whose numbers must be in [least, most] and greater than `above`.

    units: what may follow a number, and what it multiplies the number by.
    """
    return field(default=default, metadata={"least": least, "most": most, "above": above, "units": units})


def same(record: type, name: str) -> Any:
    """A field that is an option of another record: its default, bounds and description."""
    entry = record.__dataclass_fields__[name]
    metadata = {**entry.metadata, "same": record}
    if entry.default_factory is not MISSING:
        return field(default_factory=entry.default_factory, metadata=metadata)
    return field(default=entry.default, metadata=metadata)


def positional(default: str | None = "") -> Any:
    """A field that a command line gives without a flag."""
    return field(default=default, metadata={"positional": True})


def outcome() -> Any:
    """A field that is no option: a tuple that reading the options fills."""
    return field(default=(), metadata={"outcome": True})


def is_positional(entry: Field[Any]) -> bool:
    """Whether a command line gives the field without a flag."""
    return "positional" in entry.metadata


@cache
def options_of(record: type) -> tuple[tuple[Field[Any], Any], ...]:
    """(field, type) of each option of a record, and of each record in it."""
    hints = get_type_hints(record)
    return tuple(
        (entry, hints[entry.name]) for entry in fields(cast(Any, record)) if "outcome" not in entry.metadata
    )


@cache
def descriptions(record: type) -> Mapping[str, str]:
    """Field -> the text of the docstring below it, on one line, for --help and OpenAPI."""
    texts = dict(_docstrings(record.__module__).get(record.__name__, {}))
    for entry in fields(cast(Any, record)):
        if "same" in entry.metadata:
            texts[entry.name] = descriptions(entry.metadata["same"])[entry.name]
    return texts


@cache
def _docstrings(module: str) -> Mapping[str, Mapping[str, str]]:
    """Class -> field -> docstring, of a module."""
    found = {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    for record in (each for each in tree.body if isinstance(each, ast.ClassDef)):
        for entry, text in pairwise(record.body):
            if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr):
                line = " ".join(ast.literal_eval(text.value).split())
                found.setdefault(record.name, {})[ast.unparse(entry.target)] = line
    return found


def filled(record: type[Record], entries: Entries) -> Record:
    """A record with those of `entries` that are its options, or those of a record in it. Raises UserError.

    None, and an empty list where the default is one, mean that an option is not given.
    """
    values = {}
    for entry, kind in options_of(record):
        if is_dataclass(kind):
            values[entry.name] = filled(cast(Any, kind), entries)
            continue
        value = of_python(entries.get(entry.name))
        empty = entry.default == () and isinstance(value, list | tuple) and not value
        if value is not None and not empty:
            values[entry.name] = within_limits(entry.name, kind, value, entry.metadata)
    return record(**values)


def within_limits(name: str, kind: Any, value: Any, limits: Mapping[str, float]) -> Any:
    """`value` as the annotated type `kind`, its numbers in the bounds set by `within`. Raises UserError."""
    if isinstance(value, list) and len(cast(list[Any], value)) == 1:
        value = cast(list[Any], value)[0] if limits.get("units") else value
    if (units := limits.get("units")) and isinstance(value, str):
        value = _without_unit(name, value, cast(Any, units))
    typed = read(name, kind, value)
    for number in typed if isinstance(typed, tuple) else (typed,):
        _check_range(name, number, limits)
    return typed


GIGABYTES = {"GB": 1.0, "GiB": 2**30 / 1e9, "G": 1.0, "MB": 1e-3, "M": 1e-3, "TB": 1e3, "T": 1e3}
"""Units of memory, in GB."""


def _without_unit(name: str, text: str, units: Mapping[str, float]) -> Any:
    """A number with a unit behind it; the text itself where there is no unit."""
    number, unit = re.fullmatch(r"\s*([^A-Za-z]*)\s*(.*?)\s*", text, re.DOTALL).groups()  # pyright: ignore
    found = next((factor for each, factor in units.items() if each.lower() == unit.lower()), None)
    if not number or not unit or "e" in unit[:1].lower():
        return text
    if found is None:
        hint = nearest(unit, units)
        raise UserError(name, f"{name}: {brief(unit)} is not one of the units {', '.join(units)}{hint}")
    return read(name, float, number.strip()) * found


def read(name: str, kind: Any, value: Any) -> Any:
    """`value` as the annotated type `kind`. Raises UserError."""
    origin, inner = get_origin(kind), get_args(kind)
    value = of_python(value)
    if kind in (Any, object):
        return value
    if origin in (Union, UnionType):
        return None if value is None else read(name, next(k for k in inner if k is not NoneType), value)
    if origin is tuple:
        return _several(name, inner[0], value)
    if origin is not None and origin is not Literal:
        return {key: read(f"{name}.{key}", inner[1], word) for key, word in value.items() if word is not None}
    if isinstance(value, list | tuple):
        if len(value) != 1:
            words = " ".join(map(brief, value[:20])) or "none"
            message = f"takes one value and was given {words}; a string with spaces needs quotes"
            raise UserError(name, f"{name}: {message}")
        value = of_python(value[0])
    if value is True and kind is not bool:
        raise UserError(name, f"{name}: takes {_allowed(kind)} and was given no value")
    return _choice(name, inner, value) if origin is Literal else _scalar(name, kind, value)


def of_python(value: Any) -> Any:
    """Scalars and 1-D arrays of NumPy, torch and the like as Python numbers and lists; a range as a list."""
    if isinstance(value, range):
        return list(value[: MOST_VALUES + 1])
    if type(getattr(value, "ndim", None)) is int and value.ndim <= 1 and hasattr(value, "tolist"):
        return value[: MOST_VALUES + 1].tolist() if value.ndim else value.tolist()
    return value


def _several(name: str, kind: Any, value: Any) -> tuple[Any, ...]:
    """The values of an option that takes any number. In a string, commas or spaces separate numbers."""
    words = list(value) if isinstance(value, list | tuple) else [value]
    if kind is str and len(words) > MOST_VALUES:
        raise UserError(name, f"{name}: takes at most {MOST_VALUES} values and was given more")
    if kind is not str:
        longest = max((len(word) for word in words if isinstance(word, str)), default=0)
        if len(words) > MOST_VALUES or longest > MOST_VALUES * 20:
            raise UserError(name, f"{name}: takes at most {MOST_VALUES} values and was given more")
        split = (word.replace(",", " ").split() if isinstance(word, str) else [word] for word in words)
        words = list(chain.from_iterable(split))
    if not words or words[0] is True:
        raise UserError(name, f"{name}: takes one value or more and was given none")
    return tuple(read(name, kind, word) for word in words)


def _scalar(name: str, kind: type, value: Any) -> Any:
    """One bool, int, float or str."""
    if kind is bool:
        truth = {"true": True, "false": False}.get(value[:6].lower()) if isinstance(value, str) else value
        if not isinstance(truth, bool):
            raise _wrong(name, kind, value)
        return truth
    if kind is str:
        return _string(name, value)
    if isinstance(value, str):
        return _number(name, kind, value)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise _wrong(name, kind, value)
    try:
        return kind(value)
    except OverflowError:  # an integer larger than every float
        return math.inf if value > 0 else -math.inf


def _string(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise _wrong(name, str, value)
    try:
        text = str(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        raise _wrong(name, str, value) from None
    return _encodable(name, text)


_PATHS = re.compile(r".*_(path|file|file_name|dir)|component_paths\..*")
"""Options that are paths. They may contain bytes that are not UTF-8, as file names do."""


def _encodable(name: str, text: str) -> str:
    """The text, if it can be encoded; only a path may contain bytes that are not UTF-8."""
    try:
        text.encode("utf-8", "surrogateescape" if _PATHS.fullmatch(name) else "strict")
    except UnicodeEncodeError:
        message = f"{brief(text)} contains bytes that are not UTF-8, or half a character"
        raise UserError(name, f"{name}: {message}") from None
    return text


_FORMS = {
    int: re.compile(r"\s*[+-]?[0-9]+\s*"),
    float: re.compile(
        r"\s*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity|nan)\s*", re.IGNORECASE
    ),
}
"""How numbers are written. int() and float() would also take 1_0, and the digits of every script."""


def _number(name: str, kind: type, text: str) -> Any:
    if len(text) > MOST_DIGITS:
        raise UserError(name, f"{name}: {brief(text)} has too many digits")
    if not _FORMS[kind].fullmatch(text):
        raise _wrong(name, kind, text)
    return kind(text)


def _wrong(name: str, kind: type, value: Any) -> UserError:
    return UserError(name, f"{name}: {brief(value)} is not {_allowed(kind)}")


def _choice(name: str, choices: Sequence[str], value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(name, f"{name}: {brief(value)} is not one of {', '.join(choices)}")
    text = SAME_ATTENTION.get(value, value) if tuple(choices) == get_args(Attention) else value
    if text in unsupported.CHOICES.get(name.partition(".")[0], ()):
        raise UserError(name, f"{name}: {text!r} is not supported yet; choose one of {', '.join(choices)}")
    if text not in choices:
        hint = nearest(text, choices)
        raise UserError(name, f"{name}: {brief(text)} is not one of {', '.join(choices)}{hint}")
    return text


def _allowed(kind: Any) -> str:
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else TYPE_NAMES[kind]


def _check_range(name: str, value: Any, limits: Mapping[str, float]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(name, f"{name}: {value} is not a finite number")
    least, above = limits.get("least", -math.inf), limits.get("above", -math.inf)
    most = limits.get("most", math.inf)
    if least <= value <= most and value > above:
        return
    low = f"at least {least}" if least > -math.inf else f"above {above}"
    high = f" and at most {most}" if most < math.inf else ""
    raise UserError(name, f"{name}: {brief(value)} must be {low}{high}")
