"""The entries of a JSON file as the fields of a record.

This is the one place where their types and bounds are checked. No torch here.

A record is a frozen dataclass whose annotations say the types; `BOUNDS` says by name what a number may be.
What a file says is so either a value that the record's code can work with, or one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints

Entries = Mapping[str, Any]
"""Values by name, as a file or a user gives them; each is checked where it is read."""
EntryDict = dict[str, Any]
"""The same, in the making."""


MOST = 2**24
"""No width, size or count of a network is larger."""

LARGEST = 1e30
"""No number is further from 0."""

BOUNDS: dict[str, tuple[float, float]] = {
    "boundary_ratio": (0.0, 1.0),
    "*eps": (0.0, 1.0),
    "*epsilon": (0.0, 1.0),
    "*token_id": (-1, 2**31),
    "*single_layers": (0, 1000),
    "n_refiner_layers": (0, 1000),
    "dual_attention_layers": (0, 1000),
    "audio_inject_layers": (0, 1000),
    "fullatt_block_indexes": (0, 1000),
    "max_window_layers": (0, MOST),
    "mrope_section": (0, MOST),
    "partial_rotary_factor": (0.0, 1.0),
    "original_max_position_embeddings": (0, MOST),
    "*layers": (1, 1000),
    "*blocks": (1, 1000),
    "layers_per_block": (1, 1000),
    "depth": (1, 1000),
    "*scale_factor_*": (1, 1024),
    "shift": (1e-6, 1e6),
    "flow_shift": (1e-6, 1e6),
    "shift_terminal": (0.0, 0.999),
    "*theta": (1.001, 1e12),
    "*base_freq": (1.001, 1e12),
    "shift_factor": (-1e6, 1e6),
    "*factor": (1e-6, 1e6),
    "beta_*": (1e-6, 1e6),
    "mscale*": (0.0, 1e6),
    "resample": (0, 5),
    "extra_ids": (0, 100_000),
    "*std": (1e-12, 1e12),
    "*softcapping": (1e-6, 1e12),
    "query_pre_attn_scalar": (1e-6, 1e12),
    "mlp_ratio": (1e-6, 1e3),
}
"""Pattern of a field's name -> the least and the most of its numbers; the first that fits counts."""

SHOWN = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def typed(record: type, entries: Entries) -> EntryDict:
    """Those of `entries` that are fields of `record`, lists made tuples.

    Raises ValueError, one sentence, naming the field.
    """
    kinds = _kinds(record)
    return {name: value(name, kinds[name], entries[name]) for name in kinds if name in entries}


@cache
def _kinds(record: type) -> EntryDict:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def value(name: str, kind: Any, entry: Any) -> Any:
    """`entry` as the annotated type `kind`. Raises ValueError, one sentence, naming the field."""
    try:
        return _read(kind, entry, *_bounds(name))
    except ValueError as error:
        raise ValueError(f"{name} is {_brief(entry)}; it must be {error}") from None


def mapping(name: str, entry: object) -> Entries:
    """An entry that must be an object. Raises ValueError, one sentence, naming the field."""
    if not is_object(entry):
        raise ValueError(f"{name} is {entry!r}; it must be an object")
    return entry


def is_object(entry: object) -> TypeGuard[Entries]:
    """Whether a value of a JSON file is an object."""
    return isinstance(entry, Mapping)


def is_array(entry: object) -> TypeGuard[Sequence[object]]:
    """Whether a value of a JSON file is an array."""
    return isinstance(entry, list)


def _bounds(name: str) -> tuple[float, float]:
    matching = (bounds for pattern, bounds in BOUNDS.items() if fnmatchcase(name, pattern))
    return next(matching, (-math.inf, math.inf))


def _read(kind: Any, entry: Any, least: float, most: float) -> Any:
    """The value, or ValueError with what is allowed."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(inner, entry, least, most)
    if origin is tuple:
        return _listed(inner, entry, least, most)
    if is_dataclass(kind) or origin is not None:
        wanted: Any = kind if origin is None else origin
        if not isinstance(entry, wanted):
            raise ValueError("an object")
        return entry
    if kind is int or kind is float:
        return _number(kind, entry, least, most)
    if not isinstance(entry, kind):
        raise ValueError(SHOWN[kind])
    return entry


def _one_of(kinds: tuple[Any, ...], entry: Any, least: float, most: float) -> Any:
    if entry is None and NoneType in kinds:
        return None
    allowed = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _read(kind, entry, least, most)
            except ValueError as error:
                allowed.append(str(error))
    raise ValueError(" or ".join([*allowed, *(["null"] if NoneType in kinds else [])]))


def _listed(inner: tuple[Any, ...], entry: Any, least: float, most: float) -> tuple[Any, ...]:
    many = inner[-1] is Ellipsis
    kinds = set(inner) - {Ellipsis}
    assert len(kinds) == 1, "a list holds values of one type"
    [kind] = kinds
    if not isinstance(entry, list | tuple) or (not many and len(entry) != len(inner)):
        raise ValueError(f"a list of {'values' if many else len(inner)}, each {_allowed(kind, least, most)}")
    try:
        return tuple(_read(kind, each, least, most) for each in entry)
    except ValueError as error:
        raise ValueError(f"a list of values, each {error}") from None


def _number(kind: type, entry: Any, least: float, most: float) -> Any:
    least, most = _limits(kind, least, most)
    number = isinstance(entry, int | float) and not isinstance(entry, bool) and -math.inf < entry < math.inf
    if (
        not number
        or (kind is int and entry != int(entry))
        or not least <= entry <= most
        or abs(entry) > LARGEST
    ):
        raise ValueError(_allowed(kind, least, most))
    return kind(entry)


def _limits(kind: Any, least: float, most: float) -> tuple[float, float]:
    """Integers are counts and sizes where no bounds say more."""
    return (1, MOST) if kind is int and (least, most) == (-math.inf, math.inf) else (least, most)


def _allowed(kind: Any, least: float, most: float) -> str:
    least, most = _limits(kind, least, most)
    bounds = [
        f"{word} {limit:.12g}"
        for word, limit in (("at least", least), ("at most", most))
        if math.isfinite(limit)
    ]
    return " ".join([SHOWN.get(kind, "a value"), " and ".join(bounds)]).strip()


def _brief(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 60 else f"{text[:57]}..."
