"""JSON schemas: their building blocks, and those of options, made from the records that check the options."""

from __future__ import annotations

import re
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tinydiff.entries import EntryDict
from tinydiff.values import descriptions

Schema = EntryDict

TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
BOUNDS = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum"}
"""Arguments of `values.within` -> keywords of JSON Schema."""
LARGEST = 2**53 - 1
"""The largest bound that is described. Up to here JSON numbers are exact in every language."""


def obj(
    properties: Schema,
    required: tuple[str, ...] | None = None,
    closed: bool = False,
    optional: Schema | None = None,
    **more: object,
) -> Schema:
    """An object.

    required: names of required properties, by default all of `properties`. optional: further properties.
    closed: no other properties are allowed.
    """
    needed = list(properties if required is None else required)
    schema = {"type": "object", "properties": {**properties, **(optional or {})}, "required": needed, **more}
    return {**schema, "additionalProperties": False} if closed else schema


def free(description: str, **more: Any) -> Schema:
    """An object with any properties."""
    return {"type": "object", "description": description, **more}


def string(description: str, **more: Any) -> Schema:
    """The schema of a string."""
    return {"type": "string", "description": description, **more}


def integer(description: str, least: int | None = None, most: int | None = None, **more: Any) -> Schema:
    """The schema of an integer."""
    bounds = {"minimum": least, "maximum": most}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    return {"type": "integer", "description": description, **bounds, **more}


def number(description: str, **more: Any) -> Schema:
    """The schema of a number."""
    return {"type": "number", "description": description, **more}


def boolean(description: str) -> Schema:
    """The schema of a boolean."""
    return {"type": "boolean", "description": description}


def choice(description: str, *values: Any, **more: Any) -> Schema:
    """The schema of one of several values."""
    return {"enum": list(values), "description": description, **more}


def array(items: Schema, description: str, **more: Any) -> Schema:
    """The schema of an array."""
    return {"type": "array", "items": items, "description": description, **more}


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


_STRENGTH = {"type": "number", "minimum": -100, "maximum": 100}
_ADAPTER = obj({"name": {"type": "string"}}, closed=True, optional={"scale": _STRENGTH})
LORAS: Schema = {
    "anyOf": [
        free("Strength of each adapter.", additionalProperties=_STRENGTH),
        array({"anyOf": [{"type": "string"}, _ADAPTER]}, "Adapters by name, or each with its strength."),
    ]
}
"""LoRA adapters and their strengths."""


@cache
def docstrings(record: type) -> dict[str, str]:
    """Field -> its description, without the sentences about the command line."""
    return {
        name: " ".join(each for each in re.split(r"(?<=\.) ", text) if "--" not in each)
        for name, text in descriptions(record).items()
    }


def option(record: type, name: str) -> Schema:
    """The schema of an option of `record`; an option with several values may be one value or a list."""
    description = {"description": docstrings(record)[name]}
    if name in ("loras", "refine_loras"):
        return LORAS | description
    if name == "cache_dit_params":
        return free(description["description"], additionalProperties={"type": "number"})
    if name == "diffusers_kwargs":
        return {"type": "object", **description}
    kind, limits = get_type_hints(record)[name], record.__dataclass_fields__[name].metadata
    if NoneType in get_args(kind):
        kind = next((one for one in get_args(kind) if one is not NoneType), kind)
    several = get_origin(kind) is tuple
    inner = get_args(kind)[0] if several else kind
    one: Schema = {"enum": list(get_args(inner))} if get_origin(inner) is Literal else {"type": TYPES[inner]}
    one |= {
        word: limits[key] for key, word in BOUNDS.items() if abs(limits.get(key, float("inf"))) <= LARGEST
    }
    if several:
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}], **description}
    return one | description
