"""The components of the model that the options name, each from where the options say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tinydiff.config import ModelOptions
from tinydiff.io import hub, sources
from tinydiff.io.sources import Checkpoint, Component
from tinydiff.models import registry
from tinydiff.models.classes import RECORDS
from tinydiff.records import UserError, check_known

SHIPPED = Path(__file__).parent.parent / "shapes"
"""The model in the package."""


def chosen(options: ModelOptions) -> Checkpoint:
    """The model that `options` name, its single components in the place of its own. Raises UserError."""
    asked = SHIPPED if options.model_path == registry.SHIPPED else options.model_path
    directory = hub.resolve(asked, options.revision, variant=options.variant)
    checkpoint = sources.from_directory(directory, options.model_path)
    parts = dict(checkpoint.components)
    for name, path in options.component_paths.items():
        check_known("component_paths", name, [name for name in parts if name != "image_processor"])
        place = hub.resolve(path, field=f"{name}_path", variant=options.variant)
        parts[name] = _in_place_of(parts[name], place)
    return replace(checkpoint, components=parts)


def _in_place_of(listed: Component, place: Path) -> Component:
    """The component in a directory that stands in for the `listed` one: of the class that its own config.json
    names, where that is known.
    """
    option = f"{listed.name}_path"
    found = sources.component(listed.name, place, listed.library, listed.class_name, option)
    entries = found.json.get("config.json", {})
    names = (entries.get("_class_name"), *(entries.get("architectures") or ()))
    own = next((name for name in names if name in RECORDS), listed.class_name)
    role = None if listed.class_name not in RECORDS else RECORDS[listed.class_name].role
    if role is not None and own in RECORDS and RECORDS[own].role != role:
        message = f"{str(place)!r} is a {own}, which cannot stand in for a {listed.class_name}"
        raise UserError(option, f"{option}: {message}")
    return replace(found, class_name=own)
