"""A component's config.json as its record's Config, with what its preprocessor's files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from tinydiff.entries import is_object, typed
from tinydiff.io.sources import Component
from tinydiff.models.family import Encoder, Record
from tinydiff.ops.network import Config
from tinydiff.records import UserError, nearest

DECODED = ("bitsandbytes", "modelopt")
"""Methods of a quantization_config whose weights `io.quantised` decodes."""


def read_config(family: Record, component: Component) -> Config:
    """The network's `Config` from its config.json.

    Raises UserError for a field whose meaning is unknown, or a value out of range.
    """
    stored, class_name, path = component.entries(), component.class_name, component.where()
    try:
        stored = _of_whole_weights(stored)
        config = (
            family.read(stored, class_name)
            if family.read is not None
            else _config(family, stored, class_name)
        )
        for row in family.spec(config):
            if 0 in row.shape:
                raise ValueError(f"{row.name} would have the shape {list(row.shape)}")
    except (ValueError, TypeError) as error:
        raise UserError(component.option, f"{path}: {error}") from error
    except (ArithmeticError, LookupError) as error:
        raise UserError(
            component.option,
            f"{path}: its values do not describe a valid network ({type(error).__name__}: {error})",
        ) from error
    return config


def _of_whole_weights(stored: Mapping[str, object]) -> Mapping[str, object]:
    """The entries without what they say of quantised weights, which are decoded as they are read."""
    said = stored.get("quantization_config")
    if said is None:
        return stored
    method = said.get("quant_method") if is_object(said) else said
    if method not in DECODED:
        message = f"its weights are quantised by {method!r}; those of {' and '.join(DECODED)} are read"
        raise ValueError(f"field 'quantization_config': {message}")
    return {name: value for name, value in stored.items() if name != "quantization_config"}


def _config(family: Record, stored: Mapping[str, object], class_name: str) -> Config:
    """The Config whose fields are the file's own; an unknown field that holds null says nothing."""
    entries = {name: value for name, value in stored.items() if not name.startswith("_")}
    known = {f.name for f in fields(family.config)}
    if unknown := sorted(name for name in entries.keys() - known if entries[name] is not None):
        raise ValueError(f"field {unknown[0]!r} is unknown to {class_name}{nearest(unknown[0], known)}")
    return family.config(**typed(family.config, entries))


def preprocessed(family: Encoder, config: Config, component: Component) -> Config:
    """An encoder's Config with what the preprocessor's files say.

    transformers 5 may keep that in processor_config.json.
    """
    assert family.preprocessor is not None
    whole, own = (component.json.get(f"{name}_config.json", {}) for name in ("processor", "preprocessor"))
    inner = whole.get("image_processor")
    file = "processor_config.json" if is_object(inner) else "preprocessor_config.json"
    if not {"processor_config.json", "preprocessor_config.json"} & component.json.keys():
        return config
    try:
        return replace(config, **family.preprocessor[1](inner if is_object(inner) else own, config))
    except ValueError as error:
        raise UserError(component.option, f"{component.where(file)}: {error}") from error
