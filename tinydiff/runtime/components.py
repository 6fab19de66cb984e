"""The components of the model that the options name, each from where the options say.

A weight file, in whatever layout, stands in for one component, or for the model: then the other components
are those of the released model whose weights it has.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tinydiff.config import ModelOptions
from tinydiff.entries import Entries
from tinydiff.io import archive, hub, overlay, sources
from tinydiff.io.sources import Checkpoint, Component
from tinydiff.io.weight_sources import check_weights, weight_files
from tinydiff.keymap import KeyMap, Shape
from tinydiff.models import registry, released
from tinydiff.models.classes import RECORDS
from tinydiff.models.family import Denoiser
from tinydiff.models.layouts.recognise import Found, config_from, layouts_of, prefixes, recognise
from tinydiff.ops.network import Config
from tinydiff.records import UserError, check_known

log = logging.getLogger(__name__)

Keys = Callable[[Config], KeyMap]
"""Config -> where the rows of such a network stand in a file."""

ADDED = {"spatial_upsampler": "latent_upsampler", "duration_head": "duration_head"}
"""Component that a user may add to a model -> its directory in the release's repository."""
SHIPPED = Path(__file__).parent.parent / "shapes"
"""The model in the package."""


def chosen(options: ModelOptions) -> Checkpoint:
    """The model that `options` name, single components and weights in the place of its own.
    Raises UserError.
    """
    file = hub.file(options.model_path, "model_path")
    checkpoint = _from_directory(options) if file is None else _around(file, options)
    parts = dict(checkpoint.components)
    for name, path in options.component_paths.items():
        listed = _optional(parts) | parts
        check_known("component_paths", name, [name for name in listed if name != "image_processor"])
        parts[name] = _in_place_of(listed[name], path, f"{name}_path", options.variant)
    for name, path in options.component_weights_paths.items():
        check_known(
            "component_weights_paths", name, [name for name in parts if parts[name].class_name in RECORDS]
        )
        parts[name] = _with_weights(parts[name], path, f"{name}_weights_path", options.variant)
    missing = [part for part in parts.values() if part.files is None and part.name != "scheduler"]
    if missing:
        flags = ", ".join(part.flag for part in missing)
        message = (
            f"{options.model_path!r} is one component of {checkpoint.name}; name the others with {flags}"
        )
        raise UserError("model_path", f"model_path: {message}")
    return replace(checkpoint, components=parts)


def _optional(parts: Mapping[str, Component]) -> dict[str, Component]:
    """The components that a user may add to a model, with the configs of their release."""
    denoiser = parts.get("transformer")
    record = None if denoiser is None else RECORDS.get(denoiser.class_name)
    if denoiser is None or not isinstance(record, Denoiser) or "config.json" not in denoiser.json:
        return {}
    known = record.optional_components(config_from(denoiser.class_name, denoiser.entries()))
    return {
        name: Component(name, "diffusers", class_name, {"config.json": entries})
        for name, (class_name, entries) in known.items()
    }


def _from_directory(options: ModelOptions) -> Checkpoint:
    """The model in a directory or at a hub id, or the one that an overlay makes of it."""
    if options.model_path == registry.SHIPPED:
        return sources.from_directory(hub.resolve(SHIPPED, options.revision), options.model_path)
    found = overlay.named(options.model_path, options.revision)
    directory = Path()
    if found is None:
        directory = hub.resolve(options.model_path, options.revision, variant=options.variant)
        found = overlay.of_directory(directory, options.model_path)
    if found is None:
        return sources.from_directory(directory, options.model_path)
    _check_runnable(found)
    whole = sources.from_directory(overlay.materialised(found, options.trust_remote_code), options.model_path)
    return replace(whole, components={name: _laid_out(part) for name, part in whole.components.items()})


def _check_runnable(found: overlay.Overlay) -> None:
    """Before anything is fetched: the model's network is one that runs here."""
    _, class_name = hub.read_index(found.directory).components.get("transformer", ("", ""))
    if class_name not in RECORDS:
        supported = ", ".join(name for name, record in RECORDS.items() if record.role == "dit")
        message = (
            f"{found.name!r} has a {class_name or 'network'} that is not supported; known are {supported}"
        )
        raise UserError("model_path", f"model_path: {message}")


def _laid_out(part: Component) -> Component:
    """A component whose weights are in whatever layout, or a pickle, with the map of its keys."""
    if part.class_name not in RECORDS or part.files is None or not part.files.is_dir():
        return part
    files_by_suffix = {file.suffix: file for file in part.files.iterdir()}
    pickled = [
        files_by_suffix[kind]
        for kind in archive.PICKLES
        if kind in files_by_suffix and ".safetensors" not in files_by_suffix
    ]
    files = pickled[0] if pickled else part.files
    shapes, _ = archive.header(*weight_files(files))
    return replace(part, files=files, keys=_keys_of(files, shapes, part))


def _in_place_of(listed: Component, path: str, option: str, variant: str | None) -> Component:
    """The component at `path` that stands in for the `listed` one: a file, or a directory of the class that
    its own config.json names, where that is known.
    """
    if (file := hub.file(path, option)) is not None:
        return _from_file(listed, file, option)
    place = _directory(listed, path, option, variant)
    replacement = sources.component(listed.name, place, listed.library, listed.class_name, option)
    entries = replacement.json.get("config.json", {})
    names = (entries.get("_class_name"), *(entries.get("architectures") or ()))
    own = next((name for name in names if name in RECORDS), listed.class_name)
    if listed.class_name in RECORDS and own in RECORDS and not _stands_in(own, listed.class_name):
        message = f"{str(place)!r} is a {own}, which cannot stand in for a {listed.class_name}"
        raise UserError(option, f"{option}: {message}")
    return replace(replacement, class_name=own)


def _directory(listed: Component, path: str, option: str, variant: str | None) -> Path:
    """The directory of a component that the user names.

    One that no model_index.json lists may lie in that of a whole model.
    """
    inside = ADDED.get(listed.name)
    if inside is not None and (whole := hub.resolve(path, field=option, only=(inside,)) / inside).is_dir():
        return whole
    return hub.resolve(path, field=option, variant=variant)


def _with_weights(listed: Component, path: str, option: str, variant: str | None) -> Component:
    """The listed component with its own config and the weights of a file, a directory or a hub id."""
    if (file := hub.file(path, option)) is not None:
        return _from_file(listed, file, option, config_stays=True)
    return replace(listed, files=hub.resolve(path, field=option, variant=variant), keys=None, option=option)


def _from_file(listed: Component, file: Path, option: str, config_stays: bool = False) -> Component:
    """The component that a weight file holds, in the place of the listed one.

    Shapes do not tell everything, so the listed component's config counts where it fits the file; else that
    of a released model whose weights have these shapes; else what the shapes tell. config_stays: none but the
    listed config is taken.
    """
    if listed.class_name not in RECORDS:
        raise UserError(
            option, f"{option}: a {listed.class_name} is a directory, and {str(file)!r} is a file"
        )
    record = RECORDS[listed.class_name]
    with about(option):
        shapes, metadata = archive.header(file)
        keys = _keys_of(file, shapes, listed)
        if keys is not None:
            return replace(listed, files=file, keys=keys, option=option)
        contents = recognise(shapes, metadata, str(file))
        match = next((each for each in contents if _stands_in(each.class_name, listed.class_name)), None)
        if match is None:
            classes = ", ".join(each.class_name for each in contents)
            message = f"{str(file)!r} holds a {classes}, which cannot stand in for a {listed.class_name}"
            raise UserError(option, f"{option}: {message}")
        if config_stays:
            config = config_from(listed.class_name, listed.entries())
            check_weights(file, record.spec(config), match.keys(config))
        class_name, entries = _described(match)
        json = {"config.json": entries}
        return Component(listed.name, listed.library, class_name, json, file, match.keys, option)


def _stands_in(class_name: str, listed: str) -> bool:
    """Whether a component of a class may take the place of a listed one.

    A model runs the encoder that it was trained with, and whatever has latents of its kind as autoencoder.
    """
    own, record = RECORDS[class_name], RECORDS[listed]
    return own is record or (own.role == record.role and record.role in ("dit", "vae"))


def _keys_of(file: Path, shapes: Mapping[str, Shape], listed: Component) -> Keys | None:
    """Where the weights of a network with the component's own config stand in a file; None where
    they do not.
    """
    record = RECORDS[listed.class_name]
    config = config_from(listed.class_name, listed.entries())
    rows = list(record.spec(config))
    for prefix in prefixes(shapes):
        for keys in (record.keys, *(partial(each.keys, prefix=prefix) for each in layouts_of(record))):
            try:
                check_weights(file, rows, keys(config))
                return keys
            except (UserError, ValueError):
                continue
    return None


@contextmanager
def about(option: str) -> Generator[None]:
    """Mistakes in a file name the option that gave it."""
    try:
        yield
    except UserError as error:
        if error.field != "model_path" or option == "model_path":
            raise
        raise UserError(option, f"{option}{str(error).removeprefix('model_path')}") from error


def _described(found: Found) -> tuple[str, Entries]:
    """(class, entries of config.json) of a network that a file holds."""
    for model in found.models:
        for class_name, entries in released.COMPONENTS[model].values():
            if RECORDS.get(class_name) is RECORDS[found.class_name]:
                return class_name, entries
    return found.class_name, found.entries


def nearest_first(models: tuple[str, ...], file: Path) -> list[str]:
    """Released models, first those whose names share most words with the file's."""
    words = set(re.findall(r"[a-z]+|[0-9.]+", file.stem.lower()))

    def shared(model: str) -> int:
        return len(words & set(re.findall(r"[a-z]+|[0-9.]+", model.rpartition("/")[2].lower())))

    return sorted(models, key=shared, reverse=True)


def _around(file: Path, options: ModelOptions) -> Checkpoint:
    """The released model whose denoiser, and perhaps more, a file holds; the rest as the hub has it."""
    contents = recognise(*archive.header(file), str(file))
    denoiser = contents[0]
    if denoiser.role != "dit":
        flag = {"vae": "--vae-path", "image_encoder": "--image-encoder-path"}.get(
            denoiser.role, "--text-encoder-path"
        )
        message = f"{str(file)!r} holds a {denoiser.class_name}, not a model; {flag} takes it"
        raise UserError("model_path", f"model_path: {message}")
    names = [name for name in nearest_first(denoiser.models, file) if name in released.REPOSITORIES]
    name = options.model_id or next(iter(names), None)
    if name is None or name not in released.REPOSITORIES:
        message = f"{str(file)!r} holds a {denoiser.class_name} whose size is that of no released model"
        raise UserError(
            "model_path", f"model_path: {message}; give it as --transformer-path beside the model's directory"
        )
    if len(names) > 1 and options.model_id is None:
        log.info("%s is taken for %s; --model-id names another of %s", file, name, ", ".join(names[1:]))
    checkpoint = sources.from_released(name, released.REPOSITORIES[name])
    shapes, _ = archive.header(file)
    parts = dict(checkpoint.components)
    for part in (part for part in checkpoint.components.values() if part.class_name in RECORDS):
        if (keys := _keys_of(file, shapes, part)) is not None:
            parts[part.name] = replace(part, files=file, keys=keys)
    if parts["transformer"].files is None:  # another model was named, which the file does not fit
        parts["transformer"] = _from_file(parts["transformer"], file, "model_path", config_stays=True)
    given = {*options.component_paths, *(part.name for part in parts.values() if part.files is not None)}
    if missing := [part for part in parts if part not in given and part != "scheduler"]:
        parts |= _from_hub(name, missing, options)
    return replace(checkpoint, components=parts)


def _from_hub(name: str, missing: list[str], options: ModelOptions) -> dict[str, Component]:
    """The components of a released model that its hub repository has; none where the hub cannot
    be reached.
    """
    try:
        directory = hub.resolve(name, options.revision, variant=options.variant, only=missing)
    except UserError as error:
        log.warning("%s", error)
        return {}
    whole = sources.from_directory(directory, name).components
    return {part: whole[part] for part in missing if part in whole}
